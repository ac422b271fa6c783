"""Masks made visible: overlays with a crisp outline, and images as bytes that a page or a file can hold."""

from __future__ import annotations

import base64
import io
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageFilter

Colour = tuple[int, int, int]
"""Red, green and blue, each 0 to 255."""

TRUTH_COLOUR: Colour = (0, 114, 200)
PREDICTED_COLOUR: Colour = (255, 140, 0)

_OUTLINES_PER_SIDE = 200
_JPEG_QUALITY = 82


class Triptych(NamedTuple):
    """The three panels of one sample, each (H, W, 3) uint8: the image, the truth on it, the prediction on it."""

    image: UInt8[np.ndarray, "h w 3"]
    truth: UInt8[np.ndarray, "h w 3"]
    predicted: UInt8[np.ndarray, "h w 3"]


def overlay(
    image: UInt8[np.ndarray, "h w 3"],
    mask: Bool[np.ndarray, "h w"],
    colour: Colour = PREDICTED_COLOUR,
    alpha: float = 0.4,
) -> UInt8[np.ndarray, "h w 3"]:
    """Tint the mask's pixels with `colour` at opacity `alpha` and draw a two-tone outline along its edge.

    The inner line has the colour, the outer one is white around a dark colour and near-black around a light one, so
    the edge shows on any background. The image is left as it is.

    Raises:
        ValueError: the mask has another size than the image.
    """
    if image.shape[:2] != mask.shape:
        raise ValueError(f"the image is {image.shape[:2]} and the mask {mask.shape}: resize one to the other")
    picture = image.astype(np.float32)
    picture[mask] += alpha * (np.array(colour, np.float32) - picture[mask])
    width = max(1, round(max(mask.shape) / _OUTLINES_PER_SIDE))
    luma = float(np.dot(colour, (0.299, 0.587, 0.114)))
    picture[_grow(mask, width) & ~mask] = 255 if luma < 128 else 20
    picture[mask & _grow(~mask, width)] = colour
    return np.rint(picture).astype(np.uint8)


def triptych(
    image: UInt8[np.ndarray, "h w 3"],
    truth: Bool[np.ndarray, "h w"],
    predicted: Bool[np.ndarray, "h w"],
    longest_side: int,
) -> Triptych:
    """Panels of one sample, scaled so that the longer side has `longest_side` pixels.

    Scaling comes first, so outlines are equally crisp whatever the size of the image.
    """
    scale = longest_side / max(truth.shape)
    height, width = (max(1, round(side * scale)) for side in truth.shape)
    small = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
    return Triptych(
        image=small,
        truth=overlay(small, resize_mask(truth, (height, width)), TRUTH_COLOUR),
        predicted=overlay(small, resize_mask(predicted, (height, width)), PREDICTED_COLOUR),
    )


def resize_mask(mask: Bool[np.ndarray, "h w"], size: tuple[int, int]) -> Bool[np.ndarray, "new_h new_w"]:
    """The pixels of another size (H, W) of which a mask covers half; or any part, where a small mask would vanish."""
    if mask.shape == size:
        return mask
    height, width = size
    coverage = np.asarray(Image.fromarray(mask.astype(np.float32)).resize((width, height), Image.Resampling.BOX))
    half = coverage >= 0.5
    # A mask smaller than one new pixel would vanish, and the picture would say that nothing was there.
    return half if half.any() else coverage > 0


def encode_png(array: UInt8[np.ndarray, "h w 3"] | Bool[np.ndarray, "h w"]) -> bytes:
    """A PNG file of an (H, W, 3) uint8 image, or of an (H, W) mask as black and white."""
    return _encode(array, "PNG")  # optimize=True takes ten times as long and saves less than a tenth of the bytes


def encode_jpeg(array: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """A JPEG file of an (H, W, 3) uint8 image."""
    return _encode(array, "JPEG", quality=_JPEG_QUALITY, optimize=True)


def data_uri(encoded: bytes, kind: Literal["png", "jpeg"]) -> str:
    """The address under which a page holds an encoded image in itself.

    >>> data_uri(b"GIF", "png")
    'data:image/png;base64,R0lG'
    """
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode('ascii')}"


def _encode(array: np.ndarray, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array.astype(np.uint8) * 255 if array.dtype == np.bool_ else array).save(buffer, kind, **options)
    return buffer.getvalue()


def _grow(mask: Bool[np.ndarray, "h w"], radius_px: int) -> Bool[np.ndarray, "h w"]:
    grown = Image.fromarray(mask.astype(np.uint8)).filter(ImageFilter.MaxFilter(2 * radius_px + 1))
    return np.asarray(grown).astype(np.bool_)
