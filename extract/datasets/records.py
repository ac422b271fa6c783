"""What a dataset reader is asked and what it hands over: a folder in, a stream of samples out. No store is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cache_schema.masks import Size
from extract.datasets.faults import FaultReport


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """One (image, prompt) pair with its truth.

    `image_path` is relative to the dataset's image folder, in POSIX form. `target` holds COCO counts at `image_size`
    (H, W): the empty mask where `no_target` is set, None where the dataset has no masks. `ignored` holds counts of the
    pixels nobody labelled, b"" for none. `tags` are the slices this sample belongs to. `ref_id` names the annotation of
    which the prompt is one of several sentences, where published counts are of those.
    """

    id: str
    image_id: str
    image_path: str
    image_size: Size
    prompt: str
    target: bytes | None
    no_target: bool
    split: str
    tags: Mapping[str, str] = field(default_factory=dict)
    ref_id: str = ""
    ignored: bytes = b""


@dataclass(frozen=True, slots=True)
class Dataset:
    """An opened dataset: its name, its image folder, the annotation files it was read from, and its samples.

    The samples are a stream that is gone through once. An item with a fault gives a fault and no sample. `classes`
    are the names of a fixed vocabulary, in the order of the published class ids, for datasets that have one.
    """

    name: str
    image_dir: Path
    sources: tuple[Path, ...]
    samples: Iterator[SampleRecord]
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """Where a dataset lies.

    Args:
        root: its folder, in the layout in which it is published.
        faults: where everything that is wrong with it goes.
        image_dir: the folder of its images, if not where they are published.
        unpack: a folder for images that are published inside other files; `root / "images"` by default.
        whole: nothing is to be unpacked unless every item is sound.
    """

    root: Path
    faults: FaultReport = field(default_factory=FaultReport)
    image_dir: Path | None = None
    unpack: Path | None = None
    whole: bool = False


Counted = Literal["refs", "samples", "images"]


@dataclass(frozen=True)
class DatasetReader:
    """One dataset that can be read by name.

    Args:
        read: opens it; a UsageError where a file is missing.
        layout: what its folder holds, for people.
        published: how many there are in each split, as its authors say.
        counted: what they count: annotated references, samples, or images.
        as_shown: whether its annotations are of images as a viewer shows them, turned as their EXIF says, and not of
            the pixels as they are stored.
        by_name: whether the name of a dataset at the hub, `owner/name`, may stand for the folder.
    """

    read: Callable[[Source], Dataset]
    layout: str
    published: Mapping[str, int] = field(default_factory=dict)
    counted: Counted = "refs"
    as_shown: bool = False
    by_name: bool = False
