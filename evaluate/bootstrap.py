"""How sure a metric is: intervals by the bootstrap over images, and what the difference of two runs may be by chance.

Samples of one image are not independent: they share its features, and often their target. So images are drawn, each
with all of its samples. Neither the order of the samples nor the way they were cut into batches changes a result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, Integer, Shaped

from evaluate.metrics import SampleScores, compute, metric_ratios

MEDIAN = "median_iou"
"""The metric that is no ratio of sums."""

Interval = tuple[float, float]

_BLOCK_VALUES = 4_000_000
_SAME = 1e-12


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """How replicates are drawn: so many, from a seed, for intervals of that level."""

    num_replicates: int = 1000
    level: float = 0.95
    seed: int = 0

    def to_dict(self, num_images: int) -> dict[str, Any]:
        """What a reader of an interval must know."""
        return {
            "method": "percentile bootstrap over images",
            "level": self.level,
            "num_replicates": self.num_replicates,
            "num_images": num_images,
            "seed": self.seed,
        }

    def interval(self, replicates: Float[np.ndarray, " R"]) -> Interval | None:
        """The percentiles around the middle of the replicates that are defined; None where there is none."""
        defined = replicates[~np.isnan(replicates)]
        if not len(defined):
            return None
        low, high = np.quantile(defined, [(1 - self.level) / 2, (1 + self.level) / 2])
        return float(low), float(high)


DEFAULT = Bootstrap()


@dataclass(frozen=True, slots=True)
class Difference:
    """One metric of two runs on the same samples: both values, second - first, its interval, and how likely it is.

    `p_value` is the share of random exchanges of the two runs, image by image, whose difference is at least as large
    (a two-sided permutation test, the exchange that was observed counted in). None where a value does not apply, where
    all samples are of one image, and for the median.
    """

    first: float | None
    second: float | None
    difference: float | None
    interval: Interval | None
    p_value: float | None


def bootstrap_intervals(
    scores: SampleScores, image_rows: Integer[np.ndarray, " S"], bootstrap: Bootstrap = DEFAULT
) -> dict[str, Interval | None]:
    """The percentile interval of every metric of `compute`.

    A replicate draws as many images as there are, with replacement, each with all of its samples. None stands where
    the metric does not apply, or all samples are of one image, which says nothing about others.

    Args:
        image_rows: equal numbers for the samples of one image.
    """
    groups = _Groups.of([scores], image_rows)
    found: dict[str, Interval | None] = {}
    for name, (replicates,) in _replicates(groups, bootstrap).items():
        found[name] = bootstrap.interval(replicates) if groups.num_images > 1 else None
    return found


def paired_differences(
    first: SampleScores,
    second: SampleScores,
    image_rows: Integer[np.ndarray, " S"],
    bootstrap: Bootstrap = DEFAULT,
) -> dict[str, Difference]:
    """How every metric of `compute` differs between two runs whose scores are of the same samples, in the same order.

    Both runs get the same replicates, so what an image does to both cancels out.

    Args:
        image_rows: equal numbers for the samples of one image.
    """
    values = compute((first,)), compute((second,))
    groups = _Groups.of([first, second], image_rows)
    replicates = _replicates(groups, bootstrap)
    exchanged = _exchanges(groups, bootstrap)
    found = {}
    for name, (of_first, of_second) in replicates.items():
        one, other = values[0][name], values[1][name]
        difference = None if one is None or other is None else other - one
        interval = p_value = None
        if difference is not None and groups.num_images > 1:
            interval = bootstrap.interval(of_second - of_first)
            p_value = _p_value(exchanged[name], difference) if name in exchanged else None
        found[name] = Difference(one, other, difference, interval, p_value)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Groups:
    """The samples of K runs by image, in an order that does not depend on theirs.

    Args:
        names: of the M metrics that are ratios.
        empty: each metric's value where its wholes add up to nothing.
        sums: parts and wholes of each metric, added up over the samples of each of N images.
        ious: of every sample, and `image_of` the place of its image.
    """

    names: Sequence[str]
    empty: Float[np.ndarray, " M"]
    sums: Float[np.ndarray, "K 2 M N"]
    ious: Float[np.ndarray, "K S"]
    image_of: Int64[np.ndarray, " S"]

    @classmethod
    def of(cls, runs: Sequence[SampleScores], image_rows: Integer[np.ndarray, " S"]) -> _Groups:
        keys: list[Shaped[np.ndarray, " S"]] = [image_rows]
        for scores in runs:
            keys += [getattr(scores, name) for name in scores.__slots__]
        order = np.lexsort(keys[::-1])  # samples that tie are equal in all that counts
        image_of = np.unique(image_rows[order], return_inverse=True)[1].astype(np.int64)
        starts = np.flatnonzero(np.diff(image_of, prepend=-1))
        ratios = [metric_ratios(scores.take(order)) for scores in runs]
        sums = [
            [
                [np.add.reduceat(np.asarray(getattr(ratio, side), np.float64), starts) for ratio in of_run.values()]
                for side in ("part", "whole")
            ]
            for of_run in ratios
        ]
        return cls(
            names=list(ratios[0]),
            empty=np.array([np.nan if ratio.empty is None else ratio.empty for ratio in ratios[0].values()]),
            sums=np.array(sums),
            ious=np.stack([scores.iou[order] for scores in runs]),
            image_of=image_of,
        )

    @property
    def num_images(self) -> int:
        return self.sums.shape[-1]

    def values(self, sums: Float[np.ndarray, "R 2 M"]) -> Float[np.ndarray, "R M"]:
        """The metrics of R sums of parts and wholes; not a number where one does not apply."""
        part, whole = sums[:, 0], sums[:, 1]
        values = np.broadcast_to(self.empty, part.shape).copy()
        np.divide(part, whole, out=values, where=whole > 0)
        return values


def _replicates(groups: _Groups, bootstrap: Bootstrap) -> dict[str, list[Float[np.ndarray, " R"]]]:
    """Every metric in every replicate, for each run."""
    rng = np.random.default_rng(bootstrap.seed)
    num_runs, num_images = len(groups.sums), groups.num_images
    found: list[list[Float[np.ndarray, "r metrics"]]] = [[] for _ in range(num_runs)]
    for num in _blocks(bootstrap.num_replicates, max(num_images, len(groups.image_of))):
        drawn = rng.integers(num_images, size=(num, num_images)) + num_images * np.arange(num)[:, None]
        times = np.bincount(drawn.ravel(), minlength=num * num_images).reshape(num, num_images)
        for run, values in enumerate(found):
            ratios = groups.values(np.einsum("rn,smn->rsm", times.astype(np.float64), groups.sums[run], optimize=True))
            median = _weighted_medians(groups.ious[run], times, groups.image_of)
            values.append(np.concatenate([ratios, median[:, None]], axis=1))
    columns = [np.concatenate(values).T for values in found]
    return {name: [of_run[place] for of_run in columns] for place, name in enumerate([*groups.names, MEDIAN])}


def _exchanges(groups: _Groups, bootstrap: Bootstrap) -> dict[str, Float[np.ndarray, " R"]]:
    """Second - first of every ratio where each image's runs are exchanged, or not, by a toss of a coin."""
    rng = np.random.default_rng([bootstrap.seed, 1])
    first, second = groups.sums
    found = []
    for num in _blocks(bootstrap.num_replicates, groups.num_images):
        exchanged = rng.integers(2, size=(num, groups.num_images)).astype(np.float64)
        moved = np.einsum("rn,smn->rsm", exchanged, second - first, optimize=True)
        ones, others = first.sum(-1) + moved, second.sum(-1) - moved
        found.append(groups.values(others) - groups.values(ones))
    return dict(zip(groups.names, np.concatenate(found).T, strict=True))


def _p_value(exchanged: Float[np.ndarray, " R"], difference: float) -> float:
    defined = exchanged[~np.isnan(exchanged)]
    num_as_large = int(np.count_nonzero(np.abs(defined) >= abs(difference) - _SAME))
    return (1 + num_as_large) / (1 + len(defined))


def _weighted_medians(
    iou: Float[np.ndarray, " S"], times: Int64[np.ndarray, "r N"], image_of: Int64[np.ndarray, " S"]
) -> Float[np.ndarray, " r"]:
    """The median where each sample counts as often as its image was drawn."""
    order = np.argsort(iou, kind="stable")
    counted = np.cumsum(times[:, image_of[order]], axis=1)
    num = counted[:, -1]
    middle = [iou[order][np.argmax(counted > place[:, None], axis=1)] for place in ((num - 1) // 2, num // 2)]
    return (middle[0] + middle[1]) / 2


def _blocks(num: int, width: int) -> Iterator[int]:
    """Numbers that add up to `num`, each so small that a block of that width stays small."""
    most = max(1, _BLOCK_VALUES // width)
    for start in range(0, num, most):
        yield min(most, num - start)
