"""Writers: each writes the same shards one after the other, and everything it wrote is on the disk when it is done."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.arrays import ARRAY, TENSORSTORE, ZARR, writer_of
from benchmarks.common import Library
from benchmarks.rows import DTYPE, WrongBytesError
from cache_schema.store import Commits

Shards = Sequence[NDArray[Any]]
"""Arrays of the same shape, (R, ...)."""

Write = Callable[[Shards], None]

OURS = "writer"
RAW = "raw write"
PEERS = ("zarr-python write", "tensorstore write")


@dataclass(frozen=True)
class Writer:
    """One way to write. `open` makes what there is to make before the first shard, and returns what writes them."""

    name: str
    open: Callable[[Path, Shards], Write]
    read_back: Callable[[Path, Shards], NDArray[Any]]
    library: Library | None = None
    note: str = ""

    @property
    def is_installed(self) -> bool:
        return self.library is None or self.library.is_installed

    def rate(self, folder: Path, shards: Shards) -> float:
        """Write all shards into the new folder `folder`, remove it, and return the GB/s of the writing alone."""
        folder.mkdir()
        write = self.open(folder, shards)
        start = time.perf_counter()
        write(shards)
        seconds = time.perf_counter() - start
        shutil.rmtree(folder)
        return sum(shard.nbytes for shard in shards) / seconds / 1e9

    def require(self, folder: Path, shards: Shards) -> None:
        """Write once, untimed, and hold what lies in the files to what was to be written.

        Raises:
            WrongBytesError: this writer wrote other bytes.
        """
        folder.mkdir()
        self.open(folder, shards)(shards)
        same = self.read_back(folder, shards).tobytes() == b"".join(shard.tobytes() for shard in shards)
        shutil.rmtree(folder)
        if not same:
            raise WrongBytesError(f"{self.name} did not write the rows it was given")


def writers() -> list[Writer]:
    """Ours, the limit and the peers."""
    return [
        Writer(RAW, open_raw, read_raw, note="a new file for each shard, fsync"),
        Writer(OURS, open_ours, read_zarr, note="three threads; shards, checksums, digests and receipts"),
        Writer("zarr-python write", open_zarr, read_zarr, ZARR, "our layout; fsync added"),
        Writer("tensorstore write", open_tensorstore, read_zarr, TENSORSTORE, "our layout; its own fsync"),
    ]


def open_raw(folder: Path, shards: Shards) -> Write:
    """The bytes and nothing else, each shard in a new file that is synced and closed."""

    def write(shards: Shards) -> None:
        for number, shard in enumerate(shards):
            with (folder / str(number)).open("xb", buffering=0) as file:
                view = shard.data.cast("B")
                while view:
                    view = view[file.write(view) :]
                os.fsync(file.fileno())

    return write


def open_ours(folder: Path, shards: Shards) -> Write:
    """Our writer, as an extraction job drives it; each shard is a unit of work."""
    writer = writer_of(folder, _shape(shards), len(shards[0]))
    writer.begin()

    def write(shards: Shards) -> None:
        with Commits(writer.commit) as commits:
            for number, shard in enumerate(shards):
                start = number * len(shard)
                commits.commit(f"{number:06d}", (start, start + len(shard)), {(ARRAY, number): shard})

    return write


def open_zarr(folder: Path, shards: Shards) -> Write:
    """zarr-python. It does not sync, so each shard is synced after it."""
    import zarr

    layout = writer_of(folder, _shape(shards), len(shards[0])).layouts[ARRAY]
    array = zarr.open_array(_empty_array(folder, shards), mode="r+")

    def write(shards: Shards) -> None:
        for number, shard in enumerate(shards):
            array[number * len(shard) : (number + 1) * len(shard)] = shard
            descriptor = os.open(folder / layout.shard_key(number), os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    return write


def open_tensorstore(folder: Path, shards: Shards) -> Write:
    """tensorstore, which syncs by default."""
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{_empty_array(folder, shards)}/"}}
    array = tensorstore.open(spec, read=True, write=True).result()

    def write(shards: Shards) -> None:
        for number, shard in enumerate(shards):
            array[number * len(shard) : (number + 1) * len(shard)].write(shard).result()

    return write


def read_raw(folder: Path, shards: Shards) -> NDArray[Any]:
    return np.concatenate([np.fromfile(folder / str(number), DTYPE) for number in range(len(shards))])


def read_zarr(folder: Path, shards: Shards) -> NDArray[Any]:
    import zarr

    (metadata,) = folder.rglob(f"{ARRAY}/zarr.json")
    return np.asarray(zarr.open_array(metadata.parent, mode="r")[:])


def _empty_array(folder: Path, shards: Shards) -> Path:
    """An array in our layout that holds nothing yet."""
    path = folder / ARRAY
    path.mkdir(parents=True)
    layout = writer_of(folder, _shape(shards), len(shards[0])).layouts[ARRAY]
    (path / "zarr.json").write_text(json.dumps(layout.to_metadata()))
    return path


def _shape(shards: Shards) -> tuple[int, ...]:
    return (sum(map(len, shards)), *shards[0].shape[1:])
