"""Quality against cost as inline SVG: a point for each head, its spread over seeds, and its name beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox, BboxBase

from evaluate.pages import short
from evaluate.plots import INK, MARKERS, STYLE, colour_of, inline_svg

_GAP_PX, _REACH = 7.0, (1.0, 2.4, 4.0, 6.0)
"""How far a name stands from its point, and the multiples that are tried."""

_WIDER = 1.12
"""The typeface of a page may be wider than the one that is measured."""


@dataclass(frozen=True, slots=True)
class Point:
    """One head: what it costs, what it is worth, and how much that differs from seed to seed (None for one seed)."""

    label: str
    cost: float | int
    quality: float
    sd: float | None


def draw_tradeoff(
    name: str, points: Sequence[Point], cost_title: str, baseline: tuple[str, float] | None, description: str
) -> str:
    """Mean IoU over a logarithmic cost. `name` makes the SVG's ids unique on a page.

    Args:
        baseline: what a prediction that looks at nothing is called, and its mean IoU, for a line.
    """
    with matplotlib.rc_context(STYLE):
        return inline_svg(tradeoff_figure(points, cost_title, baseline), name, description)


def tradeoff_figure(points: Sequence[Point], cost_title: str, baseline: tuple[str, float] | None) -> Figure:
    """The figure of `draw_tradeoff`."""
    figure = Figure(figsize=(5.0, 3.9))
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.155, 0.13, 0.815, 0.83))
    axes.set_xscale("log")
    for index, point in enumerate(points):
        axes.errorbar(
            point.cost,
            point.quality,
            yerr=point.sd,
            color=colour_of(index),
            marker=MARKERS[(index + index // len(MARKERS)) % len(MARKERS)],  # with its colour, one of a kind
            markersize=6,
            capsize=3,
            elinewidth=1.1,
        )
    _set_limits(axes, points, baseline)
    axes.set_xlabel(cost_title)
    axes.set_ylabel("mean IoU")
    canvas.draw()
    marked = [list(_boxes_of_point(axes, point)) for point in points]
    taken: list[BboxBase] = [box for boxes in marked for box in boxes]
    if baseline is not None:
        axes.axhline(baseline[1], color=INK, linewidth=1, linestyle=(0, (3, 2)))
        taken.append(_name_line(axes, *baseline, taken))
    for index in sorted(range(len(points)), key=lambda index: -points[index].quality):
        others = [boxes[0] for place, boxes in enumerate(marked) if place != index]
        taken.append(_name_point(axes, points[index], colour_of(index), taken, others))
    return figure


def _set_limits(axes: Axes, points: Sequence[Point], baseline: tuple[str, float] | None) -> None:
    costs = [point.cost for point in points]
    factor = max(1.6, (max(costs) / min(costs)) ** 0.16)
    axes.set_xlim(min(costs) / factor, max(costs) * factor)
    lows = [point.quality - (point.sd or 0) for point in points] + ([baseline[1]] if baseline else [])
    highs = [point.quality + (point.sd or 0) for point in points] + ([baseline[1]] if baseline else [])
    room = max(0.02, 0.16 * (max(highs) - min(lows)))
    axes.set_ylim(max(0.0, min(lows) - room), min(1.02, max(highs) + room))
    narrow = max(costs) * factor / (min(costs) / factor) < 60
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)


def _boxes_of_point(axes: Axes, point: Point) -> Iterator[Bbox]:
    """The marker and the error bar, in pixels."""
    sd = point.sd or 0.0
    (x, y), (_, low), (_, high) = (
        axes.transData.transform((point.cost, value))
        for value in (point.quality, point.quality - sd, point.quality + sd)
    )
    yield Bbox.from_extents(x - 6, y - 6, x + 6, y + 6)
    yield Bbox.from_extents(x - 5, low - 1, x + 5, high + 1)


def _name_line(axes: Axes, label: str, height: float, taken: Sequence[BboxBase]) -> Bbox:
    """Write a horizontal line's name at the end where it covers least, above or below; returns the box it fills."""
    written = []
    for end, side, up in ((1, "right", 3), (0, "left", 3), (1, "right", -11), (0, "left", -11)):
        text = axes.annotate(
            label,
            (end, height),
            (2 - 4 * end, up),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            ha=side,
            fontsize=9,
        )
        written.append((sum(_shared(text.get_window_extent(), box) for box in taken), text))
    kept = min(written, key=lambda item: item[0])[1]
    for _, text in written:
        if text is not kept:
            text.remove()
    return kept.get_window_extent()


def _name_point(axes: Axes, point: Point, colour: str, taken: Sequence[BboxBase], others: Sequence[Bbox]) -> Bbox:
    """Write a point's name where it covers least, near its point if it can; returns the box it fills.

    Args:
        taken: what no name should cover.
        others: other points, which the line from the name to its point should not cross.
    """
    x, y = axes.transData.transform((point.cost, point.quality))
    text = axes.annotate(point.label, (x, y), xycoords="figure pixels", color=colour, va="center", ha="center")
    extent = text.get_window_extent()
    text.remove()
    width, height = extent.width * _WIDER, extent.height
    inside = axes.get_window_extent()

    def cost_of(candidate: tuple[float, float, Bbox]) -> float:
        dx, dy, box = candidate
        covered = sum(_shared(box, other) for other in taken)
        outside = width * height - _shared(box, inside)
        line = [(x + step * dx / 24, y + step * dy / 24) for step in range(1, 24)]
        crossed = sum(other.contains(*place) for place in line if not box.contains(*place) for other in others)
        distance = max(abs(dx) - width / 2, 0.0) + abs(dy)
        return 10 * (covered + 3 * outside + 40 * crossed) + distance

    candidates = []
    for reach in _REACH:
        across, up = width / 2 + reach * _GAP_PX + 2, height / 2 + reach * _GAP_PX
        for right, above in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)):
            dx, dy = right * across, above * up
            box = Bbox.from_bounds(x + dx - width / 2, y + dy - height / 2, width, height)
            candidates.append((dx, dy, box))
    dx, dy, box = min(candidates, key=cost_of)
    far = abs(dy) > height / 2 + 2 * _GAP_PX or abs(dx) > width / 2 + 2 * _GAP_PX + 2
    scale = 72 / axes.figure.dpi
    axes.annotate(
        point.label,
        (point.cost, point.quality),
        (dx * scale, dy * scale),
        textcoords="offset points",
        color=colour,
        va="center",
        ha="center",
        arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4} if far else None,
    )
    return box


def _shared(one: BboxBase, other: BboxBase) -> float:
    """Area of two boxes' intersection."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return float(width * height) if width > 0 and height > 0 else 0.0
