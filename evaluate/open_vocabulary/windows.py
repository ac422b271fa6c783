"""Sliding windows: which squares of an image an encoder looks at, and what was said of them put together again.

Knows nothing of encoders, heads or classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

from cache_schema.errors import UsageError, require_at_least
from cache_schema.masks import Size
from cache_schema.views import View

_CLASSES_AT_ONCE = 16
"""How many classes are resized at once where the best of them is looked for."""


@dataclass(frozen=True)
class SlidingWindow:
    """How images are cut into windows.

    An image is resized, its shape kept to the nearest pixel, until its short side is `short_side_px` or its long side
    `long_side_px`, whichever is reached first. Squares of `window_px` are cut from it, `stride_px` apart; the last of
    a row or column ends where the image does. The numbers are those of the published open-vocabulary benchmarks (2048
    is the limit of their (2048, 448); only images more than 4.5 times as long as wide are affected by it).

    Resizing is bilinear, as theirs; Pillow's, with antialiasing, where theirs (OpenCV) has none.

    Raises:
        UsageError: a number is below 1, or windows would leave gaps.
    """

    short_side_px: int = 448
    long_side_px: int = 2048
    window_px: int = 448
    stride_px: int = 224

    def __post_init__(self) -> None:
        require_at_least(self, 1, "short_side_px", "window_px", "stride_px")
        require_at_least(self, self.short_side_px, "long_side_px")
        if self.stride_px > self.window_px:
            raise UsageError(
                f"windows of {self.window_px} px that are {self.stride_px} px apart leave gaps: take smaller steps."
            )

    def plan(self, original_size: Size) -> Windows:
        """The windows of an image of that size, row by row."""
        short, long = min(original_size), max(original_size)
        is_thin = long * self.short_side_px > short * self.long_side_px
        wanted, given = (self.long_side_px, long) if is_thin else (self.short_side_px, short)
        # Rounded in whole numbers, halves up: floats would sometimes miss the side that is asked for.
        height, width = (max(1, (2 * length * wanted + given) // (2 * given)) for length in original_size)
        return Windows(
            original_size,
            (height, width),
            tuple(
                (left, top, left + self.window_px, top + self.window_px)
                for top in self._starts(height)
                for left in self._starts(width)
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """What of it belongs to a protocol."""
        return {**asdict(self), "resize": "pillow bilinear"}

    def _starts(self, length: int) -> list[int]:
        last = max(0, length - self.window_px)
        return [*range(0, last, self.stride_px), last]


@dataclass(frozen=True)
class Windows:
    """The windows of one image.

    Args:
        original_size: (H, W) of the image.
        size: (H, W) to which it is resized before it is cut.
        boxes: XYXY in pixels of the resized image; they begin inside it, and reach beyond its right or lower edge where
            it is smaller than a window. Together they cover it.
    """

    original_size: Size
    size: Size
    boxes: tuple[tuple[int, int, int, int], ...]

    def __len__(self) -> int:
        return len(self.boxes)

    def resize(self, image: UInt8[np.ndarray, "original_h original_w 3"]) -> UInt8[np.ndarray, "h w 3"]:
        """The image at `size`: what windows are cut from."""
        if image.shape[:2] != self.original_size:
            raise ValueError(f"these are the windows of an image of {self.original_size}; got {image.shape[:2]}")
        height, width = self.size
        return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))

    def crops(
        self, resized: UInt8[np.ndarray, "h w 3"], batch_size: int
    ) -> Iterator[UInt8[np.ndarray, "n window_h window_w 3"]]:
        """What the windows show of the resized image, in batches and in order. All windows are of one size.

        Beyond the image's edge they show the mean colour of ImageNet (`cache_schema.views.PADDING_RGB`).
        """
        if resized.shape[:2] != self.size:
            raise ValueError(f"windows are cut from the image at {self.size}; got {resized.shape[:2]}: resize it first")
        for start in range(0, len(self), batch_size):
            views = [View(box, False) for box in self.boxes[start : start + batch_size]]
            yield np.stack([view.apply_to_image(resized) for view in views])

    @torch.no_grad()
    def merge(self, scores: Iterable[Float[Tensor, "_ c gh gw"]], *, align_corners: bool) -> Float[Tensor, "c h w"]:
        """The mean, at `size`, of what was said of the windows, where they overlap.

        Each window's scores are brought to its pixels, bilinear. They may come one batch after the other: no more than
        one window at full size is kept besides the sum. What was said beyond the image's edge is dropped. How windows
        are cut into batches does not change a bit.

        Args:
            scores: of c classes on any grid, all windows in the order of `boxes`, in batches of any size.
            align_corners: whether the outermost scores lie on the centres of the outermost pixels, and not half a cell
                inside the window's edge.

        Returns:
            In float32, or float64 if the scores are, on their device.

        Raises:
            ValueError: there are more or fewer scores than windows.
        """
        height, width = self.size
        total: Tensor | None = None
        num_windows: Tensor | None = None
        num_merged = 0
        for window in (window for batch in scores for window in batch):
            if num_merged == len(self):
                raise ValueError(f"there are scores of more than the {len(self)} windows of the image")
            left, top, right, bottom = self.boxes[num_merged]
            num_merged += 1
            window = window.to(torch.promote_types(window.dtype, torch.float32))
            window = F.interpolate(
                window[None], (bottom - top, right - left), mode="bilinear", align_corners=align_corners
            )[0]
            if total is None or num_windows is None:
                total, num_windows = window.new_zeros((len(window), height, width)), window.new_zeros((height, width))
            inside = slice(top, min(bottom, height)), slice(left, min(right, width))
            total[:, *inside] += window[:, : height - top, : width - left]
            num_windows[inside] += 1
        if total is None or num_windows is None or num_merged < len(self):
            raise ValueError(f"there are scores of {num_merged} of the {len(self)} windows of the image")
        return total.div_(num_windows)

    def to_original(self, scores: Float[Tensor, "c h w"]) -> Float[Tensor, "c original_h original_w"]:
        """Scores at `size` brought to the image's own size, bilinear between the centres of pixels."""
        return F.interpolate(scores[None], self.original_size, mode="bilinear", align_corners=False)[0]

    @torch.no_grad()
    def labels(self, scores: Float[Tensor, "c h w"]) -> Int64[Tensor, "original_h original_w"]:
        """The class with the highest score at each pixel of the image's own size; the first where several have it.

        The same as the argmax of `to_original`, without all classes at that size in memory.
        """
        best, labels = self.to_original(scores[:_CLASSES_AT_ONCE]).max(0)
        for start in range(_CLASSES_AT_ONCE, len(scores), _CLASSES_AT_ONCE):
            values, among = self.to_original(scores[start : start + _CLASSES_AT_ONCE]).max(0)
            labels = torch.where(values > best, among + start, labels)
            best = torch.maximum(best, values)
        return labels
