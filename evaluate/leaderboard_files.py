"""The leaderboard as files: JSON for scripts, CSV for spreadsheets, markdown for repositories, HTML for people.

Names, kinds and notes are data: each format escapes them. Knows nothing about how the numbers were made.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_schema import atomic
from evaluate.leaderboard import RANKED_BY, SHOWN_METRICS
from evaluate.leaderboard_plot import Point, draw_tradeoff
from evaluate.pages import NO_NUMBER, capital, flatten, render_page, short, words
from evaluate.plots import colour_of
from evaluate.report import HEADLINE_METRICS

JSON, CSV, MARKDOWN, PAGE = "leaderboard.json", "leaderboard.csv", "leaderboard.md", "leaderboard.html"

_COSTS = {
    "num_parameters": "Parameters",
    "flops_per_prompt": "FLOP a prompt",
    "latency_ms": "Latency, ms",
    "prompts_per_s": "Prompts/s",
    "train_samples_per_s": "Training samples/s",
    "peak_bytes": "Peak memory",
}
_SHOWN_SETTINGS = ("epochs", "batch_size", "prompts_per_image", "patience", "target_size")


@dataclass(frozen=True)
class Table:
    """Texts under a title; the first column names the rows. `apart` rows are no heads and are not ranked."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    apart: Sequence[Sequence[str]] = ()

    def to_markdown(self) -> str:
        """A table that reads in a terminal too."""
        lines = [[_cell(text) for text in row] for row in (self.columns, *self.rows, *self.apart)]
        widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        aligned = [
            [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
            for row in lines
        ]
        return "\n".join("| " + " | ".join(row) + " |" for row in (aligned[0], rule, *aligned[1:]))


def write_leaderboard(board: Mapping[str, Any], out: Path, title: str = "headstart leaderboard") -> None:
    """Write what `make_leaderboard` found, in four formats, each file whole or not at all."""
    atomic.write_json(out / JSON, board)
    atomic.write_file(out / CSV, to_csv(board).encode())
    atomic.write_file(out / MARKDOWN, to_markdown(board, title).encode())
    atomic.write_file(out / PAGE, to_page(board, title).encode())


def to_csv(board: Mapping[str, Any]) -> str:
    """One line for each head by rank, then the baselines; figures as they are in the JSON."""
    kinds = _kinds(board)
    columns = ["rank", "name", "head", "num_seeds"]
    for metric in SHOWN_METRICS:
        columns += [metric, f"{metric}_sd"]
    columns += [f"{RANKED_BY}[{kind}]" for kind in kinds]
    columns += list(board["heads"][0]["cost"])
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for rank, entry in enumerate(board["heads"], 1):
        row: dict[str, Any] = {"rank": rank, "name": entry["name"], "head": entry["head"]}
        row["num_seeds"] = len(entry["runs"])
        for metric in SHOWN_METRICS:
            row |= {metric: entry["metrics"][metric]["mean"], f"{metric}_sd": entry["metrics"][metric]["sd"]}
        row |= {f"{RANKED_BY}[{kind}]": entry["slices"][kind]["mean"] for kind in kinds}
        writer.writerow(row | entry["cost"])
    for name, metrics in board["baselines"].items():
        writer.writerow({"name": name, "head": "baseline", **{metric: metrics[metric] for metric in SHOWN_METRICS}})
    return buffer.getvalue()


def to_markdown(board: Mapping[str, Any], title: str) -> str:
    """The tables with what they depend on."""
    parts = [f"# {_cell(title)}", _cell(finding(board)), *(f"> {_cell(note)}" for note in board["notes"])]
    for table in tables(board):
        parts += [f"## {table.title}", table.to_markdown()]
    if board["left_out"]:
        parts += ["## Left out", "\n".join(f"- {_cell(name)}: {_cell(why)}" for name, why in board["left_out"].items())]
    parts += ["## Budget", "\n".join(f"- {_cell(sentence)}" for sentence in budget_sentences(board))]
    parts += ["## Machine", "\n".join(f"- {words(name)}: {_cell(str(value))}" for name, value in _facts(board))]
    return "\n\n".join(parts) + "\n"


def to_page(board: Mapping[str, Any], title: str) -> str:
    """One self-contained HTML page, readable on a phone."""
    return render_page(
        "leaderboard.html.j2",
        {
            "title": title,
            "finding": finding(board),
            "notes": board["notes"],
            "plots": _plots(board),
            "tables": tables(board),
            "colours": [colour_of(index) for index in range(len(board["heads"]))],
            "left_out": board["left_out"],
            "budget": budget_sentences(board),
            "facts": _facts(board),
            "runs": [(entry["name"], run) for entry in board["heads"] for run in entry["runs"]],
        },
    )


def finding(board: Mapping[str, Any]) -> str:
    """The result in a sentence or two; two heads are only told apart where their spreads are."""
    best, *others = board["heads"]
    sentence = f"{best['name']} reaches the highest mean IoU, {_figure(best['metrics'][RANKED_BY])}"
    near = [entry["name"] for entry in others if _touch(best["metrics"][RANKED_BY], entry["metrics"][RANKED_BY])]
    if near:
        sentence += f"; over these seeds the range of {_listed(near)} overlaps with it"
    name, metrics = _best_baseline(board)
    if best["metrics"][RANKED_BY]["mean"] <= metrics[RANKED_BY]:
        return f"{sentence}. That is no better than the best baseline, {words(name)}, at {metrics[RANKED_BY]:.3f}."
    return f"{sentence}. The best baseline, {words(name)}, reaches {metrics[RANKED_BY]:.3f}."


def tables(board: Mapping[str, Any]) -> list[Table]:
    """Quality, quality by kind where there are kinds, and cost."""
    heads, kinds = board["heads"], _kinds(board)
    quality = Table(
        "Quality",
        ["Head", *(HEADLINE_METRICS[metric] for metric in SHOWN_METRICS), "Seeds"],
        [
            [
                entry["name"],
                *(_figure(entry["metrics"][metric]) for metric in SHOWN_METRICS),
                str(len(entry["runs"])),
            ]
            for entry in heads
        ],
        [
            [f"({words(name)})", *(f"{metrics[metric]:.3f}" for metric in SHOWN_METRICS), ""]
            for name, metrics in board["baselines"].items()
        ],
    )
    by_kind = Table(
        "Mean IoU by kind of prompt",
        ["Head", *kinds],
        [[entry["name"], *(f"{entry['slices'][kind]['mean']:.3f}" for kind in kinds)] for entry in heads],
        [["(samples)", *(f"{heads[0]['slices'][kind]['num_samples']:,}" for kind in kinds)]],
    )
    cost = Table(
        "Cost",
        ["Head", *_COSTS.values()],
        [[entry["name"], *(_cost(name, entry["cost"][name]) for name in _COSTS)] for entry in heads],
    )
    return [quality, *([by_kind] if kinds else []), cost]


def budget_sentences(board: Mapping[str, Any]) -> list[str]:
    """What every number depends on."""
    budget, protocol, heads = board["budget"], board["protocol"], board["heads"]
    cost, stopped = heads[0]["cost"], [(entry["name"], _num_stopped(entry)) for entry in heads]
    sentences = [f"{budget['train_samples']:,} samples to train on, {budget['num_seeds']} seeds a head."]
    for name in _SHOWN_SETTINGS:
        if name in budget:
            sentences.append(f"{capital(words(name))} of every head: {_value(budget[name])}.")
        else:
            own = ", ".join(f"{entry['name']} {_value(entry['settings'][name])}" for entry in heads)
            sentences.append(f"{capital(words(name))}: {own}.")
    if any(num for _, num in stopped):
        early = _listed([f"{name} ({num})" for name, num in stopped if num])
        sentences.append(f"Runs that stopped early, when they got no better: {early}.")
    resolution = "the original size of each image" if protocol["resolution"] == "original" else protocol["resolution"]
    return [
        *sentences,
        f"Scored on {board['num_samples']:,} samples of {protocol['dataset']}/{protocol['split']} at {resolution}; a "
        f"pixel is marked where its probability is {protocol['comparison']} {protocol['threshold']}; "
        f"{protocol['empty_union']}; {protocol['sentence_policy']}.",
        *(
            [f"{board['num_left_out']} samples are left out: their images could not be encoded."]
            if board["num_left_out"]
            else []
        ),
        "A figure is the mean over seeds, ± their sample standard deviation; heads stand by mean IoU.",
        "Latency is that of one image with one prompt, prompts/s that of batches of "
        f"{cost['batch_size']} images with one prompt each: the head alone, in float32, on features in memory. FLOP "
        "count matrix products and convolutions, an addition and a multiplication as two.",
        f"Peak memory is that of a forward pass of such a batch, without weights and inputs ({cost['peak_measured']}).",
        "Training samples/s are those of the head's own steps, waiting for data included.",
    ]


def _plots(board: Mapping[str, Any]) -> list[tuple[str, str]]:
    name, metrics = _best_baseline(board)
    baseline = (f"best baseline: {words(name)}", float(metrics[RANKED_BY]))
    plots = []
    for key, title, axis in (
        ("latency_ms", "Quality against latency", "latency of one prompt, ms"),
        ("num_parameters", "Quality against size", "parameters"),
    ):
        points = [
            Point(
                entry["name"],
                entry["cost"][key],
                entry["metrics"][RANKED_BY]["mean"],
                entry["metrics"][RANKED_BY]["sd"],
            )
            for entry in board["heads"]
        ]
        said = ", ".join(f"{point.label} {point.quality:.3f} at {short(point.cost)}" for point in points)
        plots.append((title, draw_tradeoff(key, points, axis, baseline, f"Mean IoU over {axis}: {said}.")))
    return plots


def _kinds(board: Mapping[str, Any]) -> list[str]:
    return list(board["heads"][0]["slices"])


def _best_baseline(board: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    best: tuple[str, Mapping[str, Any]] = max(board["baselines"].items(), key=lambda item: item[1][RANKED_BY])
    return best


def _facts(board: Mapping[str, Any]) -> list[tuple[str, Any]]:
    prints = [(f"fingerprint of {name}", value) for name, value in flatten(board["provenance"])]
    return [*flatten(board["machine"]), *prints]


def _num_stopped(entry: Mapping[str, Any]) -> int:
    return sum(run["stopped_early"] for run in entry["runs"])


def _touch(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return bool(one["low"] <= other["high"] and other["low"] <= one["high"])


def _figure(spread: Mapping[str, Any]) -> str:
    return f"{spread['mean']:.3f}" + ("" if spread["sd"] is None else f" ± {spread['sd']:.3f}")


def _cost(name: str, value: float | int | None) -> str:
    if value is None:
        return NO_NUMBER
    return f"{short(value)}B" if name == "peak_bytes" and value >= 1000 else short(value)


def _value(value: Any) -> str:
    if isinstance(value, list) and len(value) == 2:
        return f"{value[0]} x {value[1]}"
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _cell(text: str) -> str:
    """Text that stays in its cell: markdown takes it for nothing else, in tables and lists."""
    escaped = " ".join(text.split()).replace("\\", "\\\\")
    for mark in "|`*<>[]":
        escaped = escaped.replace(mark, f"\\{mark}")
    return escaped
