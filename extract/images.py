"""Image files to arrays: decoding, with every refusal named."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from cache_schema.masks import Size
from extract.image_flaws import flaw_of_file, flaw_of_pixels, load_pixels

MAX_IMAGE_PIXELS = 150_000_000
"""Larger images are refused before their pixels are decoded."""

MAX_FILE_BYTES = 2**30
"""Larger files are refused before they are read."""

Image.init()
IMAGE_FORMATS = tuple(form for form in ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF") if form in Image.OPEN)
"""Formats that are decoded, as far as Pillow was built with them. It knows more, some of which start other programs."""

_EXIF_ORIENTATION, _TIFF_WIDTH, _TIFF_HEIGHT = 0x0112, 256, 257
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LYING = (5, 6, 7, 8)
_EXIF_OF_PNG = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
"""Where a PNG's orientation may be. Some of it may stand behind the pixels, so Pillow decodes these to look for it."""
_SPECIAL_FILES = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
_TOO_MANY = f"more than {MAX_IMAGE_PIXELS}"
_NO_HEADER = f"nothing in it reads as the header of {', '.join(IMAGE_FORMATS[:-1])} or {IMAGE_FORMATS[-1]}"
_REMARKS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
_hushing = threading.Lock()

logging.getLogger("PIL").addHandler(logging.NullHandler())  # where nobody set up logging, it would print errors


class UndecodableImageError(ValueError):
    """The bytes of an image file that cannot be used, with the reason: a ledger entry in the making."""


class UnreadableFileError(OSError):
    """A file that is not there, or not to be had at the moment. Nothing is said of its bytes."""


def read_bytes(path: Path) -> tuple[bytes, str]:
    """A regular file's bytes and their SHA-256. Anything else could make whoever reads it wait for ever.

    Raises:
        UnreadableFileError: the file cannot be read.
        UndecodableImageError: it has more than `MAX_FILE_BYTES`.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            regular = stat.S_ISREG(status.st_mode)
            data = file.read(status.st_size) if regular and status.st_size <= MAX_FILE_BYTES else b""
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise UnreadableFileError(f"the file cannot be read ({reason})") from error
    if not regular:
        kind = _SPECIAL_FILES.get(stat.S_IFMT(status.st_mode), "something else")
        raise UnreadableFileError(f"the file cannot be read (it is {kind}, not a regular file)")
    if status.st_size > MAX_FILE_BYTES:
        raise UndecodableImageError(f"the file has {status.st_size} bytes; no more than {MAX_FILE_BYTES} are read")
    return data, hashlib.sha256(data).hexdigest()


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB of an image file's bytes, turned upright as its EXIF orientation says; to be read only.

    Of an animation it is the first frame. Transparency is dropped, colour profiles are not applied, 16 bits are brought
    down to 8, EXIF that cannot be made out counts for nothing. Safe to call from several threads at once.

    Raises:
        UndecodableImageError: not an image, damaged or cut short as far as that can be told, larger than
            `MAX_IMAGE_PIXELS`, or of pixels whose range nothing says.
    """
    with _opened(data) as image:
        _refuse(flaw_of_file(image, data, MAX_IMAGE_PIXELS))
        load_pixels(image)
        _refuse(flaw_of_pixels(image, data))
        return np.asarray(_to_rgb(_turn_upright(image)))


@dataclass(frozen=True)
class ImageHeader:
    """What the header alone says of what `decode_image` would give.

    Args:
        size: (H, W).
        is_turned: whether what is stored is turned or mirrored, so that masks of stored pixels lie on other ones.
    """

    size: Size
    is_turned: bool


def read_image_header(data: bytes) -> ImageHeader:
    """The header of an image file's bytes.

    Raises:
        UndecodableImageError: not an image, or larger than `MAX_IMAGE_PIXELS`.
    """
    with _opened(data) as image:
        width, height = _stored_size(image)
        orientation = _orientation_in_header(image, data)
    return ImageHeader((width, height) if orientation in _LYING else (height, width), orientation in _UPRIGHT)


def image_size(data: bytes) -> Size:
    """(H, W) as `read_image_header` says, with its errors."""
    return read_image_header(data).size


@contextmanager
def _opened(data: bytes) -> Iterator[ImageFile]:
    """An image file whose header was read; whatever goes wrong inside is named."""
    if not data:
        raise UndecodableImageError("the file is empty")
    _hush_pillow()
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise UndecodableImageError(f"it has {image.height} x {image.width} pixels, {_TOO_MANY}")
            yield image
    except (UndecodableImageError, MemoryError, Warning):  # the latter two are no fault of the bytes
        raise
    except UnidentifiedImageError as error:
        raise UndecodableImageError(f"not an image file: {_NO_HEADER}") from error
    except Image.DecompressionBombError as error:
        raise UndecodableImageError(f"its pixels are {_TOO_MANY}") from error
    except Exception as error:
        raise UndecodableImageError(f"the image cannot be decoded ({_message(error)})") from error


def _hush_pillow() -> None:
    """Ignore Pillow's remarks on broken metadata and on sizes that `decode_image` judges by itself.

    `warnings.catch_warnings` in several threads restores what another thread saw. A filter that is added and stays can
    do no such harm; it is looked for each time, for whoever restores the filters removes it.
    """
    if _REMARKS not in warnings.filters:
        with _hushing:
            if _REMARKS not in warnings.filters:
                warnings.filterwarnings("ignore", module=r"PIL\.")


def _refuse(flaw: str | None) -> None:
    if flaw is not None:
        raise UndecodableImageError(flaw)


def _message(error: Exception) -> str:
    said = str(error)
    known = isinstance(error, OSError | ValueError | SyntaxError | EOFError | RuntimeError)
    return said if said and known else f"{type(error).__name__}: {said}".removesuffix(": ")


def _turn_upright(image: Image.Image) -> Image.Image:
    # Pillow's own way of doing this writes the EXIF anew, and fails on tags that it cannot write. A TIFF is upright as
    # soon as it is loaded, and says so.
    turn = _UPRIGHT.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _stored_size(image: ImageFile) -> tuple[int, int]:
    """(width, height) before anything is turned. Of a TIFF that lies on its side Pillow names the sides of the turned
    image, but only if a tag of the file's own, and not its XMP, says so.
    """
    if isinstance(image, TiffImageFile):
        return image.tag_v2[_TIFF_WIDTH], image.tag_v2[_TIFF_HEIGHT]
    return image.size


def _orientation_in_header(image: ImageFile, data: bytes) -> int:
    if isinstance(image, PngImageFile) and not any(mark in data for mark in _EXIF_OF_PNG):
        return 1
    return _orientation(image)


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(_EXIF_ORIENTATION, 1)
    except (MemoryError, Warning):
        raise
    except Exception:  # noqa: BLE001  any error at all; a viewer would show the image as it lies
        return 1
    return found if isinstance(found, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise UndecodableImageError("its pixels are not of 8 or 16 bits, and nothing says in which range they are")
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits at 255
        image = Image.fromarray(np.rint(np.asarray(image, np.float32) / 257).astype(np.uint8))
    elif image.mode == "La":  # grey that was multiplied by its opacity; Pillow converts it by this way only
        image = image.convert("LA")
    return image if image.mode == "RGB" else image.convert("RGB")
