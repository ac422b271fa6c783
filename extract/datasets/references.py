"""Referring expressions as the refer family and gRefCOCO write them: refs, each with sentences and annotations.

Whether the list of refs is JSON or a pickle, and which splits there are, is for others to know.
"""

from __future__ import annotations

import os.path
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cache_schema.errors import UsageError
from cache_schema.masks import merge_counts
from extract.datasets.coco import LARGEST_ID, CocoAnnotation, CocoFile
from extract.datasets.faults import FaultReport, Fields, each_item, is_text
from extract.datasets.records import SampleRecord

NO_TARGET = -1
"""The annotation id that stands for "nothing in this image"."""

_TAG_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_OWN_TAGS = {"targets", "category"}


def wanted_annotations(refs: Iterable[Any]) -> array[int]:
    """The ids of the annotations that refs name, as far as they can be made out; some more than once."""
    wanted = array("q")
    for ref in refs:
        named = ref.get("ann_id") if isinstance(ref, dict) else None
        ids = named if isinstance(named, list) else [named]
        wanted.extend(ann_id for ann_id in ids if type(ann_id) is int and abs(ann_id) <= LARGEST_ID)
    return wanted


def read_references(
    path: Path, refs: Iterable[Any], coco: CocoFile, image_dir: Path, faults: FaultReport
) -> Iterator[SampleRecord]:
    """A sample for each sentence, `"{ref_id}:{sent_id}"`, in the order of the file `path`.

    Images are found through their id: a ref's own `file_name` may carry an annotation suffix. The target is the clamped
    union of the annotations in `ann_id`. Refs without any sentence, of which published files have some, give no sample.
    Tags: `targets` is none, one or many; `category` names the category where all targets share one; a ref's own `tags`,
    which published files do not have, are added.

    Raises:
        UsageError: the image folder holds none of the images.
    """
    of_file = faults.of(path)
    has_an_image, first = False, ""
    for item in each_item(refs, "ref_id", of_file):
        ref_id, image_id, split = item.take("ref_id", int), item.take("image_id", int), item.take_text("split")
        ann_ids, tags = _read_ann_ids(item), _read_tags(item)
        sentences = list(_read_sentences(item))
        if not item.sound:
            continue
        if image_id not in coco.images:
            item.fault(f"image_id {image_id} is not among the images")
            continue
        image = coco.images[image_id]
        targets = _find_targets(item, ann_ids, image_id, coco.annotations)
        masks = [coco.mask(target, item) for target in targets]
        if not item.sound or not sentences:
            continue
        first = first or image.path
        has_an_image = has_an_image or os.path.isfile(image_dir / image.path)  # noqa: PTH113  a Path raises at long names
        target = merge_counts(masks, image.size)
        own_tags = _tags_of([coco.categories[annotation.category_id] for annotation in targets])
        for sent_id, prompt in sentences:
            yield SampleRecord(
                id=f"{ref_id}:{sent_id}",
                image_id=str(image_id),
                image_path=image.path,
                image_size=image.size,
                prompt=prompt,
                target=target,
                no_target=not targets,
                split=split,
                tags={**tags, **own_tags},
                ref_id=str(ref_id),
            )
    if first and not has_an_image:
        raise UsageError(f"{image_dir} holds none of the images, not even {first!r}. Name their folder: --image-dir.")


def _read_ann_ids(item: Fields) -> list[int]:
    """The annotations of a ref, each once; none for `[-1]`. A single id may stand without its list."""
    ann_ids: list[Any] = [item.take("ann_id", int)] if item.holds("ann_id", int) else item.take("ann_id", list)
    if not item.sound:
        return []
    if not ann_ids or any(type(ann_id) is not int for ann_id in ann_ids):
        item.fault("'ann_id' must list whole numbers, or be [-1] for no target")
        return []
    no_target = ann_ids == [NO_TARGET]
    if item.holds("no_target") and item.take("no_target", bool) != no_target:
        item.fault(f"'no_target' contradicts 'ann_id', which is {ann_ids}")
    return [] if no_target else list(dict.fromkeys(ann_ids))


def _read_tags(item: Fields) -> dict[str, str]:
    tags = item.take("tags", dict) if item.holds("tags") else {}
    check_tags(item, tags)
    if clash := sorted(_OWN_TAGS & tags.keys()):
        item.fault(f"'tags' must not set {', '.join(clash)}, which follows from 'ann_id'")
    return tags


def check_tags(item: Fields, tags: Mapping[str, Any]) -> None:
    """Report tags that no store can hold."""
    if any(type(text) is not str for pair in tags.items() for text in pair):
        item.fault("'tags' must map texts to texts")
        return
    if not all(map(is_text, tags.values())):
        item.fault("'tags' hold what is not valid UTF-8")
    if bad := sorted(name for name in tags if not _TAG_NAME.fullmatch(name)):
        item.fault(f"{bad[0]!r} is no name for a tag: use up to 64 letters, digits, '_' and '-'")


def _read_sentences(ref: Fields) -> Iterator[tuple[int, str]]:
    for item in ref.each("sentences", "sent_id"):
        sent_id, prompt = item.take("sent_id", int), item.take_text("sent")
        if item.sound:
            yield sent_id, prompt
        else:
            ref.sound = False


def _find_targets(
    item: Fields, ann_ids: Sequence[int], image_id: int, annotations: Mapping[int, CocoAnnotation]
) -> list[CocoAnnotation]:
    targets = []
    for ann_id in ann_ids:
        annotation = annotations.get(ann_id)
        if annotation is None:
            item.fault(f"ann_id {ann_id} is not among the annotations")
        elif annotation.image_id != image_id:
            item.fault(f"ann_id {ann_id} belongs to image {annotation.image_id}, not to image {image_id}")
        else:
            targets.append(annotation)
    return targets


def _tags_of(categories: Sequence[str]) -> dict[str, str]:
    tags = {"targets": ("none", "one")[len(categories)] if len(categories) < 2 else "many"}
    return tags | {"category": categories[0]} if len(set(categories)) == 1 else tags
