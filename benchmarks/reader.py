"""Our shard reader and writer side by side with peers: same bytes, same machine, one run.

    python -m benchmarks.reader --json reader.json --cold

Contenders take turns, round after round, and a ratio is the median of the ratios within each round. Array readers
follow the same random order in batches; loaders that shuffle by themselves read every row once. What each returns is
checked once, before it is timed.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from benchmarks import arrays, loaders, writers
from benchmarks.common import Library, Rates, Report, Row, describe_machine, measure_and_tell, take_turns, to_stderr
from benchmarks.contenders import Contender
from benchmarks.rows import DTYPE, Pass, Rows, empty_cache
from benchmarks.writers import Writer
from cache_schema.errors import UsageError, require_at_least

COLD = "cold: "
COLD_ROUNDS = 3
MAY_STAY_CACHED = 0.01
"""The share of all files' bytes that may stay in a cache that counts as cold."""
SLOW_ROWS = 256
WRITTEN_SHARDS = 16
UNIT = "GB/s"

LIBRARIES = (
    Library("numpy", "numpy"),
    Library("awscrt", "awscrt"),
    arrays.H5PY,
    arrays.ZARR,
    arrays.ZARRS,
    arrays.TENSORSTORE,
    loaders.TORCH,
    loaders.LITDATA,
    loaders.STREAMING,
    loaders.WEBDATASET,
)

_Contender = TypeVar("_Contender", Contender, Writer)


@dataclass(frozen=True)
class ReaderConfig:
    """Measure reading and writing of feature rows beside peers. Takes seven times the rows' bytes of disk."""

    json: Path | None = None
    """Write what was found to this file."""
    dir: Path | None = None
    """Folder to work in, on the disk to measure; the system's folder for temporary files by default."""
    num_rows: int = 2048
    """Rows to read. All copies of them must fit into memory beside everything else, or nothing is warm."""
    repeats: int = 7
    """Rounds."""
    only: tuple[str, ...] = ()
    """Only contenders whose name holds one of these."""
    skip: tuple[str, ...] = ()
    """No contender whose name holds one of these."""
    cold: bool = False
    """Read from a cold cache too, where the machine can empty it."""
    row_shape: Annotated[tuple[int, ...], tyro.conf.Suppress] = (32, 32, 200)
    batch_rows: Annotated[int, tyro.conf.Suppress] = 64

    def __post_init__(self) -> None:
        require_at_least(self, 1, "repeats", "num_rows")
        if self.num_rows % (2 * self.batch_rows):
            remedy = f"give a multiple of {2 * self.batch_rows}, so that every batch of two workers is full"
            raise UsageError(f"num_rows is {self.num_rows}: {remedy}.")

    @property
    def settings(self) -> dict[str, Any]:
        """What the figures depend on."""
        return {
            "num_rows": self.num_rows,
            "row_shape": list(self.row_shape),
            "dtype": DTYPE.name,
            "batch_rows": self.batch_rows,
            "repeats": self.repeats,
        }

    def takes(self, name: str) -> bool:
        """Whether the contender called `name` was asked for."""
        asked = not self.only or any(part in name for part in self.only)
        return asked and not any(part in name for part in self.skip)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return measure_and_tell(
        lambda: tyro.cli(
            ReaderConfig, prog="python -m benchmarks.reader", args=argv, config=(tyro.conf.FlagCreatePairsOff,)
        ),
        measure,
    )


def measure(config: ReaderConfig) -> Report:
    """Make the rows, let everyone read and write them, and remove all of it.

    Raises:
        WrongBytesError: a contender returned or wrote other bytes than it was given.
    """
    readers = [*arrays.contenders(min(SLOW_ROWS, config.num_rows)), *loaders.contenders()]
    everyone: list[Contender | Writer] = [*readers, *writers.writers()]
    if not any(config.takes(contender.name) for contender in everyone):
        raise UsageError(f"nobody is left to measure. Known: {'; '.join(contender.name for contender in everyone)}.")
    with tempfile.TemporaryDirectory(prefix="headstart-benchmark-", dir=config.dir) as temporary:
        folder = Path(temporary)
        report = Report("reader", describe_machine(folder, LIBRARIES), config.settings)
        to_stderr("making the rows")
        rows = Rows.make(folder, config.num_rows, config.row_shape, config.batch_rows)
        readers = _present(readers, config, report)
        rates = read_warm(readers, rows, config.repeats, report)
        if config.cold:
            rates |= read_cold(readers, rows, min(COLD_ROUNDS, config.repeats), report)
        rates |= write(_present(writers.writers(), config, report), rows, config.repeats, report)
    _compare(report, rates, "")
    _compare(report, rates, COLD)
    for other in (writers.RAW, *writers.PEERS):
        report.compare(rates, writers.OURS, other, f"{writers.OURS} / {other}")
    return report


def read_warm(readers: Sequence[Contender], rows: Rows, rounds: int, report: Report) -> dict[str, list[float]]:
    """The rates of reading what the page cache holds."""
    passes = {}
    with contextlib.ExitStack() as stack:
        # Those that fork go first: it is best done before other libraries have started threads.
        for reader in sorted(readers, key=lambda reader: not reader.workers):
            to_stderr(f"checking {reader.name}")
            passes[reader.name] = stack.enter_context(reader.open(rows))
            rows.require(passes[reader.name](), not reader.shuffles, reader.name)
        turns = {reader.name: partial(_rate, passes[reader.name]) for reader in readers}
        rates = take_turns(turns, rounds, lambda line: to_stderr(f"reading, {line}"))
    report.rows.extend(Row.of(reader.name, rates[reader.name], UNIT, reader.note) for reader in readers)
    return rates


def read_cold(readers: Sequence[Contender], rows: Rows, rounds: int, report: Report) -> dict[str, list[float]]:
    """The rates of reading what the page cache does not hold; none where it cannot be emptied.

    Readers with worker processes are left out: theirs keep the files mapped, and mapped pages stay in the cache.
    """

    def turn(reader: Contender) -> float:
        gc.collect()
        if empty_cache(rows.folder) > MAY_STAY_CACHED:
            raise _CacheKeptError
        with reader.open(rows) as read_all:
            return _rate(read_all)

    alone = [reader for reader in readers if not reader.workers]
    turns = {f"{COLD}{reader.name}": partial(turn, reader) for reader in alone}
    try:
        rates = take_turns(turns, rounds, lambda line: to_stderr(f"reading from a cold cache, {line}"))
    except _CacheKeptError:
        why = "left out: the page cache cannot be emptied here"
        report.rows.append(Row(f"{COLD}all readers", None, UNIT, why))
        return {}
    report.rows.extend(Row.of(name, rates[name], UNIT) for name in turns)
    why = "left out: workers keep the files in the cache"
    report.rows.extend(Row(f"{COLD}{reader.name}", None, UNIT, why) for reader in readers if reader.workers)
    return rates


def write(contenders: Sequence[Writer], rows: Rows, rounds: int, report: Report) -> dict[str, list[float]]:
    """The rates of writing a few shards, each of a batch of rows."""
    shards = [shard for _, shard in itertools.islice(rows.shards(), WRITTEN_SHARDS)]
    folder = rows.folder / "written"
    for writer in contenders:
        to_stderr(f"checking {writer.name}")
        writer.require(folder, shards)
    turns = {writer.name: partial(writer.rate, folder, shards) for writer in contenders}
    rates = take_turns(turns, rounds, lambda line: to_stderr(f"writing, {line}"))
    report.rows.extend(Row.of(writer.name, rates[writer.name], UNIT, writer.note) for writer in contenders)
    return rates


class _CacheKeptError(Exception):
    """The page cache still held too much after it was to be emptied."""


def _rate(read_all: Pass) -> float:
    """GB/s of one pass."""
    start = time.perf_counter()
    num_bytes = sum(batch.nbytes for batch in read_all())
    return float(num_bytes) / (time.perf_counter() - start) / 1e9


def _present(contenders: Sequence[_Contender], config: ReaderConfig, report: Report) -> list[_Contender]:
    """Those that were asked for and are installed; the report names those that are not."""
    asked = [contender for contender in contenders if config.takes(contender.name)]
    missing = [contender for contender in asked if not contender.is_installed]
    report.rows.extend(Row(contender.name, None, UNIT, "not installed") for contender in missing)
    return [contender for contender in asked if contender.is_installed]


def _compare(report: Report, rates: Rates, prefix: str) -> None:
    """Add the ratios of reading; the names of contenders begin with `prefix`."""
    ours = [prefix + arrays.reader_name(threads, verify) for verify in (False, True) for threads in (1, 2)]
    for mine in ours:
        report.compare(rates, mine, prefix + arrays.GATHER, f"{mine} / {arrays.GATHER}")
    shards = prefix + arrays.reader_name(2, False)
    report.compare(rates, prefix + arrays.PACKED, shards, f"{prefix}{arrays.PACKED} / {shards.removeprefix(prefix)}")
    for peer in arrays.PEERS:
        for mine in (ours[1], ours[3]):
            report.compare(rates, mine, prefix + peer, f"{mine} / {peer}")
    fastest = {
        family: max(members, key=lambda name: statistics.median(rates[name]))
        for family in loaders.FAMILIES
        if (members := [name for name in rates if name.startswith(prefix + family)])
    }
    for mine in (prefix + loaders.loader_name(reuse, verify) for reuse in (False, True) for verify in (False, True)):
        for other in fastest.values():
            report.compare(rates, mine, other, f"{mine} / {other.removeprefix(prefix)}")
        if fastest:
            winner = max(fastest.values(), key=lambda name: statistics.median(rates[name]))
            report.compare(rates, mine, winner, f"{mine} / fastest loader")


if __name__ == "__main__":
    sys.exit(main())
