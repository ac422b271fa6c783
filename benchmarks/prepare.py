"""The prepare stage on synthetic referring expressions: samples per second, and how memory grows with their number.

    python -m benchmarks.prepare --json prepare.json

Datasets are made in the layouts of RefCOCO and gRefCOCO, prepared in processes of their own by turns, and removed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import tyro

from benchmarks.common import Library, Report, Row, describe_machine, measure_and_tell, take_turns, to_stderr
from benchmarks.preparing import Prepared, Request, prepare_apart
from benchmarks.refer import LEAST_POINTS, MOST_POINTS, SAMPLES_PER_IMAGE, Layout, write_annotations, write_images
from cache_schema.errors import require_at_least

LIBRARIES = tuple(
    Library(*names)
    for names in (("numpy", "numpy"), ("pycocotools", "pycocotools"), ("msgspec", "msgspec"), ("pillow", "PIL"))
)
LESS = 4
"""The smaller dataset has one in so many of the larger's images."""

QUICK_IMAGES, QUICK_ROUNDS = 40, 1

Measure = Callable[[Request], Prepared]


@dataclass(frozen=True)
class BenchmarkConfig:
    """Prepare synthetic datasets. Takes half a gigabyte of disk for a while."""

    json: Path | None = None
    """Write what was found to this file."""
    dir: Path | None = None
    """Folder to work in, on the disk to measure; the system's folder for temporary files by default."""
    num_images: int = 20_000
    """Images of the larger dataset; each has six samples."""
    rounds: int = 3
    quick: bool = False
    """Only try everything out: few images, one round. The figures are worth nothing."""

    def __post_init__(self) -> None:
        require_at_least(self, LESS, "num_images")
        require_at_least(self, 1, "rounds")

    def shortened(self) -> BenchmarkConfig:
        """What `quick` asks for."""
        return replace(self, num_images=QUICK_IMAGES, rounds=QUICK_ROUNDS)

    @property
    def settings(self) -> dict[str, Any]:
        """What the figures depend on."""
        return {
            "num_images": self.num_images,
            "num_samples": self.num_images * SAMPLES_PER_IMAGE,
            "points_a_polygon": [LEAST_POINTS, MOST_POINTS],
            "rounds": self.rounds,
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return measure_and_tell(
        lambda: tyro.cli(
            BenchmarkConfig, prog="python -m benchmarks.prepare", args=argv, config=(tyro.conf.FlagCreatePairsOff,)
        ),
        lambda config: run(config.shortened() if config.quick else config),
    )


def run(config: BenchmarkConfig, measure: Measure = prepare_apart) -> Report:
    """Make the datasets, prepare them, and remove all of it.

    Args:
        measure: how one of them is prepared.
    """
    with tempfile.TemporaryDirectory(prefix="headstart-benchmark-", dir=config.dir) as temporary:
        folder = Path(temporary)
        report = Report("prepare", describe_machine(folder, LIBRARIES), config.settings)
        to_stderr("making the datasets")
        write_images(folder / "images", config.num_images)
        for layout in get_args(Layout):
            _measure_layout(config, layout, folder, measure, report)
    return report


def _measure_layout(config: BenchmarkConfig, layout: Layout, folder: Path, measure: Measure, report: Report) -> None:
    num_images = config.num_images // LESS, config.num_images
    found: dict[int, list[Prepared]] = {num: [] for num in num_images}
    for num in num_images:
        write_annotations(folder / layout / str(num), layout, num)

    def turn(num: int) -> float:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            request = Request(layout, str(folder / layout / str(num)), str(folder / "images"), out)
            found[num].append(measure(request))
        return found[num][-1].rate

    turns = {str(num): partial(turn, num) for num in num_images}
    take_turns(turns, config.rounds, lambda line: to_stderr(f"{layout}, {line}"))
    for num, rounds in found.items():
        name = f"{layout}: {num * SAMPLES_PER_IMAGE} samples"
        annotations = sum(file.stat().st_size for file in (folder / layout / str(num)).iterdir()) / 2**20
        shares = [one.images_s / one.seconds for one in rounds]
        note = f"above the start, for {annotations:.0f} MiB of annotations"
        report.rows += [
            Row.of(name, [one.rate for one in rounds], "samples/s", f"{num} images"),
            Row.of(f"{name}, peak memory", [one.memory_bytes / 2**20 for one in rounds], "MiB", note),
            Row.of(f"{name}, the store", [one.store_bytes / 2**20 for one in rounds], "MiB", "on the disk"),
            Row.of(f"{name}, images alone over all", shares, "", "reading them, hashing them and their headers"),
        ]
    less, more = found.values()
    growth = [one.memory_bytes / other.memory_bytes for one, other in zip(more, less, strict=True)]
    report.rows.append(Row.of(f"{layout}: peak memory, {LESS} times the samples over one", growth, ""))


if __name__ == "__main__":
    sys.exit(main())
