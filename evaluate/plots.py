"""What the plots of all pages share: colours, markers, and inline SVG that gives the same bytes for the same data."""

from __future__ import annotations

import io
import re

import numpy as np
from jaxtyping import Float, Int64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Each is dark enough to be read as text on white (contrast above 4.5), and they stay apart for colour-blind readers
# together with the markers.
COLOURS = ("#1f5fa8", "#b8450b", "#1b7a4b", "#7a3d9a", "#7d5a14", "#b0256b", "#0b7285", "#4a4a4a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK, _RULE = "#333333", "#c9c9c4"
_COUNTED = "#a9a9a2"

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "headstart",
    "text.parse_math": False,
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": _RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ebebe6",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


def colour_of(index: int) -> str:
    """The colour of the head at this position, the same in every plot and table."""
    return COLOURS[index % len(COLOURS)]


def plot_over_counts(figure: Figure) -> tuple[Axes, Axes]:
    """A plot, and a flat one below it on the same x axis that counts samples."""
    axes = figure.add_axes((0.15, 0.38, 0.82, 0.59))
    counts = figure.add_axes((0.15, 0.155, 0.82, 0.16), sharex=axes)
    axes.tick_params(labelbottom=False)
    return axes, counts


def draw_counts(
    axes: Axes, counts: Int64[np.ndarray, " bins"], places: Float[np.ndarray, " bins"], width: float
) -> None:
    """Bars that count samples, `width` wide at their places."""
    axes.grid(visible=False, axis="x")
    axes.bar(places, counts, width, color=_COUNTED)
    axes.set_ylim(0, 1.08 * counts.max())
    axes.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    axes.set_ylabel("samples")


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """A figure as an SVG element, in the context of `STYLE` that it was drawn in. `name` makes ids unique on a page.

    Args:
        description: what it shows, for whoever cannot see it.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    # Ids are unique in a plot, not on a page; and the page, not the plot, decides size and typeface.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    view_box = re.search(r'viewBox="[^"]+"', svg)
    assert view_box is not None
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'<svg role="img" aria-label="{label}" {view_box[0]}{svg[svg.index(">") :]}'
