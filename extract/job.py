"""What both extraction jobs share: units of work that are done once, whatever happens to the process that does them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from tqdm import tqdm

from cache_schema.atomic import StorePath
from cache_schema.errors import StoreMismatchError, UsageError
from cache_schema.receipts import Failure, Receipt
from cache_schema.store import ZARR_SUFFIX, Commits, StoreWriter, find_complete, read_header, relative_paths

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "pillow")


@dataclass(frozen=True)
class Unit:
    """One unit of work: its number and the items (images or prompts) it stands for."""

    number: int
    rows: range

    @property
    def name(self) -> str:
        return f"{self.number:06d}"


@dataclass(frozen=True)
class EncodedUnit:
    """What came of a unit: the rows of every shard it owns, by (array name, shard number), and what failed."""

    unit: Unit
    shards: Mapping[tuple[str, int], NDArray[Any]]
    failures: Sequence[Failure] = ()


@dataclass(frozen=True)
class Extraction:
    """A complete feature store: where it is, and how much of it this job had to do itself."""

    path: StorePath
    num_encoded: int
    num_reused: int
    num_failed: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}

    def summary(self, noun: str) -> str:
        """One sentence for people: what was done, what was there already, and what failed."""
        failed = ""
        if self.num_failed:
            lists = f"{self.path}/ledger.jsonl" if self.path.suffix == ZARR_SUFFIX else "`headstart cache info`"
            failed = f"; {self.num_failed} failed, see {lists}"
        if not self.num_encoded:
            return f"nothing to extract: all {self.num_reused} {noun} are in {self.path.name} already{failed}"
        rate = f"{self.num_encoded / self.seconds:.0f}/s"
        reused = f", {self.num_reused} were there already" if self.num_reused else ""
        return (
            f"extracted {self.num_encoded} {noun} in {self.seconds:.1f} s ({rate}){reused} -> {self.path.name}{failed}"
        )


def run_job(
    writer: StoreWriter,
    num_items: int,
    items_per_unit: int,
    encode: Callable[[Sequence[Unit]], Iterable[EncodedUnit]],
    *,
    label: str,
    noun: str,
    repair: Path | None = None,
) -> Extraction:
    """Do every unit of work that has no honoured receipt, then write the manifest.

    Args:
        encode: given the units that are left, gives each of them encoded, in order. What it raises at once is raised
            before anything is written.
        label, noun: what the progress bar calls the job and its items.
        repair: a store of which every file is to be checked against its digest, complete or not.

    Raises:
        StoreMismatchError: the job makes another store than the one to repair.
    """
    started = time.perf_counter()
    if repair is not None and repair.name != writer.path.name:
        raise StoreMismatchError(
            f"encoder, samples or versions are not those {repair.name} was made with: they would make "
            f"{writer.path.name}. Put the former ones back, or extract into a new store."
        )
    there = None if repair is not None else find_complete(writer.path.parent, writer.header)
    if there is not None:
        there.close()
        return Extraction(there.path, 0, num_items, there.manifest.num_failures, time.perf_counter() - started)
    if repair is not None:
        with contextlib.suppress(UsageError):  # a root that is lost is written anew
            writer.layouts = read_header(repair)[1]  # a compressed store stays one
    starts = range(0, num_items, items_per_unit)
    units = [Unit(number, range(start, min(start + items_per_unit, num_items))) for number, start in enumerate(starts)]
    pending = [unit for unit in units if not writer.is_done(unit.name)]
    num_pending = sum(len(unit.rows) for unit in pending)
    stream = encode(pending)
    writer.begin()

    def show(published: Sequence[Receipt]) -> None:
        bar.update(sum(receipt.rows[1] - receipt.rows[0] for receipt in published))

    bar = tqdm(total=num_items, initial=num_items - num_pending, desc=label, unit=noun)
    with bar, Commits(writer) as commits:
        for encoded, seconds in _timed(stream):
            rows = encoded.unit.rows
            rates = {f"{noun}s_per_s": len(rows) / seconds}
            span = (rows.start, rows.stop)
            show(commits.commit(encoded.unit.name, span, encoded.shards, encoded.failures, rates))
        show(commits.wait())
    manifest = writer.finish(unit.name for unit in units)
    seconds = time.perf_counter() - started
    return Extraction(writer.path, num_pending, num_items - num_pending, manifest.num_failures, seconds)


def _timed(encoded: Iterable[EncodedUnit]) -> Iterator[tuple[EncodedUnit, float]]:
    """Each unit with the seconds that were spent waiting for it."""
    iterator = iter(encoded)
    while True:
        started = time.perf_counter()
        try:
            unit = next(iterator)
        except StopIteration:
            return
        yield unit, time.perf_counter() - started


def recorded_provenance(
    source: str, samples: StorePath, num_items: int, batch_size: int, store: StorePath
) -> dict[str, Any]:
    """What is recorded beside a feature store's identity: where encoder and samples came from, how the work was done.

    An encoder from a folder and the samples store are recorded relative to the store; a hub id stands as it is.
    """
    folder = Path(source)
    paths = {"encoder": folder} if folder.exists() else {}
    if isinstance(samples, Path):
        paths["samples"] = samples
    return {
        "encoder": folder.name if folder.exists() else source,
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
