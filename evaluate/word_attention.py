"""Attention per word, made visible: an image for each word, warm where the word gets or gives more than elsewhere.

What a head calls attention differs: cells may share theirs among words, or words among cells, and either may be nearly
even. So a map is shown as a multiple of its own mean over the grid, 1 being even, and the multiples are written down.
"""

from __future__ import annotations

import math

import matplotlib
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from cache_schema.errors import UsageError
from cache_schema.masks import Size
from cache_schema.views import WHOLE, View, make_view
from evaluate.lettering import Lettering
from evaluate.pictures import Colour, overlay, resize_mask
from evaluate.predictor import Prediction
from heads.losses import resize_logits

_PANEL_PX, _GAP_PX, _MARGIN_PX = 256, 16, 24
_LEAST_PX = 128
"""Width of what stands under a panel, at least, however narrow the panel is."""
_MAX_COLUMNS, _PROMPT_LINES = 4, 3
_LEGEND_PX = 160

_PAPER: Colour = (255, 255, 255)
_INK: Colour = (30, 30, 30)
_PALE_INK: Colour = (95, 95, 95)
_COLOURS = (np.asarray(matplotlib.colormaps["inferno"](np.linspace(0.35, 1.0, 256)))[:, :3] * 255).astype(np.float32)
"""From even attention to the highest. Its dark end is left out: on a grey picture it would pass for shadow."""
_OPACITY = 0.85
_PALER = 0.75
"""How much of the contrast of a picture is left under the colours."""
_LEAST_TOP = 1.25
"""Where the scale ends, at least: else nearly even attention would look like a finding."""
_TIMES = "\N{MULTIPLICATION SIGN}"


def relative_attention(prediction: Prediction) -> Float[np.ndarray, "words gh gw"]:
    """Each word's attention as a multiple of its mean over the grid.

    Raises:
        UsageError: the head has none to show.
    """
    if prediction.attention is None:
        raise UsageError(
            "this head sees a prompt as one pooled vector and has no attention per word; take a head that reads its "
            "tokens, such as cross_attention, pseg-tokens or text-driven."
        )
    means = prediction.attention.mean((1, 2), keepdims=True)
    return prediction.attention / np.maximum(means, np.finfo(np.float32).tiny)


def draw_words(
    image: UInt8[np.ndarray, "h w 3"], prediction: Prediction, longest_side: int | None = None
) -> list[UInt8[np.ndarray, "new_h new_w 3"]]:
    """The image once for each of the prediction's words: grey, and coloured where attention is above the word's mean.

    All words share one scale, from 1 to the highest multiple of any, so that what is nearly even stays nearly grey.

    Args:
        longest_side: how large, in pixels; by default as large as the image.

    Raises:
        UsageError: the head has no attention to show.
    """
    relative = relative_attention(prediction)
    size = (image.shape[0], image.shape[1])
    view = make_view(WHOLE, 0, size, "") if prediction.view is None else prediction.view
    scale = 1.0 if longest_side is None else longest_side / max(size)
    small = _scale_image(image, scale)
    grey = np.asarray(Image.fromarray(small).convert("L"), np.float32)[..., None]
    base = np.repeat(_PALER * grey + (1 - _PALER) * 255, 3, axis=2)
    share = (relative - 1) / (_top(relative) - 1)
    return [_colour(base, _spread(word, view, scale, (small.shape[0], small.shape[1]))) for word in share]


def draw_attention(image: UInt8[np.ndarray, "h w 3"], prediction: Prediction) -> UInt8[np.ndarray, "new_h new_w 3"]:
    """A strip: the prompt, the image with the mask on it, and each word's attention above its name, with a legend.

    The number beside a word is its highest multiple of its mean.

    Raises:
        UsageError: the head has no attention to show.
    """
    relative = relative_attention(prediction)
    small = _scale_image(image, _PANEL_PX / max(image.shape[:2]))
    marked = overlay(small, resize_mask(prediction.mask, (small.shape[0], small.shape[1])))
    captions = [("mask", "no target" if prediction.no_target else f"score {prediction.score:.2f}")]
    for word, most in zip(prediction.words, relative.max((1, 2)), strict=True):
        captions.append((word, f"{most:.2f} {_TIMES}"))
    panels = [marked, *draw_words(image, prediction, _PANEL_PX)]
    return _arrange(prediction.prompt, panels, captions, _top(relative))


def _top(relative: Float[np.ndarray, "words gh gw"]) -> float:
    """The multiple at which the scale of colours ends."""
    return max(_LEAST_TOP, float(relative.max(initial=1.0)))


def _arrange(
    prompt: str, panels: list[UInt8[np.ndarray, "h w 3"]], captions: list[tuple[str, str]], top: float
) -> UInt8[np.ndarray, "new_h new_w 3"]:
    """Panels of one size in rows, each with a name and a figure under it, below the prompt and above the legend."""
    title, name, note = Lettering(18), Lettering(15), Lettering(12)
    panel_px, cell_px = panels[0].shape[0], max(_LEAST_PX, panels[0].shape[1])
    columns = min(_MAX_COLUMNS, len(panels))
    width = 2 * _MARGIN_PX + max(columns * cell_px + (columns - 1) * _GAP_PX, 2 * _PANEL_PX)
    lines = title.wrap(prompt, width - 2 * _MARGIN_PX, _PROMPT_LINES)
    first = _MARGIN_PX + len(lines) * title.line_px + _GAP_PX
    row_px = panel_px + name.line_px + 8 + _GAP_PX
    end = first + math.ceil(len(panels) / columns) * row_px
    strip = Image.new("RGB", (width, end + note.line_px + _MARGIN_PX), _PAPER)
    canvas = ImageDraw.Draw(strip)
    for number, line in enumerate(lines):
        title.draw(canvas, (_MARGIN_PX, _MARGIN_PX + number * title.line_px), line, _INK)
    for place, (panel, (word, figure)) in enumerate(zip(panels, captions, strict=True)):
        row, column = divmod(place, columns)
        left, upper = _MARGIN_PX + column * (cell_px + _GAP_PX), first + row * row_px
        strip.paste(Image.fromarray(panel), (left, upper))
        figure_px = note.width(figure)
        (shown,) = name.wrap(word, int(cell_px - figure_px - 10), 1)
        name.draw(canvas, (left, upper + panel_px + 4), shown, _INK)
        note.draw(canvas, (left + cell_px - figure_px, upper + panel_px + 7), figure, _PALE_INK)
    _draw_legend(strip, note, end, top)
    return np.asarray(strip)


def _draw_legend(strip: Image.Image, note: Lettering, upper: int, top: float) -> None:
    """A bar of the colours, between the multiples of the mean that its ends stand for."""
    canvas, low = ImageDraw.Draw(strip), "attention: the word's mean"
    note.draw(canvas, (_MARGIN_PX, upper), low, _PALE_INK)
    left = _MARGIN_PX + math.ceil(note.width(low)) + 8
    shares = np.tile(np.linspace(0, 1, _LEGEND_PX, dtype=np.float32), (note.line_px - 4, 1))
    bar = _colour(np.full((*shares.shape, 3), _PALER * 128 + (1 - _PALER) * 255, np.float32), shares)
    strip.paste(Image.fromarray(bar), (left, upper + 2))
    note.draw(canvas, (left + _LEGEND_PX + 8, upper), f"{top:.2f} {_TIMES} as much", _PALE_INK)


def _colour(base: Float[np.ndarray, "h w 3"], shares: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Lay colours over a picture: none where a share is 0, the last and most opaque one where it is 1."""
    shares = shares.clip(0, 1)
    colours = _COLOURS[np.rint(shares * (len(_COLOURS) - 1)).astype(np.intp)]
    opacity = _OPACITY * np.sqrt(shares)[..., None]
    return np.rint(base + opacity * (colours - base)).astype(np.uint8)


def _spread(values: Float[np.ndarray, "gh gw"], view: View, scale: float, size: Size) -> Float[np.ndarray, "h w"]:
    """Values of a grid that lies over a view of an image, bilinearly, over the pixels of that image scaled to a size.

    They are 0 where the view shows nothing.
    """
    left, top, right, bottom = (round(edge * scale) for edge in view.box)
    scaled = View((left, top, max(right, left + 1), max(bottom, top + 1)), view.flip)
    return scaled.place(resize_logits(torch.from_numpy(values)[None], scaled.size)[0].numpy(), size, 0)


def _scale_image(image: UInt8[np.ndarray, "h w 3"], scale: float) -> UInt8[np.ndarray, "new_h new_w 3"]:
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
