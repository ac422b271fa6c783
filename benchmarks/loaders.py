"""Loaders: each hands out batches of all rows once, in random order, as torch tensors, the way one would train on them.

Those with worker processes are forked, as on Linux is their default, and keep their workers from pass to pass.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import types
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from benchmarks.arrays import ARRAY, store_of
from benchmarks.common import Library
from benchmarks.contenders import Contender
from benchmarks.rows import DTYPE, Pass, Rows
from cache_schema.store import open_store

TORCH = Library("torch", "torch")
LITDATA = Library("litdata", "litdata")
STREAMING = Library("mosaicml-streaming", "streaming")
WEBDATASET = Library("webdataset", "webdataset")

FAMILIES = ("DataLoader over memmap", "litdata", "streaming", "webdataset")
"""The peers. Each takes part several times, set up in several ways, and is compared by the fastest of them."""

SHUFFLE_ROWS = 256
"""webdataset shuffles within a buffer of so many rows, and besides that the order of its files."""


def contenders() -> list[Contender]:
    """Ours and the peers."""
    workers_named = {0: "0 workers", 1: "1 worker", 2: "2 workers"}
    ours = [
        Contender(loader_name(reuse, verify), partial(load_store, reuse=reuse, verify=verify), note="2 threads")
        for reuse in (False, True)
        for verify in (False, True)
    ]
    mapped = [
        Contender(
            f"DataLoader over memmap, {what}, {workers_named[workers]}",
            partial(load_mapped, whole_batches=whole_batches, workers=workers),
            TORCH,
            workers=workers,
        )
        for what, whole_batches in (("rows", False), ("batches", True))
        for workers in (0, 2)
    ]
    streams = [
        Contender(f"{name}, {workers_named[workers]}", partial(load, workers=workers), library, True, workers, note)
        for name, load, library, note in (
            ("litdata", load_litdata, LITDATA, "tensors, chunks of 64 MB, uncompressed"),
            ("streaming", load_streaming, STREAMING, "ndarray encoding, shards of 64 MB, uncompressed"),
            ("webdataset", load_webdataset, WEBDATASET, f"raw bytes, shuffle({SHUFFLE_ROWS})"),
        )
        for workers in (0, 1, 2)
    ]
    return [*ours, *mapped, *streams]


def loader_name(reuse: bool, verify: bool) -> str:
    """What our reader is called where it is a loader."""
    return f"reader into {'one tensor' if reuse else 'new tensors'}{', verified' if verify else ''}"


@contextlib.contextmanager
def load_store(rows: Rows, reuse: bool, verify: bool) -> Iterator[Pass]:
    """Our reader, filling the memory of torch tensors: one again and again, or a new one for every batch.

    New memory comes from numpy, as it does in `MappedBatches`: numpy asks for huge pages and torch does not, and the
    faults of small ones take longer than the reading.
    """

    def read(wanted: NDArray[np.int64]) -> torch.Tensor:
        out = buffer[: len(wanted)] if reuse else np.empty((len(wanted), *rows.row_shape), DTYPE)
        return torch.from_numpy(reader.read(wanted, out=out, verify=verify, threads=2))

    store = open_store(store_of(rows))
    reader, buffer = store.array(ARRAY), rows.buffer()
    yield rows.in_order(read)
    store.close()


class MappedRows(Dataset[torch.Tensor]):
    """A map-style dataset over one .npy file that every process maps for itself."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._mapped: NDArray[Any] | None = None

    def __len__(self) -> int:
        return self._rows.num_rows

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.from_numpy(self.mapped[row])

    @property
    def mapped(self) -> NDArray[Any]:
        if self._mapped is None:
            self._mapped = self._rows.open(writable=True)
        return self._mapped


class MappedBatches(MappedRows):
    """The same, but fetches a batch at once."""

    def __getitems__(self, wanted: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(np.take(self.mapped, wanted, axis=0, mode="clip"))


@contextlib.contextmanager
def load_mapped(rows: Rows, whole_batches: bool, workers: int) -> Iterator[Pass]:
    """torch's DataLoader over a mapped file, with its own collation of rows or none."""
    batches = [batch.tolist() for batch in rows.batches()]
    if whole_batches:
        loader = DataLoader(MappedBatches(rows), batch_sampler=batches, collate_fn=_as_it_is, **_processes(workers))
    else:
        loader = DataLoader(MappedRows(rows), batch_sampler=batches, **_processes(workers))
    yield lambda: loader


@contextlib.contextmanager
def load_litdata(rows: Rows, workers: int) -> Iterator[Pass]:
    """litdata. Its tensors are views of the mapped chunk; as numpy arrays the same rows take ten times as long."""
    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.item_loader import PyTreeLoader
    from litdata.streaming.writer import BinaryWriter

    def make(path: Path) -> None:
        path.mkdir()
        writer = BinaryWriter(str(path), chunk_bytes="64MB", compression=None)
        for number, row in _numbered(rows):
            writer[number] = torch.from_numpy(row)
        writer.done()
        writer.merge(1)

    chunks = PyTreeLoader()
    dataset = StreamingDataset(str(rows.copy("litdata", make)), item_loader=chunks, shuffle=True, drop_last=False)
    loader = StreamingDataLoader(dataset, batch_size=rows.batch_rows, **_processes(workers))
    yield lambda: loader
    chunks.close(0)  # it would keep the last chunks mapped, and so in the page cache


@contextlib.contextmanager
def load_streaming(rows: Rows, workers: int) -> Iterator[Pass]:
    """MosaicML streaming from local shards. Two of its datasets must not share a folder: each has links of its own."""
    if not Library("torchvision", "torchvision").is_installed:
        # Importing streaming imports its datasets of pictures, and they torchvision. Nothing here needs either.
        sys.modules.setdefault("streaming.vision", types.ModuleType("streaming.vision"))
    from streaming import MDSWriter, StreamingDataLoader, StreamingDataset

    def make(path: Path) -> None:
        columns = {"rows": f"ndarray:{DTYPE.name}:{','.join(map(str, rows.row_shape))}"}
        with MDSWriter(out=str(path), columns=columns, compression=None, hashes=[], size_limit="64mb") as writer:
            for _, row in _numbered(rows):
                writer.write({"rows": row})

    def link(path: Path) -> None:
        shutil.copytree(rows.copy("streaming", make), path, copy_function=os.link)

    logging.getLogger("streaming").setLevel(logging.ERROR)
    folder = rows.copy(f"streaming-{workers}", link)
    dataset = StreamingDataset(local=str(folder), remote=None, shuffle=True, batch_size=rows.batch_rows)
    loader = StreamingDataLoader(dataset, batch_size=rows.batch_rows, **_processes(workers))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # its decoded rows, in collation
        yield lambda: (batch["rows"] for batch in loader)


@contextlib.contextmanager
def load_webdataset(rows: Rows, workers: int) -> Iterator[Pass]:
    """webdataset from local tar files, one for each batch of rows."""
    from webdataset import ShardWriter, WebDataset, WebLoader

    def make(path: Path) -> None:
        path.mkdir()
        with ShardWriter(f"{path}/%06d.tar", maxcount=rows.batch_rows, verbose=0) as writer:
            for number, row in _numbered(rows):
                writer.write({"__key__": f"{number:06d}", "bin": row.tobytes()})

    files = sorted(map(str, rows.copy("webdataset", make).glob("*.tar")))
    dataset = (
        WebDataset(files, shardshuffle=len(files), empty_check=False)
        .shuffle(SHUFFLE_ROWS)
        .map(partial(_decode, shape=rows.row_shape))
        .batched(rows.batch_rows, collation_fn=_stack)
    )
    loader = WebLoader(dataset, batch_size=None, **_processes(workers))
    yield lambda: loader


def _processes(workers: int) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "multiprocessing_context": "fork" if workers else None,
    }


def _numbered(rows: Rows) -> Iterator[tuple[int, NDArray[Any]]]:
    return enumerate(row for _, shard in rows.shards() for row in shard)


def _as_it_is(batch: Any) -> Any:
    return batch


def _decode(sample: dict[str, Any], shape: tuple[int, ...]) -> NDArray[Any]:
    return np.frombuffer(sample["bin"], DTYPE).reshape(shape)


def _stack(batch: list[NDArray[Any]]) -> torch.Tensor:
    return torch.from_numpy(np.stack(batch))
