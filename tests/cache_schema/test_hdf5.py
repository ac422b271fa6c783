"""A store in an HDF5 file is open to any reader of HDF5, and read by ours as fast as files are."""

from __future__ import annotations

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from cache_schema.convert import convert_store
from cache_schema.layout import ArrayLayout
from cache_schema.store import StoreWriter, open_store
from tests.cache_schema.toys import ARRAYS, FAILURE, HEADER, LAYOUTS, STATIC, assert_same_bits, files_of, write_store


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    made = convert_store(write_store(tmp_path / "plain"), tmp_path, "hdf5")
    assert isinstance(made, Path)
    return made


def descriptors_of(path: Path) -> int:
    """How many descriptors of this process lead to a file."""
    return sum(os.path.realpath(link) == str(path) for link in Path("/proc/self/fd").iterdir())


def test_any_reader_of_hdf5_finds_every_array_under_its_name(packed: Path) -> None:
    with h5py.File(packed) as file:
        for name, values in ARRAYS.items():
            node = file[name]
            assert_same_bits(node[()], values)
            assert node.chunks is None
            assert node.compression is None


def test_axes_are_labelled(packed: Path) -> None:
    with h5py.File(packed) as file:
        for layout in (*LAYOUTS, *(array.layout for array in STATIC)):
            assert tuple(dimension.label for dimension in file[layout.name].dims) == layout.axes


def test_every_json_file_of_the_zarr_store_is_there(packed: Path, tmp_path: Path) -> None:
    zarr_files = files_of(next((tmp_path / "plain").glob("*.zarr")))
    with h5py.File(packed) as file:
        found: dict[str, bytes] = {}

        def keep(name: str, node: object) -> None:
            if isinstance(node, h5py.Dataset):
                found[name] = node[()].tobytes()

        file["headstart/files"].visititems(keep)
    own = {f"{name}/zarr.json" for name in (*ARRAYS, "features", "image")}
    assert found == {key: data for key, data in zarr_files.items() if "/c." not in key and key not in own}
    assert json.loads(found["ledger.jsonl"])["reason"] == FAILURE.reason


def test_a_file_is_open_once_however_many_shards_are_read(tmp_path: Path) -> None:
    layout = ArrayLayout("values", (40, 3), np.dtype(np.int32), 1, 2, ("row", "a"))
    values = np.arange(120, dtype=np.int32).reshape(40, 3)
    writer = StoreWriter(tmp_path, HEADER, [layout], ())
    writer.begin()
    writer.commit("000000", (0, 40), {("values", shard): values[2 * shard : 2 * shard + 2] for shard in range(20)})
    writer.finish(["000000"])
    packed = convert_store(writer.path, tmp_path, "hdf5")
    assert isinstance(packed, Path)
    store = open_store(packed)
    assert_same_bits(store.read("values"), values)
    assert descriptors_of(packed) == 1
    store.close()
    assert descriptors_of(packed) == 0


def test_rows_of_many_shards_side_by_side_come_in_one_piece(packed: Path) -> None:
    store = open_store(packed)
    for rows in ([0, 1, 2, 3, 4, 5], [5, 4], [3, 4], [4, 4, 0]):
        assert_same_bits(store.array("features/last").read(rows), ARRAYS["features/last"][rows])
        assert_same_bits(store.array("valid").read(rows), ARRAYS["valid"][rows])


def test_a_file_may_be_renamed_and_moved(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    moved = packed.rename(tmp_path / "elsewhere" / "any name.h5")
    assert_same_bits(open_store(moved).read("features/last"), ARRAYS["features/last"])
