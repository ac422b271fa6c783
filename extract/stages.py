"""The stages of an extraction job, how long each was at work, and which of them binds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

STAGES = ("decode", "preprocess", "forward", "copy", "write")
"""In the order in which an item goes through them."""


_SHARING = ("decode", "preprocess")


@dataclass(frozen=True)
class StageRates:
    """What each stage would do in a second if nothing else held it up: items over seconds at work, times its workers.

    `binds` is the slowest of them: the others wait for it. Decoding and preprocessing share their threads, so the
    slower of the two binds where both together are slowest.
    """

    rates: Mapping[str, float]

    @property
    def binds(self) -> str | None:
        if not self.rates:
            return None
        together = 1 / sum(1 / self.rates[stage] for stage in _SHARING if stage in self.rates) if self._share else None
        alone = {stage: rate for stage, rate in self.rates.items() if together is None or stage not in _SHARING}
        slowest = min(alone, key=alone.__getitem__, default=None)
        if together is not None and (slowest is None or together < alone[slowest]):
            return min(_SHARING, key=self.rates.__getitem__)
        return slowest

    @property
    def _share(self) -> bool:
        return all(stage in self.rates for stage in _SHARING)

    def to_dict(self) -> dict[str, float]:
        """Rates by stage, to four digits."""
        return {stage: float(f"{rate:.4g}") for stage, rate in self.rates.items()}

    def __str__(self) -> str:
        parts = [
            f"{stage} {_rounded(rate)}/s{' (binds)' if stage == self.binds else ''}"
            for stage, rate in self.rates.items()
        ]
        return ", ".join(parts)


@dataclass
class _Work:
    seconds: float = 0.0
    num_items: int = 0


class StageClock:
    """Adds up the work of each stage, from any number of threads.

    Args:
        workers: how many threads each stage has; one for a stage that is not named.
    """

    def __init__(self, workers: Mapping[str, int] | None = None) -> None:
        self._workers = dict(workers or {})
        self._lock = threading.Lock()
        self._total = {stage: _Work() for stage in STAGES}
        self._lap = {stage: _Work() for stage in STAGES}

    @contextmanager
    def at_work(self, stage: str, num_items: int = 1) -> Iterator[None]:
        """Count what happens inside as work of one stage on so many items."""
        started = time.perf_counter()
        try:
            yield
        finally:  # an image that cannot be decoded took its time too
            self.add(stage, time.perf_counter() - started, num_items)

    def add(self, stage: str, seconds: float, num_items: int = 1) -> None:
        """Count so many seconds as work of one stage."""
        with self._lock:
            for work in (self._total[stage], self._lap[stage]):
                work.seconds += seconds
                work.num_items += num_items

    def rates(self) -> StageRates:
        """The rates since the beginning."""
        with self._lock:
            return self._rates_of(self._total)

    def lap(self) -> StageRates:
        """The rates since the last lap; those since the beginning for a stage that was not at work in it."""
        with self._lock:
            rates = {**self._rates_of(self._total).rates, **self._rates_of(self._lap).rates}
            self._lap = {stage: _Work() for stage in STAGES}
        return StageRates({stage: rates[stage] for stage in STAGES if stage in rates})

    def _rates_of(self, works: Mapping[str, _Work]) -> StageRates:
        return StageRates(
            {
                stage: work.num_items * self._workers.get(stage, 1) / work.seconds
                for stage, work in works.items()
                if work.num_items and work.seconds > 0
            }
        )


def _rounded(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
