"""PAMR of many classes: one affinity for all of them, beside an affinity computed again for every few classes.

    python -m benchmarks.pamr --json pamr.json

The plain way is the published one: neighbours are brought side by side by dilated convolutions, for the image and in
every iteration for the masks. All ways are held to the same result before they are timed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmarks.common import Library, Report, Row, describe_machine, measure_and_tell, take_turns, to_stderr
from benchmarks.measuring import finish
from cache_schema.errors import require_at_least
from evaluate.open_vocabulary.pamr import Pamr

LIBRARIES = (Library("torch", "torch"),)
OURS = "ours, one affinity"
CHUNKS = (1, 8)
"""How many classes at a time get an affinity of their own."""

TOLERANCE = 1e-4
"""How far results, from 0 to 1, may lie apart: float32, added up in other orders, ten times over."""

_NEIGHBOURS = (0, 1, 2, 3, 5, 6, 7, 8)
"""The places of 3 x 3 pixels, row by row, but for the one in the middle."""

Refine = Callable[[Tensor, Tensor], Tensor]
"""Refines (c, h, w) masks by a (3, h, w) image."""


class WrongMasksError(RuntimeError):
    """A contender refines masks to something else: its speed means nothing."""


@dataclass(frozen=True)
class BenchmarkConfig:
    """Refine the masks of many classes over one image. The defaults are ADE20K's classes on an image of 4:3."""

    json: Path | None = None
    """Write what was found to this file."""
    num_classes: int = 150
    num_recomputed: int = 8
    """Classes that are refined in a turn where the affinity is computed again: it costs the same for each."""
    height: int = 448
    width: int = 597
    rounds: int = 3
    device: str = "cpu"
    quick: bool = False
    """Only try everything out: a small image, one round. The figures are worth nothing."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "num_recomputed", "height", "width", "rounds")
        require_at_least(self, self.num_recomputed, "num_classes")

    def shortened(self) -> BenchmarkConfig:
        """What `quick` asks for."""
        return replace(self, num_classes=20, num_recomputed=9, height=24, width=31, rounds=1)

    @property
    def settings(self) -> dict[str, Any]:
        """What the figures depend on."""
        return {
            "num_classes": self.num_classes,
            "num_recomputed": self.num_recomputed,
            "size": [self.height, self.width],
            "rounds": self.rounds,
            "device": self.device,
            "threads": torch.get_num_threads(),
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return measure_and_tell(
        lambda: tyro.cli(
            BenchmarkConfig, prog="python -m benchmarks.pamr", args=argv, config=(tyro.conf.FlagCreatePairsOff,)
        ),
        lambda config: run(config.shortened() if config.quick else config),
    )


def run(config: BenchmarkConfig) -> Report:
    """Hold every way to the same masks, then let them take turns."""
    report = Report("pamr", describe_machine(Path.cwd(), LIBRARIES), config.settings)
    image, masks = make_case(config)
    some = masks[: config.num_recomputed]
    ways: dict[str, tuple[Refine, Tensor]] = {OURS: (refine_at_once, masks)}
    for chunk in CHUNKS:
        every = "for each class" if chunk == 1 else f"for every {chunk} classes"
        ways[f"plain, an affinity {every}"] = partial(refine_plainly, chunk=chunk), some
        ways[f"ours, an affinity {every}"] = partial(refine_in_chunks, chunk=chunk), some
    furthest = _check(ways, image)
    turns = {name: partial(_turn, refine, image, given, config.device) for name, (refine, given) in ways.items()}
    rates = take_turns(turns, config.rounds, to_stderr)
    for name, values in rates.items():
        report.rows.append(Row.of(name, values, "classes/s", f"{len(ways[name][1])} classes a turn"))
    note = f"of values from 0 to 1; {TOLERANCE:g} are allowed"
    report.rows.append(Row("furthest that two results lie apart", furthest, "", note))
    for name in ways:
        if name != OURS:
            report.compare(rates, OURS, name, f"one affinity over {name}")
    return report


def make_case(config: BenchmarkConfig) -> tuple[Tensor, Tensor]:
    """A (3, h, w) image from 0 to 1, of smooth patches with noise, and smooth (c, h, w) masks from 0 to 1."""
    generator = torch.Generator().manual_seed(0)
    size = (config.height, config.width)

    def patches(planes: int) -> Tensor:
        coarse = torch.rand((1, planes, 28, 37), generator=generator)
        return F.interpolate(coarse, size, mode="bilinear", align_corners=True)[0]

    image = (patches(3) + 0.05 * torch.randn((3, *size), generator=generator)).clamp(0, 1)
    return image.to(config.device), patches(config.num_classes).to(config.device)


def refine_at_once(image: Tensor, masks: Tensor) -> Tensor:
    """Our way: the affinity once."""
    return Pamr().affinity(image).refine(masks)


def refine_in_chunks(image: Tensor, masks: Tensor, chunk: int) -> Tensor:
    """Our own parts, with the affinity computed again for every chunk."""
    return torch.cat([Pamr().affinity(image).refine(some) for some in _chunks(masks, chunk)])


def refine_plainly(image: Tensor, masks: Tensor, chunk: int) -> Tensor:
    """The plain way, with the affinity computed again for every chunk."""
    return torch.cat([_plain(image, some) for some in _chunks(masks, chunk)])


def _chunks(masks: Tensor, chunk: int) -> list[Tensor]:
    return [masks[start : start + chunk] for start in range(0, len(masks), chunk)]


@torch.inference_mode()
def _plain(image: Tensor, masks: Tensor) -> Tensor:
    pamr = Pamr()
    sigma = _side_by_side(image, pamr.dilations, range(9)).std(1, keepdim=True)
    neighbours = _side_by_side(image, pamr.dilations, _NEIGHBOURS)
    weights = torch.softmax(-((neighbours - image[:, None]).abs() / (1e-8 + 0.1 * sigma)).mean(0), 0)
    for _ in range(pamr.iterations):
        masks = (_side_by_side(masks, pamr.dilations, _NEIGHBOURS) * weights).sum(1)
    return masks


def _side_by_side(planes: Tensor, dilations: Sequence[int], places: Sequence[int]) -> Tensor:
    """(c, h, w) -> (c, dilations x places, h, w): what lies at places 0 to 8 of the 3 x 3 pixels around each.

    They are brought there by convolutions whose kernels hold a single 1.
    """
    kernel = torch.eye(9, device=planes.device)[list(places)].view(-1, 1, 3, 3)
    padded = [F.pad(planes[:, None], [dilation] * 4, mode="replicate") for dilation in dilations]
    return torch.cat(
        [F.conv2d(plane, kernel, dilation=dilation) for plane, dilation in zip(padded, dilations, strict=True)], 1
    )


def _check(ways: dict[str, tuple[Refine, Tensor]], image: Tensor) -> float:
    """Let every way refine once, which also warms it up.

    Returns:
        How far any result lies from ours at most.

    Raises:
        WrongMasksError: one of them lies too far from ours.
    """
    ours, furthest = refine_at_once(image, ways[OURS][1]), 0.0
    for name, (refine, masks) in ways.items():
        to_stderr(f"checking: {name}")
        apart = (refine(image, masks) - ours[: len(masks)]).abs().max().item()
        if not apart <= TOLERANCE:
            raise WrongMasksError(f"{name} gives masks that lie {apart:g} apart from {OURS}")
        furthest = max(furthest, apart)
    return furthest


def _turn(refine: Refine, image: Tensor, masks: Tensor, device: str) -> float:
    """Classes per second."""
    finish(device)
    started = time.perf_counter()
    refine(image, masks)
    finish(device)
    return len(masks) / (time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())
