"""Shards: rows to the bytes of one file, and positioned reads of rows out of such files."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import ArrayLike, NDArray

from cache_schema.errors import DamagedStoreError
from cache_schema.layout import CRC_BYTES, ArrayLayout

MISSING = 2**64 - 1
"""Offset and length of a chunk that was never written, as zarr's specification has it."""

MAX_OPEN_SHARDS = 64
"""How many shard files one reader keeps open. A store has a reader for each array, a process 1,024 files by default."""

_REMEDY = "remove the file and run the command that made the store again"


def encode_shard(rows: NDArray[Any], layout: ArrayLayout) -> memoryview:
    """The bytes of the shard that holds `rows`, in one buffer.

    Args:
        rows: (R, ...) with 1 <= R <= `layout.shard_rows` and the layout's data type. Fewer rows than `shard_rows` make
            the last shard: its chunks past the end are left out, and a chunk that is cut short is filled with zeros.
    """
    if rows.dtype != layout.dtype or rows.shape[1:] != layout.shape[1:] or not 1 <= len(rows) <= layout.shard_rows:
        expected = f"1 to {layout.shard_rows} rows of {layout.dtype.name} {layout.shape[1:]}"
        raise ValueError(f"{layout.name}: expected {expected}, got {rows.dtype.name} {rows.shape}")
    num_chunks = -(-len(rows) // layout.chunk_rows)
    stride = layout.chunk_bytes + CRC_BYTES
    buffer = np.zeros(num_chunks * stride + layout.index_bytes, np.uint8)
    chunks = buffer[: num_chunks * stride].reshape(num_chunks, stride)
    payload = np.ascontiguousarray(rows).view(np.uint8).reshape(-1)
    if len(payload) == num_chunks * layout.chunk_bytes:
        chunks[:, :-CRC_BYTES] = payload.reshape(num_chunks, layout.chunk_bytes)
    else:
        padded = np.zeros(num_chunks * layout.chunk_bytes, np.uint8)
        padded[: len(payload)] = payload
        chunks[:, :-CRC_BYTES] = padded.reshape(num_chunks, layout.chunk_bytes)
    for chunk in chunks:
        chunk[-CRC_BYTES:] = _crc32c(chunk[:-CRC_BYTES])
    index = np.full((layout.chunks_per_shard, 2), MISSING, "<u8")
    index[:num_chunks, 0] = np.arange(num_chunks, dtype=np.uint64) * np.uint64(stride)
    index[:num_chunks, 1] = stride
    tail = buffer[num_chunks * stride :]
    tail[:-CRC_BYTES] = index.view(np.uint8).reshape(-1)
    tail[-CRC_BYTES:] = _crc32c(tail[:-CRC_BYTES])
    return buffer.data


def _crc32c(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.array([google_crc32c.value(data)], "<u4").view(np.uint8)


class _Shard:
    """An open shard file and its checked index."""

    def __init__(self, path: Path, layout: ArrayLayout) -> None:
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise DamagedStoreError(f"{path}: the shard is missing; {_REMEDY}") from error
        self._chunk_bytes = layout.chunk_bytes
        try:
            self.index = self._read_index(layout)
        except BaseException:
            self.close()
            raise

    def _read_index(self, layout: ArrayLayout) -> NDArray[np.uint64]:
        """(chunks, 2) offset and length of every chunk, checked against the index's own checksum."""
        size = os.fstat(self.descriptor).st_size
        tail = np.empty(layout.index_bytes, np.uint8)
        if size < len(tail) or os.preadv(self.descriptor, [tail.data], size - len(tail)) != len(tail):
            raise self._damage("the shard is shorter than its index")
        if not np.array_equal(_crc32c(tail[:-CRC_BYTES]), tail[-CRC_BYTES:]):
            raise self._damage("the shard's index fails its checksum")
        index: NDArray[np.uint64] = tail[:-CRC_BYTES].view("<u8").reshape(-1, 2)
        return index

    def read_chunk(self, chunk: int, out: NDArray[np.uint8], verify: bool) -> None:
        """Fill `out`, a flat buffer of a chunk's payload, and check its crc32c if asked."""
        offset, length = (int(value) for value in self.index[chunk])
        if length == MISSING:
            raise self._damage(f"chunk {chunk} was never written")
        if length != self._chunk_bytes + CRC_BYTES:
            raise self._damage(f"chunk {chunk} holds {length} bytes where {self._chunk_bytes + CRC_BYTES} are due")
        buffers = [out]
        if verify:
            buffers.append(checksum := np.empty(CRC_BYTES, np.uint8))
        if os.preadv(self.descriptor, [buffer.data for buffer in buffers], offset) != sum(map(len, buffers)):
            raise self._damage(f"the file ends inside chunk {chunk}")
        if verify and not np.array_equal(_crc32c(out), checksum):
            raise self._damage(f"chunk {chunk} fails its checksum")

    def close(self) -> None:
        os.close(self.descriptor)

    def _damage(self, what: str) -> DamagedStoreError:
        return DamagedStoreError(f"{self.path}: {what}; {_REMEDY}")


class ArrayReader:
    """Reads rows of one array of a store, in any order, straight into a caller's buffer. Safe to share by threads."""

    def __init__(self, store: Path, layout: ArrayLayout) -> None:
        self.layout = layout
        self._store = store
        self._shards: OrderedDict[int, _Shard] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.layout.dtype

    def __len__(self) -> int:
        return self.layout.num_rows

    def read(self, rows: ArrayLike | None = None, out: NDArray[Any] | None = None, verify: bool = True) -> NDArray[Any]:
        """Rows `rows` (R,), all of them by default, as a (R, ...) array.

        Args:
            out: a C-contiguous (R, ...) array of the layout's data type to fill instead of a new one.
            verify: check the crc32c of every chunk that is read.

        Raises:
            TypeError, IndexError: a row is no whole number, or out of range.
            DamagedStoreError: a shard or a chunk is missing, cut short or fails its checksum. Never zeros instead.
        """
        layout = self.layout
        wanted = np.arange(layout.num_rows) if rows is None else np.asarray(rows).reshape(-1)
        if len(wanted) and wanted.dtype.kind not in "iu":
            raise TypeError(
                f"{layout.name}: rows are whole numbers, not {wanted.dtype.name}; a mask needs np.flatnonzero"
            )
        wanted = wanted.astype(np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < layout.num_rows:
            raise IndexError(f"{layout.name} has {layout.num_rows} rows; asked for {wanted.min()} to {wanted.max()}")
        shape = (len(wanted), *layout.shape[1:])
        if out is None:
            out = np.empty(shape, layout.dtype)
        elif out.shape != shape or out.dtype != layout.dtype or not out.flags.carray:
            raise ValueError(f"{layout.name}: `out` must be writable, C-contiguous {layout.dtype.name} {shape}")
        if not len(wanted) or not layout.row_bytes:
            return out
        flat = out.reshape(len(wanted), -1).view(np.uint8)
        order = np.argsort(wanted, kind="stable")
        chunk_of = wanted // layout.chunk_rows
        boundaries = np.flatnonzero(np.diff(chunk_of[order])) + 1
        scratch = np.empty((layout.chunk_rows, layout.row_bytes), np.uint8)
        with self._lock:
            for group in np.split(order, boundaries):
                shard, chunk = divmod(int(chunk_of[group[0]]), layout.chunks_per_shard)
                if layout.chunk_rows == 1:
                    self._open(shard).read_chunk(chunk, flat[group[0]], verify)
                    flat[group[1:]] = flat[group[0]]
                else:
                    self._open(shard).read_chunk(chunk, scratch.reshape(-1), verify)
                    flat[group] = scratch[wanted[group] % layout.chunk_rows]
        return out

    def close(self) -> None:
        """Close every shard file; a later read opens them again."""
        with self._lock:
            while self._shards:
                self._shards.popitem()[1].close()

    def __del__(self) -> None:
        for shard in self._shards.values():
            shard.close()

    def _open(self, number: int) -> _Shard:
        if number in self._shards:
            self._shards.move_to_end(number)
            return self._shards[number]
        if len(self._shards) >= MAX_OPEN_SHARDS:
            self._shards.popitem(last=False)[1].close()
        shard = _Shard(self._store / self.layout.shard_key(number), self.layout)
        self._shards[number] = shard
        return shard
