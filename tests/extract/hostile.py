"""Makers of image files, bit by bit where Pillow would not write what a test needs."""

from __future__ import annotations

import io
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

HEIGHT, WIDTH = 12, 20
_rows, _columns = np.mgrid[:HEIGHT, :WIDTH]

PICTURE: NDArray[np.uint8] = np.stack([_columns * 12, _rows * 20, 255 - _columns * 6 - _rows * 10], -1).astype(np.uint8)
"""(12, 20, 3): smooth, so that JPEG keeps it, and different whichever way it is turned."""

GREY: NDArray[np.uint8] = PICTURE[..., 0].copy()

STRIPES = (_columns // 2 + _rows) % 2
"""(12, 20), 0 or 1."""

PALETTE: NDArray[np.uint8] = np.array([[200, 30, 10], [20, 180, 40], [5, 60, 220], [250, 240, 3]], np.uint8)
NOISE: NDArray[np.uint8] = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)

INDICES: NDArray[np.uint8] = ((_columns + 2 * _rows) % 4).astype(np.uint8)
"""(12, 20), 0 to 3."""

ORIENTATION = 274
UPRIGHT: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].transpose(1, 0, 2),
    8: lambda image: np.rot90(image),
}
"""What an EXIF orientation asks for."""


@dataclass(frozen=True)
class Right:
    """A file of which these pixels are to come, each channel within `tolerance`."""

    data: bytes
    pixels: NDArray[np.uint8]
    tolerance: int = 0


@dataclass(frozen=True)
class Refused:
    """A file that is to stand in the ledger, with a reason in which this regular expression is found."""

    data: bytes
    reason: str


def grey(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Three equal channels."""
    return np.stack([values] * 3, -1).astype(np.uint8)


def encode(pixels: NDArray[Any] | Image.Image, form: str, **options: Any) -> bytes:
    """What Pillow writes."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def decoded_by_pillow(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[ORIENTATION] = orientation
    return made


ZEROS = zlib.compress(bytes(2**25))
"""32 MiB of nothing in 32 KiB."""


# PNG


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_chunks(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, data) for kind, data in chunks)


def png_header(width: int, height: int, bits: int = 8, colour: int = 2, interlaced: int = 0) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)


def make_png(
    pixels: NDArray[Any],
    colour: int,
    *,
    bits: int = 8,
    interlaced: bool = False,
    before: Sequence[tuple[bytes, bytes]] = (),
    after: Sequence[tuple[bytes, bytes]] = (),
) -> bytes:
    """`pixels`: (H, W) or (H, W, samples), in as many bits as `bits` says. `before` and `after` are other chunks."""
    height, width = pixels.shape[:2]
    parts = [pixels]
    if interlaced:
        steps = ((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1))
        parts = [pixels[top::down, left::right] for top, down, left, right in steps]
    body = b"".join(b"\0" + packed(row, bits) for part in parts if part.size for row in part)
    header = png_header(width, height, bits, colour, int(interlaced))
    return png_of_chunks(header, *before, (b"IDAT", zlib.compress(body)), *after, (b"IEND", b""))


def packed(row: NDArray[Any], bits: int) -> bytes:
    """A row's samples, the first in the highest bits."""
    if bits == 16:
        return row.astype(">u2").tobytes()
    places = np.arange(bits - 1, -1, -1)
    return np.packbits((row.reshape(-1, 1).astype(np.uint8) >> places & 1).reshape(-1).astype(np.uint8)).tobytes()


# JPEG


def segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload


def with_segments(jpeg: bytes, *segments: bytes) -> bytes:
    """Further segments at a JPEG's beginning."""
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def segments_of(jpeg: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and stop of each segment up to the first scan's header."""
    start, marker = 2, 0
    while marker != 0xDA:
        marker = jpeg[start + 1]
        stop = start + 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big")
        yield marker, start, stop
        start = stop


def without_segments(jpeg: bytes, marker: int) -> bytes:
    for found, start, stop in reversed(list(segments_of(jpeg))):
        if found == marker:
            jpeg = jpeg[:start] + jpeg[stop:]
    return jpeg


def changed(data: bytes, place: int, new: bytes) -> bytes:
    """The same bytes but for those at a place."""
    return data[:place] + new + data[place + len(new) :]


def place_of(jpeg: bytes, marker: int) -> int:
    """Where the payload of a JPEG's segment begins."""
    return next(start for found, start, _ in segments_of(jpeg) if found == marker) + 4


# TIFF, and EXIF, which is one without pixels

SHORT, LONG, RATIONAL = 3, 4, 5
_FORMATS = {1: "B", 2: "B", SHORT: "H", LONG: "I", RATIONAL: "I", 7: "B", 16: "Q"}


def make_ifd(
    entries: Mapping[int, tuple[int, Sequence[int]]], place: int, order: str = "<", following: int = 0
) -> bytes:
    """A directory that stands at `place` of a TIFF: tag -> (type, values); long values stand behind it."""
    head = struct.pack(order + "H", len(entries))
    tail = b""
    for tag, (kind, values) in sorted(entries.items()):
        value = struct.pack(f"{order}{len(values)}{_FORMATS[kind]}", *values)
        if len(value) > 4:
            at = place + 2 + 12 * len(entries) + 4 + len(tail)
            tail += value
            value = struct.pack(order + "I", at)
        num_values = len(values) // 2 if kind == RATIONAL else len(values)
        head += struct.pack(order + "HHI", tag, kind, num_values) + value.ljust(4, b"\0")
    return head + struct.pack(order + "I", following) + tail


def tiff_head(order: str, place: int) -> bytes:
    return (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, place)


def exif_block(entries: Mapping[int, tuple[int, Sequence[int]]], order: str = "<", following: int = 0) -> bytes:
    """The payload of a JPEG's EXIF segment."""
    return b"Exif\0\0" + tiff_head(order, 8) + make_ifd(entries, 8, order, following)


def make_tiff(
    strips: Sequence[bytes],
    *,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    bits: Sequence[int] = (8,),
    photometric: int = 1,
    compression: int = 1,
    order: str = "<",
    following: int = 0,
    **tags: tuple[int, Sequence[int]] | None,
) -> bytes:
    """A TIFF of strips as they are to be stored. `tags`, such as t273, take the place of its own; None drops one."""
    data = bytearray(8)
    places = []
    for strip in strips:
        places.append(len(data))
        data += strip
    entries: dict[int, tuple[int, Sequence[int]]] = {
        256: (LONG, (size[1],)),
        257: (LONG, (size[0],)),
        258: (SHORT, tuple(bits)),
        259: (SHORT, (compression,)),
        262: (SHORT, (photometric,)),
        273: (LONG, tuple(places)),
        277: (SHORT, (len(bits),)),
        278: (LONG, (-(-size[0] // len(strips)),)),
        279: (LONG, tuple(map(len, strips))),
    }
    for name, entry in tags.items():
        if entry is None:
            del entries[int(name[1:])]
        else:
            entries[int(name[1:])] = entry
    data[:8] = tiff_head(order, len(data))
    return bytes(data) + make_ifd(entries, len(data), order, following)


# BMP and GIF


def make_bmp(
    body: bytes,
    bits: int,
    *,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    compression: int = 0,
    palette: NDArray[np.uint8] | None = None,
    masks: Sequence[int] = (),
) -> bytes:
    """`size` is (H, W), H < 0 for one whose first row is on top; `body` the rows as they are stored."""
    colours = b"" if palette is None else b"".join(bytes([*colour[::-1], 0]) for colour in palette)
    num_colours = 0 if palette is None else len(palette)
    extra = struct.pack(f"<{len(masks)}I", *masks) + colours
    start = 54 + len(extra)
    head = struct.pack("<2sIHHI", b"BM", start + len(body), 0, 0, start)
    info = struct.pack("<IiiHHIIiiII", 40, size[1], size[0], 1, bits, compression, len(body), 0, 0, num_colours, 0)
    return head + info + extra + body


def bmp_rows(pixels: NDArray[Any], bits: int) -> bytes:
    """Rows from the bottom up, each filled up to four bytes."""
    rows = [pixels_row.tobytes() if bits >= 8 else packed(pixels_row, bits) for pixels_row in pixels[::-1]]
    return b"".join(row.ljust(-(-len(row) // 4) * 4, b"\0") for row in rows)


def make_gif(
    codes: Sequence[int], *, screen: tuple[int, int], frame: tuple[int, int], at: tuple[int, int] = (0, 0)
) -> bytes:
    """A GIF of `PALETTE`; `codes` are LZW codes of three bits (4 clears, 5 ends), sizes and places (H, W)."""
    number = sum(code << 3 * place for place, code in enumerate(codes))
    body = number.to_bytes(-(-3 * len(codes) // 8), "little")
    head = b"GIF89a" + struct.pack("<HHBBB", screen[1], screen[0], 0x81, 0, 0) + PALETTE.tobytes()
    descriptor = b"," + struct.pack("<HHHHB", at[1], at[0], frame[1], frame[0], 0)
    return head + descriptor + bytes([2, len(body)]) + body + b"\0;"


def gif_codes(indices: NDArray[np.uint8]) -> list[int]:
    """Each pixel by itself, cleared before the codes would need a fourth bit."""
    codes = []
    for place, index in enumerate(indices.reshape(-1).tolist()):
        codes += [4, index] if place % 2 == 0 else [index]
    return [*codes, 5]


# What is no file


@contextmanager
def pipe(path: Path) -> Iterator[None]:
    """A pipe that nobody writes to. Whoever waits for it all the same is woken after a while, and found out."""
    waited = threading.Event()

    def wake() -> None:
        waited.set()
        os.close(os.open(path, os.O_RDWR))

    os.mkfifo(path)
    alarm = threading.Timer(20, wake)
    alarm.start()
    try:
        yield
    finally:
        alarm.cancel()
    assert not waited.is_set(), "somebody waited for the pipe"
