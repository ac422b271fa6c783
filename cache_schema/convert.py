"""Conversion: the same store in another container, every value to the bit, and back to the same digests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cache_schema import atomic
from cache_schema.atomic import StorePath, json_bytes
from cache_schema.errors import UsageError
from cache_schema.hdf5 import REMEDY, write_hdf5
from cache_schema.hdf5 import SUFFIX as HDF5_SUFFIX
from cache_schema.layout import ArrayLayout, parse_shard_key
from cache_schema.reader import REPAIR, damage
from cache_schema.receipts import Manifest, Receipt, StoredFile
from cache_schema.shards import encode_shard
from cache_schema.store import STATIC_UNIT, Store, StoreWriter, ledger_lines, open_store

ContainerName = Literal["zarr", "hdf5"]

Progress = Callable[[int, int], None]


def convert_store(
    source: StorePath,
    out: StorePath,
    container: ContainerName,
    *,
    zstd_level: int | None = None,
    progress: Progress | None = None,
) -> StorePath:
    """Write a complete store again under `out`, in another container or with other compression.

    A conversion that was killed goes on where it was if it leaves the shards as they are, and begins anew otherwise.

    Args:
        zstd_level: compress chunks; None writes the plain layout, which alone is read at full speed.
        progress: called with (shards done, shards in all).

    Returns:
        Where the store is now.

    Raises:
        UsageError: there is no complete store, or it would be written over itself.
        DamagedStoreError: what is read is not what the receipts say.
    """
    store = open_store(source)
    if zstd_level is not None and not 1 <= zstd_level <= 22:
        raise UsageError(f"zstd level {zstd_level} does not exist: give one from 1 to 22.")
    stem, total = store.header.stem, sum(layout.num_shards for layout in store.layouts.values())
    if container == "hdf5" and (zstd_level is not None or not isinstance(out, Path)):
        raise UsageError("an HDF5 file is neither compressed nor remote; leave --zstd out and name a local folder.")
    target = out / f"{stem}{HDF5_SUFFIX}" if container == "hdf5" else out / store.header.folder_name
    if target.exists() and target.resolve() == source.resolve():
        raise UsageError(f"{target} is the store itself; name another folder with --out, or another container.")
    layouts = {name: dataclasses.replace(layout, zstd_level=zstd_level) for name, layout in store.layouts.items()}
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    if isinstance(target, Path) and container == "hdf5":
        _to_hdf5(store, target, layouts, step)
    else:
        _to_zarr(store, out, layouts, step)
    store.close()
    return target


def _to_zarr(store: Store, out: StorePath, layouts: dict[str, ArrayLayout], step: Callable[[], None]) -> None:
    header = store.header.moved(store.path, out / store.header.folder_name)
    writer = StoreWriter(out, header, list(layouts.values()), ())
    writer.declare()
    receipts = store.receipts()
    for receipt in receipts:
        done = layouts == store.layouts and writer.is_done(receipt.unit, receipt.files)
        shards = {}
        for layout, shard in _shards_of(receipt, layouts):
            if not done:
                shards[layout.name, shard] = _read_shard(store, receipt, layout, shard)
            step()
        if not done:
            atomic.remove(writer.path / "manifest.json")  # what is there is not the store it says it is
            writer.commit(receipt.unit, receipt.rows, shards, receipt.failures, receipt.rates)
    writer.finish(receipt.unit for receipt in receipts if receipt.unit != STATIC_UNIT)


def _to_hdf5(store: Store, target: Path, layouts: dict[str, ArrayLayout], step: Callable[[], None]) -> None:
    header = store.header.moved(store.path, target)
    files = {"zarr.json": json_bytes(header.to_root(layouts))}

    def shards() -> Iterator[tuple[ArrayLayout, int, NDArray[Any]]]:
        written = []
        for receipt in store.receipts():
            stored = {}
            for layout, shard in _shards_of(receipt, layouts):
                values = _read_shard(store, receipt, layout, shard)
                stored[layout.shard_key(shard)] = StoredFile.of(encode_shard(values, layout))
                yield layout, shard, values
                step()
            written.append(dataclasses.replace(receipt, files=stored))
        files.update({f"receipts/{receipt.unit}.json": json_bytes(receipt.to_dict()) for receipt in written})
        files["ledger.jsonl"] = ledger_lines(written)
        files["manifest.json"] = json_bytes(Manifest.of(header.fingerprint, written).to_dict())

    write_hdf5(target, files, layouts, shards())


def _shards_of(receipt: Receipt, layouts: dict[str, ArrayLayout]) -> Iterator[tuple[ArrayLayout, int]]:
    """The shards a receipt names."""
    for key in receipt.files:
        name, shard = parse_shard_key(key)
        yield layouts[name], shard


def _read_shard(store: Store, receipt: Receipt, layout: ArrayLayout, shard: int) -> NDArray[Any]:
    """The rows of a shard, once its digest was found to be the one its receipt names."""
    key = layout.shard_key(shard)
    if store.container.shard_digest(store.layouts[layout.name], shard) != receipt.files[key].xxh3_128:
        remedy = REMEDY if store.path.suffix == HDF5_SUFFIX else REPAIR
        raise damage(f"{store.path}/{key}", "its bytes are not the ones that were written", remedy)
    rows = layout.rows_of_shard(shard)
    return store.array(layout.name).read(np.arange(rows.start, rows.stop))
