"""What runs on a worker of a cluster: one unit of an extraction job, by an encoder that each process loads once.

It knows nothing of how workers come to be; extract/cluster.py does.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

import torch

from cache_schema.errors import StoreMismatchError
from cache_schema.reader import num_cores
from extract.job import Job, Unit, commit_unit, pick_device, unit_rates
from extract.tasks import ImageTask, Task


@dataclass(frozen=True)
class Assignment:
    """What every worker is told of a job. Plain values: the model is loaded where it runs.

    Args:
        topic: under which to report.
        task: with absolute paths, which mean the same on every worker.
        fingerprint: of the store that is to come of it.
        libraries: versions it is to be made with.
        device: where to compute; with `auto`, worker k of a machine takes the k-th of its CUDA devices.
        workers_per_host: how many workers share the cores of a machine.
    """

    topic: str
    task: Task
    fingerprint: str
    libraries: Mapping[str, str]
    device: str = "auto"
    workers_per_host: int = 1


@dataclass(frozen=True)
class UnitReport:
    """What became of one unit.

    Args:
        num_items: rows or prompts of the unit.
        worker: address of the worker; one that was started again has another.
        seconds: how long it took; 0 where the unit was done already.
        opening_s: how long it took before that to load the encoder; 0 where it was loaded already.
        rates: what the unit's receipt says of the work.
    """

    unit: int
    num_items: int
    num_failures: int
    worker: str
    seconds: float = 0.0
    opening_s: float = 0.0
    rates: Mapping[str, float | str] = field(default_factory=dict)


def extract_unit(assignment: Assignment, unit: Unit) -> None:
    """Encode and publish one unit, unless its receipt says that this was done before.

    It returns nothing, for what a worker holds is lost with it: a `UnitReport`, as a dict, goes to whoever listens.

    Raises:
        UsageError: a mistake of the user's; there is no sense in trying again.
    """
    from distributed import get_worker

    worker = get_worker()
    try:
        job, opening_s = _open_job.get(assignment, worker.name)
        report = _extract(job, unit, worker.address)
    except Exception as error:
        error.add_note(f"on worker {worker.name} of {socket.gethostname()}")
        raise
    worker.log_event(assignment.topic, asdict(replace(report, opening_s=opening_s)))


def _extract(job: Job, unit: Unit, worker: str) -> UnitReport:
    if job.writer.is_done(unit.name):
        return UnitReport(unit.number, len(unit.rows), 0, worker)
    started = time.perf_counter()
    (encoded,) = job.encode([unit])
    rates = unit_rates(job, encoded, time.perf_counter() - started)
    receipt = commit_unit(job, encoded, rates)
    seconds = time.perf_counter() - started
    return UnitReport(unit.number, len(unit.rows), len(receipt.failures), worker, seconds, rates=rates)


class _OpenJob:
    """The job this process has open, if any. Threads that ask for the same one at once open it once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._assignment: Assignment | None = None
        self._job: Job | None = None

    def get(self, assignment: Assignment, worker: object) -> tuple[Job, float]:
        """The job, opened if it is another than the last time, and the seconds that took.

        Raises:
            UsageError: it cannot be opened here.
            StoreMismatchError: here it would make another store.
        """
        with self._lock:
            if self._job is not None and self._assignment == assignment:
                return self._job, 0.0
            started = time.perf_counter()
            self._job = None  # its memory is needed for the next
            job = _open(assignment, worker)
            self._assignment, self._job = assignment, job
            return job, time.perf_counter() - started


_open_job = _OpenJob()


def _open(assignment: Assignment, worker: object) -> Job:
    num_own = max(1, num_cores() // assignment.workers_per_host)
    torch.set_num_threads(num_own)  # dask gives its workers one
    task = assignment.task
    if isinstance(task, ImageTask) and task.config.decode_threads is None:
        task = replace(task, config=replace(task.config, decode_threads=num_own))
    job = task.open(_device_of(worker, assignment.device))
    header = job.writer.header
    if header.fingerprint != assignment.fingerprint:
        raise StoreMismatchError(
            f"worker {worker} on {socket.gethostname()} would make {job.writer.path.name}, and the job is to make one "
            f"with fingerprint {assignment.fingerprint[:12]}: encoder or samples differ there; give every worker the "
            "same files."
        )
    if differing := _differing(assignment.libraries, header.recorded["libraries"]):
        raise StoreMismatchError(
            f"worker {worker} on {socket.gethostname()} has other library versions than where the job was started "
            f"({differing}); give every worker the same environment."
        )
    return job


def _differing(wanted: Mapping[str, str], here: Mapping[str, str]) -> str:
    """Libraries whose versions differ by more than the build, which is what follows a plus sign."""
    pairs = {name: (version, here.get(name, "none")) for name, version in wanted.items()}
    return ", ".join(
        f"{name} {found} instead of {version}"
        for name, (version, found) in pairs.items()
        if version.partition("+")[0] != found.partition("+")[0]
    )


def _device_of(worker: object, device: str) -> str:
    """Workers of one machine have numbers for names; where they see several CUDA devices, each takes its own."""
    num_devices = torch.cuda.device_count()
    if device == "auto" and num_devices > 1 and isinstance(worker, int):
        return f"cuda:{worker % num_devices}"
    return pick_device(device)
