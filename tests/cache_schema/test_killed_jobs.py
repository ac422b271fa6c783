"""Jobs that are killed, or work on one store at once, end with the bytes of one that was left alone."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cache_schema.store import is_complete
from tests.cache_schema import write_job
from tests.cache_schema.jobs import Job, assert_equal_to, assert_nothing_half, files_of, leftovers_of, run_job


def test_a_job_that_is_killed_at_fifty_random_moments_ends_with_the_bytes_of_an_undisturbed_one(tmp_path: Path) -> None:
    num_units, rng = 90, random.Random(0)
    undisturbed = Job(tmp_path / "undisturbed", num_units)
    started = time.perf_counter()
    undisturbed.begin()
    assert undisturbed.end()[0] == 0
    seconds_per_unit = (time.perf_counter() - started) / num_units
    expected = files_of(tmp_path / "undisturbed")
    folders, num_kills, stages = [tmp_path / "0"], 0, set()
    while num_kills < 50:
        job = Job(folders[-1], num_units)
        job.begin()
        job.wait_for_units(rng.randrange(3))
        time.sleep(rng.uniform(0, 2 * seconds_per_unit))
        if job.kill():
            num_kills += 1
            stages.add(assert_nothing_half(folders[-1], expected))
        else:  # it was quicker and is done: go on with another one
            assert_equal_to(folders[-1], tmp_path / "undisturbed")
            folders.append(tmp_path / str(len(folders)))
    assert len(stages) >= 10
    assert leftovers_of(tmp_path)  # some were killed in the middle of a file
    assert run_job(folders[-1], num_units)[0] == 0
    assert_equal_to(folders[-1], tmp_path / "undisturbed")


@pytest.fixture(scope="module")
def killed_everywhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What jobs of two units left that were killed each at another moment: a folder for every moment, in order."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, write_job.__file__, str(folder), "2", "every_moment"]
    ended = subprocess.run(command, capture_output=True, check=False, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    num_killed = int(ended.stdout)
    assert num_killed > 50
    (folder / str(num_killed + 1)).rename(folder / "undisturbed")
    return folder


def moments_of(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))


def test_at_no_moment_does_a_killed_job_leave_half_a_file(killed_everywhere: Path) -> None:
    expected = files_of(killed_everywhere / "undisturbed")
    numbers = [len(files_of(folder)) for folder in moments_of(killed_everywhere)]
    receipts = [assert_nothing_half(folder, expected) for folder in moments_of(killed_everywhere)]
    assert numbers == sorted(numbers)
    assert receipts == sorted(receipts)
    assert set(numbers) >= set(range(len(expected)))  # it was killed between any two files
    assert any(leftovers_of(folder) for folder in moments_of(killed_everywhere))


def test_a_store_is_complete_from_the_moment_its_manifest_is_there_and_not_before(killed_everywhere: Path) -> None:
    for folder in moments_of(killed_everywhere):
        stores = list(folder.glob("*.zarr"))
        assert [is_complete(store) for store in stores] == [(store / "manifest.json").exists() for store in stores]


def test_from_every_moment_a_job_goes_on_to_the_bytes_of_an_undisturbed_one(
    killed_everywhere: Path, tmp_path: Path
) -> None:
    for folder in moments_of(killed_everywhere):
        resumed, done = tmp_path / folder.name, list[str]()
        shutil.copytree(folder, resumed)
        num_receipts = len(list(resumed.glob("*/receipts/0*.json")))
        write_job.fill(resumed, 2, done.append)
        assert len(done) == 2 - num_receipts
        assert_equal_to(resumed, killed_everywhere / "undisturbed")


@pytest.mark.parametrize("num_jobs", [2, 4])
def test_jobs_at_once_on_one_store_all_end_well_with_the_bytes_of_one(tmp_path: Path, num_jobs: int) -> None:
    num_units = 40
    write_job.fill(tmp_path / "undisturbed", num_units)
    jobs = [Job(tmp_path / "store", num_units) for _ in range(num_jobs)]
    for job in jobs:
        job.begin()
    ended = [job.end() for job in jobs]
    assert [(code, error) for code, _, error in ended] == [(0, "")] * num_jobs
    assert sum(len(units) for _, units, _ in ended) > num_units  # they did get in each other's way
    assert_equal_to(tmp_path / "store", tmp_path / "undisturbed")
    assert not leftovers_of(tmp_path / "store")


def test_a_job_beside_one_that_is_killed_is_not_disturbed(tmp_path: Path) -> None:
    num_units = 40
    write_job.fill(tmp_path / "undisturbed", num_units)
    killed, other = (Job(tmp_path / "store", num_units) for _ in range(2))
    killed.begin()
    killed.wait_for_units(5)
    other.begin()
    other.wait_for_units(5)
    killed.kill()
    assert other.end()[0] == 0
    assert_equal_to(tmp_path / "store", tmp_path / "undisturbed")
