"""COCO's `instances.json`: images, categories, and annotations whose masks are made when they are asked for."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from cache_schema.masks import Size, is_empty, union_of_segmentations
from extract.datasets.faults import FaultReport, Fields, each_item
from extract.datasets.json_files import JsonFile, JsonItems, parse
from extract.datasets.places import Folder
from extract.images import MAX_IMAGE_PIXELS

_NUM_MASKS_KEPT, _NUM_IMAGES_KEPT = 4096, 256
"""Masks and images that are remembered, for refs that name the same ones lie near each other."""

LARGEST_ID = 2**63 - 1
"""Ids are kept as numbers of 64 bits."""

_Id = Annotated[int, msgspec.Meta(ge=-LARGEST_ID, le=LARGEST_ID)]
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class CocoImage:
    """An image: its id, its path below the image folder in POSIX form, and (H, W)."""

    id: int
    path: str
    size: Size


class CocoAnnotation(msgspec.Struct, frozen=True, gc=False):
    """An annotation. Its segmentation, polygons or run lengths, stays in the file until it is asked for."""

    items: JsonItems
    id: int
    image_id: int
    category_id: int
    iscrowd: int
    start: int
    stop: int

    @property
    def segmentation(self) -> msgspec.Raw:
        """The JSON text of the segmentation."""
        return _decode_annotation(self.items.text(self.start, self.stop)).segmentation


class CocoFile:
    """An opened file in COCO's layout; what is wrong with it has gone to the report.

    Memory holds some whole numbers for each image and for each annotation that is kept.

    Args:
        wanted: ids of the annotations to keep, if not all; the others are checked all the same.

    Raises:
        AnnotationError: the file is not JSON, or lacks a list.
    """

    def __init__(self, path: Path, image_dir: Path, faults: FaultReport, wanted: Collection[int] | None = None) -> None:
        self.path = path
        self._faults = faults.of(path)
        file = JsonFile(path)
        self.categories = self._read_categories(file)
        self.images = self._read_images(file, Folder(image_dir))
        self.spoiled: set[int] = set()
        """Images of which an annotation was refused, so that what it marked of them is not known."""
        self.annotations = self._read_annotations(file.items("annotations"), wanted)
        self._counts: dict[int, bytes] = {}
        self._bad: set[int] = set()

    def mask(self, annotation: CocoAnnotation, item: Fields) -> bytes:
        """COCO counts of one annotation. A bad segmentation is a fault of every item that asks, told in full once."""
        if annotation.id in self._bad:
            item.fault(f"the segmentation of ann_id {annotation.id} is bad, as said before")
            return b""
        if annotation.id not in self._counts:
            try:
                size = self.images[annotation.image_id].size
                counts = union_of_segmentations([_parse_segmentation(annotation.segmentation)], size)
                if is_empty(counts, size):
                    raise ValueError("it marks no pixel")
            except ValueError as fault:
                item.fault(f"the segmentation of ann_id {annotation.id} is bad: {fault}")
                self._bad.add(annotation.id)
                return b""
            if len(self._counts) == _NUM_MASKS_KEPT:
                del self._counts[next(iter(self._counts))]
            self._counts[annotation.id] = counts
        return self._counts[annotation.id]

    def _read_categories(self, file: JsonFile) -> dict[int, str]:
        names: dict[int, str] = {}
        for item in each_item(file.items("categories"), "id", self._faults, "categories "):
            category_id, category = item.take("id", int), item.take_text("name")
            if item.sound and category_id in names:
                item.fault("another category has this id")
            if item.sound:
                names[category_id] = category
        return names

    def _read_images(self, file: JsonFile, folder: Folder) -> Mapping[int, CocoImage]:
        items = file.items("images")
        table = array("q")
        for (start, stop, _), item in zip(items.placed(), each_item(items, "id", self._faults, "images "), strict=True):
            image = read_image(item, folder)
            if image is not None:
                table.extend((image.id, start, stop))
        rows = np.frombuffer(table, np.int64).reshape(-1, 3)
        if len(again := _repeated(rows[:, 0])):
            for position, raw in _positions(items, rows[again, 1]):
                place = f"images item {position} (id {parse(raw)['id']})"
                self._faults.add(place, "another image has this id")
            rows = np.delete(rows, again, axis=0)

        @lru_cache(_NUM_IMAGES_KEPT)
        def make(_: int, start: int, stop: int) -> CocoImage:
            image = read_image(Fields(parse(items.text(start, stop)), "", self._faults), folder)
            assert image is not None
            return image

        return _Index(rows, make)

    def _read_annotations(self, items: JsonItems, wanted: Collection[int] | None) -> Mapping[int, CocoAnnotation]:
        kept = None if wanted is None else array("q", np.unique(np.fromiter(wanted, np.int64, len(wanted))).tobytes())
        table, seen = array("q"), array("q")
        for position, (start, stop, raw) in enumerate(items.placed()):
            try:
                found = _decode_annotation(raw)
                sound = (
                    bytes(memoryview(found.segmentation)[:1]) in (b"[", b"{")
                    and found.category_id in self.categories
                    and found.iscrowd in (0, 1)
                )
            except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
                sound = False
            if not sound:
                self._blame_annotation(position, raw)
                continue
            seen.extend((found.id, start))
            if kept is None or _holds(kept, found.id):
                table.extend((found.id, found.image_id, found.category_id, found.iscrowd, start, stop))
        rows = np.frombuffer(table, np.int64).reshape(-1, 6)
        ids, starts = np.frombuffer(seen, np.int64).reshape(-1, 2).T
        if len(again := _repeated(ids)):
            for position, raw in _positions(items, starts[again]):
                self._blame_annotation(position, raw, is_repeated=True)
            rows = rows[~np.isin(rows[:, 4], starts[again])]
        return _Index(rows, partial(CocoAnnotation, items))

    def _blame_annotation(self, position: int, raw: bytes, is_repeated: bool = False) -> None:
        """Say what is wrong with an annotation, in the words of any other item."""
        parsed = parse(raw)
        ident = parsed.get("id") if isinstance(parsed, dict) else None
        place = f"annotations item {position}" + (f" (id {ident})" if isinstance(ident, int | str) else "")
        item = Fields(parsed, place, self._faults)
        ann_id, image_id, category_id = item.take("id", int), item.take("image_id", int), item.take("category_id", int)
        if not item.holds("segmentation", dict):
            item.take("segmentation", list)
        if item.holds("iscrowd") and item.take("iscrowd", int) not in (0, 1):
            item.fault("'iscrowd' must be 0 or 1")
        if item.holds("image_id", int):
            self.spoiled.add(image_id)
        for name, number in (("id", ann_id), ("image_id", image_id)):
            if abs(number) > LARGEST_ID:
                item.fault(f"{name!r} is beyond what 64 bits hold")
        if is_repeated:
            item.fault("another annotation has this id")
        if item.sound and category_id not in self.categories:
            item.fault(f"category_id {category_id} is not among the categories")
        if item.sound:
            item.fault("it is no valid JSON")


class _Index(Mapping[int, Made]):
    """Items by their id, in the order of the file, each made when it is asked for.

    Args:
        rows: (N, M) int64, an item's numbers, of which its id is the first.
        make: the item of such numbers.
    """

    def __init__(self, rows: NDArray[np.int64], make: Callable[..., Made]) -> None:
        self._rows = rows
        self._make = make
        self._order = np.argsort(rows[:, 0], kind="stable")
        self._sorted = array("q", rows[self._order, 0].tobytes())

    def __getitem__(self, ident: int) -> Made:
        if ident not in self:
            raise KeyError(ident)
        return self._make(*self._rows[self._order[bisect_left(self._sorted, ident)]].tolist())

    def __contains__(self, ident: object) -> bool:
        return isinstance(ident, int) and _holds(self._sorted, ident)

    def __iter__(self) -> Iterator[int]:
        return map(int, self._rows[:, 0])

    def __len__(self) -> int:
        return len(self._rows)


def _holds(numbers: array[int], number: int) -> bool:
    """Whether a number is among sorted ones."""
    place = bisect_left(numbers, number)
    return place < len(numbers) and numbers[place] == number


def _repeated(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows whose id another row before them has, in order."""
    order = np.argsort(ids, kind="stable")
    return np.sort(order[1:][ids[order[1:]] == ids[order[:-1]]])


def _positions(items: JsonItems, starts: NDArray[np.int64]) -> Iterator[tuple[int, bytes]]:
    """The position in their list, and the text, of the items that begin at `starts`."""
    named = set(starts.tolist())
    return ((position, raw) for position, (start, _, raw) in enumerate(items.placed()) if start in named)


def read_image(item: Fields, folder: Folder) -> CocoImage | None:
    """One of COCO's `images`; None, and a fault, if it is not what it should be."""
    image_id, file_name = item.take("id", int), item.take("file_name", str)
    size = (item.take("height", int), item.take("width", int))
    if item.sound and (min(size) < 1 or size[0] * size[1] > MAX_IMAGE_PIXELS):
        item.fault(f"a size of {size[0]} x {size[1]} pixels (height x width) is not an image's")
    if item.sound and abs(image_id) > LARGEST_ID:
        item.fault("'id' is beyond what 64 bits hold")
    if item.sound and file_name not in folder:
        item.fault(f"file_name {file_name!r} does not lie inside the image folder")
    return CocoImage(image_id, file_name, size) if item.sound else None


class _AnnotationItem(msgspec.Struct, gc=False):
    id: _Id
    image_id: _Id
    category_id: _Id
    segmentation: msgspec.Raw
    iscrowd: int = 0


_decode_annotation = msgspec.json.Decoder(_AnnotationItem).decode


def _parse_segmentation(raw: msgspec.Raw) -> Any:
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as fault:
        raise ValueError(f"it is no valid JSON ({fault})") from fault
