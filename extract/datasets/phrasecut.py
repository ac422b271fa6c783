"""PhraseCut as it is published (VGPhraseCut_v0): a file of phrases for each split, and Visual Genome's images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_schema.errors import UsageError
from cache_schema.masks import Size, union_of_segmentations
from extract.datasets.faults import FaultReport, Fields, FileFaults, each_item
from extract.datasets.json_files import JsonFile, JsonItems
from extract.datasets.places import find_image_dir
from extract.datasets.records import Dataset, DatasetReader, SampleRecord, Source
from extract.images import MAX_IMAGE_PIXELS

SPLITS = ("train", "val", "test", "miniv")
"""Each has its own file. What is in miniv is not in val, from which it was taken."""

IMAGE_LISTS = ("image_data_split.json", "image_data_split3000.json")
"""The names under which the list of images is found: as its authors' program saves it, and as they share it."""


@dataclass(frozen=True, slots=True)
class _Image:
    size: Size
    split: str


@dataclass(frozen=True, slots=True)
class _Part:
    split: str
    path: Path
    tasks: JsonItems


def read_phrasecut(source: Source) -> Dataset:
    """Open PhraseCut: a sample for each phrase, with its `task_id`, in the order of the files that are there.

    The target is the clamped union of all polygons. It is drawn by pycocotools, as all polygons are here; the authors
    truncate the points to whole pixels and have Pillow draw them with their outline. Their masks may therefore have a
    row and a column more at the lower and right edges, and scores differ a little. A polygon of fewer than three
    points, which the authors draw as a line or leave out, has no area and adds nothing.

    Tags: `targets` is one or many, by the number of instances; `kind` is what it takes to tell the target by, as the
    authors say: name, attribute, relation or verbose. The names themselves, of which there are thousands, are no tag.

    Raises:
        UsageError: a file or folder is missing.
        AnnotationError: a file is not JSON, or another file than it should be.
    """
    images_path = _find_image_list(source.root)
    parts = _find_parts(source.root)
    image_dir = find_image_dir(source, ("images",))
    images = _read_images(images_path, source.faults)
    sources = (images_path, *(part.path for part in parts))
    return Dataset("phrasecut", image_dir, sources, _read_tasks(parts, images, source.faults))


def _find_image_list(root: Path) -> Path:
    for name in IMAGE_LISTS:
        if (root / name).is_file():
            return root / name
    raise UsageError(
        f"{root / IMAGE_LISTS[0]} is missing: it should hold the sizes and splits of the images. Give the folder that "
        "holds the annotation files."
    )


def _find_parts(root: Path) -> list[_Part]:
    paths = {split: root / f"refer_{split}.json" for split in SPLITS}
    found = [_Part(split, path, JsonFile(path).items()) for split, path in paths.items() if path.is_file()]
    if not found:
        names = ", ".join(path.name for path in paths.values())
        raise UsageError(f"{root} holds none of {names}. Give the folder that holds the annotation files.")
    return found


def _read_images(path: Path, faults: FaultReport) -> dict[int, _Image]:
    images: dict[int, _Image] = {}
    for item in each_item(JsonFile(path).items(), "image_id", faults.of(path)):
        image_id, split = item.take("image_id", int), item.take("split", str)
        size = (item.take("height", int), item.take("width", int))
        if item.sound and (min(size) < 1 or size[0] * size[1] > MAX_IMAGE_PIXELS):
            item.fault(f"a size of {size[0]} x {size[1]} pixels (height x width) is not an image's")
        if item.sound and image_id in images:
            item.fault("another image has this id")
        if item.sound:
            images[image_id] = _Image(size, split)
    return images


def _read_tasks(parts: list[_Part], images: Mapping[int, _Image], faults: FaultReport) -> Iterator[SampleRecord]:
    for part in parts:
        of_file = faults.of(part.path)
        for item in each_item(part.tasks, "task_id", of_file):
            record = _read_task(item, part.split, images, of_file)
            if record is not None:
                yield record


def _read_task(item: Fields, split: str, images: Mapping[int, _Image], faults: FileFaults) -> SampleRecord | None:
    task_id, image_id, prompt = item.take_text("task_id"), item.take("image_id", int), item.take_text("phrase")
    if any(type(ann_id) is not int for ann_id in item.take("ann_ids", list)):
        item.fault("'ann_ids' must list whole numbers")
    num_boxes = len(item.take("instance_boxes", list))
    instances, tags = item.take("Polygons", list), _read_tags(item, faults)
    if item.sound and num_boxes != len(instances):
        item.fault(f"it has {num_boxes} 'instance_boxes', but {len(instances)} lists of 'Polygons'")
    image = images.get(image_id)
    if item.sound and image is None:
        item.fault(f"image_id {image_id} is not among the images")
    if not item.sound or image is None:
        return None
    if image.split != split:
        item.fault(f"image_id {image_id} belongs to the split {image.split!r}, not to {split!r}")
    target = _union(item, instances, image.size)
    if not item.sound:
        return None
    return SampleRecord(
        id=task_id,
        image_id=str(image_id),
        image_path=f"{image_id}.jpg",
        image_size=image.size,
        prompt=prompt,
        target=target,
        no_target=False,
        split=split,
        tags={**tags, "targets": "one" if len(instances) == 1 else "many"},
    )


def _read_tags(item: Fields, faults: FileFaults) -> dict[str, str]:
    """What the phrase's structure says, where it has one."""
    if not item.holds("phrase_structure") or item.holds("phrase_structure", type(None)):
        return {}
    structure = Fields(item.take("phrase_structure", dict), f"{item.where}, phrase_structure", faults)
    kind = structure.take_text("type") if structure.holds("type") else ""
    item.sound = item.sound and structure.sound
    return {"kind": kind} if kind else {}


def _union(item: Fields, instances: list[Any], size: Size) -> bytes:
    """Counts of all polygons of all instances, or a fault."""
    polygons: list[list[Any]] = []
    for instance in instances:
        if not isinstance(instance, list) or not all(_is_polygon(polygon) for polygon in instance):
            item.fault("'Polygons' must list, for each instance, polygons as lists of [x, y] points")
            return b""
        polygons += [[value for point in polygon for value in point] for polygon in instance if len(polygon) > 2]
    if not polygons:
        item.fault("it has no polygon of three points or more")
        return b""
    try:
        return union_of_segmentations([polygons], size)
    except ValueError as fault:
        item.fault(f"its polygons are bad: {fault}")
        return b""


def _is_polygon(polygon: Any) -> bool:
    return isinstance(polygon, list) and all(isinstance(point, list) and len(point) == 2 for point in polygon)


PHRASECUT_READERS: dict[str, DatasetReader] = {
    "phrasecut": DatasetReader(
        read_phrasecut,
        "image_data_split.json, refer_{train,val,test,miniv}.json, and Visual Genome's images in images/",
        {"train": 310816, "val": 19495, "test": 14354, "miniv": 821},  # their table counts miniv's into val's 20,316
        counted="samples",
    ),
}
