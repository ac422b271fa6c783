"""The loader: batches of prompts with the cached features of their images and bit-packed targets.

The order of an epoch depends on (seed, epoch, rank, world size) and on nothing else; neither does a value.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from queue import Queue
from typing import Literal, TypeVar

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from cache_schema.errors import UsageError
from cache_schema.features import FeatureCache
from cache_schema.masks import Size
from heads.inputs import FeatureShapes, HeadInputs

Residency = Literal["ram", "disk", "auto"]
T = TypeVar("T")


def feature_shapes(cache: FeatureCache) -> FeatureShapes:
    """The shapes a head for this cache is built for."""
    grids = {}
    for layer in cache.images.layers:
        _, height, width, channels = cache.images.features(layer).shape
        grids[layer] = (height, width, channels)
    return FeatureShapes(
        grids=grids,
        token_width=cache.prompts.store.layouts["tokens"].shape[1],
        pooled_width=cache.prompts.store.layouts["pooled"].shape[1],
    )


@dataclass(frozen=True)
class Batch:
    """Inputs and targets of b prompts; `samples` are their rows in the samples store. Targets are 0 x 0 unless kept."""

    inputs: HeadInputs
    targets: Float[Tensor, "b h w"]
    samples: NDArray[np.int64]


class CachedSplit:
    """One split of a cache, ready to be drawn in batches.

    Args:
        target_size: (H, W) at which targets are kept, bit-packed, decoded from their run lengths once; None for a
            split whose targets nobody asks for.
        layers: cached layers to load; all by default.
        residency: `"ram"` reads every feature at the start, `"disk"` at each batch, `"auto"` takes RAM if the features
            fill at most half of what is free. Same order and same values either way.
    """

    def __init__(
        self,
        cache: FeatureCache,
        split: str,
        target_size: Size | None,
        layers: Sequence[str] | None = None,
        residency: Residency = "auto",
    ) -> None:
        samples = cache.samples.samples
        self.samples = cache.usable_samples(split)
        if not len(self.samples):
            raise UsageError(f"split {split!r} holds no sample whose image could be encoded; see the store's ledger.")
        self.target_size = target_size
        self._place_of_sample = {sample: place for place, sample in enumerate(self.samples.tolist())}
        self._image_of = cache.image_rows[samples.image_rows[self.samples]]
        self._prompt_of = cache.prompt_rows[samples.prompt_rows[self.samples]]
        self._targets = None if target_size is None else _pack_targets(cache, self.samples, target_size, split)
        self._offsets = torch.from_numpy(cache.prompts.offsets)
        self._tokens = torch.from_numpy(cache.prompts.tokens())
        self._pooled = torch.from_numpy(cache.prompts.pooled())
        layers = tuple(layers or cache.images.layers)
        self._grids = {layer: cache.images.features(layer) for layer in layers}
        self._cls = {layer: cache.images.cls(layer) for layer in layers}
        self._resident: dict[str, tuple[Tensor, Tensor]] = {}
        self._resident_row = np.full(len(cache.images.ids), -1, np.int64)
        rows = np.unique(self._image_of)
        needed_bytes = sum(len(rows) * reader.layout.row_bytes for reader in self._grids.values())
        if residency == "ram" or (residency == "auto" and needed_bytes <= psutil.virtual_memory().available // 2):
            self._resident_row[rows] = np.arange(len(rows))
            for layer in layers:
                grid, cls = self._grids[layer].read(rows), self._cls[layer].read(rows)
                self._resident[layer] = torch.from_numpy(grid), torch.from_numpy(cls)
                self._grids[layer].close()
                self._cls[layer].close()

    def __len__(self) -> int:
        return len(self.samples)

    def epoch(
        self,
        *,
        seed: int,
        epoch: int,
        batch_size: int,
        prompts_per_image: int = 8,
        rank: int = 0,
        world_size: int = 1,
    ) -> list[NDArray[np.int64]]:
        """The batches of one training epoch, as rows of the samples store.

        The prompts of an image are shuffled and dealt in hands of `prompts_per_image`, so that prompts of one hand
        share one read; the hands are shuffled and cut into batches. Every rank gets the same number of batches.
        """
        rng = np.random.default_rng([seed, epoch])
        shuffled = rng.permutation(len(self.samples))
        by_image = shuffled[np.argsort(self._image_of[shuffled], kind="stable")]
        boundaries = np.flatnonzero(np.diff(self._image_of[by_image])) + 1
        hands = [
            prompts[start : start + prompts_per_image]
            for prompts in np.split(by_image, boundaries)
            for start in range(0, len(prompts), prompts_per_image)
        ]
        dealt = np.concatenate([hands[index] for index in rng.permutation(len(hands))])
        batches = [self.samples[dealt[start : start + batch_size]] for start in range(0, len(dealt), batch_size)]
        batches += islice(cycle(batches), -len(batches) % world_size)
        return batches[rank::world_size]

    def in_order(self, batch_size: int) -> list[NDArray[np.int64]]:
        """Every sample once, those of one image side by side."""
        ordered = self.samples[np.argsort(self._image_of, kind="stable")]
        return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]

    def load(self, samples: NDArray[np.int64]) -> Batch:
        """Inputs and targets of some samples of this split, in that order. Features stay in their stored data type."""
        places = np.array([self._place_of_sample[sample] for sample in samples.tolist()])
        images, image_index = np.unique(self._image_of[places], return_inverse=True)
        prompts = torch.from_numpy(self._prompt_of[places])
        starts, stops = self._offsets[prompts], self._offsets[prompts + 1]
        lengths = stops - starts
        steps = torch.arange(int(lengths.max()))
        mask = steps < lengths[:, None]
        tokens = self._tokens[(starts[:, None] + steps).clamp(max=len(self._tokens) - 1)] * mask[..., None]
        features, cls = {}, {}
        for layer in self._grids:
            features[layer], cls[layer] = self._read(layer, images)
        inputs = HeadInputs(features, cls, tokens, mask, self._pooled[prompts], torch.from_numpy(image_index))
        return Batch(inputs, self._unpack_targets(places), samples)

    def _unpack_targets(self, places: NDArray[np.int64]) -> Tensor:
        if self._targets is None or self.target_size is None:
            return torch.empty(len(places), 0, 0)
        height, width = self.target_size
        bits = np.unpackbits(self._targets[places], axis=1, count=height * width)
        return torch.from_numpy(bits).view(-1, height, width).float()

    def _read(self, layer: str, images: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        if layer in self._resident:
            rows = torch.from_numpy(self._resident_row[images])
            grid, cls = self._resident[layer]
            return grid[rows], cls[rows]
        return torch.from_numpy(self._grids[layer].read(images)), torch.from_numpy(self._cls[layer].read(images))


def _pack_targets(cache: FeatureCache, rows: NDArray[np.int64], size: Size, split: str) -> NDArray[np.uint8]:
    """(S, ceil(h * w / 8)) bit-packed targets: a cell is set where the mask covers at least half of it."""
    samples = cache.samples.samples
    packed = np.empty((len(rows), -(-size[0] * size[1] // 8)), np.uint8)
    for place, row in enumerate(
        tqdm(rows.tolist(), desc=f"packing {split} targets", unit="mask", mininterval=1, delay=1)
    ):
        mask = torch.from_numpy(samples.target(row)).float()
        cells = F.interpolate(mask[None, None], size=size, mode="area")[0, 0] >= 0.5
        packed[place] = np.packbits(cells.numpy())
    return packed


def prefetch(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """Draw from `items` in a thread, up to `depth` items ahead of whoever consumes them."""
    queue: Queue[tuple[T | None, BaseException | None]] = Queue(depth)
    stop = threading.Event()

    def fill() -> None:
        try:
            for item in items:
                if stop.is_set():
                    return
                queue.put((item, None))
            queue.put((None, StopIteration()))
        except BaseException as error:  # noqa: BLE001  handed to the consumer, which raises it
            queue.put((None, error))

    thread = threading.Thread(target=fill, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = queue.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        while thread.is_alive():
            while not queue.empty():
                queue.get_nowait()
            thread.join(0.01)
