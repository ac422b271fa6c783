"""Repair: what is harmed is extracted again, what is not is left alone, and the digests are what they were."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache_schema.convert import convert_store
from cache_schema.errors import StoreMismatchError, UsageError
from cache_schema.store import is_complete, open_store
from cache_schema.verify import verify_store
from extract.image_job import ImageJobConfig, extract_images
from extract.job import Extraction
from extract.prompt_job import PromptJobConfig, extract_prompts
from tests.extract.toys import (
    NUM_IMAGES,
    SHARD_ROWS,
    ToyImageEncoder,
    ToyTextEncoder,
    digest_of,
    flip_byte,
    noise_png,
    prompts_of,
    sizes_of,
    write_task,
)

FIRST, SECOND, LAST = SHARD_ROWS, SHARD_ROWS, NUM_IMAGES - 2 * SHARD_ROWS
"""Images in each of the three units."""


def swap(first: Path, second: Path) -> None:
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def rewrite(path: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


HARMS: dict[str, tuple[Callable[[Path], object], int]] = {
    "nothing": (lambda store: None, 0),
    "a bit of a shard flipped": (lambda store: flip_byte(store / "features/fine/c.1.0.0.0"), SECOND),
    "a bit of the last shard flipped": (lambda store: flip_byte(store / "cls/coarse/c.2.0"), LAST),
    "a flag flipped": (lambda store: flip_byte(store / "valid/c.0"), FIRST),
    "a shard cut short": (lambda store: (store / "features/fine/c.0.0.0.0").write_bytes(b"short"), FIRST),
    "a shard made longer": (lambda store: lengthen(store / "valid/c.1"), SECOND),
    "a shard empty": (lambda store: (store / "features/coarse/c.2.0.0.0").write_bytes(b""), LAST),
    "two shards swapped": (
        lambda store: swap(store / "features/fine/c.0.0.0.0", store / "features/fine/c.1.0.0.0"),
        FIRST + SECOND,
    ),
    "shards of two arrays swapped": (
        lambda store: swap(store / "features/fine/c.1.0.0.0", store / "features/coarse/c.1.0.0.0"),
        SECOND,
    ),
    "a shard gone": (lambda store: (store / "features/coarse/c.1.0.0.0").unlink(), SECOND),
    "an array gone": (lambda store: shutil.rmtree(store / "cls"), NUM_IMAGES),
    "a receipt cut short": (lambda store: (store / "receipts/000001.json").write_bytes(b'{"unit": '), SECOND),
    "a receipt of no sense": (lambda store: (store / "receipts/000001.json").write_bytes(b"[]"), SECOND),
    "a receipt of bytes": (lambda store: (store / "receipts/000001.json").write_bytes(b"\xff\x00\xfe"), SECOND),
    "a receipt gone": (lambda store: (store / "receipts/000002.json").unlink(), LAST),
    "a receipt of another unit": (
        lambda store: shutil.copy(store / "receipts/000000.json", store / "receipts/000001.json"),
        SECOND,
    ),
    "two receipts swapped": (
        lambda store: swap(store / "receipts/000000.json", store / "receipts/000001.json"),
        FIRST + SECOND,
    ),
    "a receipt too many": (
        lambda store: shutil.copy(store / "receipts/000000.json", store / "receipts/000009.json"),
        0,
    ),
    "static data flipped": (lambda store: flip_byte(store / "image/id/values/c.0"), 0),
    "static data gone": (lambda store: (store / "view/c.0.0").unlink(), 0),
    "the static receipt gone": (lambda store: (store / "receipts/static.json").unlink(), 0),
    "metadata of an array gone": (lambda store: (store / "features/fine/zarr.json").unlink(), 0),
    "metadata of an array changed": (
        lambda store: rewrite(store / "cls/fine/zarr.json", lambda value: value.update(shape=[99, 3])),
        0,
    ),
    "metadata of a group garbled": (lambda store: (store / "features/zarr.json").write_bytes(b"{"), 0),
    "the root's metadata gone": (lambda store: (store / "zarr.json").unlink(), 0),
    "the root's metadata cut short": (lambda store: (store / "zarr.json").write_bytes(b'{"zarr'), 0),
    "the manifest gone": (lambda store: (store / "manifest.json").unlink(), 0),
    "the manifest garbled": (lambda store: (store / "manifest.json").write_bytes(b"{}"), 0),
    "the manifest of another": (
        lambda store: rewrite(store / "manifest.json", lambda value: value.update(digest="0" * 64)),
        0,
    ),
    "the ledger gone": (lambda store: (store / "ledger.jsonl").unlink(), 0),
    "much of it": (
        lambda store: [
            flip_byte(store / "features/fine/c.0.0.0.0"),
            (store / "cls/fine/c.0.0").unlink(),
            (store / "receipts/000002.json").unlink(),
            (store / "manifest.json").unlink(),
        ],
        FIRST + LAST,
    ),
    "everything but the root": (
        lambda store: [
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            for path in store.iterdir()
            if path.name != "zarr.json"
        ],
        NUM_IMAGES,
    ),
}


def files_of(store: Path) -> dict[str, bytes]:
    """Every file of a store; of receipts, what is said of bytes, and not how fast they were made."""
    found = {path.relative_to(store).as_posix(): path.read_bytes() for path in store.rglob("*") if path.is_file()}
    return {key: without_rates(data) if key.startswith("receipts/") else data for key, data in found.items()}


def without_rates(data: bytes) -> bytes:
    return json.dumps({**json.loads(data), "rates": {}}, sort_keys=True).encode()


@pytest.mark.parametrize("harm", HARMS)
def test_only_what_was_harmed_is_encoded_again(config: ImageJobConfig, harm: str) -> None:
    first = extract_images(config, ToyImageEncoder())
    before = files_of(first.path)
    do_harm, num_images = HARMS[harm]
    do_harm(first.path)
    encoder = ToyImageEncoder()
    repaired = extract_images(config, encoder, repair=first.path)
    assert repaired.path == first.path
    assert sum(encoder.encoded) == repaired.num_encoded == num_images
    assert repaired.num_reused == NUM_IMAGES - num_images
    assert files_of(first.path) == before
    assert verify_store(first.path).is_sound


def test_what_was_not_harmed_is_not_written_again(config: ImageJobConfig) -> None:
    first = extract_images(config, ToyImageEncoder())
    shards = [path for path in first.path.rglob("c.*") if path.is_file()]
    flip_byte(first.path / "features/fine/c.1.0.0.0")
    before = {path: path.stat().st_ino for path in shards}
    extract_images(config, ToyImageEncoder(), repair=first.path)
    written = {path.relative_to(first.path).as_posix() for path in shards if path.stat().st_ino != before[path]}
    assert written == {f"{name}/c.1{'.0' * zeros}" for name, zeros in UNIT_FILES}


UNIT_FILES = (("valid", 0), ("features/fine", 3), ("features/coarse", 3), ("cls/fine", 1), ("cls/coarse", 1))


def test_a_job_that_is_not_told_to_repair_trusts_a_complete_store(config: ImageJobConfig) -> None:
    first = extract_images(config, ToyImageEncoder())
    flip_byte(first.path / "features/fine/c.1.0.0.0")
    assert not extract_images(config, ToyImageEncoder(fails_at_batch=0)).num_encoded
    assert not verify_store(first.path).is_sound


def test_a_repair_that_was_killed_goes_on(config: ImageJobConfig) -> None:
    first = extract_images(config, ToyImageEncoder())
    digest = digest_of(first)
    for shard in range(3):
        flip_byte(first.path / f"features/fine/c.{shard}.0.0.0")
    with pytest.raises(RuntimeError, match="on fire"):
        extract_images(config, ToyImageEncoder(fails_at_batch=3), repair=first.path)
    encoder = ToyImageEncoder()
    extract_images(config, encoder, repair=first.path)
    assert sum(encoder.encoded) == SECOND + LAST
    assert digest_of(first) == digest


@pytest.mark.parametrize("views", [("whole", "flip"), ("whole", "crop-0.5", "scale-0.5+flip")])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_store_of_views_is_repaired_shard_by_shard(
    config: ImageJobConfig, views: tuple[str, ...], dtype: str
) -> None:
    config = replace(config, views=views, dtype=dtype, shard_rows=5)
    first = extract_images(config, ToyImageEncoder())
    before = files_of(first.path)
    flip_byte(first.path / "features/coarse/c.1.0.0.0")
    encoder = ToyImageEncoder()
    repaired = extract_images(config, encoder, repair=first.path)
    assert sum(encoder.encoded) == repaired.num_encoded == 5
    assert repaired.num_reused == NUM_IMAGES * len(views) - 5
    assert files_of(first.path) == before


def test_failures_are_still_in_the_ledger_after_a_repair(config: ImageJobConfig, tmp_path: Path) -> None:
    files = [noise_png(number, *size) for number, size in enumerate(sizes_of(NUM_IMAGES))]
    files[1], files[5] = b"", b"hello"
    config = replace(config, samples=write_task(tmp_path / "failing", files))
    first = extract_images(config, ToyImageEncoder())
    before = files_of(first.path)
    (first.path / "receipts/000001.json").unlink()
    encoder = ToyImageEncoder()
    repaired = extract_images(config, encoder, repair=first.path)
    assert sum(encoder.encoded) == SECOND - 1
    assert repaired.num_failed == 2
    assert files_of(first.path) == before


@pytest.mark.parametrize(
    "change",
    [{"dtype": "float32"}, {"shard_rows": 5}, {"views": ("whole", "flip")}],
)
def test_a_job_that_makes_another_store_repairs_nothing(config: ImageJobConfig, change: dict[str, object]) -> None:
    first = extract_images(config, ToyImageEncoder())
    flip_byte(first.path / "valid/c.1")
    before = files_of(first.path)
    with pytest.raises(StoreMismatchError, match=rf"are not those {first.path.name} was made with"):
        extract_images(replace(config, **change), ToyImageEncoder(), repair=first.path)  # type: ignore[arg-type]
    assert files_of(first.path) == before
    assert [path.name for path in config.out.iterdir()] == [first.path.name]


def test_another_encoder_repairs_nothing(config: ImageJobConfig) -> None:
    first = extract_images(config, ToyImageEncoder())
    with pytest.raises(StoreMismatchError, match="Put the former ones back, or extract into a new store"):
        extract_images(config, ToyImageEncoder(identity={"class": "another"}), repair=first.path)


def test_a_repair_that_needs_images_says_so_when_they_are_gone(config: ImageJobConfig, tmp_path: Path) -> None:
    first = extract_images(config, ToyImageEncoder())
    (tmp_path / "images").rename(tmp_path / "away")
    extract_images(config, ToyImageEncoder(fails_at_batch=0), repair=first.path)
    flip_byte(first.path / "valid/c.1")
    with pytest.raises(UsageError, match=r"no images at .*: the folder is missing"):
        extract_images(config, ToyImageEncoder(), repair=first.path)
    moved = replace(config, image_dir=tmp_path / "away")
    assert extract_images(moved, ToyImageEncoder(), repair=first.path).num_encoded == SECOND


# Prompts


PROMPTS = prompts_of([3, 0, 40, 1, 1, 7, 90, 2, 0, 5, 33, 12, 1, 64])


@pytest.fixture
def prompt_config(tmp_path: Path) -> PromptJobConfig:
    samples = write_task(tmp_path / "prompts", prompts=PROMPTS)
    return PromptJobConfig(samples, tmp_path / "stores", batch_size=3, unit_prompts=4, shard_tokens=32)


PROMPT_HARMS: dict[str, tuple[Callable[[Path], object], set[int]]] = {
    "pooled features flipped": (lambda store: flip_byte(store / "pooled/c.2.0"), {2}),
    "pooled features swapped": (lambda store: swap(store / "pooled/c.0.0", store / "pooled/c.1.0"), {0, 1}),
    "tokens flipped": (lambda store: flip_byte(store / "tokens/c.0.0"), {0}),
    "the last tokens gone": (lambda store: (store / "tokens/c.8.0").unlink(), {3}),
    "a receipt garbled": (lambda store: (store / "receipts/000001.json").write_bytes(b"null"), {1}),
    "token ids flipped": (lambda store: flip_byte(store / "token_ids/c.0"), set()),
    "offsets' metadata gone": (lambda store: (store / "offsets/zarr.json").unlink(), set()),
    "the manifest gone": (lambda store: (store / "manifest.json").unlink(), set()),
}


@pytest.mark.parametrize("harm", PROMPT_HARMS)
def test_only_prompts_of_harmed_units_are_encoded_again(prompt_config: PromptJobConfig, harm: str) -> None:
    first = extract_prompts(prompt_config, ToyTextEncoder())
    before = files_of(first.path)
    do_harm, units = PROMPT_HARMS[harm]
    do_harm(first.path)
    encoder = ToyTextEncoder()
    repaired = extract_prompts(prompt_config, encoder, repair=first.path)
    own = sum(min(4, len(PROMPTS) - 4 * unit) for unit in units)
    assert repaired.num_encoded == own
    assert own <= sum(encoder.encoded) <= own + 4 * len(units), "tokens of a shard may reach into the next unit"
    assert files_of(first.path) == before
    assert verify_store(first.path).is_sound


def test_a_prompt_job_that_makes_another_store_repairs_nothing(prompt_config: PromptJobConfig) -> None:
    first = extract_prompts(prompt_config, ToyTextEncoder())
    with pytest.raises(StoreMismatchError, match=rf"are not those {first.path.name} was made with"):
        extract_prompts(replace(prompt_config, dtype="float32"), ToyTextEncoder(), repair=first.path)


# Stores that were compressed


@pytest.mark.parametrize("by_repair", [True, False])
def test_a_compressed_store_that_lost_a_file_is_mended_and_can_be_read(
    config: ImageJobConfig, tmp_path: Path, by_repair: bool
) -> None:
    first = extract_images(config, ToyImageEncoder())
    values = open_store(first.path).read("features/fine")
    path = convert_store(first.path, tmp_path / "small", "zarr", zstd_level=3)
    (path / "features/fine/c.1.0.0.0").unlink()
    encoder = ToyImageEncoder()
    extract_images(replace(config, out=tmp_path / "small"), encoder, repair=path if by_repair else None)  # type: ignore[arg-type]
    assert sum(encoder.encoded) in (SECOND, NUM_IMAGES)
    np.testing.assert_array_equal(open_store(path).read("features/fine"), values)
    assert verify_store(path).is_sound


# Stores that lie in one file


def packed(extraction: Extraction) -> Path:
    """The store as an HDF5 file, in the place of its folder."""
    path = convert_store(extraction.path, extraction.path.parent, "hdf5")
    shutil.rmtree(extraction.path)
    assert isinstance(path, Path)
    return path


def test_a_job_finds_its_store_in_an_hdf5_file(config: ImageJobConfig) -> None:
    first = extract_images(config, ToyImageEncoder())
    features = open_store(first.path).read("features/fine")
    path = packed(first)
    again = extract_images(config, ToyImageEncoder(fails_at_batch=0))
    assert again.path == path
    assert (again.num_encoded, again.num_reused, again.num_failed) == (0, NUM_IMAGES, 0)
    assert again.summary("images") == f"nothing to extract: all 10 images are in {path.name} already"
    assert [found.name for found in config.out.iterdir()] == [path.name]
    np.testing.assert_array_equal(open_store(again.path).read("features/fine"), features)


def test_a_prompt_job_finds_its_store_in_an_hdf5_file(prompt_config: PromptJobConfig) -> None:
    path = packed(extract_prompts(prompt_config, ToyTextEncoder()))
    encoder = ToyTextEncoder()
    assert extract_prompts(prompt_config, encoder).path == path
    assert not encoder.encoded


def test_a_damaged_hdf5_file_is_not_taken_for_the_store(config: ImageJobConfig) -> None:
    path = packed(extract_images(config, ToyImageEncoder()))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    again = extract_images(config, ToyImageEncoder())
    assert again.num_encoded == NUM_IMAGES
    assert again.path.suffix == ".zarr"
    assert is_complete(again.path)


def test_the_ledger_a_summary_points_to_is_there(config: ImageJobConfig, tmp_path: Path) -> None:
    files = [noise_png(number, *size) for number, size in enumerate(sizes_of(NUM_IMAGES))]
    files[1] = b""
    config = replace(config, samples=write_task(tmp_path / "failing", files))
    packed(extract_images(config, ToyImageEncoder()))
    summary = extract_images(config, ToyImageEncoder()).summary("images")
    assert "1 failed" in summary
    assert "ledger.jsonl" not in summary, "an HDF5 file has no file beside it"
