"""Columns on the disk hold what columns in memory would, and take little memory; so does the dict on the disk."""

from __future__ import annotations

import tracemalloc
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_schema import spilled
from cache_schema.errors import NoRoomError
from cache_schema.first_come import FirstCome
from cache_schema.layout import whole
from cache_schema.ragged import pack_bytes
from cache_schema.sample_columns import SampleColumns
from cache_schema.samples import ImageTable, SampleArrays, Samples, open_samples, write_samples
from cache_schema.shards import encode_shard, encode_whole
from cache_schema.spilled import Spill, SpilledArray, SpilledBytes, SpilledNames
from cache_schema.store import StaticArray, StoreHeader, StoreWriter, open_store

NUM_SAMPLES = 60
TARGETS = [b"" if row % 5 == 0 else b"counts %d" % row * 3 for row in range(NUM_SAMPLES)]


@pytest.fixture
def little_pending(monkeypatch: pytest.MonkeyPatch) -> None:
    """Almost nothing waits in memory, so that everything goes to the disk and comes back."""
    monkeypatch.setattr(spilled, "_PENDING_BYTES", 16)


def content_of(array: SpilledArray) -> np.ndarray:
    return np.frombuffer(b"".join(array.pieces()), array.dtype).reshape(array.shape)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=50), st.sampled_from([1, 7, 1 << 16]))
def test_numbers_come_back_as_they_were(numbers: list[int], pending_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch, Spill() as spill:
        patch.setattr(spilled, "_PENDING_BYTES", pending_bytes)
        array, other = SpilledArray(spill, np.int32), SpilledArray(spill, np.int64)
        for number in numbers:
            array.append(number)
            other.append(-number)
        assert content_of(array).tolist() == content_of(array).tolist() == numbers
        assert content_of(other).tolist() == [-number for number in numbers]
        assert array.shape == (len(array),) == (len(numbers),)


@pytest.mark.usefixtures("little_pending")
def test_byte_strings_lie_as_a_ragged_list_in_memory_does() -> None:
    with Spill() as spill:
        column = SpilledBytes(spill)
        for target in TARGETS:
            column.append(target)
        values, offsets = pack_bytes(TARGETS)
        np.testing.assert_array_equal(content_of(column.values), values)
        np.testing.assert_array_equal(content_of(column.offsets), offsets)


@pytest.mark.usefixtures("little_pending")
def test_names_become_places_in_their_sorted_vocabulary_and_gaps_minus_one() -> None:
    with Spill() as spill:
        column = SpilledNames(spill)
        column.pad(2)
        for name in ("val", "train", "val", "a"):
            column.append(name)
        column.pad(4)
        column.pad(8)
        names, places = column.encoded()
        assert names == ["a", "train", "val"]
        assert content_of(places).tolist() == [-1, -1, 2, 1, 2, 0, -1, -1]
        nobody = SpilledNames(spill)
        nobody.pad(1)
        assert nobody.encoded()[0] == []


@given(st.integers(1, 40), st.integers(1, 9))
def test_a_shard_in_pieces_is_the_shard_as_one(num_rows: int, piece_bytes: int) -> None:
    rows = np.arange(num_rows * 2, dtype=np.int32).reshape(num_rows, 2)
    layout = whole("sizes", rows.shape, rows.dtype, ("row", "hw"))
    data = rows.tobytes()
    pieces = [data[start : start + piece_bytes] for start in range(0, len(data), piece_bytes)]
    assert b"".join(encode_whole(pieces, layout)) == encode_shard(rows, layout)


@pytest.mark.usefixtures("little_pending")
def test_a_store_of_an_array_on_the_disk_is_that_of_the_array_in_memory(tmp_path: Path) -> None:
    values = np.arange(1000, dtype=np.int64)
    with Spill() as spill:
        array, none = SpilledArray(spill, np.int64), SpilledArray(spill, np.int64)
        array.extend(values.tobytes())
        for name, one, empty in (("disk", array, none), ("memory", values, values[:0])):
            header = StoreHeader("samples", {}, {})
            arrays = [StaticArray("a", one, ("row",)), StaticArray("b", empty, ("row",))]
            writer = StoreWriter(tmp_path / name, header, (), arrays)
            writer.begin()
            writer.finish(())
    assert files_of(tmp_path / "disk") == files_of(tmp_path / "memory")
    np.testing.assert_array_equal(open_store(writer.path).read("a"), values)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def fill(columns: SampleColumns, ignored: bool) -> SampleArrays:
    for number in range(3):
        columns.add_image(f"image {number}", f"é/{number}.jpg", (4 + number, 5), f"{number:064x}")
    for number in range(7):
        columns.add_prompt(f"prompt {number}, ü")
    for row, target in enumerate(TARGETS):
        columns.add(
            f"sample {row}",
            row % 3,
            row % 7,
            target=target,
            ignored=b"some" if ignored and row % 2 else b"",
            no_target=row % 4 == 0,
            split=("val", "train")[row % 2],
            tags=tags_of(row),
        )
    return columns.arrays(("one", "two"))


def tags_of(row: int) -> dict[str, str]:
    tags = {"late": f"z{row % 2}"} if row > 40 else {}
    return tags | ({"early": "only"} if row < 3 else {})


def in_memory(ignored: bool) -> Samples:
    rows = range(NUM_SAMPLES)
    return Samples(
        images=ImageTable(
            ids=[f"image {number}" for number in range(3)],
            paths=[f"é/{number}.jpg" for number in range(3)],
            sizes=np.array([(4 + number, 5) for number in range(3)], np.int32),
            sha256=[f"{number:064x}" for number in range(3)],
        ),
        prompts=[f"prompt {number}, ü" for number in range(7)],
        ids=[f"sample {row}" for row in rows],
        image_rows=np.array([row % 3 for row in rows], np.int32),
        prompt_rows=np.array([row % 7 for row in rows], np.int32),
        targets=TARGETS,
        no_target=np.array([row % 4 == 0 for row in rows]),
        splits=[("val", "train")[row % 2] for row in rows],
        tags={name: [tags_of(row).get(name) for row in rows] for name in ("late", "early")},
        ignored=[b"some" if row % 2 else b"" for row in rows] if ignored else (),
        classes=("one", "two"),
    )


@pytest.mark.usefixtures("little_pending")
@pytest.mark.parametrize("ignored", [False, True])
def test_samples_that_grew_on_the_disk_give_the_store_of_samples_in_memory(tmp_path: Path, ignored: bool) -> None:
    def write(name: str, samples: Samples | SampleArrays) -> None:
        write_samples(
            tmp_path / name, samples, dataset="d", sources={"f": "0" * 64}, image_dir=tmp_path, libraries={"numpy": "2"}
        )

    with SampleColumns() as columns:
        write("disk", fill(columns, ignored))
        assert (len(columns), columns.num_images, columns.num_prompts) == (NUM_SAMPLES, 3, 7)
    write("memory", in_memory(ignored))
    disk, memory = files_of(tmp_path / "disk"), files_of(tmp_path / "memory")
    assert len(disk) > 30
    assert disk == memory
    (store,) = (tmp_path / "disk").iterdir()
    assert open_samples(store).samples.targets == TARGETS


def test_memory_does_not_grow_with_the_samples() -> None:
    num_samples, target = 4000, bytes(4096)

    def add_and_read() -> None:
        with SampleColumns() as columns:
            for row in range(num_samples):
                columns.add(str(row), 0, 0, target=target, ignored=b"", no_target=False, split="train", tags={"t": "a"})
            for array in columns.arrays().arrays:
                assert isinstance(array.values, SpilledArray)
                num_bytes = sum(map(len, array.values.pieces()))
                assert num_bytes == array.values.dtype.itemsize * np.prod(array.values.shape)

    assert peak_of(add_and_read) < 2**21 < num_samples * len(target) / 4


def peak_of(work: Callable[[], object]) -> int:
    """The most bytes that Python and numpy hold at once meanwhile."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_full_disk_for_temporary_files_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with Spill() as spill, Path("/dev/full").open("wb", buffering=0) as full:
        spill.close()
        monkeypatch.setattr(spill, "_file", full)
        with pytest.raises(NoRoomError, match=r"no room for temporary files in .*set TMPDIR to a folder"):
            spill.write(bytearray(10))


KEYS = st.text(st.characters(), max_size=3) | st.sampled_from(["\ud800", "\udcff", ""])


@given(st.lists(st.tuples(st.sampled_from("ab"), KEYS)))
def test_a_key_keeps_the_value_it_came_with_first(keys: list[tuple[str, str]]) -> None:
    expected: dict[tuple[str, str], int] = {}
    with FirstCome() as came:
        for number, (kind, key) in enumerate(keys):
            assert came.get(kind, key) == expected.get((kind, key))
            assert came.add(kind, key, number) == ((kind, key) not in expected)
            expected.setdefault((kind, key), number)


@given(st.lists(st.tuples(st.sampled_from("ab"), KEYS)), st.sampled_from([1, 1024]))
def test_a_key_keeps_its_number_whether_or_not_it_is_remembered(keys: list[tuple[str, str]], num_recent: int) -> None:
    expected: dict[tuple[str, str], int] = {}
    with pytest.MonkeyPatch.context() as patch, FirstCome() as came:
        patch.setattr("cache_schema.first_come._NUM_RECENT", num_recent)
        for number, (kind, key) in enumerate(keys):
            assert came.number(kind, key, number) == expected.setdefault((kind, key), number)


def test_a_value_may_be_bytes() -> None:
    with FirstCome() as came:
        assert came.add("file", "a", b"\x00\xff")
        assert came.get("file", "a") == b"\x00\xff"


def test_a_database_that_fills_the_disk_is_named_with_what_to_do() -> None:
    with FirstCome() as came:
        came._database.execute("PRAGMA max_page_count = 10")
        numbers = map(str, range(1000))
        with pytest.raises(NoRoomError, match="no room for temporary files"):
            deque(came.add("file", number, bytes(1000)) for number in numbers)
