"""A store: one zarr v3 group, the receipts beside its arrays, and a manifest written last.

<kind>-<first 12 digits of the fingerprint>.zarr/
    zarr.json               group attributes under "headstart": schema version, kind, identity, recorded
    <array>/zarr.json, c.*  arrays, as layout.py describes
    receipts/<unit>.json    one for each finished unit of work
    ledger.jsonl            one line for each item that failed
    manifest.json           last: the store is complete

docs/cache-format.md has every name and rule. The same store may lie in one HDF5 file (hdf5.py) or on a remote
filesystem; `open_store` opens all of them.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import xxhash
from numpy.typing import NDArray

from cache_schema import SCHEMA_VERSION, atomic
from cache_schema.atomic import StorePath
from cache_schema.containers import RECEIPTS, Container, Folder
from cache_schema.errors import DamagedStoreError, UsageError
from cache_schema.fingerprint import FOLDER_DIGITS, canonical_json, fingerprint
from cache_schema.hdf5 import SUFFIX as HDF5_SUFFIX
from cache_schema.hdf5 import Hdf5File
from cache_schema.layout import ArrayLayout, parse_shard_key, whole
from cache_schema.reader import RowReader
from cache_schema.receipts import Failure, Manifest, Receipt, StoredFile
from cache_schema.shards import ShardBuffer, encode_shard, encode_whole
from cache_schema.spilled import SpilledArray

StoreKind = Literal["samples", "image_features", "prompt_features"]

COMMIT_THREADS = 3
"""Enough to encode, write and sync three shards at a time, which fills a local disk."""

STATIC_UNIT = "static"
"""The unit of work that holds what is known before the first item is encoded (ids, sizes, offsets)."""

ZARR_SUFFIX = ".zarr"

_ATTRIBUTES = "headstart"


@dataclass(frozen=True)
class StoreHeader:
    """What a store is: everything that decides its bytes (`identity`), and what is only good to know (`recorded`)."""

    kind: StoreKind
    identity: Mapping[str, Any]
    recorded: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        return fingerprint({"schema_version": SCHEMA_VERSION, "kind": self.kind, "identity": self.identity})

    @property
    def folder_name(self) -> str:
        return f"{self.stem}{ZARR_SUFFIX}"

    @property
    def stem(self) -> str:
        """The store's name without the suffix that says what it lies in."""
        return f"{self.kind}-{self.fingerprint[:FOLDER_DIGITS]}"

    def moved(self, old: StorePath, new: StorePath) -> StoreHeader:
        """The header for a copy of the store at another place: recorded relative paths go on meaning the same."""
        paths = {name: recorded_path(self, old, name) for name in self.recorded.get("paths", {})}
        known = {name: path for name, path in paths.items() if path is not None}
        return replace(self, recorded={**self.recorded, "paths": relative_paths(known, new)}) if known else self

    def to_root(self, layouts: Mapping[str, ArrayLayout]) -> dict[str, Any]:
        """The store's root zarr.json: the header as attributes, and the consolidated metadata of the arrays."""
        metadata = node_metadata(layouts)
        return {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": {
                _ATTRIBUTES: {
                    "schema_version": SCHEMA_VERSION,
                    "kind": self.kind,
                    "fingerprint": self.fingerprint,
                    "identity": self.identity,
                    "recorded": self.recorded,
                    "metadata_sha256": fingerprint(metadata),
                }
            },
            "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": metadata},
        }

    @classmethod
    def parse(cls, data: bytes, path: StorePath) -> tuple[StoreHeader, dict[str, ArrayLayout]]:
        """What a root zarr.json says. `path` is the store, for errors.

        Raises:
            UsageError: no store of ours, or one that was written under another schema version.
            DamagedStoreError: the metadata contradicts the fingerprints it carries.
        """
        try:
            root = json.loads(data)
            attributes = root["attributes"][_ATTRIBUTES]
            version = attributes["schema_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is a zarr group, but not one that headstart wrote ({error!r}).") from error
        if version != SCHEMA_VERSION:
            raise UsageError(f"{path} has schema version {version}; this one reads {SCHEMA_VERSION}. Make it again.")
        try:
            header = cls(attributes["kind"], attributes["identity"], attributes["recorded"])
            metadata = root["consolidated_metadata"]["metadata"]
            if fingerprint(metadata) != attributes["metadata_sha256"]:
                raise ValueError("the metadata of its arrays is not what was written")
            layouts = {
                name: ArrayLayout.from_metadata(name, value)
                for name, value in metadata.items()
                if value["node_type"] == "array"
            }
            matches = header.kind in get_args(StoreKind) and header.fingerprint == attributes["fingerprint"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedStoreError(f"{path}/zarr.json is damaged ({error}); make the store again.") from error
        if not matches:
            raise DamagedStoreError(
                f"{path}/zarr.json does not match the fingerprint it carries; make the store again."
            )
        return header, layouts


def relative_paths(paths: Mapping[str, Path], store: StorePath) -> dict[str, str]:
    """What a header records of files and folders outside the store: their places relative to it.

    A remote store records none of this machine's.
    """
    if not isinstance(store, Path):
        return {}
    return {name: os.path.relpath(path.resolve(), store.resolve()) for name, path in paths.items()}


def absolute_path(relative: str, base: Path) -> Path:
    """The place that `relative_paths` recorded relative to `base`."""
    return Path(os.path.normpath(base.resolve() / relative))


def recorded_path(header: StoreHeader, store: StorePath, name: str) -> Path | None:
    """A file or folder outside the store that its header records, if it does."""
    recorded = header.recorded.get("paths", {})
    if not isinstance(store, Path) or name not in recorded:
        return None
    return absolute_path(recorded[name], store)


def node_metadata(layouts: Mapping[str, ArrayLayout]) -> dict[str, Any]:
    """The zarr.json of every array and of every group between the root and the arrays, by key."""
    parents = {str(parent) for name in layouts for parent in PurePosixPath(name).parents if str(parent) != "."}
    groups = {parent: {"zarr_format": 3, "node_type": "group", "attributes": {}} for parent in parents}
    return groups | {name: layout.to_metadata() for name, layout in layouts.items()}


@dataclass(frozen=True)
class StaticArray:
    """An array that is known before the work starts, in memory or on the disk, with the names of its axes."""

    name: str
    values: NDArray[Any] | SpilledArray
    axes: tuple[str, ...]

    @property
    def layout(self) -> ArrayLayout:
        return whole(self.name, self.values.shape, self.values.dtype, self.axes)


class StoreWriter:
    """Fills one store unit by unit. Any number of writers, in any number of processes, may fill the same store.

    A unit's files are published first and its receipt last, so a unit is done exactly when its receipt is honoured.
    """

    def __init__(
        self, parent: StorePath, header: StoreHeader, layouts: Sequence[ArrayLayout], static: Sequence[StaticArray]
    ) -> None:
        self.path = parent / header.folder_name
        self.header = header
        self.layouts = {layout.name: layout for layout in (*layouts, *(array.layout for array in static))}
        self._static = static

    def begin(self) -> None:
        """Make the group, the metadata of its arrays and the static unit, whichever of them is missing."""
        self.declare()
        if not self.is_done(STATIC_UNIT):
            shards = {(array.name, 0): array.values for array in self._static if len(array.values)}
            self.commit(STATIC_UNIT, (0, 0), shards)

    def declare(self) -> None:
        """Make the group and the metadata of its arrays, whichever of them is missing."""
        for key, value in node_metadata(self.layouts).items():
            _mend_json(self.path / key / "zarr.json", value)
        if not self._has_sound_root():
            atomic.write_json(self.path / "zarr.json", self.header.to_root(self.layouts))

    def is_done(self, unit: str, files: Mapping[str, StoredFile] | None = None) -> bool:
        """Whether the unit's receipt is there and every file is, byte for byte, what the receipt says.

        Args:
            files: what the receipt has to say, where that is known.
        """
        path = self._receipt_path(unit)
        if not path.is_file():
            return False
        try:
            receipt = Receipt.read(path)
            expected = receipt.unit == unit and (files is None or files == receipt.files)
            return expected and self._fits(receipt) and receipt.is_honoured(self.path)
        except (DamagedStoreError, ValueError, KeyError, IndexError):
            return False

    def has_receipt(self, unit: str) -> bool:
        """Whether the unit's receipt is there, honoured or not."""
        return self._receipt_path(unit).is_file()

    def _fits(self, receipt: Receipt) -> bool:
        """Whether shards have the size they have in this store's layouts: they may be left from a compressed one."""
        sizes = ((*parse_shard_key(key), stored.num_bytes) for key, stored in receipt.files.items())
        return all(
            self.layouts[name].zstd_level is not None or self.layouts[name].plain_shard_bytes(shard) == num_bytes
            for name, shard, num_bytes in sizes
        )

    def commit(
        self,
        unit: str,
        rows: tuple[int, int],
        shards: Mapping[tuple[str, int], NDArray[Any] | ShardBuffer | SpilledArray],
        failures: Sequence[Failure] = (),
        rates: Mapping[str, float | str] | None = None,
    ) -> Receipt:
        """Publish the shards of one unit, then its receipt.

        Args:
            unit: the unit's name, a plain word.
            rows: first row and the row after the last, of those the unit stands for.
            shards: the rows of every shard of the unit, by (array name, shard number); buffers are written as they are,
                and what lies on the disk goes through memory piece by piece.
        """
        files = {}
        for (name, number), values in shards.items():
            layout = self.layouts[name]
            if isinstance(values, SpilledArray):
                pieces = encode_whole(values.pieces(), layout)
                files[layout.shard_key(number)] = _write_pieces(self.path / layout.shard_key(number), pieces)
                continue
            if isinstance(values, ShardBuffer):  # a store that is compressed, and repaired, encodes its rows anew
                data = values.seal() if values.layout == layout else encode_shard(values.rows, layout)
            else:
                data = encode_shard(values, layout)
            atomic.write_file(self.path / layout.shard_key(number), data)
            files[layout.shard_key(number)] = StoredFile.of(data)
        receipt = Receipt(unit, rows, files, tuple(failures), dict(rates or {}))
        atomic.write_json(self._receipt_path(unit), receipt.to_dict())
        return receipt

    def finish(self, units: Iterable[str]) -> Manifest:
        """Write the ledger and the manifest, once every unit of the job has its receipt."""
        names = [STATIC_UNIT, *units]
        kept = {self._receipt_path(name).name for name in names}
        for stray in [path for path in (self.path / RECEIPTS).glob("*.json") if path.name not in kept]:
            stray.unlink()
        receipts = [Receipt.read(self._receipt_path(name)) for name in names]
        atomic.write_file(self.path / "ledger.jsonl", ledger_lines(receipts))
        manifest = Manifest.of(self.header.fingerprint, receipts)
        atomic.write_json(self.path / "manifest.json", manifest.to_dict())
        return manifest

    def _has_sound_root(self) -> bool:
        """A store that is resumed keeps what its first job recorded."""
        try:
            header, layouts = read_header(self.path)
            same = header.fingerprint == self.header.fingerprint and layouts == self.layouts
            return same and json.loads((self.path / "zarr.json").read_bytes()) == header.to_root(layouts)
        except UsageError:
            return False

    def _receipt_path(self, unit: str) -> StorePath:
        return self.path / RECEIPTS / f"{unit}.json"


def ledger_lines(receipts: Iterable[Receipt]) -> bytes:
    """The ledger: one JSON object a line for every item that could not be encoded."""
    return b"".join(canonical_json(asdict(failure)) + b"\n" for receipt in receipts for failure in receipt.failures)


def _write_pieces(path: StorePath, pieces: Iterable[bytes]) -> StoredFile:
    """Publish a file piece by piece; what a receipt says of it."""
    digest, num_bytes = xxhash.xxh3_128(), 0

    def seen() -> Iterator[bytes]:
        nonlocal num_bytes
        for piece in pieces:
            digest.update(piece)
            num_bytes += len(piece)
            yield piece

    atomic.write_pieces(path, seen())
    return StoredFile(num_bytes, digest.hexdigest())


def _mend_json(path: StorePath, value: Mapping[str, Any]) -> None:
    """Write metadata unless exactly that is there already."""
    try:
        if json.loads(path.read_bytes()) == value:
            return
    except (OSError, ValueError):
        pass
    atomic.write_json(path, value)


class Commits:
    """Commits units on a few threads, while the caller makes the next; leaving the `with` block waits for them.

    At most one unit more than threads is under way, so memory stays bounded. What goes wrong with one is raised at the
    next call, or when the block is left; units that were handed over before an error are published all the same.

    Args:
        commit: `StoreWriter.commit`, or what stands before it.
    """

    def __init__(self, commit: Callable[..., Receipt], num_threads: int = COMMIT_THREADS) -> None:
        self._commit = commit
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="headstart-write")
        self._under_way: deque[Future[Receipt]] = deque()
        self._num_waiting = num_threads + 1

    def commit(self, *unit: Any) -> list[Receipt]:
        """Hand a unit over, in the arguments of `StoreWriter.commit`; it may not be changed afterwards.

        Returns:
            The receipts of the units that were published since the last call, in order.
        """
        self._under_way.append(self._pool.submit(self._commit, *unit))
        published = []
        while self._under_way and (len(self._under_way) >= self._num_waiting or self._under_way[0].done()):
            published.append(self._under_way.popleft().result())
        return published

    def wait(self) -> list[Receipt]:
        """The receipts of the units that are still under way, once they are published."""
        published = [future.result() for future in self._under_way]
        self._under_way.clear()
        return published

    def __enter__(self) -> Commits:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown()
        if exception[0] is None:
            self.wait()


class Store:
    """A complete store, open for reading. Make one with `open_store`."""

    def __init__(
        self, container: Container, header: StoreHeader, layouts: Mapping[str, ArrayLayout], manifest: Manifest
    ) -> None:
        self.path = container.path
        self.container = container
        self.header = header
        self.layouts = layouts
        self.manifest = manifest
        self._readers: dict[str, RowReader] = {}

    def array(self, name: str) -> RowReader:
        """The reader of one array, opened once.

        Raises:
            UsageError: the store has no such array.
        """
        if name not in self.layouts:
            raise UsageError(f"{self.path} has no array {name!r}; it holds {', '.join(sorted(self.layouts))}.")
        if name not in self._readers:
            self._readers[name] = self.container.reader(self.layouts[name])
        return self._readers[name]

    def read(self, name: str) -> NDArray[Any]:
        """All of one array, checked against its checksums."""
        return self.array(name).read()

    def failures(self) -> list[Failure]:
        """Every item that could not be encoded, as ledger.jsonl lists them for people."""
        return [failure for receipt in self.receipts() for failure in receipt.failures]

    def receipts(self) -> list[Receipt]:
        """Every receipt, in order of name."""
        return [self.container.receipt(name) for name in self.container.receipt_names()]

    def close(self) -> None:
        """Close every file this store holds open."""
        self.container.close()


def open_container(path: StorePath) -> Container:
    """What lies at a path: a folder with a zarr store, or an HDF5 file.

    Raises:
        UsageError: nothing of the kind is there.
        DamagedStoreError: an HDF5 file is there that cannot be opened.
    """
    if path.suffix != HDF5_SUFFIX:
        return Folder(path)
    if not isinstance(path, Path):
        raise UsageError(f"{path} is a remote HDF5 file; fetch it first, or convert the store to zarr.")
    return Hdf5File(path)


def read_header(path: StorePath) -> tuple[StoreHeader, dict[str, ArrayLayout]]:
    """What a store's root zarr.json says, complete or not.

    Raises:
        UsageError: nothing is there, or no store of ours, or one that was written under another schema version.
        DamagedStoreError: the metadata cannot be read, or contradicts the fingerprint it carries.
    """
    return StoreHeader.parse(open_container(path).read_bytes("zarr.json"), path)


def is_complete(path: StorePath) -> bool:
    """Whether a store is there, whole, and consistent with its receipts."""
    try:
        open_store(path).close()
    except UsageError:
        return False
    return True


def find_complete(parent: StorePath, header: StoreHeader) -> Store | None:
    """The complete store of that identity under `parent`, in whatever container; None if there is none."""
    for suffix in (ZARR_SUFFIX, HDF5_SUFFIX):
        try:
            return open_store(parent / f"{header.stem}{suffix}")
        except UsageError:
            continue
    return None


def open_store(path: StorePath, kind: StoreKind | None = None) -> Store:
    """Open a complete store for reading, checking its manifest against its receipts and the sizes of its files.

    Args:
        path: a folder that ends in .zarr, of this machine or remote, or an HDF5 file that ends in .h5.

    Raises:
        UsageError: there is no store of that kind, or it is incomplete.
        DamagedStoreError: manifest, receipts and files contradict each other.
    """
    container = open_container(path)
    header, layouts = StoreHeader.parse(container.read_bytes("zarr.json"), path)
    if kind is not None and header.kind != kind:
        raise UsageError(f"{path} is a store of {header.kind}, where one of {kind} is wanted; name that one.")
    command = "prepare" if header.kind == "samples" else "extract"
    again = f"Run the `headstart {command}` that made it again: it does only what is not there."
    try:
        manifest = Manifest.parse(container.read_bytes("manifest.json"), f"{path}/manifest.json")
    except FileNotFoundError as error:
        raise UsageError(f"{path} is incomplete: its job has not finished. {again}") from error
    receipts = [container.receipt(name) for name in container.receipt_names()]
    if Manifest.of(header.fingerprint, receipts) != manifest:
        raise DamagedStoreError(f"{path}: the manifest and the receipts differ. {again}")
    if missing := container.missing(receipts, layouts):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DamagedStoreError(f"{path}: {missing[0]}{more} is missing or has another size. {again}")
    return Store(container, header, layouts, manifest)
