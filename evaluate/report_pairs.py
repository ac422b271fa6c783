"""Two heads on the same samples: which one is better where, and by how much."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib
import numpy as np
from jaxtyping import Float, Int64
from matplotlib.collections import PatchCollection
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from evaluate.pages import cut, signed
from evaluate.plots import INK, STYLE, colour_of, inline_svg

_NUM_CELLS = 20
_NUM_BARS = 41
"""Odd, so that one bar holds the samples on which both are equal, and its neighbours are as wide."""

_EQUAL = "#8a8a83"
_NAME_LETTERS = 30


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """IoUs of two heads on the same samples, each with the name and the place of its head."""

    names: tuple[str, str]
    places: tuple[int, int]
    first: Float[np.ndarray, " S"]
    second: Float[np.ndarray, " S"]

    @property
    def differences(self) -> Float[np.ndarray, " S"]:
        """By how much the first is better on each sample."""
        return self.first - self.second

    @property
    def shares(self) -> tuple[float, float, float]:
        """Shares of the samples on which the first is better, on which both are equal, and on which it is worse."""
        signs = np.sign(self.differences)
        better, equal, worse = (float(np.mean(signs == sign)) for sign in (1, 0, -1))
        return better, equal, worse


def count_both(pair: Pair) -> Int64[np.ndarray, "cells cells"]:
    """How many samples have which IoU with the second head (first axis) and the first, in 20 x 20 equal cells."""
    counts, _, _ = np.histogram2d(pair.second, pair.first, bins=_NUM_CELLS, range=((0, 1), (0, 1)))
    return counts.astype(np.int64)


def draw_both(name: str, pair: Pair) -> str:
    """How many samples have which IoU with either head, on a grid of 20 x 20 cells: the darker, the more.

    A grid, not a dot for each sample: a page stays small however many there are, and dots on dots do not hide.
    """
    counts = count_both(pair)
    cells = np.argwhere(counts > 0)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 4.0))
        axes = figure.add_axes((0.15, 0.14, 0.8, 0.83))
        colours = LinearSegmentedColormap.from_list("ink", ("#d3d8e0", "#101c30"))
        patches = [Rectangle((x / _NUM_CELLS, y / _NUM_CELLS), 1 / _NUM_CELLS, 1 / _NUM_CELLS) for x, y in cells]
        drawn = PatchCollection(patches, cmap=colours, norm=LogNorm(1, max(2, counts.max())), linewidth=0)
        drawn.set_array(counts[tuple(cells.T)])
        axes.add_collection(drawn)
        axes.plot((0, 1), (0, 1), color=INK, linewidth=1, linestyle=(0, (3, 2)))
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.tick_params(axis="x", pad=7)
        axes.set_xlabel(f"IoU of {cut(pair.names[1], _NAME_LETTERS)}", color=colour_of(pair.places[1]))
        axes.set_ylabel(f"IoU of {cut(pair.names[0], _NAME_LETTERS)}", color=colour_of(pair.places[0]))
        better, _, worse = pair.shares
        description = (
            f"IoU of {pair.names[0]} over that of {pair.names[1]}: {better:.0%} of the samples lie above the line on "
            f"which both are equal, {worse:.0%} below."
        )
        return inline_svg(figure, name, description)


def draw_differences(name: str, pair: Pair) -> str:
    """How the differences of IoU are spread, as shares of the samples, in the colour of the better head; their mean."""
    edges = (np.arange(_NUM_BARS + 1) - _NUM_BARS / 2) / (_NUM_BARS // 2)
    centres = (edges[:-1] + edges[1:]) / 2
    shares = np.histogram(pair.differences, bins=edges)[0] / len(pair.first)
    sides = [pair.places[0] if centre > 0 else pair.places[1] for centre in centres]
    colours = [_EQUAL if place == _NUM_BARS // 2 else colour_of(side) for place, side in enumerate(sides)]
    mean = float(pair.differences.mean())
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 4.0))
        axes = figure.add_axes((0.15, 0.14, 0.8, 0.77))
        axes.grid(visible=False, axis="x")
        axes.bar(centres, shares, width=edges[1] - edges[0], color=colours, edgecolor="white", linewidth=0.6)
        axes.axvline(mean, color=INK, linewidth=1, linestyle=(0, (3, 2)))
        axes.text(mean, 1.02, f"mean {signed(mean)}", transform=axes.get_xaxis_transform(), ha="center", va="bottom")
        axes.set_xlim(-1.03, 1.03)
        axes.set_ylim(0, shares.max() * 1.08)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.tick_params(axis="x", pad=7)
        axes.set_xlabel("difference of IoU")
        description = (
            f"Differences of IoU between {pair.names[0]} and {pair.names[1]}: {signed(mean)} on average, and within "
            f"0.025 for {shares[_NUM_BARS // 2]:.0%} of the samples."
        )
        return inline_svg(figure, name, description)
