"""What both extraction jobs share: units of work that are done once, whatever happens to the process that does them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from tqdm import tqdm

from cache_schema.errors import UsageError
from cache_schema.receipts import Failure
from cache_schema.store import StoreWriter, is_complete, open_store

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

    path: Path
    num_encoded: int
    num_reused: int
    num_failed: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}

    def summary(self, noun: str) -> str:
        """One sentence for people: what was done, what was there already, and what failed."""
        failed = f"; {self.num_failed} failed, see {self.path}/ledger.jsonl" if self.num_failed else ""
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
) -> Extraction:
    """Do every unit of work that has no honoured receipt, then write the manifest.

    Args:
        encode: given the units that are left, yields each of them encoded, in order.
        label, noun: what the progress bar calls the job and its items.
    """
    started = time.perf_counter()
    if is_complete(writer.path):
        num_failed = open_store(writer.path).manifest.num_failures
        return Extraction(writer.path, 0, num_items, num_failed, time.perf_counter() - started)
    writer.begin()
    starts = range(0, num_items, items_per_unit)
    units = [Unit(number, range(start, min(start + items_per_unit, num_items))) for number, start in enumerate(starts)]
    pending = [unit for unit in units if not writer.is_done(unit.name)]
    num_pending = sum(len(unit.rows) for unit in pending)
    with tqdm(total=num_items, initial=num_items - num_pending, desc=label, unit=noun) as bar:
        for encoded, seconds in _timed(encode(pending)):
            unit = encoded.unit
            rates = {f"{noun}s_per_s": len(unit.rows) / seconds}
            writer.commit(unit.name, (unit.rows.start, unit.rows.stop), encoded.shards, encoded.failures, rates)
            bar.update(len(unit.rows))
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


def recorded_provenance(source: str, num_items: int, store: Path) -> dict[str, Any]:
    """What is recorded beside a feature store's identity: where its encoder came from, and library versions.

    A folder is recorded relative to the store, a hub id as it is; `resolve_source` undoes it.
    """
    return {"encoder": portable_source(source, store), "num_items": num_items, "libraries": library_versions()}


def portable_source(source: str, base: Path) -> dict[str, str]:
    """An encoder's folder or hub id in a form that survives a move of `base` together with the folder."""
    if Path(source).exists():
        return {"folder": os.path.relpath(Path(source).resolve(), base.resolve())}
    return {"hub": source}


def move_source(recorded: Mapping[str, str], old_base: Path, new_base: Path) -> dict[str, str]:
    """A recorded source, relative to another folder. A folder stays a folder, whether it is there now or not."""
    if "folder" not in recorded:
        return dict(recorded)
    return {"folder": os.path.relpath((old_base / recorded["folder"]).resolve(), new_base.resolve())}


def resolve_source(recorded: Mapping[str, str], base: Path) -> str:
    """The folder or hub id of an encoder that was recorded relative to `base`."""
    return os.path.normpath(base / recorded["folder"]) if "folder" in recorded else recorded["hub"]


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
