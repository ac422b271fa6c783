"""An encoder that stands in for an accelerator: it keeps a batch for a fixed time without using the processor."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from cache_schema.masks import Size
from cache_schema.views import View
from extract.encoders.protocols import ImageEncoding
from extract.preprocessing import Preprocessing


@dataclass
class StandIn:
    """Waits, and then gives float16 features that were ready before, the same for every batch.

    Args:
        wait_s: for a batch of any size.
        grid: (gh, gw, d) of each layer.
        batch_size: the most images in a batch.
    """

    wait_s: float = 0.0
    grid: tuple[int, int, int] = (16, 16, 384)
    num_layers: int = 1
    input_size: Size = (224, 224)
    batch_size: int = 32
    name: str = "stand-in"
    device: str = "cpu"
    adapter: str | None = None

    @property
    def identity(self) -> Mapping[str, Any]:
        """Of no model, so no cache of it is good for anything."""
        return {"class": "stand-in", "grid": list(self.grid), "preprocessing": self._preprocessing.to_dict()}

    @property
    def grids(self) -> Mapping[str, tuple[int, int, int]]:
        """One for each layer, all alike."""
        return {str(layer): self.grid for layer in range(self.num_layers)}

    @property
    def cls_widths(self) -> Mapping[str, int]:
        """None: it has no CLS tokens."""
        return {}

    @property
    def attention_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """None."""
        return {}

    def fit(self, view: View) -> View:
        """As the real encoders do."""
        return self._preprocessing.fit(view)

    def preprocess(self, image: NDArray[np.uint8]) -> UInt8[np.ndarray, "h w 3"]:
        """As the real encoders do."""
        return self._preprocessing.resize(image)

    def encode(self, pixels: UInt8[Tensor, "i h w 3"]) -> ImageEncoding:
        """Features after a while, as a device would bring them."""
        time.sleep(self.wait_s)
        return ImageEncoding({layer: self._features[: len(pixels)] for layer in self.grids})

    @property
    def _preprocessing(self) -> Preprocessing:
        return Preprocessing(self.input_size, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic")

    @cached_property
    def _features(self) -> Tensor:
        values = np.random.default_rng(0).standard_normal((self.batch_size, *self.grid), np.float32)
        return torch.from_numpy(values.astype(np.float16))
