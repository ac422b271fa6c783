"""Receipts and the manifest: what says that a part of a store, or all of it, is there and is what was written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import xxhash

from cache_schema.atomic import StorePath
from cache_schema.errors import DamagedStoreError
from cache_schema.fingerprint import fingerprint

_READ_BYTES = 4 << 20


@dataclass(frozen=True)
class StoredFile:
    """Size and XXH3 (128 bits, 32 hexadecimal digits) of one shard's file.

    The digest is there to find what went wrong by itself, at the speed of memory; it is no signature.
    """

    num_bytes: int
    xxh3_128: str

    @classmethod
    def of(cls, data: memoryview) -> StoredFile:
        """What a receipt says of a file that holds `data`."""
        return cls(data.nbytes, xxhash.xxh3_128_hexdigest(data))


@dataclass(frozen=True)
class Failure:
    """A ledger entry: an item that could not be encoded, and why. Its row is in the store with `valid` False."""

    row: int
    id: str
    reason: str


@dataclass(frozen=True)
class Receipt:
    """Written after the files of one unit of work are on disk: `files` maps each file's key to what it holds.

    `rates` is what the work was like (items per second of each stage, and which of them `binds`); it is not part of
    the store's digest.
    """

    unit: str
    rows: tuple[int, int]
    files: Mapping[str, StoredFile]
    failures: tuple[Failure, ...] = ()
    rates: Mapping[str, float | str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, path: StorePath) -> Receipt:
        """Read a receipt's file.

        Raises:
            DamagedStoreError: the file is not a receipt.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DamagedStoreError(f"{path}: the receipt cannot be read ({error.strerror or error})") from error
        return cls.parse(data, str(path))

    @classmethod
    def parse(cls, data: bytes, where: str) -> Receipt:
        """Parse a receipt. `where` says in an error where it was found.

        Raises:
            DamagedStoreError: the bytes are no receipt.
        """
        try:
            value = json.loads(data)
            return cls(
                unit=value["unit"],
                rows=(int(value["rows"][0]), int(value["rows"][1])),
                files={key: StoredFile(**stored) for key, stored in value["files"].items()},
                failures=tuple(Failure(**failure) for failure in value["failures"]),
                rates=value["rates"],
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise _no(where, "receipt", error) from error

    def is_honoured(self, store: StorePath) -> bool:
        """Whether every file is there, byte for byte what this receipt says."""
        return all(
            (path := store / key).is_file()
            and path.stat().st_size == stored.num_bytes
            and digest_shard(path) == stored.xxh3_128
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
            digest=fingerprint({key: stored.xxh3_128 for key, stored in files.items()}),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def parse(cls, data: bytes, where: str) -> Manifest:
        """Parse a manifest. `where` says in an error where it was found.

        Raises:
            DamagedStoreError: the bytes are no manifest.
        """
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise _no(where, "manifest", error) from error


def digest_shard(path: StorePath) -> str:
    """XXH3 (128 bits, 32 hexadecimal digits) of a file's bytes."""
    running, buffer = xxhash.xxh3_128(), memoryview(bytearray(_READ_BYTES))
    with path.open("rb") as file:
        while num_bytes := file.readinto(buffer):  # type: ignore[attr-defined]
            running.update(buffer[:num_bytes])
    return running.hexdigest()


def _no(where: str, what: str, error: Exception) -> DamagedStoreError:
    return DamagedStoreError(f"{where}: no {what} ({error!r}); `headstart cache repair` makes it again")
