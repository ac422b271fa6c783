"""COCO instances by category name: every image with every category that is in it, as a prompt with one mask."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cache_schema.errors import UsageError
from cache_schema.masks import Size, merge_counts, union_of_segmentations
from extract.datasets.coco import CocoAnnotation, CocoFile
from extract.datasets.coco_layout import CocoSplit, find_splits
from extract.datasets.faults import FaultReport, Fields
from extract.datasets.json_files import parse
from extract.datasets.records import Dataset, SampleRecord, Source


def read_coco_instances(source: Source, year: int) -> Dataset:
    """Open COCO's instances of 2014 or 2017: a sample `"{image_id}:{category_id}"` for each category in each image.

    The prompt is the category's name, which is the tag `category` too, and the target is the clamped union of all its
    annotations in that image, crowds included. The tag `targets` is one or many; a crowd is many. An image without an
    annotation gives no sample, nor does one of which an annotation cannot be read: it might be of any category. The
    categories' names, in the order of their ids, are the dataset's classes.

    Samples come in the order of the images in `annotations/instances_{train,val}YYYY.json`, and within an image by
    category id; a split whose file is not there is left out. Images are looked for in `trainYYYY/` and `valYYYY/`, in
    the folder itself or in `images/`.

    Raises:
        UsageError: a file or folder is missing, or the files of two splits name other categories.
        AnnotationError: an annotation file is not JSON, or another file than it should be.
    """
    image_dir, splits = find_splits(source, "instances", year)
    files = [CocoFile(split.path, image_dir / split.folder, source.faults) for split in splits]
    return Dataset(
        name=f"coco-instances-{year}",
        image_dir=image_dir,
        sources=tuple(split.path for split in splits),
        samples=_read_splits(splits, files, source.faults),
        classes=_read_classes(files),
    )


def _read_classes(files: Sequence[CocoFile]) -> tuple[str, ...]:
    first, *others = files
    for other in others:
        if other.categories != first.categories:
            raise UsageError(f"{first.path} and {other.path} name other categories: are they of one release?")
    return tuple(first.categories[category_id] for category_id in sorted(first.categories))


def _read_splits(splits: Sequence[CocoSplit], files: Sequence[CocoFile], faults: FaultReport) -> Iterator[SampleRecord]:
    for split, file in zip(splits, files, strict=True):
        yield from _read_instances(split, file, faults)


def _read_instances(split: CocoSplit, file: CocoFile, faults: FaultReport) -> Iterator[SampleRecord]:
    spoiled = file.spoiled
    for image_id, of_categories in _index(split.path, file, faults).items():
        if image_id in spoiled:
            continue
        image = file.images[image_id]
        for category_id in sorted(of_categories):
            annotations = of_categories[category_id]
            item = Fields({}, f"image {image_id}, category {file.categories[category_id]}", faults.of(split.path))
            target = _union(item, annotations, image.size)
            if not item.sound:
                continue
            many = len(annotations) > 1 or any(annotation.iscrowd for annotation in annotations)
            yield SampleRecord(
                id=f"{image_id}:{category_id}",
                image_id=str(image_id),
                image_path=f"{split.folder}/{image.path}",
                image_size=image.size,
                prompt=file.categories[category_id],
                target=target,
                no_target=False,
                split=split.name,
                tags={"category": file.categories[category_id], "targets": "many" if many else "one"},
            )


def _index(path: Path, file: CocoFile, faults: FaultReport) -> Mapping[int, Mapping[int, list[CocoAnnotation]]]:
    """The annotations of every category of every image, in the order of the images. No mask is made yet."""
    index: dict[int, dict[int, list[CocoAnnotation]]] = {image_id: defaultdict(list) for image_id in file.images}
    for annotation in file.annotations.values():
        if annotation.image_id in index:
            index[annotation.image_id][annotation.category_id].append(annotation)
        else:
            faults.of(path).add(
                f"annotations (id {annotation.id})", f"image_id {annotation.image_id} is not among the images"
            )
    return index


def _union(item: Fields, annotations: Sequence[CocoAnnotation], size: Size) -> bytes:
    """Counts of all the annotations; each bad segmentation is a fault. Nothing is kept: each is asked for once."""
    parts = []
    for annotation in annotations:
        try:
            parts.append(union_of_segmentations([parse(annotation.segmentation)], size))
        except (ValueError, RecursionError) as fault:
            item.fault(f"the segmentation of ann_id {annotation.id} is bad: {fault}")
    return merge_counts(parts, size)
