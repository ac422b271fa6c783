"""COCO captions as they are published: images with five captions or so each, and no masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from extract.datasets.coco import CocoImage, read_image
from extract.datasets.coco_layout import CocoSplit, find_splits
from extract.datasets.faults import FaultReport, each_item
from extract.datasets.json_files import JsonFile
from extract.datasets.places import Folder
from extract.datasets.records import Dataset, SampleRecord, Source


def read_coco_captions(source: Source, year: int) -> Dataset:
    """Open COCO's captions of 2014 or 2017: a sample without a mask for each caption, with the caption's id.

    Captions come in the order of their file, `annotations/captions_{train,val}YYYY.json`; a split whose file is not
    there is left out. Images are looked for in `trainYYYY/` and `valYYYY/`, in the folder itself or in `images/`.

    Raises:
        UsageError: a file or folder is missing.
        AnnotationError: an annotation file is not JSON, or another file than it should be.
    """
    image_dir, splits = find_splits(source, "captions", year)
    files = [JsonFile(split.path) for split in splits]
    for file in files:
        file.items("images"), file.items("annotations")
    return Dataset(
        name=f"coco-captions-{year}",
        image_dir=image_dir,
        sources=tuple(split.path for split in splits),
        samples=_read_splits(splits, files, image_dir, source.faults),
    )


def _read_splits(
    splits: Sequence[CocoSplit], files: Sequence[JsonFile], image_dir: Path, faults: FaultReport
) -> Iterator[SampleRecord]:
    for split, file in zip(splits, files, strict=True):
        yield from _read_captions(split, file, image_dir, faults)


def _read_captions(split: CocoSplit, file: JsonFile, image_dir: Path, faults: FaultReport) -> Iterator[SampleRecord]:
    of_file = faults.of(split.path)
    images: dict[int, CocoImage] = {}
    folder = Folder(image_dir / split.folder)
    for item in each_item(file.items("images"), "id", of_file, "images "):
        image = read_image(item, folder)
        if image is not None and image.id in images:
            item.fault("another image has this id")
        elif image is not None:
            images[image.id] = image
    for item in each_item(file.items("annotations"), "id", of_file, "annotations "):
        caption_id, image_id, caption = item.take("id", int), item.take("image_id", int), item.take_text("caption")
        if item.sound and image_id not in images:
            item.fault(f"image_id {image_id} is not among the images")
        if item.sound:
            yield SampleRecord(
                id=str(caption_id),
                image_id=str(image_id),
                image_path=f"{split.folder}/{images[image_id].path}",
                image_size=images[image_id].size,
                prompt=caption,
                target=None,
                no_target=False,
                split=split.name,
            )
