"""What both extraction jobs share: units of work that are done once, whatever happens to the process that does them."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from tqdm import tqdm

from cache_schema.atomic import StorePath
from cache_schema.errors import NoRoomError, StoreMismatchError, UsageError
from cache_schema.receipts import Failure, Receipt
from cache_schema.shards import ShardBuffer
from cache_schema.store import (
    ZARR_SUFFIX,
    Commits,
    StoreWriter,
    find_complete,
    read_header,
    relative_paths,
)
from extract.encoders.protocols import ImageEncoder, TextEncoder
from extract.stages import StageClock, StageRates

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "pillow")


@dataclass(frozen=True)
class Unit:
    """One unit of work: its number and the items (rows or prompts) it stands for."""

    number: int
    rows: range

    @property
    def name(self) -> str:
        return f"{self.number:06d}"


@dataclass(frozen=True)
class EncodedUnit:
    """What came of a unit: the rows of every shard it owns, by (array name, shard number), and what failed."""

    unit: Unit
    shards: Mapping[tuple[str, int], NDArray[Any] | ShardBuffer]
    failures: Sequence[Failure] = ()
    batch_size: int = 0


class Job(Protocol):
    """A feature store in the making: its writer, its units of work, and how they are encoded.

    `label` and `noun` are what the progress line calls the job and its items.
    """

    writer: StoreWriter
    num_items: int
    items_per_unit: int
    label: str
    noun: str
    clock: StageClock

    def encode(self, units: Sequence[Unit]) -> Generator[EncodedUnit, None, None]:
        """Each unit encoded, in order. What is wrong from the beginning is raised at the call, not at the first unit.

        It may be called in several threads at once.
        """
        ...

    def probe(self, out: StorePath, num_items: int, unit_items: int, seed: int) -> Job:
        """The same job on so many items drawn at random, or all there are, in small units and written elsewhere."""
        ...


@dataclass(frozen=True)
class Extraction:
    """A complete feature store: where it is, how much of it this job had to do itself, and how fast each stage was."""

    path: StorePath
    num_encoded: int
    num_reused: int
    num_failed: int
    seconds: float
    stages: StageRates = field(default_factory=lambda: StageRates({}))

    def to_dict(self) -> dict[str, Any]:
        stages = {"rates": self.stages.to_dict(), "binds": self.stages.binds}
        return {**asdict(self), "path": str(self.path), "stages": stages}

    def summary(self, noun: str) -> str:
        """For people: what was done, what was there already, what failed, and what held it up."""
        failed = ""
        if self.num_failed:
            lists = f"{self.path}/ledger.jsonl" if self.path.suffix == ZARR_SUFFIX else "`headstart cache info`"
            failed = f"; {self.num_failed} failed, see {lists}"
        if not self.num_encoded:
            return f"nothing to extract: all {self.num_reused} {noun} are in {self.path.name} already{failed}"
        rate = f"{self.num_encoded / self.seconds:.0f}/s"
        reused = f", {self.num_reused} were there already" if self.num_reused else ""
        stages = f"\n  {self.stages}" if self.stages.rates else ""
        return (
            f"extracted {self.num_encoded} {noun} in {self.seconds:.1f} s ({rate}){reused} -> {self.path.name}{failed}"
            f"{stages}"
        )


def units_of(job: Job) -> list[Unit]:
    """Every unit of work of a job."""
    starts = range(0, job.num_items, job.items_per_unit)
    return [
        Unit(number, range(start, min(start + job.items_per_unit, job.num_items)))
        for number, start in enumerate(starts)
    ]


def find_finished(job: Job) -> Extraction | None:
    """The job's store, if it is complete already."""
    there = find_complete(job.writer.path.parent, job.writer.header)
    if there is None:
        return None
    there.close()
    return Extraction(there.path, 0, job.num_items, there.manifest.num_failures, 0.0)


def pending_units(job: Job, units: Sequence[Unit]) -> list[Unit]:
    """The units that have no honoured receipt."""
    return [unit for unit in units if not job.writer.is_done(unit.name)]


def run_job(job: Job, *, repair: Path | None = None, overcommit: bool = False) -> Extraction:
    """Do every unit of work that has no honoured receipt, then write the manifest.

    Args:
        repair: a store of which every file is to be checked against its digest, complete or not.
        overcommit: begin even where the disk has less room than the store will need.

    Raises:
        StoreMismatchError: the job makes another store than the one to repair.
        NoRoomError: the disk has too little room.
    """
    started = time.perf_counter()
    writer = job.writer
    if repair is not None and repair.name != writer.path.name:
        raise StoreMismatchError(
            f"encoder, samples or versions are not those {repair.name} was made with: they would make "
            f"{writer.path.name}. Put the former ones back, or extract into a new store."
        )
    if repair is None and (finished := find_finished(job)) is not None:
        return finished
    if repair is not None:
        with contextlib.suppress(UsageError):  # a root that is lost is written anew
            writer.layouts = read_header(repair)[1]  # a compressed store stays one
    units = units_of(job)
    pending = pending_units(job, units)
    num_pending = sum(len(unit.rows) for unit in pending)
    if not overcommit:
        require_room(writer, num_pending / max(1, job.num_items))
    stream = job.encode(pending)
    writer.begin()

    def show(published: Sequence[Receipt]) -> None:
        bar.update(sum(receipt.rows[1] - receipt.rows[0] for receipt in published))
        bar.set_postfix_str(str(job.clock.rates()), refresh=False)

    bar = tqdm(total=job.num_items, initial=job.num_items - num_pending, desc=job.label, unit=job.noun)
    with bar, contextlib.closing(stream), Commits(partial(commit_unit, job)) as commits:
        handed_over = time.perf_counter()
        for encoded in stream:
            since, handed_over = handed_over, time.perf_counter()
            show(commits.commit(encoded, unit_rates(job, encoded, handed_over - since)))
        show(commits.wait())
    manifest = writer.finish(unit.name for unit in units)
    seconds = time.perf_counter() - started
    num_reused = job.num_items - num_pending
    return Extraction(writer.path, num_pending, num_reused, manifest.num_failures, seconds, job.clock.rates())


def unit_rates(job: Job, encoded: EncodedUnit, seconds: float) -> dict[str, float | str]:
    """What a unit's receipt says of the work since the last one: rates of the whole and of each stage, what binds."""
    stages = job.clock.lap()
    whole = float(f"{len(encoded.unit.rows) / seconds:.4g}")
    return {"job": whole, **stages.to_dict(), "batch_size": encoded.batch_size, "binds": stages.binds or ""}


def commit_unit(job: Job, encoded: EncodedUnit, rates: Mapping[str, float | str]) -> Receipt:
    """Publish a unit, and count it as the work of the last stage."""
    rows = encoded.unit.rows
    with job.clock.at_work("write", len(rows)):
        span = (rows.start, rows.stop)
        return job.writer.commit(encoded.unit.name, span, encoded.shards, encoded.failures, rates)


def store_bytes(writer: StoreWriter) -> int:
    """Bytes of the finished store's arrays, which are all of it but for metadata and receipts."""
    return sum(
        layout.plain_shard_bytes(shard) for layout in writer.layouts.values() for shard in range(layout.num_shards)
    )


def free_bytes(path: StorePath) -> int | None:
    """Room on the disk where a path lies or will lie; None for a remote one, which does not say."""
    if not isinstance(path, Path):
        return None
    folder = next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.exists())
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def require_room(writer: StoreWriter, share: float) -> None:
    """Make sure that a share of a store fits on the disk.

    Raises:
        NoRoomError: it does not.
    """
    free, needed = free_bytes(writer.path), round(share * store_bytes(writer))
    if free is not None and needed > free:
        raise NoRoomError(
            f"{writer.path.name} needs {size_text(needed)} and {writer.path.parent} has {size_text(free)}; make "
            "room, take --dtype int8 or fewer layers, or go on all the same with --overcommit."
        )


def size_text(num_bytes: float) -> str:
    """For people, such as 4.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def recorded_provenance(
    encoder: ImageEncoder | TextEncoder, samples: StorePath, num_items: int, batch_size: int, store: StorePath
) -> dict[str, Any]:
    """What is recorded beside a feature store's identity: where encoder and samples came from, how the work was done.

    An encoder from a folder, its adapter and the samples store are recorded relative to the store; a hub id stands as
    it is.
    """
    folder = Path(encoder.name)
    paths = {"encoder": folder} if folder.exists() else {}
    if encoder.adapter is not None:
        paths["adapter"] = Path(encoder.adapter)
    if isinstance(samples, Path):
        paths["samples"] = samples
    return {
        "encoder": folder.name if folder.exists() else encoder.name,
        "paths": relative_paths(paths, store),
        "num_items": num_items,
        "batch_size": batch_size,
        "libraries": library_versions(),
    }


def library_versions() -> dict[str, str]:
    """Versions that are recorded beside a store's identity."""
    return {name: version(name) for name in LIBRARIES}


def pick_device(name: str = "auto") -> str:
    """`"auto"` is the first accelerator there is, or the CPU; anything else is taken by name.

    Raises:
        UsageError: there is no such device here.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator.type if accelerator is not None else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
        raise UsageError(f"there is no device {name!r} here; name one of: auto, {here}.") from error
    return name
