"""The workers of a cluster as the progress line shows them: who is there, and how fast each of them is."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from extract.cluster_worker import UnitReport
from extract.stages import STAGES, StageRates

_LISTED = 3
"""Rates of so many workers are listed one by one; of more, the lowest and the highest."""


@dataclass
class _Record:
    """What a worker did: from when to when, and how long each stage was at work on how many items."""

    first_s: float
    last_s: float
    num_items: int = 0

    @property
    def rate(self) -> float:
        return self.num_items / max(self.last_s - self.first_s, 1e-9)


@dataclass
class Crew:
    """Adds up reports. Workers are known by address, so one that is started again begins anew."""

    _records: dict[str, _Record] = field(default_factory=dict)
    _present: frozenset[str] | None = None
    _stage_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _stage_items: Counter[str] = field(default_factory=Counter)
    _num_failures: int = 0

    def report(self, report: UnitReport) -> None:
        """Take in what became of a unit, now."""
        self._num_failures += report.num_failures
        if not report.seconds:
            return
        now = time.monotonic()
        record = self._records.setdefault(report.worker, _Record(now - report.seconds, now))
        record.last_s = now
        record.num_items += report.num_items
        for stage in STAGES:
            if stage in report.rates:
                self._stage_items[stage] += report.num_items
                self._stage_s[stage] += report.num_items / float(report.rates[stage])

    def look(self, workers: Iterable[str]) -> str | None:
        """Take in who is there; say in a line what changed."""
        present = frozenset(workers)
        before, self._present = self._present, present
        if before is None:
            return None if present else "no worker is there yet; waiting."
        came, lost = len(present - before), len(before - present)
        if not came and not lost:
            return None
        changes = [
            f"{num} {'worker' if num == 1 else 'workers'} {what}"
            for num, what in ((lost, "lost"), (came, "came"))
            if num
        ]
        return f"{' and '.join(changes)}; {len(present)} at work."

    @property
    def num_present(self) -> int:
        """How many were there at the last look."""
        return len(self._present or ())

    def summary(self) -> str:
        """Short, for the end of a progress line."""
        rates = [record.rate for worker, record in self._records.items() if worker in (self._present or ())]
        parts = [f"{self.num_present} worker{'' if self.num_present == 1 else 's'}"]
        if 0 < len(rates) <= _LISTED:
            parts[0] += f" ({', '.join(f'{rate:.3g}' for rate in rates)}/s)"
        elif rates:
            parts[0] += f" ({min(rates):.3g} to {max(rates):.3g}/s)"
        if binds := self.stages().binds:
            parts.append(f"{binds} binds")
        if self._num_failures:
            parts.append(f"{self._num_failures} failed")
        return ", ".join(parts)

    def stages(self) -> StageRates:
        """What each stage would do in a second on all workers if nothing else held it up.

        A worker's mean rate, times how many workers there were on average.
        """
        if not self._records:
            return StageRates({})
        records = self._records.values()
        whole_s = max(record.last_s for record in records) - min(record.first_s for record in records)
        num_workers = sum(record.last_s - record.first_s for record in records) / whole_s
        return StageRates(
            {
                stage: num_workers * self._stage_items[stage] / self._stage_s[stage]
                for stage in STAGES
                if self._stage_s[stage]
            }
        )
