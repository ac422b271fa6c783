"""gRefCOCO as it is published: `grefs(unc).json` beside COCO's `instances.json` and a folder of train2014 images.

Everything is read and judged before the first sample is handed out; past that point nothing is checked again.
Knows nothing about stores, encoders or heads.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cache_schema.errors import UsageError
from cache_schema.masks import Size, merge_counts, union_of_segmentations
from extract.datasets.faults import FaultReport, Fields, each_item, read_json
from extract.datasets.records import Dataset, SampleRecord
from extract.images import MAX_IMAGE_PIXELS

IMAGE_FOLDERS = ("images", "train2014")
"""Where the images are looked for, in this order, when no folder is named."""

NO_TARGET = -1
"""The annotation id that stands for "nothing in this image"."""

_TAG_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_OWN_TAGS = {"targets", "category"}


def read_grefcoco(
    root: Path,
    *,
    image_folder: str | None = None,
    refs: str = "grefs(unc).json",
    instances: str = "instances.json",
    name: str = "grefcoco",
) -> Dataset:
    """Open a dataset in gRefCOCO's layout. Every sentence is one sample, `"{ref_id}:{sent_id}"`.

    Images are found through their id: a ref's own `file_name` may carry an annotation suffix. The target is the
    clamped union of the annotations in `ann_id`. Refs without any sentence, of which the published file has some, give
    no sample. Tags: `targets` is none, one or many; `category` names the category where all targets share one; a ref's
    own `tags`, which the published file does not have, are added.

    Args:
        root: the folder that holds both annotation files and the image folder.
        image_folder: the image folder's path below `root`; by default `images`, else `train2014`.
        refs: file name of the list of refs.
        instances: file name of COCO's annotations.
        name: what the dataset calls itself.

    Raises:
        UsageError: a file or folder is missing.
        AnnotationError: an annotation file is not what it should be; all its faults are named at once.
    """
    refs_path = _find_file(root / refs, "the list of refs")
    instances_path = _find_file(root / instances, "COCO's images, annotations and categories")
    image_dir = _find_image_dir(root, image_folder)
    known = _parse_instances(instances_path, image_dir)
    parsed = _parse_refs(refs_path, known)
    _require_an_image(parsed, image_dir)
    return Dataset(name=name, image_dir=image_dir, sources=(refs_path, instances_path), samples=_samples(parsed))


@dataclass(frozen=True, slots=True)
class _Image:
    id: int
    path: str
    size: Size


@dataclass(frozen=True, slots=True)
class _Annotation:
    id: int
    image_id: int
    category: str
    segmentation: Any


@dataclass(frozen=True, slots=True)
class _Instances:
    images: Mapping[int, _Image]
    annotations: Mapping[int, _Annotation]


@dataclass(frozen=True, slots=True)
class _Ref:
    id: int
    image: _Image
    split: str
    sentences: tuple[tuple[int, str], ...]
    masks: tuple[bytes, ...]
    tags: Mapping[str, str]


def _samples(refs: Sequence[_Ref]) -> Iterator[SampleRecord]:
    for ref in refs:
        size = ref.image.size
        target = merge_counts(ref.masks, size)
        for sent_id, prompt in ref.sentences:
            yield SampleRecord(
                id=f"{ref.id}:{sent_id}",
                image_id=str(ref.image.id),
                image_path=ref.image.path,
                image_size=size,
                prompt=prompt,
                target=target,
                no_target=not ref.masks,
                split=ref.split,
                tags=ref.tags,
            )


def _parse_instances(path: Path, image_dir: Path) -> _Instances:
    faults = FaultReport()
    content = Fields(read_json(path, dict), "", faults)
    categories = _parse_categories(content)
    images = _parse_images(content, image_dir)
    annotations = _parse_annotations(content, categories)
    faults.raise_if_any(path)
    return _Instances(images, annotations)


def _parse_categories(content: Fields) -> dict[int, str]:
    names: dict[int, str] = {}
    for item in content.each("categories", "id"):
        category_id, category = item.take("id", int), item.take("name", str)
        if item.sound and category_id in names:
            item.fault("another category has this id")
        names[category_id] = category
    return names


def _parse_images(content: Fields, image_dir: Path) -> dict[int, _Image]:
    images: dict[int, _Image] = {}
    real_dir = os.path.realpath(image_dir)
    for item in content.each("images", "id"):
        image_id, file_name = item.take("id", int), item.take("file_name", str)
        size = (item.take("height", int), item.take("width", int))
        if not item.sound:
            continue
        if min(size) < 1 or size[0] * size[1] > MAX_IMAGE_PIXELS:
            item.fault(f"a size of {size[0]} x {size[1]} pixels (height x width) is not an image's")
        if image_id in images:
            item.fault("another image has this id")
        path = PurePosixPath(file_name)
        if _leaves_folder(file_name, real_dir):
            item.fault(f"file_name {file_name!r} does not lie inside the image folder")
        images[image_id] = _Image(image_id, path.as_posix(), size)
    return images


def _leaves_folder(file_name: str, real_dir: str) -> bool:
    """Whether a file name out of an annotation file, which nobody vouches for, points outside `real_dir`."""
    path = PurePosixPath(file_name)
    if "\0" in file_name or "\\" in file_name or path.is_absolute() or ".." in path.parts or not path.parts:
        return True
    return not Path(os.path.realpath(Path(real_dir) / path)).is_relative_to(real_dir)


def _parse_annotations(content: Fields, categories: Mapping[int, str]) -> dict[int, _Annotation]:
    annotations: dict[int, _Annotation] = {}
    for item in content.each("annotations", "id"):
        ann_id, image_id = item.take("id", int), item.take("image_id", int)
        category_id = item.take("category_id", int)
        is_run_lengths = item.holds("segmentation", dict)
        segmentation: Any = item.take("segmentation", dict) if is_run_lengths else item.take("segmentation", list)
        if not item.sound:
            continue
        if ann_id in annotations:
            item.fault("another annotation has this id")
        if category_id not in categories:
            item.fault(f"category_id {category_id} is not among the categories")
            continue
        annotations[ann_id] = _Annotation(ann_id, image_id, categories[category_id], segmentation)
    return annotations


def _parse_refs(path: Path, known: _Instances) -> list[_Ref]:
    faults = FaultReport()
    masks = _Masks()
    refs: list[_Ref] = []
    seen: set[tuple[int, int]] = set()
    for item in each_item(read_json(path, list), "ref_id", faults):
        ref_id, image_id, split = item.take("ref_id", int), item.take("image_id", int), item.take("split", str)
        ann_ids, tags = _parse_ann_ids(item), _parse_tags(item)
        sentences = tuple(_parse_sentences(item))
        if not item.sound:
            continue
        for sent_id, _ in sentences:
            if (ref_id, sent_id) in seen:
                item.fault(f"sent_id {sent_id} was there before")
            seen.add((ref_id, sent_id))
        if image_id not in known.images:
            item.fault(f"image_id {image_id} is not among the images")
            continue
        image = known.images[image_id]
        targets = _find_targets(item, ann_ids, image, known.annotations)
        counts = tuple(masks.of(target, image.size, item) for target in targets)
        if item.sound and sentences:
            refs.append(_Ref(ref_id, image, split, sentences, counts, {**tags, **_tags_of(targets)}))
    faults.raise_if_any(path)
    return refs


def _parse_ann_ids(item: Fields) -> list[int]:
    """The annotations of a ref, each once; none for `[-1]`. A single id may stand without its list."""
    ann_ids: list[Any] = [item.take("ann_id", int)] if item.holds("ann_id", int) else item.take("ann_id", list)
    if not item.sound:
        return []
    if not ann_ids or any(type(ann_id) is not int for ann_id in ann_ids):
        item.fault("'ann_id' must list whole numbers, or be [-1] for no target")
    no_target = ann_ids == [NO_TARGET]
    if item.holds("no_target") and item.take("no_target", bool) != no_target:
        item.fault(f"'no_target' contradicts 'ann_id', which is {ann_ids}")
    return [] if no_target else list(dict.fromkeys(ann_ids))


def _parse_tags(item: Fields) -> dict[str, str]:
    tags = item.take("tags", dict) if item.holds("tags") else {}
    if any(type(value) is not str for value in tags.values()):
        item.fault("'tags' must map texts to texts")
    if bad := sorted(name for name in tags if not _TAG_NAME.fullmatch(name)):
        item.fault(f"{bad[0]!r} is no name for a tag: use up to 64 letters, digits, '_' and '-'")
    if clash := sorted(tags.keys() & _OWN_TAGS):
        item.fault(f"'tags' must not set {', '.join(clash)}, which follows from 'ann_id'")
    return tags


def _parse_sentences(ref: Fields) -> Iterator[tuple[int, str]]:
    for item in ref.each("sentences", "sent_id"):
        sent_id, prompt = item.take("sent_id", int), " ".join(item.take("sent", str).split())
        if not item.sound:
            continue
        if not prompt:
            item.fault("the sentence is empty")
        yield sent_id, prompt


def _find_targets(
    item: Fields, ann_ids: Sequence[int], image: _Image, annotations: Mapping[int, _Annotation]
) -> list[_Annotation]:
    targets = []
    for ann_id in ann_ids:
        annotation = annotations.get(ann_id)
        if annotation is None:
            item.fault(f"ann_id {ann_id} is not among the annotations")
        elif annotation.image_id != image.id:
            item.fault(f"ann_id {ann_id} belongs to image {annotation.image_id}, not to image {image.id}")
        else:
            targets.append(annotation)
    return targets


def _tags_of(targets: Sequence[_Annotation]) -> dict[str, str]:
    tags = {"targets": ("none", "one")[len(targets)] if len(targets) < 2 else "many"}
    categories = {target.category for target in targets}
    return tags | {"category": categories.pop()} if len(categories) == 1 else tags


class _Masks:
    """Run lengths of the annotations that refs name: each is made once, and is far smaller than its polygons."""

    def __init__(self) -> None:
        self._counts: dict[int, bytes] = {}

    def of(self, annotation: _Annotation, size: Size, item: Fields) -> bytes:
        """Counts of one annotation. A bad segmentation is a fault of the ref that names it first."""
        if annotation.id not in self._counts:
            try:
                counts = union_of_segmentations([annotation.segmentation], size)
            except ValueError as fault:
                item.fault(f"the segmentation of ann_id {annotation.id} is bad: {fault}")
                counts = b""
            self._counts[annotation.id] = counts
        return self._counts[annotation.id]


def _find_file(path: Path, holds: str) -> Path:
    if not path.is_file():
        raise UsageError(f"{path} is missing: it should hold {holds}. Give the folder that holds the annotation files.")
    return path


def _find_image_dir(root: Path, image_folder: str | None) -> Path:
    folders = (image_folder,) if image_folder is not None else IMAGE_FOLDERS
    for folder in folders:
        if (root / folder).is_dir():
            return root / folder
    looked = " and ".join(repr(folder) for folder in folders)
    raise UsageError(f"{root} has no image folder: looked for {looked}. Name the one that holds the images.")


def _require_an_image(refs: Sequence[_Ref], image_dir: Path) -> None:
    """Refuse a folder that holds none of the images. A single one that is missing is for the extraction to note."""
    if refs and not any((image_dir / ref.image.path).is_file() for ref in refs):
        first = refs[0].image.path
        raise UsageError(f"{image_dir} holds none of the images, not even {first!r}. Name the folder that holds them.")
