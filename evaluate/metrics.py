"""What a set of predicted masks is worth: exact pixel counts of each sample, and every metric computed from them.

Counts are integers and are kept for each sample until the end, so neither the order of the samples nor the way they
were cut into batches can change a result. Knows nothing about heads, datasets or files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int64, Shaped

from cache_schema.errors import UsageError

Metrics = dict[str, float | int | None]
"""Metric name -> value. None means that the metric does not apply: there was nothing to divide by."""

PRECISION_TENTHS = (5, 6, 7, 8, 9)
"""The k of P@k, in tenths."""

PROMPT_LENGTHS = ("1-2", "3-4", "5-7", "8+")
"""Buckets of a prompt's length in words."""

OBJECT_SIZES = ("none", "small", "medium", "large")
"""Buckets of a truth's area: COCO's three, and "none" where there is no target."""

SLICE_METRICS = ("mean_iou", "overall_iou", "median_iou", "p_at_0.5", "num_samples")

_SMALL_PX, _MEDIUM_PX = 32**2, 96**2


@dataclass(frozen=True, slots=True)
class Protocol:
    """How masks are made and compared. It is written beside every number, so that nobody asks which IoU it is.

    A head without a no-target output is taken to say "no target" where it marks fewer than `no_target_px` pixels.
    """

    name: str = "original-size"
    version: int = 1
    resolution: str = "original"
    threshold: float = 0.5
    comparison: Literal[">", ">="] = ">"
    empty_union: str = "an empty prediction of an empty truth counts as IoU 1"
    sentence_policy: str = "every sentence is a sample"
    no_target_px: int = 50

    def binarize(self, probability: Float[np.ndarray, "*axes"]) -> Bool[np.ndarray, "*axes"]:
        """Turn probabilities in [0, 1] into a mask of the same shape."""
        return probability > self.threshold if self.comparison == ">" else probability >= self.threshold

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


ORIGINAL_SIZE = Protocol()


@dataclass(frozen=True, slots=True, eq=False)
class SampleScores:
    """What is kept of S samples: their pixel counts and whether there was, and was said to be, no target."""

    intersection_px: Int64[np.ndarray, " S"]
    union_px: Int64[np.ndarray, " S"]
    predicted_px: Int64[np.ndarray, " S"]
    target_px: Int64[np.ndarray, " S"]
    no_target: Bool[np.ndarray, " S"]
    predicted_no_target: Bool[np.ndarray, " S"]

    @staticmethod
    def concatenate(parts: Sequence[SampleScores]) -> SampleScores:
        """Join scores in the order given. No part gives the scores of no sample."""
        columns = {}
        for column in fields(SampleScores):
            dtype = np.int64 if column.name.endswith("_px") else np.bool_
            columns[column.name] = np.concatenate([np.empty(0, dtype), *(getattr(part, column.name) for part in parts)])
        return SampleScores(**columns)

    @property
    def iou(self) -> Float[np.ndarray, " S"]:
        """Intersection over union of each sample, in float64; an empty union counts as 1."""
        return _ratios(self.intersection_px, self.union_px)

    def select(self, mask: Bool[np.ndarray, " S"]) -> SampleScores:
        """Keep the samples where `mask` holds."""
        return SampleScores(**{column.name: getattr(self, column.name)[mask] for column in fields(self)})

    def __len__(self) -> int:
        return len(self.union_px)


def score_mask(
    predicted: Bool[np.ndarray, "h w"],
    truth: Bool[np.ndarray, "h w"],
    *,
    no_target: bool | np.bool_ = False,
    predicted_no_target: bool | np.bool_ | None = None,
    protocol: Protocol = ORIGINAL_SIZE,
) -> SampleScores:
    """Score one sample: the counts of a predicted (H, W) mask against the truth, as scores of length 1.

    `no_target` says that the prompt names nothing in the image. `predicted_no_target` is what the head said about
    that; None stands for a head that has no such output, and the protocol's rule on positive pixels decides.

    Raises:
        ValueError: the masks differ in size, or a no-target truth has pixels.
    """
    if predicted.shape != truth.shape:
        raise ValueError(f"the prediction is {predicted.shape} and the truth {truth.shape}: resize the prediction")
    intersection_px = np.count_nonzero(predicted & truth)
    predicted_px, target_px = np.count_nonzero(predicted), np.count_nonzero(truth)
    if no_target and target_px:
        raise ValueError(f"a no-target truth has no pixels, this one has {target_px}: mend the sample's target or flag")
    if predicted_no_target is None:
        predicted_no_target = bool(predicted_px < protocol.no_target_px)
    return SampleScores(
        intersection_px=np.array([intersection_px], np.int64),
        union_px=np.array([predicted_px + target_px - intersection_px], np.int64),
        predicted_px=np.array([predicted_px], np.int64),
        target_px=np.array([target_px], np.int64),
        no_target=np.array([no_target], np.bool_),
        predicted_no_target=np.array([predicted_no_target], np.bool_),
    )


State = tuple[SampleScores, ...]
"""What was scored so far. It starts as `()`, and the states of two processes are joined with `+`."""


def update(state: State, scores: SampleScores) -> State:
    """Add the scores of a batch, of any length, to a state."""
    # Equal halves are joined like the digits of a binary counter: n single samples cost n log n copies, not n squared.
    while state and len(state[-1]) <= len(scores):
        state, scores = state[:-1], SampleScores.concatenate([state[-1], scores])
    return (*state, scores)


def compute(state: State) -> Metrics:
    """Every metric of the samples in a state.

    Over pixels, with the no-target decision playing no part (IoU and Dice of empty against empty are 1):

    - `mean_iou`, `median_iou`: mean and median of I/U. `overall_iou`: sum of I / sum of U.
    - `p_at_0.5` ... `p_at_0.9`: share of samples with I/U >= k, compared in whole numbers.
    - `dice`: mean of 2I/(P+G). `precision`: sum of I / sum of P. `recall`: sum of I / sum of G.

    As gRefCOCO defines them, from the no-target decision:

    - `giou`, `ciou`: mean_iou and overall_iou, but a no-target truth that is recognised gives IoU 1 and adds nothing
      to I or U; one where a mask is predicted gives IoU 0 and adds P to U; a target taken for none gives IoU 0, adds
      nothing to I, and its whole union to U.
    - `n_acc`: recognised no-target truths / no-target truths. `t_acc`: recognised targets / targets.
    - `target_p_at_0.7` ... `target_p_at_0.9`: P@k over the samples with a target; a target taken for none misses.

    A value is None where there is nothing to divide by, as n_acc where every sample has a target.

    Raises:
        UsageError: the state holds no sample.
    """
    scores = SampleScores.concatenate(state)
    if not len(scores):
        raise UsageError("there is no sample to score: choose a split that has samples")
    overlap, union = scores.intersection_px, scores.union_px
    intersection_px = int(overlap.sum())
    metrics: Metrics = {
        "mean_iou": _mean(scores.iou),
        "overall_iou": _share(intersection_px, int(union.sum()), empty=1.0),
        "median_iou": float(np.median(scores.iou)),
    }
    for tenths in PRECISION_TENTHS:
        metrics[f"p_at_0.{tenths}"] = _mean(_reaches(overlap, union, tenths))
    metrics["dice"] = _mean(_ratios(2 * overlap, scores.predicted_px + scores.target_px))
    metrics["precision"] = _share(intersection_px, int(scores.predicted_px.sum()))
    metrics["recall"] = _share(intersection_px, int(scores.target_px.sum()))
    return {**metrics, **_generalised(scores), "num_samples": len(scores)}


def _generalised(scores: SampleScores) -> Metrics:
    """The gRefCOCO metrics (GRES, Liu et al. 2023)."""
    absent, said_absent = scores.no_target, scores.predicted_no_target
    either = absent | said_absent
    intersection_px = np.where(either, 0, scores.intersection_px)
    union_px = np.where(absent, np.where(said_absent, 0, scores.predicted_px), scores.union_px)
    num_absent, num_present = np.count_nonzero(absent), np.count_nonzero(~absent)
    metrics: Metrics = {
        "giou": _mean(np.where(either, (absent & said_absent).astype(np.float64), scores.iou)),
        "ciou": _share(int(intersection_px.sum()), int(union_px.sum()), empty=1.0),
        "n_acc": _share(np.count_nonzero(absent & said_absent), num_absent),
        "t_acc": _share(np.count_nonzero(~either), num_present),
    }
    for tenths in PRECISION_TENTHS[2:]:
        hits = ~either & _reaches(scores.intersection_px, scores.union_px, tenths)
        metrics[f"target_p_at_0.{tenths}"] = _share(np.count_nonzero(hits), num_present)
    return metrics


def slice_metrics(scores: SampleScores, tags: Mapping[str, Sequence[str | None]]) -> dict[str, dict[str, Metrics]]:
    """Metrics of the samples that share a tag: tag -> value -> `SLICE_METRICS`.

    `tags` maps the name of a tag to one value for each sample; a sample whose value is None is in no slice of that tag.

    Raises:
        ValueError: a tag has another number of values than there are samples.
    """
    slices: dict[str, dict[str, Metrics]] = {}
    for tag, values in tags.items():
        if len(values) != len(scores):
            raise ValueError(
                f"tag {tag!r} has {len(values)} values for {len(scores)} samples: give one for each sample"
            )
        column = np.array(values, dtype=object)
        slices[tag] = {}
        for value in sort_values({value for value in values if value is not None}):
            metrics = compute((scores.select((column == value).astype(np.bool_)),))
            slices[tag][value] = {name: metrics[name] for name in SLICE_METRICS}
    return slices


def sort_values(values: set[str]) -> list[str]:
    """Order a tag's values: the standard buckets from least to most, anything else by name.

    >>> sort_values({"small", "none", "large"})
    ['none', 'small', 'large']
    """
    for buckets in (PROMPT_LENGTHS, OBJECT_SIZES):
        if values <= set(buckets):
            return [bucket for bucket in buckets if bucket in values]
    return sorted(values)


def standard_tags(scores: SampleScores, prompts: Sequence[str]) -> dict[str, list[str | None]]:
    """The slices that every dataset has: "prompt_length" and "object_size", one value for each sample."""
    return {
        "prompt_length": [prompt_length(prompt) for prompt in prompts],
        "object_size": [object_size(int(area)) for area in scores.target_px],
    }


def prompt_length(prompt: str) -> str | None:
    """The bucket of a prompt's number of words; None for a prompt without any.

    >>> prompt_length("the dog on the left")
    '5-7'
    """
    num_words = len(prompt.split())
    if num_words == 0:
        return None
    return PROMPT_LENGTHS[int(np.searchsorted([3, 5, 8], num_words, side="right"))]


def object_size(target_px: int) -> str:
    """The bucket of a truth's area in pixels at original size: COCO's small < 32², medium < 96², large; none for 0.

    >>> object_size(32**2)
    'medium'
    """
    if target_px == 0:
        return "none"
    if target_px < _SMALL_PX:
        return "small"
    return "medium" if target_px < _MEDIUM_PX else "large"


def _ratios(numerator: Int64[np.ndarray, " S"], denominator: Int64[np.ndarray, " S"]) -> Float[np.ndarray, " S"]:
    """Divide, with 0 / 0 = 1."""
    ratios = np.ones(len(denominator))
    np.divide(numerator, denominator, out=ratios, where=denominator > 0)
    return ratios


def _reaches(
    intersection_px: Int64[np.ndarray, " S"], union_px: Int64[np.ndarray, " S"], tenths: int
) -> Bool[np.ndarray, " S"]:
    """Where I/U >= tenths/10. In whole numbers, so equality is exact; an empty union reaches every k."""
    reached: np.ndarray = 10 * intersection_px >= tenths * union_px
    return reached


def _mean(values: Shaped[np.ndarray, " S"]) -> float:
    # fsum rounds once, after the exact sum: the order of the samples cannot show.
    return math.fsum(values.tolist()) / len(values)


def _share(part: int | np.integer, whole: int | np.integer, empty: float | None = None) -> float | None:
    # numpy counts in its own integers; JSON takes Python's.
    return int(part) / int(whole) if whole else empty
