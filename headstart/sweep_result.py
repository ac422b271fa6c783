"""What came of a sweep: the table, best first, and what each setting does on average.

out/
    sweep.json       settings, scores, run folders, failures, and the command that trains the best
    sweep.csv        the table, best first
    sweep.md         the same for people, with what each setting does on average
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cache_schema import atomic
from heads.runs import Training
from headstart.sweep_space import Range, Settings, SweepConfig, show, show_value
from headstart.sweep_workers import Failure

_GROUPS = 3
"""Into so many groups of equal size the values of a range are gathered, to say what they do on average."""


@dataclass(frozen=True)
class Row:
    """What came of one combination, by seed, and the scores of the runs that were trained."""

    settings: Settings
    outcomes: Mapping[int, Training | Failure]
    scores: tuple[float, ...]

    @property
    def trainings(self) -> dict[int, Training]:
        return {seed: outcome for seed, outcome in self.outcomes.items() if isinstance(outcome, Training)}

    @property
    def failures(self) -> dict[int, Failure]:
        return {seed: outcome for seed, outcome in self.outcomes.items() if isinstance(outcome, Failure)}

    @property
    def mean(self) -> float | None:
        """The mean score of the runs that were trained."""
        return mean(self.scores) if self.scores else None

    @property
    def spread(self) -> float | None:
        """Their standard deviation; None of fewer than two."""
        return stdev(self.scores) if len(self.scores) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "mean": self.mean,
            "spread": self.spread,
            "runs": [{"seed": seed, **training.to_dict()} for seed, training in self.trainings.items()],
            "failures": [{"seed": seed, "reason": failure.reason} for seed, failure in self.failures.items()],
        }


@dataclass(frozen=True)
class SweepResult:
    """The table of a sweep, best first; rows with a failed run come after those without.

    Args:
        measure: val_mean_iou, or val_loss (lower is better) where the validation split has no masks.
        command: the command line that trains the best combination; None if none was trained with every seed.
    """

    config: SweepConfig
    measure: str
    rows: tuple[Row, ...]
    num_duplicates: int
    command: str | None

    @property
    def num_failed(self) -> int:
        return sum(len(row.failures) for row in self.rows)

    @property
    def notes(self) -> list[str]:
        """What a reader must know to compare the rows."""
        notes = []
        if self.measure == "val_loss":
            notes.append("The validation split has no masks: rows are ranked by their loss, the lowest first.")
        if self.num_duplicates:
            notes.append(f"{self.num_duplicates} combinations were the same run as another, and are counted once.")
        telling = {"target_size", "val_split"} | ({"loss", "loss_arguments"} if self.measure == "val_loss" else set())
        if unlike := [key for key in self.config.space if key in telling]:
            notes.append(
                f"Rows that differ in {' and '.join(unlike)} are not measured alike; `headstart evaluate` scores every "
                "run on one split at the images' original sizes."
            )
        return notes

    @property
    def marginals(self) -> list[dict[str, Any]]:
        """For each value of each varied setting the mean score over all rows that have it, whatever else they have."""
        return [
            {"setting": key, "value": shown, "mean": mean(scores), "num_rows": len(scores)}
            for key in self.config.space
            for shown, scores in self._by_value(key)
        ]

    def table(self, digits: int | None = 4) -> tuple[list[str], list[list[str]]]:
        """Header and rows, as text; scores with so many digits, None for all."""
        several = self.config.num_seeds > 1
        header = [*self.config.space, self.measure, *(["spread"] if several else []), "runs", "parameters", "seconds"]
        rows = [
            [
                *(show_value(row.settings[key]) for key in self.config.space),
                _number(row.mean, digits),
                *([_number(row.spread, digits)] if several else []),
                f"{len(row.trainings)} of {self.config.num_seeds}",
                next((str(training.num_parameters) for training in row.trainings.values()), "-"),
                f"{sum(training.seconds for training in row.trainings.values()):.1f}",
            ]
            for row in self.rows
        ]
        return header, rows

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.config.to_dict(),
            "measure": self.measure,
            "rows": [row.to_dict() for row in self.rows],
            "marginals": self.marginals,
            "notes": self.notes,
            "num_duplicates": self.num_duplicates,
            "num_failed": self.num_failed,
            "command": self.command,
        }

    def lines(self, *, markdown: bool = False) -> list[str]:
        """All of it for people."""
        means = [
            [each["setting"], each["value"], _number(each["mean"]), str(each["num_rows"])] for each in self.marginals
        ]
        draw = _markdown if markdown else aligned
        lines = [*draw(*self.table()), "", *draw(["setting", "value", f"mean {self.measure}", "rows"], means)]
        lines += [text for note in self.notes for text in ("", note)]
        for row in self.rows:
            for seed, failure in row.failures.items():
                lines += ["", f"failed: {show({**row.settings, 'seed': seed})}: {failure.reason}"]
        if self.command is not None:
            lines += ["", "Train the best one:", "", f"    {self.command}"]
        return lines

    def _by_value(self, key: str) -> list[tuple[str, list[float]]]:
        scored = [(row.settings[key], row.mean) for row in self.rows if row.mean is not None]
        if isinstance(self.config.space[key], Range):
            ordered = sorted(scored)
            cuts = [round(len(ordered) * cut / _GROUPS) for cut in range(_GROUPS + 1)]
            groups = [ordered[start:stop] for start, stop in itertools.pairwise(cuts) if stop > start]
            return [(_span(group[0][0], group[-1][0]), [score for _, score in group]) for group in groups]
        values: dict[str, list[float]] = {}
        for value, score in scored:
            values.setdefault(show_value(value), []).append(score)
        return sorted(values.items(), key=lambda item: self._place(key, item[0]))

    def _place(self, key: str, shown: str) -> int:
        values = self.config.space[key]
        assert not isinstance(values, Range)
        return [show_value(value) for value in values.values].index(shown)


def write_result(result: SweepResult, out: Path) -> None:
    """Leave sweep.json, sweep.csv and sweep.md in a folder."""
    header, rows = result.table(None)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    title = f"# Sweep of {result.config.recipe}"
    atomic.write_file(out / "sweep.csv", text.getvalue().encode())
    atomic.write_file(out / "sweep.md", ("\n".join([title, "", *result.lines(markdown=True)]) + "\n").encode())
    atomic.write_json(out / "sweep.json", result.to_dict())


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table for a terminal."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in (header, *rows)]
    return ["  ".join(line).rstrip() for line in lines]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in line] for line in (header, *rows)]
    lines = [f"| {' | '.join(line)} |" for line in cells]
    return [lines[0], f"|{'---|' * len(header)}", *lines[1:]]


def _span(low: Any, high: Any) -> str:
    return show_value(low) if low == high else f"{show_value(low)} to {show_value(high)}"


def _number(value: float | None, digits: int | None = 4) -> str:
    if value is None:
        return "-"
    return repr(value) if digits is None else f"{value:.{digits}f}"
