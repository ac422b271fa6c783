"""The report: one HTML file that shows what trained heads are worth, readable anywhere, offline, for years.

Prompts, names and paths are data: the template escapes them. Knows nothing about how the numbers were made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, UInt8

from cache_schema import atomic
from cache_schema.errors import UsageError
from evaluate.metrics import Metrics, Protocol, SampleScores, slice_metrics, sort_values, standard_tags
from evaluate.pages import (
    NO_NUMBER,
    Panel,
    capital,
    css_colour,
    fit_panels,
    flatten,
    in_seconds,
    is_number,
    number,
    render_page,
    short,
    words,
)
from evaluate.pictures import PREDICTED_COLOUR, TRUTH_COLOUR, triptych
from evaluate.plots import colour_of
from evaluate.report_plots import Line, draw_curves, draw_histogram, iou_shares

Group = Literal["best", "median", "worst"]

HEADLINE_METRICS = {
    "mean_iou": "Mean IoU",
    "overall_iou": "Overall IoU",
    "p_at_0.5": "P@0.5",
    "p_at_0.7": "P@0.7",
    "p_at_0.9": "P@0.9",
    "dice": "Dice",
    "n_acc": "N-acc",
    "t_acc": "T-acc",
}

SLICE_TITLES = {
    "kind": "Mean IoU by kind of prompt",
    "prompt_length": "Mean IoU by length of the prompt in words",
    "object_size": "Mean IoU by size of the object",
}

_GROUPS: tuple[Group, ...] = ("best", "median", "worst")
_MAX_SLICE_ROWS = 24


@dataclass(frozen=True, slots=True)
class Example:
    """One sample to look at. `image` is (H, W, 3) uint8; both masks are (H, W) at the same size."""

    image: UInt8[np.ndarray, "h w 3"]
    truth: Bool[np.ndarray, "h w"]
    predicted: Bool[np.ndarray, "h w"]
    prompt: str
    iou: float
    group: Group
    tags: Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class RunReport:
    """What the report shows of one trained head.

    `history` holds the lines of metrics.jsonl, one for each validation. `prompts` and every value of `tags` are
    parallel to `scores`.
    """

    head: str
    history: Sequence[Mapping[str, Any]]
    scores: SampleScores
    prompts: Sequence[str]
    tags: Mapping[str, Sequence[str | None]]
    examples: Sequence[Example]
    num_parameters: int


def write_report(
    path: Path, results: Mapping[str, Any], runs: Sequence[RunReport], notes: Sequence[str], title: str
) -> Path:
    """Write the report as one self-contained HTML file, and return its path.

    `results` is the object of results.json; its "runs" and `runs` name the same heads in the same order. Equal
    arguments give equal bytes.

    Raises:
        UsageError: there is no run, or `results` and `runs` disagree about the heads.
    """
    heads = [run.head for run in runs]
    if not heads:
        raise UsageError("a report needs at least one run: train a head first")
    if heads != [result["head"] for result in results["runs"]]:
        raise UsageError(f"the results are not those of the heads {', '.join(heads)}: evaluate these runs again")
    page = render_page(
        "report.html.j2",
        {
            "title": title,
            "notes": notes,
            "findings": _findings(results),
            "heads": [(head, colour_of(index)) for index, head in enumerate(heads)],
            "num_samples": len(runs[0].scores),
            "num_baselines": len(results["baselines"]),
            "headline": _headline(results, runs),
            "protocol": results["protocol"],
            "protocol_sentences": _protocol_sentences(results["protocol"]),
            "slices": _slices(runs),
            "curves": _curves(runs),
            "histograms": _histograms(runs),
            "examples": _examples(runs),
            "truth_colour": css_colour(TRUTH_COLOUR),
            "predicted_colour": css_colour(PREDICTED_COLOUR),
            "stages": _stages(results["seconds"]),
            "run_dirs": [(result["head"], result["run_dir"]) for result in results["runs"]],
            "provenance": list(flatten(results.get("provenance", {}))),
        },
    )
    atomic.write_file(path, page.encode())
    return path


def _findings(results: Mapping[str, Any]) -> str:
    best = max(results["runs"], key=lambda result: result["metrics"]["mean_iou"])
    sentence = f"{best['head']} reaches a mean IoU of {number(best['metrics']['mean_iou'])}"
    if len(results["runs"]) > 1:
        sentence += ", the best of the heads"
    if not results["baselines"]:
        return sentence + "."
    name, metrics = max(results["baselines"].items(), key=lambda item: item[1]["mean_iou"])
    if best["metrics"]["mean_iou"] <= metrics["mean_iou"]:
        return f"{sentence}. That is no better than the baseline “{words(name)}” at {number(metrics['mean_iou'])}."
    return f"{sentence}; the best baseline, “{words(name)}”, reaches {number(metrics['mean_iou'])}."


def _headline(results: Mapping[str, Any], runs: Sequence[RunReport]) -> dict[str, Any]:
    """Columns and rows of the table; a cell is (text, is it the best of the heads)."""
    best = {}
    for name in HEADLINE_METRICS:
        texts = {number(result["metrics"].get(name)) for result in results["runs"]} - {NO_NUMBER}
        best[name] = max(texts) if len(texts) > 1 else None

    def cells(metrics: Metrics, is_head: bool) -> list[tuple[str, bool]]:
        texts = {name: number(metrics.get(name)) for name in HEADLINE_METRICS}
        return [(text, is_head and text == best[name]) for name, text in texts.items()]

    return {
        "columns": list(HEADLINE_METRICS.values()),
        "heads": [
            (run.head, cells(result["metrics"], True), short(run.num_parameters), in_seconds(_training_s(run)))
            for run, result in zip(runs, results["runs"], strict=True)
        ],
        "baselines": [(name, cells(metrics, False)) for name, metrics in results["baselines"].items()],
    }


def _protocol_sentences(protocol: Mapping[str, Any]) -> list[str]:
    resolution = protocol["resolution"]
    sentences = [
        "Masks are compared at the original size of each image."
        if resolution == "original"
        else f"Masks are compared at {resolution}, not at the original size of the image.",
        f"A pixel is marked where its probability is {protocol['comparison']} {protocol['threshold']}.",
        f"{capital(protocol['empty_union'])}.",
        f"{capital(protocol['sentence_policy'])}.",
        f"A head without a no-target output says “no target” below {protocol['no_target_px']} marked pixels.",
    ]
    others = sorted(set(protocol) - {field.name for field in fields(Protocol)})
    return sentences + [f"{capital(words(key))}: {protocol[key]}." for key in others]


def _slices(runs: Sequence[RunReport]) -> list[dict[str, Any]]:
    """For each tag its title and rows of (value, samples, one (text, share) for each head)."""
    of_runs = [slice_metrics(run.scores, {**run.tags, **standard_tags(run.scores, run.prompts)}) for run in runs]
    tags = list(dict.fromkeys([*SLICE_TITLES, *(tag for slices in of_runs for tag in slices)]))
    tables = []
    for tag in tags:
        columns = [slices.get(tag, {}) for slices in of_runs]
        num_samples = {
            value: int(metrics["num_samples"] or 0) for column in columns for value, metrics in column.items()
        }
        if not num_samples:
            continue
        largest = set(sorted(num_samples, key=lambda value: (-num_samples[value], value))[:_MAX_SLICE_ROWS])
        rows = []
        for value in sort_values(largest):
            means = [column[value]["mean_iou"] if value in column else None for column in columns]
            rows.append((value, num_samples[value], [(number(mean), mean or 0.0) for mean in means]))
        title = SLICE_TITLES.get(tag, f"Mean IoU by {words(tag)}")
        tables.append(
            {
                "title": title,
                "column": capital(words(tag)),
                "rows": rows,
                "num_hidden": len(num_samples) - len(rows),
                "standard": tag in SLICE_TITLES,
            }
        )
    return tables


def _curves(runs: Sequence[RunReport]) -> list[tuple[str, str]]:
    plots = []
    for name, key, title, from_zero in (
        ("loss", "train_loss", "Training loss", False),
        ("validation", "val_mean_iou", "Validation mean IoU", True),
    ):
        lines = [Line.of_history(run.head, run.history, key) for run in runs]
        if any(line.values for line in lines):
            plots.append((title, draw_curves(name, lines, title, from_zero=from_zero)))
    return plots


def _histograms(runs: Sequence[RunReport]) -> list[tuple[str, str]]:
    most = max(float(iou_shares(run.scores.iou).max()) for run in runs)
    plots = []
    for index, run in enumerate(runs):
        zero, high = np.mean(run.scores.iou < 0.05), np.mean(run.scores.iou >= 0.5)
        description = f"IoU of {run.head}: {zero:.0%} of the samples below 0.05, {high:.0%} at 0.5 or above."
        plots.append((run.head, draw_histogram(f"histogram-{index}", run.scores.iou, index, most, description)))
    return plots


@dataclass(frozen=True, slots=True)
class _ShownExample:
    prompt: str
    iou: str
    tags: list[tuple[str, str]]
    panels: list[Panel]


_ShownGroups = list[tuple[Group, list[_ShownExample]]]


def _examples(runs: Sequence[RunReport]) -> list[tuple[str, _ShownGroups]]:
    """For each head its groups of examples, pictures as small as it takes to keep the page light."""
    return fit_panels(
        lambda side_px: [(run.head, _show_groups(run.examples, side_px)) for run in runs],
        lambda shown: [
            panel for _, groups in shown for _, group in groups for example in group for panel in example.panels
        ],
    )


def _show_groups(examples: Sequence[Example], side_px: int) -> _ShownGroups:
    return [(group, [_show(example, side_px) for example in examples if example.group == group]) for group in _GROUPS]


def _show(example: Example, side_px: int) -> _ShownExample:
    pictures = triptych(example.image, example.truth, example.predicted, side_px)
    return _ShownExample(
        prompt=example.prompt,
        iou=number(example.iou, 2),
        tags=[(tag, value) for tag, value in example.tags.items() if value is not None],
        panels=[
            Panel.of_image(pictures.image, example.truth.shape),
            Panel.of_mask(pictures.truth, "Truth", example.truth),
            Panel.of_mask(pictures.predicted, "Prediction", example.predicted),
        ],
    )


def _stages(seconds: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """(stage, seconds as text, share of the longest)."""
    stages = [(name, value) for name, value in flatten(seconds) if is_number(value)]
    longest = max((value for _, value in stages), default=0.0) or 1.0
    return [(name, in_seconds(value), value / longest) for name, value in stages]


def _training_s(run: RunReport) -> float | int | None:
    return run.history[-1].get("elapsed_s") if run.history else None
