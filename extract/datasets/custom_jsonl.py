"""`samples.jsonl`: one JSON object a line, for whoever writes down their own data."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from cache_schema.errors import unknown_name
from cache_schema.masks import Size, empty_mask, encode_mask, is_empty, union_of_segmentations
from extract.datasets.faults import AnnotationError, Fields, FileFaults, is_text, type_name
from extract.datasets.json_files import refuse_constant
from extract.datasets.mask_files import read_mask
from extract.datasets.places import Folder, find_image_dir
from extract.datasets.records import Dataset, SampleRecord, Source
from extract.datasets.references import check_tags
from extract.images import UndecodableImageError, UnreadableFileError, image_size, read_bytes

SAMPLES = "samples.jsonl"

MAX_LINE_BYTES = 2**24
"""Longer lines, ends included, are refused unread; run lengths of the largest images are a fraction of it."""

DEFAULT_SPLIT = "train"

_NO_TARGET = "no_target"
_TARGETS = ("mask", "rle", "polygons", "box", _NO_TARGET)
_KEYS = {"image", "prompt", "prompts", *_TARGETS, "split", "tags", "id", "image_id"}
_UTF8_MARK = b"\xef\xbb\xbf"
_NO_TEXTS = {
    b"PK\x03\x04": "is a zip archive, not lines of text. Unpack it first.",
    b"\x1f\x8b": "is a gzip file, not lines of text. Unpack it first.",
    b"\xff\xfe": "is written in UTF-16. Save it as UTF-8.",
    b"\xfe\xff": "is written in UTF-16. Save it as UTF-8.",
}
MARGIN_PX = 1.0
"""How far a box or a polygon may reach out of its image, which rounding explains; it is cut off there."""


def read_samples_jsonl(source: Source) -> Dataset:
    """Open a folder with `samples.jsonl`; docs/your-own-data.md says what a line holds.

    Images lie relative to the folder, or to the image folder that was named; masks always to the former. A line with
    one `prompt` gives a sample of the line's id, one with `prompts` as many, named `id:0`, `id:1` and so on.

    Raises:
        UsageError: the image folder that was named is missing.
        AnnotationError: the file is no text in UTF-8.
    """
    path = source.root / SAMPLES
    image_dir = find_image_dir(source, (".",))
    with path.open("rb") as file:
        start = file.read(4)
    for magic, what in _NO_TEXTS.items():
        if start.startswith(magic):
            raise AnnotationError(f"{path} {what}")
    return Dataset("custom", image_dir, (path,), _read_samples(path, image_dir, source.faults.of(path)))


def take_texts(item: Fields, one: str, many: str) -> list[str]:
    """The text of the key `one`, or the texts of the list `many`, blanks evened out; what is no text is a fault."""
    if not item.holds(many):
        text = item.take_text(one)
        return [text] if text else []
    if item.holds(one):
        item.fault(f"it has {one!r} and {many!r}; give one of them")
    texts, found = item.take(many, list), []
    if item.holds(many, list) and not texts:
        item.fault(f"{many!r} is empty")
    for position, text in enumerate(texts):
        if type(text) is not str:
            item.fault(f"{many!r} item {position} must be a text, is {type_name(text)}")
        elif not is_text(text):
            item.fault(f"{many!r} item {position} is not valid UTF-8")
        elif not text.split():
            item.fault(f"{many!r} item {position} is empty")
        else:
            found.append(" ".join(text.split()))
    return found


def _read_samples(path: Path, image_dir: Path, faults: FileFaults) -> Iterator[SampleRecord]:
    reader = _LineReader(Folder(path.parent), Folder(image_dir))
    for number, line in _lines(path, faults):
        try:
            content = _parse(line)
        except ValueError as fault:
            faults.add(f"line {number}", str(fault))
        else:
            item = Fields(content, f"line {number}", faults)
            if item.sound:
                yield from reader.read(number, item)


def _lines(path: Path, faults: FileFaults) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1; never more than one of them in memory."""
    with path.open("rb") as file:
        for number in count(1):
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
                faults.add(f"line {number}", f"it is longer than {MAX_LINE_BYTES} bytes; keep the mask in a PNG file")
                continue
            if number == 1:
                line = line.removeprefix(_UTF8_MARK)
            if line.strip():
                yield number, line.rstrip(b"\r\n")


def _parse(line: bytes) -> Any:
    """The JSON value of a line; ValueError says what is wrong with it."""
    try:
        return json.loads(line.decode(), parse_constant=refuse_constant, object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as fault:
        raise ValueError(f"its byte {fault.start + 1} is not valid UTF-8; save the file as UTF-8") from fault
    except json.JSONDecodeError as fault:
        raise ValueError(
            f"it is not valid JSON: {fault.msg} at column {fault.colno}; each line is one JSON object"
        ) from fault
    except RecursionError as fault:
        raise ValueError("it is nested too deeply; each line is one plain JSON object") from fault


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {twice!r} is there twice; give it once")
    return content


class _LineReader:
    """Reads line after line; what it remembers is an index of ids and of image sizes.

    Args:
        masks: the folder that mask files are relative to.
        images: the folder that images are relative to.
    """

    def __init__(self, masks: Folder, images: Folder) -> None:
        self._masks = masks
        self._images = images
        self._sizes: dict[str, Size | str] = {}
        self._line_of_id: dict[str, int] = {}
        self._path_of_image: dict[str, str] = {}

    def read(self, number: int, item: Fields) -> Iterator[SampleRecord]:
        """The samples of one line; none, and every fault of it, if it has any."""
        for key in item.keys:
            if key not in _KEYS:
                item.fault(str(unknown_name("key", key, _KEYS)).removesuffix("."))
        path = _take_path(item, "image")
        size = self._size_of(item, path) if path else None
        prompts = take_texts(item, "prompt", "prompts")
        target = self._read_target(item, size)
        split = item.take_text("split") if item.holds("split") else DEFAULT_SPLIT
        tags = item.take("tags", dict) if item.holds("tags") else {}
        check_tags(item, tags)
        ident = self._read_id(item, number) if item.holds("id") else f"line-{number}"
        image_id = self._read_image_id(item, path) if item.holds("image_id") else path
        if not item.sound or size is None:
            return
        for position, prompt in enumerate(prompts):
            yield SampleRecord(
                id=f"{ident}:{position}" if item.holds("prompts") else ident,
                image_id=image_id,
                image_path=path,
                image_size=size,
                prompt=prompt,
                target=target,
                no_target=item.holds(_NO_TARGET) and item.take(_NO_TARGET, bool),
                split=split,
                tags=tags,
            )

    def _size_of(self, item: Fields, path: str) -> Size | None:
        """(H, W) of an image, which is looked at once; None, and a fault of each line that names it, if it is bad."""
        if path not in self._sizes:
            self._sizes[path] = _look_at(self._images, path)
        size = self._sizes[path]
        if isinstance(size, str):
            item.fault(f"the image {size}")
            return None
        return size

    def _read_id(self, item: Fields, number: int) -> str:
        ident = item.take_text("id")
        first = self._line_of_id.setdefault(ident, number) if ident else number
        if first != number:
            item.fault(f"line {first} has the same id {ident!r}; give each line its own, or none")
        return ident

    def _read_image_id(self, item: Fields, path: str) -> str:
        image_id = item.take_text("image_id")
        before = self._path_of_image.setdefault(image_id, path) if image_id and path else path
        if before != path:
            item.fault(f"image_id {image_id!r} belongs to another image, {before!r}; give each image its own, or none")
        return image_id

    def _read_target(self, item: Fields, size: Size | None) -> bytes:
        """COCO counts of the line's target at the image's size (H, W); b"" if there is a fault, or no size."""
        denied = item.holds(_NO_TARGET) and not item.take(_NO_TARGET, bool) and item.holds(_NO_TARGET, bool)
        given = [key for key in _TARGETS if item.holds(key) and not (key == _NO_TARGET and denied)]
        if not given:
            item.fault("it has no target; give 'mask', 'rle', 'polygons' or 'box', or \"no_target\": true")
        if len(given) > 1:
            item.fault(f"it has {' and '.join(map(repr, given))}; give one of them")
        if len(given) != 1:
            return b""
        (key,) = given
        try:
            counts = self._counts(item, key, size)
        except ValueError as fault:
            item.fault(f"{key!r}: {fault}")
            return b""
        if counts and size and key != _NO_TARGET and is_empty(counts, size):
            item.fault(f'{key!r} marks no pixel; if the prompt names nothing that is there, write "no_target": true')
        return counts

    def _counts(self, item: Fields, key: str, size: Size | None) -> bytes:
        """COCO counts of a target in the form `key`; ValueError says what is wrong with it."""
        if key == "mask":
            path = _take_path(item, key)
            return self._read_mask(path, size) if path else b""
        if key == _NO_TARGET:
            return empty_mask(size) if size else b""
        kind: type[Any] = dict if key == "rle" else list
        value = item.take(key, kind)
        if not item.holds(key, kind) or not size:
            return b""
        if key == "box":
            return _fill_box(value, size)
        if not value:
            raise ValueError("it is empty")
        counts = union_of_segmentations([value], size)
        if key == "polygons":
            check_reach(value, size)
        return counts

    def _read_mask(self, path: str, size: Size | None) -> bytes:
        data = _read_file(self._masks, path)
        try:
            return encode_mask(read_mask(data, size)) if size else b""
        except ValueError as fault:
            raise ValueError(f"{path!r}: {fault}") from fault


def _fill_box(box: list[Any], size: Size) -> bytes:
    """COCO counts of the pixels of a (H, W) image whose centres lie in [x0, y0, x1, y1]."""
    if len(box) != 4 or any(type(value) not in (int, float) or not abs(value) < math.inf for value in box):
        raise ValueError("it must be a list of 4 numbers, [x0, y0, x1, y1]")
    x0, y0, x1, y1 = box
    if x1 <= x0 or y1 <= y0:
        raise ValueError(
            "its second corner must lie right of and below its first; write [x0, y0, x1, y1], not [x, y, width, height]"
        )
    _refuse_reach(min(x0, y0), x1, y1, size)
    left, top, right, bottom = (max(0, math.ceil(value - 0.5)) for value in box)
    mask = np.zeros(size, np.bool_, order="F")  # as it is encoded
    mask[top:bottom, left:right] = True
    return encode_mask(mask)


def check_reach(polygons: list[list[float]], size: Size) -> None:
    """ValueError if polygons that can be drawn reach out of a (H, W) image by more than `MARGIN_PX`.

    They are most likely another image's. COCO's own files have many such polygons, and are not held to this.
    """
    for polygon in polygons:
        _refuse_reach(min(polygon), max(polygon[::2]), max(polygon[1::2]), size)


def _refuse_reach(lowest: float, right: float, bottom: float, size: Size) -> None:
    height, width = size
    if lowest < -MARGIN_PX or right > width + MARGIN_PX or bottom > height + MARGIN_PX:
        raise ValueError(f"it reaches out of the image of {height} x {width} pixels (height x width)")


def _take_path(item: Fields, key: str) -> str:
    """A path in its plainest POSIX form; "" if there is a fault."""
    text = item.take_text(key)
    return str(PurePosixPath(item.take(key, str))) if text else ""


def _read_file(folder: Folder, path: str) -> bytes:
    """The bytes of a file in a folder; ValueError says why there are none."""
    if "\\" in path:
        raise ValueError(f"{path!r} must be written with '/' between its folders")
    if path not in folder:
        raise ValueError(
            f"{path!r} does not lie inside {folder.path}; copy the file there, and write the path from there"
        )
    try:
        return read_bytes(folder.path / path)[0]
    except UnreadableFileError as error:
        missing = isinstance(error.__cause__, FileNotFoundError)
        raise ValueError(f"{path!r} is missing" if missing else f"{path!r}: {error}") from error


def _look_at(folder: Folder, path: str) -> Size | str:
    """(H, W) of an image, or what is wrong with it."""
    try:
        return image_size(_read_file(folder, path))
    except UndecodableImageError as error:
        return f"{path!r}: {error}"
    except ValueError as error:
        return str(error)
