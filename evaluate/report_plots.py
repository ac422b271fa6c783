"""The report's plots as inline SVG: training curves, and how IoUs are spread."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from evaluate.pages import is_number
from evaluate.plots import INK, MARKERS, STYLE, colour_of, inline_svg

_LABEL_GAP = 0.085
_LINE_LETTERS, _MAX_LINES = 18, 3
_MAX_MARKED_POINTS = 25
_NUM_BINS = 20


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: a value at each step, in the order of the steps. `colour` is the place of its colour among all."""

    label: str
    steps: Sequence[float | int]
    values: Sequence[float | int]
    colour: int | None = None

    @classmethod
    def of_history(cls, label: str, history: Sequence[Mapping[str, Any]], key: str, colour: int | None = None) -> Line:
        """What the lines of metrics.jsonl say of `key`, where they say a number."""
        points = [(line["step"], line[key]) for line in history if is_number(line.get(key))]
        return cls(label, [step for step, _ in points], [value for _, value in points], colour)


def draw_curves(name: str, lines: Sequence[Line], title: str, *, from_zero: bool) -> str:
    """Curves over training steps, each labelled at its end. `name` makes the SVG's ids unique on a page.

    Args:
        title: what the curves are of, for whoever cannot see them.
    """
    ends = ", ".join(f"{line.label} ends at {line.values[-1]:.3g}" for line in lines if line.values)
    places = [index if line.colour is None else line.colour for index, line in enumerate(lines)]
    colours = [colour_of(place) for place in places]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 3.1))
        labels = [_wrap(line.label) for line in lines]
        axes = figure.add_axes((0.125, 0.15, 0.855 - _label_width(labels), 0.81))
        axes.set_xlabel("training step")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        for index, line in enumerate(lines):
            marker = MARKERS[places[index] % len(MARKERS)] if len(line.steps) <= _MAX_MARKED_POINTS else None
            axes.plot(line.steps, line.values, color=colours[index], marker=marker, markersize=4, linewidth=1.7)
        axes.margins(x=0.02)
        if from_zero:
            axes.set_ylim(bottom=0)
        low, high = axes.get_ylim()
        drawn = [index for index, line in enumerate(lines) if len(line.values)]
        gap = _LABEL_GAP * max((labels[index].count("\n") + 1 for index in drawn), default=1)
        heights = _spread([(lines[index].values[-1] - low) / (high - low) for index in drawn], gap)
        for index, height in zip(drawn, heights, strict=True):
            axes.annotate(
                labels[index],
                xy=(lines[index].steps[-1], lines[index].values[-1]),
                xytext=(1.04, height),
                textcoords="axes fraction",
                va="center",
                color=colours[index],
                arrowprops={
                    "arrowstyle": "-",
                    "color": colours[index],
                    "linewidth": 0.6,
                    "shrinkA": 1,
                    "shrinkB": 3,
                    "relpos": (0, 0.5),
                },
                annotation_clip=False,
            )
        return inline_svg(figure, name, f"{title} over training steps: {ends}.")


def draw_histogram(name: str, iou: Float[np.ndarray, " S"], index: int, most: float, description: str) -> str:
    """How a head's IoUs are spread over 20 equal bins, as shares of the samples up to `most`, with the median."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 2.3))
        axes = figure.add_axes((0.125, 0.2, 0.825, 0.69))
        axes.grid(visible=False, axis="x")
        shares = iou_shares(iou)
        edges = np.linspace(0, 1, _NUM_BINS + 1)
        axes.bar(edges[:-1], shares, width=1 / _NUM_BINS, align="edge", color=colour_of(index), edgecolor="white")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, most * 1.15)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("IoU")
        axes.tick_params(axis="x", pad=7)
        median = float(np.median(iou))
        axes.axvline(median, color=INK, linewidth=1, linestyle=(0, (3, 2)))
        axes.text(
            median,
            1.02,
            f"median {median:.2f}",
            transform=axes.get_xaxis_transform(),
            ha="left" if median < 0.2 else "right" if median > 0.8 else "center",
            va="bottom",
        )
        return inline_svg(figure, name, description)


def iou_shares(iou: Float[np.ndarray, " S"]) -> Float[np.ndarray, " bins"]:
    """The share of the samples in each of 20 equal bins from 0 to 1; IoU 1 belongs to the last."""
    return np.histogram(iou, bins=_NUM_BINS, range=(0, 1))[0] / len(iou)


def _wrap(label: str) -> str:
    """A label in lines that fit beside a plot, broken after joints of names where there are any.

    >>> _wrap("two_way"), _wrap("cross_attention-7e58561d359e")
    ('two_way', 'cross_attention-\\n7e58561d359e')
    """
    lines = [""]
    for part in re.findall(r"[^ _-]*[ _-]?", " ".join(label.split())):
        if len(lines[-1]) + len(part) > _LINE_LETTERS and lines[-1]:
            lines.append("")
        lines[-1] += part
    lines = [line if len(line) <= _LINE_LETTERS else f"{line[: _LINE_LETTERS - 1]}…" for line in lines]
    return "\n".join(lines[:_MAX_LINES])


def _label_width(labels: Sequence[str]) -> float:
    """The share of a curve's width to leave for its labels."""
    return 0.055 + 0.0195 * max((len(line) for label in labels for line in label.split("\n")), default=0)


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move label heights (0 to 1) apart until none touches another, keeping their order.

    More labels than have room at that gap stand closer together.

    >>> [round(height, 3) for height in _spread([0.5, 0.5, 0.1], 0.085)]
    [0.458, 0.542, 0.1]
    """
    gap = min(gap, 1 / max(1, len(heights)))
    clusters: list[tuple[float, list[int]]] = []
    for index in sorted(range(len(heights)), key=lambda index: heights[index]):
        centre, members = _place([index], heights, gap)
        while clusters and centre - clusters[-1][0] < gap * (len(members) + len(clusters[-1][1])) / 2:
            centre, members = _place(clusters.pop()[1] + members, heights, gap)
        clusters.append((centre, members))
    spread = [0.0] * len(heights)
    for centre, members in clusters:
        for place, member in enumerate(members):
            spread[member] = centre + gap * (place - (len(members) - 1) / 2)
    return spread


def _place(members: list[int], heights: Sequence[float], gap: float) -> tuple[float, list[int]]:
    """The centre of a stack of labels: the mean of their heights, moved so far that the stack stays inside the plot."""
    reach = (gap * (len(members) - 1) + max(0.0, gap - _LABEL_GAP)) / 2
    centre = math.fsum(heights[member] for member in members) / len(members)
    return min(max(centre, reach), max(1 - reach, reach)), members
