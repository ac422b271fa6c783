"""A store is the same store in every container: one contract, held by files, an HDF5 file and remote objects alike."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import upath
from upath import UPath

from cache_schema import atomic
from cache_schema.atomic import StorePath
from cache_schema.containers import Folder
from cache_schema.errors import DamagedStoreError, UsageError
from cache_schema.hdf5 import Hdf5File
from cache_schema.reader import ArrayReader
from cache_schema.store import (
    STATIC_UNIT,
    find_complete,
    is_complete,
    open_container,
    open_store,
    read_header,
)
from cache_schema.verify import verify_store
from cache_schema.zarr_reader import ZarrReader
from tests.cache_schema.toys import (
    ARRAYS,
    FAILURE,
    FEATURES,
    HEADER,
    LAYOUTS,
    SHARDS,
    STATIC,
    UNITS,
    VALID,
    assert_same_bits,
    commit,
    edit_json,
    flip_byte,
    make_writer,
    write_store,
)

SHARD = "features/last/c.0.0.0"


def is_hdf5(path: StorePath) -> bool:
    return path.suffix == ".h5"


def is_compressed(path: StorePath) -> bool:
    return read_header(path)[1]["valid"].zstd_level is not None


def as_another_sees(path: StorePath) -> StorePath:
    """The same place, seen by a process that has not looked before: a filesystem keeps listings in memory."""
    if not isinstance(path, Path):
        path.fs.invalidate_cache()
    return path


def flip_value(path: StorePath, array: str, row: int) -> None:
    """Flip a bit of one row where it lies."""
    if not is_hdf5(path):
        layout = open_store(path).layouts[array]
        flip_byte(path / layout.shard_key(row // layout.shard_rows), 1)
        return
    with h5py.File(path) as file:
        offset = file[array].id.get_offset() + row * file[array][row].nbytes
    flip_byte(path, offset)


def lose_shard(path: StorePath, key: str) -> None:
    """Take away a shard; in an HDF5 file, the array it belongs to."""
    if is_hdf5(path):
        with h5py.File(path, "r+") as file:
            del file[key.rpartition("/")[0]]
    else:
        (path / key).unlink()


# What every store gives


def test_a_store_is_what_was_written(stored: StorePath) -> None:
    opened = open_store(stored, "image_features")
    assert opened.path == stored
    assert opened.header == HEADER
    assert opened.layouts.keys() == ARRAYS.keys()
    for name, values in ARRAYS.items():
        assert_same_bits(opened.read(name), values)
        assert (opened.array(name).shape, opened.array(name).dtype) == (values.shape, values.dtype)
        assert opened.layouts[name].axes == {x.name: x.axes for x in (*LAYOUTS, *STATIC)}[name]
    opened.close()


def test_what_was_recorded_is_the_same_everywhere(stored: StorePath, tmp_path: Path) -> None:
    opened, plain = open_store(stored), open_store(write_store(tmp_path / "plain"))
    assert opened.failures() == [FAILURE]
    assert [receipt.unit for receipt in opened.receipts()] == [*UNITS, STATIC_UNIT]
    assert {key for receipt in opened.receipts() for key in receipt.files} == SHARDS
    assert (opened.manifest.num_units, opened.manifest.num_files, opened.manifest.num_failures) == (3, 5, 1)
    assert opened.header.fingerprint == plain.header.fingerprint
    if not is_compressed(stored):
        assert opened.manifest == plain.manifest
        assert [receipt.to_dict() for receipt in opened.receipts()] == [r.to_dict() for r in plain.receipts()]


def test_rows_come_in_any_order_and_as_often_as_asked_for(stored: StorePath) -> None:
    opened = open_store(stored)
    for rows in ([5, 0, 3, 3], [2], [], list(range(6)), [4, 5]):
        assert_same_bits(opened.array("features/last").read(rows), FEATURES[rows])
        out = np.full((len(rows),), 1, np.bool_)
        assert opened.array("valid").read(rows, out=out, verify=False, threads=3) is out
        assert_same_bits(out, VALID[rows])
    for wrong, error in (([6], IndexError), ([-1], IndexError), ([True], TypeError)):
        with pytest.raises(error):
            opened.array("features/last").read(wrong)
    with pytest.raises(ValueError, match="`out` must be"):
        opened.array("features/last").read([0], out=np.empty((2, 2, 3), np.float16))
    assert_same_bits(opened.array("image/none").read([]), np.zeros(0, np.uint8))


def test_a_store_that_was_closed_is_opened_again_when_it_is_read(stored: StorePath) -> None:
    opened = open_store(stored)
    for _ in range(2):
        assert_same_bits(opened.read("features/last"), FEATURES)
        opened.close()
        opened.array("features/last").close()


def test_the_reader_for_the_container_is_taken(stored: StorePath) -> None:
    slow = is_compressed(stored) or isinstance(stored, UPath)
    assert isinstance(open_store(stored).array("valid"), ZarrReader if slow else ArrayReader)
    assert isinstance(open_container(stored), Hdf5File if is_hdf5(stored) else Folder)


def test_a_store_says_what_it_is_without_being_complete(stored: StorePath) -> None:
    assert read_header(stored) == (HEADER, open_store(stored).layouts)


def test_a_store_of_another_kind_is_refused_everywhere(stored: StorePath) -> None:
    with pytest.raises(UsageError, match="is a store of image_features, where one of samples is wanted; name that one"):
        open_store(stored, "samples")


def test_an_array_that_is_not_there_is_named(stored: StorePath) -> None:
    with pytest.raises(UsageError, match=r"has no array 'features/9'; it holds features/last, image/none"):
        open_store(stored).array("features/9")


def test_a_complete_store_is_found_by_what_it_is(stored: StorePath) -> None:
    assert is_complete(stored)
    found = find_complete(stored.parent, HEADER)
    assert found is not None
    assert found.manifest.fingerprint == HEADER.fingerprint
    assert find_complete(stored.parent / "elsewhere", HEADER) is None


@pytest.mark.parametrize("threads", [1, 3, None])
def test_a_sound_store_is_verified_to_the_last_shard(stored: StorePath, threads: int | None) -> None:
    steps: list[tuple[int, int]] = []
    found = verify_store(stored, threads=threads, progress=lambda done, total: steps.append((done, total)))
    assert found.is_sound
    assert (found.num_shards, found.num_checked) == (5, 5)
    assert found.num_bytes == open_store(stored).manifest.num_bytes
    assert len(steps) == 5
    assert steps[-1] == (found.num_bytes, found.num_bytes)
    assert json.dumps(found.to_dict())
    assert found.to_dict()["path"] == str(stored)
    assert "5 of 5 shards read" in found.summary()
    assert "sound" in found.summary()


# What no store hides


def test_a_flipped_bit_is_found_when_it_is_read_and_when_it_is_verified(stored: StorePath) -> None:
    flip_value(stored, "features/last", 0)
    opened = open_store(as_another_sees(stored))
    with pytest.raises(DamagedStoreError, match=r"headstart cache repair|remove the file and run the command"):
        opened.read("features/last")
    with pytest.raises(DamagedStoreError):
        opened.array("features/last").read([0])
    assert_same_bits(opened.array("features/last").read([4, 5]), FEATURES[4:])
    assert_same_bits(opened.read("valid"), VALID)
    damages = verify_store(stored).damages
    assert [(damage.key, damage.unit) for damage in damages] == [(SHARD, "000000")]


def test_a_store_that_lost_a_shard_is_not_opened(stored: StorePath) -> None:
    lose_shard(stored, SHARD)
    stored = as_another_sees(stored)
    with pytest.raises(DamagedStoreError, match="is missing or has another size"):
        open_store(stored)
    assert not is_complete(stored)
    found = {damage.key: damage for damage in verify_store(stored).damages}
    assert found.keys() == ({SHARD, "features/last/c.1.0.0"} if is_hdf5(stored) else {SHARD})
    assert "missing" in found[SHARD].reason
    assert found[SHARD].unit == "000000"


def test_a_shard_that_is_lost_while_the_store_is_open_is_an_error_and_never_zeros(stored_as_files: StorePath) -> None:
    opened = open_store(stored_as_files)
    lose_shard(stored_as_files, SHARD)
    with pytest.raises(DamagedStoreError, match=r"c\.0\.0\.0: the shard is missing"):
        opened.read("features/last")
    assert_same_bits(opened.array("features/last").read([4, 5]), FEATURES[4:])


@pytest.mark.parametrize("size", [0, 1, 67, 68, -1])
def test_a_shard_that_was_cut_short_is_found(stored_as_files: StorePath, size: int) -> None:
    stored = stored_as_files
    opened = open_store(stored)
    (stored / SHARD).write_bytes((stored / SHARD).read_bytes()[:size])
    with pytest.raises(DamagedStoreError):
        opened.read("features/last")
    with pytest.raises(DamagedStoreError, match="another size"):
        open_store(as_another_sees(stored))
    assert [damage.key for damage in verify_store(stored).damages] == [SHARD]


@pytest.mark.parametrize("key", ["zarr.json", "manifest.json", "receipts/000000.json"])
def test_a_store_with_a_json_file_that_was_cut_short_is_refused(stored: StorePath, key: str) -> None:
    if is_hdf5(stored):
        with h5py.File(stored, "r+") as file:
            node = file[f"headstart/files/{key}"]
            node[...] = np.where(np.arange(len(node)) > len(node) // 2, ord(" "), node[...])
    else:
        (stored / key).write_bytes((stored / key).read_bytes()[:40])
    stored = as_another_sees(stored)
    with pytest.raises(UsageError):
        open_store(stored)
    assert not is_complete(stored)


def test_a_store_without_its_manifest_is_incomplete(stored: StorePath) -> None:
    if is_hdf5(stored):
        with h5py.File(stored, "r+") as file:
            del file["headstart/files/manifest.json"]
    else:
        (stored / "manifest.json").unlink()
    with pytest.raises(UsageError, match=r"is incomplete: its job has not finished\. Run the `headstart extract`"):
        open_store(as_another_sees(stored))
    assert [damage.key for damage in verify_store(stored).damages] == ["manifest.json"]


def test_a_store_without_a_receipt_contradicts_its_manifest(stored: StorePath) -> None:
    if is_hdf5(stored):
        with h5py.File(stored, "r+") as file:
            del file["headstart/files/receipts/000001.json"]
    else:
        (stored / "receipts/000001.json").unlink()
    with pytest.raises(DamagedStoreError, match="the manifest and the receipts differ"):
        open_store(as_another_sees(stored))
    damages = {damage.key: damage.reason for damage in verify_store(stored).damages}
    assert damages.keys() == {"manifest.json", "features/last/c.1.0.0", "valid/c.1"}
    assert damages["valid/c.1"] == "no receipt names this shard"


@pytest.mark.parametrize("name", ["nothing.zarr", "nothing.h5", "nothing"])
def test_where_there_is_no_store_there_is_none(stored: StorePath, name: str) -> None:
    with pytest.raises(UsageError, match=r"no store at|fetch it first, or convert the store to zarr"):
        open_store(stored.parent / name)
    assert not is_complete(stored.parent / name)


# Writing to a remote filesystem, and going on there


def files_under(path: UPath) -> dict[str, bytes]:
    path.fs.invalidate_cache()
    root = path.path.strip("/") + "/"
    return {name.strip("/").removeprefix(root): bytes(path.fs.cat_file(name)) for name in path.fs.find(path.path)}


def test_a_remote_store_is_the_local_one_file_for_file(remote: UPath, tmp_path: Path) -> None:
    store = write_store(remote / "deep" / "er")
    local = write_store(tmp_path)
    assert files_under(store) == {
        path.relative_to(local).as_posix(): path.read_bytes() for path in local.rglob("*") if path.is_file()
    }


def test_a_job_goes_on_at_a_remote_store_where_it_stopped(remote: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = make_writer(remote)
    assert not writer.is_done(STATIC_UNIT)
    writer.begin()
    commit(writer, "000000")
    with pytest.raises(UsageError, match="is incomplete"):
        open_store(writer.path)
    remote.fs.invalidate_cache()
    again = make_writer(remote)
    before = files_under(writer.path)
    again.begin()
    assert files_under(writer.path) == before
    assert [again.is_done(unit) for unit in (STATIC_UNIT, *UNITS)] == [True, True, False]
    with pytest.raises(DamagedStoreError, match=r"000001\.json: the receipt cannot be read"):
        again.finish(UNITS)
    commit(again, "000001")
    again.finish(UNITS)
    assert_same_bits(open_store(writer.path).read("features/last"), FEATURES)


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: flip_byte(path / SHARD),
        lambda path: (path / SHARD).unlink(),
        lambda path: (path / SHARD).write_bytes(b""),
        lambda path: (path / "receipts/000000.json").write_bytes(b"{"),
        lambda path: edit_json(path / "receipts/000000.json", lambda receipt: receipt.update(unit="another")),
    ],
)
def test_a_harmed_unit_of_a_remote_store_is_done_again(remote: UPath, harm: Callable[[UPath], Any]) -> None:
    store = write_store(remote)
    before = files_under(store)
    harm(store)
    remote.fs.invalidate_cache()
    writer = make_writer(remote)
    writer.begin()
    assert [writer.is_done(unit) for unit in UNITS] == [False, True]
    commit(writer, "000000")
    writer.finish(UNITS)
    assert files_under(store) == before


def test_a_receipt_of_no_unit_is_cleared_away_when_a_remote_job_finishes(remote: UPath) -> None:
    store = write_store(remote)
    (store / "receipts" / "000002.json").write_bytes((store / "receipts" / "000001.json").read_bytes())
    with pytest.raises(DamagedStoreError, match="the manifest and the receipts differ"):
        open_store(as_another_sees(store))
    make_writer(remote).finish(UNITS)
    assert [receipt.unit for receipt in open_store(store).receipts()] == [*UNITS, STATIC_UNIT]


def test_what_another_process_wrote_meanwhile_is_seen(remote: UPath) -> None:
    """Whoever has looked at a remote folder before must not go by what was there then."""
    writer = make_writer(remote)
    writer.begin()
    commit(writer, "000000")
    with pytest.raises(DamagedStoreError):
        writer.finish(UNITS)  # looks at the receipts
    assert not writer.is_done("000001")
    elsewhere = upath.UPath(str(remote), skip_instance_cache=True)
    commit(make_writer(elsewhere), "000001")
    assert writer.is_done("000001")
    writer.finish(UNITS)
    assert_same_bits(open_store(writer.path).read("features/last"), FEATURES)


def test_what_another_process_took_away_is_not_there_any_more(remote: UPath) -> None:
    store = write_store(remote)
    assert is_complete(store)
    elsewhere = upath.UPath(str(store), skip_instance_cache=True)
    (elsewhere / "receipts" / "000001.json").unlink()
    assert not is_complete(store)
    (elsewhere / "manifest.json").unlink()
    with pytest.raises(UsageError, match="is incomplete"):
        open_store(store)


def test_a_remote_store_can_be_removed(remote: UPath) -> None:
    store = write_store(remote)
    atomic.remove(store)
    remote.fs.invalidate_cache()
    assert not remote.fs.find(remote.path)
    atomic.remove(store)


def test_a_remote_hdf5_file_is_refused_with_the_remedy(remote: UPath, tmp_path: Path) -> None:
    (remote / "store.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(UsageError, match=r"is a remote HDF5 file; fetch it first, or convert the store to zarr\."):
        open_store(remote / "store.h5")


def test_a_store_survives_the_way_to_another_process(stored: StorePath) -> None:
    path = pickle.loads(pickle.dumps(stored))
    assert open_store(path).manifest == open_store(stored).manifest
