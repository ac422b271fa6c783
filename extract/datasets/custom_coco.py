"""COCO files of somebody's own, whose annotations carry texts: a `caption`, or a list of `expressions`."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, product
from pathlib import Path

import msgspec

from cache_schema.masks import Size, is_empty, merge_counts, union_of_segmentations
from extract.datasets.coco import CocoImage, read_image
from extract.datasets.custom_jsonl import DEFAULT_SPLIT, check_reach, take_texts
from extract.datasets.faults import Fields, FileFaults, each_item, is_text
from extract.datasets.json_files import JsonFile, JsonItems, parse
from extract.datasets.places import Folder, find_image_dir
from extract.datasets.records import Dataset, SampleRecord, Source

OF_ALL_SPLITS = ("annotations", "instances")
"""Files of these names hold any split; every other is named after the one that it holds."""

_TEXTS = ("caption", "expressions")
_IMAGE_ID = re.compile(rb'"image_id"\s*:\s*(-?\d{1,19})\b')


def read_captioned_coco(source: Source, paths: Sequence[Path]) -> Dataset:
    """Open COCO files whose annotations carry texts; docs/your-own-data.md says what they hold.

    Each text of an annotation is a sample, `"{annotation id}:{position of the text}"`, with the file's name before it
    where there are several. Annotations of one image that share a text are one target, the clamped union of them.
    Tags: `targets` is one or many; `category` names the category where all targets share one.

    Raises:
        UsageError: the image folder that was named is missing.
        AnnotationError: a file is not JSON, or lacks `images` or `annotations`.
    """
    image_dir = find_image_dir(source, ("images", "."))
    files = [JsonFile(path) for path in paths]
    for file, key in product(files, ("images", "annotations")):
        file.items(key)
    readers = [
        _CocoReader(file, Folder(image_dir), source.faults.of(file.path), several=len(files) > 1) for file in files
    ]
    samples = chain.from_iterable(reader.read() for reader in readers)
    return Dataset("custom", image_dir, tuple(paths), samples)


@dataclass(frozen=True, slots=True)
class _Image:
    image: CocoImage
    split: str


@dataclass(frozen=True, slots=True)
class _Member:
    """An annotation that takes part in a target: where its texts are, COCO counts, and its category's name."""

    id: int
    image_id: int
    texts: list[str]
    counts: bytes
    category: str


@dataclass(slots=True)
class _Target:
    """Annotations of one image that share a text, `num_left` of which are still to come."""

    id: str
    num_left: int
    masks: list[bytes] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)


class _TextsOnly(msgspec.Struct, gc=False):
    """What of an annotation says with which others it belongs together."""

    image_id: int
    caption: str = ""
    expressions: list[str] = []


class _CocoReader:
    """Reads one file, an annotation at a time. A mask is kept only while others of the same target are to come."""

    def __init__(self, file: JsonFile, folder: Folder, faults: FileFaults, several: bool) -> None:
        self._file = file
        self._folder = folder
        self._faults = faults
        self._prefix = f"{file.path.stem}:" if several else ""
        self._split = "" if file.path.stem in OF_ALL_SPLITS else file.path.stem
        self._categories: dict[int, str] = {}
        self._images: dict[int, _Image] = {}
        self._ids: set[int] = set()
        self._has_texts = False

    def read(self) -> Iterator[SampleRecord]:
        self._read_images()
        self._read_categories()
        items = self._file.items("annotations")
        num_members, unreadable = _count_members(items)
        targets: dict[tuple[int, str], _Target] = {}
        for item in each_item(items, "id", self._faults, "annotations "):
            member = self._read_annotation(item)
            if member is None:
                continue
            for position, text in enumerate(dict.fromkeys(member.texts)):
                key = (member.image_id, text)
                target = targets.setdefault(key, _Target(f"{self._prefix}{member.id}:{position}", num_members[key]))
                target.masks.append(member.counts)
                target.categories.append(member.category)
                target.num_left -= 1
                if target.num_left > 0:
                    continue
                if member.image_id in unreadable:
                    del targets[key]
                else:
                    yield self._make_sample(targets.pop(key), self._images[member.image_id], text)
        if not self._has_texts and len(items):
            self._faults.add("", "no annotation has a 'caption' or 'expressions'; add the texts that name it")

    def _read_images(self) -> None:
        paths: set[str] = set()
        for item in each_item(self._file.items("images"), "id", self._faults, "images "):
            split = item.take_text("split") if item.holds("split") else self._split or DEFAULT_SPLIT
            image = read_image(item, self._folder)
            if self._split and item.holds("split", str) and split not in ("", self._split):
                item.fault(f"'split' is {split!r}, in the file of the split {self._split!r}; leave it out, or move it")
            if image is not None and image.id in self._images:
                item.fault("another image has this id")
            elif image is not None and image.path in paths:
                item.fault(f"another image has this file_name, {image.path!r}")
            elif image is not None and item.sound:
                self._images[image.id] = _Image(image, split)
                paths.add(image.path)

    def _read_categories(self) -> None:
        if not self._file.has("categories"):
            return
        for item in each_item(self._file.items("categories"), "id", self._faults, "categories "):
            category_id, name = item.take("id", int), item.take_text("name")
            if item.sound and category_id in self._categories:
                item.fault("another category has this id")
            if item.sound:
                self._categories[category_id] = name

    def _read_annotation(self, item: Fields) -> _Member | None:
        """An annotation with texts; None if it has none, or a fault."""
        ann_id, image_id = item.take("id", int), item.take("image_id", int)
        has_texts = any(map(item.holds, _TEXTS))
        texts = take_texts(item, *_TEXTS) if has_texts else []
        misspelt = [] if has_texts else [(key, near) for key in item.keys if (near := _nearest(key))]
        for key, near in misspelt:
            item.fault(f"unknown key {key!r}: did you mean {near!r}?")
        self._has_texts = self._has_texts or has_texts or bool(misspelt)
        if item.holds("id", int) and ann_id in self._ids:
            item.fault("another annotation has this id")
        if item.holds("id", int):
            self._ids.add(ann_id)
        category_id = item.take("category_id", int) if self._categories and item.holds("category_id") else None
        if category_id is not None and category_id not in self._categories:
            item.fault(f"category_id {category_id} is not among the categories")
        if item.holds("image_id", int) and image_id not in self._images:
            item.fault(f"image_id {image_id} is not among the images that can be used")
            return None
        if not texts or not item.holds("image_id", int):
            return None
        counts = self._read_mask(item, self._images[image_id].image.size)
        category = "" if category_id is None else self._categories.get(category_id, "")
        return _Member(ann_id, image_id, texts, counts, category) if item.sound else None

    def _read_mask(self, item: Fields, size: Size) -> bytes:
        runs = item.holds("segmentation", dict)
        segmentation = item.take("segmentation", dict) if runs else item.take("segmentation", list)
        if not (runs or item.holds("segmentation", list)):
            return b""
        try:
            counts = union_of_segmentations([segmentation], size)
            if isinstance(segmentation, list):
                check_reach(segmentation, size)
        except ValueError as fault:
            item.fault(f"its segmentation is bad: {fault}")
            return b""
        if is_empty(counts, size):
            item.fault("its segmentation marks no pixel")
        return counts

    def _make_sample(self, target: _Target, of: _Image, text: str) -> SampleRecord:
        categories = set(target.categories)
        tags = {"targets": "one" if len(target.masks) == 1 else "many"}
        return SampleRecord(
            id=target.id,
            image_id=of.image.path,
            image_path=of.image.path,
            image_size=of.image.size,
            prompt=text,
            target=merge_counts(target.masks, of.image.size),
            no_target=False,
            split=of.split,
            tags={**tags, "category": categories.pop()} if len(categories) == 1 and all(categories) else tags,
        )


@lru_cache(maxsize=256)
def _nearest(key: str) -> str:
    """What a key that is much like a known one was meant to be; "" for other keys, of which there may be any."""
    near = difflib.get_close_matches(key.lower(), _TEXTS, n=1, cutoff=0.8)
    return near[0] if near else ""


def _count_members(items: JsonItems) -> tuple[Counter[tuple[int, str]], set[int]]:
    """How many annotations share an image and a text, and the images of annotations of which nobody knows the texts.

    One with a fault, told when its turn comes, counts all the same: its target lacks a part, and is never complete.
    """
    decode = msgspec.json.Decoder(_TextsOnly).decode
    num_members: Counter[tuple[int, str]] = Counter()
    unreadable: set[int] = set()
    for raw in items.raw:
        try:
            found = decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            guessed = _guess_texts(raw)
            if guessed is None:
                unreadable.update(int(number) for number in _IMAGE_ID.findall(bytes(raw)))
                continue
            found = guessed
        texts = {" ".join(text.split()) for text in (found.caption, *found.expressions)}
        num_members.update((found.image_id, text) for text in texts if text)
    return num_members, unreadable


def _guess_texts(raw: msgspec.Raw) -> _TextsOnly | None:
    """The image and the texts of an annotation with a fault; None if one of them cannot be made out."""
    content = parse(raw)
    if not isinstance(content, dict) or type(content.get("image_id")) is not int:
        return None
    expressions = content.get("expressions")
    given = [content.get("caption"), *(expressions if isinstance(expressions, list) else [expressions])]
    texts = [text for text in given if text is not None]
    readable = all(isinstance(text, str) and is_text(text) for text in texts)
    return _TextsOnly(content["image_id"], expressions=texts) if readable else None
