"""Views: ways of looking at an image that are each encoded for themselves, and what they do to its mask.

The features of a mirrored image are not the mirrored features of the image, so augmentation of cached features needs a
forward pass for each view. Image and mask go through the same transform, and what a head says of a view is put back
into the image by its inverse. Knows nothing of encoders: which box of an image an input of some shape shows is
arithmetic, resizing it is not done here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from cache_schema.errors import UsageError
from cache_schema.masks import Size

WHOLE = "whole"

Aspect = Literal["squash", "crop", "letterbox"]
"""What is done where a view has another shape than the encoder's input, see `fit_view`."""

ASPECTS: tuple[str, ...] = get_args(Aspect)

PADDING_RGB = (124, 116, 104)
"""What a view that reaches beyond its image shows there: the mean colour of ImageNet. A mask is empty there."""

MAX_WINDOWS = 4096
"""An image that more windows would be cut from is refused, before anything is encoded."""

_SPEC = re.compile(r"(?P<kind>scale|crop)-(?P<share>\d+(\.\d+)?)(?P<flip>\+flip)?", re.ASCII)
_WINDOWS = re.compile(r"windows-(?P<side>\d+(\.\d+)?)-(?P<step>\d+(\.\d+)?)", re.ASCII)

_REMEDY = (
    "a view is whole, flip, scale-S or crop-S (S such as 0.8, perhaps with +flip behind it), or windows-A-B (such as "
    "windows-1-0.5), which comes last"
)


@dataclass(frozen=True)
class View:
    """A box of an image, XYXY in pixels, that may reach beyond its edges, and whether it is mirrored left to right."""

    box: tuple[int, int, int, int]
    flip: bool

    def apply(self, pixels: NDArray[Any], padding: Any) -> NDArray[Any]:
        """What is seen of (H, W) or (H, W, C) pixels; `padding` fills what lies beyond the edges."""
        of_image, of_box = self._inside((pixels.shape[0], pixels.shape[1]))
        inside = pixels[of_image]
        if inside.shape[:2] == self.size:
            seen = inside.copy()
        else:
            seen = np.empty((*self.size, *pixels.shape[2:]), pixels.dtype)
            seen[...] = padding
            seen[of_box] = inside
        return seen[:, ::-1] if self.flip else seen

    def apply_to_image(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """What is seen of an (H, W, 3) RGB image."""
        return self.apply(image, np.array(PADDING_RGB, np.uint8))

    def apply_to_mask(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """What is seen of an (H, W) mask."""
        return self.apply(mask, False)

    def place(self, values: NDArray[Any], size: Size, outside: Any) -> NDArray[Any]:
        """The inverse of `apply`: (..., h, w) values at the box's own size as (..., H, W) values of an image.

        They are mirrored back; padding falls off; `outside` stands where the view shows nothing of the image.
        """
        of_image, of_box = self._inside(size)
        placed = np.full((*values.shape[:-2], *size), outside, values.dtype)
        placed[..., *of_image] = self._upright(values)[..., *of_box]
        return placed

    def to_row(self) -> tuple[int, ...]:
        """The view's row in a store: box and flip."""
        return (*self.box, int(self.flip))

    @classmethod
    def from_row(cls, row: Sequence[int]) -> View:
        left, top, right, bottom, flip = (int(value) for value in row)
        return cls((left, top, right, bottom), bool(flip))

    @property
    def size(self) -> Size:
        """(H, W) of the box."""
        left, top, right, bottom = self.box
        return bottom - top, right - left

    def _inside(self, size: Size) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Where box and image overlap: rows and columns of the image, and the same of the box."""
        left, top, right, bottom = self.box
        rows, columns = _overlap(top, bottom, size[0]), _overlap(left, right, size[1])
        of_box = (slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left))
        return (rows, columns), of_box

    def _upright(self, values: NDArray[Any]) -> NDArray[Any]:
        """(..., h, w) values of the view as values of its box."""
        if values.shape[-2:] != self.size:
            raise ValueError(f"the view shows {self.size} pixels; got values of {values.shape[-2:]}")
        return values[..., ::-1] if self.flip else values


def average_views(views: Iterable[View], values: Iterable[NDArray[Any]], size: Size) -> NDArray[Any]:
    """The mean of what was said of several views, where they overlap: (..., H, W) in float32 or more.

    Args:
        values: of each view (..., h, w) values at its box's own size; they may come one after the other.
        size: (H, W) of the image.

    Raises:
        ValueError: a pixel of the image is in no view.
    """
    total: NDArray[Any] | None = None
    num_views = np.zeros(size, np.int32)
    for view, seen in zip(views, values, strict=True):
        of_image, of_box = view._inside(size)
        if total is None:
            total = np.zeros((*seen.shape[:-2], *size), np.result_type(seen, np.float32))
        total[..., *of_image] += view._upright(seen)[..., *of_box]
        num_views[of_image] += 1
    if total is None or not num_views.all():
        raise ValueError(f"{np.count_nonzero(num_views == 0)} of {num_views.size} pixels of the image are in no view")
    total /= num_views
    return total


def fit_view(view: View, input_size: Size, aspect: Aspect) -> View:
    """What an encoder with an (H, W) input looks at where a view is asked for. It is resized to that size afterwards.

    `squash` leaves the view as it is: all of it is seen, in another shape. `crop` cuts the longer side around the
    centre, `letterbox` extends the shorter one: shapes are kept, to the nearest whole pixel.

    >>> fit_view(View((0, 0, 640, 480), False), (224, 224), "crop")
    View(box=(80, 0, 560, 480), flip=False)
    """
    left, top, right, bottom = view.box
    height, width = bottom - top, right - left
    input_height, input_width = input_size
    is_wide = width * input_height > height * input_width
    if aspect == "squash" or width * input_height == height * input_width:
        return view
    if is_wide == (aspect == "crop"):
        seen = max(1, round(height * input_width / input_height))
        left += (width - seen) // 2
        return View((left, top, left + seen, bottom), view.flip)
    seen = max(1, round(width * input_height / input_width))
    top += (height - seen) // 2
    return View((left, top, right, top + seen), view.flip)


def check_views(specs: Sequence[str]) -> None:
    """Make sure that a job's views can be made, that the whole image comes first, and that windows come last.

    Raises:
        UsageError: they cannot, or they do not.
    """
    if not specs or specs[0] != WHOLE:
        raise UsageError("views must begin with whole: validation and prediction look at whole images.")
    for number, spec in enumerate(specs):
        if is_windows(spec):
            _parse_windows(spec)
        else:
            make_view(spec, number, (64, 64), "")
    early = [spec for spec in specs[:-1] if is_windows(spec)]
    if early:
        raise UsageError(f"view {early[0]} is not the last: name windows once, behind all other views.")
    twice = {spec for spec in specs if specs.count(spec) > 1 and not spec.startswith("crop-")}
    if twice:
        raise UsageError(f"view {sorted(twice)[0]} is named twice; only crops, which fall elsewhere each time, may be.")


def is_windows(spec: str) -> bool:
    """Whether a spec stands for as many views as an image asks for. Any other stands for one."""
    return spec.startswith("windows-")


def make_views(specs: Sequence[str], size: Size, image_sha256: str) -> list[View]:
    """All views of one image: one for each spec, and behind them the windows, row by row.

    `windows-A-B` cuts squares with a side of A times the image's shorter side, B times the shorter side apart. The last
    of a row or column ends where the image does, as in the sliding inference of mmsegmentation.

    Args:
        specs: what `check_views` lets pass.

    Raises:
        UsageError: there are more than `MAX_WINDOWS` windows.

    >>> [view.box for view in make_views(["whole", "windows-1-0.5"], (100, 180), "")]
    [(0, 0, 180, 100), (0, 0, 100, 100), (50, 0, 150, 100), (80, 0, 180, 100)]
    """
    fixed = [make_view(spec, number, size, image_sha256) for number, spec in enumerate(specs) if not is_windows(spec)]
    return fixed + [window for spec in specs if is_windows(spec) for window in _make_windows(spec, size)]


def make_view(spec: str, number: int, size: Size, image_sha256: str) -> View:
    """The view that a spec other than windows makes of one image.

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


def _parse_windows(spec: str) -> tuple[float, float]:
    """Side and step of windows, as shares of an image's shorter side."""
    parsed = _WINDOWS.fullmatch(spec)
    if parsed is None:
        raise UsageError(f"unknown view {spec!r}: {_REMEDY}.")
    side, step = float(parsed["side"]), float(parsed["step"])
    if not 0.1 <= side <= 1 or not 0 < step <= side:
        raise UsageError(f"view {spec!r} is out of range: sides go from 0.1 to 1, steps from above 0 to the side.")
    return side, step


def _make_windows(spec: str, size: Size) -> list[View]:
    side, step = (max(1, round(share * min(size))) for share in _parse_windows(spec))
    # Such a square fits into the image. Steps are counted up to the first window that reaches the edge.
    num_down, num_across = (-(-(length - side) // step) + 1 for length in size)
    if num_down * num_across > MAX_WINDOWS:
        raise UsageError(
            f"an image of {size[0]} x {size[1]} pixels (height x width) has {num_down * num_across} windows of {spec}, "
            f"more than {MAX_WINDOWS}: leave it out, or take larger steps."
        )
    tops, lefts = (
        [min(number * step, length - side) for number in range(count)]
        for count, length in ((num_down, size[0]), (num_across, size[1]))
    )
    return [View((left, top, left + side, top + side), False) for top in tops for left in lefts]


def _overlap(start: int, stop: int, length: int) -> slice:
    """Which part of 0 to `length` lies between two edges; an empty one where none does."""
    first = min(max(0, start), length)
    return slice(first, max(first, min(stop, length)))
