"""Scoring at original size: samples per second from logits at hand, and how memory grows with their number.

    python -m benchmarks.evaluate --json evaluate.json

Truths are run lengths at 480 x 640 as a samples store holds them, logits are 64 x 64. Everything is made from a seed,
scored in processes of their own by turns, and removed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from benchmarks.common import Library, Report, Row, describe_machine, measure_and_tell, take_turns, to_stderr
from benchmarks.evaluating import CONTENDERS, GRID, SIZE, Request, Scored, make_folder, score_apart
from cache_schema.errors import require_at_least

LIBRARIES = tuple(Library(*names) for names in (("numpy", "numpy"), ("torch", "torch"), ("pycocotools", "pycocotools")))
LESS = 4
"""The smaller pass scores one in so many samples of the larger."""

QUICK_SAMPLES, QUICK_ROUNDS = 128, 1

Measure = Callable[[Request], Scored]


@dataclass(frozen=True)
class BenchmarkConfig:
    """Score made-up samples. Takes 160 MB of disk for a while."""

    json: Path | None = None
    """Write what was found to this file."""
    dir: Path | None = None
    """Folder to work in; the system's folder for temporary files by default."""
    num_samples: int = 10_000
    rounds: int = 3
    quick: bool = False
    """Only try everything out: few samples, one round. The figures are worth nothing."""

    def __post_init__(self) -> None:
        require_at_least(self, LESS, "num_samples")
        require_at_least(self, 1, "rounds")

    def shortened(self) -> BenchmarkConfig:
        """What `quick` asks for."""
        return replace(self, num_samples=QUICK_SAMPLES, rounds=QUICK_ROUNDS)

    @property
    def settings(self) -> dict[str, Any]:
        """What the figures depend on."""
        return {
            "num_samples": self.num_samples,
            "mask_size": list(SIZE),
            "logits_size": list(GRID),
            "rounds": self.rounds,
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return measure_and_tell(
        lambda: tyro.cli(
            BenchmarkConfig, prog="python -m benchmarks.evaluate", args=argv, config=(tyro.conf.FlagCreatePairsOff,)
        ),
        lambda config: run(config.shortened() if config.quick else config),
    )


def run(config: BenchmarkConfig, measure: Measure = score_apart) -> Report:
    """Make the samples, score them, and remove them.

    Args:
        measure: how one pass is made.

    Raises:
        RuntimeError: contenders disagree about a metric.
    """
    with tempfile.TemporaryDirectory(prefix="headstart-benchmark-", dir=config.dir) as temporary:
        folder = Path(temporary)
        report = Report("evaluate", describe_machine(folder, LIBRARIES), config.settings)
        to_stderr("making the samples")
        make_folder(folder, config.num_samples)
        less, more = config.num_samples // LESS, config.num_samples
        requests = {name: Request(name, str(folder), more) for name in CONTENDERS}
        requests["ours, fewer samples"] = Request("ours", str(folder), less)
        found: dict[str, list[Scored]] = {name: [] for name in requests}

        def turn(name: str) -> float:
            found[name].append(measure(requests[name]))
            return found[name][-1].rate

        rates = take_turns({name: partial(turn, name) for name in requests}, config.rounds, to_stderr)
    _require_agreement(found)
    for name, rounds in found.items():
        num = requests[name].num_samples
        label = f"{name.removesuffix(', fewer samples')}: {num} samples"
        report.rows += [
            Row.of(label, rates[name], "samples/s"),
            Row.of(f"{label}, peak memory", [one.memory_bytes / 2**20 for one in rounds], "MiB", "above the start"),
        ]
    growth = [
        (one.memory_bytes - other.memory_bytes) / (more - less)
        for one, other in zip(found["ours"], found["ours, fewer samples"], strict=True)
    ]
    report.rows.append(Row.of("ours: peak memory for each sample more", growth, "bytes"))
    for other in ("plain", "ours, one thread"):
        report.compare(rates, "ours", other, other)
    return report


def _require_agreement(found: Mapping[str, Sequence[Scored]]) -> None:
    """Every contender must give the same metrics of the same samples, to the last bit."""
    by_num: dict[int, Scored] = {}
    for name, rounds in found.items():
        for scored in rounds:
            expected = by_num.setdefault(scored.num_samples, scored)
            if scored.metrics != expected.metrics:
                raise RuntimeError(f"{name} gives other metrics: {scored.metrics}, not {expected.metrics}")


if __name__ == "__main__":
    sys.exit(main())
