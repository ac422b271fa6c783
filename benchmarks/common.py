"""What benchmarks share: the machine they ran on, contenders that take turns, and the report. Knows no benchmark."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil

from cache_schema import atomic
from cache_schema.errors import UsageError
from cache_schema.reader import num_cores
from evaluate.machine import processor_name

Rates = Mapping[str, Sequence[float]]
"""The rate of every contender in every round, by the contender's name."""


@dataclass(frozen=True)
class Library:
    """A package that takes part: the name it is installed by, and the one it is imported by."""

    distribution: str
    module: str

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None

    @property
    def version(self) -> str:
        return importlib.metadata.version(self.distribution)


@dataclass(frozen=True)
class Spread:
    """The median, the least and the greatest of some values."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """One line of a report. `value` is None where nothing was measured; `note` says why, or how it was."""

    name: str
    value: float | None
    unit: str
    note: str = ""
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, name: str, values: Sequence[float], unit: str, note: str = "") -> Row:
        """The row of a contender that was measured in several rounds."""
        spread = Spread.of(values)
        return cls(name, spread.median, unit, note, spread.low, spread.high)


@dataclass
class Report:
    """What a benchmark found.

    A ratio is ours over the other that its name gives: above 1, ours is the faster one.
    """

    benchmark: str
    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    rows: list[Row] = field(default_factory=list)
    ratios: dict[str, Spread] = field(default_factory=dict)

    def compare(self, rates: Rates, ours: str, other: str, name: str) -> None:
        """Add the ratio `ours` / `other`, called `name`, unless one of the two took no part."""
        if ours in rates and other in rates:
            per_round = [mine / theirs for mine, theirs in zip(rates[ours], rates[other], strict=True)]
            self.ratios[name] = Spread.of(per_round)

    def to_dict(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "machine": dict(self.machine),
            "settings": dict(self.settings),
            "rows": [asdict(row) for row in self.rows],
            "ratios": {name: ratio.median for name, ratio in self.ratios.items()},
            "ratio_ranges": {name: [ratio.low, ratio.high] for name, ratio in self.ratios.items()},
        }

    def write_json(self, path: Path) -> None:
        atomic.write_json(path, self.to_dict())

    def to_text(self) -> str:
        """Two tables, of values and of ratios."""
        values = [(row.name, _number(row.value), row.unit, _range(row.low, row.high), row.note) for row in self.rows]
        ratios = [(name, _number(r.median), _range(r.low, r.high)) for name, r in self.ratios.items()]
        facts = ", ".join(f"{key} {value}" for key, value in self.machine.items() if key != "libraries")
        return "\n".join(
            (
                f"{self.benchmark}: {', '.join(f'{key} {value}' for key, value in self.settings.items())}",
                facts,
                "",
                *_table(("", "median", "", "least to most", ""), values),
                "",
                *_table(("ours / other", "median", "least to most"), ratios),
            )
        )


def describe_machine(folder: Path, libraries: Iterable[Library]) -> dict[str, Any]:
    """What a figure depends on besides the code: processor, memory, kernel, the file system of `folder`, versions."""
    return {
        "cpu": processor_name(),
        "cores": num_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": f"{platform.system()} {platform.release()}",
        "filesystem": _filesystem(folder),
        "python": platform.python_version(),
        "libraries": {library.distribution: library.version for library in libraries if library.is_installed},
    }


def take_turns(
    contenders: Mapping[str, Callable[[], float]], rounds: int, progress: Callable[[str], None] = lambda line: None
) -> dict[str, list[float]]:
    """Let every contender go once a round, one after the other; each call does its work and returns its rate.

    Another one goes first in each round: what a turn leaves to the next, such as a busy disk, is not always the same's.
    """
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}")
        first = number % max(1, len(names))
        for name in (*names[first:], *names[:first]):
            rates[name].append(contenders[name]())
    return rates


class HasJson(Protocol):
    """A config that may name a file for the report."""

    @property
    def json(self) -> Path | None: ...


C = TypeVar("C", bound=HasJson)


def measure_and_tell(parse: Callable[[], C], run: Callable[[C], Report]) -> int:
    """Parse a command line, measure, print what was found, and write it where the config's `json` says.

    Returns:
        The exit code.
    """
    try:
        config = parse()
        report = run(config)
    except SystemExit as parsed:  # tyro has printed its help, or what is wrong with the arguments
        return parsed.code if isinstance(parsed.code, int) else 2
    except UsageError as mistake:
        to_stderr(f"error: {mistake}")
        return 2
    print(report.to_text())
    if config.json:
        report.write_json(config.json)
    return 0


def to_stderr(line: str) -> None:
    """Say what is going on, apart from what is found."""
    print(line, file=sys.stderr, flush=True)


def _filesystem(folder: Path) -> str:
    resolved = folder.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if resolved.is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _range(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{_number(low)} to {_number(high)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]
