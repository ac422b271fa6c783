"""Verification: is every byte of a store what was written, and if not, where."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cache_schema.atomic import StorePath
from cache_schema.containers import Container, Folder
from cache_schema.errors import DamagedStoreError, UsageError
from cache_schema.layout import ArrayLayout
from cache_schema.reader import default_threads
from cache_schema.receipts import Manifest, Receipt, StoredFile
from cache_schema.store import StoreHeader, ledger_lines, node_metadata, open_container


@dataclass(frozen=True)
class Damage:
    """A file of a store that is not what was written. `unit` is the unit of work it belongs to, if it does to one."""

    key: str
    reason: str
    unit: str | None = None


@dataclass(frozen=True)
class Verification:
    """What a check of a store found. `num_checked` of `num_shards` shards were read, `num_bytes` in all."""

    path: StorePath
    num_shards: int
    num_checked: int
    num_bytes: int
    damages: tuple[Damage, ...]

    @property
    def is_sound(self) -> bool:
        return not self.damages

    def summary(self) -> str:
        """One sentence for people."""
        read = f"{self.num_checked} of {self.num_shards} shards read ({self.num_bytes / 1e6:.1f} MB)"
        verdict = "sound" if self.is_sound else f"{len(self.damages)} DAMAGED"
        return f"{self.path}: {read}, {verdict}"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "sound": self.is_sound}


def verify_store(
    path: StorePath,
    *,
    sample: float = 1.0,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Check a store's metadata, manifest and receipts, and the digest of every shard.

    A shard's digest covers its chunks, their checksums and its index, so that no bit of it can change unseen. In an
    HDF5 file the checksum of every chunk is checked first, and the digest is that of the shard the rows would make.

    Args:
        sample: share of the shards to read, drawn at random from `seed`; metadata and sizes are always checked.
        threads: how many shards are read at a time; by default one for each core.
        progress: called with (bytes read, bytes to read) after each shard.

    Raises:
        UsageError: there is no store, or `sample` is no share.
        DamagedStoreError: the root metadata is damaged, so that nothing can be said of the rest.
    """
    if not 0 < sample <= 1:
        raise UsageError(f"sample is {sample}: give a share of the shards above 0 and up to 1.")
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}: give a whole number of at least 1.")
    container = open_container(path)
    root = container.read_bytes("zarr.json")
    header, layouts = StoreHeader.parse(root, path)
    damages = _check_metadata(container, layouts)
    receipts, unreadable = _read_receipts(container)
    damages += unreadable
    damages += _check_manifest(container, header, receipts, complete=not unreadable)
    if json.loads(root) != header.to_root(layouts):
        damages.append(Damage("zarr.json", "the metadata of the group is not what was written"))
    shards = {
        layout.shard_key(shard): (layout, shard) for layout in layouts.values() for shard in range(layout.num_shards)
    }
    files = {key: (receipt.unit, stored) for receipt in receipts for key, stored in receipt.files.items()}
    damages += [Damage(key, "no receipt names this shard") for key in shards.keys() - files.keys()]
    damages += [Damage(key, "no array has this shard", unit) for key, (unit, _) in files.items() if key not in shards]
    absent = set(container.missing(receipts, layouts))
    damages += [Damage(key, "the shard is missing or has another size", files[key][0]) for key in absent & files.keys()]
    known = sorted(files.keys() & shards.keys() - absent)
    drawn = np.random.default_rng(seed).permutation(len(known))[: int(np.ceil(sample * len(known)))]
    chosen = [known[place] for place in sorted(drawn.tolist())]
    total, done = sum(files[key][1].num_bytes for key in chosen), 0

    def check(key: str) -> Damage | None:
        unit, stored = files[key]
        reason = _check_shard(container, *shards[key], stored)
        return None if reason is None else Damage(key, reason, unit)

    with ThreadPoolExecutor(threads or default_threads(), thread_name_prefix="verify") as pool:
        for key, found in zip(chosen, pool.map(check, chosen), strict=True):
            damages += [found] if found else []
            done += files[key][1].num_bytes
            if progress is not None:
                progress(done, total)
    container.close()
    damages.sort(key=lambda damage: damage.key)
    return Verification(path, len(shards), len(chosen), total, tuple(damages))


def _check_shard(container: Container, layout: ArrayLayout, shard: int, stored: StoredFile) -> str | None:
    """Why a shard is not what its receipt says; None if it is."""
    try:
        digest = container.shard_digest(layout, shard)
    except DamagedStoreError as error:
        return str(error)
    return None if digest == stored.xxh3_128 else "its bytes are not the ones that were written"


def _check_metadata(container: Container, layouts: Mapping[str, ArrayLayout]) -> list[Damage]:
    """The zarr.json of every array and group, which an HDF5 file does not have."""
    if not isinstance(container, Folder):
        return []
    damages = []
    for name, value in node_metadata(layouts).items():
        key = f"{name}/zarr.json"
        try:
            if json.loads(container.read_bytes(key)) != value:
                damages.append(Damage(key, "the metadata is not what was written"))
        except FileNotFoundError:
            damages.append(Damage(key, "the metadata is missing"))
        except ValueError as error:
            damages.append(Damage(key, f"the metadata cannot be read ({error})"))
    return damages


def _read_receipts(container: Container) -> tuple[list[Receipt], list[Damage]]:
    receipts, damages = [], []
    for name in container.receipt_names():
        try:
            receipts.append(container.receipt(name))
        except DamagedStoreError as error:
            damages.append(Damage(f"receipts/{name}", str(error), name.removesuffix(".json")))
    return receipts, damages


def _check_ledger(container: Container, receipts: list[Receipt]) -> list[Damage]:
    key = "ledger.jsonl"
    try:
        sound = container.read_bytes(key) == ledger_lines(receipts)
    except FileNotFoundError:
        return [Damage(key, "there is none")]
    except DamagedStoreError as error:
        return [Damage(key, str(error))]
    return [] if sound else [Damage(key, "the ledger and the receipts differ")]


def _check_manifest(
    container: Container, header: StoreHeader, receipts: list[Receipt], *, complete: bool
) -> list[Damage]:
    key = "manifest.json"
    try:
        manifest = Manifest.parse(container.read_bytes(key), key)
    except FileNotFoundError:
        return [Damage(key, "there is none: the job that makes the store has not finished")]
    except DamagedStoreError as error:
        return [Damage(key, str(error))]
    if not complete:
        return []
    if manifest != Manifest.of(header.fingerprint, receipts):
        return [Damage(key, "the manifest and the receipts differ")]
    return _check_ledger(container, receipts)
