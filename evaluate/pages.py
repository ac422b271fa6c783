"""What the pages share: how they are made, and how they write names and numbers.

Names are data: templates escape them. Knows nothing about what a page shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import numpy as np
from jaxtyping import Bool, UInt8

from cache_schema.errors import UsageError
from evaluate.pictures import Colour, data_uri, encode_jpeg

NO_NUMBER = "\N{EN DASH}"
"""What stands where a number does not apply."""

_PANEL_SIDES_PX = (320, 256, 200, 160, 128, 96)
SMALLEST_SIDE_PX = _PANEL_SIDES_PX[-1]
"""The longer side of a picture on a page that holds many."""

_MAX_PICTURE_BYTES = 3_000_000

Shown = TypeVar("Shown")


@dataclass(frozen=True, slots=True)
class Panel:
    """A picture that a page holds in itself: its bytes, what it shows, what stands below it, and its (H, W)."""

    uri: str
    alt: str
    caption: str
    size: tuple[int, int]

    @classmethod
    def of_image(cls, picture: UInt8[np.ndarray, "h w 3"], original_size: tuple[int, ...]) -> Panel:
        """An image without anything drawn on it."""
        height, width = original_size
        return cls._of(picture, f"The image, {width} by {height} pixels", "Image")

    @classmethod
    def of_mask(
        cls, picture: UInt8[np.ndarray, "h w 3"], name: str, mask: Bool[np.ndarray, "height width"], caption: str = ""
    ) -> Panel:
        """An image with a mask drawn on it; a caption says more than the mask's name."""
        what = f"{mask.mean():.1%} of the image is marked" if mask.any() else "nothing is marked"
        return cls._of(picture, f"{name}: {what}", caption or (name if mask.any() else f"{name}: nothing"))

    @classmethod
    def _of(cls, picture: UInt8[np.ndarray, "h w 3"], alt: str, caption: str) -> Panel:
        return cls(data_uri(encode_jpeg(picture), "jpeg"), alt, caption, picture.shape[:2])


def fit_panels(show: Callable[[int], Shown], panels_of: Callable[[Shown], Iterable[Panel]]) -> Shown:
    """What `show` makes of the longer side of a picture in pixels: the largest that keeps a page light.

    Raises:
        UsageError: there are too many pictures.
    """
    for side_px in _PANEL_SIDES_PX:
        shown = show(side_px)
        panels = list(panels_of(shown))
        if num_fitting([panels]):
            return shown
    raise UsageError(f"{len(panels)} pictures do not fit a page of a few megabytes: show fewer examples.")


def num_fitting(parts: Iterable[Iterable[Panel]]) -> int:
    """How many of the parts of a page, from the first on, have pictures that it can hold; reads no further."""
    num, num_bytes = 0, 0
    for panels in parts:
        for panel in panels:
            num_bytes += len(panel.uri)
            if num_bytes > _MAX_PICTURE_BYTES:
                return num
        num += 1
    return num


def render_page(template: str, values: Mapping[str, Any]) -> str:
    """One self-contained HTML page, readable offline. Equal values give the same text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["words"] = words
    return environment.get_template(template).render(values)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, each named by its path; a list is one leaf.

    >>> list(flatten({"store": {"images": "f00", "layers": [3, 9]}}))
    [('store · images', 'f00'), ('store · layers', '3, 9')]
    """
    for key, value in tree.items():
        name = f"{prefix} · {key}" if prefix else str(key)
        if isinstance(value, Mapping):
            yield from flatten(value, name)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield name, ", ".join(map(str, value))
        else:
            yield name, value


def words(name: str) -> str:
    """A name of the code as people read it."""
    return name.replace("_", " ")


def capital(text: str) -> str:
    """The text with a capital at its beginning, where `str.capitalize` would make small letters of the rest."""
    return text[:1].upper() + text[1:]


def cut(text: str, num_letters: int) -> str:
    """The text, or as much of it as there is room for.

    >>> cut("a prompt", 8), cut("a prompt", 6)
    ('a prompt', 'a pro…')
    """
    return text if len(text) <= num_letters else f"{text[: num_letters - 1]}…"


def short(value: float | int) -> str:
    """A number of any size in a few letters.

    >>> short(0.05), short(769), short(1500), short(1378817), short(2.5e9)
    ('0.05', '769', '1.5 k', '1.38 M', '2.5 G')
    """
    for unit, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


def is_number(value: Any) -> bool:
    """Whether it is one that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: float | int | None, digits: int = 3) -> str:
    """A score with so many decimals.

    >>> number(0.5), number(1 / 3, 2)
    ('0.500', '0.33')
    """
    return NO_NUMBER if value is None or math.isnan(value) else f"{value:.{digits}f}"


def signed(value: float, digits: int = 3) -> str:
    """A difference of scores, with its sign; none where so many decimals show none.

    >>> signed(0.5), signed(-1 / 3, 2), signed(-0.0001)
    ('+0.500', '\N{MINUS SIGN}0.33', '0.000')
    """
    text = f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
    return text if text.strip("+\N{MINUS SIGN}0.") else text[1:]


def in_seconds(value: float | int | None) -> str:
    """Seconds as one reads them.

    >>> in_seconds(0.234), in_seconds(75.26), in_seconds(1204.2)
    ('0.23', '75.3', '1,204')
    """
    if value is None:
        return NO_NUMBER
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def css_colour(colour: Colour) -> str:
    """Red, green and blue as style sheets write them."""
    return "#{:02x}{:02x}{:02x}".format(*colour)
