"""gRefCOCO as it is published: `grefs(unc).json` beside COCO's `instances.json` and a folder of train2014 images."""

from __future__ import annotations

from extract.datasets.coco import CocoFile
from extract.datasets.json_files import JsonFile
from extract.datasets.places import find_file, find_image_dir
from extract.datasets.records import Dataset, Source
from extract.datasets.references import read_references, wanted_annotations

IMAGE_FOLDERS = ("images", "train2014", "images/train2014", "../images/mscoco/images/train2014", "../train2014")
"""Where the images are looked for, in this order, when no folder is named."""

LIST_OF_REFS = "grefs(unc).json"
INSTANCES = "instances.json"
HOLDS_INSTANCES = "COCO's images, annotations and categories"


def read_grefcoco(source: Source, name: str = "grefcoco") -> Dataset:
    """Open a dataset in gRefCOCO's layout; see `read_references`.

    Args:
        name: what the dataset calls itself.

    Raises:
        UsageError: a file or folder is missing.
        AnnotationError: an annotation file is not JSON, or another file than it should be.
    """
    refs_path = find_file(source.root / LIST_OF_REFS, "the list of refs")
    instances_path = find_file(source.root / INSTANCES, HOLDS_INSTANCES)
    image_dir = find_image_dir(source, IMAGE_FOLDERS)
    refs = JsonFile(refs_path).items()
    coco = CocoFile(instances_path, image_dir, source.faults, wanted_annotations(refs))
    samples = read_references(refs_path, refs, coco, image_dir, source.faults)
    return Dataset(name=name, image_dir=image_dir, sources=(refs_path, instances_path), samples=samples)
