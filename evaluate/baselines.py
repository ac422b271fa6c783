"""Predictions that look at neither the image nor the prompt. A head is worth what it adds to the best of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import repeat

import numpy as np
from jaxtyping import Bool

from cache_schema.masks import Size
from evaluate.metrics import Metrics, State, compute, score_counts, update
from evaluate.protocols import ORIGINAL_SIZE, Protocol
from evaluate.scoring import Truth, resize_nearest


def all_empty(size: Size) -> Bool[np.ndarray, "h w"]:
    """Mark nothing. It looks good where many prompts have no target."""
    return np.zeros(size, np.bool_)


def all_full(size: Size) -> Bool[np.ndarray, "h w"]:
    """Mark the whole (H, W) image. It looks good where objects are large."""
    return np.ones(size, np.bool_)


def centre_prior(size: Size) -> Bool[np.ndarray, "h w"]:
    """Mark the central half in each dimension: a box over 25 % of the image, where photographers put things.

    A pixel is in the box where its centre is; the share is exact where height and width are even.
    """
    height, width = size
    mask = np.zeros(size, np.bool_)
    mask[(height + 1) // 4 : (3 * height + 1) // 4, (width + 1) // 4 : (3 * width + 1) // 4] = True
    return mask


BASELINES: dict[str, Callable[[Size], Bool[np.ndarray, "h w"]]] = {
    "all_empty": all_empty,
    "all_full": all_full,
    "centre_prior": centre_prior,
}


def score_baselines(
    targets: Iterable[tuple[bytes, Size]],
    no_target: Iterable[bool | np.bool_],
    ignored: Iterable[bytes] | None = None,
    protocol: Protocol = ORIGINAL_SIZE,
) -> dict[str, Metrics]:
    """Metrics of every baseline over a stream of truths, one truth in memory at a time.

    `targets` yields the COCO counts of a truth and its size (H, W), `no_target` one flag for each of them. A baseline
    has no no-target output, so it says "no target" where it marks fewer pixels than the protocol asks for. `ignored`
    yields the counts of pixels that are not scored, b"" for none. Where the protocol lays a grid on every image, the
    baselines are drawn on the grid.

    Raises:
        ValueError: there are more targets than flags, or the other way round.
        UsageError: there is no target at all.
    """
    states: dict[str, State] = dict.fromkeys(BASELINES, ())
    left_out = repeat(b"") if ignored is None else iter(ignored)
    for (counts, size), absent in zip(targets, no_target, strict=True):
        target, scored = Truth(counts, size, ignored=next(left_out)).masks()
        area_px = np.array([np.count_nonzero(target)], np.int64)
        if protocol.grid is not None:
            target = resize_nearest(target, protocol.grid)
            scored = None if scored is None else resize_nearest(scored, protocol.grid)
        target_px = np.array([np.count_nonzero(target)], np.int64)
        for name in BASELINES:
            predicted = _draw(name, target.shape)
            if scored is not None:
                predicted = predicted & scored
            scores = score_counts(
                np.array([np.count_nonzero(predicted & target)], np.int64),
                np.array([np.count_nonzero(predicted)], np.int64),
                target_px,
                area_px=area_px,
                no_target=np.array([absent], np.bool_),
                predicted_no_target=None,
                protocol=protocol,
            )
            states[name] = update(states[name], scores)
    return {name: compute(state) for name, state in states.items()}


@lru_cache(maxsize=16)
def _draw(name: str, size: tuple[int, ...]) -> Bool[np.ndarray, "h w"]:
    """A baseline's mask, column by column as truths are decoded; many images have one size."""
    height, width = size
    mask = np.asfortranarray(BASELINES[name]((height, width)))
    mask.flags.writeable = False
    return mask
