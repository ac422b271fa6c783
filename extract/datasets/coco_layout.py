"""Where the files of a COCO release lie: annotations/ with a file for each split, and an image folder for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cache_schema.errors import UsageError
from extract.datasets.places import find_image_dir
from extract.datasets.records import Source

SPLITS = ("train", "val")
"""Test images have no published annotations."""


@dataclass(frozen=True, slots=True)
class CocoSplit:
    """One split: its name, its annotation file, and the name of its folder below the image folder, as `val2017`."""

    name: str
    path: Path
    folder: str


def find_splits(source: Source, kind: str, year: int) -> tuple[Path, list[CocoSplit]]:
    """The folder that holds the image folders, and the splits that are there, at least one.

    Args:
        kind: what the annotation files' names begin with: captions or instances.

    Raises:
        UsageError: no annotation file is there, or the images of one that is there are not.
    """
    paths = {split: source.root / "annotations" / f"{kind}_{split}{year}.json" for split in SPLITS}
    splits = [CocoSplit(name, path, f"{name}{year}") for name, path in paths.items() if path.is_file()]
    if not splits:
        names = " and ".join(f"annotations/{path.name}" for path in paths.values())
        raise UsageError(f"{source.root} has none of {names}. Give the folder that holds annotations/.")
    return _find_image_dir(source, splits), splits


def _find_image_dir(source: Source, splits: Sequence[CocoSplit]) -> Path:
    folders = [source.root, source.root / "images"]
    if source.image_dir is not None:
        folders = [find_image_dir(source, ())]
    for folder in folders:
        if all((folder / split.folder).is_dir() for split in splits):
            return _follow_links(folder, splits)
    wanted = " and ".join(f"{split.folder}/" for split in splits)
    looked = " nor in ".join(str(folder) for folder in folders)
    raise UsageError(
        f"the images of {wanted} are not in {looked}. Name the folder that holds them with --image-dir; a split "
        "without its images is left out by moving its annotation file away."
    )


def _follow_links(folder: Path, splits: Sequence[CocoSplit]) -> Path:
    """The folder in which the image folders truly lie: nothing is read through a link that leads out of one."""
    places = [(folder / split.folder).resolve() for split in splits]
    parents = {place.parent for place in places}
    if parents == {folder.resolve()}:
        return folder
    if len(parents) == 1 and all(place.name == split.folder for place, split in zip(places, splits, strict=True)):
        return parents.pop()
    led = " and ".join(f"{split.folder} to {place}" for place, split in zip(places, splits, strict=True))
    raise UsageError(
        f"{folder} holds links that lead out of it ({led}). Name a folder that truly holds the image folders with "
        "--image-dir."
    )
