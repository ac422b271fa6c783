"""A plan says what an extraction will take: exact bytes, and a time that was tried out. It leaves no trace."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cache_schema.errors import UsageError
from cache_schema.store import open_store
from extract.image_job import ImageJob, ImageJobConfig
from extract.job import Job, run_job, store_bytes, units_of
from extract.plan import Plan, ProbeConfig, StorePlan, make_plan
from extract.prompt_job import PromptJob, PromptJobConfig
from extract.stages import StageRates
from tests.extract.toys import ToyImageEncoder, ToyTextEncoder, prompts_of, write_task

PROBE = ProbeConfig(seconds=1)


@dataclass(frozen=True)
class Ready:
    """A task with its encoder at hand."""

    job: Job

    def open(self, device: str = "auto") -> Job:
        return self.job


def image_job(config: ImageJobConfig, **settings: object) -> ImageJob:
    return ImageJob(config, ToyImageEncoder(**settings))  # type: ignore[arg-type]


def plan_of(*jobs: Job) -> Plan:
    return make_plan([Ready(job) for job in jobs], probe=PROBE)


def bytes_on_disk(store: Path) -> int:
    return sum(path.stat().st_size for path in store.rglob("*") if path.is_file())


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_the_bytes_of_a_store_are_foreseen(config: ImageJobConfig, tmp_path: Path, dtype: str) -> None:
    samples = write_task(tmp_path / "many", sizes=[(9, 11)] * 300)
    job = image_job(replace(config, samples=samples, dtype=dtype, shard_rows=64))
    (planned,) = plan_of(job).stores
    extraction = run_job(image_job(replace(config, samples=samples, dtype=dtype, shard_rows=64)))
    assert extraction.path.name == planned.store
    assert store_bytes(job.writer) == open_store(extraction.path).manifest.num_bytes
    assert planned.num_bytes == pytest.approx(bytes_on_disk(extraction.path), rel=0.15)
    assert planned.num_missing_bytes == planned.num_bytes


def test_the_bytes_of_prompts_are_foreseen(tmp_path: Path) -> None:
    samples = write_task(tmp_path, prompts=prompts_of([3, 7, 1, 12] * 200))
    config = PromptJobConfig(samples, tmp_path / "stores", unit_prompts=128, shard_tokens=512)
    (planned,) = plan_of(PromptJob(config, ToyTextEncoder())).stores
    extraction = run_job(PromptJob(config, ToyTextEncoder()))
    assert planned.num_bytes == pytest.approx(bytes_on_disk(extraction.path), rel=0.15)
    assert planned.noun == "prompt"


def test_the_time_is_that_of_the_stage_that_binds(config: ImageJobConfig, tmp_path: Path) -> None:
    samples = write_task(tmp_path / "many", sizes=[(9, 11)] * 400)
    config = replace(config, samples=samples, batch_size=4)
    (planned,) = plan_of(image_job(config, seconds_per_batch=0.04)).stores
    assert planned.stages.binds == "forward"
    assert planned.items_per_s is not None
    assert planned.items_per_s < 1.1 * 4 / 0.04  # no faster than the encoder lets it, however slow the machine is
    assert planned.seconds == pytest.approx(400 / planned.items_per_s, abs=0.1)  # and what opening it took


def test_a_plan_leaves_nothing_behind(config: ImageJobConfig) -> None:
    plan_of(image_job(config))
    assert not config.out.exists()
    run_job(image_job(config))
    before = sorted(config.out.rglob("*"))
    plan_of(image_job(replace(config, dtype="float32")))
    assert sorted(config.out.rglob("*")) == before


def test_a_trial_that_fails_leaves_nothing_behind(config: ImageJobConfig) -> None:
    with pytest.raises(RuntimeError, match="on fire"):
        plan_of(image_job(config, fails_at_batch=1))
    assert not config.out.exists()


def test_what_is_there_already_is_not_planned_again(config: ImageJobConfig) -> None:
    run_job(image_job(config))
    (planned,) = plan_of(image_job(config, fails_at_batch=0)).stores
    assert (planned.num_pending, planned.num_missing_bytes, planned.seconds) == (0, 0, 0.0)
    assert planned.items_per_s is None


def test_of_a_job_that_was_killed_only_the_rest_is_planned(config: ImageJobConfig) -> None:
    with pytest.raises(RuntimeError, match="on fire"):
        run_job(image_job(config, fails_at_batch=3))
    job = image_job(config)
    num_done = sum(len(unit.rows) for unit in units_of(job) if job.writer.has_receipt(unit.name))
    (planned,) = plan_of(job).stores
    assert 0 < num_done < planned.num_items
    assert planned.num_pending == planned.num_items - num_done
    assert planned.num_missing_bytes == pytest.approx(
        planned.num_bytes * planned.num_pending / planned.num_items, abs=1
    )


def test_images_that_are_missing_are_said_before_anything_starts(config: ImageJobConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the folder is missing"):
        plan_of(image_job(replace(config, image_dir=tmp_path / "nowhere")))


STORE = StorePlan(
    "image_features-0123456789ab.zarr", "image", 10, 10, 2000, 2000, 5.0, 2.0, StageRates({"forward": 5.0})
)


@pytest.mark.parametrize(("free_bytes", "fits"), [(1999, False), (2000, True), (None, True)])
def test_a_disk_that_is_too_small_is_called_so(free_bytes: int | None, fits: bool) -> None:
    plan = Plan((STORE,), free_bytes)
    assert plan.fits is fits
    assert ("TOO SMALL" in plan.table()) is not fits
    assert json.loads(json.dumps(plan.to_dict()))["fits"] is fits


def test_the_table_names_stores_sizes_times_and_what_binds() -> None:
    store, rates, whole = Plan((STORE,), 5_000_000).table().splitlines()[1:]
    assert store.split() == ["image_features-0123456789ab.zarr", "10", "images", "2", "kB", "2", "s", "forward"]
    assert rates.strip() == "5 images/s; by itself: forward 5/s (binds)"
    assert whole == "in all 2 kB and 2 s; 5 MB are free there"
