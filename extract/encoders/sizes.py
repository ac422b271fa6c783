"""Input sizes: which one a checkpoint was trained at, and which ones it can take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from cache_schema.errors import UsageError
from cache_schema.masks import Size
from extract.encoders.processors import size_of_processor


def pair_of(value: Any) -> Size:
    """A config's size: one number for both sides, or (H, W)."""
    if isinstance(value, int):
        return value, value
    height, width = value
    return int(height), int(width)


def own_size(config: PreTrainedConfig, processor: Mapping[str, Any], source: str) -> Size:
    """The (H, W) in pixels that a checkpoint was trained at: its config's, else that of its position embeddings
    (NaFlex), else that of its processor (ResNet).

    Raises:
        UsageError: nothing says.
    """
    if hasattr(config, "image_size"):
        return pair_of(config.image_size)
    if hasattr(config, "num_patches"):
        side = math.isqrt(config.num_patches) * int(config.patch_size)
        return side, side
    return size_of_processor(processor, source)


def check_size(input_size: Size, step: Size, source: str) -> None:
    """Make sure that an input size is a whole number of steps: patches, or the stride of the last stage.

    Raises:
        UsageError: it is not.
    """
    nearest = tuple(max(1, round(side / size)) * size for side, size in zip(input_size, step, strict=True))
    if nearest != input_size:
        raise UsageError(
            f"input size {_spell(input_size)} is no multiple of the {_spell(step)} pixels of a cell of {source}; "
            f"the nearest size is {_spell(nearest)}."
        )


def _spell(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))
