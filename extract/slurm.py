"""Workers as SLURM jobs: the options a TOML file gives, and the batch script that comes of them.

Each job is one worker process with at most one GPU. docs/clusters.md has every option.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cache_schema.errors import UsageError, unknown_name

WORKER_THREADS = 2
"""Units a worker has under way at a time: one is decoded or written while another is in the encoder."""

_LONGEST_MARGIN_S = 300
_WALLTIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")
_MEMORY = re.compile(r"\d+(\.\d+)?\s*([kKMGT]i?)?B?")


@dataclass(frozen=True)
class SlurmOptions:
    """What to ask SLURM for.

    Args:
        walltime: of one job, as `sbatch --time` takes it.
        cores, memory: of one job.
        gpus: of one job, 1 or 0.
        gpu_type: as in `--gres=gpu:TYPE:1`.
        jobs: how many jobs to keep at work; or else `minimum` and `maximum`, as many as there is work for.
        directives: more lines of the script that begin with #SBATCH, such as `--constraint=a100`.
        prologue: commands that run before the worker.
        interface: network interface of scheduler and workers.
        python: interpreter of the workers, if not the one that runs this.
        local_directory: scratch folder of a node.
        log_directory: where jobs write their output, on a disk that all nodes see.
        scheduler_port: 0 for any.
        death_timeout_s: when a worker gives up that cannot reach the scheduler.
        tls: encrypt, and let nobody else in.
    """

    walltime: str
    memory: str
    cores: int = 4
    gpus: int = 1
    gpu_type: str | None = None
    partition: str | None = None
    account: str | None = None
    jobs: int | None = None
    minimum: int = 0
    maximum: int | None = None
    directives: tuple[str, ...] = ()
    prologue: tuple[str, ...] = ()
    interface: str | None = None
    python: str | None = None
    local_directory: str | None = None
    log_directory: str = "slurm-logs"
    scheduler_port: int = 0
    death_timeout_s: int = 120
    tls: bool = True

    def __post_init__(self) -> None:
        if not _MEMORY.fullmatch(self.memory):
            raise UsageError(f"memory is {self.memory!r}; give a number of bytes such as 32GB.")
        least = {"cores": 1, "gpus": 0, "minimum": 0, "scheduler_port": 0, "death_timeout_s": 1}
        least |= {name: 1 for name in ("jobs", "maximum") if getattr(self, name) is not None}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UsageError(f"{name} is {getattr(self, name)}; give a whole number of at least {value}.")
        if re.search(r"\s", self.log_directory):
            raise UsageError(f"log_directory is {self.log_directory!r}; give a folder without blanks in its path.")
        if self.gpus > 1:
            raise UsageError(f"gpus is {self.gpus}, and a worker uses one; take gpus = 1 and more jobs.")
        if (self.jobs is None) == (self.maximum is None):
            raise UsageError("give either jobs, or maximum (and minimum): how many workers there are to be.")
        if self.maximum is not None and self.minimum > self.maximum:
            raise UsageError(f"minimum is {self.minimum}, and maximum {self.maximum}; give a smaller minimum.")
        self.lifetime_s  # noqa: B018  refuses a walltime that is none

    @property
    def logs(self) -> Path:
        """The log directory, in words that mean the same on every node."""
        return Path(self.log_directory).resolve()

    @property
    def margin_s(self) -> int:
        """How long before the walltime workers stop: a tenth of it, and five minutes at the most."""
        return min(_LONGEST_MARGIN_S, _seconds(self.walltime) // 10)

    @property
    def lifetime_s(self) -> int:
        """Seconds after which a worker goes in peace, give or take half the margin.

        Raises:
            UsageError: the walltime is none.
        """
        return _seconds(self.walltime) - self.margin_s

    def scale(self, cluster: Any) -> None:
        """Have a cluster ask for its jobs, and for new ones in place of those that end."""
        if self.jobs is not None:
            cluster.scale(jobs=self.jobs)
        least, most = self.jobs or self.minimum, self.jobs or self.maximum
        cluster.adapt(
            minimum_jobs=least,
            maximum_jobs=most,
            interval="2s",
            wait_count=30,  # a minute without work
            target_duration="2 minutes",  # of work for each worker, before more of them are asked for
        )

    @property
    def all_directives(self) -> list[str]:
        """What the script asks for beyond what dask-jobqueue knows of. A job that was preempted is not to come back by
        itself: another one is submitted for it."""
        gpu = [f"--gres=gpu:{self.gpu_type}:1" if self.gpu_type else "--gres=gpu:1"] if self.gpus else []
        return ["--no-requeue", *gpu, *self.directives]


def read_slurm_options(path: Path) -> SlurmOptions:
    """Read a TOML file.

    Raises:
        UsageError: it is missing, is no TOML, or says something that has no meaning.
    """
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); see docs/clusters.md for an example.") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are
        raise UsageError(f"{path} is not TOML ({error}); see docs/clusters.md for an example.") from error
    known = {field.name: str(field.type) for field in fields(SlurmOptions)}
    for name, value in values.items():
        if name not in known:
            raise UsageError(f"{path}: {unknown_name('option', name, known)}")
        values[name] = _parse(f"{path}: {name}", value, known[name])
    if missing := [name for name in ("walltime", "memory") if name not in values]:
        raise UsageError(f"{path} lacks {' and '.join(missing)}; see docs/clusters.md for an example.")
    try:
        return SlurmOptions(**values)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


_KINDS: Mapping[str, tuple[type, str]] = {
    "str": (str, 'a string such as "x"'),
    "int": (int, "a whole number"),
    "bool": (bool, "true or false"),
    "tuple": (list, 'a list of strings such as ["x", "y"]'),
}


def _parse(where: str, value: Any, annotation: str) -> Any:
    """A value of the kind that a field of `SlurmOptions` has."""
    kind, wanted = _KINDS[re.split(r"\W", annotation)[0]]
    texts = value if isinstance(value, list) else [value]
    if type(value) is not kind or (kind is list and not all(isinstance(text, str) for text in texts)):
        raise UsageError(f"{where} is {value!r}; give {wanted}.")
    if any(isinstance(text, str) and ("\n" in text or not text.strip()) for text in texts):
        raise UsageError(f"{where} is {value!r}; give text on one line, or leave it out.")
    return tuple(texts) if kind is list else value


def _seconds(walltime: str) -> int:
    """What `sbatch --time` understands by minutes, minutes:seconds, hours:minutes:seconds, and days-hours:..."""
    match = _WALLTIME.fullmatch(walltime)
    if match is None:
        raise UsageError(f"walltime is {walltime!r}; give hours:minutes:seconds, such as 04:00:00.")
    parts = [int(part) for part in match["clock"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    total = ((int(match["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if not total:
        raise UsageError(f"walltime is {walltime!r}; give more than none.")
    return total


def require_slurm() -> None:
    """Make sure that jobs can be submitted from here.

    Raises:
        UsageError: they cannot.
    """
    if shutil.which("sbatch") is None:
        raise UsageError("there is no sbatch here; run this where SLURM jobs are submitted, or take --cluster local:N.")


@contextmanager
def certificates(folder: Path) -> Iterator[Any]:
    """A `distributed.Security` that lets in whoever can read a folder made under this one: its owner.

    The folder is gone when the `with` block is left.
    """
    from distributed import Security

    folder.mkdir(parents=True, exist_ok=True)
    made = Security.temporary().get_tls_config_for_role("worker")
    with TemporaryDirectory(prefix=".tls-", dir=folder) as name:
        certificate, key = Path(name, "cert.pem"), Path(name, "key.pem")
        certificate.write_text(made["cert"])
        key.write_text(made["key"])
        roles = ("scheduler", "worker", "client")
        yield Security(
            require_encryption=True,
            tls_ca_file=str(certificate),
            **{f"tls_{role}_cert": str(certificate) for role in roles},
            **{f"tls_{role}_key": str(key) for role in roles},
        )


def make_slurm_cluster(
    options: SlurmOptions,
    dashboard_address: str,
    worker_settings: Mapping[str, object],
    refused: Callable[[str], None],
    *,
    security: Any = None,
    silence_logs: int,
) -> Any:
    """A `dask_jobqueue.SLURMCluster` with no jobs yet. Its scheduler runs in this process.

    Args:
        worker_settings: dask's settings on the workers.
        refused: called, in another thread, with the reason when a job cannot be submitted.
        security: what `certificates` gives; None to let in everybody who can reach the scheduler.
    """
    from dask_jobqueue.slurm import SLURMCluster, SLURMJob
    from distributed import Status

    class SubmittedJob(SLURMJob):  # type: ignore[misc]
        async def start(self) -> None:
            try:
                await super().start()
            except (RuntimeError, ValueError, OSError) as error:
                self.status = Status.failed  # else closing the cluster trips over it
                refused(" ".join((str(error).partition("stderr:")[2] or str(error)).split()))
                raise

    local = options.local_directory
    return SLURMCluster(
        job_cls=SubmittedJob,
        name="headstart",
        job_name="headstart",
        queue=options.partition,
        account=options.account,
        walltime=options.walltime,
        job_cpu=options.cores,
        memory=options.memory,
        cores=WORKER_THREADS,
        processes=1,
        nanny=True,
        interface=options.interface,
        python=shlex.quote(options.python or sys.executable),
        local_directory=None if local is None else shlex.quote(local),
        log_directory=str(options.logs),
        death_timeout=options.death_timeout_s,
        job_extra_directives=options.all_directives,
        job_script_prologue=[*_exports(worker_settings), *options.prologue],
        worker_extra_args=[
            *("--lifetime", f"{options.lifetime_s}s", "--lifetime-stagger", f"{options.margin_s // 2}s"),
            *("--no-dashboard", "--dashboard-address", "127.0.0.1:0"),
        ],
        scheduler_options={"port": options.scheduler_port, "dashboard_address": dashboard_address},
        security=security,
        silence_logs=silence_logs,
    )


def _exports(settings: Mapping[str, object]) -> list[str]:
    """Settings of dask as the environment variables it reads them from."""
    return [
        f"export DASK_{name.upper().replace('.', '__').replace('-', '_')}={shlex.quote(str(value))}"
        for name, value in settings.items()
    ]
