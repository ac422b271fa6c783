"""Masks in PNG files: which pixels are target, and which files leave that open and are refused."""

from __future__ import annotations

import io
import struct

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ImageFile import ImageFile

from cache_schema.masks import Size
from extract.images import decode_image

_HEADER = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_OPAQUE = 255


def read_mask(data: bytes, size: Size) -> NDArray[np.bool_]:
    """(H, W) the pixels of a PNG that are not black. Nothing is decoded before its size is known to be `size`.

    Raises:
        ValueError: it is no PNG, damaged, of another size than (H, W), or it could be read in two ways: it has
            transparent pixels, 16 bits, or a palette in which the first colour is not the only black one.
    """
    if not data.startswith(_HEADER) or len(data) < len(_HEADER) + 9:
        raise ValueError("it is no PNG file; save masks as PNG, which keeps every pixel as it is")
    width, height, num_bits = struct.unpack_from(">IIB", data, len(_HEADER))
    if (height, width) not in (size, size[::-1]):  # EXIF may turn it, as it turns images
        raise ValueError(_other_size((height, width), size))
    if num_bits > 8:
        raise ValueError("it has 16 bits for each value, as no mask needs; save it as 8-bit grey")
    pixels = decode_image(data)
    if pixels.shape[:2] != size:
        raise ValueError(f"{_other_size((height, width), size)}. Is one of them turned by its EXIF orientation?")
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        _refuse_ambiguous(image)
    red, green, blue = np.moveaxis(pixels, 2, 0)  # ten times as fast as any(axis=2)
    return np.asarray(red | green | blue, np.bool_)


def _refuse_ambiguous(image: ImageFile) -> None:
    if "transparency" in image.info or ("A" in image.getbands() and _lowest_alpha(image) < _OPAQUE):
        raise ValueError(
            "it has transparent pixels, and nothing says whether they are target; save it as 8-bit grey, 0 for "
            "whatever is not target"
        )
    if image.mode == "P":
        palette = np.zeros((256, 3), np.uint8)
        colours = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
        palette[: len(colours)] = colours
        used = np.unique(np.asarray(image))
        if any(palette[index].any() == (index == 0) for index in used.tolist()):
            raise ValueError(
                "its palette has black elsewhere than in the first place, so that colours and numbers disagree on "
                "what is target; save it as 8-bit grey, 0 for whatever is not target"
            )


def _lowest_alpha(image: Image.Image) -> int:
    lowest, _ = image.getchannel("A").getextrema()
    assert isinstance(lowest, int)
    return lowest


def _other_size(found: Size, size: Size) -> str:
    return f"it has {found[0]} x {found[1]} pixels (height x width), its image {size[0]} x {size[1]}"
