"""Logits of a head against truths as a samples store keeps them: pixel counts, a batch at a time, on its device.

A batch holds no more than one mask for each thread, so memory does not depend on how many samples there are. Knows
nothing about heads or caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Barrier

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor

from cache_schema.masks import Size, decode_mask
from cache_schema.reader import default_threads
from cache_schema.samples import Samples
from cache_schema.views import View
from evaluate.metrics import SampleScores, score_counts
from evaluate.protocols import COMPARISONS, ORIGINAL_SIZE, Protocol
from heads.losses import resize_logits

_SAMPLES_OF_TASK = 8
"""Of one thread at a time; to hand over single samples keeps the threads waiting for each other."""


@dataclass(frozen=True, slots=True)
class Truth:
    """What a prediction is compared with: COCO counts of the target, and of pixels that are not scored (b"": none).

    Args:
        size: (H, W) of the image.
        no_target: the prompt names nothing in the image.
    """

    target: bytes
    size: Size
    no_target: bool = False
    ignored: bytes = b""

    @classmethod
    def of(cls, samples: Samples, row: int) -> Truth:
        """The truth of one sample.

        Raises:
            UsageError: it has none.
        """
        samples.require_masks([row])
        ignored = samples.ignored[row] if samples.ignored else b""
        return cls(samples.targets[row], samples.size_of(row), bool(samples.no_target[row]), ignored)

    @property
    def whole(self) -> View:
        """The whole image, as it is."""
        height, width = self.size
        return View((0, 0, width, height), False)

    @property
    def box(self) -> tuple[slice, slice]:
        """Rows and columns that hold all of the target."""
        left, top, width, height = (
            coco_mask.toBbox({"size": list(self.size), "counts": self.target}).astype(int).tolist()
        )
        return slice(top, top + height), slice(left, left + width)

    def masks(self) -> tuple[Bool[np.ndarray, "h w"], Bool[np.ndarray, "h w"] | None]:
        """The target at original size, and the scored pixels; None where all of them are. The target is among them."""
        target = decode_mask(self.target, self.size)
        if not self.ignored:
            return target, None
        scored = ~decode_mask(self.ignored, self.size)
        return target & scored, scored


@dataclass(frozen=True, slots=True)
class ScoringBatch:
    """What a head said of b samples, and what is true of them.

    Args:
        logits: at the head's own resolution, on any device.
        views: what part of its image each sample's logits cover.
        said_no_target: the head's own word on that, where it has one.
    """

    logits: Float[Tensor, "b h w"]
    views: Sequence[View]
    truths: Sequence[Truth]
    said_no_target: Bool[np.ndarray, " b"] | None = None


@contextmanager
def scoring_threads(num_threads: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Threads whose torch operations take one core each: samples are independent of one another.

    Torch's own threads wait for each other several times a mask, which is slow where the cores have other work.
    """
    num_threads, num_default = num_threads or default_threads(), torch.get_num_threads()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="scoring") as pool:
        everyone = Barrier(num_threads)
        for started in [pool.submit(_take_one_core, everyone) for _ in range(num_threads)]:
            started.result()
        torch.set_num_threads(num_default)  # the number is also a default, for threads that are yet to come
        yield pool


def score_batch(batch: ScoringBatch, pool: Executor, protocol: Protocol = ORIGINAL_SIZE) -> SampleScores:
    """The scores of a batch, in its order.

    Each sample is resized, thresholded and counted by itself, so the others of its batch change nothing. At original
    size logits are resized (bilinear, align_corners=False) to what the view shows at the image's own resolution. On
    another grid they are read, by the same rule, at the centres of its cells, and the truth takes the pixels that hold
    these centres. What the view does not show, or is not scored, is never marked.

    Args:
        pool: `scoring_threads`, or any other threads.

    Raises:
        ValueError: a no-target truth has pixels.
    """

    def count(place: int) -> _Counts:
        with torch.inference_mode():
            logits = batch.logits[place : place + 1].float()
            return _count(logits, batch.views[place], batch.truths[place], protocol)

    num = len(batch.truths)
    tasks = [range(start, min(start + _SAMPLES_OF_TASK, num)) for start in range(0, num, _SAMPLES_OF_TASK)]
    counts = [found for task in pool.map(lambda places: [count(place) for place in places], tasks) for found in task]
    return score_counts(
        intersection_px=_fetch([of_one.both_px for of_one in counts]),
        predicted_px=_fetch([of_one.predicted_px for of_one in counts]),
        target_px=np.array([of_one.target_px for of_one in counts], np.int64),
        area_px=np.array([of_one.area_px for of_one in counts], np.int64),
        no_target=np.array([truth.no_target for truth in batch.truths], np.bool_),
        predicted_no_target=batch.said_no_target,
        protocol=protocol,
    )


def resize_nearest(mask: Bool[np.ndarray, "h w"], grid: Size) -> Bool[np.ndarray, "gh gw"]:
    """A mask on a grid laid on its image: each cell takes the pixel that holds its centre.

    Cell i of n over m pixels takes pixel floor((2i + 1) m / 2n), in whole numbers, as torch's "nearest-exact" does, and
    Pillow's NEAREST but for centres on the edge between two pixels, where its rounding decides.
    """
    rows, columns = _pixels_of_cells(mask.shape[0], grid[0]), _pixels_of_cells(mask.shape[1], grid[1])
    return mask[rows[:, None], columns]


@dataclass(frozen=True, slots=True)
class _Counts:
    """Pixels of one sample: those that are marked, and marked rightly, perhaps on a device still; and the truth's."""

    predicted_px: int | Tensor
    both_px: int | Tensor
    target_px: int
    area_px: int


def _count(logits: Float[Tensor, "1 h w"], view: View, truth: Truth, protocol: Protocol) -> _Counts:
    target, scored = truth.masks()
    area_px = target_px = int(np.count_nonzero(target))
    box = slice(None), slice(None)
    if protocol.grid is None:
        resized = resize_logits(logits, view.size)
        if view != truth.whole:  # pixels are compared where the view shows them
            scored = view.apply_to_mask(np.ones_like(target) if scored is None else scored)
            target = view.apply_to_mask(target)
        else:
            box = truth.box
    else:
        target = resize_nearest(target, protocol.grid)
        scored = None if scored is None else resize_nearest(scored, protocol.grid)
        target_px = int(np.count_nonzero(target))
        if view == truth.whole:
            resized = resize_logits(logits, protocol.grid)
        else:
            resized, shown = _read_at_cells(logits, view, truth.size, protocol.grid)
            scored = shown if scored is None else scored & shown
    return _Counts(*_count_pixels(resized[0].sigmoid(), target, box, scored, protocol), target_px, area_px)


def _count_pixels(
    probability: Float[Tensor, "h w"],
    target: Bool[np.ndarray, "h w"],
    box: tuple[slice, slice],
    scored: Bool[np.ndarray, "h w"] | None,
    protocol: Protocol,
) -> tuple[int | Tensor, int | Tensor]:
    """Pixels that are marked and scored, and those of the target among them; still on the device if it is no CPU.

    All of the target lies in the box. Targets are decoded column by column and logits lie row by row; to bring the two
    together takes longer than to decode, and keeps the other threads waiting.
    """
    if probability.device.type == "cpu":  # numpy compares and counts several times as fast
        mask = protocol.binarize(probability.numpy())
        mask = mask if scored is None else mask & scored
        return int(np.count_nonzero(mask)), int(np.count_nonzero(mask[box] & target[box]))
    marked = COMPARISONS[protocol.comparison](probability, protocol.threshold)
    if scored is not None:
        marked = marked & torch.from_numpy(scored).to(marked.device)
    both = marked & torch.from_numpy(target).to(marked.device)
    return marked.count_nonzero(), both.count_nonzero()


def _fetch(counts: Sequence[int | Tensor]) -> NDArray[np.int64]:
    """Counts in one array; those of a device travel together."""
    if any(isinstance(count, Tensor) for count in counts):
        return torch.stack([torch.as_tensor(count) for count in counts]).cpu().numpy()
    return np.array(counts, np.int64)


def _read_at_cells(
    logits: Float[Tensor, "1 h w"], view: View, size: Size, grid: Size
) -> tuple[Float[Tensor, "1 gh gw"], Bool[np.ndarray, "gh gw"]]:
    """Logits of a view at the centres of the cells of a grid that lies on the whole image, and which it shows."""
    left, top, right, bottom = view.box
    rows, columns = _pixels_of_cells(size[0], grid[0]), _pixels_of_cells(size[1], grid[1])
    shown = ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))
    down = ((np.arange(grid[0]) + 0.5) * size[0] / grid[0] - top) / (bottom - top)
    across = ((np.arange(grid[1]) + 0.5) * size[1] / grid[1] - left) / (right - left)
    places = np.stack(np.broadcast_arrays(1 - across if view.flip else across, down[:, None]), axis=-1)
    wanted = torch.from_numpy((2 * places - 1).astype(np.float32))[None].to(logits.device)
    read = F.grid_sample(logits[None], wanted, mode="bilinear", padding_mode="border", align_corners=False)
    return read[0], shown


def _pixels_of_cells(num_pixels: int, num_cells: int) -> NDArray[np.int64]:
    return (2 * np.arange(num_cells, dtype=np.int64) + 1) * num_pixels // (2 * num_cells)


def _take_one_core(everyone: Barrier) -> None:
    torch.get_num_threads()  # a thread takes the default when it first asks, and would undo what comes next
    torch.set_num_threads(1)
    everyone.wait()
