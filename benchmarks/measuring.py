"""What is to be measured and what came of it, as plain values that go from process to process. Knows no contender."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Row, take_turns, to_stderr
from extract.encoders.specs import Precision


@dataclass(frozen=True)
class Request:
    """What is to be measured.

    Args:
        contender: its name in `benchmarks.apart.CONTENDERS`.
        checkpoint: folder of the model.
        samples: samples store whose images or prompts are encoded.
        out: an empty folder for what is written.
        shard_rows: of our image job.
        limit: no more than the first so many items, where that changes nothing but how long it takes.
        workers: processes of a local cluster, 0 for none.
    """

    contender: str
    checkpoint: str
    samples: str
    out: str = ""
    batch_size: int = 32
    shard_rows: int = 64
    precision: Precision = "float32"
    device: str = "cpu"
    limit: int | None = None
    workers: int = 0


@dataclass(frozen=True)
class Measured:
    """What came of it. The memory is the most that was in use, above what was once the model was loaded."""

    num_items: int
    seconds: float
    memory_bytes: int
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Items per second."""
        return self.num_items / self.seconds


@dataclass(frozen=True)
class Ready:
    """A contender that is loaded and has encoded one item.

    Args:
        warm_up: what it does before its time is taken; its memory counts.
        run: what it does while its time is taken; returns what else is to be known.
        close: what it does in the end.
    """

    num_items: int
    warm_up: Callable[[], object]
    run: Callable[[], Mapping[str, Any]]
    close: Callable[[], object] = lambda: None


Measure = Callable[[Request], Measured]

Rounds = Mapping[str, list[Measured]]
"""What each contender, by name, did in every round."""


def measure_rounds(
    requests: Mapping[str, Request], num_rounds: int, measure: Measure, folder: Path, what: str
) -> dict[str, list[Measured]]:
    """Measure all of them by turns, round after round, each with an empty folder to write into."""
    found: dict[str, list[Measured]] = {name: [] for name in requests}

    def turn(name: str) -> float:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            found[name].append(measure(replace(requests[name], out=out)))
        return found[name][-1].rate

    turns = {name: partial(turn, name) for name in requests}
    take_turns(turns, num_rounds, lambda line: to_stderr(f"{what}, {line}"))
    return found


def rates_of(found: Rounds) -> dict[str, list[float]]:
    """Items per second in every round."""
    return {name: [measured.rate for measured in rounds] for name, rounds in found.items()}


def rate_rows(found: Rounds, what: str, unit: str, notes: Mapping[str, str]) -> list[Row]:
    """The rates as rows of a report."""
    return [Row.of(f"{what}: {name}", rates, unit, notes.get(name, "")) for name, rates in rates_of(found).items()]


def stage_rows(rounds: list[Measured], what: str, unit: str) -> list[Row]:
    """What a job says of each of its stages: the rate it would have by itself, and whether it bound."""
    rows = []
    for stage in rounds[-1].facts["stages"]:
        num_bound = sum(measured.facts["binds"] == stage for measured in rounds)
        note = f"binds in {num_bound} of {len(rounds)} rounds" if num_bound else ""
        rates = [measured.facts["stages"][stage] for measured in rounds]
        rows.append(Row.of(f"{what}: its own word on {stage}", rates, unit, note))
    return rows


def finish(device: str) -> None:
    """Wait until the device has done all it was told to."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
