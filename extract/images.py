"""Image files to arrays: decoding with every refusal named, and the preprocessing that encoders share."""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cache_schema.masks import Size

MAX_IMAGE_PIXELS = 150_000_000
"""Larger images are refused before their pixels are decoded."""

_PILLOW_ERRORS = (
    *(OSError, ValueError, SyntaxError, EOFError, RuntimeError, Image.DecompressionBombError),
    *(TypeError, AttributeError, struct.error),  # EXIF tags of a type that Pillow does not expect
)
Image.init()
IMAGE_FORMATS = tuple({"JPEG", "MPO", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF"} & Image.OPEN.keys())
"""Formats that are decoded, as far as Pillow was built with them. It knows more, some of which start other programs."""

BILINEAR, BICUBIC = int(Image.Resampling.BILINEAR), int(Image.Resampling.BICUBIC)
RESAMPLING = {BILINEAR: "bilinear", BICUBIC: "bicubic"}
"""The filters an encoder may ask for: Pillow's number, as preprocessor_config.json has it, and its name."""

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UndecodableImageError(ValueError):
    """The bytes of an image file that cannot be used, with the reason: a ledger entry in the making."""


class UnreadableFileError(OSError):
    """A file that is not there, or not to be had at the moment. Nothing is said of its bytes."""


def read_bytes(path: Path) -> tuple[bytes, str]:
    """A file's bytes and their SHA-256.

    Raises:
        UnreadableFileError: the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableFileError(f"the file cannot be read ({error.strerror})") from error
    return data, hashlib.sha256(data).hexdigest()


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB of an image file's bytes, turned upright as its EXIF orientation says.

    Raises:
        UndecodableImageError: not an image, cut short, or larger than `MAX_IMAGE_PIXELS`.
    """
    if not data:
        raise UndecodableImageError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        with opened:
            if opened.width * opened.height > MAX_IMAGE_PIXELS:
                raise UndecodableImageError(f"{opened.width} x {opened.height} pixels are more than {MAX_IMAGE_PIXELS}")
            return np.asarray(_to_rgb(_turn_upright(opened)))
    except UnidentifiedImageError as error:
        raise UndecodableImageError("not an image file") from error
    except _PILLOW_ERRORS as error:
        if isinstance(error, UndecodableImageError):
            raise
        raise UndecodableImageError(f"the image cannot be decoded ({error})") from error


def _turn_upright(image: Image.Image) -> Image.Image:
    # Pillow's own way of doing this writes the EXIF anew, and fails on tags that it cannot write.
    turn = _UPRIGHT.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits at 255
        image = Image.fromarray(np.rint(np.asarray(image, np.float32) / 257).astype(np.uint8))
    elif "transparency" in image.info:  # a palette with a see-through colour; Pillow warns of a direct conversion
        image = image.convert("RGBA")
    elif image.mode in ("I", "F"):
        raise UndecodableImageError("its pixels have 32 bits, in a range that nothing says; save it with 8 or 16")
    return image.convert("RGB")


@dataclass(frozen=True)
class Preprocessing:
    """From an upright RGB image to an encoder's input: squash to `input_size`, scale to [0, 1], normalise.

    Squashing keeps the whole image in view: cell (r, c) of a (gh, gw) grid covers the same fraction of the image
    whatever the aspect ratio was, so a mask comes back by resizing alone. Resampling is Pillow's, with antialiasing.
    """

    input_size: Size
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: str

    def to_dict(self) -> dict[str, Any]:
        """What of it belongs to an encoder's identity."""
        return {**asdict(self), "aspect": "squash", "resize": "pillow", "orientation": "exif"}

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(H, W, 3) uint8 -> (3, h, w) float32 at `input_size`."""
        height, width = self.input_size
        resized = Image.fromarray(image).resize((width, height), Image.Resampling[self.resample.upper()])
        pixels = np.asarray(resized, np.float32) / np.float32(255)
        normalised = (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(normalised.transpose(2, 0, 1))
