"""Flaws of image files that Pillow passes over without a word, handing out pixels that nobody put there."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Literal

from PIL import Image, ImageChops
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

MAX_SCANS = 1000
"""A JPEG of more scans is refused: each may cost time for every pixel, and sound ones have about ten."""

_START_OF_SCAN, _RESTART_INTERVAL, _END_OF_IMAGE = 0xDA, 0xDD, b"\xff\xd9"
_MARKERS_ALONE = {0x00, 0x01, *range(0xD0, 0xDA), 0xFF}
_MORE_OF_A_SCAN = bytes(range(0xFF)) * 4

_WIDTH, _HEIGHT, _NUM_BITS, _COMPRESSION, _PHOTOMETRIC, _NUM_SAMPLES = 256, 257, 258, 259, 262, 277
_STRIP_BYTES, _TILE_WIDTH, _TILE_HEIGHT, _TILE_BYTES, _SAMPLE_FORMAT = 279, 322, 323, 325, 339
_UNCOMPRESSED, _UNSIGNED, _WHITE_IS_ZERO = 1, 1, 0

_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column and row of each pass of an interlaced PNG, and the steps to the next ones."""

_INFLATED_BYTES = 2**18

_UNTOUCHED: dict[str, int | tuple[int, ...]] = {
    **{"1": 255, "L": 245, "P": 245, "I;16": 62965, "I": 62965},
    **{"LA": (245, 10), "RGB": (245, 10, 200), "RGBA": (245, 10, 200, 77)},
}
"""By mode of a PNG, a value that few images end in, no class has, and few bits stretched to eight do not give."""


def flaw_of_file(image: ImageFile, data: bytes, max_pixels: int) -> str | None:
    """What is wrong with a file whose header was read, and whose pixels were not."""
    if isinstance(image, JpegImageFile):
        return _flaw_of_jpeg(image, data)
    if isinstance(image, PngImageFile):
        return _flaw_of_png(data)
    if isinstance(image, TiffImageFile):
        return _flaw_of_tiff(image, data, max_pixels)
    return None


def load_pixels(image: ImageFile) -> None:
    """Decode it, a PNG over a colour of ours that stays where its data end too early."""
    if isinstance(image, PngImageFile) and image.tile and image.mode in _UNTOUCHED:
        image.im = Image.new(image.mode, image.size, _UNTOUCHED[image.mode]).im
    image.load()


def flaw_of_pixels(image: ImageFile, data: bytes) -> str | None:
    """What is wrong with a file that `load_pixels` has decoded, and that was not turned since."""
    if isinstance(image, JpegImageFile) and _ends_in_grey(image) and _takes_more(image, data):
        return "the image breaks off: where its data end, the decoder filled in grey"
    if isinstance(image, PngImageFile) and _may_lack_pixels(image) and _lacks_pixels(data):
        return "the image breaks off: its data end before its last row"
    return None


def _flaw_of_jpeg(image: JpegImageFile, data: bytes) -> str | None:
    """Its end, which may be missing where zeros fill the file up, and the markers that divide what comes before."""
    interval = scan = layers = 0
    for marker, start, stop in _segments(data):
        if marker == _RESTART_INTERVAL:
            interval = int.from_bytes(data[start:stop], "big")
        elif marker == _START_OF_SCAN:
            scan, layers = stop, data[start]
    if not scan:
        return None
    if data.rfind(_END_OF_IMAGE, scan) < 0:
        return "the image is cut short: the marker that ends it is missing"
    if image.info.get("progressive") or layers < image.layers:
        return _flaw_of_scans(data, scan)
    return _flaw_of_restarts(image, data, scan, interval) if interval else None


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker and span of each segment of a JPEG, up to the one behind which its pixels begin."""
    place, marker = data.find(b"\xff", 2), 0
    while 0 <= place < len(data) - 4 and marker != _START_OF_SCAN:
        marker = data[place + 1]
        stop = place + 1
        if marker not in _MARKERS_ALONE:
            stop = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
            yield marker, place + 4, stop
        place = data.find(b"\xff", stop)


def _flaw_of_scans(data: bytes, scan: int) -> str | None:
    if data.count(b"\xff", scan) < MAX_SCANS:  # too high a count, and most of the time enough
        return None
    num_scans = 1 + data.count(b"\xff\xda", scan, data.find(_END_OF_IMAGE, scan))
    return f"it has {num_scans} scans, more than {MAX_SCANS}" if num_scans > MAX_SCANS else None


def _flaw_of_restarts(image: JpegImageFile, data: bytes, scan: int, interval: int) -> str | None:
    """Where one of those markers is lost, whatever comes behind it lands in the wrong place."""
    cell_width, cell_height = (8 * max(layer[axis] for layer in image.layer) for axis in (1, 2))
    num_cells = -(-image.width // cell_width) * -(-image.height // cell_height)
    expected = -(-num_cells // interval) - 1
    end = data.find(_END_OF_IMAGE, scan)
    found = data.count(b"\xff", scan, end) - data.count(b"\xff\x00", scan, end)
    if found < expected:
        return f"the image is damaged: {expected - found} of its {expected} restart markers are missing"
    return None


def _ends_in_grey(image: JpegImageFile) -> bool:
    """Whether its last pixel is what the decoder fills in where a scan has no more data."""
    corner = image.getpixel((image.width - 1, image.height - 1))
    return all(value in (127, 128) for value in (corner if isinstance(corner, tuple) else (corner,)))


def _takes_more(image: JpegImageFile, data: bytes) -> bool:
    """Whether the decoder was still waiting when a JPEG's data ended: more of them would change the pixels."""
    scan = max(stop for _, _, stop in _segments(data))
    end = data.find(_END_OF_IMAGE, scan)
    with Image.open(io.BytesIO(data[:end] + _MORE_OF_A_SCAN + data[end:]), formats=("JPEG",)) as longer:
        return ImageChops.difference(image, longer).getbbox() is not None


def _flaw_of_png(data: bytes) -> str | None:
    """Its end, behind which nothing counts, and checksums of what holds pixels. Pillow checks what comes before."""
    view = memoryview(data)
    for kind, start, stop in _chunks(data):
        if kind == b"IEND":
            return None
        checksum = int.from_bytes(data[stop : stop + 4], "big")
        if kind == b"IDAT" and stop + 4 <= len(data) and zlib.crc32(view[start - 4 : stop]) != checksum:
            return "the image is damaged: its data do not have the checksum that stands beside them"
    return "the image is cut short: the chunk that ends it is missing"


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind and span of each chunk of a PNG; the last span may reach beyond the file."""
    place = 8
    while place + 8 <= len(data):
        stop = place + 8 + int.from_bytes(data[place : place + 4], "big")
        yield data[place + 4 : place + 8], place + 8, stop
        place = stop + 4


def _may_lack_pixels(image: PngImageFile) -> bool:
    """Whether its last pixel is what was there before it was decoded; where rows are interlaced, any may be the last.

    Data are inflated a second time to be sure, which would take half as long again if it were done for every file.
    """
    if image.info.get("interlace") or image.mode not in _UNTOUCHED:
        return True
    return image.getpixel((image.width - 1, image.height - 1)) == _UNTOUCHED[image.mode]


def _lacks_pixels(data: bytes) -> bool:
    """Whether the data of a PNG inflate to fewer bytes than its header says; no more than a part of them at a time."""
    chunks = list(_chunks(data))
    header = next(start for kind, start, _ in chunks if kind == b"IHDR")
    due = _num_png_bytes(data, header)
    inflater, view = zlib.decompressobj(), memoryview(data)
    for kind, start, stop in chunks:
        if kind != b"IDAT":
            continue
        waiting: bytes | memoryview = view[start:stop]
        while due > 0 and not inflater.eof:
            try:
                found = len(inflater.decompress(waiting, _INFLATED_BYTES))
            except zlib.error:
                return True
            waiting = inflater.unconsumed_tail
            due -= found
            if found < _INFLATED_BYTES and not waiting:
                break
    return due > 0


def _num_png_bytes(data: bytes, header: int) -> int:
    """How many bytes the rows of a PNG have before they are deflated: each is a byte for its filter, and its pixels."""
    width, height, num_bits, colours, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, header)
    per_pixel = num_bits * _PNG_CHANNELS[colours]
    due = 0
    for left, top, across, down in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-max(0, width - left) // across), -(-max(0, height - top) // down)
        due += rows * (1 + -(-columns * per_pixel // 8)) if columns else 0
    return due


def _flaw_of_tiff(image: TiffImageFile, data: bytes, max_pixels: int) -> str | None:
    """Numbers that Pillow takes for others, strips that end too early, and tiles of a size that nobody asked for."""
    tags = image.tag_v2
    if _end_of_directory(data, tags.offset) > len(data):
        return "the image is cut short: what describes it goes on behind its end"
    width, height = tags[_WIDTH], tags[_HEIGHT]
    tile_width, tile_height = tags.get(_TILE_WIDTH), tags.get(_TILE_HEIGHT)
    if isinstance(tile_width, int) and isinstance(tile_height, int) and tile_width * tile_height > max_pixels:
        return f"a tile of it has {tile_height} x {tile_width} pixels, more than {max_pixels}"
    if set(tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))) != {_UNSIGNED}:
        return "its pixels are signed or floating-point numbers, and nothing says in which range they are"
    num_bits = tags.get(_NUM_BITS, (1,))
    if image.mode.startswith("I;16") and (num_bits != (16,) or tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO):
        return "its grey levels have less than 16 bits, or 0 stands for white; save it with 16 bits and 0 for black"
    stored = tags.get(_STRIP_BYTES, tags.get(_TILE_BYTES))
    if tags.get(_COMPRESSION, _UNCOMPRESSED) == _UNCOMPRESSED and stored is not None:
        per_pixel = sum(num_bits) if len(num_bits) > 1 else num_bits[0] * tags.get(_NUM_SAMPLES, 1)
        if sum(stored) < height * -(-width * per_pixel // 8):
            return f"its strips hold {sum(stored)} bytes, too few for {height} x {width} pixels of {per_pixel} bits"
    return None


def _end_of_directory(data: bytes, place: int) -> int:
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
    count, entry, offset = (8, 20, 8) if 43 in data[2:4] else (2, 12, 4)  # 43 marks a BigTIFF
    return place + count + entry * int.from_bytes(data[place : place + count], order) + offset
