"""Receipts and the manifest: what says that a part of a store, or all of it, is there and is what was written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cache_schema.errors import DamagedStoreError
from cache_schema.fingerprint import digest_file, fingerprint


@dataclass(frozen=True)
class StoredFile:
    """Size and SHA-256 of one file of a store."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Failure:
    """A ledger entry: an item that could not be encoded, and why. Its row is in the store with `valid` False."""

    row: int
    id: str
    reason: str


@dataclass(frozen=True)
class Receipt:
    """Written after the files of one unit of work are on disk: `files` maps each file's key to what it holds.

    `rates` is what the work was like (items per second of each stage); it is not part of the store's digest.
    """

    unit: str
    rows: tuple[int, int]
    files: Mapping[str, StoredFile]
    failures: tuple[Failure, ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, path: Path) -> Receipt:
        """Parse a receipt.

        Raises:
            DamagedStoreError: the file is not a receipt.
        """
        try:
            value = json.loads(path.read_bytes())
            return cls(
                unit=value["unit"],
                rows=(int(value["rows"][0]), int(value["rows"][1])),
                files={key: StoredFile(**stored) for key, stored in value["files"].items()},
                failures=tuple(Failure(**failure) for failure in value["failures"]),
                rates=value["rates"],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise DamagedStoreError(f"{path}: not a receipt ({error!r}); remove it and run the job again") from error

    def is_honoured(self, store: Path, *, by_digest: bool) -> bool:
        """Whether every file is there with the size, and if asked the digest, that this receipt gives."""
        return all(
            (path := store / key).is_file()
            and path.stat().st_size == stored.num_bytes
            and (not by_digest or digest_file(path) == stored.sha256)
            for key, stored in self.files.items()
        )


@dataclass(frozen=True)
class Manifest:
    """Written last of all. `digest` covers the digest of every file, so equal digests mean equal bytes."""

    fingerprint: str
    num_units: int
    num_files: int
    num_bytes: int
    num_failures: int
    digest: str

    @classmethod
    def of(cls, store_fingerprint: str, receipts: Iterable[Receipt]) -> Manifest:
        """What the receipts add up to."""
        receipts = list(receipts)
        files = {key: stored for receipt in receipts for key, stored in receipt.files.items()}
        return cls(
            fingerprint=store_fingerprint,
            num_units=len(receipts),
            num_files=len(files),
            num_bytes=sum(stored.num_bytes for stored in files.values()),
            num_failures=sum(len(receipt.failures) for receipt in receipts),
            digest=fingerprint({key: stored.sha256 for key, stored in files.items()}),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Parse a manifest.

        Raises:
            DamagedStoreError: the file is not a manifest.
        """
        try:
            return cls(**json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise DamagedStoreError(f"{path}: not a manifest ({error!r}); remove it and run the job again") from error
