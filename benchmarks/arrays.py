"""Array readers: each is told which rows to read, in random order, and returns them as one numpy array.

Every one is set up the fastest way its public interface allows, as far as we found one: a buffer that is filled again
and again instead of new memory, and no selection machinery where rows can be read one by one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import Library
from benchmarks.contenders import Contender
from benchmarks.rows import DTYPE, Pass, Rows
from cache_schema.convert import convert_store
from cache_schema.layout import ArrayLayout
from cache_schema.store import StoreHeader, StoreWriter, open_store

ARRAY = "features/last"

GATHER = "memmap gather"
PACKED = "reader of HDF5, 2 threads"

PEERS = ("h5py contiguous", "h5py chunked", "zarr-python oindex", "zarr-python rows", "zarrs", "tensorstore")

H5PY = Library("h5py", "h5py")
ZARR = Library("zarr", "zarr")
ZARRS = Library("zarrs", "zarrs")
TENSORSTORE = Library("tensorstore", "tensorstore")


def contenders(slow_rows: int) -> list[Contender]:
    """Ours and the peers. The slowest reads only `slow_rows` rows in a pass."""
    ours = [
        Contender(reader_name(threads, verify), partial(read_store, threads=threads, verify=verify))
        for verify in (False, True)
        for threads in (1, 2)
    ]
    return [
        Contender(GATHER, gather, note="np.take into a buffer: the limit of one thread"),
        *ours,
        Contender(PACKED, partial(read_store, threads=2, verify=False, packed=True), note="our store in one HDF5 file"),
        Contender("h5py contiguous", partial(read_hdf5, chunked=False), H5PY, note="low-level read of each row"),
        Contender("h5py chunked", partial(read_hdf5, chunked=True), H5PY, note="read_direct_chunk"),
        Contender(
            "zarr-python oindex",
            partial(read_zarr_oindex, num_rows=slow_rows),
            ZARR,
            note=f"our store; only the first {slow_rows} rows",
        ),
        Contender("zarr-python rows", read_zarr_rows, ZARR, note="our store; asynchronous, row by row"),
        Contender(
            "zarrs",
            partial(read_zarr_rows, pipeline="zarrs.ZarrsCodecPipeline"),
            ZARRS,
            note="our store; asynchronous, row by row",
        ),
        Contender("tensorstore", read_tensorstore, TENSORSTORE, note="our store"),
    ]


def reader_name(threads: int, verify: bool) -> str:
    """What our reader is called in reports."""
    return f"reader, {threads} thread{'s' if threads > 1 else ''}{', verified' if verify else ''}"


@contextlib.contextmanager
def read_store(rows: Rows, threads: int, verify: bool, packed: bool = False) -> Iterator[Pass]:
    """Our reader, of shards or of one HDF5 file."""
    store = open_store(packed_store_of(rows) if packed else store_of(rows))
    reader, buffer = store.array(ARRAY), rows.buffer()
    yield rows.in_order(lambda r: reader.read(r, out=buffer[: len(r)], verify=verify, threads=threads))
    store.close()


@contextlib.contextmanager
def gather(rows: Rows) -> Iterator[Pass]:
    """numpy alone, on a mapped file. With mode="clip" np.take writes to `out` without a copy in between."""
    mapped, buffer = rows.open(), rows.buffer()
    yield rows.in_order(lambda r: np.take(mapped, r, axis=0, out=buffer[: len(r)], mode="clip"))


@contextlib.contextmanager
def read_hdf5(rows: Rows, chunked: bool) -> Iterator[Pass]:
    """h5py, row by row below its selection machinery, which takes longer than the reading."""
    import h5py

    def make(path: Path) -> None:
        chunks = (1, *rows.row_shape) if chunked else None
        with h5py.File(path, "w") as file:
            target = file.create_dataset("rows", rows.shape, DTYPE, chunks=chunks)
            for number, shard in rows.shards():
                start = number * rows.batch_rows
                target[start : start + len(shard)] = shard

    def read_chunks(wanted: NDArray[np.int64]) -> NDArray[Any]:
        for place, row in enumerate(wanted.tolist()):
            dataset.read_direct_chunk((row, *origin), out=flat[place])
        return buffer[: len(wanted)]

    def read_rows(wanted: NDArray[np.int64]) -> NDArray[Any]:
        for place, row in enumerate(wanted.tolist()):
            place_in_file.select_hyperslab((row, *origin), (1, *rows.row_shape))
            dataset.read(place_in_memory, place_in_file, buffer[place : place + 1])
        return buffer[: len(wanted)]

    buffer = rows.buffer()
    flat = buffer.reshape(len(buffer), -1).view(np.uint8)
    origin = (0,) * len(rows.row_shape)
    with h5py.File(rows.copy("chunked.h5" if chunked else "contiguous.h5", make), "r") as file:
        dataset = file["rows"].id
        place_in_file = dataset.get_space()
        place_in_memory = h5py.h5s.create_simple((1, *rows.row_shape))
        yield rows.in_order(read_chunks if chunked else read_rows)


@contextlib.contextmanager
def read_zarr_oindex(rows: Rows, num_rows: int) -> Iterator[Pass]:
    """zarr-python as one would write it first."""
    import zarr

    array = zarr.open_array(store_of(rows) / ARRAY, mode="r")
    yield rows.in_order(lambda wanted: array.oindex[wanted], num_rows)


@contextlib.contextmanager
def read_zarr_rows(rows: Rows, pipeline: str | None = None) -> Iterator[Pass]:
    """zarr-python, all rows of a batch at once through its asynchronous interface; `pipeline` is what decodes them."""
    import zarr
    from zarr.api.asynchronous import open_array

    async def read(wanted: NDArray[np.int64]) -> NDArray[Any]:
        found = await asyncio.gather(*(array.getitem(row) for row in wanted.tolist()))
        for place, row in enumerate(found):
            buffer[place] = row
        return buffer[: len(found)]

    buffer = rows.buffer()
    with asyncio.Runner() as runner:
        with zarr.config.set({"codec_pipeline.path": pipeline} if pipeline else {}):
            array = runner.run(open_array(store=store_of(rows) / ARRAY, mode="r"))
        yield rows.in_order(lambda wanted: runner.run(read(wanted)))


@contextlib.contextmanager
def read_tensorstore(rows: Rows) -> Iterator[Pass]:
    """tensorstore, straight into a buffer. A cache of chunks (`cache_pool`) makes it slower here, so it has none."""
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{store_of(rows) / ARRAY}/"}}
    limits = {name: {"limit": 2} for name in ("data_copy_concurrency", "file_io_concurrency")}
    array = tensorstore.open(spec, context=tensorstore.Context(limits), read=True).result()

    def read(wanted: NDArray[np.int64]) -> NDArray[Any]:
        out = buffer[: len(wanted)]
        tensorstore.array(out).write(array[wanted]).result()
        return out

    buffer = rows.buffer()
    yield rows.in_order(read)


def store_of(rows: Rows) -> Path:
    """Our store of the rows, in shards of a batch; also what zarr-python, zarrs and tensorstore read."""
    writer = writer_of(rows.folder / "stores", rows.shape, rows.batch_rows)

    def make(path: Path) -> None:
        writer.begin()
        units = []
        for number, shard in rows.shards():
            start = number * rows.batch_rows
            units.append(f"{number:06d}")
            writer.commit(units[-1], (start, start + len(shard)), {(ARRAY, number): shard})
        writer.finish(units)

    return rows.copy(f"stores/{writer.path.name}", make)


def packed_store_of(rows: Rows) -> Path:
    """The same store in one HDF5 file."""
    store = store_of(rows)

    def make(path: Path) -> None:
        convert_store(store, path.parent, "hdf5")

    return rows.copy(f"packed/{store.stem}.h5", make)


def writer_of(parent: Path, shape: tuple[int, ...], shard_rows: int) -> StoreWriter:
    """Our writer of an array of rows, with nothing else in its store."""
    axes = ("view", *(f"axis_{number}" for number in range(1, len(shape))))
    layout = ArrayLayout(ARRAY, shape, DTYPE, chunk_rows=1, shard_rows=shard_rows, axes=axes)
    return StoreWriter(parent, StoreHeader("image_features", {"benchmark": "reader"}, {}), [layout], static=[])
