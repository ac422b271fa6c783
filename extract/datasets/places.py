"""Where the files of a dataset lie, and that none of their names leads out of its folder."""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from cache_schema.errors import UsageError
from extract.datasets.records import Source


class Folder:
    """A folder that names out of annotation files, which nobody vouches for, must not lead out of."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._real = os.path.realpath(path)

    def __contains__(self, name: str) -> bool:
        """Whether a relative POSIX path stays inside, links followed."""
        path = PurePosixPath(name)
        if "\0" in name or "\\" in name or path.is_absolute() or ".." in path.parts or not path.parts:
            return False
        return Path(os.path.realpath(Path(self._real) / path)).is_relative_to(self._real)


def find_file(path: Path, holds: str) -> Path:
    """The file itself.

    Raises:
        UsageError: it is missing.
    """
    if not path.is_file():
        raise UsageError(f"{path} is missing: it should hold {holds}. Give the folder that holds the annotation files.")
    return path


def find_image_dir(source: Source, candidates: Sequence[str]) -> Path:
    """The image folder that was named, or the first candidate below the dataset's folder that is there.

    Raises:
        UsageError: there is none.
    """
    if source.image_dir is not None:
        if source.image_dir.is_dir():
            return source.image_dir
        raise UsageError(f"no folder at {source.image_dir}; name the one that holds the images with --image-dir.")
    for candidate in candidates:
        if (source.root / candidate).is_dir():
            return source.root / candidate
    looked = " and ".join(repr(candidate) for candidate in candidates)
    raise UsageError(f"{source.root} has no image folder: looked for {looked}. Name it with --image-dir.")
