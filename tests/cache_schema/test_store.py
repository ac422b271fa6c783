"""A store is complete or it is not, and only a complete and consistent one is opened."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from cache_schema import SCHEMA_VERSION, atomic
from cache_schema.atomic import parse_path
from cache_schema.errors import DamagedStoreError, UsageError
from cache_schema.receipts import Failure, Manifest
from cache_schema.store import (
    STATIC_UNIT,
    StoreHeader,
    is_complete,
    ledger_lines,
    open_store,
    read_header,
    recorded_path,
    relative_paths,
)
from tests.cache_schema.toys import (
    FAILURE,
    FEATURES,
    HEADER,
    LAYOUTS,
    STATIC,
    UNITS,
    VALID,
    commit,
    edit_json,
    files_of,
    flip_byte,
    make_writer,
    write_store,
)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path)


# Writing


def test_a_store_that_was_finished_holds_what_was_committed(store: Path) -> None:
    opened = open_store(store, "image_features")
    np.testing.assert_array_equal(opened.read("features/last"), FEATURES)
    np.testing.assert_array_equal(opened.read("valid"), VALID)
    np.testing.assert_array_equal(opened.array("image/size").read([4, 1]), STATIC[0].values[[4, 1]])
    assert opened.read("image/none").shape == (0,)
    assert opened.failures() == [FAILURE]
    assert opened.header == HEADER
    assert [receipt.unit for receipt in opened.receipts()] == ["000000", "000001", STATIC_UNIT]
    assert opened.manifest.num_units == 3
    assert opened.manifest.num_failures == 1
    opened.close()


def test_the_folder_is_named_after_kind_and_fingerprint(store: Path) -> None:
    assert store.name == f"image_features-{HEADER.fingerprint[:12]}.zarr"
    assert len(HEADER.fingerprint) == 64


@pytest.mark.parametrize(
    "other",
    [
        replace(HEADER, kind="prompt_features"),
        replace(HEADER, identity={"encoder": "another", "images": [1, 2, 3]}),
        replace(HEADER, identity={"encoder": "one", "images": [1, 2]}),
    ],
)
def test_another_kind_or_identity_is_another_fingerprint(other: StoreHeader) -> None:
    assert other.fingerprint != HEADER.fingerprint


def test_what_is_only_recorded_is_no_part_of_the_fingerprint() -> None:
    assert replace(HEADER, recorded={"libraries": {"numpy": "3"}}).fingerprint == HEADER.fingerprint


def test_equal_content_has_equal_digests_whatever_the_order_and_speed_of_the_work(tmp_path: Path, store: Path) -> None:
    writer = make_writer(tmp_path / "other")
    writer.begin()
    for unit in reversed(UNITS):
        commit(writer, unit, rates={"images_per_s": 17.0})
    manifest = writer.finish(UNITS)
    assert manifest == open_store(store).manifest
    assert open_store(writer.path).receipts()[0].rates == {"images_per_s": 17.0}


def test_other_content_has_another_digest(tmp_path: Path, store: Path) -> None:
    writer = make_writer(tmp_path / "other")
    writer.begin()
    commit(writer, "000000")
    writer.commit(
        "000001", (4, 6), {("features/last", 1): np.nextafter(FEATURES[4:], np.float16(1)), ("valid", 1): VALID[4:]}
    )
    assert writer.finish(UNITS).digest != open_store(store).manifest.digest


def test_the_manifest_counts_files_and_bytes(store: Path) -> None:
    manifest = open_store(store).manifest
    shards = [path for path in store.rglob("c.*") if path.is_file()]
    assert manifest.num_files == len(shards) == 5
    assert manifest.num_bytes == sum(path.stat().st_size for path in shards)


def test_no_temporary_file_is_left(store: Path) -> None:
    assert not [name for name in files_of(store) if name.endswith(atomic.TEMPORARY_SUFFIX)]


def test_the_ledger_lists_every_failure_in_order_for_people(tmp_path: Path, store: Path) -> None:
    failures = [Failure(5, "image 6", "größer als erlaubt"), Failure(4, "image \n5", "")]
    writer = make_writer(tmp_path / "other")
    writer.begin()
    commit(writer, "000000")
    writer.commit("000001", (4, 6), {}, failures)
    writer.finish(UNITS)
    lines = (writer.path / "ledger.jsonl").read_bytes().decode().splitlines()
    assert [json.loads(line) for line in lines] == [asdict(failure) for failure in (FAILURE, *failures)]
    assert json.loads((store / "ledger.jsonl").read_bytes()) == asdict(FAILURE)
    assert ledger_lines([]) == b""


# What lies outside


def test_a_place_outside_is_recorded_relative_to_the_store(tmp_path: Path) -> None:
    store = tmp_path / "stores" / "one.zarr"
    paths = {"samples": tmp_path / "stores" / "samples.zarr", "images": tmp_path / "data" / "images", "self": store}
    recorded = relative_paths(paths, store)
    assert recorded == {"samples": "../samples.zarr", "images": "../../data/images", "self": "."}
    header = replace(HEADER, recorded={"paths": recorded})
    for name, path in paths.items():
        assert recorded_path(header, store, name) == path
    assert recorded_path(header, store, "another") is None
    assert recorded_path(HEADER, store, "samples") is None
    assert header.fingerprint == HEADER.fingerprint


def test_stores_that_are_moved_together_still_find_each_other(tmp_path: Path) -> None:
    store = tmp_path / "here" / "stores" / "one.zarr"
    header = replace(HEADER, recorded={"paths": relative_paths({"samples": tmp_path / "here" / "samples"}, store)})
    there = tmp_path / "there" / "stores" / "one.zarr"
    assert recorded_path(header, there, "samples") == tmp_path / "there" / "samples"


def test_a_header_for_another_place_records_the_same_places_and_the_rest_as_it_was(tmp_path: Path) -> None:
    old, new = tmp_path / "a" / "one.zarr", tmp_path / "b" / "c" / "one.h5"
    paths = {"samples": tmp_path / "samples.zarr", "adapter": tmp_path / "a" / "adapter"}
    header = replace(HEADER, recorded={"libraries": {"numpy": "2"}, "paths": relative_paths(paths, old)})
    moved = header.moved(old, new)
    assert {name: recorded_path(moved, new, name) for name in paths} == paths
    assert moved.recorded["libraries"] == {"numpy": "2"}
    assert moved.moved(new, old) == header
    assert HEADER.moved(old, new) == HEADER


def test_a_remote_store_and_this_machine_know_nothing_of_each_others_places(tmp_path: Path) -> None:
    remote = parse_path("memory://bucket/one.zarr")
    assert relative_paths({"samples": tmp_path}, remote) == {}
    header = replace(HEADER, recorded={"paths": {"samples": "../samples.zarr"}})
    assert recorded_path(header, remote, "samples") is None


# Going on where a job stopped


def test_a_unit_is_done_when_its_receipt_is_honoured(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    assert not writer.is_done(STATIC_UNIT)
    writer.begin()
    assert writer.is_done(STATIC_UNIT)
    assert not writer.is_done("000000")
    commit(writer, "000000")
    assert writer.is_done("000000")
    assert make_writer(tmp_path).is_done("000000")
    assert not writer.is_done("000001")


@pytest.mark.parametrize("key", ["features/last/c.0.0.0", "valid/c.0"])
@pytest.mark.parametrize("harm", [flip_byte, Path.unlink, lambda path: path.write_bytes(b""), "grown"])
def test_a_unit_with_a_harmed_file_is_not_done(store: Path, tmp_path: Path, key: str, harm: Any) -> None:
    path = store / key
    path.write_bytes(path.read_bytes() + b"\0") if harm == "grown" else harm(path)
    writer = make_writer(tmp_path)
    assert not writer.is_done("000000")
    assert writer.is_done("000001")


@pytest.mark.parametrize(
    "receipt",
    [b"", b"{", b"[]", b"null", b"7", b"\xff\xfe", b'{"unit": "000000"}'],
)
def test_a_unit_with_a_damaged_receipt_is_not_done(store: Path, tmp_path: Path, receipt: bytes) -> None:
    (store / "receipts" / "000000.json").write_bytes(receipt)
    assert not make_writer(tmp_path).is_done("000000")


@pytest.mark.parametrize("field", ["rows", "files", "failures"])
@pytest.mark.parametrize("value", [None, 7, [7], {"a": 7}])
def test_a_unit_whose_receipt_has_fields_of_other_types_is_not_done(
    store: Path, tmp_path: Path, field: str, value: Any
) -> None:
    edit_json(store / "receipts" / "000000.json", lambda receipt: receipt.update({field: value}))
    assert not make_writer(tmp_path).is_done("000000")
    assert not is_complete(store)


def test_beginning_again_keeps_what_is_there(store: Path, tmp_path: Path) -> None:
    before = files_of(store)
    make_writer(tmp_path, replace(HEADER, recorded={"libraries": {"numpy": "3"}})).begin()
    assert files_of(store) == before


@pytest.mark.parametrize(
    "key",
    ["zarr.json", "features/zarr.json", "features/last/zarr.json", "image/size/zarr.json", "image/size/c.0.0"],
)
@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-4])])
def test_beginning_again_mends_metadata_and_what_was_known_before(
    store: Path, tmp_path: Path, key: str, harm: Callable[[Path], object]
) -> None:
    before = files_of(store)
    harm(store / key)
    make_writer(tmp_path).begin()
    assert files_of(store) == before


def test_a_job_cannot_finish_before_its_units(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    writer.begin()
    commit(writer, "000000")
    with pytest.raises(DamagedStoreError, match=r"000001\.json: the receipt cannot be read"):
        writer.finish(UNITS)
    assert not is_complete(writer.path)


def test_doing_a_unit_twice_changes_nothing(store: Path, tmp_path: Path) -> None:
    before = files_of(store)
    writer = make_writer(tmp_path)
    commit(writer, "000001")
    assert writer.finish(UNITS) == open_store(store).manifest
    assert files_of(store) == before


def test_a_unit_that_is_cut_off_before_its_receipt_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = make_writer(tmp_path)
    writer.begin()
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            commit(writer, "000000")
    assert (writer.path / "features/last/c.0.0.0").is_file()
    assert not writer.is_done("000000")


def test_rows_of_an_array_that_was_not_declared_are_a_fault_of_ours(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    with pytest.raises(KeyError):
        writer.commit("000000", (0, 1), {("another", 0): FEATURES[:1]})


# Opening


def test_a_complete_store_is_complete(store: Path) -> None:
    assert is_complete(store)
    assert read_header(store)[1].keys() == {"features/last", "valid", "image/size", "image/none"}


def test_there_must_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no store at .*nowhere.zarr: the folder is missing\..*cache list` shows"):
        open_store(tmp_path / "nowhere.zarr")


def test_a_folder_without_metadata_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a store: it has no zarr.json\. Name a folder that ends in .zarr\."):
        open_store(tmp_path)


@pytest.mark.parametrize("attributes", [{}, {"headstart": None}, {"headstart": {}}, {"another": {"version": 1}}])
def test_a_zarr_group_of_someone_elses_is_refused(tmp_path: Path, attributes: dict[str, Any]) -> None:
    zarr.create_group(tmp_path / "theirs.zarr", attributes=attributes)
    with pytest.raises(UsageError, match="is a zarr group, but not one that headstart wrote"):
        open_store(tmp_path / "theirs.zarr")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff"])
def test_metadata_that_is_no_zarr_group_at_all_is_refused(store: Path, content: bytes) -> None:
    (store / "zarr.json").write_bytes(content)
    with pytest.raises(UsageError, match="not one that headstart wrote"):
        open_store(store)


def test_a_store_of_another_schema_version_is_refused_by_name(store: Path) -> None:
    edit_json(store / "zarr.json", lambda root: root["attributes"]["headstart"].update(schema_version=99))
    with pytest.raises(UsageError, match=f"has schema version 99; this one reads {SCHEMA_VERSION}. Make it again"):
        open_store(store)


def test_a_store_of_another_kind_is_refused(store: Path) -> None:
    with pytest.raises(UsageError, match="is a store of image_features, where one of samples is wanted; name that one"):
        open_store(store, "samples")


@pytest.mark.parametrize(
    "change",
    [
        lambda headstart: headstart["identity"].update(encoder="another"),
        lambda headstart: headstart["identity"].update(more=1),
        lambda headstart: headstart.update(kind="prompt_features"),
        lambda headstart: headstart.update(kind="another"),
        lambda headstart: headstart.update(fingerprint="0" * 64),
    ],
)
def test_an_edited_identity_does_not_match_its_fingerprint(store: Path, change: Callable[[Any], object]) -> None:
    edit_json(store / "zarr.json", lambda root: change(root["attributes"]["headstart"]))
    with pytest.raises(DamagedStoreError, match=r"does not match the fingerprint it carries; make the store again"):
        open_store(store)


@pytest.mark.parametrize(
    "change",
    [
        lambda root: root["attributes"]["headstart"].pop("identity"),
        lambda root: root["attributes"]["headstart"].pop("recorded"),
        lambda root: root.pop("consolidated_metadata"),
        lambda root: root["consolidated_metadata"].update(metadata=None),
        lambda root: root["consolidated_metadata"]["metadata"]["valid"].update(codecs=[]),
        lambda root: root["consolidated_metadata"]["metadata"]["valid"].pop("node_type"),
        lambda root: root["consolidated_metadata"]["metadata"]["valid"].update(data_type="float99"),
    ],
)
def test_metadata_that_lost_a_part_is_damage(store: Path, change: Callable[[Any], object]) -> None:
    edit_json(store / "zarr.json", change)
    with pytest.raises(DamagedStoreError, match=r"zarr\.json is damaged \(.*\); make the store again"):
        open_store(store)


def test_an_edited_shape_is_damage(store: Path) -> None:
    edit_json(store / "zarr.json", lambda root: root["consolidated_metadata"]["metadata"]["valid"].update(shape=[5]))
    with pytest.raises(DamagedStoreError):
        open_store(store).read("valid")


def test_a_store_without_a_manifest_is_incomplete(store: Path) -> None:
    (store / "manifest.json").unlink()
    with pytest.raises(
        UsageError, match=r"is incomplete: its job has not finished\. Run the `headstart extract` that made it again"
    ):
        open_store(store)
    assert not is_complete(store)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"null", b'{"digest": "0"}'])
def test_a_manifest_that_cannot_be_read_is_damage(store: Path, content: bytes) -> None:
    (store / "manifest.json").write_bytes(content)
    with pytest.raises(DamagedStoreError, match=r"no manifest .*`headstart cache repair` makes it again"):
        open_store(store)


@pytest.mark.parametrize("field", list(Manifest.__dataclass_fields__))
def test_a_manifest_that_contradicts_its_receipts_is_damage(store: Path, field: str) -> None:
    edit_json(
        store / "manifest.json",
        lambda manifest: manifest.update({field: "0" * 64 if isinstance(manifest[field], str) else 99}),
    )
    with pytest.raises(
        DamagedStoreError, match=r"the manifest and the receipts differ\. Run the `headstart extract` that made it"
    ):
        open_store(store)


@pytest.mark.parametrize("unit", ["000000", "000001", STATIC_UNIT])
def test_a_missing_receipt_is_damage(store: Path, unit: str) -> None:
    (store / "receipts" / f"{unit}.json").unlink()
    with pytest.raises(DamagedStoreError, match="the manifest and the receipts differ"):
        open_store(store)


def test_a_receipt_that_names_another_digest_is_damage(store: Path) -> None:
    edit_json(
        store / "receipts" / "000000.json",
        lambda receipt: receipt["files"]["valid/c.0"].update(xxh3_128="0" * 32),
    )
    with pytest.raises(DamagedStoreError, match="the manifest and the receipts differ"):
        open_store(store)


def test_a_receipt_that_cannot_be_read_is_damage(store: Path) -> None:
    (store / "receipts" / "000000.json").write_bytes(b"{")
    with pytest.raises(DamagedStoreError, match=r"no receipt .*; `headstart cache repair` makes it again"):
        open_store(store)


@pytest.mark.parametrize("key", ["features/last/c.1.0.0", "valid/c.0", "image/size/c.0.0"])
@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_file_that_is_missing_or_has_another_size_is_damage(
    store: Path, key: str, harm: Callable[[Path], object]
) -> None:
    harm(store / key)
    with pytest.raises(
        DamagedStoreError, match=r"is missing or has another size\. Run the `headstart extract` that made it again"
    ):
        open_store(store)


def test_a_flipped_byte_is_found_when_it_is_read(store: Path) -> None:
    flip_byte(store / "features/last/c.0.0.0")
    with pytest.raises(DamagedStoreError, match="chunk 0 fails its checksum"):
        open_store(store).read("features/last")


def test_an_array_that_is_not_there_is_named_beside_those_that_are(store: Path) -> None:
    with pytest.raises(UsageError, match=r"has no array 'features/9'; it holds features/last, image/none"):
        open_store(store).array("features/9")


def test_an_array_is_opened_once(store: Path) -> None:
    opened = open_store(store)
    assert opened.array("valid") is opened.array("valid")


def test_a_store_may_be_moved(store: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "store.zarr"
    moved.parent.mkdir()
    shutil.move(store, moved)
    np.testing.assert_array_equal(open_store(moved).read("features/last"), FEATURES)


# Other readers of zarr


@pytest.fixture(params=["consolidated metadata", "each node's own"])
def group(request: pytest.FixtureRequest, store: Path) -> zarr.Group:
    use_consolidated = request.param == "consolidated metadata"
    return zarr.open_group(store, mode="r", use_consolidated=use_consolidated)


def test_zarr_python_reads_every_array_by_its_name(group: zarr.Group) -> None:
    expected = {"features/last": FEATURES, "valid": VALID, **{array.name: array.values for array in STATIC}}
    for name, values in expected.items():
        array = group[name]
        assert isinstance(array, zarr.Array)
        np.testing.assert_array_equal(np.asarray(array[...]), values)
        assert array.dtype == values.dtype


def test_dimensions_are_named(group: zarr.Group) -> None:
    for layout in (*LAYOUTS, *(array.layout for array in STATIC)):
        assert group[layout.name].metadata.dimension_names == layout.axes  # type: ignore[union-attr]


def test_the_group_says_what_it_is(group: zarr.Group) -> None:
    attributes: Any = group.attrs["headstart"]
    assert attributes["fingerprint"] == HEADER.fingerprint
    assert attributes["identity"] == HEADER.identity


def test_enumerating_the_store_warns_of_nothing(store: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        group = zarr.open_group(store, mode="r")
        members = dict(group.members(max_depth=None))
        assert set(group.group_keys()) == {"features", "image"}
        str(group.tree())
    assert not caught
    assert members.keys() == {"features", "features/last", "valid", "image", "image/size", "image/none"}


def test_the_consolidated_metadata_is_each_nodes_own(store: Path) -> None:
    consolidated = json.loads((store / "zarr.json").read_bytes())["consolidated_metadata"]["metadata"]
    assert consolidated
    for name, metadata in consolidated.items():
        assert json.loads((store / name / "zarr.json").read_bytes()) == metadata
