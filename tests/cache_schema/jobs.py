"""Write jobs as the tests start them, and what may be found on the disk whatever became of them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cache_schema.atomic import TEMPORARY_SUFFIX
from cache_schema.receipts import Receipt
from cache_schema.store import open_store
from cache_schema.verify import verify_store
from tests.cache_schema import write_job


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file that has its final name, by key."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != TEMPORARY_SUFFIX
    }


def without_rates(data: bytes) -> Any:
    return {**json.loads(data), "rates": None}


def leftovers_of(folder: Path) -> list[Path]:
    """Every file or folder in the making."""
    return list(folder.rglob(f"*{TEMPORARY_SUFFIX}"))


def assert_nothing_half(folder: Path, undisturbed: Mapping[str, bytes]) -> int:
    """Whatever has its final name is whole, and a receipt has all its files; return how many receipts there are."""
    files, num_receipts = files_of(folder), 0
    for key, data in files.items():
        _, is_receipt, unit = key.rpartition("/receipts/")
        if is_receipt:
            assert without_rates(data) == without_rates(undisturbed[key]), key
            store = Path(key).parts[0]
            assert all(f"{store}/{file}" in files for file in Receipt.parse(data, unit).files)
            num_receipts += 1
        else:
            assert data == undisturbed[key], key
    complete = any(key.endswith("/manifest.json") for key in files)
    assert not complete or files.keys() == undisturbed.keys()
    return num_receipts


def assert_equal_to(folder: Path, undisturbed: Path) -> None:
    """Both hold the same store, complete and sound."""
    (store,), (reference,) = (list(path.glob("*.zarr")) for path in (folder, undisturbed))
    assert open_store(store).manifest == open_store(reference).manifest
    assert verify_store(store).is_sound
    assert_nothing_half(folder, files_of(undisturbed))


class Job:
    """A process that fills a store; it waits until it is told to begin."""

    def __init__(self, folder: Path, num_units: int) -> None:
        command = [sys.executable, write_job.__file__, str(folder), str(num_units)]
        self._process = subprocess.Popen(
            command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert self._process.stdout is not None
        self._lines = self._process.stdout
        assert self._lines.readline() == "ready\n"

    def begin(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def wait_for_units(self, num_units: int) -> None:
        """Return when that many more units are committed, or the job has ended."""
        for _ in range(num_units):
            self._lines.readline()

    def kill(self) -> bool:
        """Whether it was still running."""
        self._process.kill()
        self._process.communicate()
        return self._process.returncode == -signal.SIGKILL

    def end(self) -> tuple[int, list[str], str]:
        """Let it end: its exit code, the units it named since, and what it said on stderr."""
        out, err = self._process.communicate(timeout=60)
        return self._process.returncode, out.split(), err


def run_job(folder: Path, num_units: int) -> tuple[int, list[str], str]:
    """Begin a job and let it end."""
    job = Job(folder, num_units)
    job.begin()
    return job.end()
