"""Frozen image models of transformers behind the `ImageEncoder` protocol, loaded by hub id or folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from cache_schema.errors import UsageError
from cache_schema.views import View
from extract.encoders.families import PYRAMIDS, TRANSFORMERS, PyramidFamily, TransformerFamily
from extract.encoders.loading import digest_weights, lay_adapter, load_checkpoint, read_config
from extract.encoders.precision import computing_in
from extract.encoders.processors import make_preprocessing, read_processor
from extract.encoders.protocols import ImageEncoding
from extract.encoders.pyramid import Pyramid, stride_of
from extract.encoders.sizes import check_size, own_size, pair_of
from extract.encoders.specs import ImageEncoderSpec, Precision
from extract.encoders.vision_transformer import VisionTransformer
from extract.preprocessing import Preprocessing

ImageTower = VisionTransformer | Pyramid
ImageFamily = TransformerFamily | PyramidFamily

Adapt = Callable[[PreTrainedModel, ImageFamily], tuple[PreTrainedModel, str | None]]
"""Lays an adapter on a whole model of a family, or does not; returns the model and the digest of the adapter."""


class ImageParts(NamedTuple):
    """What an image encoder is made of. `identity` is as plain JSON all that decides the features, but for which of
    them are asked for.
    """

    tower: ImageTower
    preprocessing: Preprocessing
    identity: Mapping[str, Any]


class HubImageEncoder:
    """A tower with the preprocessing of its checkpoint.

    Args:
        tower: on the CPU, as it was made for `precision`.
        preprocessing: to the tower's input size.
        identity: all that decides the features, but for which of them are asked for.
        name, adapter: where checkpoint and adapter were loaded from; not part of the identity.
    """

    def __init__(
        self,
        tower: ImageTower,
        preprocessing: Preprocessing,
        identity: Mapping[str, Any],
        name: str,
        *,
        adapter: str | None = None,
        device: str = "cpu",
        precision: Precision = "float32",
    ) -> None:
        self.name = name
        self.adapter = adapter
        self.device = device
        self._identity = identity
        self._tower = tower.to(device).eval()
        self._preprocessing = preprocessing
        self._precision = precision

    @property
    def identity(self) -> Mapping[str, Any]:
        """As plain JSON, all that decides the features, but for which of them are asked for."""
        return self._identity

    @property
    def grids(self) -> Mapping[str, tuple[int, int, int]]:
        """(gh, gw, d) of each layer."""
        return self._tower.grids

    @property
    def cls_widths(self) -> Mapping[str, int]:
        """d of each layer with a CLS token."""
        return self._tower.cls_widths

    @property
    def attention_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of one image's attention outputs, by name."""
        return self._tower.attention_shapes

    def fit(self, view: View) -> View:
        """What is looked at where a view is asked for."""
        return self._preprocessing.fit(view)

    def preprocess(self, image: NDArray[np.uint8]) -> UInt8[np.ndarray, "h w 3"]:
        """(H, W, 3) uint8 RGB -> (h, w, 3) uint8 at the input size."""
        return self._preprocessing.resize(image)

    @torch.inference_mode()
    def encode(self, pixels: UInt8[Tensor, "i h w 3"]) -> ImageEncoding:
        """Features of i preprocessed images, on the encoder's device.

        In float32. Under a half precision a layer has the type that autocast leaves it in: that of a residual sum or a
        norm is float32, that of a convolution is half. Attention outputs are float32 always.
        """
        normalised = self._preprocessing.normalise(pixels.to(self.device))
        with computing_in(self._precision, self.device):
            encoding: ImageEncoding = self._tower(normalised)
        return encoding


def load_image_encoder(spec: ImageEncoderSpec, *, device: str = "cpu", compiled: bool = False) -> HubImageEncoder:
    """Load an image encoder by hub id or folder.

    Args:
        compiled: compile its blocks by torch, which takes a while and changes features in their last bits.

    Raises:
        UsageError: the checkpoint or its adapter cannot be had, is of another family, lacks weights, or cannot give
            what is asked for.
    """

    def adapt(model: PreTrainedModel, family: ImageFamily) -> tuple[PreTrainedModel, str | None]:
        return (model, None) if spec.adapter is None else lay_adapter(model, spec.adapter)

    tower, preprocessing, identity = load_image_parts(spec, adapt, spec.precision)
    if compiled:
        tower.compile_blocks()
    return HubImageEncoder(
        tower,
        preprocessing,
        identity,
        spec.source,
        adapter=spec.adapter,
        device=device,
        precision=spec.precision,
    )


def load_image_parts(
    spec: ImageEncoderSpec, adapt: Adapt, weights_for: Precision, start: int | None = None
) -> ImageParts:
    """Load what an image encoder is made of.

    Args:
        adapt: what is to be done to the model before it is cut. `spec.adapter` is left to it.
        weights_for: the precision for which weights may be rounded beforehand.
        start: the block to start at, see `VisionTransformer`.

    Raises:
        UsageError: as `load_image_encoder` does.
    """
    config = read_config(spec.source)
    model_type = config.get("model_type")
    if model_type not in TRANSFORMERS and model_type not in PYRAMIDS:
        known = ", ".join([*TRANSFORMERS, *PYRAMIDS])
        raise UsageError(f"{spec.source} has model type {model_type!r}; image encoders are {known}.")
    family = TRANSFORMERS.get(model_type) or PYRAMIDS[model_type]
    processor = read_processor(spec.source)
    model = load_checkpoint(family.model_class, spec.source)
    own = own_size(model.config, processor, spec.source)
    input_size = pair_of(spec.input_size or own)
    if isinstance(family, PyramidFamily):
        check_size(input_size, pair_of(stride_of(model)), spec.source)
    elif input_size != own:  # which may leave something over: in 384 pixels, SigLIP's so400m has 27 patches of 14
        check_size(input_size, pair_of(model.config.patch_size), spec.source)
    preprocessing = make_preprocessing(processor, spec.source, input_size, spec.aspect, family.resample)
    weights = digest_weights(model)
    model, adapter = adapt(model, family)
    tower: ImageTower
    if isinstance(family, TransformerFamily):
        tower = VisionTransformer(model, family, spec.layers, spec.attention, input_size, weights_for, start)
    elif start is None:
        tower = Pyramid(model, family, spec.layers, spec.attention, input_size, weights_for)
    else:
        raise UsageError(f"{type(model).__name__} is a convolutional network; only transformers start at a block.")
    identity = {
        "class": family.model_class.__name__,
        "config": config,
        "weights": weights,
        "adapter": adapter,
        "preprocessing": preprocessing.to_dict(),
        "compute_dtype": spec.precision,
    }
    return ImageParts(tower, preprocessing, identity)
