"""What a contender in reading is. Knows none of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from benchmarks.common import Library
from benchmarks.rows import Pass, Rows


@dataclass(frozen=True)
class Contender:
    """One way to read the rows.

    Attributes:
        name: what the report calls it.
        open: makes its copy of the rows if it needs one, opens that, and hands out the pass to time.
        library: what must be installed.
        shuffles: it reads every row once in a random order of its own, where others follow the given order.
        workers: the processes it reads with, besides this one. They keep files mapped, which no cold cache allows.
        note: how it is set up, or how much it reads, where that is not plain from the name.
    """

    name: str
    open: Callable[[Rows], AbstractContextManager[Pass]]
    library: Library | None = None
    shuffles: bool = False
    workers: int = 0
    note: str = ""

    @property
    def is_installed(self) -> bool:
        return self.library is None or self.library.is_installed
