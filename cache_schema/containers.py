"""What a store lies in: a folder of files, local or remote, or one HDF5 file. Both keep the same contract."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from cache_schema.atomic import StorePath
from cache_schema.errors import DamagedStoreError, UsageError
from cache_schema.layout import ArrayLayout
from cache_schema.reader import ArrayReader, OpenFiles, RowReader, ShardFiles
from cache_schema.receipts import Receipt, digest_shard
from cache_schema.zarr_reader import ZarrReader

RECEIPTS = "receipts"


class Container(Protocol):
    """Where the files of a store, or what stands for them, can be read."""

    @property
    def path(self) -> StorePath: ...

    def read_bytes(self, key: str) -> bytes:
        """One of the store's JSON files.

        Raises:
            FileNotFoundError: it is not there.
            DamagedStoreError: it is there, but fails its checksum.
        """
        ...

    def receipt_names(self) -> list[str]:
        """The file names of all receipts, in order."""
        ...

    def receipt(self, name: str) -> Receipt:
        """One receipt, by its file name.

        Raises:
            DamagedStoreError: it cannot be read.
        """
        ...

    def missing(self, receipts: Iterable[Receipt], layouts: Mapping[str, ArrayLayout]) -> list[str]:
        """Keys of the shards that are not there in the size their receipt gives. Looks at no array's bytes."""
        ...

    def reader(self, layout: ArrayLayout) -> RowReader:
        """A reader of one array."""
        ...

    def shard_digest(self, layout: ArrayLayout, shard: int) -> str:
        """The digest of a shard as it is in a zarr store, from the bytes that are there now.

        Raises:
            DamagedStoreError: the shard is missing, or cannot be read.
        """
        ...

    def close(self) -> None:
        """Close whatever is open."""
        ...


class Folder:
    """A zarr store as files in a folder, or as objects under a prefix."""

    def __init__(self, path: StorePath) -> None:
        if not path.is_dir():
            raise UsageError(
                f"no store at {path}: the folder is missing. `headstart cache list` shows what a folder holds."
            )
        if not (path / "zarr.json").is_file():
            raise UsageError(f"{path} is not a store: it has no zarr.json. Name a folder that ends in .zarr.")
        self.path = path
        self._files = OpenFiles()

    def read_bytes(self, key: str) -> bytes:
        return bytes((self.path / key).read_bytes())

    def receipt_names(self) -> list[str]:
        return sorted(path.name for path in (self.path / RECEIPTS).glob("*.json"))

    def receipt(self, name: str) -> Receipt:
        return Receipt.read(self.path / RECEIPTS / name)

    def missing(self, receipts: Iterable[Receipt], layouts: Mapping[str, ArrayLayout]) -> list[str]:
        sizes = self._sizes()
        files = ((key, stored) for receipt in receipts for key, stored in receipt.files.items())
        return [key for key, stored in files if sizes.get(key) != stored.num_bytes]

    def reader(self, layout: ArrayLayout) -> RowReader:
        if isinstance(self.path, Path) and layout.zstd_level is None:
            return ArrayReader(ShardFiles(self.path, layout), self._files)
        return ZarrReader(self.path, layout)

    def shard_digest(self, layout: ArrayLayout, shard: int) -> str:
        path = self.path / layout.shard_key(shard)
        try:
            return digest_shard(path)
        except OSError as error:
            raise DamagedStoreError(f"{path}: the shard cannot be read ({error.strerror or error})") from error

    def close(self) -> None:
        self._files.close()

    def _sizes(self) -> dict[str, int]:
        """Bytes of every file of the store, by key; remote ones in one listing."""
        if isinstance(self.path, Path):
            files = (path for path in self.path.glob("*/**/c.*") if path.is_file())
            return {path.relative_to(self.path).as_posix(): path.stat().st_size for path in files}
        root = self.path.path.rstrip("/") + "/"
        found = self.path.fs.find(self.path.path, detail=True)
        return {name.lstrip("/").removeprefix(root.lstrip("/")): entry["size"] for name, entry in found.items()}
