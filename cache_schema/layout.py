"""How an array lies on disk: plain zarr v3 `sharding_indexed`, cut along the first axis only.

A chunk holds `chunk_rows` whole rows and is stored as little-endian bytes followed by their crc32c. A shard holds
`shard_rows` rows in one file: its chunks end to end, then the index (offset and length of each chunk, 2 x uint64)
followed by the index's crc32c. In a compressed array the bytes of a chunk go through zstd before their crc32c is
taken. Knows nothing about what the arrays mean.
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16
_NAME_CHARACTERS = set(string.ascii_letters + string.digits + "_-+.")
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC32C = {"name": "crc32c"}


@dataclass(frozen=True)
class ArrayLayout:
    """One array: its name in the store, shape, data type, chunking and the names of its axes.

    `zstd_level` is the level of a compressed array, None for the plain layout that features are read from.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_rows: int
    shard_rows: int
    axes: tuple[str, ...]
    zstd_level: int | None = None

    def __post_init__(self) -> None:
        if not self.shape or len(self.axes) != len(self.shape):
            raise ValueError(f"{self.name}: shape {self.shape} and axes {self.axes} must be as long as each other")
        if not all(part and set(part) <= _NAME_CHARACTERS and part.strip(".") for part in self.name.split("/")):
            raise ValueError(f"{self.name!r} is no name for an array: use letters, digits, '_', '-', '+' and '.'")
        if self.chunk_rows < 1 or self.shard_rows % self.chunk_rows:
            raise ValueError(f"{self.name}: a shard of {self.shard_rows} rows is no multiple of {self.chunk_rows}")

    @property
    def num_rows(self) -> int:
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])

    @property
    def chunk_bytes(self) -> int:
        """Payload of a chunk, without its checksum."""
        return self.row_bytes * self.chunk_rows

    @property
    def chunks_per_shard(self) -> int:
        return self.shard_rows // self.chunk_rows

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.shard_rows)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of a row; zarr asks for chunks of at least one element along every axis."""
        return tuple(max(1, length) for length in self.shape[1:])

    @property
    def fill_value(self) -> bool | float | int:
        """What zarr has readers assume of a chunk that was never written. Ours raise an error instead."""
        return False if self.dtype == np.bool_ else 0.0 if self.dtype.kind == "f" else 0

    @property
    def index_bytes(self) -> int:
        return self.chunks_per_shard * INDEX_ENTRY_BYTES + CRC_BYTES

    def rows_of_shard(self, shard: int) -> range:
        """The rows that shard number `shard` holds; the last shard may hold fewer than `shard_rows`."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.num_rows))

    def plain_shard_bytes(self, shard: int) -> int:
        """The size of a shard's file where chunks are not compressed."""
        num_chunks = -(-len(self.rows_of_shard(shard)) // self.chunk_rows)
        return num_chunks * (self.chunk_bytes + CRC_BYTES) + self.index_bytes

    def shard_key(self, shard: int) -> str:
        """The shard's file, relative to the store's folder."""
        return f"{self.name}/c.{'.'.join(map(str, (shard, *(0 for _ in self.shape[1:]))))}"

    def to_metadata(self) -> dict[str, Any]:
        """The array's zarr.json."""
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype.name,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [self.shard_rows, *self.row_shape]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": self.fill_value,
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": [self.chunk_rows, *self.row_shape],
                        "codecs": [_BYTES, *self._compressors, _CRC32C],
                        "index_codecs": [_BYTES, _CRC32C],
                        "index_location": "end",
                    },
                }
            ],
            "attributes": {},
            "dimension_names": list(self.axes),
            "storage_transformers": [],
        }

    @classmethod
    def from_metadata(cls, name: str, metadata: Mapping[str, Any]) -> ArrayLayout:
        """Parse a zarr.json that `to_metadata` could have written.

        Raises:
            ValueError: the array is stored in a way that no store of this schema is; open it with zarr-python instead.
        """
        try:
            sharding = metadata["codecs"][0]["configuration"]
            compressors = sharding["codecs"][1:-1]
            layout = cls(
                name=name,
                shape=tuple(metadata["shape"]),
                dtype=np.dtype(metadata["data_type"]),
                chunk_rows=sharding["chunk_shape"][0],
                shard_rows=metadata["chunk_grid"]["configuration"]["chunk_shape"][0],
                axes=tuple(metadata["dimension_names"]),
                zstd_level=compressors[0]["configuration"]["level"] if compressors else None,
            )
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{name}: not a sharded array of this schema ({error!r})") from error
        if layout.to_metadata() != dict(metadata):
            raise ValueError(f"{name}: not stored in the sharded layout of this schema")
        return layout

    @property
    def _compressors(self) -> list[dict[str, Any]]:
        if self.zstd_level is None:
            return []
        return [{"name": "zstd", "configuration": {"level": self.zstd_level, "checksum": False}}]


def parse_shard_key(key: str) -> tuple[str, int]:
    """The array's name and the shard's number of what `ArrayLayout.shard_key` gave.

    >>> parse_shard_key("features/last/c.3.0.0.0")
    ('features/last', 3)
    """
    name, _, file = key.rpartition("/")
    return name, int(file.split(".")[1])


def whole(name: str, shape: tuple[int, ...], dtype: DTypeLike, axes: tuple[str, ...]) -> ArrayLayout:
    """A small array kept as one chunk in one shard."""
    rows = max(1, shape[0])
    return ArrayLayout(name, shape, np.dtype(dtype), chunk_rows=rows, shard_rows=rows, axes=axes)
