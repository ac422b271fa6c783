"""The most memory that a piece of work takes."""

from __future__ import annotations

import contextlib
import gc
import mmap
import threading
from pathlib import Path

import psutil

_PERIOD_S = 0.01
_CLEAR_PEAK = "5"


class PeakMemory:
    """How far this process's resident memory rises inside a `with` block above what it is at its beginning.

    The kernel's own high-water mark, where it can be set back (Linux), or else what is seen every hundredth of a
    second.
    """

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self._before = _resident_bytes()
        self._seen = [self._before]
        self._stop = threading.Event()
        self._watcher: threading.Thread | None = None
        try:
            Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK)
        except OSError:
            self._watcher = threading.Thread(target=self._watch, name="memory", daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._watcher is None:
            self._seen.append(_high_water_bytes())
        else:
            self._watcher.join()

    @property
    def num_bytes(self) -> int:
        """Known once the block is left: whole pages, and one at the least."""
        return max(mmap.PAGESIZE, max(self._seen) - self._before)

    def _watch(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            with contextlib.suppress(psutil.Error):
                self._seen.append(_resident_bytes())


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def _high_water_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("this kernel does not tell how much memory was in use at most")
