"""Annotation files as memory that the system reads when it is looked at, and may forget again."""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path

from extract.datasets.faults import AnnotationError

_AROUND = 1 << 16
"""The system shows more of a file than was looked at: whole pieces of so many bytes, as Linux does by default."""


def map_file(path: Path) -> mmap.mmap:
    """The bytes of a regular file. Anything else could make whoever reads it wait for ever.

    Raises:
        AnnotationError: the file cannot be read, is none, or is empty.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise AnnotationError(f"{path} cannot be read ({error.strerror}). Give a file that can.") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise AnnotationError(f"{path} is no regular file. Put the annotation file there.")
        if not status.st_size:
            raise AnnotationError(f"{path} is empty. Mend it, or fetch it again.")
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)


def take(data: mmap.mmap, start: int, stop: int) -> bytes:
    """A copy of some bytes of a mapped file, which itself is forgotten again there."""
    part = data[start:stop]
    forget(data, start, stop)
    return part


def forget(data: mmap.mmap, start: int, stop: int) -> None:
    """Let the system have the memory back that shows a part of a mapped file; it is read anew when looked at again."""
    first, last = start // _AROUND * _AROUND, min(-(-stop // _AROUND) * _AROUND, len(data))
    if first < last:
        data.madvise(mmap.MADV_DONTNEED, first, last - first)
