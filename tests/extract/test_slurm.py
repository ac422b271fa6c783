"""SLURM gets the script that the options ask for, and a job runs through it. A small stand-in plays sbatch here."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cache_schema.errors import UsageError
from extract import cluster as cluster_module
from extract.cluster import ClusterSpec, start_cluster
from extract.cluster_job import run_on_cluster
from extract.encoders.specs import ImageEncoderSpec
from extract.encoders.tiny import TinyEncoders
from extract.image_job import ImageJobConfig
from extract.job import run_job
from extract.slurm import SlurmOptions, certificates, make_slurm_cluster, read_slurm_options
from extract.tasks import ImageTask
from tests.extract.toys import digest_of

OPTIONS = """
    partition = "gpu"
    account = "vision"
    walltime = "04:00:00"
    cores = 8
    memory = "32GiB"
    gpu_type = "a100"
    jobs = 16
    directives = ["--constraint=nvme", "--qos=low"]
    prologue = ["module load cuda", "export HF_HUB_OFFLINE=1"]
    interface = "lo"
    python = "/shared/my venv/bin/python"
    local_directory = "/scratch"
    scheduler_port = 0
    death_timeout_s = 90
"""


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str], SlurmOptions]:
    """Read options from a file that holds a text."""

    def read(text: str) -> SlurmOptions:
        path = tmp_path / "slurm.toml"
        path.write_text(text)
        return read_slurm_options(path)

    return read


@pytest.fixture
def render(
    read: Callable[[str], SlurmOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], list[str]]:
    """The lines of the script that a text asks for."""
    monkeypatch.chdir(tmp_path)

    def render(text: str) -> list[str]:
        options, settings = read(text), cluster_module._WORKER_SETTINGS
        with certificates(options.logs) as security:
            cluster = make_slurm_cluster(
                options,
                "127.0.0.1:0",
                settings,
                print,
                security=security if options.tls else None,
                silence_logs=logging.CRITICAL,
            )
            script: str = cluster.job_script()
            cluster.close()
        return script.splitlines()

    return render


def argument(lines: list[str], name: str) -> str:
    """What the worker's command line says behind an option."""
    (command,) = [line for line in lines if "dask_worker" in line]
    words = command.split()
    assert words.count(name) == 1
    return words[words.index(name) + 1]


def test_the_script_asks_for_what_the_options_say(render: Callable[[str], list[str]], tmp_path: Path) -> None:
    lines = render(OPTIONS)
    assert lines[0] == "#!/usr/bin/env bash"
    assert [line for line in lines if line.startswith("#SBATCH")] == [
        "#SBATCH -J headstart",
        f"#SBATCH -e {tmp_path}/slurm-logs/headstart-%J.err",
        f"#SBATCH -o {tmp_path}/slurm-logs/headstart-%J.out",
        "#SBATCH -p gpu",
        "#SBATCH -A vision",
        "#SBATCH -n 1",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --mem=32G",
        "#SBATCH -t 04:00:00",
        "#SBATCH --no-requeue",
        "#SBATCH --gres=gpu:a100:1",
        "#SBATCH --constraint=nvme",
        "#SBATCH --qos=low",
    ]
    commands = [line for line in lines[1:] if line and not line.startswith("#SBATCH")]
    assert "export DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE=False" in commands
    assert "export DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT=60s" in commands
    assert commands[-3:-1] == ["module load cuda", "export HF_HUB_OFFLINE=1"]
    assert commands[-1].startswith("'/shared/my venv/bin/python' -m distributed.cli.dask_worker tls://127.0.0.1:")


def test_a_worker_is_one_process_that_goes_before_its_job_is_killed(render: Callable[[str], list[str]]) -> None:
    lines = render(OPTIONS)
    assert argument(lines, "--nthreads") == "2"
    assert not any("--nworkers" in line for line in lines)
    assert any("--nanny" in line for line in lines)
    assert argument(lines, "--lifetime") == f"{4 * 3600 - 300}s"
    assert argument(lines, "--lifetime-stagger") == "150s"
    assert argument(lines, "--death-timeout") == "90"
    assert argument(lines, "--local-directory") == "/scratch"
    assert argument(lines, "--interface") == "lo"
    assert argument(lines, "--memory-limit") == "32.00GiB"
    assert argument(lines, "--dashboard-address") == "127.0.0.1:0"


def test_nobody_else_gets_in(render: Callable[[str], list[str]], tmp_path: Path) -> None:
    lines = render(OPTIONS)
    for name in ("--tls-ca-file", "--tls-cert", "--tls-key"):
        assert Path(argument(lines, name)).parent.parent == tmp_path / "slurm-logs"
    open_to_all = render(OPTIONS + "\ntls = false")
    assert not any("--tls" in line for line in open_to_all)
    assert any("dask_worker tcp://" in line for line in open_to_all)


def test_certificates_are_for_their_owners_eyes(tmp_path: Path) -> None:
    with certificates(tmp_path / "logs") as security:
        (folder,) = (tmp_path / "logs").iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700
        assert security.require_encryption
        paths = {Path(value) for value in security.get_tls_config_for_role("worker").values() if value}
        assert paths == set(folder.iterdir())
    assert not list((tmp_path / "logs").iterdir())


def test_what_is_not_asked_for_is_not_in_the_script(render: Callable[[str], list[str]]) -> None:
    lines = render('walltime = "30"\nmemory = "4GB"\ngpus = 0\nmaximum = 4')
    text = "\n".join(lines)
    for absent in ("gres", "#SBATCH -p", "#SBATCH -A", "--interface", "--local-directory"):
        assert absent not in text
    assert "#SBATCH --cpus-per-task=4" in lines
    assert f"{sys.executable} -m distributed.cli.dask_worker" in text
    assert argument(lines, "--death-timeout") == "120"


@pytest.mark.parametrize(
    ("walltime", "seconds"),
    [
        ("30", 1800),
        ("90:30", 5430),
        ("04:00:00", 14400),
        ("1-0", 86400),
        ("1-12", 129600),
        ("2-03:04", 183840),
        ("2-03:04:05", 183845),
    ],
)
def test_walltimes_are_what_sbatch_understands_by_them(walltime: str, seconds: int) -> None:
    options = SlurmOptions(walltime, "4GB", jobs=1)
    assert options.lifetime_s + options.margin_s == seconds
    assert options.margin_s == min(300, seconds // 10)


MISTAKES = {
    'partitoin = "gpu"': "unknown option 'partitoin': did you mean 'partition'",
    "walltime = 04:00:00": 'walltime is datetime.time(4, 0); give a string such as "x"',
    'walltime = "soon"': "walltime is 'soon'; give hours:minutes:seconds, such as 04:00:00",
    'walltime = "0"': "give more than none",
    'memory = "much"': "memory is 'much'; give a number of bytes such as 32GB",
    "memory = 32": "memory is 32; give a string",
    'cores = "8"': "cores is '8'; give a whole number",
    "cores = true": "cores is True; give a whole number",
    "cores = 0": "cores is 0; give a whole number of at least 1",
    "gpus = 4": "gpus is 4, and a worker uses one; take gpus = 1 and more jobs",
    "gpus = -1": "gpus is -1; give a whole number of at least 0",
    "jobs = 0": "jobs is 0; give a whole number of at least 1",
    "maximum = 3": "give either jobs, or maximum (and minimum)",
    'directives = "--qos=low"': "give a list of strings",
    "directives = [1]": "give a list of strings",
    'prologue = ["a\\nb"]': "give text on one line, or leave it out",
    'account = ""': "give text on one line, or leave it out",
    'log_directory = "my logs"': "log_directory is 'my logs'; give a folder without blanks in its path",
    'tls = "no"': "tls is 'no'; give true or false",
    "= 3": "is not TOML",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_options_is_named_with_its_remedy(read: Callable[[str], SlurmOptions], mistake: str) -> None:
    good = {"walltime": '"04:00:00"', "memory": '"4GB"', "jobs": "1"}
    good.pop(mistake.partition(" ")[0], None)
    text = "\n".join([*(f"{name} = {value}" for name, value in good.items()), mistake])
    with pytest.raises(UsageError) as caught:
        read(text)
    assert MISTAKES[mistake] in str(caught.value)
    assert "slurm.toml" in str(caught.value)


def test_what_the_options_lack_is_named(read: Callable[[str], SlurmOptions], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"slurm\.toml lacks walltime and memory; see docs/clusters\.md"):
        read("jobs = 1")
    with pytest.raises(UsageError, match="give either jobs, or maximum"):
        read('walltime = "1:00:00"\nmemory = "4GB"')
    with pytest.raises(UsageError, match="minimum is 5, and maximum 4"):
        read('walltime = "1:00:00"\nmemory = "4GB"\nminimum = 5\nmaximum = 4')
    with pytest.raises(UsageError, match=r"nowhere\.toml cannot be read \(No such file or directory\); see docs"):
        read_slurm_options(tmp_path / "nowhere.toml")


def test_the_example_in_the_documentation_is_one(tmp_path: Path) -> None:
    page = (Path(cluster_module.__file__).parent.parent / "docs" / "clusters.md").read_text()
    path = tmp_path / "slurm.toml"
    path.write_text(page.partition("```toml\n")[2].partition("```")[0])
    spec = ClusterSpec.parse("slurm", path)
    assert spec.slurm is not None
    for name in SlurmOptions.__dataclass_fields__:
        assert f"`{name}`" in page


def test_without_sbatch_no_cluster_starts(
    read: Callable[[str], SlurmOptions], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        start_cluster(ClusterSpec(slurm=read(OPTIONS))) as cluster,
        pytest.raises(UsageError, match="there is no sbatch here; run this where SLURM jobs are submitted"),
    ):
        cluster.client  # noqa: B018


SBATCH = """#!/bin/sh
cp "$1" "$0.$$"
setsid sh "$0.$$" > "$0.$$.log" 2>&1 &
echo "Submitted batch job $!"
"""
SCANCEL = """#!/bin/sh
echo "$1" >> "$0.log"
kill -TERM -- "-$1"
"""
REFUSAL = """#!/bin/sh
echo "sbatch: error: invalid partition specified: gpuu" >&2
exit 1
"""


@pytest.fixture
def make_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Put programs where SLURM's are looked for."""

    def make(**programs: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, text in programs.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        monkeypatch.chdir(tmp_path)
        return folder

    return make


@pytest.fixture
def task(samples_path: Path, tiny_encoders: TinyEncoders, tmp_path: Path) -> ImageTask:
    config = ImageJobConfig(samples_path, tmp_path / "stores", shard_rows=4)
    return ImageTask(config, ImageEncoderSpec(str(tiny_encoders.image), input_size=(64, 96)))


SMALL = 'walltime = "01:00:00"\nmemory = "4GB"\ngpus = 0\n'


def test_a_job_runs_through_batch_jobs_and_leaves_none_behind(
    make_slurm: Callable[..., Path], read: Callable[[str], SlurmOptions], task: ImageTask, tmp_path: Path
) -> None:
    programs = make_slurm(sbatch=SBATCH, scancel=SCANCEL)
    options = read(SMALL + 'jobs = 1\ninterface = "lo"')
    with start_cluster(ClusterSpec(slurm=options)) as cluster:
        (extraction,) = run_on_cluster([task], cluster)
        (worker,) = cluster.workers().values()
        assert str(worker["name"]) == "headstart-0"
        assert worker["nthreads"] == 2
    assert len(list(programs.glob("sbatch.*.log"))) == 1
    (job_id,) = (programs / "scancel.log").read_text().split()
    psutil.wait_procs([process for process in psutil.process_iter() if os.getpgid(process.pid) == int(job_id)], 30)
    assert not list((tmp_path / "slurm-logs").iterdir())  # the certificates are gone
    task_alone = ImageTask(ImageJobConfig(task.config.samples, tmp_path / "alone", shard_rows=4), task.encoder)
    assert digest_of(extraction) == digest_of(run_job(task_alone.open("cpu")))


@pytest.mark.parametrize("number", ["jobs = 2", "maximum = 2"])
def test_jobs_that_slurm_refuses_end_it_with_slurms_reason(
    make_slurm: Callable[..., Path], read: Callable[[str], SlurmOptions], task: ImageTask, number: str
) -> None:
    make_slurm(sbatch=REFUSAL, scancel=SCANCEL)
    complaint = r"SLURM refused a job \(sbatch: error: invalid partition specified: gpuu\); mend the file"
    with start_cluster(ClusterSpec(slurm=read(SMALL + number))) as cluster, pytest.raises(UsageError, match=complaint):
        run_on_cluster([task], cluster)
