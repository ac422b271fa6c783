"""What goes wrong or comes late on the way from the encoder to the disk is never lost and never taken for features."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cache_schema.errors import NoRoomError
from cache_schema.store import open_store
from extract import pipeline
from extract.encoders.protocols import TextEncoding
from extract.image_job import ImageJob, ImageJobConfig, extract_images
from extract.job import EncodedUnit, free_bytes, pending_units, run_job, store_bytes, unit_rates, units_of
from extract.plan import ProbeConfig, make_plan
from extract.prompt_job import PromptJob, PromptJobConfig, extract_prompts
from extract.stages import StageClock
from tests.extract.test_plan import Ready
from tests.extract.toys import ToyImageEncoder, ToyTextEncoder, digest_of, prompts_of, write_task


def test_a_unit_waits_for_features_that_are_still_being_copied(
    config: ImageJobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = extract_images(config, ToyImageEncoder())
    lay = pipeline._lay

    def lay_slowly(*args: Any) -> None:
        time.sleep(0.01)
        lay(*args)

    monkeypatch.setattr(pipeline, "_lay", lay_slowly)
    slow = extract_images(replace(config, out=config.out / "other"), ToyImageEncoder())
    assert digest_of(slow) == digest_of(undisturbed)


def test_features_that_cannot_be_copied_end_the_job_and_what_was_whole_before_is_kept(
    config: ImageJobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay, num_laid = pipeline._lay, 0

    def lay_some(*args: Any) -> None:
        nonlocal num_laid
        num_laid += 1
        if num_laid > 11:  # a batch has five arrays, a unit two batches
            raise RuntimeError("the copy was lost")
        lay(*args)

    monkeypatch.setattr(pipeline, "_lay", lay_some)
    job = ImageJob(config, ToyImageEncoder())
    with pytest.raises(RuntimeError, match="the copy was lost"):
        run_job(job)
    assert [unit.number for unit in pending_units(job, units_of(job))] == [1, 2]


@dataclass
class ShortSighted(ToyTextEncoder):
    """Remembers how many prompts it was asked to tokenize at once."""

    asked: list[int] = field(default_factory=list)

    def tokenize(self, prompts: Any) -> list[list[int]]:
        self.asked.append(len(prompts))
        return super().tokenize(prompts)


def test_prompts_are_tokenized_in_blocks_and_the_blocks_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = write_task(tmp_path, prompts=prompts_of([3, 7, 1, 12, 2] * 5))
    config = PromptJobConfig(samples, tmp_path / "stores", unit_prompts=8, shard_tokens=32)
    at_once = extract_prompts(config, ToyTextEncoder())
    monkeypatch.setattr("extract.prompt_job._TOKENIZED_AT_ONCE", 7)
    encoder = ShortSighted()
    in_blocks = extract_prompts(replace(config, out=tmp_path / "other"), encoder)
    assert encoder.asked == [7, 7, 7, 4]
    assert digest_of(in_blocks) == digest_of(at_once)


def test_a_job_that_goes_on_needs_room_for_the_rest_only(
    config: ImageJobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="on fire"):
        extract_images(config, ToyImageEncoder(fails_at_batch=3))
    job = ImageJob(config, ToyImageEncoder())
    left = len(pending_units(job, units_of(job))) / len(units_of(job))
    assert 0 < left < 1
    monkeypatch.setattr("extract.job.free_bytes", lambda path: round(store_bytes(job.writer) * (1 + left) / 2))
    assert run_job(job).num_encoded > 0


def test_a_receipt_has_the_rate_of_its_own_unit(config: ImageJobConfig) -> None:
    job = ImageJob(config, ToyImageEncoder())
    encoded = EncodedUnit(units_of(job)[0], {}, (), 3)
    assert unit_rates(job, encoded, 0.5)["job"] == len(units_of(job)[0].rows) / 0.5
    assert unit_rates(job, encoded, 2.0)["job"] == len(units_of(job)[0].rows) / 2.0


def test_every_thread_of_a_job_counts_for_its_stage(config: ImageJobConfig) -> None:
    rates = {}
    for threads in (1, 4):
        job = ImageJob(replace(config, decode_threads=threads), ToyImageEncoder())
        job.clock.add("decode", 2.0, 10)
        rates[threads] = job.clock.rates().rates["decode"]
    assert rates == {1: 5.0, 4: 20.0}


def test_work_that_fails_took_its_time_too() -> None:
    clock = StageClock()

    def fail() -> None:
        with clock.at_work("decode", 2):
            time.sleep(0.01)
            raise ValueError("no image")

    with pytest.raises(ValueError, match="no image"):
        fail()
    assert 0 < clock.rates().rates["decode"] <= 2 / 0.01


def test_where_there_is_no_room_to_try_the_plan_says_what_is_needed(
    config: ImageJobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise NoRoomError("there is no room")

    job = ImageJob(config, ToyImageEncoder())
    monkeypatch.setattr("extract.plan.commit_unit", refuse)
    monkeypatch.setattr("extract.plan.free_bytes", lambda path: 1000)
    plan = make_plan([Ready(job)], probe=ProbeConfig(seconds=1))
    assert (plan.seconds, plan.fits) == (None, False)
    assert plan.num_missing_bytes > store_bytes(job.writer)
    assert "unknown" in plan.table()
    assert "TOO SMALL" in plan.table()
    assert not config.out.exists()


class LossyEncoder(ToyTextEncoder):
    """Runs out of memory at the first batch."""

    def encode(self, token_ids: Any) -> TextEncoding:
        if not self.encoded:
            self.encoded.append(0)
            raise torch.OutOfMemoryError("out of memory")
        return super().encode(token_ids)


def test_prompts_whose_batch_ran_out_of_memory_are_counted_once(tmp_path: Path) -> None:
    samples = write_task(tmp_path, prompts=prompts_of([3] * 6))
    config = PromptJobConfig(samples, tmp_path / "stores", batch_size=4)
    job = PromptJob(config, LossyEncoder())
    extraction = run_job(job)
    assert extraction.num_encoded == len(open_store(extraction.path).read("prompt/text/offsets")) - 1
    assert free_bytes(config.out) is not None
