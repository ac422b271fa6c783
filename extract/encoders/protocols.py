"""What the extraction job asks of an encoder. Anything that has these members can be cached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from cache_schema.views import View


@dataclass(frozen=True)
class ImageEncoding:
    """Features of i images: by layer a token grid and, where the model has one, a CLS token; by name what its last
    attention layer says. Grids may differ from layer to layer. In float32 or the precision they were computed in.
    """

    features: Mapping[str, Float[Tensor, "i _ _ _"]]
    cls: Mapping[str, Float[Tensor, "i _"]] = field(default_factory=dict)
    attention: Mapping[str, Float[Tensor, "i ..."]] = field(default_factory=dict)


@dataclass(frozen=True)
class TextEncoding:
    """Features of b prompts: token sequences of length l with a mask that is True on tokens, and a pooled vector."""

    tokens: Float[Tensor, "b l d"]
    mask: Bool[Tensor, "b l"]
    pooled: Float[Tensor, "b p"]


@runtime_checkable
class ImageEncoder(Protocol):
    """A frozen image model with its preprocessing.

    `identity` holds, as plain JSON, everything that decides the features but for which of them are asked for; `name` is
    for people. `grids` gives (gh, gw, d) for each layer, in the order in which the layers were asked for, `cls_widths`
    gives d for each layer with a CLS token, and `attention_shapes` the shape of one image's attention outputs by name.
    `device` is where it computes, and `adapter` the folder of the adapter that is laid on it, if one is.
    """

    name: str
    device: str
    adapter: str | None

    @property
    def identity(self) -> Mapping[str, Any]: ...

    @property
    def grids(self) -> Mapping[str, tuple[int, int, int]]: ...

    @property
    def cls_widths(self) -> Mapping[str, int]: ...

    @property
    def attention_shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def fit(self, view: View) -> View:
        """What this encoder looks at where a view is asked for: the view, cut or extended to the input's shape."""
        ...

    def preprocess(self, image: NDArray[np.uint8]) -> UInt8[np.ndarray, "h w 3"]:
        """(H, W, 3) uint8 RGB, all of which is to be seen -> the same at the model's input size."""
        ...

    def encode(self, pixels: UInt8[Tensor, "i h w 3"]) -> ImageEncoding:
        """Features of a batch of preprocessed images, on the encoder's device. Normalises them first."""
        ...


@runtime_checkable
class TextEncoder(Protocol):
    """A frozen text model with its tokenizer. `identity`, `name` and `adapter` are as for images."""

    name: str
    adapter: str | None

    @property
    def identity(self) -> Mapping[str, Any]: ...

    @property
    def token_width(self) -> int: ...

    @property
    def pooled_width(self) -> int: ...

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt, special tokens included, cut at the model's limit, never padded."""
        ...

    def encode(self, token_ids: Sequence[Sequence[int]]) -> TextEncoding:
        """Features of a batch of tokenized prompts, on the encoder's device."""
        ...
