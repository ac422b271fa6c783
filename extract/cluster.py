"""The cluster of an extraction job: processes of this machine, SLURM jobs, or a dask scheduler that is there.

It knows nothing of what workers do; extract/cluster_job.py does. dask is imported when a cluster starts.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tqdm import tqdm

from cache_schema.errors import UsageError, unknown_name
from extract.slurm import (
    WORKER_THREADS,
    SlurmOptions,
    certificates,
    make_slurm_cluster,
    read_slurm_options,
    require_slurm,
)

if TYPE_CHECKING:
    from distributed import Client

ALLOWED_DEATHS = 100
"""With how many dying workers a unit may have been before it is held to be what kills them. All that a worker has
under way is blamed for its end, and where workers are preempted that says nothing."""

_KINDS = ("local:N", "slurm", "tcp://HOST:PORT", "tls://HOST:PORT")
_LOOPBACK = "127.0.0.1"
_DASHBOARD_PORT = 8787
_CONNECT_S = 30
_MEND_S = 2.0

_WORKER_SETTINGS = {
    # Features are not dask's data: it could spill none of them, and a worker that pauses because of them stays so.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.profile.enabled": False,
    "distributed.comm.timeouts.connect": "60s",
    "distributed.comm.timeouts.tcp": "60s",
    "distributed.admin.tick.limit": "30s",
}
_SETTINGS = {
    **_WORKER_SETTINGS,
    "distributed.comm.timeouts.connect": "10s",  # so long a result is sought on a worker that has just died
    "distributed.deploy.lost-worker-timeout": "60s",  # a worker that is started again may be long in coming
    "distributed.scheduler.allowed-failures": ALLOWED_DEATHS,
    "distributed.scheduler.unknown-task-duration": "30s",
    "distributed.scheduler.worker-saturation": 1.0,  # no unit waits on a worker, which would be blamed on it too
    "distributed.scheduler.worker-ttl": "15 minutes",  # loading and compiling a model may keep a worker from answering
}


@dataclass(frozen=True)
class ClusterSpec:
    """Where workers come from: so many processes of this machine, SLURM, or a scheduler's address."""

    num_local: int = 0
    slurm: SlurmOptions | None = None
    address: str = ""

    @classmethod
    def parse(cls, text: str, slurm_options: Path | None = None) -> ClusterSpec:
        """Parse `local:N`, `slurm`, `tcp://host:port` or `tls://host:port`.

        Args:
            slurm_options: the TOML file that `slurm` needs.

        Raises:
            UsageError: it is none of them, or there is something wrong with the file.
        """
        if text == "slurm":
            if slurm_options is None:
                raise UsageError("slurm needs a file of options: name it with --slurm-options, see docs/clusters.md.")
            return cls(slurm=read_slurm_options(slurm_options))
        if slurm_options is not None:
            raise UsageError(f"the cluster is {text!r}, and --slurm-options goes with slurm; leave it out.")
        kind, _, number = text.partition(":")
        if kind == "local":
            if not (number.isascii() and number.isdecimal() and int(number)):
                raise UsageError(f"the cluster is {text!r}; say how many workers there are to be, such as local:2.")
            return cls(num_local=int(number))
        if kind in ("tcp", "tls"):
            if not _is_address(text):
                raise UsageError(f"the cluster is {text!r}; give host and port, such as {kind}://host:8786.")
            return cls(address=text)
        raise unknown_name("cluster", text, _KINDS)


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return bool(parts.hostname and parts.port) and not parts.path
    except ValueError:  # the port is no number
        return False


@contextmanager
def start_cluster(spec: ClusterSpec, *, device: str = "auto") -> Iterator[RunningCluster]:
    """A cluster that lasts as long as the `with` block. It starts with the first job that has work for it.

    Args:
        device: where workers compute; with `auto`, each of a machine's workers takes a CUDA device of its own.
    """
    with ExitStack() as stack:
        yield RunningCluster(spec, device, stack)


class RunningCluster:
    """Workers, and the client that speaks with their scheduler. Make one with `start_cluster`."""

    def __init__(self, spec: ClusterSpec, device: str, stack: ExitStack) -> None:
        self.device = device
        self._spec = spec
        self._stack = stack
        self._refusals: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._stop_mending = threading.Event()

    @cached_property
    def client(self) -> Client:
        """Starts the cluster when it is first asked for.

        Raises:
            UsageError: no scheduler answers, or no jobs can be submitted from here.
        """
        if self._spec.slurm is not None:
            require_slurm()
        import dask
        from distributed import Client

        self._stack.enter_context(dask.config.set(_SETTINGS))
        cluster = self._make_cluster()
        try:
            client = Client(self._spec.address or cluster, set_as_default=False, timeout=_CONNECT_S)
        except OSError as error:
            raise UsageError(
                f"no scheduler answers at {self._spec.address} ({error}); start one with `dask scheduler`, and workers "
                "with `dask worker`."
            ) from error
        self._stack.callback(client.close)
        dashboard = client.dashboard_link
        if cluster is not None:
            dashboard = f"http://{_LOOPBACK}:{cluster.scheduler.http_server.port}/status on {socket.gethostname()}"
        say(f"scheduler {client.scheduler.address}, dashboard {dashboard}")
        return client

    def _make_cluster(self) -> Any:
        """The cluster that is ours to start, if any."""
        if self._spec.address:
            return None
        dashboard = f"{_LOOPBACK}:{_free_port(_DASHBOARD_PORT)}"
        if self._spec.slurm is None:
            from distributed import LocalCluster, Security

            cluster = LocalCluster(
                n_workers=self._spec.num_local,
                threads_per_worker=WORKER_THREADS,
                host=_LOOPBACK,
                protocol="tls://",
                security=Security.temporary(),  # any user of this machine can reach its ports
                dashboard_address=dashboard,
                memory_limit=0,
                preload=["extract.local_worker"],
                silence_logs=logging.CRITICAL,
            )
        else:
            options = self._spec.slurm
            cluster = make_slurm_cluster(
                options,
                dashboard,
                _WORKER_SETTINGS,
                self._refusals.put,
                security=self._stack.enter_context(certificates(options.logs)) if options.tls else None,
                silence_logs=logging.CRITICAL,
            )
        self._stack.callback(cluster.close)
        self._stack.callback(self._stop_mending.set)
        if self._spec.slurm is not None:
            self._spec.slurm.scale(cluster)
        else:
            cluster.loop.add_callback(_mend, cluster, self._stop_mending)
        return cluster

    def workers(self) -> dict[str, Mapping[str, Any]]:
        """What the scheduler knows of each worker, by address.

        Raises:
            UsageError: the scheduler is gone.
        """
        try:
            return dict(self.client.scheduler_info(n_workers=-1)["workers"])
        except OSError as error:
            raise self.lost() from error

    @property
    def workers_per_host(self) -> int:
        """The largest number of workers that share a machine, as far as it is known."""
        if self._spec.address:
            return max([1, *Counter(worker["host"] for worker in self.workers().values()).values()])
        return max(1, self._spec.num_local)

    def refusals(self) -> list[str]:
        """Why jobs could not be submitted, since the last call."""
        reasons = []
        with suppress(queue.Empty):
            while True:
                reasons.append(self._refusals.get_nowait())
        return reasons

    def lost(self) -> UsageError:
        """The error for a scheduler that went away."""
        return UsageError(
            f"the scheduler {self._spec.address or 'of this job'} is gone. What was published stays: run the same "
            "command again, with a scheduler that is there, to go on."
        )


async def _mend(cluster: Any, stop: threading.Event) -> None:
    """Replace those of a local cluster's nannies that gave up, as they do when their worker dies while it starts."""
    from distributed import Status

    while not stop.is_set():
        for name in [name for name, nanny in cluster.workers.items() if nanny.status in (Status.closed, Status.failed)]:
            del cluster.workers[name]
        with suppress(Exception):  # the next nanny may fare no better
            await cluster
        await asyncio.sleep(_MEND_S)


def say(line: str) -> None:
    """Print a line beside the progress line."""
    tqdm.write(line, file=sys.stderr)


def _free_port(wanted: int) -> int:
    """The port, or 0 for any other if it is taken."""
    with socket.socket() as probe:
        try:
            probe.bind((_LOOPBACK, wanted))
        except OSError:
            return 0
    return wanted
