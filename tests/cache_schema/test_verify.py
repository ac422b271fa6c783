"""Verification names every file that is not what was written, and nothing else."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from cache_schema.convert import convert_store
from cache_schema.errors import DamagedStoreError, UsageError
from cache_schema.layout import ArrayLayout
from cache_schema.shards import encode_shard
from cache_schema.store import STATIC_UNIT, StoreWriter, open_store
from cache_schema.verify import Verification, verify_store
from tests.cache_schema.toys import (
    ARRAYS,
    HEADER,
    SHARDS,
    commit,
    edit_json,
    flip_byte,
    make_writer,
    write_store,
)

UNIT_OF = {
    "features/last/c.0.0.0": "000000",
    "features/last/c.1.0.0": "000001",
    "valid/c.0": "000000",
    "valid/c.1": "000001",
    "image/size/c.0.0": STATIC_UNIT,
}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path)


@pytest.fixture
def packed(store: Path, tmp_path: Path) -> Path:
    """The same in an HDF5 file."""
    made = convert_store(store, tmp_path, "hdf5")
    assert isinstance(made, Path)
    return made


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A store of 40 shards."""
    layout = ArrayLayout("values", (40, 3), np.dtype(np.int32), 1, 1, ("row", "a"))
    writer = StoreWriter(tmp_path / "large", HEADER, [layout], ())
    writer.begin()
    for row in range(40):
        writer.commit(f"{row:06d}", (row, row + 1), {("values", row): np.full((1, 3), row, np.int32)})
    writer.finish(f"{row:06d}" for row in range(40))
    return writer.path


def keys(found: Verification) -> list[str]:
    return [damage.key for damage in found.damages]


def reason(found: Verification, key: str) -> str:
    (damage,) = (damage for damage in found.damages if damage.key == key)
    return damage.reason


# Shards


@pytest.mark.parametrize("key", sorted(SHARDS))
def test_a_damaged_shard_is_named_with_its_unit(store: Path, key: str) -> None:
    size = (store / key).stat().st_size
    for offset in (0, size // 2, size - 1):
        flip_byte(store / key, offset)
        found = verify_store(store)
        assert not found.is_sound
        assert [(damage.key, damage.unit) for damage in found.damages] == [(key, UNIT_OF[key])]
        assert reason(found, key) == "its bytes are not the ones that were written"
        assert "1 DAMAGED" in found.summary()
        assert found.to_dict()["sound"] is False
        assert json.loads(json.dumps(found.to_dict()))["damages"][0]["key"] == key
        flip_byte(store / key, offset)
    assert verify_store(store).is_sound


def test_every_damage_is_named_at_once_in_order(store: Path) -> None:
    for key in SHARDS:
        flip_byte(store / key)
    (store / "valid/zarr.json").unlink()
    (store / "manifest.json").unlink()
    assert keys(verify_store(store)) == sorted([*SHARDS, "valid/zarr.json", "manifest.json"])


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(path.read_bytes() + b"\0")])
def test_a_shard_that_is_gone_or_has_another_size_is_not_read(store: Path, harm: Callable[[Path], Any]) -> None:
    harm(store / "valid/c.1")
    found = verify_store(store)
    assert keys(found) == ["valid/c.1"]
    assert reason(found, "valid/c.1") == "the shard is missing or has another size"
    assert (found.num_checked, found.num_shards) == (4, 5)


def test_other_bytes_that_are_sound_in_themselves_are_not_what_was_written(store: Path) -> None:
    layout = open_store(store).layouts["valid"]
    (store / "valid/c.0").write_bytes(encode_shard(~ARRAYS["valid"][:4], layout))
    assert (open_store(store).read("valid")[:4] == ~ARRAYS["valid"][:4]).all(), "checksums cannot tell"
    assert keys(verify_store(store)) == ["valid/c.0"]


def test_a_shard_that_no_receipt_names_is_named(store: Path) -> None:
    edit_json(store / "receipts/000001.json", lambda receipt: receipt["files"].pop("valid/c.1"))
    found = verify_store(store)
    assert keys(found) == ["manifest.json", "valid/c.1"]
    assert reason(found, "valid/c.1") == "no receipt names this shard"


def test_a_shard_of_no_array_is_named(store: Path) -> None:
    def add(receipt: Any) -> None:
        receipt["files"]["another/c.0"] = receipt["files"]["valid/c.1"]

    (store / "another").mkdir()
    (store / "another/c.0").write_bytes((store / "valid/c.1").read_bytes())
    edit_json(store / "receipts/000001.json", add)
    found = verify_store(store)
    assert keys(found) == ["another/c.0", "manifest.json"]
    assert [damage.unit for damage in found.damages] == ["000001", None]
    assert reason(found, "another/c.0") == "no array has this shard"


def test_a_shard_beyond_the_end_of_its_array_is_named(store: Path) -> None:
    edit_json(
        store / "receipts/000001.json",
        lambda receipt: receipt["files"].update({"valid/c.7": receipt["files"]["valid/c.1"]}),
    )
    found = verify_store(store)
    assert "valid/c.7" in keys(found)
    assert "manifest.json" in keys(found)


# Samples


@pytest.mark.parametrize(("sample", "expected"), [(1.0, 40), (0.5, 20), (0.26, 11), (0.25, 10), (1e-9, 1)])
def test_a_sample_is_a_share_of_the_shards_and_at_least_one(large: Path, sample: float, expected: int) -> None:
    found = verify_store(large, sample=sample)
    assert found.is_sound
    assert (found.num_shards, found.num_checked) == (40, expected)
    assert found.num_bytes == expected * (large / "values/c.0.0").stat().st_size
    assert f"{expected} of 40 shards" in found.summary()


def test_a_sample_is_drawn_from_its_seed(large: Path) -> None:
    for row in range(40):
        flip_byte(large / f"values/c.{row}.0")
    drawn = {seed: tuple(keys(verify_store(large, sample=0.25, seed=seed))) for seed in range(8)}
    assert all(len(set(found)) == 10 for found in drawn.values())
    assert len(set(drawn.values())) == 8
    assert drawn[3] == tuple(keys(verify_store(large, sample=0.25, seed=3, threads=1)))
    assert len({key for found in drawn.values() for key in found}) > 30


def test_sizes_and_metadata_are_checked_whatever_the_sample(large: Path) -> None:
    (large / "values/c.31.0").write_bytes(b"")
    (large / "values/zarr.json").write_bytes(b"{}")
    (large / "receipts/000007.json").write_bytes(b"{")
    for seed in range(5):
        found = verify_store(large, sample=1e-9, seed=seed)
        assert {"values/c.31.0", "values/zarr.json", "receipts/000007.json"} <= set(keys(found))


@pytest.mark.parametrize("sample", [0, -0.5, 1.01, float("nan"), float("inf")])
def test_a_sample_that_is_no_share_is_refused(store: Path, sample: float) -> None:
    with pytest.raises(UsageError, match=r"give a share of the shards above 0 and up to 1\."):
        verify_store(store, sample=sample)


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_at_all_are_refused(store: Path, threads: int) -> None:
    with pytest.raises(UsageError, match=r"give a whole number of at least 1\."):
        verify_store(store, threads=threads)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_number_of_threads_changes_nothing_but_the_speed(
    large: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    flip_byte(large / "values/c.3.0")
    flip_byte(large / "values/c.30.0")
    from cache_schema.containers import Folder

    digest, seen = Folder.shard_digest, set()

    def watched(container: Folder, layout: ArrayLayout, shard: int) -> str:
        seen.add(threading.get_ident())
        return digest(container, layout, shard)

    monkeypatch.setattr(Folder, "shard_digest", watched)
    steps: list[tuple[int, int]] = []
    found = verify_store(large, threads=threads, progress=lambda *step: steps.append(step))
    assert keys(found) == ["values/c.3.0", "values/c.30.0"]
    assert len(seen) <= threads
    assert threading.get_ident() not in seen
    assert [done for done, _ in steps] == [found.num_bytes * number // 40 for number in range(1, 41)]
    assert {total for _, total in steps} == {found.num_bytes}


# Receipts, manifest, metadata


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'{"unit": "000001"}'])
def test_a_receipt_that_cannot_be_read_is_named_with_its_unit(store: Path, content: bytes) -> None:
    (store / "receipts/000001.json").write_bytes(content)
    found = verify_store(store)
    without = {"features/last/c.1.0.0", "valid/c.1"}
    assert set(keys(found)) == {"receipts/000001.json", *without}
    assert {damage.unit for damage in found.damages if damage.key not in without} == {"000001"}
    assert {reason(found, key) for key in without} == {"no receipt names this shard"}
    assert found.num_checked == 3, "what the other receipts name is checked all the same"
    flip_byte(store / "valid/c.0")
    assert "valid/c.0" in keys(verify_store(store))


def test_a_missing_receipt_leaves_its_shards_without_one(store: Path) -> None:
    (store / "receipts/000001.json").unlink()
    assert keys(verify_store(store)) == ["features/last/c.1.0.0", "manifest.json", "valid/c.1"]


def test_one_receipt_too_many_is_found(store: Path) -> None:
    (store / "receipts/000002.json").write_bytes((store / "receipts/000001.json").read_bytes())
    found = verify_store(store)
    assert keys(found) == ["manifest.json"]
    assert reason(found, "manifest.json") == "the manifest and the receipts differ"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "there is none: the job that makes the store has not finished"),
        (b"", "manifest.json: no"),
        (b"[]", "manifest.json: no"),
        (b"{}", "manifest.json: no"),
    ],
)
def test_a_manifest_that_is_missing_or_none_is_named(store: Path, content: bytes | None, expected: str) -> None:
    (store / "manifest.json").unlink()
    if content is not None:
        (store / "manifest.json").write_bytes(content)
    found = verify_store(store)
    assert keys(found) == ["manifest.json"]
    assert reason(found, "manifest.json").startswith(expected)


def test_a_manifest_of_another_store_is_found(store: Path, tmp_path: Path) -> None:
    other = write_store(tmp_path / "other", replace(HEADER, identity={"encoder": "two"}))
    (store / "manifest.json").write_bytes((other / "manifest.json").read_bytes())
    assert reason(verify_store(store), "manifest.json") == "the manifest and the receipts differ"


@pytest.mark.parametrize("key", ["features/zarr.json", "features/last/zarr.json", "valid/zarr.json"])
@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (Path.unlink, "the metadata is missing"),
        (lambda path: path.write_bytes(b""), "the metadata cannot be read"),
        (lambda path: path.write_bytes(b"\xff"), "the metadata cannot be read"),
        (lambda path: edit_json(path, lambda value: value.update(attributes={"a": 1})), "not what was written"),
    ],
)
def test_damaged_metadata_of_an_array_or_a_group_is_named(
    store: Path, key: str, harm: Callable[[Path], Any], expected: str
) -> None:
    harm(store / key)
    found = verify_store(store)
    assert keys(found) == [key]
    assert expected in reason(found, key)
    assert found.num_checked == 5


def test_a_job_that_has_not_finished_is_told_from_damage(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    writer.begin()
    commit(writer, "000000")
    found = {damage.key: damage.reason for damage in verify_store(writer.path).damages}
    assert found == {
        "manifest.json": "there is none: the job that makes the store has not finished",
        "features/last/c.1.0.0": "no receipt names this shard",
        "valid/c.1": "no receipt names this shard",
    }


def test_without_root_metadata_nothing_can_be_said(store: Path) -> None:
    edit_json(store / "zarr.json", lambda root: root["attributes"]["headstart"]["identity"].update(encoder="two"))
    with pytest.raises(DamagedStoreError, match="does not match the fingerprint it carries"):
        verify_store(store)
    (store / "zarr.json").write_bytes(b"{")
    with pytest.raises(UsageError, match="not one that headstart wrote"):
        verify_store(store)
    (store / "zarr.json").unlink()
    with pytest.raises(UsageError, match=r"it has no zarr\.json"):
        verify_store(store)
    with pytest.raises(UsageError, match="no store at"):
        verify_store(store / "nowhere.zarr")


def test_no_file_stays_open_after_a_check(store: Path, packed: Path) -> None:
    for path in (store, packed):
        verify_store(path)
        open_now = [str(link.resolve()) for link in Path("/proc/self/fd").iterdir()]
        assert not [name for name in open_now if name.startswith(str(store.parent))]


# HDF5


def where_in_file(path: Path, dataset: str) -> range:
    """The bytes of a file that a dataset's values lie in."""
    with h5py.File(path) as file:
        node = file[dataset]
        return range(node.id.get_offset(), node.id.get_offset() + node.nbytes)


@pytest.mark.parametrize("prefix", ["", "headstart/crc32c/"])
@pytest.mark.parametrize("name", ["features/last", "valid", "image/size"])
def test_a_flipped_byte_in_values_or_their_checksums_in_hdf5_is_named(packed: Path, prefix: str, name: str) -> None:
    places = where_in_file(packed, prefix + name)
    for place in (places[0], places[-1]):
        flip_byte(packed, place)
        found = verify_store(packed)
        layout = open_store(packed).layouts[name]
        shard = 0 if place == places[0] else layout.num_shards - 1
        assert [(damage.key, damage.unit) for damage in found.damages] == [
            (layout.shard_key(shard), UNIT_OF[layout.shard_key(shard)])
        ]
        with pytest.raises(DamagedStoreError):
            open_store(packed).read(name)
        flip_byte(packed, place)
    assert verify_store(packed).is_sound


def test_values_and_checksums_that_fit_each_other_are_still_not_what_was_written(packed: Path, tmp_path: Path) -> None:
    other = ~ARRAYS["valid"]
    from awscrt.checksums import crc32c

    with h5py.File(packed, "r+") as file:
        file["valid"][...] = other
        file["headstart/crc32c/valid"][...] = [crc32c(other[:4].tobytes()), crc32c(other[4:].tobytes())]
    assert (open_store(packed).read("valid") == other).all()
    assert keys(verify_store(packed)) == ["valid/c.0", "valid/c.1"]


@pytest.mark.parametrize(
    "key", ["zarr.json", "manifest.json", "ledger.jsonl", "receipts/000000.json", f"receipts/{STATIC_UNIT}.json"]
)
def test_a_flipped_byte_in_json_in_hdf5_is_named(packed: Path, key: str) -> None:
    places = where_in_file(packed, f"headstart/files/{key}")
    for place in (places[0], places[len(places) // 2], places[-1]):
        flip_byte(packed, place)
        with pytest.raises(DamagedStoreError, match=f"{key} fails its checksum"):
            open_store(packed)
        with pytest.raises(DamagedStoreError, match=f"{key} fails its checksum"):
            verify_store(packed)
        flip_byte(packed, place)
    assert verify_store(packed).is_sound


def test_an_array_that_is_not_in_the_hdf5_file_is_named_shard_by_shard(packed: Path) -> None:
    with h5py.File(packed, "r+") as file:
        del file["valid"]
    found = verify_store(packed)
    assert keys(found) == ["valid/c.0", "valid/c.1"]
    assert found.num_checked == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.create_dataset("valid", data=ARRAYS["valid"][:5]),
        lambda file: file.create_dataset("valid", data=ARRAYS["valid"].astype(np.uint8)),
        lambda file: file.create_dataset("valid", data=ARRAYS["valid"], chunks=(2,)),
        lambda file: file.create_dataset("valid", data=ARRAYS["valid"], chunks=(6,), compression="gzip"),
        lambda file: file.create_dataset("valid", (6,), np.bool_),
    ],
    ids=["shape", "dtype", "chunked", "compressed", "empty"],
)
def test_an_array_that_lies_in_hdf5_in_another_way_is_damage(packed: Path, change: Callable[[Any], Any]) -> None:
    with h5py.File(packed, "r+") as file:
        del file["valid"]
        change(file)
    with pytest.raises(DamagedStoreError):
        open_store(packed).read("valid")
    assert keys(verify_store(packed)) == ["valid/c.0", "valid/c.1"]


@pytest.mark.parametrize(
    "content", [b"", b"no HDF5", b"\x89HDF\r\n\x1a\n", b"\x89HDF\r\n\x1a\n" + bytes(4000)], ids=range(4)
)
def test_what_is_no_hdf5_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "store.h5").write_bytes(content)
    for look in (open_store, verify_store):
        with pytest.raises(DamagedStoreError, match="is no HDF5 file that headstart wrote, or a damaged one"):
            look(tmp_path / "store.h5")


def test_an_hdf5_file_of_someone_elses_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "store.h5", "w") as file:
        file["values"] = np.arange(3)
    with pytest.raises(DamagedStoreError, match="is no HDF5 file that headstart wrote"):
        open_store(tmp_path / "store.h5")
