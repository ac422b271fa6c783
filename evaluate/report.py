"""The report: one HTML file that shows what trained heads are worth, readable anywhere, offline, for years.

Prompts, names and paths are data: the template escapes them. Knows nothing about how the numbers were made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cache_schema import atomic
from cache_schema.errors import UsageError
from evaluate.metrics import slice_metrics, sort_values, standard_tags
from evaluate.pages import (
    NO_NUMBER,
    capital,
    css_colour,
    cut,
    flatten,
    in_seconds,
    is_number,
    number,
    render_page,
    short,
    signed,
    words,
)
from evaluate.pictures import PREDICTED_COLOUR, TRUTH_COLOUR
from evaluate.plots import colour_of
from evaluate.report_calibration import calibrate, draw_calibration
from evaluate.report_inputs import Example, Group, PromptMasks, RunReport, SeveralPrompts
from evaluate.report_lengths import by_length, draw_lengths
from evaluate.report_pairs import Pair, count_both, draw_both, draw_differences
from evaluate.report_pictures import show_pictures
from evaluate.report_plots import Line, draw_curves, draw_histogram, iou_shares

__all__ = ["Example", "Group", "PromptMasks", "RunReport", "SeveralPrompts", "write_report"]

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

_TITLES = {
    **HEADLINE_METRICS,
    "giou": "gIoU",
    "ciou": "cIoU",
    "p_at_0.6": "P@0.6",
    "p_at_0.8": "P@0.8",
    "target_p_at_0.7": "Target P@0.7",
    "target_p_at_0.8": "Target P@0.8",
    "target_p_at_0.9": "Target P@0.9",
}

_ALWAYS_SHOWN = ("mean_iou", "overall_iou", "n_acc", "t_acc")
"""Metrics that stand in the table whatever a protocol shows first."""

SLICE_TITLES = {
    "kind": "Mean IoU by kind of prompt",
    "prompt_length": "Mean IoU by length of the prompt in words",
    "object_size": "Mean IoU by size of the object",
}

_MAX_SLICE_ROWS, _VALUE_LETTERS = 24, 120

_TOLD = frozenset(
    "name version resolution threshold comparison prediction_resize truth_resize empty_union sentence_policy "
    "no_target_px headline".split()
)
"""What sentences say of a protocol; anything else it holds is listed."""


def write_report(
    path: Path, results: Mapping[str, Any], runs: Sequence[RunReport], notes: Sequence[str], title: str
) -> Path:
    """Write the report as one self-contained HTML file, and return its path.

    `results` is the object of results.json; its "runs" and `runs` name the same heads in the same order. A run of it
    may hold "intervals", metric -> [low, high]; they are shown beside the metrics. Equal arguments give equal bytes.

    Raises:
        UsageError: there is no run, `results` and `runs` disagree about the heads, or the heads were not scored on the
            same samples.
    """
    heads = [run.head for run in runs]
    if not heads:
        raise UsageError("a report needs at least one run: train a head first")
    if heads != [result["head"] for result in results["runs"]]:
        raise UsageError(f"the results are not those of the heads {', '.join(heads)}: evaluate these runs again")
    if any(list(run.prompts) != list(runs[0].prompts) for run in runs[1:]):
        raise UsageError(f"the heads {', '.join(heads)} were not scored on the same samples: evaluate them together")
    pictures, too_many = show_pictures(runs)
    values = {
        "title": title,
        "notes": [*notes, *too_many],
        "findings": _findings(results),
        "heads": [(head, colour_of(index)) for index, head in enumerate(heads)],
        "num_samples": len(runs[0].scores),
        "num_baselines": len(results["baselines"]),
        "headline": _headline(results, runs),
        "interval_name": _interval_name(results.get("bootstrap", {})),
        "protocol": results["protocol"],
        "protocol_sentences": _protocol_sentences(results["protocol"]),
        "slices": _slices(runs),
        "lengths": _lengths(runs),
        "curves": _curves(runs),
        "histograms": _histograms(runs),
        "calibration": _calibration(runs),
        "comparison": _comparison(runs) if len(runs) > 1 else None,
        "examples": [(shown.head, shown.groups) for shown in pictures],
        "several": [(shown.head, shown.several) for shown in pictures if shown.several],
        "truth_colour": css_colour(TRUTH_COLOUR),
        "predicted_colour": css_colour(PREDICTED_COLOUR),
        "stages": _stages(results["seconds"]),
        "run_dirs": [(result["head"], result["run_dir"]) for result in results["runs"]],
        "provenance": list(flatten(results.get("provenance", {}))),
    }
    page = render_page("report.html.j2", {**values, "contents": _contents(values)})
    atomic.write_file(path, page.encode())
    return path


def _contents(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(id, title) of each section of the page."""
    titles = {
        "results": "Results",
        "protocol": "Protocol",
        "slices": "Strengths and weaknesses",
        "lengths": "Length of the prompt",
        "training": "Training",
        "histograms": "Spread of IoU",
        "calibration": "Predicted IoU",
        "comparison": "Head against head",
        "examples": "Examples",
        "several": "Several prompts",
        "time": "Time",
        "provenance": "Provenance",
        "glossary": "Glossary",
    }
    optional = ("lengths", "calibration", "comparison", "several")
    return [(name, title) for name, title in titles.items() if name not in optional or values[name]]


def _shown_metrics(protocol: Mapping[str, Any]) -> dict[str, str]:
    """Names and titles of the metrics in the table: those the protocol shows first, and those always shown."""
    first = protocol.get("headline", HEADLINE_METRICS)
    return {name: _TITLES.get(name, words(name)) for name in dict.fromkeys([*first, *_ALWAYS_SHOWN])}


def _findings(results: Mapping[str, Any]) -> str:
    name, title = next(iter(_shown_metrics(results["protocol"]).items()))
    title = title[0].lower() + title[1:]
    best = max(results["runs"], key=lambda result: result["metrics"][name])
    reached = best["metrics"][name]
    sentence = f"{best['head']} reaches a {title} of {number(reached)}"
    if len(results["runs"]) > 1:
        sentence += ", the best of the heads"
    if not results["baselines"]:
        return sentence + "."
    baseline, metrics = max(results["baselines"].items(), key=lambda item: item[1][name])
    if reached <= metrics[name]:
        return f"{sentence}. That is no better than the baseline “{words(baseline)}” at {number(metrics[name])}."
    return f"{sentence}; the best baseline, “{words(baseline)}”, reaches {number(metrics[name])}."


def _headline(results: Mapping[str, Any], runs: Sequence[RunReport]) -> dict[str, Any]:
    """Columns and rows of the table; a cell is (text, is it the best of the heads, interval)."""
    shown, best = _shown_metrics(results["protocol"]), {}
    for name in shown:
        texts = {number(result["metrics"].get(name)) for result in results["runs"]} - {NO_NUMBER}
        best[name] = max(texts) if len(texts) > 1 else None

    def cells(result: Mapping[str, Any]) -> list[tuple[str, bool, str]]:
        intervals = result.get("intervals", {})
        texts = {name: number(result["metrics"].get(name)) for name in shown}
        return [(text, text == best[name], _interval(intervals.get(name))) for name, text in texts.items()]

    return {
        "columns": list(shown.values()),
        "heads": [
            (run.head, cells(result), short(run.num_parameters), in_seconds(_training_s(run)))
            for run, result in zip(runs, results["runs"], strict=True)
        ],
        "baselines": [
            (name, [number(metrics.get(metric)) for metric in shown]) for name, metrics in results["baselines"].items()
        ],
        "has_intervals": any(result.get("intervals") for result in results["runs"]),
    }


def _interval(interval: Sequence[float | int | None] | None) -> str:
    """Low and high as narrow as scores can be written, or nothing."""
    if interval is None or not all(is_number(end) for end in interval):
        return ""
    low, high = (number(end).removeprefix("0") for end in interval)
    return f"{low}{NO_NUMBER}{high}"


def _interval_name(bootstrap: Mapping[str, Any]) -> str:
    """How intervals were made, as far as the results say it."""
    if not bootstrap:
        return "interval"
    drawn = f"{bootstrap['num_replicates']:,} bootstrap replicates over {bootstrap['num_images']:,} images"
    return f"{100 * bootstrap['level']:.0f} % interval, from {drawn}"


def _protocol_sentences(protocol: Mapping[str, Any]) -> list[str]:
    resolution = protocol["resolution"]
    resizes = (("prediction", "prediction_resize"), ("truth", "truth_resize"))
    sentences = [
        "Masks are compared at the original size of each image."
        if resolution == "original"
        else f"Masks are compared at {resolution}, not at the original size of the image.",
        *(f"How the {side} is resized: {protocol[key]}." for side, key in resizes if key in protocol),
        f"A pixel is marked where its probability is {protocol['comparison']} {protocol['threshold']}.",
        f"{capital(protocol['empty_union'])}.",
        f"{capital(protocol['sentence_policy'])}.",
        f"A head without a no-target output says “no target” below {protocol['no_target_px']} marked pixels.",
    ]
    others = sorted(set(protocol) - _TOLD)
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
            rows.append(
                (cut(value, _VALUE_LETTERS), num_samples[value], [(number(mean), mean or 0.0) for mean in means])
            )
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


def _lengths(runs: Sequence[RunReport]) -> dict[str, Any] | None:
    """A plot for each head, and the rows of a table: (words, samples, mean of each head)."""
    groups = [by_length(run.scores.iou, run.prompts) for run in runs]
    if not groups[0]:
        return None
    return {
        "plots": [
            (run.head, draw_lengths(f"lengths-{index}", run.head, lengths, index))
            for index, (run, lengths) in enumerate(zip(runs, groups, strict=True))
        ],
        "rows": [
            (of_heads[0].label, len(of_heads[0].iou), [(number(length.mean), length.mean) for length in of_heads])
            for of_heads in zip(*groups, strict=True)
        ],
    }


def _calibration(runs: Sequence[RunReport]) -> dict[str, Any] | None:
    """Plots and rows of the heads that predict their IoU: (place, head, texts)."""
    plots, rows, num_unusable = [], [], 0
    for index, run in enumerate(runs):
        found = None if run.predicted_iou is None else calibrate(run.predicted_iou, run.scores.iou)
        if found is None:
            continue
        plots.append((index, run.head, draw_calibration(f"calibration-{index}", run.head, found, index)))
        figures = (found.mean_predicted, found.mean_achieved, found.expected_error)
        correlations = (found.correlation, found.rank_correlation)
        texts = [number(figure) for figure in figures]
        rows.append(
            (index, run.head, texts + [NO_NUMBER if value is None else signed(value, 2) for value in correlations])
        )
        num_unusable += found.num_unusable
    return {"plots": plots, "rows": rows, "num_unusable": num_unusable} if plots else None


def _comparison(runs: Sequence[RunReport]) -> dict[str, Any]:
    """The head of the highest mean IoU beside each other one, on the same samples."""
    ious = [run.scores.iou for run in runs]
    lead = max(range(len(runs)), key=lambda index: float(ious[index].mean()))
    others = [index for index in range(len(runs)) if index != lead]
    pairs = [Pair((runs[lead].head, runs[other].head), (lead, other), ious[lead], ious[other]) for other in others]
    return {
        "lead": lead,
        "others": others,
        "rows": [
            (signed(float(pair.differences.mean())), *(f"{share:.1%}" for share in pair.shares)) for pair in pairs
        ],
        "plots": [
            [
                (
                    f"IoU of both: the darker, the more samples, up to {count_both(pair).max():,}",
                    draw_both(f"both-{other}", pair),
                ),
                ("Difference of IoU", draw_differences(f"difference-{other}", pair)),
            ]
            for other, pair in zip(others, pairs, strict=True)
        ],
        "slices": _differences(runs[lead], pairs),
    }


def _differences(lead: RunReport, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """For each standard tag its title and rows of (value, samples, one (text, share of the largest) for each pair)."""
    tags = {**lead.tags, **standard_tags(lead.scores, lead.prompts)}
    tables: list[dict[str, Any]] = []
    for tag in SLICE_TITLES:
        column = np.array(tags.get(tag, ()), dtype=object)
        means = {}
        for value in sort_values({value for value in column if value is not None}):
            inside = (column == value).astype(np.bool_)
            means[value] = (np.count_nonzero(inside), [float(pair.differences[inside].mean()) for pair in pairs])
        if means:
            tables.append({"column": capital(words(tag)), "rows": means})
    largest = max((abs(mean) for table in tables for _, found in table["rows"].values() for mean in found), default=0)
    for table in tables:
        table["rows"] = [
            (cut(value, _VALUE_LETTERS), num, [(signed(mean), mean / (largest or 1)) for mean in found])
            for value, (num, found) in table["rows"].items()
        ]
    return tables


def _stages(seconds: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """(stage, seconds as text, share of the longest)."""
    stages = [(name, value) for name, value in flatten(seconds) if is_number(value)]
    longest = max((value for _, value in stages), default=0.0) or 1.0
    return [(name, in_seconds(value), value / longest) for name, value in stages]


def _training_s(run: RunReport) -> float | int | None:
    return run.history[-1].get("elapsed_s") if run.history else None
