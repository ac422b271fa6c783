"""Label maps as pictures: every class in a colour of its own over the image, and below it a legend. RGB throughout."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from evaluate.lettering import Lettering
from evaluate.pictures import Colour

OPACITY = 0.6
"""How much of a class's colour lies over the image."""

_PAPER: Colour = (255, 255, 255)
_INK: Colour = (24, 24, 24)
_FAINT: Colour = (110, 110, 110)
_GOLDEN = (5**0.5 - 1) / 2
_LEAST_WIDTH_PX = 420
_LETTERS_PER_COLUMN = 20


@dataclass(frozen=True)
class LabelPicture:
    """A label map as it is shown.

    Args:
        classes: names in the order of their numbers.
        colours: of each class; None leaves the image as it is, which is how background is shown.
    """

    classes: tuple[str, ...]
    colours: tuple[Colour | None, ...]

    @classmethod
    def of(cls, names: Sequence[str], *, background: bool) -> LabelPicture:
        """Classes in colours that are easy to tell apart. With `background` it is number 0, before them."""
        colours = [class_colour(row) for row in range(len(names))]
        if background:
            return cls(("background", *names), (None, *colours))
        return cls(tuple(names), tuple(colours))

    def draw_map(self, image: UInt8[np.ndarray, "h w 3"], labels: NDArray[np.integer]) -> UInt8[np.ndarray, "h w 3"]:
        """Each pixel of the image under the colour of its class, at the image's own size.

        Raises:
            ValueError: the label map has another size than the image.
        """
        if image.shape[:2] != labels.shape:
            raise ValueError(f"the image is {image.shape[:2]} and the label map {labels.shape}: resize one of them")
        over = np.array([colour or (0, 0, 0) for colour in self.colours], np.float32)[labels]
        opacity = np.array([0 if colour is None else OPACITY for colour in self.colours], np.float32)[labels][..., None]
        return np.rint(image * (1 - opacity) + over * opacity).astype(np.uint8)

    def draw(self, image: UInt8[np.ndarray, "h w 3"], labels: NDArray[np.integer]) -> UInt8[np.ndarray, "_ _ 3"]:
        """`draw_map` in the top left corner, and below it the legend of the classes that are there, largest first.

        Classes that no pixel belongs to stand behind them in grey. A narrow image has paper at its right.
        """
        height, width = labels.shape
        legend = self._draw_legend(labels, max(width, _LEAST_WIDTH_PX))
        picture = np.full((height + len(legend), legend.shape[1], 3), _PAPER, np.uint8)
        picture[:height, :width] = self.draw_map(image, labels)
        picture[height:] = legend
        return picture

    def shares(self, labels: NDArray[np.integer]) -> list[float]:
        """The share of the pixels that each class has."""
        return (np.bincount(labels.ravel(), minlength=len(self.classes)) / labels.size).tolist()

    def _draw_legend(self, labels: NDArray[np.integer], width: int) -> UInt8[np.ndarray, "h w 3"]:
        size_px = min(28, max(15, round(width / 48)))
        lettering, gap = Lettering(size_px), round(0.6 * size_px)
        shares = self.shares(labels)
        order = sorted(range(len(self.classes)), key=lambda number: (-shares[number], number))
        said = [_percent(share) for share in shares]
        beside_name = size_px + 3 * gap + max(lettering.width(text) for text in said)
        room = int(min(width - gap, _LETTERS_PER_COLUMN * size_px) - beside_name)
        names = [(lettering.wrap(name, room, 1) or [""])[0] for name in self.classes]
        num_columns = max(1, int((width - gap) // (max(map(lettering.width, names)) + beside_name)))
        num_rows = -(-len(order) // num_columns)
        step = round(1.35 * lettering.line_px)
        canvas = Image.new("RGB", (width, num_rows * step + 2 * gap), _PAPER)
        pen = ImageDraw.Draw(canvas)
        for place, number in enumerate(order):
            row, column = place % num_rows, place // num_rows
            left, top = gap + round(column * (width - gap) / num_columns), gap + row * step
            swatch = (left, top, left + size_px, top + size_px)
            pen.rectangle(swatch, fill=self.colours[number] or _PAPER, outline=_INK)
            if self.colours[number] is None:
                pen.line(swatch, fill=_FAINT)
            x, y = left + size_px + gap, top + (size_px - lettering.line_px) / 2
            lettering.draw(pen, (x, y), names[number], _INK if shares[number] else _FAINT)
            lettering.draw(pen, (x + lettering.width(names[number]) + gap, y), said[number], _FAINT)
        return np.asarray(canvas)


def class_colour(number: int) -> Colour:
    """The colour of the class with that number, whatever the others are: hues a golden section apart, and every few
    classes a lighter or darker shade.

    >>> class_colour(0)
    (230, 46, 46)
    """
    saturation, value = ((0.8, 0.9), (0.55, 1.0), (0.95, 0.62))[number // 7 % 3]
    red, green, blue = colorsys.hsv_to_rgb(number * _GOLDEN % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _percent(share: float) -> str:
    return "0 %" if not share else "< 0.1 %" if share < 0.001 else f"{share:.1%}".replace("%", " %")
