"""The semantic-segmentation sets: where their files lie, and which numbers in them stand for which classes.

Class lists are data files in `classes/`. There, `value` is the number that stands for a class in the label maps as they
are published, `background` are the numbers that stand for none of the classes, and `ignored` those that do not count.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from extract.datasets.label_maps import IGNORED

BACKGROUND = "background"
_IGNORED_TRAIN_ID = 255


@dataclass(frozen=True)
class ClassList:
    """A list of classes as a set publishes it.

    Args:
        names: in the order of their published numbers; what the usual evaluations call them.
        aliases: further names of each, which may be none.
        values: the number of each in published label maps.
        background: numbers that stand for none of the classes.
        ignored: numbers that do not count.
    """

    names: tuple[str, ...]
    aliases: tuple[tuple[str, ...], ...]
    values: tuple[int, ...]
    background: tuple[int, ...]
    ignored: tuple[int, ...]


@functools.cache
def open_classes(name: str) -> ClassList:
    """The class list in the data file `classes/{name}.json`."""
    path = importlib.resources.files("extract.datasets") / "classes" / f"{name}.json"
    content = json.loads(path.read_text("utf-8"))
    return ClassList(
        names=tuple(item["name"] for item in content["classes"]),
        aliases=tuple(tuple(item["aliases"]) for item in content["classes"]),
        values=tuple(item["value"] for item in content["classes"]),
        background=tuple(content["background"]),
        ignored=tuple(content["ignored"]),
    )


@dataclass(frozen=True)
class LabelFiles:
    """One of the ways in which a set's label maps are kept.

    Args:
        suffix: the end of their names; what stands before it is the image's name without its own suffix.
        train_ids: they hold class ids as converters write them, where published maps hold published numbers.
    """

    suffix: str
    train_ids: bool = False

    def key_of(self, name: str) -> str | None:
        """The name of the image to which the label map `name` belongs; None if it is not kept in this way."""
        key = name.removesuffix(self.suffix)
        return None if key == name or "TrainIds" in key else key


@dataclass(frozen=True)
class SemanticSet:
    """One set.

    Args:
        classes: the name of its class list.
        has_background: whether background is a class, with the id 0, or counts for nothing.
        homes: folders below the one that is named in which the following may lie, if not there itself.
        images: the folder of the images, or the first of several that is there.
        image_suffix: the end of their names.
        labels: the folder of the label maps.
        label_files: how these are kept; where an image has several, the first counts.
        splits: of each split the file that lists its images, or the folder below `images` and below `labels`.
        listed: which of the two.
        published: images in each split.
        layout: all this in words.
        instances: of each split a file in COCO's layout from which label maps are drawn where there are none.
    """

    classes: str
    has_background: bool
    homes: tuple[str, ...]
    images: tuple[str, ...]
    image_suffix: str
    labels: str
    label_files: tuple[LabelFiles, ...]
    splits: Mapping[str, str]
    listed: bool
    published: Mapping[str, int]
    layout: str
    instances: Mapping[str, str] = field(default_factory=dict)

    @property
    def marks(self) -> tuple[str, ...]:
        """Paths of which at least one is there wherever the set lies."""
        below = "" if self.listed else f"{self.labels}/"
        return (*(below + place for place in self.splits.values()), *self.instances.values())

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes; the place of each is its id."""
        return ((BACKGROUND,) if self.has_background else ()) + open_classes(self.classes).names

    def class_of(self, files: LabelFiles) -> Mapping[int, int]:
        """The class id, or `IGNORED`, for each number that its label maps may hold."""
        return self.train_ids if files.train_ids else self._published_values

    @property
    def train_ids(self) -> dict[int, int]:
        """The same for label maps that hold class ids."""
        return {class_id: class_id for class_id in range(len(self.class_names))} | {_IGNORED_TRAIN_ID: IGNORED}

    @property
    def _published_values(self) -> dict[int, int]:
        listed = open_classes(self.classes)
        first = int(self.has_background)
        return {
            **dict.fromkeys(listed.ignored, IGNORED),
            **dict.fromkeys(listed.background, 0 if self.has_background else IGNORED),
            **{value: first + row for row, value in enumerate(listed.values)},
        }


def _voc(has_background: bool) -> SemanticSet:
    return SemanticSet(
        classes="voc",
        has_background=has_background,
        homes=("VOC2012", "VOCdevkit/VOC2012"),
        images=("JPEGImages",),
        image_suffix=".jpg",
        labels="SegmentationClass",
        label_files=(LabelFiles(".png"),),
        splits={split: f"ImageSets/Segmentation/{split}.txt" for split in ("train", "val")},
        listed=True,
        published={"train": 1464, "val": 1449},
        layout="VOCdevkit/VOC2012 with JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/{train,val}.txt",
    )


def _context(has_background: bool) -> SemanticSet:
    return SemanticSet(
        classes="context",
        has_background=has_background,
        homes=("VOC2010", "VOCdevkit/VOC2010"),
        images=("JPEGImages",),
        image_suffix=".jpg",
        labels="SegmentationClassContext",
        label_files=(LabelFiles(".png"),),
        splits={split: f"ImageSets/SegmentationContext/{split}.txt" for split in ("train", "val")},
        listed=True,
        published={"train": 4996, "val": 5104},
        layout="VOCdevkit/VOC2010 with JPEGImages/, SegmentationClassContext/ (numbers 0 to 59) and "
        "ImageSets/SegmentationContext/{train,val}.txt",
    )


_COCO_SPLITS = {"train": "train2017", "val": "val2017"}
_COCO_SIZES = {"train": 118287, "val": 5000}

SEMANTIC_SETS: dict[str, SemanticSet] = {
    "voc20": _voc(has_background=False),
    "voc21": _voc(has_background=True),
    "context59": _context(has_background=False),
    "context60": _context(has_background=True),
    "ade20k": SemanticSet(
        classes="ade20k",
        has_background=False,
        homes=("ADEChallengeData2016", "ade/ADEChallengeData2016"),
        images=("images",),
        image_suffix=".jpg",
        labels="annotations",
        label_files=(LabelFiles(".png"),),
        splits={"train": "training", "val": "validation"},
        listed=False,
        published={"train": 20210, "val": 2000},
        layout="ADEChallengeData2016 with images/ and annotations/, each with training/ and validation/",
    ),
    "coco-stuff": SemanticSet(
        classes="coco_stuff",
        has_background=False,
        homes=("coco_stuff164k",),
        images=("images", "."),
        image_suffix=".jpg",
        labels="annotations",
        label_files=(LabelFiles("_labelTrainIds.png", train_ids=True), LabelFiles(".png")),
        splits=_COCO_SPLITS,
        listed=False,
        published=_COCO_SIZES,
        layout="images/{train2017,val2017} and the stuff-thing maps in annotations/{train2017,val2017}, as published "
        "or as *_labelTrainIds.png",
    ),
    "coco-object": SemanticSet(
        classes="coco_object",
        has_background=True,
        homes=("coco_stuff164k",),
        images=("images", "."),
        image_suffix=".jpg",
        labels="annotations",
        label_files=(LabelFiles("_instanceTrainIds.png", train_ids=True), LabelFiles(".png")),
        splits=_COCO_SPLITS,
        listed=False,
        published=_COCO_SIZES,
        layout="images/{train2017,val2017} and, in annotations/, {train2017,val2017} with *_instanceTrainIds.png or "
        "COCO-Stuff's own maps, or else instances_{train2017,val2017}.json",
        instances={split: f"annotations/instances_{place}.json" for split, place in _COCO_SPLITS.items()},
    ),
    "cityscapes": SemanticSet(
        classes="cityscapes",
        has_background=False,
        homes=("cityscapes",),
        images=("leftImg8bit",),
        image_suffix="_leftImg8bit.png",
        labels="gtFine",
        label_files=(LabelFiles("_gtFine_labelTrainIds.png", train_ids=True), LabelFiles("_gtFine_labelIds.png")),
        splits={"train": "train", "val": "val"},
        listed=False,
        published={"train": 2975, "val": 500},
        layout="leftImg8bit/{train,val}/<city> and gtFine/{train,val}/<city> with *_gtFine_labelTrainIds.png or "
        "*_gtFine_labelIds.png",
    ),
}
"""Every set, by the name under which it is read."""
