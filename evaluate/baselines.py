"""Predictions that look at neither the image nor the prompt. A head is worth what it adds to the best of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import repeat

import numpy as np
from jaxtyping import Bool

from cache_schema.masks import Size, decode_mask
from evaluate.metrics import Metrics, State, compute, score_mask, update


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
    targets: Iterable[tuple[bytes, Size]], no_target: Iterable[bool | np.bool_], ignored: Iterable[bytes] | None = None
) -> dict[str, Metrics]:
    """Metrics of every baseline over a stream of truths, one mask in memory at a time.

    `targets` yields the COCO counts of a truth and its size (H, W), `no_target` one flag for each of them. A baseline
    has no no-target output, so it says "no target" where it marks fewer pixels than the protocol asks for. `ignored`
    yields the counts of pixels that are not scored, b"" for none.

    Raises:
        ValueError: there are more targets than flags, or the other way round.
        UsageError: there is no target at all.
    """
    states: dict[str, State] = dict.fromkeys(BASELINES, ())
    left_out = repeat(b"") if ignored is None else iter(ignored)
    for (counts, size), absent in zip(targets, no_target, strict=True):
        truth, unlabelled = decode_mask(counts, size), next(left_out)
        scored = ~decode_mask(unlabelled, size) if unlabelled else np.True_
        for name, predict in BASELINES.items():
            states[name] = update(states[name], score_mask(predict(size) & scored, truth & scored, no_target=absent))
    return {name: compute(state) for name, state in states.items()}
