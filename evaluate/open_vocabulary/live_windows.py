"""Images cut into windows and encoded live, the windows of several images in one batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import UInt8

from cache_schema.errors import UsageError, require_at_least
from cache_schema.reader import num_cores
from cache_schema.views import View
from evaluate.open_vocabulary.windows import SlidingWindow, Windows
from evaluate.predictor import open_image
from extract.encoders.protocols import ImageEncoder, ImageEncoding

T = TypeVar("T")
Result = TypeVar("Result")

ImageSource = UInt8[np.ndarray, "_ _ 3"] | Path
"""An (H, W, 3) uint8 RGB image, or the file of one."""


@dataclass(frozen=True, eq=False)
class SeenImage:
    """What an encoder said of all windows of an image.

    Args:
        encoding: of the windows, in their order.
        resized: the image at the size of which the windows are, (h, w, 3); None where nobody asked for it.
    """

    windows: Windows
    encoding: ImageEncoding
    resized: UInt8[np.ndarray, "h w 3"] | None


@dataclass(frozen=True, eq=False)
class _CutImage:
    """An image ready to be encoded: its windows, itself at the size they are cut from, and what each of them shows."""

    windows: Windows
    resized: UInt8[np.ndarray, "h w 3"]
    pixels: UInt8[np.ndarray, "num_windows input_h input_w 3"]


@dataclass(frozen=True)
class LiveWindows:
    """Cuts images into windows and encodes them.

    Args:
        batch_size: windows in one forward pass, of several images where there are.

    Raises:
        UsageError: the encoder does not see a square whole, or the batch size is below 1.
    """

    encoder: ImageEncoder
    plan: SlidingWindow
    batch_size: int = 8

    def __post_init__(self) -> None:
        require_at_least(self, 1, "batch_size")
        window = View((0, 0, self.plan.window_px, self.plan.window_px), False)
        if self.encoder.fit(window) != window:
            raise UsageError(
                f"{self.encoder.name} does not see a square window whole, but cuts or pads it to its own shape; "
                "extract and train with --aspect squash, or with a square --input-size."
            )

    def look_at(self, images: Iterable[ImageSource]) -> Iterator[SeenImage]:
        """Encode one image after the other. How they share batches makes no difference but in the last bits.

        Images are read, resized and cut in threads, a few ahead of the encoder.

        Raises:
            UsageError: a file is missing or no image.
        """
        with ThreadPoolExecutor(num_cores(), thread_name_prefix="headstart-windows") as pool:
            for group in _in_groups(_ahead(pool, self._cut, images, 2 * num_cores()), self.batch_size):
                yield from self._encode(group)

    def _cut(self, image: ImageSource) -> _CutImage:
        if isinstance(image, Path):
            image = open_image(image)
        windows = self.plan.plan((image.shape[0], image.shape[1]))
        resized = windows.resize(image)
        crops = (crop for batch in windows.crops(resized, self.batch_size) for crop in batch)
        return _CutImage(windows, resized, np.stack([self.encoder.preprocess(crop) for crop in crops]))

    def _encode(self, group: list[_CutImage]) -> Iterator[SeenImage]:
        pixels = torch.from_numpy(np.concatenate([image.pixels for image in group]))
        batches = range(0, len(pixels), self.batch_size)
        encoding = concatenate(
            [self.encoder.encode(pixels[start : start + self.batch_size].to(self.encoder.device)) for start in batches]
        )
        start = 0
        for image in group:
            stop = start + len(image.windows)
            yield SeenImage(image.windows, part_of(encoding, start, stop), image.resized)
            start = stop


def concatenate(encodings: list[ImageEncoding]) -> ImageEncoding:
    """What was said of several batches, one behind the other."""
    if len(encodings) == 1:
        return encodings[0]
    first = encodings[0]
    return ImageEncoding(
        {name: torch.cat([encoding.features[name] for encoding in encodings]) for name in first.features},
        {name: torch.cat([encoding.cls[name] for encoding in encodings]) for name in first.cls},
        {name: torch.cat([encoding.attention[name] for encoding in encodings]) for name in first.attention},
    )


def part_of(encoding: ImageEncoding, start: int, stop: int) -> ImageEncoding:
    """What was said of the windows from `start` to before `stop`."""
    return ImageEncoding(
        {name: values[start:stop] for name, values in encoding.features.items()},
        {name: values[start:stop] for name, values in encoding.cls.items()},
        {name: values[start:stop] for name, values in encoding.attention.items()},
    )


def _ahead(pool: ThreadPoolExecutor, work: Callable[[T], Result], items: Iterable[T], num: int) -> Iterator[Result]:
    """The results of work on items, in order, at most so many items ahead of whoever takes them."""
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > num:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _in_groups(images: Iterable[_CutImage], num_windows: int) -> Iterator[list[_CutImage]]:
    """Images one after the other, as many together as it takes to have so many windows."""
    group: list[_CutImage] = []
    for image in images:
        group.append(image)
        if sum(len(cut.windows) for cut in group) >= num_windows:
            yield group
            group = []
    if group:
        yield group
