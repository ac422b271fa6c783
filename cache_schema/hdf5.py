"""A store as one HDF5 file, for filesystems that dislike many files. Same contract, same values, same speed.

Every array is a contiguous dataset under its own name, so that any HDF5 reader opens it, and so that ours reads rows
by position without HDF5's own machinery. What a zarr store keeps in files beside its arrays lies under /headstart:

    headstart/files/<key>       uint8, one for each JSON file of the zarr store, with its crc32c as an attribute
    headstart/crc32c/<array>    uint32, the crc32c of each chunk of an array

The file is written under a temporary name and published at once: where it is, it is complete.
"""

from __future__ import annotations

import io
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from awscrt.checksums import crc32c
from numpy.typing import NDArray

from cache_schema import atomic
from cache_schema.containers import RECEIPTS
from cache_schema.errors import DamagedStoreError, UsageError
from cache_schema.layout import ArrayLayout
from cache_schema.reader import ArrayReader, OpenFile, OpenFiles, RowReader, damage
from cache_schema.receipts import Receipt, StoredFile
from cache_schema.shards import ChunkTable, encode_shard

SUFFIX = ".h5"

REMEDY = "remove the file and run the command that made it again"

_FILES, _CHECKSUMS = "headstart/files", "headstart/crc32c"


class Hdf5File:
    """The `Container` of a store in one HDF5 file."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UsageError(
                f"no store at {path}: the file is missing. `headstart cache list` shows what a folder holds."
            )
        self.path = path
        self._files: dict[str, bytes] = {}
        self._arrays: dict[str, _Dataset] = {}
        self._open_files = OpenFiles()
        try:
            with h5py.File(path, "r") as file:
                file[_FILES].visititems(self._keep_file)
                file.visititems(self._keep_array)
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise DamagedStoreError(
                f"{path} is no HDF5 file that headstart wrote, or a damaged one ({error})."
            ) from error

    def read_bytes(self, key: str) -> bytes:
        if key not in self._files:
            raise FileNotFoundError(f"{self.path} holds no {key}")
        return self._files[key]

    def receipt_names(self) -> list[str]:
        return sorted(key.removeprefix(f"{RECEIPTS}/") for key in self._files if key.startswith(f"{RECEIPTS}/"))

    def receipt(self, name: str) -> Receipt:
        key = f"{RECEIPTS}/{name}"
        return Receipt.parse(self._files[key], f"{self.path}/{key}")

    def missing(self, receipts: Iterable[Receipt], layouts: Mapping[str, ArrayLayout]) -> list[str]:
        return [
            layout.shard_key(shard)
            for layout in layouts.values()
            if layout.num_rows and not self._holds(layout)
            for shard in range(layout.num_shards)
        ]

    def reader(self, layout: ArrayLayout) -> RowReader:
        if layout.num_rows and not self._holds(layout):
            raise damage(self.path, f"array {layout.name} is missing or has another shape", REMEDY)
        return ArrayReader(self._source(layout), self._open_files)

    def shard_digest(self, layout: ArrayLayout, shard: int) -> str:
        rows = layout.rows_of_shard(shard)
        values = self.reader(layout).read(np.arange(rows.start, rows.stop), threads=1)
        return StoredFile.of(encode_shard(values, layout)).xxh3_128

    def close(self) -> None:
        self._open_files.close()

    def _holds(self, layout: ArrayLayout) -> bool:
        held = self._arrays.get(layout.name)
        return held is not None and held.fits(layout)

    def _source(self, layout: ArrayLayout) -> _Contiguous:
        return _Contiguous(self.path, layout, self._arrays.get(layout.name, _Dataset((), np.dtype(np.uint8), None)))

    def _keep_file(self, key: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset):
            data = node[()].tobytes()
            if crc32c(data) != int(node.attrs["crc32c"]):
                raise damage(self.path, f"{key} fails its checksum", REMEDY)
            self._files[key] = data

    def _keep_array(self, name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and not name.startswith("headstart/"):
            checksums = node.file[f"{_CHECKSUMS}/{name}"][()] if node.size else np.empty(0, np.uint32)
            self._arrays[name] = _Dataset(node.shape, node.dtype, node.id.get_offset(), checksums)


class _Dataset:
    """One contiguous dataset: its shape, its data type, where its bytes begin in the file, and its checksums."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        offset: int | None,
        checksums: NDArray[np.uint32] | None = None,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.offset = offset
        self.checksums = checksums

    def fits(self, layout: ArrayLayout) -> bool:
        num_chunks = -(-layout.num_rows // layout.chunk_rows)
        held = self.checksums is not None and len(self.checksums) == num_chunks and self.offset is not None
        empty = not layout.row_bytes
        return self.shape == layout.shape and self.dtype == layout.dtype and (held or empty)


class _Contiguous:
    """The shards of an array as stretches of one dataset."""

    trailer_bytes = 0
    remedy = REMEDY

    def __init__(self, path: Path, layout: ArrayLayout, dataset: _Dataset) -> None:
        self.layout = layout
        self._path = path
        self._dataset = dataset

    def path(self, shard: int) -> Path:
        return self._path

    def where(self, shard: int) -> str:
        return f"{self._path}/{self.layout.name}"

    def key(self, shard: int) -> Hashable:
        return self._path

    def table(self, shard: int, file: OpenFile) -> ChunkTable:
        layout, dataset = self.layout, self._dataset
        assert dataset.offset is not None
        assert dataset.checksums is not None
        rows = layout.rows_of_shard(shard)
        starts = range(rows.start, rows.stop, layout.chunk_rows)
        first = rows.start // layout.chunk_rows
        return ChunkTable(
            offsets=[dataset.offset + start * layout.row_bytes for start in starts],
            lengths=[(min(start + layout.chunk_rows, rows.stop) - start) * layout.row_bytes for start in starts],
            checksums=dataset.checksums[first : first + len(starts)].tolist(),
        )


def write_hdf5(
    path: Path,
    files: Mapping[str, bytes],
    layouts: Mapping[str, ArrayLayout],
    shards: Iterable[tuple[ArrayLayout, int, NDArray[Any]]],
) -> None:
    """Write a store into one HDF5 file, shard after shard, and publish it when the last is written.

    Args:
        files: the JSON files of the zarr store, by key. Read after the last shard, so they may be filled meanwhile.
        shards: the rows of every shard of every array.
    """
    with atomic.staged(path) as temporary, _Sink(temporary, "x+") as sink, h5py.File(sink, "w", libver="v110") as file:
        checksums = {}
        for name, layout in layouts.items():
            dataset = file.create_dataset(name, layout.shape, layout.dtype, track_times=False)
            for axis, label in enumerate(layout.axes):
                dataset.dims[axis].label = label
            checksums[name] = np.zeros(-(-layout.num_rows // layout.chunk_rows), np.uint32)
        for layout, shard, values in shards:
            rows = layout.rows_of_shard(shard)
            file[layout.name][rows.start : rows.stop] = values
            sink.require_sound()
            for start in range(0, len(values), layout.chunk_rows):
                chunk = np.ascontiguousarray(values[start : start + layout.chunk_rows]).view(np.uint8).reshape(-1)
                checksums[layout.name][(rows.start + start) // layout.chunk_rows] = crc32c(chunk)
        for name, values in checksums.items():
            file.create_dataset(f"{_CHECKSUMS}/{name}", data=values, track_times=False)
        for key, data in files.items():
            node = file.create_dataset(f"{_FILES}/{key}", data=np.frombuffer(data, np.uint8), track_times=False)
            node.attrs["crc32c"] = np.uint32(crc32c(data))


class _Sink(io.FileIO):
    """The file that HDF5 writes. HDF5 hears of no write that failed, for then it crashes in closing; `with` raises it.

    Nothing more is written after a failure.
    """

    _failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        num_bytes = len(view)
        try:
            while view and self._failure is None:
                view = view[super().write(view) :]
        except OSError as error:
            self._failure = error
        return num_bytes

    def require_sound(self) -> None:
        """Raise what the first write that failed raised, if any did."""
        if self._failure is not None:
            raise self._failure

    def __exit__(self, *raised: object) -> None:
        self.close()
        self.require_sound()
