"""What a dataset reader hands over: where the images lie and a stream of samples. No store is known here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cache_schema.masks import Size


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """One (image, prompt) pair with its truth.

    `image_path` is relative to the dataset's image folder, in POSIX form. `target` holds COCO counts at `image_size`
    (H, W); it is the empty mask where `no_target` is set. `tags` are the slices this sample belongs to.
    """

    id: str
    image_id: str
    image_path: str
    image_size: Size
    prompt: str
    target: bytes
    no_target: bool
    split: str
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Dataset:
    """An opened dataset: its name, its image folder, the annotation files it was read from, and its samples."""

    name: str
    image_dir: Path
    sources: tuple[Path, ...]
    samples: Iterator[SampleRecord]
