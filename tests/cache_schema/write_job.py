"""A job that fills one store as extraction does, with values that nothing but the row numbers decides.

python write_job.py FOLDER NUM_UNITS
    says "ready" once all is imported, waits for a line, fills a store under FOLDER, names every unit it committed
python write_job.py FOLDER NUM_UNITS every_moment
    fills stores under FOLDER/1, FOLDER/2, ... in forked processes, the n-th of which kills itself at the n-th
    moment at which it is about to change anything on the disk; ends with the first that gets through, and says how
    many were killed
"""

from __future__ import annotations

import os
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_schema.errors import NoRoomError
from cache_schema.layout import ArrayLayout
from cache_schema.receipts import Failure, Manifest
from cache_schema.store import StaticArray, StoreHeader, StoreWriter

UNIT_ROWS = 8

_ROWS_SHORT = 3  # the last shard of every array is a partial one
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_FSYNC = "write_job.fsync"
_CHANGES = {_FSYNC, "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def make_writer(folder: Path, num_units: int) -> StoreWriter:
    """The writer of a store with one row in a chunk, with several, and with all rows of a shard in one."""
    num_rows = num_units * UNIT_ROWS - _ROWS_SHORT
    layouts = [
        ArrayLayout("features/last", (num_rows, 2, 3, 8), np.dtype(np.float16), 1, UNIT_ROWS, tuple("vhwc")),
        ArrayLayout("cls/last", (num_rows, 8), np.dtype(np.float32), UNIT_ROWS // 2, UNIT_ROWS, tuple("vc")),
        ArrayLayout("valid", (num_rows,), np.dtype(np.bool_), UNIT_ROWS, UNIT_ROWS, tuple("v")),
    ]
    static = StaticArray("offsets", np.arange(num_rows + 1, dtype=np.int64), ("start",))
    header = StoreHeader("image_features", {"encoder": "none", "num_rows": num_rows}, {"libraries": {"numpy": "2"}})
    return StoreWriter(folder, header, layouts, [static])


def encode(unit: int, rows: range) -> dict[tuple[str, int], NDArray[Any]]:
    """The shards of a unit."""
    rng = np.random.default_rng(unit)
    return {
        ("features/last", unit): rng.standard_normal((len(rows), 2, 3, 8)).astype(np.float16),
        ("cls/last", unit): rng.standard_normal((len(rows), 8), np.float32),
        ("valid", unit): rng.random(len(rows)) < 0.5,
    }


def fill(folder: Path, num_units: int, committed: Callable[[str], None] = lambda unit: None) -> Manifest:
    """Do what of the job is not done yet."""
    writer = make_writer(folder, num_units)
    writer.begin()
    num_rows = writer.layouts["valid"].num_rows
    units = {f"{unit:06d}": range(unit * UNIT_ROWS, min((unit + 1) * UNIT_ROWS, num_rows)) for unit in range(num_units)}
    pending = [unit for unit in units if not writer.is_done(unit)]
    for unit in pending:
        rows = units[unit]
        failures = [Failure(rows.start, f"row {rows.start}", "none")] if int(unit) % 3 == 0 else []
        rates = {"process": os.getpid()}  # as measured rates are, another each time
        writer.commit(unit, (rows.start, rows.stop), encode(int(unit), rows), failures, rates)
        committed(unit)
    return writer.finish(units)


def fill_when_told(folder: Path, num_units: int) -> int:
    """Fill a store once a line comes in on stdin; return the exit code that `headstart` has for what happened."""
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        fill(folder, num_units, lambda unit: print(unit, flush=True))
    except NoRoomError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def die_at_every_moment(folder: Path, num_units: int) -> int:
    """Fork processes that are killed one moment later each time; return how many were, before one got through."""
    for moment in range(1, 1000):
        pid = os.fork()
        if not pid:
            die_at(moment)
            fill(folder / str(moment), num_units)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != -signal.SIGKILL:
            return moment - 1
    raise AssertionError("a job that never ends")


def die_at(moment: int) -> None:
    """From now on, kill this process the `moment`-th time it is about to change anything on the disk.

    A file that the disk was not asked to keep loses its second half with it, as it may when the power is cut.
    """
    left = moment

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in _CHANGES or (event == "open" and arguments[2] & _WRITING):
            left -= 1
            if not left:
                if event == _FSYNC and stat.S_ISREG(os.fstat(arguments[0]).st_mode):
                    os.truncate(f"/proc/self/fd/{arguments[0]}", os.fstat(arguments[0]).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = lambda descriptor: sys.audit(_FSYNC, descriptor)  # nothing is waited for
    sys.addaudithook(count)


if __name__ == "__main__":
    where, units = Path(sys.argv[1]), int(sys.argv[2])
    if sys.argv[3:] == ["every_moment"]:
        print(die_at_every_moment(where, units))
    else:
        sys.exit(fill_when_told(where, units))
