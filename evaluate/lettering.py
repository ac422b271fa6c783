"""Text in pictures: any script that some font of this machine can show, broken into lines of a given width."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import ImageDraw, ImageFont

from evaluate.pictures import Colour

_MAIN_FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
"""Comes with matplotlib, so it is the same everywhere: Latin, Greek, Cyrillic, Hebrew, Arabic and many signs."""

_MAX_LETTERS = 400
_ELLIPSIS = "\u2026"


class Lettering:
    """One size of text.

    Args:
        size_px: height of a line's letters, from the lowest to the highest.
    """

    def __init__(self, size_px: int) -> None:
        self._size_px = size_px
        self.line_px = round(1.3 * size_px)

    def width(self, text: str) -> float | int:
        """How many pixels wide a text is on one line."""
        return sum(font.getlength(run) for run, font in self._runs(text))

    def draw(
        self, canvas: ImageDraw.ImageDraw, place: tuple[float | int, float | int], text: str, colour: Colour
    ) -> None:
        """Write one line whose top left corner is at `place`, (x, y)."""
        x, y = place
        baseline = y + 0.8 * self.line_px
        for run, font in self._runs(text):
            canvas.text((x, baseline), run, fill=colour, font=font, anchor="ls")
            x += font.getlength(run)

    def wrap(self, text: str, width_px: int, max_lines: int) -> list[str]:
        """A text in lines no wider than `width_px`, broken between words or, where a word is too wide, inside it.

        What does not fit into `max_lines` is cut, and ends in an ellipsis.
        """
        cut, lines = len(text) > _MAX_LETTERS, list[str]()
        for word in text[:_MAX_LETTERS].split():
            longer = f"{lines[-1]} {_visible(word)}" if lines else _visible(word)
            if self.width(longer) <= width_px:
                lines[-1:] = [longer]
            else:
                lines += self._break(_visible(word), width_px)
        if lines and (cut or len(lines) > max_lines):
            del lines[max_lines:]
            while lines[-1] and self.width(lines[-1] + _ELLIPSIS) > width_px:
                lines[-1] = lines[-1][:-1]
            lines[-1] = lines[-1].rstrip() + _ELLIPSIS
        return lines

    def _break(self, word: str, width_px: int) -> list[str]:
        """A word in pieces, each as wide as fits and of one letter at least."""
        pieces = [""]
        for letter in word:
            if pieces[-1] and self.width(pieces[-1] + letter) > width_px:
                pieces.append("")
            pieces[-1] += letter
        return pieces

    def _runs(self, text: str) -> Iterator[tuple[str, ImageFont.FreeTypeFont]]:
        """The text in pieces of one font each. A mark stays with the letter it is set on."""
        paths: list[Path] = []
        for letter in text:
            joins = bool(paths) and (unicodedata.category(letter)[0] in "MC" or letter == " ")
            paths.append(paths[-1] if joins else _font_for(letter) or _MAIN_FONT)
        for path, letters in groupby(zip(paths, text, strict=True), key=lambda pair: pair[0]):
            yield "".join(letter for _, letter in letters), _load(path, self._size_px)


def can_show(text: str) -> bool:
    """Whether this machine has fonts for every letter of a text; a letter without one is drawn as an empty box."""
    return all(_font_for(letter) for letter in _visible(text) if unicodedata.category(letter)[0] not in "MCZ")


def _visible(text: str) -> str:
    """A text without what has no picture of its own: control characters and halves of surrogate pairs."""
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


@cache
def _font_for(letter: str) -> Path | None:
    fonts = (_MAIN_FONT, *_other_fonts()) if ord(letter) > 0x7F else (_MAIN_FONT,)
    return next((path for path in fonts if ord(letter) in _letters_of(path)), None)


@cache
def _other_fonts() -> tuple[Path, ...]:
    """The fonts of this machine, upright ones without serifs first."""
    found = [Path(path) for path in font_manager.findSystemFonts()]
    return tuple(sorted(found, key=lambda path: ("Regular" not in path.stem, "Sans" not in path.stem, path)))


@cache
def _letters_of(path: Path) -> frozenset[int]:
    """The letters a font can show; none if it cannot be used."""
    try:
        _load(path, 16)
        return frozenset(FT2Font(str(path)).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()


@cache
def _load(path: Path, size_px: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), size_px)
