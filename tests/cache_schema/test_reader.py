"""Rows are read in few system calls, on any number of threads, and are the same rows whatever way they are read."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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

from cache_schema import reader as reading
from cache_schema.errors import DamagedStoreError
from cache_schema.layout import CRC_BYTES, ArrayLayout
from cache_schema.reader import ArrayReader, OpenFiles, ShardFiles, default_threads, run_on_threads
from cache_schema.shards import MISSING, encode_shard
from cache_schema.zarr_reader import ZarrReader
from tests.cache_schema.toys import (
    PLAIN_OR_ZSTD,
    assert_same_bits,
    declare_array,
    flip_byte,
    layout_of,
    layouts,
    values_of,
    write_array,
)


@dataclass(frozen=True)
class Call:
    """One positioned read of a shard's file: where it began, and how many bytes it gave."""

    offset: int
    num_bytes: int


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Every positioned read from now on."""
    made: list[Call] = []
    preadv = os.preadv

    def watched(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        num_bytes = preadv(descriptor, buffers, offset)
        made.append(Call(offset, num_bytes))
        return num_bytes

    monkeypatch.setattr(os, "preadv", watched)
    return made


@pytest.fixture
def _threads_for_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Share even small requests out among threads, two chunks at a time."""
    monkeypatch.setattr(reading, "_WORTH_A_THREAD_BYTES", 0)
    monkeypatch.setattr(reading, "_RUN_CHUNKS", 2)


# The same values


@st.composite
def requests(draw: st.DrawFn, layout: ArrayLayout) -> NDArray[np.int64]:
    """Rows of an array: in order, in any order, some of them twice; whole chunks among them."""
    some = draw(st.lists(st.integers(0, layout.num_rows - 1), max_size=20))
    first = draw(st.integers(0, layout.num_rows))
    stretch = list(range(first, draw(st.integers(first, layout.num_rows))))
    rows = draw(st.sampled_from([some, stretch, some + stretch, stretch + some, stretch[::-1], stretch * 2]))
    return np.array(rows, draw(st.sampled_from(["int64", "int32", "uint8"])))


@settings(deadline=None, max_examples=150)
@given(layouts(least=1), st.data())
def test_rows_are_those_that_numpy_picks_whatever_the_threads(layout: ArrayLayout, data: st.DataObject) -> None:
    values, rows = values_of(layout), data.draw(requests(layout))
    out = np.full((len(rows), *layout.shape[1:]), 1, layout.dtype)
    options = {"threads": data.draw(st.sampled_from([1, 2, 4])), "verify": data.draw(st.booleans())}
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_WORTH_A_THREAD_BYTES", 0)
        patch.setattr(reading, "_RUN_CHUNKS", data.draw(st.integers(1, 4)))
        write_array(Path(folder) / "store", layout, values)
        files = OpenFiles(limit=data.draw(st.integers(1, 3)))
        assert ArrayReader(ShardFiles(Path(folder) / "store", layout), files).read(rows, out=out, **options) is out
    assert_same_bits(out, values[rows])


@settings(deadline=None, max_examples=25)
@given(layouts(least=1, zstd_levels=PLAIN_OR_ZSTD), st.data())
def test_zarrs_reader_picks_the_same_rows(layout: ArrayLayout, data: st.DataObject) -> None:
    values, rows = values_of(layout), data.draw(requests(layout))
    out = np.full((len(rows), *layout.shape[1:]), 1, layout.dtype)
    with TemporaryDirectory() as folder:
        write_array(Path(folder) / "store", layout, values)
        assert ZarrReader(Path(folder) / "store", layout).read(rows, out=out) is out
    assert_same_bits(out, values[rows])


@pytest.mark.parametrize("order", ["sorted", "random"])
def test_megabytes_are_read_by_several_threads_into_place(store: Path, order: str) -> None:
    layout = layout_of((600, 64, 32), "float16", chunks_per_shard=64)
    values = values_of(layout)
    write_array(store, layout, values)
    rows = np.arange(600) if order == "sorted" else np.random.default_rng(0).permutation(600)
    out = np.zeros(values.shape, values.dtype)
    for threads in (1, 2, 4, None):
        out[...] = 0
        ArrayReader(ShardFiles(store, layout)).read(rows, out=out, threads=threads)
        assert_same_bits(out, values[rows])


@pytest.mark.parametrize("make", [ArrayReader, ZarrReader], ids=["ours", "zarr's"])
def test_nothing_is_read_for_no_rows(store: Path, make: Any) -> None:
    layout = layout_of((4, 3))  # no file is there
    reader = ArrayReader(ShardFiles(store, layout)) if make is ArrayReader else ZarrReader(store, layout)
    assert reader.read([]).shape == (0, 3)
    assert reader.read(np.zeros(0)).shape == (0, 3)


@pytest.mark.parametrize("make", [ArrayReader, ZarrReader], ids=["ours", "zarr's"])
@pytest.mark.parametrize(
    ("rows", "error", "complaint"),
    [
        ([True, False, True, False], TypeError, "rows are whole numbers, not bool; a mask needs np.flatnonzero"),
        ([0.0], TypeError, "rows are whole numbers, not float64"),
        ([4], IndexError, "values has 4 rows; asked for 4 to 4"),
        ([2, -1], IndexError, "values has 4 rows; asked for -1 to 2"),
    ],
)
def test_what_is_no_row_is_refused(store: Path, make: Any, rows: list[Any], error: Any, complaint: str) -> None:
    layout = layout_of((4, 3))
    write_array(store, layout, values_of(layout))
    reader = ArrayReader(ShardFiles(store, layout)) if make is ArrayReader else ZarrReader(store, layout)
    with pytest.raises(error, match=complaint):
        reader.read(rows)


# System calls


def test_neighbouring_chunks_of_a_shard_are_one_system_call(store: Path, calls: list[Call]) -> None:
    layout = layout_of((24, 3), "int32", chunks_per_shard=8)
    values = values_of(layout)
    write_array(store, layout, values)
    reader = ArrayReader(ShardFiles(store, layout))
    assert_same_bits(reader.read(), values)
    assert len(calls) == 6  # the index of each shard, then all its chunks
    del calls[:]
    assert_same_bits(reader.read(), values)
    assert calls == [Call(0, 8 * 16)] * 3, "the index is read once"
    del calls[:]
    assert_same_bits(reader.read([3, 4, 5]), values[3:6])
    assert calls == [Call(3 * 16, 3 * 16)]


def test_rows_in_random_order_are_sorted_into_as_few_system_calls(store: Path, calls: list[Call]) -> None:
    layout = layout_of((24, 3), "int32", chunks_per_shard=8)
    values = values_of(layout)
    write_array(store, layout, values)
    reader = ArrayReader(ShardFiles(store, layout))
    reader.read()
    del calls[:]
    order = np.random.default_rng(0).permutation(24)
    assert_same_bits(reader.read(order), values[order])
    assert sorted(calls, key=lambda call: call.offset) == [Call(0, 8 * 16)] * 3
    del calls[:]
    rows = [20, 2, 9, 1, 2, 21, 1]
    assert_same_bits(reader.read(rows), values[rows])
    assert calls == [Call(16, 2 * 16), Call(16, 16), Call(4 * 16, 2 * 16)], "a chunk is read once, and no other is"


def test_a_run_is_no_longer_than_a_system_call_takes(store: Path, calls: list[Call]) -> None:
    layout = layout_of((2000,), "uint8", chunks_per_shard=2000)
    values = values_of(layout)
    write_array(store, layout, values)
    assert_same_bits(ArrayReader(ShardFiles(store, layout)).read(), values)
    assert 2000 * 2 / os.sysconf("SC_IOV_MAX") < len(calls) - 1 < 20


@pytest.mark.parametrize("most", [1, 3, 5, 50])
@pytest.mark.parametrize("chunk_rows", [1, 2])
def test_a_read_that_the_system_cuts_short_is_carried_on(
    store: Path, monkeypatch: pytest.MonkeyPatch, most: int, chunk_rows: int
) -> None:
    layout = layout_of((7, 3), "int16", chunk_rows=chunk_rows, chunks_per_shard=3)
    values = values_of(layout)
    write_array(store, layout, values)

    def reluctant(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        """Fills a few bytes at a time, as a network filesystem may."""
        data = os.pread(descriptor, min(most, sum(len(buffer) for buffer in buffers)), offset)
        rest = data
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            view[: len(rest)] = rest[: len(view)]
            rest = rest[len(view) :]
        return len(data)

    monkeypatch.setattr(os, "preadv", reluctant)
    rows = [6, 0, 1, 2, 5, 3, 4]
    assert_same_bits(ArrayReader(ShardFiles(store, layout)).read(), values)
    assert_same_bits(ArrayReader(ShardFiles(store, layout)).read(rows), values[rows])


def write_shard_in_order(path: Path, layout: ArrayLayout, values: NDArray[Any], order: Sequence[int], gap: int) -> None:
    """A shard whose chunks lie in another order, with unused bytes before each, as the format allows."""
    chunk_bytes = layout.chunk_bytes + CRC_BYTES
    plain = bytes(encode_shard(values, layout))
    body, index = b"", np.full((layout.chunks_per_shard, 2), MISSING, "<u8")
    for chunk in order:
        body += b"\xaa" * gap
        index[chunk] = len(body), chunk_bytes
        body += plain[chunk * chunk_bytes : (chunk + 1) * chunk_bytes]
    tail = index.tobytes()
    path.write_bytes(body + tail + google_crc32c.value(tail).to_bytes(4, "little"))


@settings(deadline=None, max_examples=40)
@given(st.permutations(range(5)), st.integers(0, 3), st.integers(1, 3), st.data())
def test_chunks_that_another_writer_put_in_another_order_are_read_right(
    order: list[int], gap: int, chunk_rows: int, data: st.DataObject
) -> None:
    layout = layout_of((5 * chunk_rows, 2), "int16", chunk_rows=chunk_rows, chunks_per_shard=5)
    values, rows = values_of(layout), data.draw(requests(layout))
    with TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        write_array(store, layout, values)
        write_shard_in_order(store / layout.shard_key(0), layout, values, order, gap)
        assert_same_bits(zarr.open_array(store / "values", mode="r")[...], values)
        for reader in (ArrayReader(ShardFiles(store, layout)), ZarrReader(store, layout)):
            assert_same_bits(reader.read(), values)
            assert_same_bits(reader.read(rows), values[rows])


def test_chunks_in_another_order_still_share_a_system_call_where_they_follow_each_other(
    store: Path, calls: list[Call]
) -> None:
    layout = layout_of((5, 2), "int16", chunks_per_shard=5)
    values = values_of(layout)
    write_array(store, layout, values)
    write_shard_in_order(store / layout.shard_key(0), layout, values, [3, 4, 0, 1, 2], 0)
    assert_same_bits(ArrayReader(ShardFiles(store, layout)).read(), values)
    assert calls[1:] == [Call(16, 24), Call(0, 16)]


# What is missing, and what goes wrong


@pytest.mark.parametrize("zstd_level", [None, 3])
@pytest.mark.parametrize("make", [ArrayReader, ZarrReader], ids=["ours", "zarr's"])
def test_a_chunk_that_was_never_written_is_an_error_and_never_zeros(
    store: Path, make: Any, zstd_level: int | None
) -> None:
    if make is ArrayReader and zstd_level is not None:
        pytest.skip("our reader reads plain arrays")
    layout = layout_of((6, 2), "float32", chunks_per_shard=3, zstd_level=zstd_level)
    values = np.arange(12, dtype=np.float32).reshape(6, 2)
    declare_array(store, layout)
    array = zarr.open_array(store / "values", mode="r+")
    for row in (0, 2, 3):
        array[row] = values[row] + 1
    reader = ArrayReader(ShardFiles(store, layout)) if make is ArrayReader else ZarrReader(store, layout)
    assert_same_bits(reader.read([3, 0, 2]), values[[3, 0, 2]] + 1)
    for verify in (True, False):
        for rows in ([1], [0, 1], [4], None):
            with pytest.raises(DamagedStoreError, match=r"c\.[01]\.0: chunk 1 was never written"):
                reader.read(rows, verify=verify)
    (store / layout.shard_key(1)).unlink()
    reader.close()
    with pytest.raises(DamagedStoreError, match=r"c\.1\.0: the shard is missing"):
        reader.read([3])


@pytest.mark.parametrize("zstd_level", [None, 3])
def test_zarrs_reader_finds_what_is_damaged_and_says_where(store: Path, zstd_level: int | None) -> None:
    layout = layout_of((6, 2), "float32", chunks_per_shard=3, zstd_level=zstd_level)
    write_array(store, layout, values_of(layout))
    path = store / layout.shard_key(1)
    sound = path.read_bytes()
    for offset in range(len(sound)):
        flip_byte(path, offset)
        with pytest.raises(DamagedStoreError, match=r"headstart cache repair"):
            ZarrReader(store, layout).read()
        path.write_bytes(sound)
    for size in (0, 1, layout.index_bytes - 1, layout.index_bytes, len(sound) - 1):
        path.write_bytes(sound[:size])
        with pytest.raises(DamagedStoreError, match=r"headstart cache repair"):
            ZarrReader(store, layout).read([3])
    path.write_bytes(sound)
    assert_same_bits(ZarrReader(store, layout).read(), values_of(layout))


@pytest.mark.usefixtures("_threads_for_little")
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_damage_that_one_thread_finds_reaches_the_caller_and_leaves_the_reader_usable(
    store: Path, threads: int
) -> None:
    layout = layout_of((40, 3), "int32", chunks_per_shard=4)
    values = values_of(layout)
    write_array(store, layout, values)
    flip_byte(store / layout.shard_key(6))
    reader = ArrayReader(ShardFiles(store, layout))
    sound = np.flatnonzero(np.arange(40) // 4 != 6)
    for _ in range(20):
        with pytest.raises(DamagedStoreError, match=r"c\.6\.0: chunk 0 fails its checksum"):
            reader.read(threads=threads)
        assert_same_bits(reader.read(sound, threads=threads), values[sound])
    assert_same_bits(reader.read(verify=False, threads=threads)[sound], values[sound])


@pytest.mark.usefixtures("_threads_for_little")
def test_an_error_of_the_disk_reaches_the_caller_from_any_thread(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of((40, 3), "int32", chunks_per_shard=4)
    values = values_of(layout)
    write_array(store, layout, values)
    reader, preadv = ArrayReader(ShardFiles(store, layout)), os.preadv
    reader.read()
    caller = threading.get_ident()

    for in_caller in (True, False):
        together = threading.Barrier(2)

        def failing(*arguments: Any, together: threading.Barrier = together, in_caller: bool = in_caller) -> int:
            together.wait(10)
            if (threading.get_ident() == caller) == in_caller:
                raise OSError(5, "the disk gave up")
            return preadv(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", failing)
            with pytest.raises(OSError, match="the disk gave up"):
                reader.read([0, 8], threads=2)
        assert_same_bits(reader.read(threads=2), values)


def test_no_thread_works_on_once_the_caller_has_its_error() -> None:
    together, done, caller_is_back = threading.Barrier(4), threading.Event(), threading.Event()
    arrivals: Iterator[int] = iter(range(4))
    lock = threading.Lock()

    def work() -> None:
        with lock:
            arrival = next(arrivals)
        together.wait(10)
        if arrival < 3:
            raise OSError("one of the first")
        caller_is_back.wait(0.5)  # the caller must not come back while this one is at it
        done.set()

    with pytest.raises(OSError, match="one of the first"):
        run_on_threads(work, 4)
    was_done = done.is_set()
    caller_is_back.set()
    assert was_done


def test_work_that_is_done_before_a_helper_begins_needs_no_helper() -> None:
    done = threading.Lock()
    assert done.acquire()
    run_on_threads(lambda: done.release() if done.locked() else None, 100)
    assert not done.locked()


def test_by_default_there_are_as_many_threads_as_cores_but_few() -> None:
    assert 1 <= default_threads() <= reading.MAX_THREADS


def test_a_forked_process_reads_on_threads_of_its_own(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pools = dict(reading._pools)
    monkeypatch.setattr(reading, "_pools", pools)
    run_on_threads(lambda: None, 2)
    assert os.getpid() in pools
    monkeypatch.setattr(os, "getpid", lambda: -7)
    layout = layout_of((600, 64, 32), "float16", chunks_per_shard=64)
    write_array(store, layout, values_of(layout))
    assert_same_bits(ArrayReader(ShardFiles(store, layout)).read(threads=3), values_of(layout))
    assert pools[-7] is not pools[next(process for process in pools if process != -7)]
    pools[-7].shutdown()
