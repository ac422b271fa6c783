"""What a set of predicted masks is worth: exact pixel counts of each sample, and every metric computed from them.

Counts are integers and are kept for each sample until the end, so neither the order of the samples nor the way they
were cut into batches can change a result. Knows nothing about heads, datasets or files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Bool, Float, Int64, Shaped

from cache_schema.errors import UsageError
from evaluate.protocols import ORIGINAL_SIZE, Protocol

Metrics = dict[str, float | int | None]
"""Metric name -> value. None means that the metric does not apply: there was nothing to divide by."""

PRECISION_TENTHS = (5, 6, 7, 8, 9)
"""The k of P@k, in tenths."""

TARGET_PRECISION_TENTHS = (7, 8, 9)
"""The k of P@k over the samples with a target, as gRefCOCO has it."""

PROMPT_LENGTHS = ("1-2", "3-4", "5-7", "8+")
"""Buckets of a prompt's length in words."""

OBJECT_SIZES = ("none", "small", "medium", "large")
"""Buckets of a truth's area: COCO's three, and "none" where there is no target."""

SLICE_METRICS = ("mean_iou", "overall_iou", "median_iou", "p_at_0.5", "num_samples")

_SMALL_PX, _MEDIUM_PX = 32**2, 96**2


@dataclass(frozen=True, slots=True, eq=False)
class SampleScores:
    """What is kept of S samples: their pixel counts and whether there was, and was said to be, no target.

    Counts are taken at the protocol's resolution; `area_px` is the truth's at the image's original size.
    """

    intersection_px: Int64[np.ndarray, " S"]
    union_px: Int64[np.ndarray, " S"]
    predicted_px: Int64[np.ndarray, " S"]
    target_px: Int64[np.ndarray, " S"]
    area_px: Int64[np.ndarray, " S"]
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
        return _divide(self.intersection_px, self.union_px)

    def select(self, mask: Bool[np.ndarray, " S"]) -> SampleScores:
        """Keep the samples where `mask` holds."""
        return self.take(np.flatnonzero(mask))

    def take(self, places: Int64[np.ndarray, " T"]) -> SampleScores:
        """Some of these samples, in that order."""
        return SampleScores(**{column.name: getattr(self, column.name)[places] for column in fields(self)})

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
    counts = np.count_nonzero(predicted & truth), np.count_nonzero(predicted), np.count_nonzero(truth)
    intersection_px, predicted_px, target_px = np.array([counts], np.int64).T
    return score_counts(
        intersection_px,
        predicted_px,
        target_px,
        area_px=target_px,
        no_target=np.array([no_target], np.bool_),
        predicted_no_target=None if predicted_no_target is None else np.array([predicted_no_target], np.bool_),
        protocol=protocol,
    )


def score_counts(
    intersection_px: Int64[np.ndarray, " S"],
    predicted_px: Int64[np.ndarray, " S"],
    target_px: Int64[np.ndarray, " S"],
    *,
    area_px: Int64[np.ndarray, " S"],
    no_target: Bool[np.ndarray, " S"],
    predicted_no_target: Bool[np.ndarray, " S"] | None,
    protocol: Protocol,
) -> SampleScores:
    """The scores of samples whose pixels are counted already, see `score_mask`.

    Raises:
        ValueError: a no-target truth has pixels.
    """
    if (wrong := no_target & (area_px > 0)).any():
        num_px = int(area_px[wrong][0])
        raise ValueError(f"a no-target truth has no pixels, this one has {num_px}: mend the sample's target or flag")
    if predicted_no_target is None:
        predicted_no_target = predicted_px < protocol.no_target_px
    return SampleScores(
        intersection_px=intersection_px,
        union_px=predicted_px + target_px - intersection_px,
        predicted_px=predicted_px,
        target_px=target_px,
        area_px=area_px,
        no_target=no_target,
        predicted_no_target=predicted_no_target,
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

    As gRefCOCO defines them (GRES, Liu et al. 2023), from the no-target decision:

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
    metrics: Metrics = {name: ratio.value for name, ratio in metric_ratios(scores).items()}
    return {**metrics, "median_iou": float(np.median(scores.iou)), "num_samples": len(scores)}


@dataclass(frozen=True, slots=True, eq=False)
class Ratio:
    """A metric as the sum of S parts over the sum of S wholes; `empty` where the wholes add up to nothing."""

    part: Shaped[np.ndarray, " S"]
    whole: Int64[np.ndarray, " S"]
    empty: float | None = None

    @property
    def value(self) -> float | None:
        """The metric. It depends on no order: whole numbers are added as such, others rounded once, after the sum."""
        whole = int(self.whole.sum())
        if not whole:
            return self.empty
        return (math.fsum(self.part.tolist()) if self.part.dtype.kind == "f" else int(self.part.sum())) / whole


def metric_ratios(scores: SampleScores) -> dict[str, Ratio]:
    """Every metric of `compute` that is a ratio of sums over samples: all but the median."""
    overlap, union, predicted, target = (
        scores.intersection_px,
        scores.union_px,
        scores.predicted_px,
        scores.target_px,
    )
    one = np.ones(len(scores), np.int64)
    dice = _divide(2 * overlap, predicted + target)
    absent, said_absent = scores.no_target, scores.predicted_no_target
    either, present = absent | said_absent, (~absent).astype(np.int64)
    generalised = np.where(either, (absent & said_absent).astype(np.float64), scores.iou)
    counted_union = np.where(absent, np.where(said_absent, 0, predicted), union)
    return {
        "mean_iou": Ratio(scores.iou, one),
        "overall_iou": Ratio(overlap, union, empty=1.0),
        **{f"p_at_0.{tenths}": Ratio(_reaches(overlap, union, tenths), one) for tenths in PRECISION_TENTHS},
        "dice": Ratio(dice, one),
        "precision": Ratio(overlap, predicted),
        "recall": Ratio(overlap, target),
        "giou": Ratio(generalised, one),
        "ciou": Ratio(np.where(either, 0, overlap), counted_union, empty=1.0),
        "n_acc": Ratio(absent & said_absent, absent.astype(np.int64)),
        "t_acc": Ratio(~either, present),
        **{
            f"target_p_at_0.{tenths}": Ratio(~either & _reaches(overlap, union, tenths), present)
            for tenths in TARGET_PRECISION_TENTHS
        },
    }


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
        "object_size": [object_size(int(area)) for area in scores.area_px],
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


def _divide(numerator: Int64[np.ndarray, " S"], denominator: Int64[np.ndarray, " S"]) -> Float[np.ndarray, " S"]:
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
