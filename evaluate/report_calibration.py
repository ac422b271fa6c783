"""Does a head know how good its masks are? The IoU it predicts beside the one it achieves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from jaxtyping import Float, Int64
from matplotlib.figure import Figure

from evaluate.plots import INK, STYLE, colour_of, draw_counts, inline_svg, plot_over_counts

NUM_BINS = 10


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Predicted beside achieved IoU, over all samples and in ten equal bins of the predicted one.

    Args:
        counts: samples in each bin.
        predicted, achieved: the bin's means; NaN where it holds no sample.
        quartiles: the 25th and 75th percentile of the achieved IoU in each bin.
        expected_error: the expected calibration error: the mean over samples of how far the two means of their bin
            lie apart (Naeini et al. 2015).
        correlation, rank_correlation: Pearson's and Spearman's; None where either side is constant.
        num_unusable: samples whose predicted IoU is no finite number. They are left out.
    """

    counts: Int64[np.ndarray, " bins"]
    predicted: Float[np.ndarray, " bins"]
    achieved: Float[np.ndarray, " bins"]
    quartiles: Float[np.ndarray, "2 bins"]
    mean_predicted: float
    mean_achieved: float
    expected_error: float
    correlation: float | None
    rank_correlation: float | None
    num_unusable: int


def calibrate(predicted: Sequence[float], achieved: Float[np.ndarray, " S"]) -> Calibration | None:
    """Compare what a head expected of its masks with what they were worth; None where it gave no finite number.

    A prediction below 0 or above 1 counts as 0 or 1.

    Raises:
        ValueError: there are more predictions than samples, or fewer.
    """
    if len(predicted) != len(achieved):
        raise ValueError(f"{len(predicted)} predicted IoUs for {len(achieved)} samples: give one for each sample")
    said = np.array(predicted, np.float64)
    usable = np.isfinite(said)
    if not usable.any():
        return None
    said, iou = said[usable].clip(0, 1), achieved[usable]
    bins = np.minimum((said * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    counts = np.bincount(bins, minlength=NUM_BINS)
    means = np.full((2, NUM_BINS), np.nan)
    quartiles = np.full((2, NUM_BINS), np.nan)
    for place in np.flatnonzero(counts):
        inside = bins == place
        means[:, place] = said[inside].mean(), iou[inside].mean()
        quartiles[:, place] = np.quantile(iou[inside], (0.25, 0.75))
    apart = np.nan_to_num(np.abs(means[0] - means[1]))
    return Calibration(
        counts=counts,
        predicted=means[0],
        achieved=means[1],
        quartiles=quartiles,
        mean_predicted=float(said.mean()),
        mean_achieved=float(iou.mean()),
        expected_error=float((counts * apart).sum() / len(said)),
        correlation=_correlation(said, iou),
        rank_correlation=_correlation(_ranks(said), _ranks(iou)),
        num_unusable=int(np.count_nonzero(~usable)),
    )


def draw_calibration(name: str, head: str, calibration: Calibration, index: int) -> str:
    """Achieved over predicted IoU, a dot for each bin that holds samples; on the dashed line both are the same.

    A whisker goes from quartile to quartile of what was achieved. Bars below count the samples.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 3.6))
        axes, counts = plot_over_counts(figure)
        axes.plot((0, 1), (0, 1), color=INK, linewidth=1, linestyle=(0, (3, 2)))
        filled = calibration.counts > 0
        predicted, achieved = calibration.predicted[filled], calibration.achieved[filled]
        low, high = calibration.quartiles[:, filled]
        axes.vlines(predicted, low, high, color=colour_of(index), linewidth=1)
        axes.plot(predicted, achieved, "-o", color=colour_of(index), markersize=5, linewidth=1.4)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_ylabel("achieved IoU")
        draw_counts(counts, calibration.counts, (np.arange(NUM_BINS) + 0.5) / NUM_BINS, 0.8 / NUM_BINS)
        counts.set_xlabel("predicted IoU")
        description = (
            f"Achieved over predicted IoU of {head}: on average {calibration.mean_predicted:.2f} is predicted and "
            f"{calibration.mean_achieved:.2f} achieved; the expected calibration error is "
            f"{calibration.expected_error:.3f}."
        )
        return inline_svg(figure, name, description)


def _correlation(one: Float[np.ndarray, " S"], other: Float[np.ndarray, " S"]) -> float | None:
    if one.std() == 0 or other.std() == 0:  # constant, or as good as: squares of tiny differences are 0
        return None
    return float(np.corrcoef(one, other)[0, 1])


def _ranks(values: Float[np.ndarray, " S"]) -> Float[np.ndarray, " S"]:
    """The place of each value in their order; equal values share the mean of their places."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
