"""A store on disk: one zarr v3 group, the receipts beside its arrays, and a manifest written last.

<kind>-<first 12 digits of the fingerprint>.zarr/
    zarr.json               group attributes under "headstart": schema version, kind, identity, recorded
    <array>/zarr.json, c.*  arrays, as layout.py describes
    receipts/<unit>.json    one for each finished unit of work
    ledger.jsonl            one line for each item that failed
    manifest.json           last: the store is complete
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from numpy.typing import NDArray

from cache_schema import SCHEMA_VERSION, atomic
from cache_schema.errors import DamagedStoreError, UsageError
from cache_schema.fingerprint import FOLDER_DIGITS, canonical_json, fingerprint
from cache_schema.layout import ArrayLayout, whole
from cache_schema.receipts import Failure, Manifest, Receipt, StoredFile
from cache_schema.shards import ArrayReader, encode_shard

StoreKind = Literal["samples", "image_features", "prompt_features"]

STATIC_UNIT = "static"
"""The unit of work that holds what is known before the first item is encoded (ids, sizes, offsets)."""

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
        return f"{self.kind}-{self.fingerprint[:FOLDER_DIGITS]}.zarr"


@dataclass(frozen=True)
class StaticArray:
    """An array that is known before the work starts, with the names of its axes."""

    name: str
    values: NDArray[Any]
    axes: tuple[str, ...]

    @property
    def layout(self) -> ArrayLayout:
        return whole(self.name, self.values.shape, self.values.dtype, self.axes)


class StoreWriter:
    """Fills one store unit by unit. Any number of writers, in any number of processes, may fill the same store.

    A unit's files are published first and its receipt last, so a unit is done exactly when its receipt is honoured.
    """

    def __init__(
        self, parent: Path, header: StoreHeader, layouts: Sequence[ArrayLayout], static: Sequence[StaticArray]
    ) -> None:
        self.path = parent / header.folder_name
        self.header = header
        self.layouts = {layout.name: layout for layout in (*layouts, *(array.layout for array in static))}
        self._static = static

    def begin(self) -> None:
        """Make the group, the metadata of its arrays and the static unit, whichever of them is missing."""
        arrays = {name: layout.to_metadata() for name, layout in self.layouts.items()}
        parents = {str(parent) for name in arrays for parent in Path(name).parents if str(parent) != "."}
        groups = {parent: {"zarr_format": 3, "node_type": "group", "attributes": {}} for parent in parents}
        metadata = groups | arrays
        for key, value in metadata.items():
            _mend_json(self.path / key / "zarr.json", value)
        root = {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": {
                _ATTRIBUTES: {
                    "schema_version": SCHEMA_VERSION,
                    "kind": self.header.kind,
                    "fingerprint": self.header.fingerprint,
                    "identity": self.header.identity,
                    "recorded": self.header.recorded,
                    "metadata_sha256": fingerprint(metadata),
                }
            },
            "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": metadata},
        }
        if not self._has_sound_root():
            atomic.write_json(self.path / "zarr.json", root)
        if not self.is_done(STATIC_UNIT):
            shards = {(array.name, 0): array.values for array in self._static if len(array.values)}
            self.commit(STATIC_UNIT, (0, 0), shards)

    def is_done(self, unit: str) -> bool:
        """Whether the unit's receipt is there and every file is, byte for byte, what the receipt says."""
        path = self._receipt_path(unit)
        if not path.is_file():
            return False
        try:
            receipt = Receipt.read(path)
            return receipt.unit == unit and receipt.is_honoured(self.path, by_digest=True)
        except DamagedStoreError:
            return False

    def commit(
        self,
        unit: str,
        rows: tuple[int, int],
        shards: Mapping[tuple[str, int], NDArray[Any]],
        failures: Sequence[Failure] = (),
        rates: Mapping[str, float] | None = None,
    ) -> Receipt:
        """Publish the shards of one unit, then its receipt.

        Args:
            unit: the unit's name, a plain word.
            rows: first row and the row after the last, of those the unit stands for.
            shards: the rows of every shard of the unit, by (array name, shard number).
        """
        files = {}
        for (name, number), values in shards.items():
            layout = self.layouts[name]
            key = layout.shard_key(number)
            data = encode_shard(values, layout)
            atomic.write_file(self.path / key, data)
            files[key] = StoredFile(data.nbytes, hashlib.sha256(data).hexdigest())
        receipt = Receipt(unit, rows, files, tuple(failures), dict(rates or {}))
        atomic.write_json(self._receipt_path(unit), receipt.to_dict())
        return receipt

    def finish(self, units: Iterable[str]) -> Manifest:
        """Write the ledger and the manifest, once every unit of the job has its receipt."""
        names = [STATIC_UNIT, *units]
        for stray in set((self.path / "receipts").glob("*.json")) - {self._receipt_path(name) for name in names}:
            stray.unlink()
        receipts = [Receipt.read(self._receipt_path(name)) for name in names]
        failures = [failure for receipt in receipts for failure in receipt.failures]
        ledger = b"".join(canonical_json({"row": f.row, "id": f.id, "reason": f.reason}) + b"\n" for f in failures)
        atomic.write_file(self.path / "ledger.jsonl", ledger)
        manifest = Manifest.of(self.header.fingerprint, receipts)
        atomic.write_json(self.path / "manifest.json", manifest.to_dict())
        return manifest

    def _has_sound_root(self) -> bool:
        """A store that is resumed keeps what its first job recorded."""
        try:
            return read_header(self.path)[0].fingerprint == self.header.fingerprint
        except UsageError:
            return False

    def _receipt_path(self, unit: str) -> Path:
        return self.path / "receipts" / f"{unit}.json"


def _mend_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write metadata unless exactly that is there already."""
    try:
        if json.loads(path.read_bytes()) == value:
            return
    except (OSError, ValueError):
        pass
    atomic.write_json(path, value)


class Store:
    """A complete store, open for reading. Make one with `open_store`."""

    def __init__(self, path: Path, header: StoreHeader, layouts: Mapping[str, ArrayLayout], manifest: Manifest) -> None:
        self.path = path
        self.header = header
        self.layouts = layouts
        self.manifest = manifest
        self._readers: dict[str, ArrayReader] = {}

    def array(self, name: str) -> ArrayReader:
        """The reader of one array, opened once.

        Raises:
            UsageError: the store has no such array.
        """
        if name not in self.layouts:
            raise UsageError(f"{self.path} has no array {name!r}; it holds {', '.join(sorted(self.layouts))}.")
        if name not in self._readers:
            self._readers[name] = ArrayReader(self.path, self.layouts[name])
        return self._readers[name]

    def read(self, name: str) -> NDArray[Any]:
        """All of one array, checked against its checksums."""
        return self.array(name).read()

    def failures(self) -> list[Failure]:
        """Every item that could not be encoded, as ledger.jsonl lists them for people."""
        return [failure for receipt in self.receipts() for failure in receipt.failures]

    def receipts(self) -> list[Receipt]:
        """Every receipt, in order of name."""
        return [Receipt.read(path) for path in sorted((self.path / "receipts").glob("*.json"))]

    def close(self) -> None:
        """Close every file this store holds open."""
        for reader in self._readers.values():
            reader.close()


def read_header(path: Path) -> tuple[StoreHeader, dict[str, ArrayLayout]]:
    """What a store's root zarr.json says, complete or not.

    Raises:
        UsageError: the folder is missing, is no store of ours, or was written under another schema version.
        DamagedStoreError: the metadata cannot be read, or contradicts the fingerprint it carries.
    """
    if not path.is_dir():
        raise UsageError(f"no store at {path}: the folder is missing. `headstart cache info` lists the stores of one.")
    if not (path / "zarr.json").is_file():
        raise UsageError(f"{path} is not a store: it has no zarr.json. Name a folder that ends in .zarr.")
    try:
        root = json.loads((path / "zarr.json").read_bytes())
        attributes = root["attributes"][_ATTRIBUTES]
        version = attributes["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is a zarr group, but not one that headstart wrote ({error!r}).") from error
    if version != SCHEMA_VERSION:
        raise UsageError(f"{path} has schema version {version}; this one reads {SCHEMA_VERSION}. Extract it again.")
    try:
        header = StoreHeader(attributes["kind"], attributes["identity"], attributes["recorded"])
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
        raise DamagedStoreError(f"{path}/zarr.json does not match the fingerprint it carries; make the store again.")
    return header, layouts


def is_complete(path: Path) -> bool:
    """Whether a store is there, whole, and consistent with its receipts."""
    try:
        open_store(path).close()
    except UsageError:
        return False
    return True


def open_store(path: Path, kind: StoreKind | None = None) -> Store:
    """Open a complete store for reading, checking its manifest against its receipts and the sizes of its files.

    Raises:
        UsageError: there is no store of that kind, or it is incomplete.
        DamagedStoreError: manifest, receipts and files contradict each other.
    """
    header, layouts = read_header(path)
    if kind is not None and header.kind != kind:
        raise UsageError(f"{path} is a store of {header.kind}, where one of {kind} is wanted.")
    command = "prepare" if header.kind == "samples" else "extract"
    again = f"Run the `headstart {command}` that made it again: it does only what is not there."
    if not (path / "manifest.json").is_file():
        raise UsageError(f"{path} is incomplete: its job has not finished. {again}")
    manifest = Manifest.read(path / "manifest.json")
    store = Store(path, header, layouts, manifest)
    receipts = store.receipts()
    if Manifest.of(header.fingerprint, receipts) != manifest:
        raise DamagedStoreError(f"{path}: the manifest and the receipts differ. {again}")
    for receipt in receipts:
        if not receipt.is_honoured(path, by_digest=False):
            what = f"a file of unit {receipt.unit} is missing or has another size"
            raise DamagedStoreError(f"{path}: {what}. {again}")
    return store
