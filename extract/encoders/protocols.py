"""What the extraction job asks of an encoder. Anything that has these members can be cached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class ImageEncoding:
    """Features of i images: for each layer a token grid and a CLS token. Grids may differ from layer to layer."""

    features: Mapping[str, Float[Tensor, "i _ _ _"]]
    cls: Mapping[str, Float[Tensor, "i _"]]


@dataclass(frozen=True)
class TextEncoding:
    """Features of b prompts: token sequences of length l with a mask that is True on tokens, and a pooled vector."""

    tokens: Float[Tensor, "b l d"]
    mask: Bool[Tensor, "b l"]
    pooled: Float[Tensor, "b p"]


@runtime_checkable
class ImageEncoder(Protocol):
    """A frozen image model with its preprocessing.

    `identity` holds, as plain JSON, everything that decides the features; `name` is for people. `grids` gives
    (gh, gw, d) for each layer, in the order in which the layers were asked for.
    """

    name: str

    @property
    def identity(self) -> Mapping[str, Any]: ...

    @property
    def grids(self) -> Mapping[str, tuple[int, int, int]]: ...

    def preprocess(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(H, W, 3) uint8 RGB -> (3, h, w) float32."""
        ...

    def encode(self, pixels: Float[Tensor, "i 3 h w"]) -> ImageEncoding:
        """Features of a batch of preprocessed images, in float32."""
        ...


@runtime_checkable
class TextEncoder(Protocol):
    """A frozen text model with its tokenizer. `identity` and `name` are as for images."""

    name: str

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
        """Features of a batch of tokenized prompts, in float32; padded on the right to the longest."""
        ...
