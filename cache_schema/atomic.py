"""Files that are there whole or not at all: temporary name, write, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEMPORARY_SUFFIX = ".tmp"
"""Ends the name of a file or folder in the making. One that stays behind after a kill holds nothing of value."""


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that no other process will pick."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")


def write_file(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Publish `data` at `path`: whoever opens `path` sees all of it, or what was there before, also after a crash."""
    with staged(path) as temporary, temporary.open("xb", buffering=0) as file:
        view = memoryview(data).cast("B")
        while view:
            view = view[file.write(view) :]


def write_json(path: Path, value: Any) -> None:
    """Publish `value` as indented JSON with sorted keys."""
    write_file(path, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode())


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a temporary path to be made into a file or a folder; publish it at `path` when the block ends well.

    The folder of `path` is made if it is missing. A folder cannot replace a folder that is not empty: whoever
    publishes first wins, and the loser's `OSError` is raised.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        yield temporary
        fsync_tree(temporary)
        temporary.replace(path)
    except BaseException:
        remove(temporary)
        raise
    _fsync(path.parent)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        for child in path.iterdir():
            remove(child)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def fsync_tree(path: Path) -> None:
    """Ask the disk to keep a file, or a folder with all it holds."""
    if path.is_dir():
        for child in path.iterdir():
            fsync_tree(child)
    _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
