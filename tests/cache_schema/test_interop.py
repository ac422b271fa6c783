"""zarr-python and tensorstore read what we write, and what they write with the same codecs is ours to read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cache_schema.errors import DamagedStoreError
from cache_schema.layout import ArrayLayout
from cache_schema.reader import ArrayReader, RowReader, ShardFiles
from cache_schema.shards import encode_shard
from cache_schema.zarr_reader import ZarrReader
from tests.cache_schema.toys import PLAIN_OR_ZSTD, assert_same_bits, declare_array, layouts, values_of, write_array

Writer = Callable[[Path, ArrayLayout, NDArray[Any], list[range]], None]


def write_with_zarr_python(store: Path, layout: ArrayLayout, values: NDArray[Any], parts: list[range]) -> None:
    """Let zarr-python write some rows of an array into a group that has its metadata."""
    array = zarr.open_array(store / layout.name, mode="r+")
    for rows in parts:
        array[rows.start : rows.stop] = values[rows.start : rows.stop]


def write_with_tensorstore(store: Path, layout: ArrayLayout, values: NDArray[Any], parts: list[range]) -> None:
    """Let tensorstore write some rows of an array into a group that has its metadata."""
    array = tensorstore.open(tensorstore_spec(store, layout), open=True).result()
    for rows in parts:
        array[rows.start : rows.stop].write(values[rows.start : rows.stop]).result()


WRITERS = pytest.mark.parametrize("write", [write_with_zarr_python, write_with_tensorstore])


def tensorstore_spec(store: Path, layout: ArrayLayout) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store / layout.name)}}


def readers(store: Path, layout: ArrayLayout) -> list[RowReader]:
    """Every reader of ours that may read such an array."""
    plain = [ArrayReader(ShardFiles(store, layout))] if layout.zstd_level is None else []
    return [*plain, ZarrReader(store, layout)]


def nowhere_zero(layout: ArrayLayout) -> NDArray[Any]:
    """Values none of which may be left out because a reader would fill them in."""
    values = values_of(layout)
    return np.where(values == 0, layout.dtype.type(1), values).astype(layout.dtype)


@settings(deadline=None, max_examples=60)
@given(layouts() | layouts(least=1, zstd_levels=PLAIN_OR_ZSTD), st.integers(0, 99))
def test_others_read_what_we_write(layout: ArrayLayout, seed: int) -> None:
    values = values_of(layout, seed)
    with TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        write_array(store, layout, values)
        array = zarr.open_group(store, mode="r")["values"]
        assert isinstance(array, zarr.Array)
        assert_same_bits(array[...], values)
        assert array.metadata.dimension_names == layout.axes
        opened = tensorstore.open(tensorstore_spec(store, layout), open=True, read=True).result()
        assert_same_bits(opened.read().result(), values)
        assert opened.domain.labels == layout.axes


@WRITERS
@settings(deadline=None, max_examples=40)
@given(layout=layouts(least=1, zstd_levels=PLAIN_OR_ZSTD))
def test_we_read_what_others_write(write: Writer, layout: ArrayLayout) -> None:
    values = nowhere_zero(layout)
    with TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        declare_array(store, layout)
        write(store, layout, values, [range(layout.num_rows)])
        for reader in readers(store, layout):
            assert_same_bits(reader.read(), values)


@WRITERS
@settings(deadline=None, max_examples=40)
@given(layout=layouts(least=1, zstd_levels=PLAIN_OR_ZSTD), data=st.data())
def test_what_others_left_out_is_an_error_and_the_rest_is_read(
    write: Writer, layout: ArrayLayout, data: st.DataObject
) -> None:
    values = nowhere_zero(layout)
    starts = range(0, layout.num_rows, layout.chunk_rows)
    chunks = [range(start, min(start + layout.chunk_rows, layout.num_rows)) for start in starts]
    written = data.draw(st.lists(st.sampled_from(chunks), max_size=len(chunks), unique=True))
    with TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        declare_array(store, layout)
        write(store, layout, values, written)
        for reader in readers(store, layout):
            there = [row for chunk in written for row in chunk]
            assert_same_bits(reader.read(there), values[there])
            for chunk in chunks:
                if chunk not in written:
                    with pytest.raises(DamagedStoreError, match=r"the shard is missing|was never written"):
                        reader.read([*there, chunk[-1]])


def test_zeros_that_another_writer_leaves_out_are_not_guessed(tmp_path: Path) -> None:
    layout = ArrayLayout("values", (4, 2), np.dtype(np.float32), 1, 4, ("row", "a"))
    declare_array(tmp_path / "store", layout)
    values = np.ones((4, 2), np.float32)
    values[2] = 0
    write_with_zarr_python(tmp_path / "store", layout, values, [range(4)])
    for reader in readers(tmp_path / "store", layout):
        assert_same_bits(reader.read([0, 1, 3]), values[[0, 1, 3]])
        with pytest.raises(DamagedStoreError, match="chunk 2 was never written"):
            reader.read()


@pytest.mark.parametrize("zstd_level", [None, 3])
def test_zeros_of_ours_are_written_like_anything_else(tmp_path: Path, zstd_level: int | None) -> None:
    layout = ArrayLayout("values", (5, 2), np.dtype(np.float32), 2, 4, ("row", "a"), zstd_level)
    values = np.zeros((5, 2), np.float32)
    write_array(tmp_path / "store", layout, values)
    for reader in readers(tmp_path / "store", layout):
        assert_same_bits(reader.read(), values)


@settings(deadline=None, max_examples=30)
@given(layouts(least=1, zstd_levels=st.sampled_from([-3, 1, 9])))
def test_a_shard_is_compressed_into_the_same_bytes_each_time(layout: ArrayLayout) -> None:
    rows = values_of(layout)[: layout.shard_rows]
    assert bytes(encode_shard(rows, layout)) == bytes(encode_shard(rows.copy(order="F"), layout))


def test_compression_is_worth_it_where_rows_are_alike() -> None:
    layout = ArrayLayout("values", (8, 1000), np.dtype(np.float32), 1, 8, ("row", "a"), 3)
    assert len(encode_shard(np.ones(layout.shape, np.float32), layout)) < 1000


@pytest.mark.parametrize("zstd_level", [None, 3])
def test_rows_that_hold_no_values_can_be_written_and_read(tmp_path: Path, zstd_level: int | None) -> None:
    layout = ArrayLayout("values", (3, 0), np.dtype(np.float32), 1, 2, ("row", "a"), zstd_level)
    write_array(tmp_path / "store", layout, np.zeros((3, 0), np.float32))
    for reader in readers(tmp_path / "store", layout):
        assert reader.read().shape == (3, 0)
