"""Processes that train one run after another, each on a cache that it opened by itself. They end with their parent."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cache_schema.errors import UsageError

if TYPE_CHECKING:
    from heads.residency import Residency
    from heads.runs import Training
    from heads.train_config import TrainConfig

_PATIENCE_S = 30.0
"""How long a process that was told to end may take to finish the file it is writing."""


@dataclass(frozen=True)
class Failure:
    """Why a run could not be trained; `trace` says where, if the fault is ours."""

    reason: str
    trace: str = ""


@dataclass(frozen=True)
class Workplace:
    """What every process is told.

    Args:
        stores: the arguments of `headstart.open_cache`.
        threads: how many threads torch may use in each process.
    """

    stores: Mapping[str, str | None]
    runs: Path
    residency: Residency
    threads: int


@dataclass
class _Worker:
    process: SpawnProcess
    config: TrainConfig
    place: int


def train_apart(
    configs: Sequence[TrainConfig], workplace: Workplace, num_processes: int
) -> Generator[tuple[TrainConfig, Training | Failure]]:
    """Train each config in one of several processes, and say of each what came of it, in the order in which they end.

    A run that fails, or whose process dies, ends no other. Closing the iterator ends all processes; what they were
    training goes on from its last state when it is asked for again.
    """
    waiting = deque(configs)
    team: dict[Connection, _Worker] = {}
    try:
        while waiting or team:
            while waiting and len(team) < num_processes:
                place = min(set(range(num_processes)) - {worker.place for worker in team.values()})
                with _signals_held():
                    connection, process = _start(workplace, place)
                    team[connection] = _Worker(process, waiting.popleft(), place)
                _tell(connection, team[connection].config)
            for ready in wait(list(team)):
                assert isinstance(ready, Connection)
                worker = team[ready]
                config, outcome = worker.config, _hear(ready, worker.process)
                if waiting and worker.process.is_alive():
                    worker.config = waiting.popleft()
                    _tell(ready, worker.config)
                else:
                    _tell(ready, None)
                    _end({ready: team.pop(ready)}, told=True)
                yield config, outcome
    finally:
        _end(team)


def _start(workplace: Workplace, place: int) -> tuple[Connection, SpawnProcess]:
    """A fresh process: one that was forked would share locks and threads with this one."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, workplace, place), name=f"sweep-{place}", daemon=True)
    process.start()
    theirs.close()
    return ours, process


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Let signals wait while a process is started, which begins with them blocked.

    SIGINT stays blocked there: Ctrl-C is for the parent, which ends all. Should another thread of ours take a signal
    meanwhile, the process still ends with us, as daemons do.
    """
    resource_tracker.ensure_running()  # it would unblock them
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _tell(connection: Connection, config: TrainConfig | None) -> None:
    with contextlib.suppress(OSError):  # it is dead, which is seen when it is listened to
        connection.send(config)


def _hear(connection: Connection, process: SpawnProcess) -> Training | Failure:
    try:
        outcome: Training | Failure = connection.recv()
    except (EOFError, OSError):
        process.join()
        how = "was killed" if process.exitcode == -signal.SIGKILL else f"ended with exit code {process.exitcode}"
        return Failure(f"its process {how}; if memory ran out, give fewer --processes or a smaller batch_size.")
    return outcome


def _end(team: Mapping[Connection, _Worker], *, told: bool = False) -> None:
    if not told:
        for worker in team.values():
            worker.process.terminate()
    for connection, worker in team.items():
        worker.process.join(_PATIENCE_S)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        connection.close()


def _work(connection: Connection, workplace: Workplace, place: int) -> None:
    """What a process does: train what it is told to until it is told None."""
    signal.signal(signal.SIGTERM, _stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    threading.Thread(target=_follow_parent, daemon=True).start()
    os.dup2(sys.stderr.fileno(), 1)  # stdout is the parent's alone
    import torch

    from headstart import api

    _take_gpu(place, torch.cuda.device_count())
    torch.set_num_threads(workplace.threads)
    cache = api.open_cache(**workplace.stores)  # type: ignore[arg-type]
    while (config := connection.recv()) is not None:
        outcome: Training | Failure
        with _silence():
            try:
                outcome = api.train(config, cache, workplace.runs, residency=workplace.residency)
            except UsageError as error:
                outcome = Failure(str(error))
            except Exception as error:  # noqa: BLE001  handed to the parent, which reports it
                outcome = Failure(f"{type(error).__name__}: {error}", traceback.format_exc())
        connection.send(outcome)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Show no progress bars: the parent draws one for all."""
    nowhere = Path(os.devnull).open("w")  # noqa: SIM115  closed below, after those that write to it
    with nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def _take_gpu(place: int, num_gpus: int) -> None:
    """Spread processes over the GPUs there are; torch must not have touched one yet."""
    if num_gpus > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(str(gpu) for gpu in range(num_gpus))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[place % num_gpus]


def _stop(*_: object) -> NoReturn:
    """SIGTERM unwinds what is being done, so that no half-written file stays behind."""
    raise SystemExit(128 + signal.SIGTERM)


def _follow_parent() -> None:
    """End when the parent does, however it ends: else a sweep that is started again would meet the old one's runs."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
