"""A job does every unit of work once, whatever happens to the process that does it, and says what it could not do.

Run as a program, this file plays the jobs that are killed and the jobs that run side by side; see `play`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_schema.errors import DamagedStoreError, UsageError
from cache_schema.features import FeatureCache, ImageFeatures, PromptFeatures
from cache_schema.receipts import digest_shard
from cache_schema.samples import open_samples
from cache_schema.store import is_complete, open_store
from extract.image_job import ImageJobConfig, extract_images
from extract.images import decode_image
from extract.job import Extraction
from extract.prompt_job import PromptJobConfig, extract_prompts
from extract.stages import STAGES, StageRates
from tests.extract.toys import (
    NUM_IMAGES,
    SHARD_ROWS,
    BlindingEncoder,
    ToyImageEncoder,
    ToyTextEncoder,
    digest_of,
    expected_encoding,
    flip_byte,
    noise_png,
    prompts_of,
    sizes_of,
    write_task,
)

if TYPE_CHECKING:  # slow to import for the processes below
    from extract.encoders.protocols import ImageEncoder, TextEncoder


# Image features


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("batch_size", "shard_rows"), [(1, 1), (3, 4), (32, 64), (4, 3), (2, 5)])
def test_every_row_is_what_the_encoder_says_of_that_image(
    config: ImageJobConfig, dtype: str, batch_size: int, shard_rows: int
) -> None:
    config = replace(config, dtype=dtype, batch_size=batch_size, shard_rows=shard_rows)
    encoder = ToyImageEncoder()
    extraction = extract_images(config, encoder)
    features = ImageFeatures(open_store(extraction.path, "image_features"))
    assert features.layers == ("fine", "coarse")
    for row in range(NUM_IMAGES):
        encoding = expected_encoding(config.samples, encoder, row)
        for layer in features.layers:
            grid, cls = features.features(layer).read([row])[0], features.cls(layer).read([row])[0]
            assert grid.dtype == cls.dtype == dtype
            np.testing.assert_array_equal(grid, encoding.features[layer][0].numpy().astype(dtype))
            np.testing.assert_array_equal(cls, encoding.cls[layer][0].numpy().astype(dtype))
    assert features.valid.all()
    assert sum(encoder.encoded) == NUM_IMAGES
    assert max(encoder.encoded) == min(batch_size, shard_rows, NUM_IMAGES)


def test_rows_carry_what_tells_images_apart(config: ImageJobConfig) -> None:
    store = open_store(extract_images(config, ToyImageEncoder()).path)
    features, images = ImageFeatures(store), open_samples(config.samples).samples.images
    assert features.ids == list(images.ids)
    assert features.sha256 == list(images.sha256)
    np.testing.assert_array_equal(store.read("original_size"), images.sizes)
    view = [[0, 0, width, height, 0] for height, width in images.sizes.tolist()]
    assert store.read("view").tolist() == view


def test_a_real_encoders_features_are_those_of_each_image_by_itself(
    feature_cache: FeatureCache, image_encoder: ImageEncoder
) -> None:
    samples, features = feature_cache.samples, feature_cache.images
    for row in range(0, len(features.ids), 5):
        image = decode_image((samples.image_dir / samples.samples.images.paths[row]).read_bytes())
        encoding = image_encoder.encode(torch.from_numpy(image_encoder.preprocess(image))[None])
        for layer in features.layers:
            stored = features.features(layer).read([row])
            np.testing.assert_allclose(stored, encoding.features[layer].numpy(), rtol=2e-3, atol=2e-3)
            np.testing.assert_allclose(
                features.cls(layer).read([row]), encoding.cls[layer].numpy(), rtol=2e-3, atol=2e-3
            )


def test_how_the_work_is_cut_up_in_time_makes_no_difference(config: ImageJobConfig, tmp_path: Path) -> None:
    once = extract_images(config, ToyImageEncoder())
    again = extract_images(
        replace(config, out=tmp_path / "other", batch_size=32, decode_threads=7), ToyImageEncoder(name="renamed")
    )
    assert digest_of(again) == digest_of(once)
    assert again.path.name == once.path.name


@pytest.mark.parametrize(
    "change",
    [{"dtype": "float32"}, {"shard_rows": 5}, {"encoder": ToyImageEncoder(identity={"class": "another"})}],
)
def test_whatever_decides_the_bytes_makes_another_store(config: ImageJobConfig, change: dict[str, Any]) -> None:
    encoder = change.pop("encoder", ToyImageEncoder())
    other = extract_images(replace(config, **change), encoder)
    assert other.path != extract_images(config, ToyImageEncoder()).path


def test_other_images_make_another_store(config: ImageJobConfig, tmp_path: Path) -> None:
    files = [noise_png(99, *size) for size in sizes_of(NUM_IMAGES)]
    others = replace(config, samples=write_task(tmp_path / "others", files))
    assert extract_images(others, ToyImageEncoder()).path != extract_images(config, ToyImageEncoder()).path


# Going on, and reuse


def test_a_finished_job_has_nothing_left_to_do(config: ImageJobConfig) -> None:
    first = extract_images(config, ToyImageEncoder())
    idle = ToyImageEncoder(fails_at_batch=0)
    second = extract_images(config, idle)
    assert (first.num_encoded, first.num_reused) == (NUM_IMAGES, 0)
    assert (second.num_encoded, second.num_reused) == (0, NUM_IMAGES)
    assert second.path == first.path
    assert second.summary("images") == f"nothing to extract: all 10 images are in {first.path.name} already"
    assert first.summary("images").startswith("extracted 10 images in ")
    did, stages = first.summary("images").splitlines()
    assert did.endswith(f" -> {first.path.name}")
    assert re.fullmatch(r"  decode \d+/s.*, write \d+/s.*", stages)
    assert stages.count("(binds)") == 1
    assert json.loads(json.dumps(second.to_dict()))["num_reused"] == NUM_IMAGES


def test_reuse_needs_neither_the_images_nor_a_new_store(config: ImageJobConfig) -> None:
    first = extract_images(config, ToyImageEncoder())
    missing = replace(config, image_dir=config.out / "nowhere")
    assert extract_images(missing, ToyImageEncoder(fails_at_batch=0)).path == first.path


HARMS: dict[str, Callable[[Path], object]] = {
    "receipt gone": lambda store: (store / "receipts/000001.json").unlink(),
    "receipt cut short": lambda store: (store / "receipts/000001.json").write_bytes(b'{"unit": '),
    "shard gone": lambda store: (store / "features/coarse/c.1.0.0.0").unlink(),
    "shard cut short": lambda store: (store / "features/fine/c.1.0.0.0").write_bytes(b"short"),
    "byte flipped": lambda store: flip_byte(store / "cls/fine/c.1.0"),
    "flag flipped": lambda store: flip_byte(store / "valid/c.1"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_only_the_unit_that_was_harmed_is_done_again(config: ImageJobConfig, harm: str) -> None:
    first = extract_images(config, ToyImageEncoder())
    digest = digest_of(first)
    HARMS[harm](first.path)
    (first.path / "manifest.json").unlink()
    encoder = ToyImageEncoder()
    again = extract_images(config, encoder)
    assert sum(encoder.encoded) == SHARD_ROWS
    assert (again.num_encoded, again.num_reused) == (SHARD_ROWS, NUM_IMAGES - SHARD_ROWS)
    assert digest_of(again) == digest
    assert f"{NUM_IMAGES - SHARD_ROWS} were there already" in again.summary("images")


@pytest.mark.parametrize("harm", [name for name in HARMS if "flipped" not in name])
def test_a_finished_store_that_lost_a_file_is_mended(config: ImageJobConfig, harm: str) -> None:
    first = extract_images(config, ToyImageEncoder())
    digest = digest_of(first)
    HARMS[harm](first.path)
    encoder = ToyImageEncoder()
    assert digest_of(extract_images(config, encoder)) == digest
    assert sum(encoder.encoded) == SHARD_ROWS


def test_the_remedy_that_a_damaged_shard_is_named_with_works(config: ImageJobConfig) -> None:
    first = extract_images(config, ToyImageEncoder())
    digest = digest_of(first)
    HARMS["byte flipped"](first.path)
    with pytest.raises(DamagedStoreError, match=r"c\.1\.0: chunk 0 fails its checksum; `headstart cache repair`"):
        open_store(first.path).read("cls/fine")
    assert digest_of(extract_images(config, ToyImageEncoder(), repair=first.path)) == digest
    assert np.isfinite(open_store(first.path).read("cls/fine")).all()


def test_what_was_done_before_an_error_is_kept(config: ImageJobConfig) -> None:
    with pytest.raises(RuntimeError, match="on fire"):
        extract_images(config, ToyImageEncoder(fails_at_batch=3))
    (path,) = config.out.iterdir()
    assert not is_complete(path)
    encoder = ToyImageEncoder()
    again = extract_images(config, encoder)
    assert sum(encoder.encoded) == again.num_encoded == NUM_IMAGES - SHARD_ROWS
    untouched = extract_images(replace(config, out=config.out / "untouched"), ToyImageEncoder())
    assert digest_of(again) == digest_of(untouched)


def test_receipts_tell_how_fast_the_work_was(config: ImageJobConfig) -> None:
    receipts = open_store(extract_images(config, ToyImageEncoder()).path).receipts()
    assert [receipt.rows for receipt in receipts] == [(0, 4), (4, 8), (8, 10), (0, 0)]
    for receipt in receipts[:-1]:
        rates = dict(receipt.rates)
        binds, batch_size = rates.pop("binds"), rates.pop("batch_size")
        assert binds in STAGES
        assert 0 < batch_size <= config.batch_size
        assert {"job", "decode", "preprocess", "forward"} <= rates.keys() <= {"job", *STAGES}
        assert all(rate > 0 for rate in rates.values())
        rates.pop("job")
        assert binds == StageRates(rates).binds


def test_without_the_image_folder_there_is_nothing_to_extract(config: ImageJobConfig) -> None:
    complaint = r"no images at .*nowhere: the folder is missing\. Name their folder with --image-dir\."
    with pytest.raises(UsageError, match=complaint):
        extract_images(replace(config, image_dir=config.out / "nowhere"), ToyImageEncoder())
    assert not config.out.exists()


def test_images_that_were_moved_are_found_where_they_are_said_to_be(config: ImageJobConfig, tmp_path: Path) -> None:
    (tmp_path / "images").rename(tmp_path / "moved")
    extraction = extract_images(replace(config, image_dir=tmp_path / "moved"), ToyImageEncoder())
    assert extraction.num_failed == 0


# Images that cannot be encoded


def failing_task(folder: Path) -> Path:
    """Ten images, of which 1 is cut short, 2 empty, 4 of another size, and 9 a text file."""
    sizes = sizes_of(NUM_IMAGES)
    files = [noise_png(number, *size) for number, size in enumerate(sizes)]
    files[1], files[2], files[9] = files[1][: len(files[1]) // 2], b"", b"hello"
    sizes[4] = (sizes[4][1], sizes[4][0])
    return write_task(folder, files, sizes=sizes)


FAILURES = {
    1: "the image is cut short",
    2: "the file is empty",
    4: "it is 12 x 16 pixels where its annotations say 16 x 12",
    9: "not an image file",
}


def test_images_that_cannot_be_encoded_are_in_the_ledger_and_the_rest_is_done(
    config: ImageJobConfig, tmp_path: Path
) -> None:
    config = replace(config, samples=failing_task(tmp_path / "failing"))
    encoder = ToyImageEncoder()
    extraction = extract_images(config, encoder)
    store = open_store(extraction.path)
    failures = {failure.row: failure for failure in store.failures()}
    assert failures.keys() == FAILURES.keys()
    for row, reason in FAILURES.items():
        assert reason in failures[row].reason
        assert failures[row].id == f"image {row}"
    assert extraction.num_failed == store.manifest.num_failures == len(FAILURES)
    assert extraction.summary("images").splitlines()[0].endswith(f"; 4 failed, see {extraction.path}/ledger.jsonl")
    assert store.read("valid").tolist() == [row not in FAILURES for row in range(NUM_IMAGES)]
    assert sum(encoder.encoded) == NUM_IMAGES - len(FAILURES)
    for row in range(NUM_IMAGES):
        stored = store.array("features/fine").read([row])[0]
        if row in FAILURES:
            assert not stored.any()
        else:
            encoding = expected_encoding(config.samples, encoder, row)
            np.testing.assert_array_equal(stored, encoding.features["fine"][0].numpy().astype(np.float16))


@pytest.mark.parametrize("harm", ["gone", "changed"])
def test_a_file_that_is_gone_or_changed_stops_the_job_until_it_is_back(
    config: ImageJobConfig, tmp_path: Path, harm: str
) -> None:
    sizes = sizes_of(NUM_IMAGES)
    files = [noise_png(number, *size) for number, size in enumerate(sizes)]
    config = replace(config, samples=write_task(tmp_path / "task", files, sizes=sizes))
    path = tmp_path / "task" / "images" / "7.img"
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(noise_png(66, *sizes[7]))
    reason = "cannot be read" if harm == "gone" else "changed after the samples store was written"
    with pytest.raises(UsageError, match=rf"'7.img' in .* cannot be had: the file {reason}"):
        extract_images(config, ToyImageEncoder())
    path.write_bytes(files[7])
    extraction = extract_images(config, ToyImageEncoder())
    assert extraction.num_reused > 0
    assert extraction.num_failed == 0
    assert open_store(extraction.path).read("valid").all()


def test_a_job_with_failures_is_finished_all_the_same(config: ImageJobConfig, tmp_path: Path) -> None:
    config = replace(config, samples=failing_task(tmp_path / "failing"))
    first = extract_images(config, ToyImageEncoder())
    second = extract_images(config, ToyImageEncoder(fails_at_batch=0))
    assert second.num_encoded == 0
    assert second.num_failed == first.num_failed == len(FAILURES)
    assert "nothing to extract" in second.summary("images")


def test_a_shard_of_nothing_but_failures_is_a_shard(config: ImageJobConfig, tmp_path: Path) -> None:
    files = [b""] * SHARD_ROWS + [noise_png(number, 8, 8) for number in range(SHARD_ROWS)]
    samples = write_task(tmp_path / "empty files", files, sizes=[(8, 8)] * len(files))
    extraction = extract_images(replace(config, samples=samples), ToyImageEncoder())
    assert open_store(extraction.path).read("valid").tolist() == [False] * 4 + [True] * 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_features_that_are_no_numbers_are_in_the_ledger(config: ImageJobConfig, value: float) -> None:
    extraction = extract_images(config, BlindingEncoder(value=value))
    store = open_store(extraction.path)
    failures = store.failures()
    assert 0 < len(failures) < NUM_IMAGES
    assert {failure.reason for failure in failures} == {"its features are not finite in float16"}
    invalid = [failure.row for failure in failures]
    assert np.flatnonzero(~store.read("valid")).tolist() == invalid
    for name in ("features/fine", "cls/coarse"):
        values = store.read(name)
        assert np.isfinite(values).all()
        assert not values[invalid].any()


def test_features_too_large_for_half_precision_are_kept_in_full(config: ImageJobConfig) -> None:
    extraction = extract_images(replace(config, dtype="float32"), BlindingEncoder(value=1e6))
    store = open_store(extraction.path)
    assert not store.failures()
    assert store.read("cls/coarse").max() == 1e6


# Prompt features


WORDS = st.lists(st.integers(0, 20), min_size=1, max_size=12)


def assert_holds_every_prompt(extraction: Extraction, prompts: Sequence[str], dtype: str = "float16") -> None:
    features, encoder = PromptFeatures(open_store(extraction.path, "prompt_features")), ToyTextEncoder()
    assert features.prompts == list(prompts)
    tokens, pooled, offsets = features.tokens(), features.pooled(), features.offsets
    token_ids = features.store.read("token_ids")
    assert offsets[0] == 0
    assert offsets[-1] == len(tokens) == len(token_ids)
    for row, ids in enumerate(encoder.tokenize(prompts)):
        encoding = encoder.encode([ids])
        own = slice(offsets[row], offsets[row + 1])
        assert token_ids[own].tolist() == ids
        np.testing.assert_array_equal(tokens[own], encoding.tokens[0].numpy().astype(dtype))
        np.testing.assert_array_equal(pooled[row], encoding.pooled[0].numpy().astype(dtype))


PROMPTS = prompts_of([3, 0, 40, 1, 1, 7, 90, 2, 0, 5, 33, 12, 1, 64])


@pytest.fixture
def prompt_config(tmp_path: Path) -> PromptJobConfig:
    samples = write_task(tmp_path, prompts=PROMPTS)
    return PromptJobConfig(samples, tmp_path / "stores", batch_size=3, unit_prompts=4, shard_tokens=32)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    ("unit_prompts", "shard_tokens", "batch_size"),
    [(1024, 4096, 128), (3, 32, 2), (1, 32, 1), (2, 64, 5), (50, 32, 7), (4, 4096, 3), (5, 96, 128), (14, 288, 14)],
)
def test_every_prompt_has_what_the_encoder_says_of_it(
    prompt_config: PromptJobConfig, dtype: str, unit_prompts: int, shard_tokens: int, batch_size: int
) -> None:
    changes = {"unit_prompts": unit_prompts, "shard_tokens": shard_tokens, "batch_size": batch_size, "dtype": dtype}
    extraction = extract_prompts(replace(prompt_config, **changes), ToyTextEncoder())  # type: ignore[arg-type]
    assert_holds_every_prompt(extraction, PROMPTS, dtype)


@settings(deadline=None, max_examples=15)
@given(WORDS, st.integers(1, 5), st.sampled_from([32, 64, 96]), st.integers(1, 4))
def test_so_it_is_however_units_and_shards_straddle(
    num_words: list[int], unit_prompts: int, shard_tokens: int, batch_size: int
) -> None:
    with TemporaryDirectory() as folder:
        prompts = prompts_of([3 * num for num in num_words])
        samples = write_task(Path(folder), [noise_png(0, 4, 4)], prompts, [(4, 4)])
        config = PromptJobConfig(
            samples, Path(folder), batch_size=batch_size, unit_prompts=unit_prompts, shard_tokens=shard_tokens
        )
        assert_holds_every_prompt(extract_prompts(config, ToyTextEncoder()), prompts)


def test_every_shard_belongs_to_one_unit(prompt_config: PromptJobConfig) -> None:
    store = open_store(extract_prompts(prompt_config, ToyTextEncoder()).path)
    keys = [key for receipt in store.receipts() for key in receipt.files]
    assert len(keys) == len(set(keys))
    tokens = [store.layouts["tokens"].shard_key(shard) for shard in range(store.layouts["tokens"].num_shards)]
    pooled = [store.layouts["pooled"].shard_key(shard) for shard in range(store.layouts["pooled"].num_shards)]
    assert len(tokens) > 8
    assert len(pooled) == 4
    assert {*tokens, *pooled} <= set(keys)


def test_a_real_encoders_prompts_are_those_of_each_prompt_by_itself(
    feature_cache: FeatureCache, text_encoder: TextEncoder
) -> None:
    features = feature_cache.prompts
    tokens, pooled = features.tokens(), features.pooled()
    for row in range(0, len(features.prompts), 9):
        encoding = text_encoder.encode(text_encoder.tokenize([features.prompts[row]]))
        own = slice(features.offsets[row], features.offsets[row + 1])
        np.testing.assert_allclose(tokens[own], encoding.tokens[0].numpy(), rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(pooled[row], encoding.pooled[0].numpy(), rtol=2e-3, atol=2e-3)


def test_a_finished_prompt_job_has_nothing_left_to_do(prompt_config: PromptJobConfig) -> None:
    first = extract_prompts(prompt_config, ToyTextEncoder())
    encoder = ToyTextEncoder()
    second = extract_prompts(prompt_config, encoder)
    assert not encoder.encoded
    assert (first.num_encoded, second.num_encoded, second.num_reused) == (len(PROMPTS), 0, len(PROMPTS))
    assert second.summary("prompts").startswith(f"nothing to extract: all {len(PROMPTS)} prompts are in")


@pytest.mark.parametrize("unit", range(4))
@pytest.mark.parametrize("harm", ["receipt gone", "pooled flipped"])
def test_only_the_prompts_of_a_harmed_unit_are_encoded_again(
    prompt_config: PromptJobConfig, unit: int, harm: str
) -> None:
    first = extract_prompts(prompt_config, ToyTextEncoder())
    digest = digest_of(first)
    (first.path / "manifest.json").unlink()
    if harm == "receipt gone":
        (first.path / "receipts" / f"{unit:06d}.json").unlink()
    else:
        flip_byte(first.path / "pooled" / f"c.{unit}.0")
    encoder = ToyTextEncoder()
    again = extract_prompts(prompt_config, encoder)
    start, stop = 4 * unit, min(4 * unit + 4, len(PROMPTS))
    assert again.num_encoded == stop - start
    offsets = PromptFeatures(open_store(again.path)).offsets
    begun_shards = range(-(-offsets[start] // 32), -(-offsets[stop] // 32))
    needed = np.flatnonzero(offsets[:-1] < 32 * begun_shards.stop)
    assert sum(encoder.encoded) == max(stop, needed[-1] + 1) - start
    assert digest_of(again) == digest


def test_how_prompts_are_batched_makes_no_difference(prompt_config: PromptJobConfig, tmp_path: Path) -> None:
    once = extract_prompts(prompt_config, ToyTextEncoder())
    other = extract_prompts(replace(prompt_config, out=tmp_path / "other", batch_size=64), ToyTextEncoder())
    assert digest_of(other) == digest_of(once)
    assert other.path.name == once.path.name


@pytest.mark.parametrize("scale", [1e6, float("nan")])
def test_prompts_whose_features_are_no_numbers_stop_the_job_and_leave_no_store(
    prompt_config: PromptJobConfig, scale: float
) -> None:
    with pytest.raises(
        UsageError, match=r"toy text gave token features that float16 cannot hold; store them as float32"
    ):
        extract_prompts(prompt_config, ToyTextEncoder(scale=scale))
    assert not [path for path in prompt_config.out.iterdir() if is_complete(path)]


def test_large_prompt_features_are_kept_in_full_precision(prompt_config: PromptJobConfig) -> None:
    extraction = extract_prompts(replace(prompt_config, dtype="float32"), ToyTextEncoder(scale=1e6))
    assert open_store(extraction.path).read("pooled").max() > 1e6


# Processes that are killed, or run side by side


@dataclass(frozen=True)
class Stage:
    """Where the jobs below play: the samples, and the folder their stores go to."""

    samples: Path
    out: Path

    def run_jobs(self, seconds_per_batch: float = 0.0) -> None:
        images = ImageJobConfig(self.samples, self.out, batch_size=3, shard_rows=2)
        prompts = PromptJobConfig(self.samples, self.out, batch_size=4, unit_prompts=3, shard_tokens=32)
        extract_images(images, ToyImageEncoder(seconds_per_batch=seconds_per_batch))
        extract_prompts(prompts, ToyTextEncoder(seconds_per_batch=seconds_per_batch))

    def fork(self, seconds_per_batch: float = 0.0, *, dies_at_fsync: int | None = None) -> int:
        """Start a process that runs the jobs; optionally it dies on the spot when it asks for its n-th fsync."""
        pid = os.fork()
        if pid:
            return pid
        status = 1
        with contextlib.suppress(BaseException):
            if dies_at_fsync is not None:
                die_at_fsync(dies_at_fsync)
            self.run_jobs(seconds_per_batch)
            status = 0
        os._exit(status)

    def digests(self) -> list[str]:
        """Digests of the complete stores."""
        stores = (path for path in sorted(self.out.glob("*.zarr")) if is_complete(path))
        return [open_store(path).manifest.digest for path in stores]

    def leftovers(self) -> int:
        return sum(path.name.endswith(".tmp") for path in self.out.rglob("*"))


def die_at_fsync(number: int) -> None:
    calls, fsync = iter(range(number)), os.fsync

    def fsync_or_die(descriptor: int) -> None:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = fsync_or_die


def play(scene: str, samples: Path, folder: Path) -> dict[str, Any]:
    """Play one scene in processes of its own, and return what came of it beside an undisturbed run."""
    undisturbed = Stage(samples, folder / "undisturbed")
    os.waitpid(undisturbed.fork(), 0)
    stage, rng, was_killed = Stage(samples, folder / "stage"), random.Random(0), []
    if scene == "killed at random moments":
        for _ in range(6):
            pid = stage.fork(seconds_per_batch=0.06)
            time.sleep(rng.uniform(0.02, 0.2))
            os.kill(pid, signal.SIGKILL)
            was_killed.append(os.WIFSIGNALED(os.waitpid(pid, 0)[1]))
    elif scene == "killed while writing":
        for _ in range(12):
            pid = stage.fork(dies_at_fsync=rng.randrange(1, 40))
            was_killed.append(os.WIFSIGNALED(os.waitpid(pid, 0)[1]))
    else:
        pids = [stage.fork(seconds_per_batch=0.005) for _ in range(3)]
        statuses = [os.waitpid(pid, 0)[1] for pid in pids]
        assert statuses == [0, 0, 0]
    complete_before = stage.digests()
    last = os.waitpid(stage.fork(), 0)[1]
    return {
        "undisturbed": undisturbed.digests(),
        "disturbed": stage.digests(),
        "complete_before": complete_before,
        "kills": sum(was_killed),
        "leftovers": stage.leftovers(),
        "last_status": last,
    }


def played(scene: str, folder: Path) -> dict[str, Any]:
    samples = write_task(folder, prompts=PROMPTS)
    command = [sys.executable, "-m", "tests.extract.test_jobs", scene, str(samples), str(folder)]
    home = Path(__file__).parents[2]
    finished = subprocess.run(command, capture_output=True, check=False, text=True, timeout=60, cwd=home)
    assert finished.returncode == 0, finished.stderr
    outcome: dict[str, Any] = json.loads(finished.stdout)
    assert len(outcome["undisturbed"]) == 2
    assert outcome["last_status"] == 0
    return outcome


@pytest.mark.parametrize(("scene", "least_kills"), [("killed at random moments", 4), ("killed while writing", 6)])
def test_jobs_that_were_killed_end_with_the_bytes_of_an_undisturbed_run(
    tmp_path: Path, scene: str, least_kills: int
) -> None:
    outcome = played(scene, tmp_path)
    assert outcome["kills"] >= least_kills
    assert outcome["disturbed"] == outcome["undisturbed"]
    assert set(outcome["complete_before"]) <= set(outcome["undisturbed"])


def test_jobs_on_the_same_store_at_once_end_with_the_bytes_of_one(tmp_path: Path) -> None:
    outcome = played("at once", tmp_path)
    assert outcome["complete_before"] == outcome["disturbed"] == outcome["undisturbed"]
    assert outcome["leftovers"] == 0


def test_the_digest_of_a_store_is_that_of_its_files(config: ImageJobConfig) -> None:
    store = open_store(extract_images(config, ToyImageEncoder()).path)
    for receipt in store.receipts():
        for key, stored in receipt.files.items():
            assert digest_shard(store.path / key) == stored.xxh3_128


if __name__ == "__main__":
    print(json.dumps(play(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))
