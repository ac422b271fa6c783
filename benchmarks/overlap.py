"""How near the whole image job comes to its slowest stage by itself, in three cases: each has another slowest stage."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import Report, Row, take_turns, to_stderr
from benchmarks.images import write_images, write_task
from benchmarks.stand_in import StandIn
from cache_schema.masks import Size
from cache_schema.reader import default_threads
from cache_schema.samples import open_samples
from cache_schema.store import Commits
from extract.image_job import ImageJob, ImageJobConfig, extract_images
from extract.images import decode_image, read_bytes
from extract.job import EncodedUnit, units_of

JOB, DECODE, FORWARD, WRITE = "job", "decode and preprocess", "forward", "write"


@dataclass(frozen=True)
class Case:
    """A job whose slowest stage is known. Shards are whole: `num_images` is a multiple of `shard_rows`."""

    name: str
    encoder: StandIn
    num_images: int
    shard_rows: int
    image_size: Size = (480, 640)

    def shortened(self, share: float) -> Case:
        """The same case with fewer images."""
        num_shards = max(1, round(share * self.num_images / self.shard_rows))
        return replace(self, num_images=num_shards * self.shard_rows)


CASES = (
    Case("decode-bound", StandIn(0.002, (8, 8, 96)), num_images=3072, shard_rows=64),
    Case("forward-bound", StandIn(0.25, (16, 16, 384)), num_images=768, shard_rows=64),
    Case(
        "write-bound",
        StandIn(0.002, (64, 64, 768), num_layers=4, input_size=(64, 64), batch_size=4),
        num_images=192,
        shard_rows=4,
        image_size=(64, 64),
    ),
)
"""A row of the last one has 25 MB. Its images are small, since decoding them would take the processor from writing."""

_NUM_FILES = 64


def measure_overlap(cases: Sequence[Case], rounds: int, folder: Path, report: Report) -> None:
    """Add, for each case, the rates of the job and of its stages alone, and the job's over the slowest stage's."""
    for case in cases:
        with _empty(folder) as own:
            files = write_images(own, min(case.num_images, _NUM_FILES), case.image_size)
            _measure_case(case, write_task(files, case.num_images, case.image_size, own), rounds, own, report)


def _measure_case(case: Case, samples: Path, rounds: int, folder: Path, report: Report) -> None:
    config = ImageJobConfig(samples, folder, batch_size=case.encoder.batch_size, shard_rows=case.shard_rows)
    with _empty(folder) as out:
        job = ImageJob(replace(config, out=out), case.encoder)
        (template,) = job.encode(units_of(job)[:1])
    bound: list[str] = []

    def run_job(out: Path) -> float:
        started = time.perf_counter()
        extraction = extract_images(replace(config, out=out), case.encoder)
        seconds = time.perf_counter() - started
        bound.append(extraction.stages.binds or "nothing")
        return seconds

    stages: dict[str, Callable[[Path], float]] = {
        DECODE: lambda out: _decode_all(samples, case.encoder),
        FORWARD: lambda out: _encode_all(case),
        WRITE: lambda out: _write_all(ImageJob(replace(config, out=out), case.encoder), template),
    }
    rates = take_turns(
        {name: partial(_rate, case.num_images, turn, folder) for name, turn in {JOB: run_job, **stages}.items()},
        rounds,
        lambda line: to_stderr(f"overlap, {case.name}, {line}"),
    )
    note = f"encoder: {case.encoder.name}; it says that {' or '.join(dict.fromkeys(bound))} binds"
    report.rows.append(Row.of(f"{case.name}: {JOB}", rates[JOB], "images/s", note))
    report.rows.extend(Row.of(f"{case.name}: {name} alone", rates[name], "images/s") for name in stages)
    slowest = [min(values) for values in zip(*(rates[name] for name in stages), strict=True)]
    report.compare({**rates, "slowest": slowest}, JOB, "slowest", f"{case.name}: job / slowest stage alone")


def _rate(num_images: int, turn: Callable[[Path], float], folder: Path) -> float:
    """Images per second of a turn, which says how long it took."""
    with _empty(folder) as out:
        os.sync()  # what others wrote before is no work of this turn
        return num_images / turn(out)


def _decode_all(samples: Path, encoder: StandIn) -> float:
    """By the functions and in as many threads as in the job, with nothing else at work."""
    store = open_samples(samples)
    assert store.image_dir is not None
    paths = [store.image_dir / path for path in store.samples.images.paths]

    def load(path: Path) -> None:
        encoder.preprocess(decode_image(read_bytes(path)[0]))

    started = time.perf_counter()
    with ThreadPoolExecutor(default_threads()) as pool:
        for _ in pool.map(load, paths):
            pass
    return time.perf_counter() - started


def _encode_all(case: Case) -> float:
    pixels = torch.zeros((case.encoder.batch_size, *case.encoder.input_size, 3), dtype=torch.uint8)
    started = time.perf_counter()
    for start in range(0, case.num_images, case.encoder.batch_size):
        case.encoder.encode(pixels[: case.num_images - start])
    return time.perf_counter() - started


def _write_all(job: ImageJob, template: EncodedUnit) -> float:
    """Units that all hold what the template holds, which is in memory already, to the disk."""
    job.writer.begin()
    started = time.perf_counter()
    with Commits(job.writer.commit) as commits:
        for unit in units_of(job):
            shards = {(name, unit.number): values for (name, _), values in template.shards.items()}
            commits.commit(unit.name, (unit.rows.start, unit.rows.stop), shards)
    return time.perf_counter() - started


@contextmanager
def _empty(folder: Path) -> Iterator[Path]:
    """An empty folder, removed again."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        yield Path(out)
