"""From what a view shows to an encoder's input."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cache_schema.masks import Size
from cache_schema.views import Aspect, View, fit_view

BILINEAR, BICUBIC = int(Image.Resampling.BILINEAR), int(Image.Resampling.BICUBIC)
RESAMPLING = {BILINEAR: "bilinear", BICUBIC: "bicubic"}
"""The filters an encoder may ask for: Pillow's number, as preprocessor_config.json has it, and its name."""


@dataclass(frozen=True)
class Preprocessing:
    """What is seen is resized to `input_size`, scaled to [0, 1] and normalised.

    `aspect` is decided before: it says which box of an image is seen (`fit`), in whole pixels, so that a mask follows
    by the same cut and comes back by resizing alone. Resampling is Pillow's, with antialiasing, to whole numbers.

    The image processors of transformers do the same to the last bit (those on Pillow) when they squash to a height and
    a width. Those that bring the short side to a size and crop the centre do the same to images of the input's shape,
    if the crop is as large as that size; DINOv2's and ResNet's crop 224 of 256 pixels, of which nothing is done here.
    """

    input_size: Size
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: str
    aspect: Aspect = "squash"

    def to_dict(self) -> dict[str, Any]:
        """What of it belongs to an encoder's identity."""
        return {**asdict(self), "resize": "pillow", "orientation": "exif"}

    def fit(self, view: View) -> View:
        """The view as this preprocessing looks at it."""
        return fit_view(view, self.input_size, self.aspect)

    def resize(self, seen: NDArray[np.uint8]) -> UInt8[np.ndarray, "h w 3"]:
        """(H, W, 3) uint8 -> (h, w, 3) uint8 at `input_size`."""
        height, width = self.input_size
        return np.array(Image.fromarray(seen).resize((width, height), Image.Resampling[self.resample.upper()]))

    def normalise(self, pixels: UInt8[Tensor, "i h w 3"]) -> Float[Tensor, "i 3 h w"]:
        """((x / 255) - mean) / std in float32, channels-last in memory, on the device of `pixels`."""
        white, mean, std = _constants(self.mean, self.std, pixels.device)
        return pixels.float().div_(white).sub_(mean).div_(std).permute(0, 3, 1, 2)


@lru_cache
def _constants(
    mean: tuple[float, float, float], std: tuple[float, float, float], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """White, mean and standard deviation; copied to the device once, since each copy would wait for it.

    White is a tensor too: a GPU divides by a plain number by multiplying with its rounded reciprocal.
    """
    with torch.inference_mode(False):
        white, mean_, std_ = (torch.tensor(values, device=device) for values in (255.0, mean, std))
    return white, mean_, std_
