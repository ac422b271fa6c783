"""The rows that every contender reads, the order they are read in, and what they must turn out to be."""

from __future__ import annotations

import contextlib
import errno
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from awscrt.checksums import crc32c
from numpy.typing import NDArray

DTYPE = np.dtype(np.float16)

Pass = Callable[[], Iterable[Any]]
"""Reads all its rows once and yields them in batches, (B, ...) arrays or tensors. A batch is void after the next."""


class WrongBytesError(RuntimeError):
    """A contender returned or wrote other bytes than it was given: its speed means nothing."""


@dataclass(frozen=True)
class Rows:
    """Random rows in one .npy file, with the digest of each and the random order to read them in.

    Contenders keep copies of them, in their own formats, in the same folder.
    """

    folder: Path
    shape: tuple[int, ...]
    batch_rows: int
    order: NDArray[np.int64]
    digests: NDArray[np.uint32]

    @property
    def path(self) -> Path:
        return self.folder / "rows.npy"

    @property
    def num_rows(self) -> int:
        return self.shape[0]

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.shape[1:]

    @classmethod
    def make(cls, folder: Path, num_rows: int, row_shape: tuple[int, ...], batch_rows: int, seed: int = 0) -> Rows:
        """Write normally distributed rows, which nothing compresses."""
        shape = (num_rows, *row_shape)
        file = np.lib.format.open_memmap(folder / "rows.npy", mode="w+", dtype=DTYPE, shape=shape)
        digests = np.empty(num_rows, np.uint32)
        for start in range(0, num_rows, batch_rows):
            size = (min(batch_rows, num_rows - start), *row_shape)
            rows = np.random.default_rng([seed, start]).standard_normal(size, np.float32).astype(DTYPE)
            file[start : start + batch_rows] = rows
            digests[start : start + batch_rows] = digests_of(rows)
        file.flush()
        order = np.random.default_rng(seed).permutation(num_rows)
        return cls(folder, shape, batch_rows, order, digests)

    def open(self, writable: bool = False) -> NDArray[Any]:
        """All rows, mapped; `writable` for a private mapping that torch takes without a warning."""
        rows: NDArray[Any] = np.load(self.path, mmap_mode="c" if writable else "r")
        return rows

    def shards(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """Number and rows of each run of `batch_rows` rows."""
        rows = self.open()
        for number, start in enumerate(range(0, self.num_rows, self.batch_rows)):
            yield number, np.array(rows[start : start + self.batch_rows])

    def batches(self, num_rows: int | None = None) -> list[NDArray[np.int64]]:
        """The random order, or the first `num_rows` of it, in batches."""
        order = self.order[:num_rows]
        return [order[start : start + self.batch_rows] for start in range(0, len(order), self.batch_rows)]

    def buffer(self) -> NDArray[Any]:
        """Room for one batch, with every page of it there."""
        return np.ones((self.batch_rows, *self.row_shape), DTYPE)

    def in_order(self, read: Callable[[NDArray[np.int64]], Any], num_rows: int | None = None) -> Pass:
        """The pass of a contender that reads the batches it is told to."""
        batches = self.batches(num_rows)
        return lambda: map(read, batches)

    def copy(self, name: str, make: Callable[[Path], None]) -> Path:
        """The copy called `name`, written by `make` if it is not there yet."""
        path = self.folder / name
        if not path.exists():
            make(path)
        return path

    def require(self, batches: Iterable[Any], in_order: bool, name: str) -> None:
        """Read a whole pass and hold it to the truth.

        Args:
            in_order: the rows must come in `order`, or the first part of it; otherwise every row must come once.

        Raises:
            WrongBytesError: contender `name` returned other bytes.
        """
        found = np.concatenate([digests_of(np.asarray(batch)) for batch in batches])
        expected = self.digests[self.order[: len(found)]] if in_order else np.sort(self.digests)
        same = len(found) > 0 and np.array_equal(found if in_order else np.sort(found), expected)
        if not same:
            raise WrongBytesError(f"{name} did not return the rows that were written")


def digests_of(rows: NDArray[Any]) -> NDArray[np.uint32]:
    """The crc32c of each row."""
    flat = np.ascontiguousarray(rows).reshape(len(rows), math.prod(rows.shape[1:])).view(np.uint8)
    return np.array([crc32c(row.data) for row in flat], np.uint32)


def empty_cache(folder: Path) -> float:
    """Ask the system to forget the contents of every file under `folder`; return the share of bytes it may have kept.

    A page that some process has mapped stays, so nothing should have the files mapped. Where the system does not let
    itself be asked the share is 1.
    """
    if not hasattr(os, "posix_fadvise") or not hasattr(os, "RWF_NOWAIT"):
        return 1.0
    files = {path.stat().st_ino: path for path in folder.rglob("*") if path.is_file()}.values()
    for path in files:
        with _opened(path) as descriptor:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    sizes = {path: path.stat().st_size for path in files}
    return sum(size for path, size in sizes.items() if size and _is_cached(path)) / max(1, sum(sizes.values()))


def _is_cached(path: Path) -> bool:
    """Whether the middle of a file can be had without waiting for the disk; also where the system won't say.

    Asking a second time is of no use: the system has begun to read what it was asked for.
    """
    with _opened(path) as descriptor:
        try:
            return os.preadv(descriptor, [bytearray(1)], os.fstat(descriptor).st_size // 2, os.RWF_NOWAIT) > 0
        except OSError as error:
            return error.errno != errno.EAGAIN


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
