"""Views: ways of looking at an image that are each encoded for themselves, and what they do to its mask.

The features of a mirrored image are not the mirrored features of the image, so augmentation of cached features needs a
forward pass for each view. Image and mask go through the same transform.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_schema.errors import UsageError
from cache_schema.masks import Size

WHOLE = "whole"

PADDING_RGB = (124, 116, 104)
"""What a view that reaches beyond its image shows there: the mean colour of ImageNet. A mask is empty there."""

_SPEC = re.compile(r"(?P<kind>scale|crop)-(?P<share>\d+(\.\d+)?)(?P<flip>\+flip)?", re.ASCII)

_REMEDY = "a view is whole, flip, scale-S or crop-S (S such as 0.8), the last two perhaps with +flip"


@dataclass(frozen=True)
class View:
    """A box of an image, XYXY in pixels, that may reach beyond its edges, and whether it is mirrored left to right."""

    box: tuple[int, int, int, int]
    flip: bool

    def apply(self, pixels: NDArray[Any], padding: Any) -> NDArray[Any]:
        """What is seen of (H, W) or (H, W, C) pixels; `padding` fills what lies beyond the edges."""
        left, top, right, bottom = self.box
        seen = np.empty((bottom - top, right - left, *pixels.shape[2:]), pixels.dtype)
        seen[...] = padding
        inside = pixels[max(0, top) : bottom, max(0, left) : right]
        above, before = max(0, -top), max(0, -left)
        seen[above : above + inside.shape[0], before : before + inside.shape[1]] = inside
        return seen[:, ::-1] if self.flip else seen

    def apply_to_image(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """What is seen of an (H, W, 3) RGB image."""
        return self.apply(image, np.array(PADDING_RGB, np.uint8))

    def apply_to_mask(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """What is seen of an (H, W) mask."""
        return self.apply(mask, False)

    def to_row(self) -> tuple[int, ...]:
        """The view's row in a store: box and flip."""
        return (*self.box, int(self.flip))

    @classmethod
    def from_row(cls, row: Sequence[int]) -> View:
        left, top, right, bottom, flip = (int(value) for value in row)
        return cls((left, top, right, bottom), bool(flip))


def check_views(specs: Sequence[str]) -> None:
    """Make sure that a job's views can be made, and that the whole image comes first.

    Raises:
        UsageError: they cannot, or it does not.
    """
    if not specs or specs[0] != WHOLE:
        raise UsageError("views must begin with whole: validation and prediction look at whole images.")
    for number, spec in enumerate(specs):
        make_view(spec, number, (64, 64), "")
    twice = {spec for spec in specs if specs.count(spec) > 1 and not spec.startswith("crop-")}
    if twice:
        raise UsageError(f"view {sorted(twice)[0]} is named twice; only crops, which fall elsewhere each time, may be.")


def make_view(spec: str, number: int, size: Size, image_sha256: str) -> View:
    """The view that a spec makes of one image.

    `whole`; `flip` is the whole image mirrored; `scale-S` is S times as large around the centre, cut (S > 1) or padded
    (S < 1) to the same frame; `crop-S` shows S of the image's height and width at a place drawn from the image's digest
    and the view's `number`. `+flip` mirrors as well.

    Raises:
        UsageError: there is no such spec.

    >>> make_view("scale-2", 1, (100, 200), "")
    View(box=(50, 25, 150, 75), flip=False)
    """
    height, width = size
    if spec in (WHOLE, "flip"):
        return View((0, 0, width, height), spec == "flip")
    parsed = _SPEC.fullmatch(spec)
    if parsed is None:
        raise UsageError(f"unknown view {spec!r}: {_REMEDY}.")
    kind, share, flip = parsed["kind"], float(parsed["share"]), parsed["flip"] is not None
    if not 0.1 <= share <= (10 if kind == "scale" else 1):
        raise UsageError(f"view {spec!r} is out of range: scales go from 0.1 to 10, crops from 0.1 to 1.")
    side = 1 / share if kind == "scale" else share
    seen_height, seen_width = max(1, round(height * side)), max(1, round(width * side))
    if kind == "scale":
        top, left = (height - seen_height) // 2, (width - seen_width) // 2
    else:
        seed = hashlib.sha256(f"{spec} {number} {image_sha256}".encode()).digest()
        top = _place(seed[:8], height - seen_height + 1)
        left = _place(seed[8:16], width - seen_width + 1)
    return View((left, top, left + seen_width, top + seen_height), flip)


def _place(seed: bytes, num_places: int) -> int:
    """One of so many places, from 64 bits: the same for ever, whatever draws random numbers elsewhere."""
    return int.from_bytes(seed, "little") * num_places >> 64
