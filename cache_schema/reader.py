"""Rows out of chunks, by positioned reads into a caller's buffer, on several threads.

A request is sorted by place, runs of neighbouring chunks become one system call each, and every chunk lands where its
row belongs without a copy in between. Knows shards only as files with a table of chunks.
"""

from __future__ import annotations

import itertools
import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from awscrt.checksums import crc32c
from numpy.typing import ArrayLike, NDArray

from cache_schema.errors import DamagedStoreError
from cache_schema.layout import CRC_BYTES, ArrayLayout
from cache_schema.shards import ChunkTable, parse_index

MAX_THREADS = 4
"""By default a read takes as many threads as there are cores, up to this many."""

MAX_OPEN_FILES = 128
"""How many shard files one store keeps open; a process may have 1,024 open by default."""

REPAIR = "`headstart cache repair` extracts what is damaged again"

_RUN_BYTES = 8 << 20
_RUN_CHUNKS = 256  # a system call takes 1,024 buffers, a chunk needs two
_WORTH_A_THREAD_BYTES = 1 << 20


class RowReader(ABC):
    """Reads rows of one array, whatever holds it."""

    layout: ArrayLayout

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.layout.dtype

    def __len__(self) -> int:
        return self.layout.num_rows

    def read(
        self,
        rows: ArrayLike | None = None,
        out: NDArray[Any] | None = None,
        *,
        verify: bool = True,
        threads: int | None = None,
    ) -> NDArray[Any]:
        """Rows `rows` (R,), all of them by default, as a (R, ...) array.

        Args:
            out: a C-contiguous (R, ...) array of the layout's data type to fill instead of a new one.
            verify: check the crc32c of every chunk that is read.
            threads: how many threads read and check; by default one for each core, up to `MAX_THREADS`.

        Raises:
            TypeError, IndexError: a row is no whole number, or out of range.
            DamagedStoreError: a shard or a chunk is missing, cut short or fails its checksum. Never zeros instead.
        """
        wanted, out = _parse_request(self.layout, rows, out)
        if out.nbytes:
            self._fill(wanted, out, verify, threads or default_threads())
        return out

    @abstractmethod
    def _fill(self, wanted: NDArray[np.int64], out: NDArray[Any], verify: bool, threads: int) -> None:
        """Fill `out`, which is not empty, with the wanted rows, which are all there."""

    @abstractmethod
    def close(self) -> None:
        """Let go of whatever is open; a later read opens it again."""


class ChunkSource(Protocol):
    """The files an array's shards lie in.

    `trailer_bytes` is what follows each chunk in its file: its checksum. `remedy` is what an error tells to do.
    """

    layout: ArrayLayout
    trailer_bytes: int
    remedy: str

    def path(self, shard: int) -> Path:
        """The file a shard lies in."""
        ...

    def where(self, shard: int) -> str:
        """What a shard is called in an error."""
        ...

    def key(self, shard: int) -> Hashable:
        """What tells that file from others of the store, and is quick to have."""
        ...

    def table(self, shard: int, file: OpenFile) -> ChunkTable:
        """Where the chunks of a shard lie.

        Raises:
            ValueError: the file does not say.
        """
        ...


class OpenFile:
    """A file that is open for positioned reads, until nobody refers to it any more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    @property
    def num_bytes(self) -> int:
        return os.fstat(self.descriptor).st_size

    def read_into(self, buffers: Sequence[Any], offset: int, num_bytes: int) -> bool:
        """Fill `buffers`, `num_bytes` in all, one after the other from `offset`; False if the file ends before."""
        while (got := os.preadv(self.descriptor, buffers, offset)) != num_bytes:
            if not got:
                return False
            offset, num_bytes = offset + got, num_bytes - got
            buffers = list(_after(buffers, got))
        return True


class OpenFiles:
    """The files a store keeps open, the least recently used of which is closed first. Shared by threads."""

    def __init__(self, limit: int = MAX_OPEN_FILES) -> None:
        self._limit = limit
        self._files: OrderedDict[Hashable, OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, path: Callable[[], Path]) -> OpenFile:
        """The file called `key`, opened at `path()` unless it is open. One in use survives being dropped from here."""
        with self._lock:
            file = self._files.get(key)
            if file is None:
                file = self._files[key] = OpenFile(path())
                if len(self._files) > self._limit:
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(key)
            return file

    def drop(self, key: Hashable) -> None:
        """Let go of one file, if it is open."""
        with self._lock:
            self._files.pop(key, None)

    def close(self) -> None:
        """Drop every file."""
        with self._lock:
            self._files.clear()


class ShardFiles:
    """Shards as files of a local zarr array: the index at the end, a checksum behind each chunk."""

    trailer_bytes = CRC_BYTES
    remedy = REPAIR

    def __init__(self, store: Path, layout: ArrayLayout) -> None:
        self.layout = layout
        self._store = store

    def path(self, shard: int) -> Path:
        return self._store / self.layout.shard_key(shard)

    def where(self, shard: int) -> str:
        return str(self.path(shard))

    def key(self, shard: int) -> Hashable:
        return self.layout.name, shard

    def table(self, shard: int, file: OpenFile) -> ChunkTable:
        tail = np.empty(self.layout.index_bytes, np.uint8)
        start = file.num_bytes - len(tail)
        if start < 0 or not file.read_into([tail], start, len(tail)):
            raise ValueError("the shard is shorter than its index")
        return parse_index(tail)


class _Request:
    """What a read asks for, sorted by place: piece p is one chunk with the rows that are wanted of it.

    `runs` are ranges of pieces whose chunks stand side by side in one shard, none too long to share out by threads.
    """

    def __init__(self, layout: ArrayLayout, wanted: NDArray[np.int64], out: NDArray[Any]) -> None:
        self.layout = layout
        self.flat = out.reshape(len(wanted), -1).view(np.uint8)
        self._order = np.argsort(wanted, kind="stable")
        self._ranked = wanted[self._order]
        chunks = self._ranked // layout.chunk_rows
        starts = np.flatnonzero(np.diff(chunks, prepend=-1))
        self._starts = [*starts.tolist(), len(wanted)]
        self.chunks: list[int] = chunks[starts].tolist()
        self.places: list[int] = self._order[starts].tolist()
        self.singles = layout.chunk_rows == 1 and len(starts) == len(wanted)
        self.runs = self._cut(chunks[starts])

    def next_run(self) -> tuple[int, int] | None:
        """The first piece, and the piece after the last, of a run that no thread has taken yet."""
        try:
            return self.runs.popleft()
        except IndexError:
            return None

    def target(self, piece: int) -> NDArray[np.uint8] | None:
        """Where a piece's chunk can be read in place; None if its rows are not wanted once each, side by side."""
        rows = slice(self._starts[piece], self._starts[piece + 1])
        num_rows, place = rows.stop - rows.start, self.places[piece]
        if num_rows != self.layout.chunk_rows:
            return None
        if num_rows == 1:
            return self.flat[place : place + 1].reshape(-1)
        if (np.diff(self._ranked[rows]) != 1).any() or (np.diff(self._order[rows]) != 1).any():
            return None
        return self.flat[place : place + num_rows].reshape(-1)

    def scatter(self, piece: int, chunk: NDArray[np.uint8]) -> None:
        """Leave the rows that are wanted of a chunk where they belong."""
        rows = slice(self._starts[piece], self._starts[piece + 1])
        within = self._ranked[rows] % self.layout.chunk_rows
        self.flat[self._order[rows]] = chunk.reshape(self.layout.chunk_rows, -1)[within]

    def _cut(self, chunks: NDArray[np.int64]) -> deque[tuple[int, int]]:
        breaks = (np.diff(chunks) != 1) | (chunks[1:] % self.layout.chunks_per_shard == 0)
        bounds = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(chunks)]
        longest = max(1, min(_RUN_CHUNKS, _RUN_BYTES // self.layout.chunk_bytes))
        return deque(
            (first, min(first + longest, stop))
            for start, stop in itertools.pairwise(bounds)
            for first in range(start, stop, longest)
        )


class ArrayReader(RowReader):
    """The `RowReader` of plain arrays on a local disk. Safe to share by threads."""

    def __init__(self, source: ChunkSource, files: OpenFiles | None = None) -> None:
        self.layout = source.layout
        self._source = source
        self._files = files or OpenFiles()
        self._tables: dict[int, ChunkTable] = {}

    def _fill(self, wanted: NDArray[np.int64], out: NDArray[Any], verify: bool, threads: int) -> None:
        request = _Request(self.layout, wanted, out)
        worth = len(request.runs) if out.nbytes >= _WORTH_A_THREAD_BYTES else 1
        run_on_threads(lambda: self._work(request, verify), min(threads, worth))

    def close(self) -> None:
        self._files.close()
        self._tables.clear()

    def _work(self, request: _Request, verify: bool) -> None:
        """Read run after run until none is left. Every thread of a read does this."""
        try:
            while (run := request.next_run()) is not None:
                first, stop = run
                if stop - first == 1 and request.singles and self._read_row(request, first, verify):
                    continue
                targets = [request.target(piece) for piece in range(first, stop)]
                chunks = [np.empty(self.layout.chunk_bytes, np.uint8) if t is None else t for t in targets]
                self._read_chunks(request.chunks[first], chunks, verify)
                for piece, (target, chunk) in enumerate(zip(targets, chunks, strict=True), first):
                    if target is None:
                        request.scatter(piece, chunk)
        except BaseException:
            request.runs.clear()
            raise

    def _read_row(self, request: _Request, piece: int, verify: bool) -> bool:
        """Read one row that is a chunk of its own, in as few steps as it takes; False leaves it to `_read_chunks`.

        Random rows of a batch come this way. What is not as it should be is named there, with its reason.
        """
        shard, chunk = divmod(request.chunks[piece], self.layout.chunks_per_shard)
        file, table = self._open(shard)
        target, offset = request.flat[request.places[piece]], table.offsets[chunk]
        trailer = bytearray(self._source.trailer_bytes)
        length = len(target) + len(trailer)
        if offset < 0 or table.lengths[chunk] != length:
            return False
        if os.preadv(file.descriptor, (target, trailer) if trailer else (target,), offset) != length:
            return False
        if not verify:
            return True
        checksums = table.checksums
        expected = int.from_bytes(trailer, "little") if checksums is None else checksums[chunk]
        return bool(crc32c(target) == expected)

    def _read_chunks(self, chunk: int, targets: Sequence[NDArray[np.uint8]], verify: bool) -> None:
        """Fill each target with a chunk's bytes, from chunk number `chunk` on, all of one shard, and check them."""
        shard, first = divmod(chunk, self.layout.chunks_per_shard)
        file, table = self._open(shard)
        trailer, offsets, lengths = self._source.trailer_bytes, table.offsets, table.lengths
        place = 0
        while place < len(targets):
            start, offset = place, offsets[first + place]
            if offset < 0:
                raise self._damage(shard, f"chunk {first + place} was never written")
            buffers: list[Any] = []
            end = offset
            while place < len(targets) and offsets[first + place] == end:
                target, length = targets[place], lengths[first + place] - trailer
                if length != len(target):
                    target = self._cut_short(shard, first + place, target, length)
                buffers.append(target)
                if trailer:
                    buffers.append(bytearray(trailer))
                end += length + trailer
                place += 1
            if not file.read_into(buffers, offset, end - offset):
                raise self._damage(shard, f"the file ends inside chunk {first + place - 1}")
            if verify:
                self._verify(shard, range(first + start, first + place), table, buffers)

    def _verify(self, shard: int, chunks: range, table: ChunkTable, buffers: Sequence[Any]) -> None:
        for number, chunk in enumerate(chunks):
            if table.checksums is None:
                payload, expected = buffers[2 * number], int.from_bytes(buffers[2 * number + 1], "little")
            else:
                payload, expected = buffers[number], table.checksums[chunk]
            if crc32c(payload) != expected:
                raise self._damage(shard, f"chunk {chunk} fails its checksum")

    def _cut_short(self, shard: int, chunk: int, target: NDArray[np.uint8], length: int) -> NDArray[np.uint8]:
        """The part of a target that a chunk fills which is not as long as others: the last one where none is padded."""
        if self._source.trailer_bytes or length > len(target):
            trailer = self._source.trailer_bytes
            due = f"{len(target) + trailer} are due"
            raise self._damage(shard, f"chunk {chunk} holds {length + trailer} bytes where {due}")
        return target[:length]

    def _open(self, shard: int) -> tuple[OpenFile, ChunkTable]:
        try:
            file = self._files.get(self._source.key(shard), lambda: self._source.path(shard))
        except FileNotFoundError as error:
            raise self._damage(shard, "the shard is missing") from error
        table = self._tables.get(shard)
        if table is None:
            try:
                table = self._tables[shard] = self._source.table(shard, file)
            except ValueError as error:
                raise self._damage(shard, str(error)) from error
        return file, table

    def _damage(self, shard: int, what: str) -> DamagedStoreError:
        """The error for a shard, which is opened anew at the next read: it may have been mended."""
        self._files.drop(self._source.key(shard))
        self._tables.pop(shard, None)
        return damage(self._source.where(shard), what, self._source.remedy)


def damage(where: object, what: str, remedy: str = REPAIR) -> DamagedStoreError:
    """The error for a file of a store that is not what was written."""
    return DamagedStoreError(f"{where}: {what}; {remedy}")


def _parse_request(
    layout: ArrayLayout, rows: ArrayLike | None, out: NDArray[Any] | None
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """The wanted rows as (R,) int64 and the (R, ...) array to fill, both checked."""
    wanted = np.arange(layout.num_rows) if rows is None else np.asarray(rows).reshape(-1)
    if len(wanted) and wanted.dtype.kind not in "iu":
        raise TypeError(f"{layout.name}: rows are whole numbers, not {wanted.dtype.name}; a mask needs np.flatnonzero")
    wanted = wanted.astype(np.int64, copy=False)
    if len(wanted) and not 0 <= wanted.min() <= wanted.max() < layout.num_rows:
        raise IndexError(f"{layout.name} has {layout.num_rows} rows; asked for {wanted.min()} to {wanted.max()}")
    shape = (len(wanted), *layout.shape[1:])
    if out is None:
        out = np.empty(shape, layout.dtype)
    elif out.shape != shape or out.dtype != layout.dtype or not out.flags.carray:
        raise ValueError(f"{layout.name}: `out` must be writable, C-contiguous {layout.dtype.name} {shape}")
    return wanted, out


def num_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> int:
    """One thread for each core this process may run on, up to `MAX_THREADS`."""
    return min(MAX_THREADS, num_cores())


def run_on_threads(work: Callable[[], None], num_threads: int) -> None:
    """Run `work` on the calling thread and `num_threads - 1` others at once; raise what any of them raises."""
    helpers = [_pool().submit(work) for _ in range(num_threads - 1)]
    try:
        work()
    finally:
        started = [helper for helper in helpers if not helper.cancel()]
        wait(started)
    for helper in started:
        helper.result()


def _after(buffers: Sequence[Any], num_bytes: int) -> Iterator[Any]:
    """What is left of buffers after their first `num_bytes`."""
    for buffer in buffers:
        if num_bytes < len(buffer):
            yield memoryview(buffer)[num_bytes:]  # a slice of a bytearray would be a copy
        num_bytes = max(0, num_bytes - len(buffer))


_pools: dict[int, ThreadPoolExecutor] = {}


def _pool() -> ThreadPoolExecutor:
    """The reading threads of this process; a forked child has none of its parent's and makes its own."""
    if os.getpid() not in _pools:
        _pools[os.getpid()] = ThreadPoolExecutor(2 * MAX_THREADS, thread_name_prefix="headstart-read")
    return _pools[os.getpid()]
