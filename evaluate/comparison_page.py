"""The page that compares two runs: one HTML file, readable anywhere, offline.

Prompts, names and paths are data: the template escapes them. Knows nothing about how the numbers were made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cache_schema import atomic
from evaluate.metrics import sort_values
from evaluate.pages import (
    NO_NUMBER,
    Panel,
    capital,
    css_colour,
    fit_panels,
    flatten,
    number,
    render_page,
    signed,
    words,
)
from evaluate.pictures import PREDICTED_COLOUR, TRUTH_COLOUR, triptych
from evaluate.plots import INK, STYLE, colour_of, inline_svg

TITLES = {
    "mean_iou": "Mean IoU",
    "overall_iou": "Overall IoU",
    "median_iou": "Median IoU",
    "p_at_0.5": "P@0.5",
    "p_at_0.7": "P@0.7",
    "p_at_0.9": "P@0.9",
    "dice": "Dice",
    "precision": "Precision",
    "recall": "Recall",
    "giou": "gIoU",
    "ciou": "cIoU",
    "n_acc": "N-acc",
    "t_acc": "T-acc",
}
"""The metrics of the table, in its order; one that does not apply is left out."""

_NUM_BINS = 40
_MAX_SLICE_ROWS = 24


@dataclass(frozen=True, slots=True)
class ChangedSample:
    """One sample that the two runs mark differently. `image` is (H, W, 3) uint8; all masks are (H, W) at its size."""

    image: UInt8[np.ndarray, "h w 3"]
    truth: Bool[np.ndarray, "h w"]
    predicted: tuple[Bool[np.ndarray, "h w"], Bool[np.ndarray, "h w"]]
    iou: tuple[float, float]
    prompt: str
    sample_id: str


def write_comparison_page(
    path: Path,
    results: Mapping[str, Any],
    change: Float[np.ndarray, " S"],
    samples: Sequence[ChangedSample],
    notes: Sequence[str] = (),
) -> Path:
    """Write the page as one self-contained HTML file, and return its path. Equal arguments give equal bytes.

    Args:
        results: the object of comparison.json.
        change: IoU of the second run - IoU of the first, for each sample.
        samples: those to show in pictures, the most changed first.
    """
    first, second = names = [run["head"] for run in results["runs"]]
    shown = fit_panels(
        lambda side_px: [_show(sample, names, side_px) for sample in samples],
        lambda examples: [panel for example in examples for panel in example["panels"]],
    )
    page = render_page(
        "comparison.html.j2",
        {
            "title": f"{first} and {second} compared",
            "first": first,
            "second": second,
            "colours": (colour_of(0), colour_of(1)),
            "notes": notes,
            "finding": _finding(results),
            "metrics": _metrics(results),
            "has_p": any(entry["p_value"] is not None for entry in results["differences"].values()),
            "bootstrap": results["bootstrap"],
            "samples": results["samples"],
            "plot": _draw_changes(change, first, second),
            "slices": _slices(results["slices"]),
            "groups": [
                (f"Better marked by {second}", [example for example in shown if example["won"]]),
                (f"Better marked by {first}", [example for example in shown if not example["won"]]),
            ],
            "truth_colour": css_colour(TRUTH_COLOUR),
            "predicted_colour": css_colour(PREDICTED_COLOUR),
            "protocol": [(words(key), value) for key, value in flatten(results["protocol"])],
            "provenance": [
                *((f"run of {run['head']}", run["run_dir"]) for run in results["runs"]),
                *flatten(results["provenance"]),
            ],
        },
    )
    atomic.write_file(path, page.encode())
    return path


def _finding(results: Mapping[str, Any]) -> str:
    first, second = (run["head"] for run in results["runs"])
    found = results["differences"]["mean_iou"]
    sentence = f"{second} reaches a mean IoU of {number(found['second'])}, {first} {number(found['first'])}"
    if found["interval"] is None:
        return f"{sentence}. All samples are of one image, so nothing can be said about others."
    low, high = found["interval"]
    level = f"{results['bootstrap']['level']:.0%}"
    difference = f"the difference is {signed(found['difference'])} ({level} interval {signed(low)} to {signed(high)})"
    if low <= 0 <= high:
        return f"{sentence}: {difference}, so these samples do not tell the two apart."
    return f"{sentence}: {difference}."


def _metrics(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each metric that applies; `sure` says that the interval lies on one side of zero."""
    rows = []
    for name, title in TITLES.items():
        found = results["differences"][name]
        if found["difference"] is None:
            continue
        interval, p_value = found["interval"], found["p_value"]
        rows.append(
            {
                "title": title,
                "first": number(found["first"]),
                "second": number(found["second"]),
                "difference": signed(found["difference"]),
                "interval": NO_NUMBER if interval is None else f"{signed(interval[0])} to {signed(interval[1])}",
                "sure": interval is not None and not interval[0] <= 0 <= interval[1],
                "p_value": NO_NUMBER if p_value is None else "< 0.001" if p_value < 0.001 else f"{p_value:.3f}",
            }
        )
    return rows


def _slices(slices: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """For each tag its title and rows of (value, samples, both means, the difference as text and as a share)."""
    tables = []
    for tag, values in slices.items():
        if not values:
            continue
        largest = sorted(values, key=lambda value: (-values[value]["num_samples"], value))[:_MAX_SLICE_ROWS]
        rows = []
        for value in sort_values(set(largest)):
            first, second = values[value]["mean_iou"]
            rows.append(
                (
                    value,
                    values[value]["num_samples"],
                    number(first),
                    number(second),
                    signed(second - first),
                    second - first,
                )
            )
        tables.append({"title": capital(words(tag)), "rows": rows, "num_hidden": len(values) - len(rows)})
    return tables


def _show(sample: ChangedSample, names: Sequence[str], side_px: int) -> dict[str, Any]:
    pictures = [triptych(sample.image, sample.truth, predicted, side_px) for predicted in sample.predicted]
    return {
        "won": sample.iou[1] > sample.iou[0],
        "prompt": sample.prompt,
        "id": sample.sample_id,
        "change": signed(sample.iou[1] - sample.iou[0], 2),
        "panels": [
            Panel.of_image(pictures[0].image, sample.truth.shape),
            Panel.of_mask(pictures[0].truth, "Truth", sample.truth),
            *(
                Panel.of_mask(picture.predicted, name, predicted, _caption(name, predicted, iou))
                for picture, name, predicted, iou in zip(pictures, names, sample.predicted, sample.iou, strict=True)
            ),
        ],
    }


def _caption(name: str, predicted: Bool[np.ndarray, "h w"], iou: float) -> str:
    nothing = "" if predicted.any() else "nothing, "
    return f"{name}: {nothing}IoU {number(iou, 2)}"


def _draw_changes(change: Float[np.ndarray, " S"], first: str, second: str) -> str:
    """How the changes of IoU are spread: samples in equal bins from -1 to 1, those that did not change left out."""
    lost, won = (
        np.histogram(part, bins=_NUM_BINS, range=(-1, 1))[0] for part in (change[change < 0], change[change > 0])
    )
    edges = np.linspace(-1, 1, _NUM_BINS + 1)[:-1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 2.7))
        axes = figure.add_axes((0.15, 0.21, 0.79, 0.74))
        axes.grid(visible=False, axis="x")
        axes.bar(edges, lost, width=2 / _NUM_BINS, align="edge", color=colour_of(0), edgecolor="white")
        axes.bar(edges, won, width=2 / _NUM_BINS, align="edge", color=colour_of(1), edgecolor="white")
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_xlim(-1, 1)
        axes.set_ylim(0, 1.12 * max(1, int(lost.max()), int(won.max())))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.tick_params(axis="x", pad=9)
        axes.set_xticks([-1, -0.5, 0, 0.5, 1])
        axes.set_xlabel("change of IoU")
        axes.set_ylabel("samples")
        num_lost, num_won = int(lost.sum()), int(won.sum())
        description = f"Changes of IoU from {first} to {second}: {num_won} samples rise and {num_lost} fall."
        return inline_svg(figure, "changes", description)
