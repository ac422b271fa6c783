"""Whatever becomes of a store's bytes is found by whoever verifies or reads them, and repair brings them back."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest

from cache_schema.convert import convert_store
from cache_schema.errors import DamagedStoreError, UsageError
from cache_schema.layout import ArrayLayout
from cache_schema.reader import ArrayReader, ShardFiles
from cache_schema.receipts import Receipt
from cache_schema.store import open_store, read_header
from cache_schema.verify import Verification, verify_store
from tests.cache_schema import write_job
from tests.cache_schema.jobs import files_of, without_rates

if TYPE_CHECKING:
    from extract.encoders.tiny import TinyEncoders
    from extract.job import Extraction


def shards_of(store: Path) -> dict[str, tuple[ArrayLayout, int]]:
    """The array and the number of every shard of a store, by key."""
    _, layouts = read_header(store)
    return {
        layout.shard_key(shard): (layout, shard) for layout in layouts.values() for shard in range(layout.num_shards)
    }


def read_by_itself(store: Path, layout: ArrayLayout, rows: range | None = None) -> Any:
    """Rows of an array, checked, by a reader that has seen nothing of the store before."""
    return ArrayReader(ShardFiles(store, layout)).read(None if rows is None else np.arange(rows.start, rows.stop))


def damaged_keys(verification: Verification) -> list[str]:
    return [damage.key for damage in verification.damages]


def flip_bit(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def draw_bits(seed: int, num_bits: int, num_bytes: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Bits of files, drawn from a seed as if the files lay end to end: the file's key, and the number of the bit."""
    keys, ends = list(num_bytes), np.cumsum([8 * size for size in num_bytes.values()])
    for place in np.random.default_rng(seed).integers(0, ends[-1], num_bits).tolist():
        file = int(np.searchsorted(ends, place, "right"))
        yield keys[file], place - int(ends[file] - 8 * num_bytes[keys[file]])


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A complete store of five units, each array of which has five shards, the last of them partial."""
    write_job.fill(tmp_path, 5)
    return write_job.make_writer(tmp_path, 5).path


# Bits that flip


def test_a_thousand_flipped_bits_are_found_by_verification_and_by_reading(store: Path) -> None:
    shards = shards_of(store)
    found: Counter[str] = Counter()
    for key, bit in draw_bits(0, 1000, {key: (store / key).stat().st_size for key in shards}):
        original = (store / key).read_bytes()
        flip_bit(store / key, bit)
        assert damaged_keys(verify_store(store, threads=1)) == [key]
        with pytest.raises(DamagedStoreError, match=key):
            read_by_itself(store, shards[key][0])
        (store / key).write_bytes(original)
        found[key] += 1
    assert found.keys() == shards.keys()
    assert verify_store(store).is_sound


def test_a_flipped_bit_spoils_no_rows_but_those_of_its_shard(store: Path) -> None:
    shards = shards_of(store)
    for key, bit in draw_bits(1, 50, {key: (store / key).stat().st_size for key in shards}):
        layout, shard = shards[key]
        whole, original = read_by_itself(store, layout), (store / key).read_bytes()
        flip_bit(store / key, bit)
        for other in set(range(layout.num_shards)) - {shard}:
            rows = layout.rows_of_shard(other)
            np.testing.assert_array_equal(read_by_itself(store, layout, rows), whole[rows.start : rows.stop])
        (store / key).write_bytes(original)


def test_flipped_bits_of_a_compressed_store_are_found(store: Path, tmp_path: Path) -> None:
    compressed = convert_store(store, tmp_path / "compressed", "zarr", zstd_level=3)
    for key, bit in draw_bits(2, 100, {key: (compressed / key).stat().st_size for key in shards_of(compressed)}):
        original = (compressed / key).read_bytes()
        flip_bit(compressed / key, bit)
        assert damaged_keys(verify_store(compressed, threads=1)) == [key]
        opened = open_store(compressed)
        with pytest.raises(DamagedStoreError):
            opened.read(key.rpartition("/")[0])
        opened.close()
        (compressed / key).write_bytes(original)


def test_flipped_bits_of_the_arrays_in_an_hdf5_file_are_found(store: Path, tmp_path: Path) -> None:
    path = convert_store(store, tmp_path, "hdf5")
    _, layouts = read_header(path)
    with h5py.File(path) as file:
        sizes = {name: file[name].id.get_storage_size() for name in layouts}
        offsets = {name: file[name].id.get_offset() for name in layouts}
    original = path.read_bytes()
    for name, bit in draw_bits(3, 100, sizes):
        layout = layouts[name]
        flip_bit(path, 8 * offsets[name] + bit)
        key = layout.shard_key(bit // 8 // layout.row_bytes // layout.shard_rows)
        assert damaged_keys(verify_store(path, threads=1)) == [key]
        opened = open_store(path)
        with pytest.raises(DamagedStoreError, match=path.name):
            opened.read(name)
        opened.close()
        path.write_bytes(original)
    assert verify_store(path).is_sound


def test_a_bit_that_flips_anywhere_in_an_hdf5_file_never_changes_a_value_unseen(store: Path, tmp_path: Path) -> None:
    path = convert_store(store, tmp_path, "hdf5")
    opened = open_store(path)
    values = {name: opened.read(name).tobytes() for name in opened.layouts}
    opened.close()
    original, refused = path.read_bytes(), 0
    for _, bit in draw_bits(4, 200, {path.name: len(original)}):
        flip_bit(path, bit)
        opened = None
        try:
            opened = open_store(path)
            assert {name: opened.read(name).tobytes() for name in opened.layouts} == values
        except DamagedStoreError:
            refused += 1
            with contextlib.suppress(DamagedStoreError):
                assert not verify_store(path, threads=1).is_sound
        finally:
            if opened is not None:
                opened.close()
        path.write_bytes(original)
    assert refused > 100


# Files that are cut short, swapped or gone

TRUNCATIONS: dict[str, Callable[[int, ArrayLayout], int]] = {
    "its last byte gone": lambda size, layout: size - 1,
    "half its index gone": lambda size, layout: size - layout.index_bytes // 2,
    "its index gone": lambda size, layout: size - layout.index_bytes,
    "half of it gone": lambda size, layout: size // 2,
    "nothing but its first byte": lambda size, layout: 1,
    "empty": lambda size, layout: 0,
    "a byte too many": lambda size, layout: size + 1,
}


@pytest.mark.parametrize("cut", TRUNCATIONS)
def test_a_shard_of_another_length_is_found_by_verification_by_opening_and_by_reading(store: Path, cut: str) -> None:
    for key, (layout, shard) in shards_of(store).items():
        original = (store / key).read_bytes()
        os.truncate(store / key, TRUNCATIONS[cut](len(original), layout))
        assert damaged_keys(verify_store(store)) == [key]
        with pytest.raises(DamagedStoreError, match=key):
            open_store(store)
        with pytest.raises(DamagedStoreError, match=key):
            read_by_itself(store, layout, layout.rows_of_shard(shard))
        (store / key).write_bytes(original)
    assert verify_store(store).is_sound


def test_a_shard_that_is_gone_is_found_by_verification_by_opening_and_by_reading(store: Path) -> None:
    for key, (layout, shard) in shards_of(store).items():
        original = (store / key).read_bytes()
        (store / key).unlink()
        assert damaged_keys(verify_store(store)) == [key]
        with pytest.raises(DamagedStoreError, match=key):
            open_store(store)
        with pytest.raises(DamagedStoreError, match=key):
            read_by_itself(store, layout, layout.rows_of_shard(shard))
        (store / key).write_bytes(original)
    assert verify_store(store).is_sound


@pytest.mark.parametrize("name", ["features/last", "cls/last", "valid"])
def test_shards_that_were_swapped_are_found_by_verification(store: Path, name: str) -> None:
    """Each is whole and has the right size, so that only its digest tells."""
    keys = [f"{name}/{file.name}" for file in sorted((store / name).glob("c.*"))[1:3]]
    first, second = (store / key for key in keys)
    assert first.stat().st_size == second.stat().st_size
    first.rename(store / "swapped")
    second.rename(first)
    (store / "swapped").rename(second)
    assert damaged_keys(verify_store(store)) == keys


@pytest.mark.parametrize("num_bytes", [0, 1, 0.5, -1])
def test_a_shard_that_is_cut_short_under_an_open_store_is_found_when_it_is_read(store: Path, num_bytes: float) -> None:
    opened = open_store(store)
    features = opened.read("features/last")
    path = store / "features" / "last" / "c.2.0.0.0"
    size, rows = path.stat().st_size, np.arange(16, 24)
    os.truncate(path, int(size * num_bytes) if num_bytes == 0.5 else num_bytes % size)
    if num_bytes == -1:  # the chunks are all there, and where they lie is known from before
        np.testing.assert_array_equal(opened.array("features/last").read(rows), features[rows])
        opened.array("features/last").close()
    with pytest.raises(DamagedStoreError, match=path.name):
        opened.array("features/last").read(rows)
    opened.close()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_an_hdf5_file_that_is_cut_short_is_refused(store: Path, tmp_path: Path, share: float) -> None:
    path = convert_store(store, tmp_path, "hdf5")
    os.truncate(path, int(path.stat().st_size * share))
    for look in (open_store, verify_store):
        with pytest.raises(DamagedStoreError, match=path.name):
            look(path)
    path.unlink()
    for look in (open_store, verify_store):
        with pytest.raises(UsageError, match="the file is missing"):
            look(path)


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: flip_bit(path, 70)])
def test_a_ledger_that_does_not_say_what_the_receipts_say_is_found(store: Path, harm: Callable[[Path], object]) -> None:
    harm(store / "ledger.jsonl")
    assert damaged_keys(verify_store(store)) == ["ledger.jsonl"]


@pytest.mark.parametrize(("key", "value"), [("node_type", "array"), ("zarr_format", 2), ("storage", [])])
def test_root_metadata_that_only_other_readers_look_at_is_verified_too(store: Path, key: str, value: object) -> None:
    root = json.loads((store / "zarr.json").read_bytes())
    (store / "zarr.json").write_text(json.dumps({**root, key: value}))
    assert damaged_keys(verify_store(store)) == ["zarr.json"]
    write_job.fill(store.parent, 5)
    assert json.loads((store / "zarr.json").read_bytes()) == root


# Repair


@pytest.fixture
def stores(workspace: Path, image_extraction: Extraction, prompt_extraction: Extraction, tmp_path: Path) -> Path:
    """A folder with copies of the extracted stores, beside copies of all that they were made from."""
    for name in ("scenes", "encoders", "stores"):
        shutil.copytree(workspace / name, tmp_path / name)
    return tmp_path / "stores"


def assert_restored(store: Path, before: Mapping[str, bytes]) -> None:
    """Every file is what it was, but for the rates that receipts record."""
    after = files_of(store)
    assert after.keys() == before.keys()
    for key, data in after.items():
        if key.startswith("receipts/"):
            assert without_rates(data) == without_rates(before[key])
        else:
            assert data == before[key], key


def stamps_of(store: Path, receipt: Receipt) -> dict[str, tuple[int, int]]:
    """What changes when any file of a unit is written again."""
    stats = {key: (store / key).stat() for key in (*receipt.files, f"receipts/{receipt.unit}.json")}
    return {key: (stat.st_ino, stat.st_mtime_ns) for key, stat in stats.items()}


def swap(first: Path, second: Path) -> None:
    both = first.read_bytes(), second.read_bytes()
    second.write_bytes(both[0])
    first.write_bytes(both[1])


def test_repair_gives_an_image_store_its_bytes_back_and_encodes_no_unit_that_is_sound(
    stores: Path, image_extraction: Extraction
) -> None:
    from headstart.cache_care import repair

    store = stores / image_extraction.path.name
    before, digest = files_of(store), open_store(store).manifest.digest
    sound = Receipt.read(store / "receipts" / "000001.json")
    stamps = stamps_of(store, sound)
    features = store / "features"
    flip_bit(features / "last" / "c.0.0.0.0", 12345)
    os.truncate(features / "1" / "c.0.0.0.0", 1000)
    (store / "valid" / "c.0").write_bytes(b"")
    swap(features / "1" / "c.2.0.0.0", features / "last" / "c.2.0.0.0")
    (store / "cls" / "last" / "c.2.0").unlink()
    flip_bit(store / "original_size" / "c.0.0", 77)
    (store / "cls" / "last" / "zarr.json").write_text("{}")
    damaged = ["cls/last/c.2.0", "cls/last/zarr.json", "features/1/c.0.0.0.0", "features/1/c.2.0.0.0"]
    damaged += ["features/last/c.0.0.0.0", "features/last/c.2.0.0.0", "original_size/c.0.0", "valid/c.0"]
    assert damaged_keys(verify_store(store)) == damaged

    repaired = repair(store, device="cpu")

    assert list(repaired.damaged) == damaged
    assert repaired.num_encoded == 16
    assert repaired.digest_before == repaired.digest_after == digest
    assert stamps_of(store, sound) == stamps
    assert_restored(store, before)
    assert verify_store(store).is_sound


def test_repair_gives_a_prompt_store_its_bytes_back_and_encodes_no_unit_that_is_sound(
    stores: Path, prompt_extraction: Extraction
) -> None:
    from headstart.cache_care import repair

    store = stores / prompt_extraction.path.name
    before, digest = files_of(store), open_store(store).manifest.digest
    harmed, sound = (Receipt.read(store / "receipts" / f"{unit:06d}.json") for unit in (1, 0))
    stamps = stamps_of(store, sound)
    tokens = [key for key in harmed.files if key.startswith("tokens/")]
    assert len(tokens) > 1
    flip_bit(store / tokens[0], 4321)
    (store / tokens[1]).unlink()
    (store / "pooled" / "c.1.0").write_bytes(b"")
    os.truncate(store / "token_ids" / "c.0", 10)

    repaired = repair(store, device="cpu")

    assert set(repaired.damaged) == {tokens[0], tokens[1], "pooled/c.1.0", "token_ids/c.0"}
    assert repaired.num_encoded == harmed.rows[1] - harmed.rows[0]
    assert repaired.digest_before == repaired.digest_after == digest
    assert stamps_of(store, sound) == stamps
    assert_restored(store, before)


@pytest.mark.parametrize("lost", ["receipts/000002.json", "receipts/static.json", "manifest.json"])
def test_repair_brings_back_what_says_that_a_store_is_complete(
    stores: Path, image_extraction: Extraction, lost: str
) -> None:
    from headstart.cache_care import repair

    store = stores / image_extraction.path.name
    before, digest = files_of(store), open_store(store).manifest.digest
    (store / lost).unlink()
    repaired = repair(store, device="cpu")
    assert repaired.num_encoded == (8 if lost == "receipts/000002.json" else 0)
    assert repaired.digest_after == digest
    assert_restored(store, before)


def test_repair_gives_several_views_in_int8_their_bytes_back(
    stores: Path, samples_path: Path, tiny_encoders: TinyEncoders
) -> None:
    from extract.encoders.image import load_image_encoder
    from extract.encoders.specs import ImageEncoderSpec
    from extract.image_job import ImageJobConfig, extract_images
    from headstart.cache_care import repair

    source = stores.parent / "encoders" / tiny_encoders.image.name
    encoder = load_image_encoder(ImageEncoderSpec(str(source), input_size=(64, 96)))
    config = ImageJobConfig(
        stores / samples_path.name, stores, None, "int8", shard_rows=16, views=("whole", "flip", "crop-0.6")
    )
    store = extract_images(config, encoder).path
    before = files_of(store)
    flip_bit(store / "features" / "last" / "c.1.0.0.0", 999)
    (store / "scale" / "last" / "c.4.0.0").unlink()
    repaired = repair(store, device="cpu")
    assert repaired.num_encoded == 16 + 8
    assert repaired.digest_before == repaired.digest_after
    assert_restored(store, before)
