"""int8 tokens: each token's channels as whole numbers from -127 to 127, times one float16 scale of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST = 127


def float_dtype(dtype: str) -> str:
    """The data type of what is floating point beside token grids of `dtype`: CLS tokens and prompt features."""
    return "float16" if dtype == "int8" else dtype


def quantize(tokens: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """(..., d) tokens as (..., d) int8 values and (...) float16 scales.

    No value is off by more than half its token's scale, which is the token's largest magnitude / 127, rounded up to a
    float16. A token that float16 cannot scale (above 8 million, or no number) has a scale that is not finite; whoever
    stores it must refuse.
    """
    largest = np.abs(tokens).max(axis=-1) / np.float32(LARGEST)
    with np.errstate(over="ignore", invalid="ignore"):
        scale = largest.astype(np.float16)
        scale = np.where(scale < largest, np.nextafter(scale, np.float16(np.inf)), scale)
        divisor = np.where(scale == 0, np.float16(1), scale).astype(np.float32)
        values = np.rint(tokens / divisor[..., None])
    return np.nan_to_num(values).astype(np.int8), scale


def dequantize(values: NDArray[np.int8], scale: NDArray[np.float16]) -> NDArray[Any]:
    """(..., d) float32 tokens of what `quantize` gave."""
    return values.astype(np.float32) * scale.astype(np.float32)[..., None]
