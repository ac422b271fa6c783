"""Shards: rows to the bytes of one file, and what its index says of the chunks inside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from awscrt.checksums import crc32c
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from cache_schema.layout import CRC_BYTES, INDEX_ENTRY_BYTES, ArrayLayout

MISSING = 2**64 - 1
"""Offset and length of a chunk that was never written, as zarr's specification has it."""


@dataclass(frozen=True)
class ChunkTable:
    """Where the chunks of one shard lie in its file.

    Args:
        offsets: in bytes, -1 for a chunk that was never written.
        lengths: in bytes, with the checksum if it follows its chunk.
        checksums: crc32c of each chunk where these are kept apart; None where each follows its chunk.
    """

    offsets: Sequence[int]
    lengths: Sequence[int]
    checksums: Sequence[int] | None = None


def encode_shard(rows: NDArray[Any], layout: ArrayLayout) -> memoryview:
    """The bytes of the shard that holds `rows`, in one buffer.

    Args:
        rows: (R, ...) with 1 <= R <= `layout.shard_rows` and the layout's data type. Fewer rows than `shard_rows` make
            the last shard: its chunks past the end are left out, and a chunk that is cut short is filled with zeros.
    """
    if rows.dtype != layout.dtype or rows.shape[1:] != layout.shape[1:] or not 1 <= len(rows) <= layout.shard_rows:
        expected = f"1 to {layout.shard_rows} rows of {layout.dtype.name} {layout.shape[1:]}"
        raise ValueError(f"{layout.name}: expected {expected}, got {rows.dtype.name} {rows.shape}")
    compressed = layout.zstd_level is not None and layout.row_bytes
    return _encode_compressed(rows, layout) if compressed else _encode_plain(rows, layout)


def encode_whole(pieces: Iterable[bytes], layout: ArrayLayout) -> Iterator[bytes]:
    """What `encode_shard` gives of an array that is one chunk in one shard, piece by piece.

    Args:
        pieces: all rows as little-endian bytes, cut anywhere.
    """
    assert layout.shard_rows == layout.chunk_rows == layout.num_rows
    assert layout.zstd_level is None
    checksum = num_bytes = 0
    for piece in pieces:
        checksum = crc32c(piece, checksum)
        num_bytes += len(piece)
        yield piece
    assert num_bytes == layout.chunk_bytes
    yield np.array([checksum], "<u4").tobytes()
    yield _index_of(layout, 1).tobytes()


class ShardBuffer:
    """The bytes of one plain shard, to be filled in place: what is written to `rows` needs not be copied again.

    Args:
        layout: an array that is not compressed, with chunks of one row.
        num_rows: rows of this shard.
        memory: of at least `size(layout, num_rows)` bytes, such as pinned memory; numpy's own by default.
    """

    def __init__(self, layout: ArrayLayout, num_rows: int, memory: NDArray[np.uint8] | None = None) -> None:
        if not self.suits(layout):
            raise ValueError(f"{layout.name}: its rows do not lie one by one in a plain shard")
        self.layout = layout
        self._stride = layout.chunk_bytes + CRC_BYTES
        self._num_rows = num_rows
        size = self.size(layout, num_rows)
        self._buffer = np.empty(size, np.uint8) if memory is None else memory[:size]
        values = self._buffer[: num_rows * self._stride].reshape(num_rows, self._stride)[:, :-CRC_BYTES]
        self.rows: NDArray[Any] = values.view(layout.dtype).reshape(num_rows, *layout.shape[1:])
        assert np.shares_memory(self.rows, self._buffer)

    @staticmethod
    def suits(layout: ArrayLayout) -> bool:
        """Whether an array's shards can be filled in place."""
        return layout.chunk_rows == 1 and layout.zstd_level is None and layout.row_bytes % 4 == 0 < layout.row_bytes

    @staticmethod
    def size(layout: ArrayLayout, num_rows: int) -> int:
        """Bytes of a shard with so many rows."""
        return num_rows * (layout.chunk_bytes + CRC_BYTES) + layout.index_bytes

    def seal(self) -> memoryview:
        """Write checksums and index; the bytes of the whole shard."""
        for chunk in self._buffer[: self._num_rows * self._stride].reshape(self._num_rows, self._stride):
            chunk[-CRC_BYTES:] = checksum_bytes(chunk[:-CRC_BYTES])
        _write_index(self._buffer, self.layout, self._num_rows)
        return self._buffer.data


def _encode_plain(rows: NDArray[Any], layout: ArrayLayout) -> memoryview:
    num_chunks = -(-len(rows) // layout.chunk_rows)
    stride = layout.chunk_bytes + CRC_BYTES
    buffer = np.empty(num_chunks * stride + layout.index_bytes, np.uint8)
    chunks = buffer[: num_chunks * stride].reshape(num_chunks, stride)
    payload = np.ascontiguousarray(rows).view(np.uint8).reshape(-1)
    if missing := num_chunks * layout.chunk_bytes - len(payload):
        payload = np.concatenate([payload, np.zeros(missing, np.uint8)])
    for chunk, values in zip(chunks, payload.reshape(num_chunks, layout.chunk_bytes), strict=True):
        chunk[:-CRC_BYTES] = values
        chunk[-CRC_BYTES:] = checksum_bytes(values)
    _write_index(buffer, layout, num_chunks)
    return buffer.data


def _write_index(buffer: NDArray[np.uint8], layout: ArrayLayout, num_chunks: int) -> None:
    """The end of a shard, behind so many chunks that lie in order and without gaps."""
    buffer[num_chunks * (layout.chunk_bytes + CRC_BYTES) :] = _index_of(layout, num_chunks)


def _index_of(layout: ArrayLayout, num_chunks: int) -> NDArray[np.uint8]:
    """(index_bytes,) uint8, the index with its checksum."""
    stride = layout.chunk_bytes + CRC_BYTES
    index = np.full((layout.chunks_per_shard, 2), MISSING, "<u8")
    index[:num_chunks, 0] = np.arange(num_chunks, dtype=np.uint64) * np.uint64(stride)
    index[:num_chunks, 1] = stride
    entries = index.view(np.uint8).reshape(-1)
    return np.concatenate([entries, checksum_bytes(entries)])


def _encode_compressed(rows: NDArray[Any], layout: ArrayLayout) -> memoryview:
    """zarr-python writes the shard, as the only one of an array in memory."""
    files: dict[str, Buffer] = {}
    assert layout.zstd_level is not None
    array = zarr.create_array(
        MemoryStore(files),
        shape=rows.shape,
        dtype=layout.dtype,
        chunks=(layout.chunk_rows, *layout.row_shape),
        shards=(layout.shard_rows, *layout.row_shape),
        serializer=BytesCodec(endian="little"),
        compressors=(ZstdCodec(level=layout.zstd_level, checksum=False), Crc32cCodec()),
        fill_value=layout.fill_value,
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )
    array[...] = rows
    return memoryview(files[layout.shard_key(0).removeprefix(f"{layout.name}/")].to_bytes())


def parse_index(tail: NDArray[np.uint8]) -> ChunkTable:
    """The index of a shard from its last `layout.index_bytes` bytes.

    Raises:
        ValueError: the index fails its own checksum.
    """
    if not np.array_equal(checksum_bytes(tail[:-CRC_BYTES]), tail[-CRC_BYTES:]):
        raise ValueError("the shard's index fails its checksum")
    entries = tail[:-CRC_BYTES].view("<u8").reshape(-1, INDEX_ENTRY_BYTES // 8).astype(np.int64)
    return ChunkTable(offsets=entries[:, 0].tolist(), lengths=entries[:, 1].tolist())  # MISSING is -1 when signed


def checksum_bytes(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(4,) uint8, the little-endian crc32c of `data`."""
    return np.array([crc32c(data)], "<u4").view(np.uint8)
