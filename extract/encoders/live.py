"""Encoders that learn: the towers that features are cached with, forwards with gradients, and LoRA adapters on them.

What learns is the adapter alone. In evaluation mode a live encoder says what the frozen one of the same spec says, in
its precision; in training mode it computes in whatever autocast the caller set up.
"""

from __future__ import annotations

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from transformers import CLIPModel, PreTrainedConfig, PreTrainedModel, Siglip2Model, SiglipModel
from transformers.utils import cached_file

from cache_schema import atomic
from cache_schema.errors import UsageError
from cache_schema.masks import Size
from cache_schema.views import View
from extract.encoders.families import PYRAMIDS, TRANSFORMERS, TransformerFamily
from extract.encoders.image import ImageFamily, ImageParts, ImageTower, load_image_parts
from extract.encoders.loading import from_hub, lay_adapter, load_checkpoint, open_adapter, read_config
from extract.encoders.lora import (
    LoraSpec,
    adapted_names,
    add_lora,
    lora_targets,
    require_lora,
    save_lora,
    set_training,
)
from extract.encoders.precision import computing_in
from extract.encoders.protocols import ImageEncoding, TextEncoding
from extract.encoders.specs import ImageEncoderSpec, TextEncoderSpec
from extract.encoders.text import TextFamily, TextTower, load_text_model, load_text_parts
from extract.encoders.vision_transformer import VisionTransformer, checkpoint_blocks, count_blocks

AnySpec = ImageEncoderSpec | TextEncoderSpec
Live = TypeVar("Live", bound="_LiveEncoder")

_WHOLE_MODELS: dict[str, type[PreTrainedModel]] = {"clip": CLIPModel, "siglip": SiglipModel, "siglip2": Siglip2Model}
"""Of checkpoints of which an encoder takes a tower, by model type."""

_FILES_BESIDE_WEIGHTS = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "tokenizer.model",
)


class _LiveEncoder(nn.Module, ABC):
    """What live encoders of images and of prompts have in common.

    Args:
        identity: all that decides what the encoder says as it was loaded, an adapter that it continues included.
        adapter: the adapter with the model in it, if there is one.
    """

    _tower: nn.Module

    def __init__(self, tower: nn.Module, identity: Mapping[str, Any], spec: AnySpec, adapter: PeftModel | None) -> None:
        super().__init__()
        self._tower = tower
        self._identity = identity
        self._spec = spec
        self._adapters = [] if adapter is None else [adapter]  # in a list: the tower has its modules already
        self.eval()

    @property
    def identity(self) -> Mapping[str, Any]:
        """As plain JSON, all that decides what the encoder says as long as it has not learned; that of the frozen one
        of the same spec, or of the spec with the adapter that is continued.
        """
        return self._identity

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def adapted_modules(self) -> tuple[str, ...]:
        """Full names, in the model that transformers loads, of the modules with an adapter."""
        return tuple(name for adapter in self._adapters for name in adapted_names(adapter.get_base_model()))

    @property
    def num_trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    @property
    def num_parameters(self) -> int:
        """All there are here, of the adapter too. Blocks that nothing is asked of are not here."""
        return sum(parameter.numel() for parameter in self.parameters())

    def train(self: Live, mode: bool = True) -> Live:
        """In training the adapter's dropout is on; the model's own stays off, as it was when features were cached."""
        super().train(mode)
        set_training(self._tower, mode and self.num_trainable > 0)
        return self

    @abstractmethod
    def gradient_checkpointing(self, on: bool) -> None:
        """Compute each block again in the backward pass and keep nothing but its input, or not."""

    @abstractmethod
    def _load_bare(self) -> PreTrainedModel:
        """The model as it was before any adapter, whole."""

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter as PEFT does; one that is there is replaced.

        Raises:
            UsageError: there is none.
        """
        save_lora(self._adapter, folder)

    def save_merged(self, folder: Path) -> None:
        """Write the checkpoint with the adapter merged into it, in float32, for plain transformers to load.

        It is of the model that was loaded, be it one for images and text, with all its blocks, its config and the files
        of its processor and tokenizer. What learns here is not changed.

        Raises:
            UsageError: there is no adapter, or something is at `folder`.
        """
        if folder.exists():
            raise UsageError(f"{folder} is there already; name another folder for the merged encoder.")
        with tempfile.TemporaryDirectory() as temporary:
            save_lora(self._adapter, Path(temporary))
            merged, _ = lay_adapter(self._load_bare(), temporary)
        _save_whole(merged, self._spec.source, folder)

    @property
    def _adapter(self) -> PeftModel:
        if not self._adapters:
            raise UsageError(f"{self._spec.source} was loaded without an adapter; give a LoraSpec, or an adapter.")
        return self._adapters[0]

    def _computing(self) -> AbstractContextManager[None]:
        return nullcontext() if self.training else computing_in(self._spec.precision, self.device.type)


class LiveImageEncoder(_LiveEncoder):
    """An image encoder that learns; see `load`."""

    _tower: ImageTower

    def __init__(self, parts: ImageParts, spec: ImageEncoderSpec, adapter: PeftModel | None, start: int | None) -> None:
        super().__init__(parts.tower, parts.identity, spec, adapter)
        self._preprocessing = parts.preprocessing
        self.start = start

    @classmethod
    def load(
        cls,
        spec: ImageEncoderSpec,
        lora: LoraSpec | None = None,
        *,
        adapter: str | None = None,
        start: int | None = None,
    ) -> LiveImageEncoder:
        """Load an encoder by hub id or folder, in float32 and evaluation mode.

        Args:
            lora: adds a fresh adapter, or says what the saved one has to be.
            adapter: folder of a saved adapter that learns on. With neither, nothing learns.
            start: the block to start at, the first being 0; `forward` is then given what goes into it.

        Raises:
            UsageError: the checkpoint or the adapter cannot be had or does not fit, or cannot give what is asked for.
        """
        _check(spec)
        if lora is not None and start is not None and lora.first_block < start:
            raise UsageError(
                f"adapters from block {lora.first_block} on cannot learn where the encoder starts at block {start}; "
                f"set first_block to {start} or more."
            )
        laid: list[_Laid] = []

        def adapt(model: PreTrainedModel, family: ImageFamily) -> tuple[PreTrainedModel, str | None]:
            num_blocks = None
            if isinstance(family, TransformerFamily):
                blocks = model.get_submodule(family.blocks)
                assert isinstance(blocks, nn.ModuleList)
                num_blocks = count_blocks(spec.layers, spec.attention, len(blocks))
            laid.append(_lay(model, lora, adapter, lambda of: lora_targets(model, family, of, num_blocks)))
            return model, laid[0].digest

        parts = load_image_parts(spec, adapt, "float32", start)
        encoder = cls(parts, spec, laid[0].adapted, start)
        lost = [name for name in laid[0].names if name not in encoder.adapted_modules]
        if lost:
            raise UsageError(
                f"the adapter {adapter} adapts {lost[0]}, which has no part in the layers that are asked for "
                f"({', '.join(spec.layers)}), or comes before the block where the encoder starts; ask for the layers "
                "it was trained with."
            )
        return encoder

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

    @property
    def input_size(self) -> Size:
        """(H, W) in pixels."""
        return self._preprocessing.input_size

    def fit(self, view: View) -> View:
        """What is looked at where a view is asked for."""
        return self._preprocessing.fit(view)

    def preprocess(self, image: NDArray[np.uint8]) -> UInt8[np.ndarray, "h w 3"]:
        """(H, W, 3) uint8 RGB -> (h, w, 3) uint8 at the input size."""
        return self._preprocessing.resize(image)

    def forward(self, given: UInt8[Tensor, "i h w 3"] | Float[Tensor, "i n d"]) -> ImageEncoding:
        """Features of i images, with gradients.

        Args:
            given: preprocessed pixels; or, where the encoder starts at block k, what goes into that block, all n
                tokens of it: CLS, registers, patches. That is layer `"k+tokens"`.

        Raises:
            ValueError: it is not what this encoder takes.
        """
        tokens = self._tower.num_tokens if isinstance(self._tower, VisionTransformer) else 0
        if self.start is not None and (given.ndim != 3 or given.shape[1] != tokens):
            raise ValueError(
                f"this encoder starts at block {self.start}: give it (i, {tokens}, d) tokens, not {tuple(given.shape)}"
            )
        if self.start is None and given.ndim != 4:
            raise ValueError(f"this encoder starts at the pixels: give it (i, h, w, 3), not {tuple(given.shape)}")
        given = given.to(self.device)
        ready = self._preprocessing.normalise(given) if self.start is None else given.float()
        with self._computing():
            encoding: ImageEncoding = self._tower(ready)
        return encoding

    def gradient_checkpointing(self, on: bool) -> None:
        """Compute each block again in the backward pass and keep nothing but its input, or not."""
        if isinstance(self._tower, VisionTransformer):  # of nothing else anything learns
            self._tower.checkpoint_blocks(on)

    def _load_bare(self) -> PreTrainedModel:
        model_type = read_config(self._spec.source)["model_type"]
        family = TRANSFORMERS.get(model_type) or PYRAMIDS[model_type]
        return load_checkpoint(family.model_class, self._spec.source)


class LiveTextEncoder(_LiveEncoder):
    """A text encoder that learns; see `load`."""

    _tower: TextTower

    def __init__(
        self, tower: TextTower, identity: Mapping[str, Any], spec: TextEncoderSpec, adapter: PeftModel | None
    ) -> None:
        super().__init__(tower, identity, spec, adapter)

    @classmethod
    def load(
        cls, spec: TextEncoderSpec, lora: LoraSpec | None = None, *, adapter: str | None = None
    ) -> LiveTextEncoder:
        """Load an encoder by hub id or folder, in float32 and evaluation mode.

        Args:
            lora: adds a fresh adapter, or says what the saved one has to be.
            adapter: folder of a saved adapter that learns on. With neither, nothing learns.

        Raises:
            UsageError: the checkpoint, its tokenizer or the adapter cannot be had or does not fit.
        """
        _check(spec)
        laid: list[_Laid] = []

        def adapt(model: PreTrainedModel, family: TextFamily) -> tuple[PreTrainedModel, str | None]:
            laid.append(_lay(model, lora, adapter, lambda of: lora_targets(model, family, of)))
            return model, laid[0].digest

        tower, identity = load_text_parts(spec, adapt)
        return cls(tower, identity, spec, laid[0].adapted)

    @property
    def token_width(self) -> int:
        return self._tower.token_width

    @property
    def pooled_width(self) -> int:
        return self._tower.pooled_width

    @property
    def max_length(self) -> int:
        """The most tokens a prompt may have."""
        return self._tower.max_length

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt, never padded. A long one is cut among its words: special tokens at its end stay."""
        return self._tower.tokenize(prompts)

    def forward(self, token_ids: Sequence[Sequence[int]]) -> TextEncoding:
        """Features of b tokenized prompts, with gradients; the tokens of each prompt stand in front."""
        with self._computing():
            encoding: TextEncoding = self._tower(token_ids)
        return encoding

    def gradient_checkpointing(self, on: bool) -> None:
        """Compute each block again in the backward pass and keep nothing but its input, or not."""
        checkpoint_blocks(self._tower.blocks, on)

    def _load_bare(self) -> PreTrainedModel:
        return load_text_model(self._spec.source)


class _Laid(NamedTuple):
    """What was laid on a model: the adapter, its digest if it was saved before, the modules it adapts."""

    adapted: PeftModel | None
    digest: str | None
    names: tuple[str, ...]


def _check(spec: AnySpec) -> None:
    if spec.adapter is not None:
        raise UsageError(
            f"an encoder with an adapter on it ({spec.adapter}) cannot learn another one before the two are merged: "
            "name the folder that `headstart finetune --merge` left, or go on with that adapter."
        )


def _lay(
    model: PreTrainedModel, lora: LoraSpec | None, folder: str | None, targets: Callable[[LoraSpec], list[str]]
) -> _Laid:
    """Put a fresh adapter or a saved one into a model, or none."""
    adapted, digest = None, None
    if folder is not None:
        names = None if lora is None else targets(lora)
        adapted, digest = open_adapter(model, folder, learns=True)
        if lora is not None and names is not None:
            require_lora(adapted, names, lora, folder)
    elif lora is not None:
        adapted = add_lora(model, targets(lora), lora)
    return _Laid(adapted, digest, adapted_names(model))


def _save_whole(model: PreTrainedModel, source: str, folder: Path) -> None:
    """Save a model in the place of the one at `source`, with what else that checkpoint has.

    Args:
        model: the whole, or the tower that was taken of it.
    """
    config, _ = from_hub(source, lambda: PreTrainedConfig.get_config_dict(source))
    whole = model
    if config["model_type"] in _WHOLE_MODELS:
        whole = load_checkpoint(_WHOLE_MODELS[config["model_type"]], source)
        part, names = model.state_dict(), whole.state_dict().keys()
        prefix = next(
            prefix for prefix in ("vision_model.", "text_model.", "") if {prefix + name for name in part} <= names
        )
        whole.load_state_dict({prefix + name: tensor for name, tensor in part.items()}, strict=False)
    with atomic.staged(folder) as temporary:
        whole.save_pretrained(temporary)
        described = {**_without_dtype(config), "architectures": [type(whole).__name__], "dtype": "float32"}
        atomic.write_json(temporary / "config.json", described)
        for name in _FILES_BESIDE_WEIGHTS:
            path = from_hub(source, partial(cached_file, source, name, _raise_exceptions_for_missing_entries=False))
            if path is not None:
                shutil.copyfile(path, temporary / name)


def _without_dtype(config: Any) -> Any:
    """A config as it was published, but for the type of its weights and what the hub says of it."""
    if not isinstance(config, dict):
        return config
    return {
        name: _without_dtype(value)
        for name, value in config.items()
        if name not in ("dtype", "torch_dtype", "_commit_hash", "_name_or_path")
    }
