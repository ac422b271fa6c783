"""The task survives its store: images, prompts, targets, splits and tags come back as they were handed over."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_schema.errors import DamagedStoreError, UsageError
from cache_schema.masks import empty_mask, encode_mask
from cache_schema.samples import ImageTable, Samples, open_samples, write_samples
from cache_schema.store import open_store

SIZES = np.array([[4, 6], [5, 3]], np.int32)


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make_samples() -> Samples:
    first, second = np.zeros((4, 6), np.bool_), np.ones((5, 3), np.bool_)
    first[1:3, 2:5] = True
    return Samples(
        images=ImageTable(["7", "ä/8"], ["7.jpg", "deep/er/8.png"], SIZES, [sha256_of("one"), sha256_of("two")]),
        prompts=["the red one", "das größte", "nothing"],
        ids=["a", "b", "c", "d"],
        image_rows=np.array([0, 1, 1, 0], np.int32),
        prompt_rows=np.array([1, 0, 2, 1], np.int32),
        targets=[encode_mask(first), encode_mask(second), empty_mask((5, 3)), empty_mask((4, 6))],
        no_target=np.array([False, False, True, True]),
        splits=["val", "train", "train", "val"],
        tags={"kind": ["colour", None, "size", "colour"], "category": ["cat", "dog", "cat", None]},
    )


def write(parent: Path, samples: Samples, **changes: Any) -> tuple[Path, bool]:
    options: dict[str, Any] = {
        "dataset": "mine",
        "sources": {"refs.json": sha256_of("refs")},
        "image_dir": parent / "images",
        "libraries": {"numpy": "2"},
    }
    return write_samples(parent / "stores", samples, **options | changes)


def assert_equal(one: Samples, other: Samples) -> None:
    assert list(one.images.ids) == list(other.images.ids)
    assert list(one.images.paths) == list(other.images.paths)
    assert list(one.images.sha256) == list(other.images.sha256)
    np.testing.assert_array_equal(one.images.sizes, other.images.sizes)
    for name in ("prompts", "ids", "targets", "splits"):
        assert list(getattr(one, name)) == list(getattr(other, name)), name
    for name in ("image_rows", "prompt_rows", "no_target"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)
    assert {name: list(values) for name, values in one.tags.items()} == dict(other.tags)


def test_samples_come_back_as_they_were(tmp_path: Path) -> None:
    path, reused = write(tmp_path, make_samples())
    opened = open_samples(path)
    assert not reused
    assert_equal(opened.samples, make_samples())
    assert opened.dataset == "mine"
    assert opened.path == path
    assert path.name == f"samples-{opened.fingerprint[:12]}.zarr"


def test_a_target_is_a_mask_at_its_images_size(tmp_path: Path) -> None:
    samples = open_samples(write(tmp_path, make_samples())[0]).samples
    assert [samples.size_of(sample) for sample in range(len(samples))] == [(4, 6), (5, 3), (5, 3), (4, 6)]
    assert samples.target(0)[1:3, 2:5].all()
    assert [int(samples.target(sample).sum()) for sample in range(len(samples))] == [6, 15, 0, 0]


def test_samples_without_tags_or_targets_of_any_length_come_back_too(tmp_path: Path) -> None:
    samples = replace(make_samples(), tags={}, prompts=["", "a", "b" * 300])
    assert_equal(open_samples(write(tmp_path, samples)[0]).samples, samples)


def test_a_tag_that_no_sample_has_comes_back_empty(tmp_path: Path) -> None:
    samples = replace(make_samples(), tags={"kind": [None] * 4})
    assert open_samples(write(tmp_path, samples)[0]).samples.tags == {"kind": [None] * 4}


def test_writing_the_same_samples_again_finds_them_there(tmp_path: Path) -> None:
    path, _ = write(tmp_path, make_samples())
    times = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    assert write(tmp_path, make_samples()) == (path, True)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == times


@pytest.mark.parametrize("name", ["manifest.json", "receipts/static.json", "sample/image/c.0", "zarr.json"])
def test_a_store_that_lost_a_file_is_written_again(tmp_path: Path, name: str) -> None:
    path, _ = write(tmp_path, make_samples())
    (path / name).unlink()
    assert write(tmp_path, make_samples()) == (path, False)
    assert_equal(open_samples(path).samples, make_samples())


@pytest.mark.parametrize(
    "change",
    [
        {"ids": ["a", "b", "c", "e"]},
        {"prompts": ["the red one", "das größte", "everything"]},
        {"image_rows": np.array([0, 1, 1, 1], np.int32)},
        {"targets": [*make_samples().targets[:3], encode_mask(np.ones((4, 6), np.bool_))]},
        {"no_target": np.array([False, False, True, False])},
        {"splits": ["val", "train", "train", "train"]},
        {"splits": ["test", "train", "train", "test"]},
        {"tags": {"kind": ["colour", None, "size", "colour"]}},
        {"tags": make_samples().tags | {"kind": ["hue", None, "size", "hue"]}},
        {"images": replace(make_samples().images, sha256=[sha256_of("one"), sha256_of("three")])},
        {"images": replace(make_samples().images, paths=["7.jpg", "8.png"])},
        {"images": replace(make_samples().images, sizes=SIZES[:, ::-1])},
    ],
)
def test_whatever_differs_makes_another_store(tmp_path: Path, change: dict[str, Any]) -> None:
    path, _ = write(tmp_path, make_samples())
    other, reused = write(tmp_path, replace(make_samples(), **change))
    assert not reused
    assert other != path


@pytest.mark.parametrize("change", [{"dataset": "yours"}, {"sources": {"refs.json": sha256_of("others")}}])
def test_another_origin_makes_another_store(tmp_path: Path, change: dict[str, Any]) -> None:
    assert write(tmp_path, make_samples(), **change)[0] != write(tmp_path, make_samples())[0]


def test_where_the_images_lie_and_who_wrote_it_make_no_difference(tmp_path: Path) -> None:
    path, _ = write(tmp_path, make_samples())
    assert write(tmp_path, make_samples(), image_dir=tmp_path / "moved", libraries={}) == (path, True)
    other, _ = write(tmp_path / "other", make_samples(), libraries={"numpy": "3"})
    assert other.name == path.name
    assert open_store(other).manifest == open_store(path).manifest


def test_images_are_found_where_they_lay_relative_to_the_store(tmp_path: Path) -> None:
    home = tmp_path / "home"
    path, _ = write(home, make_samples())
    assert open_samples(path).image_dir.resolve() == home / "images"
    shutil.move(home, tmp_path / "moved")
    moved = tmp_path / "moved" / "stores" / path.name
    assert open_samples(moved).image_dir.resolve() == tmp_path / "moved" / "images"
    assert open_samples(moved, tmp_path / "elsewhere").image_dir == tmp_path / "elsewhere"


def test_no_absolute_path_is_written(tmp_path: Path) -> None:
    path, _ = write(tmp_path, make_samples())
    files = [file for file in path.rglob("*") if file.is_file()]
    assert len(files) > 20
    assert not [file for file in files if str(tmp_path).encode() in file.read_bytes()]


def test_a_splits_samples_come_in_order(tmp_path: Path) -> None:
    samples = open_samples(write(tmp_path, make_samples())[0]).samples
    assert samples.rows_of_split("train").tolist() == [1, 2]
    assert samples.rows_of_split("val").tolist() == [0, 3]


def test_a_split_that_is_not_there_is_met_with_those_that_are() -> None:
    with pytest.raises(UsageError, match=r"unknown split 'vall': did you mean 'val'\? Known: train, val\."):
        make_samples().rows_of_split("vall")


def test_samples_are_not_opened_from_another_kind_of_store(feature_cache: Any) -> None:
    with pytest.raises(UsageError, match="is a store of image_features, where one of samples is wanted"):
        open_samples(feature_cache.images.store.path)


def test_a_flipped_bit_in_any_array_is_found_when_the_store_is_opened(tmp_path: Path) -> None:
    path, _ = write(tmp_path, make_samples())
    shards = [file for file in path.rglob("c.*") if file.is_file()]
    assert len(shards) == len(json.loads((path / "receipts" / "static.json").read_bytes())["files"]) > 0
    for shard in shards:
        sound = shard.read_bytes()
        shard.write_bytes(bytes([sound[0] ^ 1]) + sound[1:])
        with pytest.raises(DamagedStoreError, match="fails its checksum"):
            open_samples(path)
        shard.write_bytes(sound)
    assert_equal(open_samples(path).samples, make_samples())
