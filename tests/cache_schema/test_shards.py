"""What is written is what is read, by us and by other readers of zarr; what is damaged is never read at all."""

from __future__ import annotations

import gc
import json
import math
import os
import threading
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec

from cache_schema import atomic
from cache_schema.errors import DamagedStoreError
from cache_schema.layout import CRC_BYTES, INDEX_ENTRY_BYTES, ArrayLayout, whole
from cache_schema.reader import ArrayReader, OpenFiles, ShardFiles
from cache_schema.shards import MISSING, ShardBuffer, encode_shard
from tests.cache_schema.toys import DTYPES, assert_same_bits, layout_of, layouts, values_of, write_array


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


# Round trips


@settings(deadline=None, max_examples=150)
@given(layouts(), st.integers(0, 99))
def test_what_is_read_is_what_was_written(layout: ArrayLayout, seed: int) -> None:
    values = values_of(layout, seed)
    with TemporaryDirectory() as folder:
        write_array(Path(folder) / "store", layout, values)
        reader = ArrayReader(ShardFiles(Path(folder) / "store", layout))
        assert (len(reader), reader.shape, reader.dtype) == (len(values), values.shape, values.dtype)
        assert_same_bits(reader.read(), values)
        assert_same_bits(reader.read(verify=False), values)


@settings(deadline=None, max_examples=100)
@given(layouts().filter(lambda layout: layout.num_rows > 0), st.data())
def test_rows_come_in_the_order_they_are_asked_for_as_often_as_they_are(
    layout: ArrayLayout, data: st.DataObject
) -> None:
    values = values_of(layout)
    rows = data.draw(st.lists(st.integers(0, layout.num_rows - 1), max_size=20))
    with TemporaryDirectory() as folder:
        write_array(Path(folder) / "store", layout, values)
        reader = ArrayReader(ShardFiles(Path(folder) / "store", layout))
        assert_same_bits(reader.read(rows), values[rows])
        out = np.empty((len(rows), *layout.shape[1:]), layout.dtype)
        assert reader.read(np.array(rows, np.int32), out=out) is out
        assert_same_bits(out, values[rows])


def create_with_zarr_python(folder: Path, layout: ArrayLayout) -> zarr.Array[Any]:
    """The array of a layout, made by zarr-python out of the same codecs."""
    return zarr.create_array(
        folder,
        name=layout.name,
        shape=layout.shape,
        chunks=(layout.chunk_rows, *layout.shape[1:]),
        shards=(layout.shard_rows, *layout.shape[1:]),
        dtype=layout.dtype,
        filters=(),
        serializer=BytesCodec(),
        compressors=(Crc32cCodec(),),
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=layout.axes,
        config={"write_empty_chunks": True},
    )


@settings(deadline=None, max_examples=40)
@given(layouts().filter(lambda layout: math.prod(layout.shape) > 0), st.integers(0, 99))
def test_we_read_what_zarr_python_writes_with_the_same_codecs(layout: ArrayLayout, seed: int) -> None:
    values = values_of(layout, seed)
    with TemporaryDirectory() as folder:
        array = create_with_zarr_python(Path(folder), layout)
        array[...] = values
        assert_same_bits(ArrayReader(ShardFiles(Path(folder), layout)).read(), values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_metadata_is_zarr_pythons_own(tmp_path: Path, dtype: str) -> None:
    layout = layout_of((7, 2, 3), dtype, chunk_rows=2, chunks_per_shard=3)
    create_with_zarr_python(tmp_path, layout)
    theirs = json.loads((tmp_path / "values" / "zarr.json").read_bytes())
    ours = layout.to_metadata()
    if layout.dtype.itemsize == 1:  # bytes have no order, which we name all the same
        sharding = theirs["codecs"][0]["configuration"]
        assert sharding["codecs"][0] == {"name": "bytes"}
        sharding["codecs"][0] = {"name": "bytes", "configuration": {"endian": "little"}}
    assert ours == theirs
    assert ArrayLayout.from_metadata("values", ours) == layout


def test_arrays_of_no_rows_and_of_empty_rows_are_read_without_a_file(store: Path) -> None:
    assert ArrayReader(ShardFiles(store, layout_of((0, 3)))).read().shape == (0, 3)
    assert ArrayReader(ShardFiles(store, layout_of((4, 0)))).read([3, 1]).shape == (2, 0)


# Layouts


def test_a_chunk_lies_where_the_format_says(store: Path) -> None:
    layout = layout_of((5, 3), "uint8", chunk_rows=2, chunks_per_shard=3)
    values = values_of(layout)
    shard = bytes(encode_shard(values, layout))
    assert layout.num_shards == 1
    assert len(shard) == 3 * (6 + CRC_BYTES) + 3 * INDEX_ENTRY_BYTES + CRC_BYTES
    last = values[4].tobytes() + bytes(3)
    assert shard[20:30] == last + google_crc32c.value(last).to_bytes(4, "little")
    index = np.frombuffer(shard[30:-CRC_BYTES], "<u8").reshape(3, 2)
    assert index.tolist() == [[0, 10], [10, 10], [20, 10]]
    assert shard[-CRC_BYTES:] == google_crc32c.value(shard[30:-CRC_BYTES]).to_bytes(4, "little")


def test_chunks_past_the_end_of_the_array_are_marked_missing() -> None:
    layout = layout_of((1, 3), "uint8", chunk_rows=1, chunks_per_shard=3)
    index = np.frombuffer(bytes(encode_shard(values_of(layout), layout))[7:-CRC_BYTES], "<u8").reshape(3, 2)
    assert index.tolist() == [[0, 7], [MISSING, MISSING], [MISSING, MISSING]]


def test_shards_share_the_rows_out_among_them() -> None:
    layout = layout_of((10, 2), chunk_rows=2, chunks_per_shard=2)
    assert [layout.rows_of_shard(shard) for shard in range(layout.num_shards)] == [
        range(0, 4),
        range(4, 8),
        range(8, 10),
    ]
    assert [layout.shard_key(shard) for shard in (0, 12)] == ["values/c.0.0", "values/c.12.0"]


def test_a_small_array_is_one_chunk_of_one_shard() -> None:
    assert whole("offsets", (4,), "int64", ("start",)).num_shards == 1
    assert whole("offsets", (0,), "int64", ("start",)).num_shards == 0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"axes": ("row",)}, "as long as each other"),
        ({"shape": (), "axes": ()}, "as long as each other"),
        ({"chunk_rows": 0}, "no multiple"),
        ({"chunk_rows": 3}, "a shard of 4 rows is no multiple of 3"),
    ],
)
def test_a_layout_that_does_not_add_up_is_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(layout_of((8, 2), chunk_rows=2, chunks_per_shard=2), **change)


@pytest.mark.parametrize(
    "change",
    [
        {"zarr_format": 2},
        {"node_type": "group"},
        {"data_type": "float99"},
        {"data_type": "float64"},
        {"codecs": []},
        {"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]},
        {"codecs": None},
        {"dimension_names": None},
        {"dimension_names": ["row"]},
        {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}}},
        {"storage_transformers": [{"name": "another"}]},
        {"shape": 8},
        {"shape": [8, 2, 1]},
    ],
)
def test_an_array_that_is_stored_in_another_way_is_not_taken_for_ours(change: dict[str, Any]) -> None:
    metadata = layout_of((8, 2), chunk_rows=2, chunks_per_shard=2).to_metadata()
    if "data_type" in change:  # a number that this data type spells in another way
        metadata["fill_value"] = 1
    with pytest.raises(ValueError, match=r"values|data type 'float99' not understood"):
        ArrayLayout.from_metadata("values", metadata | change)


@pytest.mark.parametrize("codec", ["codecs", "index_codecs", "index_location"])
def test_an_array_with_another_codec_is_not_taken_for_ours(codec: str) -> None:
    metadata = layout_of((8, 2)).to_metadata()
    sharding = dict(metadata["codecs"][0]["configuration"])
    sharding[codec] = "start" if codec == "index_location" else [*sharding[codec], {"name": "gzip"}]
    metadata["codecs"] = [{"name": "sharding_indexed", "configuration": sharding}]
    with pytest.raises(ValueError, match=r"not (a sharded array|stored in the sharded layout) of this schema"):
        ArrayLayout.from_metadata("values", metadata)


@pytest.mark.parametrize(
    "rows",
    [
        np.zeros((0, 3), np.float32),
        np.zeros((3, 3), np.float32),
        np.zeros((2, 4), np.float32),
        np.zeros((2, 3, 1), np.float32),
        np.zeros((2, 3), np.float64),
        np.zeros((2, 3), ">f4"),
    ],
)
def test_rows_that_do_not_fit_the_layout_are_not_encoded(rows: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match=r"values: expected 1 to 2 rows of float32 \(3,\), got"):
        encode_shard(rows, layout_of((4, 3), chunk_rows=2))


def test_rows_may_lie_in_memory_in_any_order() -> None:
    layout = layout_of((4, 3), chunk_rows=2, chunks_per_shard=2)
    values = values_of(layout)
    wide = np.repeat(values, 2, axis=1)
    expected = bytes(encode_shard(values, layout))
    assert bytes(encode_shard(np.asfortranarray(values), layout)) == expected
    assert bytes(encode_shard(wide[:, ::2], layout)) == expected


# What is asked for


@pytest.fixture
def reader(store: Path) -> ArrayReader:
    layout = layout_of((7, 3), chunk_rows=2, chunks_per_shard=2)
    write_array(store, layout, values_of(layout))
    return ArrayReader(ShardFiles(store, layout))


@pytest.mark.parametrize("rows", [[7], [-1], [0, 99], [3, -8, 1]])
def test_a_row_that_is_not_there_is_an_index_error(reader: ArrayReader, rows: list[int]) -> None:
    with pytest.raises(IndexError, match=f"values has 7 rows; asked for {min(rows)} to {max(rows)}"):
        reader.read(rows)


@pytest.mark.parametrize(
    "out",
    [
        np.empty((3, 3), np.float32),
        np.empty((2, 4), np.float32),
        np.empty((2, 3, 1), np.float32),
        np.empty((2, 3), np.float64),
        np.empty((3, 2), np.float32).T,
        np.empty((2, 6), np.float32)[:, ::2],
    ],
)
def test_a_buffer_that_does_not_fit_is_refused(reader: ArrayReader, out: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match=r"values: `out` must be writable, C-contiguous float32 \(2, 3\)"):
        reader.read([0, 1], out=out)


def test_a_buffer_may_be_part_of_a_larger_one(reader: ArrayReader) -> None:
    pool = np.full((4, 3), 7, np.float32)
    reader.read([6, 0], out=pool[1:3])
    assert_same_bits(pool[1:3], reader.read()[[6, 0]])
    assert (pool[[0, 3]] == 7).all()


def test_what_was_read_belongs_to_the_caller(reader: ArrayReader) -> None:
    first = reader.read([5])
    first[:] = 0
    assert_same_bits(reader.read([5]), reader.read()[[5]])


# Damage


def assert_refused(store: Path, layout: ArrayLayout, complaint: str = "", shard: int = 0) -> None:
    key = layout.shard_key(shard)
    with pytest.raises(DamagedStoreError, match=complaint) as caught:
        ArrayReader(ShardFiles(store, layout)).read()
    assert str(store / key) in str(caught.value)
    assert "`headstart cache repair` extracts what is damaged again" in str(caught.value)


def test_every_single_bit_of_a_shard_is_guarded(store: Path) -> None:
    layout = layout_of((5,), "uint8", chunk_rows=2, chunks_per_shard=4)
    write_array(store, layout, values_of(layout))
    path = store / layout.shard_key(0)
    sound = path.read_bytes()
    for bit in range(len(sound) * 8):
        flipped = bytearray(sound)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(DamagedStoreError, match="fails its checksum"):
            ArrayReader(ShardFiles(store, layout)).read()
    path.write_bytes(sound)
    assert_same_bits(ArrayReader(ShardFiles(store, layout)).read(), values_of(layout))


@settings(deadline=None, max_examples=100)
@given(layouts().filter(lambda layout: math.prod(layout.shape) > 0), st.data())
def test_a_flipped_bit_anywhere_in_an_array_is_found(layout: ArrayLayout, data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        write_array(store, layout, values_of(layout))
        shard = data.draw(st.integers(0, layout.num_shards - 1))
        path = store / layout.shard_key(shard)
        flipped = bytearray(path.read_bytes())
        bit = data.draw(st.integers(0, len(flipped) * 8 - 1))
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert_refused(store, layout, "fails its checksum", shard)


@pytest.mark.parametrize("verify", [True, False])
def test_a_shard_that_was_cut_short_or_grew_is_found_even_without_checksums(store: Path, verify: bool) -> None:
    layout = layout_of((5, 2), "int32", chunk_rows=2, chunks_per_shard=3)
    write_array(store, layout, values_of(layout))
    path = store / layout.shard_key(0)
    sound = path.read_bytes()
    for damaged in [*(sound[:size] for size in range(len(sound))), sound + b"\0"]:
        path.write_bytes(damaged)
        with pytest.raises(DamagedStoreError, match=r"shorter than its index|index fails its checksum"):
            ArrayReader(ShardFiles(store, layout)).read(verify=verify)


def test_an_empty_shard_is_damage(store: Path) -> None:
    layout = layout_of((4, 3))
    write_array(store, layout, values_of(layout))
    (store / layout.shard_key(2)).write_bytes(b"")
    assert_refused(store, layout, "shorter than its index", 2)


@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_shard_is_damage_and_not_the_fill_value(store: Path, verify: bool) -> None:
    layout = layout_of((4, 3))
    write_array(store, layout, values_of(layout))
    (store / layout.shard_key(2)).unlink()
    assert_refused(store, layout, "the shard is missing", 2)
    reader = ArrayReader(ShardFiles(store, layout))
    assert_same_bits(reader.read([0, 1, 3], verify=verify), values_of(layout)[[0, 1, 3]])


def rewrite_index(path: Path, layout: ArrayLayout, chunk: int, entry: tuple[int, int]) -> None:
    """Change one entry of a shard's index and make its checksum fit."""
    data = path.read_bytes()
    body, index = data[: -layout.index_bytes], np.frombuffer(data[-layout.index_bytes : -CRC_BYTES], "<u8").copy()
    index[2 * chunk : 2 * chunk + 2] = entry
    path.write_bytes(body + index.tobytes() + google_crc32c.value(index.tobytes()).to_bytes(4, "little"))


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ((MISSING, MISSING), "chunk 1 was never written"),
        ((12, 11), "chunk 1 holds 11 bytes where 12 are due"),
        ((12, 0), "chunk 1 holds 0 bytes"),
        ((12, 2**63 + 12), "chunk 1 holds"),
        ((10_000, 12), "the file ends inside chunk 1"),
        ((2**63 - 20, 12), "the file ends inside chunk 1"),
        ((30, 12), "chunk 1 fails its checksum"),
        ((13, 12), "chunk 1 fails its checksum"),
    ],
)
def test_an_index_that_points_elsewhere_is_damage(store: Path, entry: tuple[int, int], complaint: str) -> None:
    layout = layout_of((3, 2), "int32", chunks_per_shard=3)
    write_array(store, layout, values_of(layout))
    rewrite_index(store / layout.shard_key(0), layout, 1, entry)
    assert_refused(store, layout, complaint)
    assert_same_bits(ArrayReader(ShardFiles(store, layout)).read([0, 2]), values_of(layout)[[0, 2]])


def test_a_chunk_marked_missing_is_damage_even_where_others_read_zeros(store: Path) -> None:
    layout = layout_of((3, 2), "int32", chunks_per_shard=3)
    write_array(store, layout, values_of(layout))
    rewrite_index(store / layout.shard_key(0), layout, 2, (MISSING, MISSING))
    assert (zarr.open_array(store / "values", mode="r")[2] == 0).all()
    for verify in (True, False):
        with pytest.raises(DamagedStoreError, match="chunk 2 was never written"):
            ArrayReader(ShardFiles(store, layout)).read([2], verify=verify)


# Files


def open_files_under(folder: Path) -> int:
    return sum(os.path.realpath(link).startswith(str(folder)) for link in Path("/proc/self/fd").iterdir())


@pytest.fixture
def many_shards(store: Path) -> tuple[ArrayLayout, NDArray[Any]]:
    """An array of 15 shards."""
    layout = layout_of((30, 4), "float16", chunks_per_shard=2)
    values = values_of(layout)
    write_array(store, layout, values)
    return layout, values


def test_an_array_of_more_shards_than_may_be_open_is_read_all_the_same(
    store: Path, many_shards: tuple[ArrayLayout, NDArray[Any]]
) -> None:
    layout, values = many_shards
    reader = ArrayReader(ShardFiles(store, layout), OpenFiles(limit=3))
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows = rng.integers(0, len(values), 12)
        assert_same_bits(reader.read(rows), values[rows])
        assert open_files_under(store) <= 3
    assert_same_bits(reader.read(), values)


def test_the_readers_of_a_store_share_what_may_be_open(
    store: Path, many_shards: tuple[ArrayLayout, NDArray[Any]]
) -> None:
    layout, values = many_shards
    other = replace(layout, name="others")
    write_array(store / "more", other, values)
    files = OpenFiles(limit=4)
    readers = [ArrayReader(ShardFiles(store, layout), files), ArrayReader(ShardFiles(store / "more", other), files)]
    for row in range(len(values)):
        for reader in readers:
            assert_same_bits(reader.read([row]), values[[row]])
    assert open_files_under(store) == 4
    readers[0].close()
    assert open_files_under(store) == 0


def test_the_shards_used_last_stay_open(
    store: Path, many_shards: tuple[ArrayLayout, NDArray[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    open_file = os.open

    def watched(path: Path, *options: Any) -> int:
        opened.append(int(Path(path).name.split(".")[1]))
        return open_file(path, *options)

    reader = ArrayReader(ShardFiles(store, many_shards[0]), OpenFiles(limit=2))
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", watched)
        for row in (0, 2, 0, 4, 0, 2):
            reader.read([row])
    assert opened == [0, 1, 2, 1]


def test_a_file_that_is_in_use_survives_being_dropped(
    store: Path, many_shards: tuple[ArrayLayout, NDArray[Any]]
) -> None:
    layout, _ = many_shards
    files = OpenFiles(limit=1)
    in_use = files.get(0, lambda: store / layout.shard_key(0))
    files.get(1, lambda: store / layout.shard_key(1))
    files.close()
    expected = (store / layout.shard_key(0)).read_bytes()
    found = bytearray(len(expected))
    assert in_use.read_into([found], 0, len(found))
    assert found == expected
    assert open_files_under(store) == 1
    del in_use
    gc.collect()
    assert open_files_under(store) == 0


def test_threads_may_share_a_reader(store: Path, many_shards: tuple[ArrayLayout, NDArray[Any]]) -> None:
    layout, values = many_shards
    reader = ArrayReader(ShardFiles(store, layout), OpenFiles(limit=1))
    wrong: list[NDArray[Any]] = []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(50):
            rows = rng.integers(0, len(values), 6)
            if reader.read(rows).tobytes() != values[rows].tobytes():
                wrong.append(rows)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert open_files_under(store) == 1


def test_a_closed_reader_holds_no_file_and_opens_them_again(
    store: Path, many_shards: tuple[ArrayLayout, NDArray[Any]]
) -> None:
    layout, values = many_shards
    reader = ArrayReader(ShardFiles(store, layout))
    reader.read()
    assert open_files_under(store) == 15
    reader.close()
    assert open_files_under(store) == 0
    assert_same_bits(reader.read([29]), values[[29]])


def test_a_forgotten_reader_closes_its_files(store: Path) -> None:
    layout = layout_of((4, 3))
    write_array(store, layout, values_of(layout))
    reader = ArrayReader(ShardFiles(store, layout))
    reader.read()
    assert open_files_under(store) == 4
    del reader
    gc.collect()
    assert open_files_under(store) == 0


def test_a_shard_that_is_refused_is_not_held_open(store: Path) -> None:
    layout = layout_of((4, 3))
    write_array(store, layout, values_of(layout))
    (store / layout.shard_key(0)).write_bytes(b"short")
    reader = ArrayReader(ShardFiles(store, layout))
    for _ in range(3):
        with pytest.raises(DamagedStoreError):
            reader.read([0])
    assert open_files_under(store) == 0


@pytest.mark.parametrize("part", ["payload", "index", "all"])
def test_a_shard_that_was_refused_is_read_again_once_it_is_mended(store: Path, part: str) -> None:
    layout = layout_of((4, 3), chunks_per_shard=2)
    write_array(store, layout, values_of(layout))
    path = store / layout.shard_key(1)
    sound = path.read_bytes()
    damaged = bytearray(sound)
    damaged[3 if part == "payload" else -3] ^= 1
    if part == "all":
        path.unlink()
    else:
        path.write_bytes(damaged)
    reader = ArrayReader(ShardFiles(store, layout))
    with pytest.raises(DamagedStoreError):
        reader.read()
    atomic.write_file(path, sound)  # as a repair publishes it
    assert_same_bits(reader.read(), values_of(layout))


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("num_rows", [1, 3, 4])
def test_a_buffer_that_is_filled_in_place_is_the_shard_of_its_rows(dtype: str, num_rows: int) -> None:
    layout = ArrayLayout("a", (11, 2, 6), np.dtype(dtype), 1, 4, ("row", "y", "x"))
    rows = np.random.default_rng(0).integers(-100, 100, (num_rows, 2, 6)).astype(dtype)
    buffer = ShardBuffer(layout, num_rows)
    buffer.rows[...] = rows
    assert bytes(buffer.seal()) == bytes(encode_shard(rows, layout))


def test_a_buffer_may_be_filled_again_after_it_was_sealed() -> None:
    layout = ArrayLayout("a", (8, 4), np.dtype("float32"), 1, 4, ("row", "x"))
    buffer = ShardBuffer(layout, 4, np.empty(1000, np.uint8))
    for value in (1.0, 2.0):
        buffer.rows[...] = value
        assert bytes(buffer.seal()) == bytes(encode_shard(np.full((4, 4), value, np.float32), layout))


def test_only_plain_shards_with_a_row_in_each_chunk_are_filled_in_place() -> None:
    suited = ArrayLayout("a", (8, 4), np.dtype("float16"), 1, 4, ("row", "x"))
    for changes in ({"chunk_rows": 2}, {"zstd_level": 3}, {"shape": (8, 3)}, {"shape": (8, 0)}):
        layout = replace(suited, **changes)
        assert not ShardBuffer.suits(layout)
        with pytest.raises(ValueError, match="do not lie one by one in a plain shard"):
            ShardBuffer(layout, 4)
    assert ShardBuffer.suits(suited)
