"""Vision transformers of the DINO family behind the `ImageEncoder` protocol, loaded by hub id or folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    PreTrainedModel,
)
from transformers.image_processing_utils import BaseImageProcessor

from cache_schema.errors import UsageError, unknown_name
from cache_schema.masks import Size
from extract.encoders.loading import digest_weights, from_hub, load_checkpoint, read_config
from extract.encoders.protocols import ImageEncoding
from extract.images import BICUBIC, BILINEAR, RESAMPLING, Preprocessing

IMAGE_MODELS: dict[str, type[PreTrainedModel]] = {
    "dinov2": Dinov2Model,
    "dinov2_with_registers": Dinov2WithRegistersModel,
    "dinov3_vit": DINOv3ViTModel,
}
"""By the `model_type` of a checkpoint's config.json."""

FINAL_LAYER = "last"
"""The output of the last block after the final layer norm. A number names a block's output before any norm."""


class VisionTransformerEncoder:
    """Token grids and CLS tokens of a vision transformer. Register tokens are dropped.

    Args:
        model: one of `IMAGE_MODELS`.
        config: the checkpoint's config.json, part of its identity.
        preprocessing: must give `input_size` in multiples of the patch.
        layers: `"last"` (final norm applied) and block numbers as strings: `"9"` is `hidden_states[9]`, the output of
            the ninth block, not normed; `"0"` is the embeddings.
        name: what people call it; not part of its identity.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: Mapping[str, Any],
        preprocessing: Preprocessing,
        layers: Sequence[str],
        name: str,
        device: str = "cpu",
    ) -> None:
        patch = model.config.patch_size
        if not layers:
            raise UsageError("no layer is asked for; name at least one, such as last.")
        if any(side % patch or side < patch for side in preprocessing.input_size):
            height, width = preprocessing.input_size
            raise UsageError(f"input size {height} x {width} is no multiple of {name}'s patch of {patch} pixels.")
        known = [FINAL_LAYER, *map(str, range(model.config.num_hidden_layers + 1))]
        for layer in layers:
            if layer not in known:
                raise unknown_name("layer", layer, known)
        self.name = name
        self._model = model.to(device)
        self._config = config
        self._preprocessing = preprocessing
        self._layers = tuple(layers)
        self._device = device
        self._num_prefix_tokens = 1 + getattr(model.config, "num_register_tokens", 0)

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        return {
            "class": type(self._model).__name__,
            "config": self._config,
            "weights": digest_weights(self._model),
            "adapter": None,
            "preprocessing": self._preprocessing.to_dict(),
            "layers": list(self._layers),
            "compute_dtype": "float32",
        }

    @property
    def grids(self) -> Mapping[str, tuple[int, int, int]]:
        height, width = (side // self._model.config.patch_size for side in self._preprocessing.input_size)
        return dict.fromkeys(self._layers, (height, width, self._model.config.hidden_size))

    def preprocess(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(H, W, 3) uint8 RGB -> (3, h, w) float32."""
        return self._preprocessing(image)

    @torch.inference_mode()
    def encode(self, pixels: Float[Tensor, "i 3 h w"]) -> ImageEncoding:
        """Features of i preprocessed images, in float32, on the encoder's device."""
        output = self._model(pixel_values=pixels.to(self._device), output_hidden_states=True)
        states = {
            layer: output.last_hidden_state if layer == FINAL_LAYER else output.hidden_states[int(layer)]
            for layer in self._layers
        }
        features = {
            layer: state[:, self._num_prefix_tokens :].unflatten(1, self.grids[layer][:2])
            for layer, state in states.items()
        }
        return ImageEncoding(features, {layer: state[:, 0] for layer, state in states.items()})


def load_image_encoder(
    source: str, *, layers: Sequence[str] = (FINAL_LAYER,), input_size: Size | None = None, device: str = "cpu"
) -> VisionTransformerEncoder:
    """Load an image encoder by hub id or folder.

    Args:
        input_size: (H, W) in pixels; by default the square size the checkpoint was trained at.

    Raises:
        UsageError: the checkpoint cannot be had, is of another family, lacks weights, or cannot take that size.
    """
    config = read_config(source)
    family = config.get("model_type")
    if family not in IMAGE_MODELS:
        raise UsageError(f"{source} has model type {family!r}; image encoders are {', '.join(IMAGE_MODELS)}.")
    processor = from_hub(source, lambda: BaseImageProcessor.get_image_processor_dict(source)[0])
    if not {"image_mean", "image_std"} <= processor.keys():
        raise UsageError(f"{source}/preprocessor_config.json lacks image_mean or image_std; fetch it again.")
    resample = processor.get("resample", BILINEAR if family == "dinov3_vit" else BICUBIC)
    if resample not in RESAMPLING:
        raise UsageError(f"{source} resamples by Pillow's filter {resample}; known are {list(RESAMPLING)}.")
    model = load_checkpoint(IMAGE_MODELS[family], source)
    side = model.config.image_size
    preprocessing = Preprocessing(
        input_size=input_size or (side, side),
        mean=tuple(processor["image_mean"]),
        std=tuple(processor["image_std"]),
        resample=RESAMPLING[resample],
    )
    return VisionTransformerEncoder(model, config, preprocessing, layers, source, device)
