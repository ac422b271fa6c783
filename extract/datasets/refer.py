"""The refer family as it is published: RefCOCO, RefCOCO+ and RefCOCOg, `refs(...).p` beside COCO's `instances.json`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from extract.datasets.coco import CocoFile
from extract.datasets.grefcoco import HOLDS_INSTANCES, IMAGE_FOLDERS, INSTANCES
from extract.datasets.pickles import PickledList
from extract.datasets.places import find_file, find_image_dir
from extract.datasets.records import Dataset, DatasetReader, Source
from extract.datasets.references import read_references, wanted_annotations


def read_refer(source: Source, name: str, split_by: str) -> Dataset:
    """Open a dataset of the refer family; see `read_references`.

    Args:
        name: what the dataset calls itself.
        split_by: who made its splits: unc, umd or google.

    Raises:
        UsageError: a file or folder is missing.
        AnnotationError: the pickle holds anything but plain data, or an annotation file is another than it should be.
    """
    refs_path = find_file(source.root / f"refs({split_by}).p", "the list of refs")
    instances_path = find_file(source.root / INSTANCES, HOLDS_INSTANCES)
    image_dir = find_image_dir(source, IMAGE_FOLDERS)
    refs = PickledList(refs_path)
    coco = CocoFile(instances_path, image_dir, source.faults, wanted_annotations(refs))
    samples = read_references(refs_path, refs, coco, image_dir, source.faults)
    return Dataset(name=name, image_dir=image_dir, sources=(refs_path, instances_path), samples=samples)


def _reader(name: str, split_by: str) -> Callable[[Source], Dataset]:
    return partial(read_refer, name=name, split_by=split_by)


_LAYOUT = "refs({}).p, instances.json, and COCO's train2014 images in images/ or train2014/"

REFER_READERS: dict[str, DatasetReader] = {
    "refcoco": DatasetReader(
        _reader("refcoco", "unc"),
        _LAYOUT.format("unc"),
        {"train": 42404, "val": 3811, "testA": 1975, "testB": 1810},
    ),
    "refcoco+": DatasetReader(
        _reader("refcoco+", "unc"),
        _LAYOUT.format("unc"),
        {"train": 42278, "val": 3805, "testA": 1975, "testB": 1798},
    ),
    "refcocog-umd": DatasetReader(
        _reader("refcocog-umd", "umd"), _LAYOUT.format("umd"), {"train": 42226, "val": 2573, "test": 5023}
    ),
    "refcocog-google": DatasetReader(
        _reader("refcocog-google", "google"), _LAYOUT.format("google"), {"train": 44822, "val": 5000}
    ),
}
