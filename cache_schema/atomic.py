"""Files that are there whole or not at all: temporary name, write, fsync, rename, fsync of the folder.

A path is a `pathlib.Path`, or a `upath.UPath` for what fsspec reaches (s3:// and friends). An object store publishes
an object whole or not at all by itself, so a remote file is written once, under its own name.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from upath import UPath

from cache_schema.errors import NoRoomError, UsageError

StorePath = Path | UPath
"""Where a store lies. A `Path` can be opened, renamed and fsynced by the operating system; a `UPath` is remote."""

TEMPORARY_SUFFIX = ".tmp"
"""Ends the name of a file or folder in the making. One that stays behind after a kill holds nothing of value."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def parse_path(text: StorePath | str) -> StorePath:
    """A path of this machine, or with a scheme such as s3:// a remote one.

    Raises:
        UsageError: the scheme is unknown, or the library that speaks it is not installed.
    """
    if not isinstance(text, str):
        return text
    if "://" not in text:
        return Path(text)
    try:
        path = UPath(text, use_listings_cache=False)  # others may write there too
        path.fs  # noqa: B018  imports the library that speaks the scheme
    except ImportError as error:
        raise UsageError(f"{text} cannot be reached: {error}. For s3:// install headstart[s3].") from error
    except ValueError as error:
        raise UsageError(f"{text} cannot be reached: {error}.") from error
    return path


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that no other process will pick."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")


Buffer = bytes | bytearray | memoryview


def write_file(path: StorePath, data: Buffer) -> None:
    """Publish `data` at `path`: whoever opens `path` sees all of it, or what was there before, also after a crash.

    Raises:
        NoRoomError: the disk is full, or the user's quota is; nothing half written was published.
    """
    write_pieces(path, (data,))


def write_pieces(path: StorePath, pieces: Iterable[Buffer]) -> None:
    """Publish the file that `pieces` make end to end, as `write_file` does. A remote one is put together in memory.

    Raises:
        NoRoomError: the disk is full, or the user's quota is; nothing half written was published.
    """
    if not isinstance(path, Path):
        path.write_bytes(b"".join(pieces))
        return
    with staged(path) as temporary, temporary.open("xb", buffering=0) as file:
        for piece in pieces:
            view = memoryview(piece).cast("B")
            while view:
                view = view[file.write(view) :]


def write_json(path: StorePath, value: Any) -> None:
    """Publish `value` as `json_bytes` spells it."""
    write_file(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Indented UTF-8 JSON with sorted keys and no NaN."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a temporary path to be made into a file or a folder; publish it at `path` when the block ends well.

    The folder of `path` is made if it is missing. A folder cannot replace a folder that is not empty: whoever
    publishes first wins, and the loser's `OSError` is raised.

    Raises:
        NoRoomError: the disk is full, or the user's quota is; nothing half written was published.
    """
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        fsync_tree(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    except BaseException as error:
        remove(temporary)
        if _is_lack_of_room(error):
            raise _no_room(path) from error
        raise


def remove(path: StorePath) -> None:
    """Remove a file, a link, or a folder with all it holds, if it is there."""
    if not isinstance(path, Path):
        if path.fs.exists(path.path):
            path.fs.rm(path.path, recursive=True)
    elif path.is_dir() and not path.is_symlink():
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


def _is_lack_of_room(error: BaseException) -> bool:
    """Some libraries that write for themselves say so in words alone."""
    return getattr(error, "errno", None) in _NO_ROOM or any(os.strerror(number) in str(error) for number in _NO_ROOM)


def _no_room(path: Path) -> NoRoomError:
    folder = next(parent for parent in path.parents if parent.exists())
    free = shutil.disk_usage(folder).free
    return NoRoomError(
        f"there is no room for {path}: {free / 1e6:.1f} MB are free where it lies and no half of it was kept; make "
        "room and run the same command again to go on."
    )
