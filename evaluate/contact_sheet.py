"""A contact sheet: many samples on one picture, each an image with its truth on it and its prompt below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw

from evaluate.lettering import Lettering
from evaluate.pictures import TRUTH_COLOUR, Colour, overlay, resize_mask

_CELL_PX, _GAP_PX, _MARGIN_PX = 256, 20, 28
_LEAST_PX = 96
"""Height of the field for a picture, at least: a very flat one lies in the middle of it."""
_MAX_COLUMNS, _PROMPT_LINES, _NOTE_LINES = 6, 4, 2

_PAPER: Colour = (255, 255, 255)
_FIELD: Colour = (236, 236, 232)
_INK: Colour = (30, 30, 30)
_PALE_INK: Colour = (110, 110, 110)
_IGNORED_COLOURS: tuple[Colour, Colour] = ((70, 70, 70), (200, 200, 200))
_STRIPE_PX = 4
_TINT = 0.2
"""Weak, for many prompts are about colours."""


@dataclass(frozen=True)
class Card:
    """One sample to be shown.

    Args:
        image: (H, W, 3) uint8, or in words why there is none.
        truth: (H, W) its mask; None where the sample has none.
        ignored: (H, W) pixels that nobody labelled, if there are any.
        no_target: the prompt names nothing in the image.
        note: what else there is to say, in small letters.
    """

    prompt: str
    image: UInt8[np.ndarray, "h w 3"] | str
    truth: Bool[np.ndarray, "h w"] | None = None
    ignored: Bool[np.ndarray, "h w"] | None = None
    no_target: bool = False
    note: str = ""

    def fitted(self) -> Card:
        """The same card with image and masks as large as a sheet shows them, so that many take little memory."""
        if isinstance(self.image, str):
            return self
        height, width = self.image.shape[:2]
        size = _fit((height, width))
        return replace(
            self,
            image=_scale(self.image, size),
            truth=None if self.truth is None else resize_mask(self.truth, size),
            ignored=None if self.ignored is None else resize_mask(self.ignored, size),
        )


def draw_sheet(title: str, cards: Sequence[Card]) -> UInt8[np.ndarray, "h w 3"]:
    """All cards in rows, in their order, under a title and a legend of what the pictures show."""
    sheet = _Sheet(min(_MAX_COLUMNS, max(2, math.ceil(math.sqrt(1.5 * len(cards))))))
    rows = [cards[start : start + sheet.columns] for start in range(0, len(cards), sheet.columns)]
    strips = [sheet.heading(title, cards), *(sheet.row(row) for row in rows)]
    return np.asarray(_stack(strips))


def _stack(strips: Sequence[Image.Image]) -> Image.Image:
    stacked = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)), _PAPER)
    top = 0
    for strip in strips:
        stacked.paste(strip, (0, top))
        top += strip.height
    return stacked


class _Sheet:
    """Draws the strips of a sheet, each as wide as the whole."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self._width = 2 * _MARGIN_PX + columns * _CELL_PX + (columns - 1) * _GAP_PX
        self._title, self._prompt, self._note = Lettering(20), Lettering(16), Lettering(12)

    def heading(self, title: str, cards: Sequence[Card]) -> Image.Image:
        """The title, and what the colours mean that occur on this sheet."""
        lines = self._title.wrap(title, self._width - 2 * _MARGIN_PX, 3)
        height = _MARGIN_PX + len(lines) * self._title.line_px + 2 * self._note.line_px + _GAP_PX // 2
        strip = Image.new("RGB", (self._width, height), _PAPER)
        canvas, y = ImageDraw.Draw(strip), _MARGIN_PX
        for line in lines:
            self._title.draw(canvas, (_MARGIN_PX, y), line, _INK)
            y += self._title.line_px
        x, y, side = _MARGIN_PX, y + self._note.line_px // 2, self._note.line_px
        for name, swatch in _legend(cards, side):
            strip.paste(Image.fromarray(swatch), (x, y))
            self._note.draw(canvas, (x + 2 * side + 6, y), name, _PALE_INK)
            x += 2 * side + 6 + math.ceil(self._note.width(name)) + _GAP_PX
        return strip

    def row(self, cards: Sequence[Card]) -> Image.Image:
        """Cards side by side: as high as the highest picture, and then as the longest text."""
        pictures = [self._picture(card.fitted()) for card in cards]
        prompts = [self._prompt.wrap(card.prompt, _CELL_PX, _PROMPT_LINES) for card in cards]
        notes = [self._note.wrap(card.note, _CELL_PX, _NOTE_LINES) for card in cards]
        field_px = max(_LEAST_PX, *(picture.height for picture in pictures))
        text_px = max(
            len(prompt) * self._prompt.line_px + len(note) * self._note.line_px
            for prompt, note in zip(prompts, notes, strict=True)
        )
        strip = Image.new("RGB", (self._width, field_px + 6 + text_px + _GAP_PX), _PAPER)
        canvas = ImageDraw.Draw(strip)
        for place, picture in enumerate(pictures):
            x, y = _MARGIN_PX + place * (_CELL_PX + _GAP_PX), field_px + 6
            canvas.rectangle((x, 0, x + _CELL_PX - 1, field_px - 1), fill=_FIELD)
            strip.paste(picture, (x + (_CELL_PX - picture.width) // 2, (field_px - picture.height) // 2))
            if cards[place].no_target:
                self._stamp(canvas, x, "no target")
            for line in prompts[place]:
                self._prompt.draw(canvas, (x, y), line, _INK)
                y += self._prompt.line_px
            for line in notes[place]:
                self._note.draw(canvas, (x, y), line, _PALE_INK)
                y += self._note.line_px
        return strip

    def _picture(self, card: Card) -> Image.Image:
        if isinstance(card.image, str):
            return self._lack(card.image)
        picture = card.image
        if card.truth is not None:
            picture = overlay(picture, card.truth, TRUTH_COLOUR, _TINT)
        if card.ignored is not None:
            picture = _hatch(picture, card.ignored)
        return Image.fromarray(picture)

    def _lack(self, reason: str) -> Image.Image:
        """A field that says why there is no picture."""
        field = Image.new("RGB", (_CELL_PX, 3 * _CELL_PX // 4), _FIELD)
        lines = self._note.wrap(reason, _CELL_PX - 24, 8)
        y = (field.height - len(lines) * self._note.line_px) // 2
        for line in lines:
            self._note.draw(ImageDraw.Draw(field), ((_CELL_PX - self._note.width(line)) / 2, y), line, _PALE_INK)
            y += self._note.line_px
        return field

    def _stamp(self, canvas: ImageDraw.ImageDraw, x: int, text: str) -> None:
        width = math.ceil(self._note.width(text)) + 12
        canvas.rectangle((x, 0, x + width, self._note.line_px + 5), fill=_INK)
        self._note.draw(canvas, (x + 6, 3), text, _PAPER)


def _legend(cards: Sequence[Card], side: int) -> list[tuple[str, UInt8[np.ndarray, "h w 3"]]]:
    """The names of what the cards show beside their images, each with a swatch of how it is drawn."""
    plain = np.full((side, 2 * side, 3), _FIELD, np.uint8)
    inside = np.zeros((side, 2 * side), np.bool_)
    inside[2:-2, 2:-2] = True
    legend = []
    if any(card.truth is not None and not card.no_target for card in cards):
        legend.append(("truth", overlay(plain, inside, TRUTH_COLOUR, _TINT)))
    if any(card.ignored is not None for card in cards):
        legend.append(("ignored: nobody labelled it", _hatch(plain, np.ones_like(inside))))
    return legend


def _fit(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a picture of that shape whose longer side is as long as a cell is wide."""
    scale = _CELL_PX / max(size)
    height, width = (max(1, round(side * scale)) for side in size)
    return height, width


def _scale(image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "new_h new_w 3"]:
    """Smaller smoothly; larger so that each pixel is seen."""
    if image.shape[:2] == size:
        return image
    larger = size[0] > image.shape[0] or size[1] > image.shape[1]
    how = Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(image).resize(size[::-1], how, reducing_gap=None if larger else 3.0))


def _hatch(picture: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Slanted stripes over the pixels of a mask, through which half of the picture shows."""
    rows, columns = np.indices(mask.shape)
    stripes = np.array(_IGNORED_COLOURS, np.float32)[(rows + columns) // _STRIPE_PX % 2]
    hatched = picture.astype(np.float32)
    hatched[mask] += 0.6 * (stripes[mask] - hatched[mask])
    return np.rint(hatched).astype(np.uint8)
