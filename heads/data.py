"""The loader: batches of prompts with the cached features of their images and bit-packed targets.

The order of an epoch depends on (seed, epoch, rank, world size) and on nothing else; neither does a value.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle, islice
from queue import Queue
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from cache_schema.errors import UsageError
from cache_schema.features import FeatureCache
from cache_schema.masks import Size
from cache_schema.reader import default_threads
from heads.inputs import FeatureShapes, StoredInputs
from heads.losses import Targets
from heads.residency import Residency, ResidentArrays, ready_for

T = TypeVar("T")

_NAMES_A_SIDE = re.compile(
    r"\b(top|bottom|upper|lower|far|mid)?[ -]?(left|right)|clockwise|\bo['\u2019]?clock", re.IGNORECASE
)
"""What a prompt says that is no longer true of the mirrored image."""


def feature_shapes(cache: FeatureCache) -> FeatureShapes:
    """The shapes a head for this cache is built for.

    Raises:
        UsageError: the cache holds no layer.
    """
    _require_layers(cache, cache.images.grid_layers)
    grids = {}
    for layer in cache.images.grid_layers:
        _, height, width, channels = cache.images.features(layer).shape
        grids[layer] = (height, width, channels)
    images = cache.images
    return FeatureShapes(
        grids=grids,
        token_width=cache.prompts.store.layouts["tokens"].shape[1],
        pooled_width=cache.prompts.store.layouts["pooled"].shape[1],
        cls_widths={layer: images.cls(layer).shape[1] for layer in images.cls_layers},
        attention={name: images.attention(name).shape[1:] for name in images.attention_outputs},
    )


@dataclass(frozen=True)
class Draw:
    """What a batch is made of: (b,) rows of the samples store, and the (b,) views their images are looked at in."""

    samples: NDArray[np.int64]
    views: NDArray[np.int64]

    @classmethod
    def whole(cls, samples: NDArray[np.int64]) -> Draw:
        """Samples with their whole images."""
        return cls(samples, np.zeros_like(samples))

    def cut(self, batch_size: int) -> list[Draw]:
        """This draw in batches; the last may be smaller."""
        starts = range(0, len(self.samples), batch_size)
        return [
            Draw(self.samples[start : start + batch_size], self.views[start : start + batch_size]) for start in starts
        ]


@dataclass(frozen=True)
class Batch:
    """Inputs and targets of b prompts about i images.

    Args:
        unmasked: targets but for their masks; `targets_at` has them at each (H, W) at which they are kept.
        samples: (b,) rows of the samples store.
        image_rows: (i,) rows of the image-feature store.
        prompt_rows: (b,) rows of the prompt-feature store.
    """

    inputs: StoredInputs
    unmasked: Targets
    targets_at: Mapping[Size, Targets]
    samples: NDArray[np.int64]
    image_rows: NDArray[np.int64]
    prompt_rows: NDArray[np.int64]

    @property
    def targets(self) -> Float[Tensor, "b h w"]:
        """The masks at the only size at which they are kept; 0 x 0 if they are not."""
        return next(iter(self.targets_at.values()), self.unmasked).masks


class CachedSplit:
    """One split of a cache, ready to be drawn in batches.

    Args:
        target_size: (H, W) at which targets are kept, bit-packed, decoded from their run lengths once; several of
            them, or None for a split whose targets nobody asks for.
        layers: layers to load, with their CLS tokens; by default all that were cached.
        grids: those of the layers whose token grids are loaded; by default all of them.
        attention: attention outputs to load.
        tokens: load the tokens of prompts; otherwise there are none, (b, 0, e).
        first: so many samples of the split at most, the first ones; None for all.
        residency: `"device"` keeps every feature on `device`, `"ram"` in memory, `"disk"` reads at each batch; `"auto"`
            takes the first of them where the features fill at most half of what is free. Same order and same values
            in each.
        device: where batches will be used. For a CUDA device they are laid into pinned memory.
        all_views: draw images in every view that all of them have, for training; otherwise as a whole.

    Raises:
        UsageError: the split is unknown, none of its images could be encoded, or a layer was not cached.
    """

    def __init__(
        self,
        cache: FeatureCache,
        split: str,
        target_size: Size | Sequence[Size] | None,
        layers: Sequence[str] | None = None,
        residency: Residency = "auto",
        device: torch.device | str = "cpu",
        all_views: bool = False,
        attention: Sequence[str] = (),
        first: int | None = None,
        grids: Sequence[str] | None = None,
        tokens: bool = True,
    ) -> None:
        layers = tuple(cache.images.grid_layers if layers is None else layers)
        grids = layers if grids is None else tuple(grids)
        _require_layers(cache, layers)
        samples = cache.samples.samples
        self.samples = cache.usable_samples(split)[:first]
        if not len(self.samples):
            raise UsageError(f"split {split!r} holds no sample whose image could be encoded; see the store's ledger.")
        self.target_sizes = _sizes(target_size)
        self._place_of_sample = np.full(int(self.samples.max()) + 1, -1)
        self._place_of_sample[self.samples] = np.arange(len(self.samples))
        self._image_of = cache.image_rows[samples.image_rows[self.samples]]
        self._prompt_of = cache.prompt_rows[samples.prompt_rows[self.samples]]
        self._num_views = len(cache.images.fixed_specs) if all_views else 1
        self._allowed = _allowed_views(cache, self.samples, self._image_of, self._num_views)
        if self.target_sizes:
            samples.require_masks(self.samples)
        self._no_target = torch.from_numpy(samples.no_target[self.samples])
        self._targets = {
            size: _PackedTargets(cache, self.samples, self._image_of, self._num_views, size, split)
            for size in self.target_sizes
        }
        self._tokens = _Tokens(cache, kept=tokens)
        self._pooled = ready_for(torch.from_numpy(cache.prompts.pooled()), torch.device(device))
        rows = np.unique(self._image_of[:, None] + np.arange(self._num_views))
        self._arrays = ResidentArrays(cache, layers, grids, attention, rows, residency, torch.device(device))
        self._device = torch.device(device)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def residency(self) -> Residency:
        """Where the features are."""
        return self._arrays.residency

    @property
    def waits(self) -> bool:
        """Whether loading waits for a disk or a device, so that a thread of its own hides it.

        Otherwise it is work for the same cores, and a thread would only get into the way of torch's own.
        """
        return self.residency == "disk" or self._device.type != "cpu"

    def batches(self, draws: Iterable[Draw]) -> Iterator[Batch]:
        """Load draws one after the other, ahead of whoever consumes them where that helps."""
        loaded = map(self.load, draws)
        return prefetch(loaded) if self.waits else loaded

    def epoch(
        self,
        *,
        seed: int,
        epoch: int,
        batch_size: int,
        prompts_per_image: int = 8,
        rank: int = 0,
        world_size: int = 1,
    ) -> list[Draw]:
        """The batches of one training epoch.

        The prompts of an image are shuffled and dealt in hands of `prompts_per_image`, so that prompts of one hand
        share one read; the hands are shuffled and cut into batches. Every rank gets the same number of batches. Each
        image is looked at in one view, drawn anew in each epoch; a prompt that names a side is never asked of a
        mirrored image.
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
        batches = Draw(self.samples[dealt], self._draw_views(seed, epoch)[dealt]).cut(batch_size)
        batches += islice(cycle(batches), -len(batches) % world_size)
        return batches[rank::world_size]

    def in_order(self, batch_size: int) -> list[Draw]:
        """Every sample once, with its whole image, those of one image side by side."""
        return Draw.whole(self.samples[np.argsort(self._image_of, kind="stable")]).cut(batch_size)

    def load(self, draw: Draw) -> Batch:
        """Inputs and targets of some samples of this split, in that order.

        Features are in their stored data type, or in float32 where they are in memory and used on a CPU.
        """
        places = self._place_of_sample[draw.samples]
        whole = self._image_of[places]
        rows, first, image_index = np.unique(whole + draw.views, return_index=True, return_inverse=True)
        prompts = torch.from_numpy(self._prompt_of[places])
        tokens, mask = self._tokens.load(prompts)
        inputs = StoredInputs(
            features=self._arrays.load("features", rows),
            scale=self._arrays.load("scale", rows),
            cls=self._arrays.load("cls", rows),
            prompt_tokens=tokens,
            prompt_mask=mask,
            pooled=self._pooled[prompts],
            image_index=torch.from_numpy(image_index),
            attention=self._arrays.load("attention", rows),
        )
        no_target = self._no_target[torch.from_numpy(places)]
        image_ids = torch.from_numpy(whole[first])
        unmasked = Targets(torch.empty(len(places), 0, 0), no_target, None, inputs.image_index, image_ids)
        targets_at = {
            size: replace(unmasked, masks=masks, labelled=labelled)
            for size, (masks, labelled) in (
                (size, packed.unpack(places, draw.views)) for size, packed in self._targets.items()
            )
        }
        return Batch(inputs, unmasked, targets_at, draw.samples, rows, self._prompt_of[places])

    def _draw_views(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """(S,) the view of each sample's image in one epoch: one for all prompts of an image, where they allow it."""
        images, image_of = np.unique(self._image_of, return_inverse=True)
        drawn = np.random.default_rng([seed, epoch, 1]).integers(self._num_views, size=len(images))[image_of]
        return np.where(self._allowed[np.arange(len(drawn)), drawn], drawn, 0)


class _Tokens:
    """The tokens of all prompts, in memory; or none."""

    def __init__(self, cache: FeatureCache, *, kept: bool) -> None:
        width = cache.prompts.store.layouts["tokens"].shape[1]
        self._offsets = torch.from_numpy(cache.prompts.offsets)
        self._tokens = torch.from_numpy(cache.prompts.tokens()) if kept else torch.empty(0, width)
        self._kept = kept

    def load(self, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """(b, l, e) tokens, 0 behind each prompt's last, and the (b, l) mask."""
        if not self._kept:
            none = self._tokens.expand(len(prompts), *self._tokens.shape)
            return none, torch.empty(len(prompts), 0, dtype=torch.bool)
        starts = self._offsets[prompts]
        lengths = self._offsets[prompts + 1] - starts
        steps = torch.arange(int(lengths.max()))
        mask = steps < lengths[:, None]
        places = (starts[:, None] + steps).clamp(max=len(self._tokens) - 1)
        tokens = self._tokens.index_select(0, places.flatten()).view(*places.shape, -1)
        return tokens.masked_fill_(~mask[..., None], 0), mask


def _require_layers(cache: FeatureCache, layers: Sequence[str]) -> None:
    held, name = cache.images.grid_layers, cache.images.store.path.name
    missing = [layer for layer in layers if layer not in held]
    if missing:
        raise UsageError(
            f"{name} lacks layers that the head reads: {', '.join(missing)}. It holds {', '.join(held) or 'none'}; "
            "name another store, or extract with --layers."
        )
    if not held:
        raise UsageError(f"{name} holds no layers, of which a head reads one or more; extract with --layers.")


def _allowed_views(
    cache: FeatureCache, samples: NDArray[np.int64], image_of: NDArray[np.int64], num_views: int
) -> NDArray[np.bool_]:
    """(S, K) in which views a sample's image may be shown: it could be encoded, and what the prompt says stays true."""
    task = cache.samples.samples
    allowed = cache.images.valid[image_of[:, None] + np.arange(num_views)]
    if num_views > 1:
        names_a_side = np.array([bool(_NAMES_A_SIDE.search(task.prompts[row])) for row in task.prompt_rows[samples]])
        mirrored = np.array([spec.endswith("flip") for spec in cache.images.fixed_specs])
        allowed &= ~(names_a_side[:, None] & mirrored)
    return allowed


class _PackedTargets:
    """Bit-packed masks of S samples in K views at one size: a cell is set where the mask covers at least half of it.

    A view that failed has none. It may have failed because it shows more pixels than there is memory for.
    """

    def __init__(
        self,
        cache: FeatureCache,
        rows: NDArray[np.int64],
        image_of: NDArray[np.int64],
        num_views: int,
        size: Size,
        split: str,
    ) -> None:
        samples, images = cache.samples.samples, cache.images
        self._size = size
        shape = (len(rows), num_views, -(-size[0] * size[1] // 8))
        self._masks = np.zeros(shape, np.uint8)
        self._labelled = np.full(shape, 255, np.uint8) if any(samples.ignored) else None

        def pack(place: int) -> None:
            mask, ignored = samples.target(int(rows[place])), samples.ignored_pixels(int(rows[place]))
            for view in np.flatnonzero(images.valid[image_of[place] : image_of[place] + num_views]):
                shown = images.views[image_of[place] + view]
                self._masks[place, view] = _pack(shown.apply_to_mask(mask), size)
                if ignored is not None:
                    assert self._labelled is not None
                    self._labelled[place, view] = ~_pack(shown.apply_to_mask(ignored), size)

        with ThreadPoolExecutor(default_threads(), thread_name_prefix="targets") as pool:
            bar = tqdm(total=len(rows), desc=f"packing {split} targets", unit="mask", mininterval=1, delay=1)
            for _ in pool.map(pack, range(len(rows)), chunksize=64):
                bar.update()
            bar.close()

    def unpack(self, places: NDArray[np.int64], views: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """(b, h, w) masks and labelled cells of some samples, each in one view; None where all cells are labelled."""
        labelled = None if self._labelled is None else self._unpack(self._labelled[places, views])
        return self._unpack(self._masks[places, views]), labelled

    def _unpack(self, packed: NDArray[np.uint8]) -> Tensor:
        height, width = self._size
        bits = np.unpackbits(packed, axis=1, count=height * width)
        return torch.from_numpy(bits).view(-1, height, width).float()


def _pack(mask: NDArray[np.bool_], size: Size) -> NDArray[np.uint8]:
    cells = F.interpolate(torch.from_numpy(mask.astype(np.float32))[None, None], size=size, mode="area")
    return np.packbits(cells[0, 0].numpy() >= 0.5)


def _sizes(target_size: Size | Sequence[Size] | None) -> tuple[Size, ...]:
    if target_size is None:
        return ()
    several: Any = [target_size] if target_size and isinstance(target_size[0], int) else target_size
    return tuple(dict.fromkeys((int(height), int(width)) for height, width in several))


def timed(items: Iterable[T]) -> Iterator[tuple[T, float]]:
    """Each item with the seconds that were spent waiting for it."""
    iterator = iter(items)
    while True:
        started = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        yield item, time.perf_counter() - started


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
