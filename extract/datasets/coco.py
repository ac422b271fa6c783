"""COCO's `instances.json`: images, categories, and annotations whose masks are made when they are asked for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from cache_schema.masks import Size, union_of_segmentations
from extract.datasets.faults import FaultReport, Fields, each_item
from extract.datasets.json_files import JsonFile, parse
from extract.datasets.places import Folder
from extract.images import MAX_IMAGE_PIXELS

_NUM_MASKS_KEPT = 4096
"""Masks that are remembered, for refs that name the same annotations lie near each other."""


@dataclass(frozen=True, slots=True)
class CocoImage:
    """An image: its id, its path below the image folder in POSIX form, and (H, W)."""

    id: int
    path: str
    size: Size


class CocoAnnotation(msgspec.Struct, frozen=True, gc=False):
    """An annotation. Its segmentation, polygons or run lengths, stays the JSON text that it is."""

    id: int
    image_id: int
    category_id: int
    segmentation: msgspec.Raw
    iscrowd: int = 0


class CocoFile:
    """An opened file in COCO's layout; what is wrong with it has gone to the report.

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
        self.annotations = self._read_annotations(file, wanted)
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

    def _read_images(self, file: JsonFile, folder: Folder) -> dict[int, CocoImage]:
        images: dict[int, CocoImage] = {}
        for item in each_item(file.items("images"), "id", self._faults, "images "):
            image = read_image(item, folder)
            if image is not None and image.id in images:
                item.fault("another image has this id")
            elif image is not None:
                images[image.id] = image
        return images

    def _read_annotations(self, file: JsonFile, wanted: Collection[int] | None) -> dict[int, CocoAnnotation]:
        annotations: dict[int, CocoAnnotation] = {}
        seen: set[int] = set()
        decode = msgspec.json.Decoder(CocoAnnotation).decode
        for position, raw in enumerate(file.items("annotations").raw):
            try:
                annotation = decode(raw)
                sound = (
                    bytes(memoryview(annotation.segmentation)[:1]) in (b"[", b"{")
                    and annotation.category_id in self.categories
                    and annotation.id not in seen
                    and annotation.iscrowd in (0, 1)
                )
            except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
                sound = False
            if sound:
                seen.add(annotation.id)
                if wanted is None or annotation.id in wanted:
                    annotations[annotation.id] = annotation
            else:
                self._blame_annotation(position, raw, seen)
        return annotations

    def _blame_annotation(self, position: int, raw: msgspec.Raw, seen: set[int]) -> None:
        """Say what is wrong with an annotation, in the words of any other item."""
        parsed = parse(raw)
        ident = parsed.get("id") if isinstance(parsed, dict) else None
        place = f"annotations item {position}" + (f" (id {ident})" if isinstance(ident, int | str) else "")
        item = Fields(parsed, place, self._faults)
        ann_id, _, category_id = item.take("id", int), item.take("image_id", int), item.take("category_id", int)
        if not item.holds("segmentation", dict):
            item.take("segmentation", list)
        if item.holds("iscrowd") and item.take("iscrowd", int) not in (0, 1):
            item.fault("'iscrowd' must be 0 or 1")
        if item.sound and ann_id in seen:
            item.fault("another annotation has this id")
        if item.sound and category_id not in self.categories:
            item.fault(f"category_id {category_id} is not among the categories")
        if item.sound:
            item.fault("it is no valid JSON")


def read_image(item: Fields, folder: Folder) -> CocoImage | None:
    """One of COCO's `images`; None, and a fault, if it is not what it should be."""
    image_id, file_name = item.take("id", int), item.take("file_name", str)
    size = (item.take("height", int), item.take("width", int))
    if item.sound and (min(size) < 1 or size[0] * size[1] > MAX_IMAGE_PIXELS):
        item.fault(f"a size of {size[0]} x {size[1]} pixels (height x width) is not an image's")
    if item.sound and file_name not in folder:
        item.fault(f"file_name {file_name!r} does not lie inside the image folder")
    return CocoImage(image_id, file_name, size) if item.sound else None


def _parse_segmentation(raw: msgspec.Raw) -> Any:
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as fault:
        raise ValueError(f"it is no valid JSON ({fault})") from fault
