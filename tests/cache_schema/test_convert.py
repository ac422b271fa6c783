"""A store may be poured from container to container, and back, without a bit of it changing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upath import UPath

from cache_schema.atomic import StorePath
from cache_schema.convert import ContainerName, convert_store
from cache_schema.errors import DamagedStoreError, UsageError
from cache_schema.layout import ArrayLayout
from cache_schema.shards import encode_shard
from cache_schema.store import (
    StaticArray,
    StoreHeader,
    StoreWriter,
    is_complete,
    open_store,
    read_header,
    recorded_path,
    relative_paths,
)
from cache_schema.verify import verify_store
from tests.cache_schema.toys import (
    ARRAYS,
    FEATURES,
    HEADER,
    SHARDS,
    VALID,
    assert_same_bits,
    files_of,
    flip_byte,
    layouts,
    make_writer,
    values_of,
    write_store,
)

Way = tuple[ContainerName, int | None]

PLAIN: Way = ("zarr", None)
ZSTD: Way = ("zarr", 3)
HDF5: Way = ("hdf5", None)


def pour(store: StorePath, folder: Path, ways: Sequence[Way]) -> StorePath:
    """Convert a store once for each way, each time from where the last time left it."""
    for number, (container, zstd_level) in enumerate(ways):
        store = convert_store(store, folder / str(number), container, zstd_level=zstd_level)
    return store


# There and back


@pytest.mark.parametrize(
    "ways", [[PLAIN], [HDF5, PLAIN], [ZSTD, PLAIN], [HDF5, HDF5, PLAIN], [ZSTD, HDF5, ZSTD, ZSTD, PLAIN]]
)
def test_a_store_comes_back_file_for_file(tmp_path: Path, ways: list[Way]) -> None:
    store = write_store(tmp_path, rates={"images_per_s": 17.0})
    back = pour(store, tmp_path, ways)
    assert isinstance(back, Path)
    assert files_of(back) == files_of(store)


def test_a_store_comes_back_from_a_remote_filesystem_file_for_file(tmp_path: Path, remote: UPath) -> None:
    store = write_store(tmp_path)
    there = convert_store(store, remote, "zarr")
    assert isinstance(there, UPath)
    assert open_store(there).manifest == open_store(store).manifest
    compressed = convert_store(there, remote / "zstd", "zarr", zstd_level=1)
    packed = convert_store(compressed, tmp_path / "packed", "hdf5")
    for number, source in enumerate((there, compressed, packed)):
        back = convert_store(source, tmp_path / str(number), "zarr")
        assert isinstance(back, Path)
        assert files_of(back) == files_of(store)


def test_values_and_receipts_are_the_same_in_every_container(stored: StorePath, tmp_path: Path) -> None:
    source = open_store(stored)
    for container, zstd_level in (PLAIN, ZSTD, HDF5):
        made = convert_store(stored, tmp_path / f"{container} {zstd_level}", container, zstd_level=zstd_level)
        opened = open_store(made)
        for name, values in ARRAYS.items():
            assert_same_bits(opened.read(name), values)
        assert opened.header == source.header
        assert opened.failures() == source.failures()
        assert [(r.unit, r.rows, r.rates) for r in opened.receipts()] == [
            (r.unit, r.rows, r.rates) for r in source.receipts()
        ]
        assert {layout.zstd_level for layout in opened.layouts.values()} == {zstd_level}
        assert verify_store(made).is_sound


@settings(deadline=None, max_examples=30)
@given(st.lists(layouts(), min_size=1, max_size=3), st.lists(st.sampled_from([PLAIN, ZSTD, HDF5]), max_size=3))
def test_any_arrays_come_back_from_anywhere(drawn: list[ArrayLayout], ways: list[Way]) -> None:
    if ZSTD in ways:  # a row without values cannot be compressed
        drawn = [replace(x, shape=(x.shape[0], *x.row_shape)) for x in drawn]
    arrays = [replace(layout, name=f"group/{number}") for number, layout in enumerate(drawn)]
    with TemporaryDirectory() as name:
        folder = Path(name)
        writer = StoreWriter(folder, HEADER, arrays, [StaticArray("alone", np.arange(3), ("row",))])
        writer.begin()
        shards = {}
        for number, layout in enumerate(arrays):
            for shard in range(layout.num_shards):
                rows = layout.rows_of_shard(shard)
                shards[layout.name, shard] = values_of(layout, number)[rows.start : rows.stop]
        writer.commit("000000", (0, 1), shards)
        writer.finish(["000000"])
        back = pour(writer.path, folder, [*ways, PLAIN])
        assert isinstance(back, Path)
        assert files_of(back) == files_of(writer.path)
        for number, layout in enumerate(arrays):
            assert_same_bits(open_store(back).read(layout.name), values_of(layout, number))


def test_the_same_store_makes_the_same_hdf5_file_whatever_it_lies_in(stored: StorePath, tmp_path: Path) -> None:
    made = convert_store(stored, tmp_path / "made", "hdf5")
    plain = convert_store(write_store(tmp_path / "plain"), tmp_path / "plain", "hdf5")
    assert made.read_bytes() == plain.read_bytes()


def test_the_same_store_makes_the_same_hdf5_file_at_another_time(tmp_path: Path) -> None:
    store = write_store(tmp_path)
    first = convert_store(store, tmp_path / "first", "hdf5")
    time.sleep(1.1)  # HDF5 would write down whole seconds
    second = convert_store(store, tmp_path / "second", "hdf5")
    assert first.read_bytes() == second.read_bytes()


def test_progress_ends_where_it_said_it_would(stored: StorePath, tmp_path: Path) -> None:
    for container, zstd_level in (PLAIN, ZSTD, HDF5):
        steps: list[tuple[int, int]] = []
        convert_store(
            stored,
            tmp_path / f"{container} {zstd_level}",
            container,
            zstd_level=zstd_level,
            progress=lambda done, total, steps=steps: steps.append((done, total)),
        )
        assert steps == [(done, 5) for done in range(1, 6)]


def test_a_name_says_what_the_store_lies_in(tmp_path: Path) -> None:
    store = write_store(tmp_path)
    assert convert_store(store, tmp_path / "a", "zarr") == tmp_path / "a" / store.name
    assert convert_store(store, tmp_path / "a", "hdf5") == tmp_path / "a" / f"{store.stem}.h5"


# Going on


def test_a_conversion_that_was_cut_off_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write_store(tmp_path)
    commits: list[str] = []
    commit = StoreWriter.commit

    def cut_off(writer: StoreWriter, unit: str, *rest: Any) -> Any:
        if unit == "000001" and "000001" not in commits:
            commits.append(unit)
            raise KeyboardInterrupt
        commits.append(unit)
        return commit(writer, unit, *rest)

    monkeypatch.setattr(StoreWriter, "commit", cut_off)
    with pytest.raises(KeyboardInterrupt):
        convert_store(store, tmp_path / "out", "zarr")
    assert not is_complete(tmp_path / "out" / store.name)
    steps: list[tuple[int, int]] = []
    made = convert_store(store, tmp_path / "out", "zarr", progress=lambda *step: steps.append(step))
    assert isinstance(made, Path)
    assert commits == ["000000", "000001", "000001", "static"]
    assert files_of(made) == files_of(store)
    assert steps[-1] == (5, 5), "what was there already counts as done"


def test_a_conversion_to_hdf5_that_was_cut_off_leaves_nothing(tmp_path: Path) -> None:
    store = write_store(tmp_path)

    def cut_off(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_store(store, tmp_path / "out", "hdf5", progress=cut_off)
    assert files_of(tmp_path / "out") == {}
    assert is_complete(convert_store(store, tmp_path / "out", "hdf5"))


def test_converting_again_changes_nothing(tmp_path: Path) -> None:
    store = write_store(tmp_path)
    for container, zstd_level in (PLAIN, ZSTD, HDF5):
        out = tmp_path / f"{container} {zstd_level}"
        convert_store(store, out, container, zstd_level=zstd_level)
        before = files_of(out)
        convert_store(store, out, container, zstd_level=zstd_level)
        assert files_of(out) == before


def test_what_another_version_of_the_store_left_behind_is_not_taken_over(tmp_path: Path) -> None:
    """Two stores of one identity may differ in last bits, if they were extracted on different machines."""
    store = write_store(tmp_path)
    other = make_writer(tmp_path / "out")
    other.begin()
    other.commit("000001", (4, 6), {("features/last", 1): -FEATURES[4:], ("valid", 1): VALID[4:]})
    made = convert_store(store, tmp_path / "out", "zarr")
    assert isinstance(made, Path)
    assert files_of(made) == files_of(store)


# What is refused


@pytest.mark.parametrize("key", sorted(SHARDS))
@pytest.mark.parametrize("way", [PLAIN, ZSTD, HDF5])
def test_a_damaged_store_is_not_converted_and_nothing_is_published(tmp_path: Path, key: str, way: Way) -> None:
    store = write_store(tmp_path)
    flip_byte(store / key, 1)
    with pytest.raises(DamagedStoreError, match=r"headstart cache repair"):
        convert_store(store, tmp_path / "out", way[0], zstd_level=way[1])
    assert not [path for path in (tmp_path / "out").glob("*") if is_complete(path)]
    assert not list(tmp_path.glob("out/*.h5"))
    assert not (tmp_path / "out" / store.name / key).exists()


@pytest.mark.parametrize("way", [PLAIN, ZSTD, HDF5])
def test_damage_in_an_hdf5_file_is_not_carried_over(tmp_path: Path, way: Way) -> None:
    store = convert_store(write_store(tmp_path), tmp_path, "hdf5")
    with h5py.File(store) as file:
        offset = file["valid"].id.get_offset()
    flip_byte(store, offset + 5)
    with pytest.raises(DamagedStoreError, match=r"valid.*fails its checksum"):
        convert_store(store, tmp_path / "out", way[0], zstd_level=way[1])
    assert not [path for path in (tmp_path / "out").glob("*") if is_complete(path)]


@pytest.mark.parametrize("way", [PLAIN, ZSTD, HDF5])
def test_other_bytes_with_a_sound_checksum_are_not_converted(tmp_path: Path, way: Way) -> None:
    """A shard of another store that fits in size is sound in itself, and still not what the receipt names."""
    store = write_store(tmp_path)
    key, layout = "valid/c.1", open_store(store).layouts["valid"]
    (store / key).write_bytes(encode_shard(~ARRAYS["valid"][4:], layout))
    for _ in range(2):  # nor when it is tried again
        with pytest.raises(DamagedStoreError, match=r"valid/c\.1"):
            convert_store(store, tmp_path / "out", way[0], zstd_level=way[1])
        assert not [path for path in (tmp_path / "out").glob("*") if is_complete(path)]


def test_an_incomplete_store_is_not_converted(tmp_path: Path) -> None:
    store = write_store(tmp_path)
    (store / "manifest.json").unlink()
    with pytest.raises(UsageError, match="is incomplete"):
        convert_store(store, tmp_path / "out", "hdf5")
    assert not (tmp_path / "out").exists()


def test_a_store_is_not_written_over_itself(stored: StorePath, tmp_path: Path) -> None:
    before = open_store(stored).manifest
    container: ContainerName = "hdf5" if stored.suffix == ".h5" else "zarr"
    for level in (None,) if container == "hdf5" else (None, 3):
        with pytest.raises(UsageError, match=r"is the store itself; name another folder with --out"):
            convert_store(stored, stored.parent, container, zstd_level=level)
    assert open_store(stored).manifest == before
    assert verify_store(stored).is_sound


def test_a_store_is_not_written_over_itself_by_another_name(tmp_path: Path) -> None:
    store = write_store(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "below").mkdir()
    for out in (tmp_path / "link", tmp_path / "real" / "below" / ".."):
        with pytest.raises(UsageError, match="is the store itself"):
            convert_store(store, out, "zarr", zstd_level=3)
    assert verify_store(store).is_sound


def test_hdf5_is_neither_compressed_nor_remote(tmp_path: Path, remote: UPath) -> None:
    store = write_store(tmp_path)
    with pytest.raises(UsageError, match="neither compressed nor remote; leave --zstd out and name a local folder"):
        convert_store(store, tmp_path / "out", "hdf5", zstd_level=3)
    with pytest.raises(UsageError, match="neither compressed nor remote"):
        convert_store(store, remote, "hdf5")


# What is recorded of places outside the store


def header_beside(store_folder: Path, samples: Path) -> StoreHeader:
    """A header that records where something outside the store lies."""
    place = store_folder / HEADER.folder_name
    return replace(HEADER, recorded={"libraries": {}, "paths": relative_paths({"samples": samples}, place)})


@pytest.mark.parametrize("ways", [[PLAIN], [HDF5], [ZSTD], [HDF5, PLAIN], [ZSTD, HDF5]])
def test_recorded_places_still_mean_the_same(tmp_path: Path, ways: list[Way]) -> None:
    samples = tmp_path / "data" / "samples.zarr"
    folder = tmp_path / "deep" / "er"
    store = write_store(folder, header_beside(folder, samples))
    assert recorded_path(read_header(store)[0], store, "samples") == samples
    made = pour(store, tmp_path / "elsewhere", ways)
    header, _ = read_header(made)
    assert recorded_path(header, made, "samples") == samples
    assert header.fingerprint == HEADER.fingerprint
    assert not Path(header.recorded["paths"]["samples"]).is_absolute()


def test_a_remote_store_records_no_place_of_this_machine(tmp_path: Path, remote: UPath) -> None:
    store = write_store(tmp_path, header_beside(tmp_path, tmp_path / "samples.zarr"))
    made = convert_store(store, remote, "zarr")
    header, _ = read_header(made)
    assert recorded_path(header, made, "samples") is None
    assert header.recorded["paths"] == {}
    assert header.recorded["libraries"] == {}
    back = convert_store(made, tmp_path / "back", "zarr")
    assert recorded_path(read_header(back)[0], back, "samples") is None


def test_recorded_places_are_found_through_a_link(tmp_path: Path) -> None:
    samples, folder = tmp_path / "data" / "samples.zarr", tmp_path / "real" / "deep" / "stores"
    store = write_store(folder, header_beside(folder, samples))
    (tmp_path / "link").symlink_to(folder)
    linked = tmp_path / "link" / store.name
    assert recorded_path(read_header(linked)[0], linked, "samples") == samples
    made = convert_store(linked, tmp_path / "out", "hdf5")
    assert recorded_path(read_header(made)[0], made, "samples") == samples


def test_recorded_places_are_found_from_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, folder = tmp_path / "data" / "samples.zarr", tmp_path / "stores"
    store = write_store(folder, header_beside(folder, samples))
    monkeypatch.chdir(folder)
    found = recorded_path(read_header(store)[0], Path(store.name), "samples")
    assert found is not None
    assert found.resolve() == samples
    made = convert_store(Path(store.name), Path("..") / "out", "zarr")
    monkeypatch.chdir(tmp_path)
    assert recorded_path(read_header(tmp_path / "out" / store.name)[0], tmp_path / "out" / made.name, "samples") == (
        samples
    )
