"""Reading how a checkpoint wants its images from its processor file (preprocessor_config.json)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers.image_processing_utils import BaseImageProcessor

from cache_schema.errors import UsageError
from cache_schema.masks import Size
from cache_schema.views import Aspect
from extract.encoders.loading import from_hub
from extract.preprocessing import RESAMPLING, Preprocessing

_RGB = 3


def read_processor(source: str) -> dict[str, Any]:
    """A checkpoint's processor file.

    Raises:
        UsageError: it cannot be had.
    """
    processor, _ = from_hub(source, lambda: BaseImageProcessor.get_image_processor_dict(source))
    return dict(processor)


def make_preprocessing(
    processor: Mapping[str, Any], source: str, input_size: Size, aspect: Aspect, default_resample: int
) -> Preprocessing:
    """Preprocessing as a processor file says, but for size and aspect ratio.

    Raises:
        UsageError: it says something that is not done here; no other way of preparing pixels would give the features
            that the checkpoint was trained for.
    """
    for switch in ("do_rescale", "do_normalize"):
        if processor.get(switch) is False:
            raise UsageError(f"{source} says {switch} false; name a checkpoint that rescales and normalises.")
    factor = processor.get("rescale_factor", 1 / 255)
    if not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise UsageError(f"{source} scales pixels by {factor}; name a checkpoint that scales them by 1/255.")
    resample = processor.get("resample", default_resample)
    if resample not in RESAMPLING:
        raise UsageError(f"{source} resamples by Pillow's filter {resample}; known are {RESAMPLING}.")
    mean, std = (_colours(processor.get(name)) for name in ("image_mean", "image_std"))
    if mean is None or std is None or 0 in std:
        raise UsageError(f"{source}/preprocessor_config.json lacks image_mean or image_std; fetch it again.")
    return Preprocessing(input_size, mean, std, RESAMPLING[resample], aspect)


def size_of_processor(processor: Mapping[str, Any], source: str) -> Size:
    """The (H, W) that a processor brings images to; a size of one number is that of a square.

    Raises:
        UsageError: it does not say.
    """
    names = ("crop_size", "size") if processor.get("do_center_crop") else ("size",)
    for name in names:
        size = processor.get(name)
        if isinstance(size, int):
            return size, size
        if isinstance(size, Mapping) and {"height", "width"} <= size.keys():
            return int(size["height"]), int(size["width"])
        if isinstance(size, Mapping) and "shortest_edge" in size:
            return int(size["shortest_edge"]), int(size["shortest_edge"])
    raise UsageError(f"{source} does not say what size its images have; give an input size.")


def _colours(values: Any) -> tuple[float, float, float] | None:
    if isinstance(values, int | float):
        values = [values] * _RGB
    if not isinstance(values, list) or [type(value) in (int, float) for value in values] != [True] * _RGB:
        return None
    red, green, blue = map(float, values)
    return red, green, blue
