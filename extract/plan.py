"""What an extraction will take: bytes worked out from the arrays, time from a short run of the job itself."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cache_schema import atomic
from cache_schema.atomic import StorePath
from cache_schema.errors import NoRoomError, UsageError
from cache_schema.store import Commits, node_metadata
from extract.job import Job, commit_unit, find_finished, free_bytes, size_text, store_bytes, units_of
from extract.stages import StageRates
from extract.tasks import Task

_UNITS_OF_PROBE = 8
"""The job is tried in units of about this part of the time there is, so that several of them are timed."""

_RECEIPT_BYTES, _FILE_BYTES = 700, 130
"""What a unit's receipt takes by itself, and more of it for each of its files."""


@dataclass(frozen=True)
class StorePlan:
    """What one store will take.

    Args:
        num_pending: items that are not in it yet.
        num_bytes: of the finished store.
        num_missing_bytes: of those, what is still to be written.
        items_per_s: what the whole job did in the trial; None where nothing is left to do, or there is no room to try.
        seconds: how long the rest of it will take; None where there is no room to try.
        stages: what each stage would do by itself.
    """

    store: str
    noun: str
    num_items: int
    num_pending: int
    num_bytes: int
    num_missing_bytes: int
    items_per_s: float | None
    seconds: float | None
    stages: StageRates = field(default_factory=lambda: StageRates({}))

    def to_dict(self) -> dict[str, Any]:
        return {
            "store": self.store,
            "noun": self.noun,
            "num_items": self.num_items,
            "num_pending": self.num_pending,
            "num_bytes": self.num_bytes,
            "num_missing_bytes": self.num_missing_bytes,
            "items_per_s": self.items_per_s,
            "seconds": self.seconds,
            "rates": self.stages.to_dict(),
            "binds": self.stages.binds,
        }


@dataclass(frozen=True)
class Plan:
    """What all stores of an extraction will take, and the room there is; None where a remote place does not say."""

    stores: tuple[StorePlan, ...]
    free_bytes: int | None

    @property
    def num_missing_bytes(self) -> int:
        return sum(store.num_missing_bytes for store in self.stores)

    @property
    def seconds(self) -> float | None:
        """How long all of it will take; None if that is not known of a store."""
        seconds = [store.seconds for store in self.stores if store.seconds is not None]
        return sum(seconds) if len(seconds) == len(self.stores) else None

    @property
    def fits(self) -> bool:
        """Whether the disk has room for what is still to be written."""
        return self.free_bytes is None or self.num_missing_bytes <= self.free_bytes

    def to_dict(self) -> dict[str, Any]:
        return {
            "stores": [store.to_dict() for store in self.stores],
            "num_missing_bytes": self.num_missing_bytes,
            "seconds": self.seconds,
            "free_bytes": self.free_bytes,
            "fits": self.fits,
        }

    def table(self) -> str:
        """For people."""
        lines = [f"{'store':36} {'to do':>16} {'size':>10} {'time':>10}  binds"]
        for store in self.stores:
            todo = f"{store.num_pending} {store.noun}s"
            binds = store.stages.binds or "-"
            size, duration = size_text(store.num_missing_bytes), _duration(store.seconds)
            lines.append(f"{store.store:36} {todo:>16} {size:>10} {duration:>10}  {binds}")
            if store.items_per_s is not None:
                lines.append(f"  {store.items_per_s:.3g} {store.noun}s/s; by itself: {store.stages}")
        room = "" if self.free_bytes is None else f"; {size_text(self.free_bytes)} are free there"
        lines.append(f"in all {size_text(self.num_missing_bytes)} and {_duration(self.seconds)}{room}")
        if not self.fits:
            lines.append("THE DISK IS TOO SMALL: make room, take --dtype int8 or fewer layers, or write elsewhere")
        return "\n".join(lines)


@dataclass(frozen=True)
class ProbeConfig:
    """How long each job is tried, at most but for one unit, and where units are drawn from."""

    seconds: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seconds < 1:
            raise UsageError(f"seconds is {self.seconds:g}: a trial takes at least 1.")


def make_plan(tasks: Sequence[Task], *, device: str = "auto", probe: ProbeConfig | None = None) -> Plan:
    """Try each job on items drawn at random, in a folder that is removed again, and say what the rest will take.

    Bytes are exact but for receipts. Time is that of the same pipeline, encoder and disk; what the machine does beside
    it counts, now and then. Loading the encoder is counted as it was now.

    Raises:
        UsageError: an encoder, the samples or the images cannot be had.
    """
    probe = probe or ProbeConfig()
    jobs = []
    for task in tasks:  # all of them before any work: one may be missing
        started = time.perf_counter()
        jobs.append((task.open(device), time.perf_counter() - started))
    stores = [_plan_store(job, opening_s, probe) for job, opening_s in jobs]
    return Plan(tuple(stores), free_bytes(jobs[0][0].writer.path))


def _plan_store(job: Job, opening_s: float, probe: ProbeConfig) -> StorePlan:
    units = units_of(job)
    finished = find_finished(job)
    pending = [] if finished is not None else [unit for unit in units if not job.writer.has_receipt(unit.name)]
    num_pending = sum(len(unit.rows) for unit in pending)
    num_bytes = store_bytes(job.writer) + _bytes_beside_arrays(job, len(units))
    share = num_pending / max(1, job.num_items)
    described = (job.writer.path.name, job.noun, job.num_items, num_pending, num_bytes, round(share * num_bytes))
    if not pending:
        return StorePlan(*described, items_per_s=None, seconds=0.0)
    try:
        with _trial_folder(job.writer.path.parent) as folder:
            rate, stages = _try_out(job, folder, probe)
    except NoRoomError:  # the plan's own answer is clearer than this
        return StorePlan(*described, items_per_s=None, seconds=None)
    return StorePlan(*described, items_per_s=rate, seconds=opening_s + num_pending / rate, stages=stages)


def _bytes_beside_arrays(job: Job, num_units: int) -> int:
    """Metadata to the byte, and about what receipts take."""
    writer = job.writer
    metadata = [writer.header.to_root(writer.layouts), *node_metadata(writer.layouts).values()]
    num_files = sum(layout.num_shards for layout in writer.layouts.values())
    receipts = _RECEIPT_BYTES * (num_units + 1) + _FILE_BYTES * num_files
    return sum(len(atomic.json_bytes(value)) for value in metadata) + receipts


def _try_out(job: Job, folder: StorePath, probe: ProbeConfig) -> tuple[float, StageRates]:
    """Items a second and stage rates of a job, once it is warm.

    Units grow until one takes a fair part of the time there is, or is as large as the job's own.
    """
    rows, most_rows = 1, min(job.items_per_unit, job.num_items)
    _run(job.probe(folder, 1, 1, probe.seed), probe.seconds)  # the first batch wakes the device
    while True:
        warming = job.probe(folder, 2 * rows, rows, probe.seed)
        _, unit_s = _run(warming, probe.seconds)
        if rows == most_rows or unit_s * _UNITS_OF_PROBE > probe.seconds:
            break
        grows = max(2.0, probe.seconds / _UNITS_OF_PROBE / max(unit_s, 1e-3))
        rows = min(int(rows * grows), most_rows)
    num_items = rows * (2 + 2 * int(probe.seconds / max(unit_s, 1e-3)))  # twice what there will be time for
    trial = job.probe(folder, num_items, rows, probe.seed + 1)
    rate, _ = _run(trial, probe.seconds)
    return rate, trial.clock.rates()


def _run(job: Job, seconds: float) -> tuple[float, float]:
    """Encode and publish units for so long: items a second after the first unit, and seconds a unit takes."""
    units = units_of(job)
    job.writer.begin()
    began = started = time.perf_counter()
    num_items = num_units = num_before = 0
    bar = tqdm(desc=f"trying out: {job.label}", unit=job.noun, leave=False)
    with bar, closing(job.encode(units)) as stream, Commits(partial(commit_unit, job)) as commits:
        for encoded in stream:
            commits.commit(encoded, {})
            bar.update(len(encoded.unit.rows))
            num_items += len(encoded.unit.rows)
            num_units += 1
            if num_units == 1:
                started, num_before = time.perf_counter(), num_items
            elif time.perf_counter() - started > seconds:
                break  # what filled the pipeline is not the rate at which it flows
        else:
            started, num_before = began, 0  # the job came to its end, and filling it is part of that
        commits.wait()
        took_s = time.perf_counter() - started
    return (num_items - num_before) / took_s, took_s / (num_units - bool(num_before))


@contextmanager
def _trial_folder(out: StorePath) -> Iterator[StorePath]:
    """A folder beside the stores, on their disk, that is removed again."""
    made = isinstance(out, Path) and not out.exists()
    folder = out / f".plan.{uuid.uuid4().hex}{atomic.TEMPORARY_SUFFIX}"
    try:
        yield folder
    finally:
        atomic.remove(folder)
        if made:
            with suppress(OSError):  # another job writes there by now
                out.rmdir()


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
