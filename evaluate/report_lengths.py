"""Does a head understand long prompts? IoU by the number of words, as inline SVG and as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from evaluate.plots import INK, STYLE, colour_of, draw_counts, inline_svg, plot_over_counts

MAX_LENGTHS = 14
"""How many lengths have a place of their own; longer prompts share the last."""

_FEWEST_OF_A_BOX = 5
"""Of fewer samples a box would tell more than there is: they are drawn one by one."""


@dataclass(frozen=True, slots=True, eq=False)
class Length:
    """The samples whose prompts have so many words: how that is written, and their IoUs."""

    label: str
    iou: Float[np.ndarray, " S"]

    @property
    def mean(self) -> float:
        return float(self.iou.mean())

    @property
    def median(self) -> float:
        return float(np.median(self.iou))


def by_length(iou: Float[np.ndarray, " S"], prompts: Sequence[str]) -> list[Length]:
    """The samples by the number of words of their prompts, shortest first; only lengths that occur.

    A prompt without any word is left out. What is longer than the first `MAX_LENGTHS` - 1 lengths is one group.
    """
    num_words = np.array([len(prompt.split()) for prompt in prompts], np.int64)
    occurring = np.unique(num_words[num_words > 0])
    if len(occurring) <= MAX_LENGTHS:
        return [Length(str(length), iou[num_words == length]) for length in occurring]
    alone, least = occurring[: MAX_LENGTHS - 1], occurring[MAX_LENGTHS - 1]
    return [
        *(Length(str(length), iou[num_words == length]) for length in alone),
        Length(f"{least}+", iou[num_words >= least]),
    ]


def draw_lengths(name: str, head: str, lengths: Sequence[Length], index: int) -> str:
    """IoU over the number of words: a box from quartile to quartile with whiskers from the 5th to the 95th percentile.

    A line in the box is the median, a dot the mean; of fewer than five samples each is a ring. Bars below count the
    samples. `name` makes the SVG's ids unique on a page.
    """
    colour, places = colour_of(index), np.arange(len(lengths), dtype=np.float64)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 3.3))
        axes, counts = plot_over_counts(figure)
        for place, length in zip(places, lengths, strict=True):
            if len(length.iou) < _FEWEST_OF_A_BOX:
                axes.plot([place] * len(length.iou), length.iou, "o", mfc="none", mec=colour, markersize=4)
                continue
            low, first, middle, third, high = np.quantile(length.iou, (0.05, 0.25, 0.5, 0.75, 0.95))
            axes.vlines(place, low, high, color=colour, linewidth=1)
            axes.bar(place, third - first, 0.6, first, color="white", edgecolor=colour, linewidth=1.2, zorder=2)
            axes.hlines(middle, place - 0.3, place + 0.3, color=colour, linewidth=2.2, zorder=3)
            axes.plot(place, length.mean, "o", color=INK, markersize=3.5, zorder=4)
        axes.grid(visible=False, axis="x")
        axes.set_ylim(-0.02, 1.02)
        axes.set_ylabel("IoU")
        draw_counts(counts, np.array([len(length.iou) for length in lengths]), places, 0.6)
        counts.set_xticks(places, [length.label for length in lengths])
        counts.set_xlim(-0.6, len(lengths) - 0.4)
        counts.set_xlabel("words in the prompt")
        means = ", ".join(f"{length.mean:.2f} for {length.label}" for length in lengths)
        return inline_svg(figure, name, f"IoU of {head} by words in the prompt; the means are {means}.")
