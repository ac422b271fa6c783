"""Rows by way of zarr-python: for compressed arrays, and for stores that are not on a local disk.

Slower than `ArrayReader` by far, and as strict: checksums are always checked, and a chunk that was never written is an
error, where zarr-python alone would give zeros.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import FsspecStore, LocalStore

from cache_schema.atomic import StorePath
from cache_schema.layout import ArrayLayout
from cache_schema.reader import RowReader, damage
from cache_schema.shards import ChunkTable, parse_index


class ZarrReader(RowReader):
    """The `RowReader` of one array of a zarr store, local or remote. `verify` and `threads` change nothing here."""

    def __init__(self, store: StorePath, layout: ArrayLayout) -> None:
        self.layout = layout
        self._store = store
        self._array: zarr.Array[Any] | None = None
        self._tables: dict[int, ChunkTable] = {}

    def _fill(self, wanted: NDArray[np.int64], out: NDArray[Any], verify: bool, threads: int) -> None:
        unique, places = np.unique(wanted, return_inverse=True)
        self._require_chunks(unique)
        bounds = [0, *(np.flatnonzero(np.diff(unique) != 1) + 1).tolist(), len(unique)]
        values = np.empty((len(unique), *self.layout.shape[1:]), self.layout.dtype)
        try:
            for start, stop in itertools.pairwise(bounds):
                values[start:stop] = self._open()[int(unique[start]) : int(unique[stop - 1]) + 1]
        except (ValueError, RuntimeError, OSError) as error:
            where = self._store / self.layout.name
            raise damage(where, f"rows {unique[start]} to {unique[stop - 1]} cannot be read ({error})") from error
        np.take(values, places, axis=0, out=out)

    def close(self) -> None:
        self._array = None
        self._tables.clear()

    def _open(self) -> zarr.Array[Any]:
        if self._array is None:
            self._array = zarr.open_array(_zarr_store(self._store), path=self.layout.name, mode="r")
        return self._array

    def _require_chunks(self, rows: NDArray[np.int64]) -> None:
        """Make sure that every chunk was written."""
        for number in np.unique(rows // self.layout.chunk_rows).tolist():
            shard, chunk = divmod(number, self.layout.chunks_per_shard)
            if shard not in self._tables:
                self._tables[shard] = self._read_index(shard)
            if self._tables[shard].offsets[chunk] < 0:
                raise damage(self._store / self.layout.shard_key(shard), f"chunk {chunk} was never written")

    def _read_index(self, shard: int) -> ChunkTable:
        path = self._store / self.layout.shard_key(shard)
        try:
            tail = np.frombuffer(_read_tail(path, self.layout.index_bytes), np.uint8)
        except FileNotFoundError as error:
            raise damage(path, "the shard is missing") from error
        if len(tail) != self.layout.index_bytes:
            raise damage(path, "the shard is shorter than its index")
        try:
            return parse_index(tail)
        except ValueError as error:
            raise damage(path, str(error)) from error


def _zarr_store(path: StorePath) -> LocalStore | FsspecStore:
    if isinstance(path, Path):
        return LocalStore(path, read_only=True)
    return FsspecStore.from_url(str(path), storage_options=dict(path.storage_options), read_only=True)


def _read_tail(path: StorePath, num_bytes: int) -> bytes:
    if not isinstance(path, Path):
        return bytes(path.fs.cat_file(path.path, start=-num_bytes))
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - num_bytes))
        return file.read()
