"""An extraction job on a cluster: dask places units of work on workers, and nothing else.

Workers open the job themselves, encode whole shards and publish them; receipts say what is done. So it does no harm
that dask runs a unit twice, loses a worker, or forgets what it knew.
"""

from __future__ import annotations

import hashlib
import queue
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from cache_schema.atomic import StorePath
from cache_schema.containers import RECEIPTS
from cache_schema.errors import UsageError
from cache_schema.store import StoreWriter
from extract.cluster import ALLOWED_DEATHS, RunningCluster, say
from extract.cluster_worker import Assignment, UnitReport, extract_unit
from extract.crew import Crew
from extract.job import Extraction, Job, Unit, find_finished, library_versions, pending_units, require_room, units_of
from extract.tasks import ImageTask, Task, TextTask

if TYPE_CHECKING:
    from distributed import Client, Future

_ATTEMPTS = 4
"""How often a unit is tried that ends in an error."""

_LOOK_S = 2.0
"""How often to look who is at work."""

_RECEIPTS_S = 120.0
"""A network filesystem may show late what another machine wrote."""


def run_on_cluster(tasks: Sequence[Task], cluster: RunningCluster, *, overcommit: bool = False) -> list[Extraction]:
    """Do every unit of each job that has no honoured receipt, one job after the other. This process encodes nothing.

    All jobs are opened before the first begins. It is safe to kill, to repeat, and to run twice at once, as
    `extract.job.run_job` is.

    Raises:
        UsageError: an input is missing, here or where a worker runs; workers have other files or libraries than this
            machine; or a unit failed again and again.
        NoRoomError: the disk has too little room.
    """
    tasks = [_absolute(task) for task in tasks]
    jobs = [task.open("cpu") for task in tasks]
    return [_run(task, job, cluster, overcommit) for task, job in zip(tasks, jobs, strict=True)]


def _run(task: Task, job: Job, cluster: RunningCluster, overcommit: bool) -> Extraction:
    started = time.perf_counter()
    if (finished := find_finished(job)) is not None:
        return finished
    units = units_of(job)
    pending = pending_units(job, units)
    num_pending = sum(len(unit.rows) for unit in pending)
    num_reused = job.num_items - num_pending
    if not overcommit:
        require_room(job.writer, num_pending / max(1, job.num_items))
    job.encode(pending).close()  # what is wrong from the beginning is said before there are workers
    job.writer.begin()
    crew = Crew()
    if pending:
        assignment = Assignment(
            topic=_topic_of(job.writer.path),
            task=task,
            fingerprint=job.writer.header.fingerprint,
            libraries=library_versions(),
            device=cluster.device,
            workers_per_host=cluster.workers_per_host,
        )
        bar = tqdm(total=job.num_items, initial=num_reused, desc=job.label, unit=job.noun)
        with bar, closing(_Shift(assignment, cluster, crew)) as shift:
            shift.work(pending, bar)
        _await_receipts(job.writer, [unit.name for unit in units])
    manifest = job.writer.finish(unit.name for unit in units)
    seconds = time.perf_counter() - started
    return Extraction(job.writer.path, num_pending, num_reused, manifest.num_failures, seconds, crew.stages())


def _topic_of(store: StorePath) -> str:
    """What a store is called on the scheduler. Jobs on one store that share a scheduler have their units done once."""
    return f"{store.stem}-{hashlib.sha256(str(store).encode()).hexdigest()[:8]}"


def _absolute(task: Task) -> Task:
    """The same task in words that mean the same in any process."""
    if isinstance(task, ImageTask):
        images = replace(
            task.config,
            samples=_absolute_path(task.config.samples),
            out=_absolute_path(task.config.out),
            image_dir=None if task.config.image_dir is None else task.config.image_dir.absolute(),
        )
        image_encoder = replace(task.encoder, **_absolute_sources(task.encoder.source, task.encoder.adapter))
        return replace(task, config=images, encoder=image_encoder)
    if isinstance(task, TextTask):
        prompts = replace(task.config, samples=_absolute_path(task.config.samples), out=_absolute_path(task.config.out))
        text_encoder = replace(task.encoder, **_absolute_sources(task.encoder.source, task.encoder.adapter))
        return replace(task, config=prompts, encoder=text_encoder)
    return task


def _absolute_sources(source: str, adapter: str | None) -> dict[str, Any]:
    """A source that is no folder here is a hub id."""
    return {
        "source": str(Path(source).absolute()) if Path(source).exists() else source,
        "adapter": None if adapter is None else str(Path(adapter).absolute()),
    }


def _absolute_path(path: StorePath) -> StorePath:
    return path.absolute() if isinstance(path, Path) else path


class _Shift:
    """The units of one job on their way through a cluster. After `close` no more of them are begun."""

    def __init__(self, assignment: Assignment, cluster: RunningCluster, crew: Crew) -> None:
        self._assignment = assignment
        self._cluster = cluster
        self._crew = crew
        self._client: Client = cluster.client
        self._ended: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._under_way: dict[Future, Unit] = {}
        self._num_errors: Counter[int] = Counter()
        self._num_deaths: Counter[int] = Counter()
        self._events: queue.SimpleQueue[tuple[float, dict[str, Any]]] = queue.SimpleQueue()
        self._client.subscribe_topic(assignment.topic, self._events.put)

    def work(self, units: Iterable[Unit], bar: tqdm) -> None:
        """Have units done.

        Raises:
            UsageError: one of them cannot be done.
        """
        for unit in units:
            self._submit(unit)
        next_look_s = 0.0
        while self._under_way:
            if time.monotonic() >= next_look_s:
                self._look()
                next_look_s = time.monotonic() + _LOOK_S
            with suppress(queue.Empty):
                future = self._ended.get(timeout=_LOOK_S)
                unit = self._under_way.pop(future)
                try:
                    is_done = self._is_done(future, unit)
                finally:
                    future.release()  # else the same unit could not be submitted anew
                if is_done:
                    self._read_reports()
                    bar.set_postfix_str(self._crew.summary(), refresh=False)
                    bar.update(len(unit.rows))
                else:
                    self._submit(unit)

    def close(self) -> None:
        """Withdraw what is not done yet."""
        if self._client.status == "running":
            self._client.cancel(list(self._under_way))
            self._client.unsubscribe_topic(self._assignment.topic)

    def _submit(self, unit: Unit) -> None:
        num_before = self._num_errors[unit.number] + self._num_deaths[unit.number]
        key = f"{self._assignment.topic}-{unit.name}{f'-{num_before}' if num_before else ''}"
        future = self._client.submit(extract_unit, self._assignment, unit, key=key, pure=False)
        self._under_way[future] = unit
        future.add_done_callback(self._ended.put)

    def _is_done(self, future: Future, unit: Unit) -> bool:
        """Whether a unit that ended is done, or else is to be tried again.

        Raises:
            UsageError: there is no sense in that.
        """
        from distributed import KilledWorker

        if future.cancelled():
            raise self._cluster.lost()
        if future.status != "error":
            return True
        error = future.exception()
        if isinstance(error, UsageError):
            raise error
        what = f"unit {unit.name} of {self._assignment.topic.rpartition('-')[0]}"
        if isinstance(error, KilledWorker):
            self._num_deaths[unit.number] += error.allowed_failures + 1
            num_deaths = self._num_deaths[unit.number]
            if num_deaths > ALLOWED_DEATHS:  # the scheduler of somebody else may give up before
                raise UsageError(
                    f"{what} was under way on {num_deaths} workers that died. Look at their logs for what kills them, "
                    "such as too little memory, and run the same command again to go on."
                ) from error
        else:
            self._num_errors[unit.number] += 1
            if self._num_errors[unit.number] == _ATTEMPTS:
                where = "".join(f", {note}" for note in getattr(error, "__notes__", ()))
                raise UsageError(
                    f"{what} failed {_ATTEMPTS} times, at last with {type(error).__name__}: {error}{where}. Mend that, "
                    "and run the same command again to go on."
                ) from error
        return False

    def _read_reports(self) -> None:
        with suppress(queue.Empty):
            while True:
                _, report = self._events.get_nowait()
                self._crew.report(UnitReport(**report))

    def _look(self) -> None:
        """Say who came and who was lost.

        Raises:
            UsageError: nobody is there, because SLURM takes no jobs.
        """
        workers = self._cluster.workers()
        if line := self._crew.look(workers):
            say(line)
        for reason in self._cluster.refusals():
            if not workers:
                raise UsageError(f"SLURM refused a job ({reason.rstrip('.')}); mend the file of --slurm-options.")
            say(f"SLURM refused a job: {reason}")


def _await_receipts(writer: StoreWriter, units: Sequence[str], wait_s: float = _RECEIPTS_S) -> None:
    """Wait until the receipts of all units are to be seen from here.

    Raises:
        UsageError: some are not to be seen, though workers wrote them.
    """
    give_up_s = time.monotonic() + wait_s
    while missing := {f"{unit}.json" for unit in units} - {path.name for path in (writer.path / RECEIPTS).iterdir()}:
        if time.monotonic() > give_up_s:
            raise UsageError(
                f"workers published all of {writer.path.name}, but {len(missing)} receipts are not to be seen in "
                f"{writer.path}: it is not the same folder on every machine; choose an --out that all of them share."
            )
        time.sleep(1.0)
