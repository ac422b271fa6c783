"""A job on a cluster ends with the bytes of one that ran alone, whatever happens to workers, scheduler and client."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from cache_schema.errors import StoreMismatchError, UsageError
from cache_schema.receipts import Failure
from cache_schema.store import open_store
from extract import cluster as cluster_module
from extract import cluster_job
from extract.cluster import ClusterSpec, RunningCluster, start_cluster
from extract.cluster_job import run_on_cluster
from extract.cluster_worker import Assignment, UnitReport, extract_unit
from extract.crew import Crew
from extract.encoders.specs import ImageEncoderSpec, TextEncoderSpec
from extract.encoders.tiny import TinyEncoders
from extract.image_job import ImageJobConfig
from extract.job import Extraction, Unit, library_versions, run_job, units_of
from extract.prompt_job import PromptJobConfig
from extract.tasks import ImageTask, TextTask
from tests.extract.toys import digest_of, noise_png, prompts_of, write_task

pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed:ResourceWarning",  # sockets to workers that were killed
)

NUM_IMAGES, SHARD_ROWS = 48, 2
UNREADABLE = {5: b"", 6: b"no image", 40: noise_png(0, 20, 20)[:60]}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images, of which three cannot be decoded, and 40 prompts."""
    files = [UNREADABLE.get(row, noise_png(row, 20 + row, 40)) for row in range(NUM_IMAGES)]
    sizes = [(20 + row, 40) for row in range(NUM_IMAGES)]
    prompts = prompts_of([3 + row % 9 for row in range(40)])
    return write_task(tmp_path_factory.mktemp("task"), files, prompts, sizes)


@pytest.fixture(scope="module")
def make_tasks(samples: Path, tiny_encoders: TinyEncoders) -> Callable[[Path], tuple[ImageTask, TextTask]]:
    """The image and the prompt job, with their stores in a folder."""

    def make(out: Path) -> tuple[ImageTask, TextTask]:
        images = ImageJobConfig(samples, out, shard_rows=SHARD_ROWS)
        prompts = PromptJobConfig(samples, out, unit_prompts=6, shard_tokens=32)
        return (
            ImageTask(images, ImageEncoderSpec(str(tiny_encoders.image), input_size=(64, 96))),
            TextTask(prompts, TextEncoderSpec(str(tiny_encoders.text))),
        )

    return make


@pytest.fixture(scope="module")
def alone(
    make_tasks: Callable[[Path], tuple[ImageTask, TextTask]], tmp_path_factory: pytest.TempPathFactory
) -> list[Extraction]:
    """Both jobs in this process alone."""
    return [run_job(task.open("cpu")) for task in make_tasks(tmp_path_factory.mktemp("alone"))]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RunningCluster]:
    """Two workers of this machine."""
    with start_cluster(ClusterSpec.parse("local:2")) as cluster:
        yield cluster


@pytest.fixture
def tasks(make_tasks: Callable[[Path], tuple[ImageTask, TextTask]], tmp_path: Path) -> tuple[ImageTask, TextTask]:
    return make_tasks(tmp_path / "stores")


def failures_of(extraction: Extraction) -> list[Failure]:
    return open_store(extraction.path).failures()


def receipts_under(folder: Path) -> int:
    return len(list(folder.glob("**/receipts/0*.json")))


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    give_up = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < give_up
        time.sleep(0.02)


# What comes of a job


def test_both_stores_are_those_of_a_single_process(
    cluster: RunningCluster, tasks: tuple[ImageTask, TextTask], alone: list[Extraction]
) -> None:
    extractions = run_on_cluster(tasks, cluster)
    for here, there in zip(alone, extractions, strict=True):
        assert there.path.name == here.path.name
        assert digest_of(there) == digest_of(here)
        assert failures_of(there) == failures_of(here)
        assert (there.num_encoded, there.num_failed) == (here.num_encoded, here.num_failed)
    assert [failure.row for failure in failures_of(extractions[0])] == list(UNREADABLE)
    assert {"decode", "preprocess", "forward", "copy", "write"} == extractions[0].stages.rates.keys()
    assert all(rate > 0 for extraction in extractions for rate in extraction.stages.rates.values())
    ledgers = [(extraction.path / "ledger.jsonl").read_bytes() for extraction in (alone[0], extractions[0])]
    assert ledgers[0] == ledgers[1]


def test_a_finished_job_starts_no_cluster(alone: list[Extraction], make_tasks: Callable[[Path], Any]) -> None:
    finished = make_tasks(Path(str(alone[0].path)).parent)
    with start_cluster(ClusterSpec.parse("local:2")) as cluster:
        extractions = run_on_cluster(finished, cluster)
        assert "client" not in vars(cluster)
    assert [(done.num_encoded, done.num_reused) for done in extractions] == [(0, NUM_IMAGES), (0, 40)]
    assert extractions[0].num_failed == len(UNREADABLE)


def test_a_job_goes_on_where_another_stopped(
    cluster: RunningCluster, tasks: tuple[ImageTask, TextTask], alone: list[Extraction]
) -> None:
    job = tasks[0].open("cpu")
    job.writer.begin()
    for encoded in job.encode(units_of(job)[3:10]):
        rows = encoded.unit.rows
        job.writer.commit(encoded.unit.name, (rows.start, rows.stop), encoded.shards, encoded.failures)
    (extraction,) = run_on_cluster(tasks[:1], cluster)
    assert (extraction.num_encoded, extraction.num_reused) == (NUM_IMAGES - 14, 14)
    assert digest_of(extraction) == digest_of(alone[0])


def test_a_unit_that_is_done_is_not_done_again(cluster: RunningCluster, tasks: tuple[ImageTask, TextTask]) -> None:
    (extraction,) = run_on_cluster(tasks[:1], cluster)
    receipt = Path(str(extraction.path)) / "receipts" / "000007.json"
    before = receipt.read_bytes(), receipt.stat().st_mtime_ns
    submit(cluster, assignment_of(tasks[0]), 7)
    assert (receipt.read_bytes(), receipt.stat().st_mtime_ns) == before
    assert reports_of(cluster, "test")[-1].seconds == 0


def test_jobs_on_one_store_at_once_all_end_well(
    cluster: RunningCluster, tasks: tuple[ImageTask, TextTask], alone: list[Extraction]
) -> None:
    with ThreadPoolExecutor(3) as threads:
        on_cluster = [threads.submit(run_on_cluster, tasks, cluster) for _ in range(2)]
        here = threads.submit(lambda: [run_job(task.open("cpu")) for task in tasks])
        ended = [here.result(), *(job.result() for job in on_cluster)]
    assert [[digest_of(done) for done in extractions] for extractions in ended] == [
        [digest_of(one) for one in alone]
    ] * 3


def test_paths_may_be_relative_to_where_the_client_runs(
    cluster: RunningCluster,
    tasks: tuple[ImageTask, TextTask],
    alone: list[Extraction],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)

    def relative(path: Any) -> Path:
        return Path(os.path.relpath(path, tmp_path))

    images, prompts = tasks
    near = (
        ImageTask(
            replace(
                images.config,
                samples=relative(images.config.samples),
                out=Path("stores"),
                image_dir=relative(Path(str(images.config.samples)).parent / "images"),
            ),
            replace(images.encoder, source=str(relative(images.encoder.source))),
        ),
        TextTask(
            replace(prompts.config, samples=relative(prompts.config.samples), out=Path("stores")),
            replace(prompts.encoder, source=str(relative(prompts.encoder.source))),
        ),
    )
    extractions = run_on_cluster(near, cluster)
    assert [digest_of(there) for there in extractions] == [digest_of(here) for here in alone]
    recorded = open_store(extractions[0].path).header.recorded
    assert recorded == {**open_store(alone[0].path).header.recorded, "paths": recorded["paths"]}
    assert recorded["paths"]["samples"] == os.path.relpath(images.config.samples, extractions[0].path)


# What travels, and what a worker holds


def test_each_worker_loads_an_encoder_once(cluster: RunningCluster, tasks: tuple[ImageTask, TextTask]) -> None:
    extractions = run_on_cluster(tasks, cluster)
    for extraction, task in zip(extractions, tasks, strict=True):
        reports = reports_of(cluster, cluster_job._topic_of(extraction.path))
        assert [report.unit for report in sorted(reports, key=lambda report: report.unit)] == list(
            range(len(units_of(task.open("cpu"))))
        )
        openings = Counter(report.worker for report in reports if report.opening_s)
        assert openings == Counter({report.worker for report in reports})


def test_nothing_large_travels(
    cluster: RunningCluster, tasks: tuple[ImageTask, TextTask], monkeypatch: pytest.MonkeyPatch
) -> None:
    from distributed.protocol.pickle import dumps

    client, sizes, keys = cluster.client, [], []

    def weigh(*arguments: Any, **settings: Any) -> Any:
        sizes.append(len(dumps((arguments, settings))))
        keys.append(settings["key"])
        return type(client).submit(client, *arguments, **settings)

    monkeypatch.setattr(client, "submit", weigh)
    extractions = run_on_cluster(tasks, cluster)
    assert len(sizes) == NUM_IMAGES // SHARD_ROWS + 7
    assert max(sizes) < 3000
    assert len(set(keys)) == len(keys)
    assert all(key.startswith((extractions[0].path.stem, extractions[1].path.stem)) for key in keys)


def test_workers_share_the_cores(cluster: RunningCluster, tasks: tuple[ImageTask, TextTask]) -> None:
    run_on_cluster(tasks[:1], cluster)
    (threads,) = set(cluster.client.run(lambda: __import__("torch").get_num_threads()).values())
    assert threads == max(1, len(os.sched_getaffinity(0)) // 2)


def test_workers_of_one_machine_take_a_device_each(monkeypatch: pytest.MonkeyPatch) -> None:
    from extract.cluster_worker import _device_of

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [_device_of(worker, "auto") for worker in (0, 3, 5)] == ["cuda:0", "cuda:3", "cuda:1"]
    assert _device_of(1, "cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert _device_of(1, "auto") == _device_of("headstart-1", "auto")


def test_nothing_listens_but_on_this_machine(cluster: RunningCluster) -> None:
    addresses = [cluster.client.scheduler.address, *cluster.workers()]
    assert all(address.startswith("tls://127.0.0.1:") for address in addresses)
    listening = [
        connection.laddr.ip
        for process in [psutil.Process(), *workers_here()]
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > len(addresses)
    assert set(listening) == {"127.0.0.1"}


def submit(cluster: RunningCluster, assignment: Assignment, unit: int) -> None:
    rows = range(unit * SHARD_ROWS, (unit + 1) * SHARD_ROWS)
    cluster.client.submit(extract_unit, assignment, Unit(unit, rows), pure=False).result()


def assignment_of(task: ImageTask) -> Assignment:
    return Assignment("test", task, task.open("cpu").writer.header.fingerprint, library_versions())


def reports_of(cluster: RunningCluster, topic: str) -> list[UnitReport]:
    return [UnitReport(**report) for _, report in cluster.client.get_events(topic)]


def workers_here() -> list[psutil.Process]:
    """The processes of local workers, those that start among them."""
    processes = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "spawn_main" in " ".join(process.cmdline()):
                processes.append(process)
    return processes


# What goes wrong


def test_a_worker_with_other_files_refuses(cluster: RunningCluster, tasks: tuple[ImageTask, TextTask]) -> None:
    assignment = replace(assignment_of(tasks[0]), fingerprint="0" * 64)
    with pytest.raises(
        StoreMismatchError, match=r"worker \d on .* would make image_features-.*: encoder or samples differ"
    ):
        submit(cluster, assignment, 0)


def test_a_worker_with_other_libraries_refuses(cluster: RunningCluster, tasks: tuple[ImageTask, TextTask]) -> None:
    versions = library_versions()
    assignment = replace(assignment_of(tasks[0]), libraries={**versions, "torch": "1.0.0"})
    here = versions["torch"].partition("+")[0]
    with pytest.raises(StoreMismatchError, match=rf"other library versions .* \(torch {here}.* instead of 1\.0\.0\)"):
        submit(cluster, assignment, 0)
    builds = {name: f"{version.partition('+')[0]}+other" for name, version in versions.items()}
    with pytest.raises(StoreMismatchError, match="encoder or samples differ"):  # the next that is looked at
        submit(cluster, replace(assignment, libraries=builds, fingerprint="0" * 64), 0)


def test_a_missing_image_stops_the_job_with_a_sentence_until_it_is_back(
    cluster: RunningCluster, make_tasks: Callable[[Path], Any], samples: Path, alone: list[Extraction], tmp_path: Path
) -> None:
    images = make_tasks(tmp_path / "stores")[0]
    image = samples.parent / "images" / "33.img"
    image.rename(tmp_path / "away")
    try:
        with pytest.raises(
            UsageError, match=r"'33.img' in .* cannot be had: .* and run the same command again to go on"
        ):
            run_on_cluster([images], cluster)
    finally:
        (tmp_path / "away").rename(image)
    (extraction,) = run_on_cluster([images], cluster)
    assert digest_of(extraction) == digest_of(alone[0])


def test_what_is_wrong_from_the_beginning_is_said_before_there_are_workers(
    tasks: tuple[ImageTask, TextTask], tmp_path: Path
) -> None:
    nowhere = replace(tasks[0], config=replace(tasks[0].config, image_dir=tmp_path / "nowhere"))
    no_encoder = replace(tasks[1], encoder=replace(tasks[1].encoder, source=str(tmp_path / "nothing")))
    with start_cluster(ClusterSpec.parse("local:2")) as cluster:
        with pytest.raises(UsageError, match="the folder is missing"):
            run_on_cluster([nowhere], cluster)
        with pytest.raises(UsageError, match="there is no such folder"):
            run_on_cluster([tasks[0], no_encoder], cluster)
        assert "client" not in vars(cluster)
    assert not (tmp_path / "stores").exists()


def test_a_unit_that_fails_again_and_again_is_named_with_its_last_error(
    cluster: RunningCluster, tasks: tuple[ImageTask, TextTask], alone: list[Extraction]
) -> None:
    obstacle = Path(str(tasks[0].config.out)) / alone[0].path.name / "features" / "last" / "c.11.0.0.0" / "folder"
    obstacle.mkdir(parents=True)
    complaint = (
        rf"unit 000011 of {alone[0].path.stem} failed 4 times, at last with IsADirectoryError: .*, on worker \d of "
        r".*\. Mend that, and run the same command again to go on"
    )
    with pytest.raises(UsageError, match=complaint):
        run_on_cluster(tasks[:1], cluster)
    obstacle.rmdir()
    obstacle.parent.rmdir()
    (extraction,) = run_on_cluster(tasks[:1], cluster)
    assert digest_of(extraction) == digest_of(alone[0])


def test_receipts_that_cannot_be_seen_from_here_are_missed(tasks: tuple[ImageTask, TextTask]) -> None:
    writer = tasks[0].open("cpu").writer
    writer.begin()
    with pytest.raises(
        UsageError, match=r"2 receipts are not to be seen in .*: it is not the same folder on every machine"
    ):
        cluster_job._await_receipts(writer, ["000000", "000001"], wait_s=0)


# Workers, schedulers and clients that die


class Killer:
    """Kills a worker, by turns the oldest and the newest, whenever so many more units were published since the last."""

    def __init__(
        self, folder: Path, num_units: int, every: int, at_most: int = 1000, sparing: Collection[int] = ()
    ) -> None:
        self.receipts: list[int] = []
        self._sparing = sparing
        self._folder = folder
        self._num_units = num_units
        self._every = every
        self._at_most = at_most
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(0.02) and len(self.receipts) < self._at_most:
            num_receipts = receipts_under(self._folder)
            workers = sorted(
                (worker for worker in workers_here() if worker.pid not in self._sparing), key=lambda worker: worker.pid
            )
            if workers and self._every <= num_receipts - (self.receipts or [0])[-1] and num_receipts < self._num_units:
                workers[0 if len(self.receipts) % 2 else -1].kill()
                self.receipts.append(num_receipts)

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def test_workers_that_are_killed_until_the_job_ends_change_nothing(
    cluster: RunningCluster, make_tasks: Callable[[Path], Any], alone: list[Extraction], tmp_path: Path
) -> None:
    (images, prompts), num_units = make_tasks(tmp_path / "stores"), NUM_IMAGES // SHARD_ROWS
    with Killer(tmp_path, num_units, every=2) as killer:
        (extraction,) = run_on_cluster([images], cluster)
    assert len(killer.receipts) >= 5  # under way: some units were published, and some were not
    assert digest_of(extraction) == digest_of(alone[0])
    assert failures_of(extraction) == failures_of(alone[0])
    assert digest_of(run_on_cluster([prompts], cluster)[0]) == digest_of(alone[1])
    wait_until(lambda: len(cluster.workers()) == 2)


def test_a_worker_that_dies_while_it_starts_is_replaced(cluster: RunningCluster) -> None:
    for _ in range(3):
        for process in workers_here():
            process.kill()
        time.sleep(0.3)
    wait_until(lambda: len(workers_here()) == 2 and len(cluster.workers()) == 2)


def test_what_kills_its_workers_is_given_up_at_last(
    make_tasks: Callable[[Path], Any], alone: list[Extraction], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (images, _), num_units = make_tasks(tmp_path / "stores"), NUM_IMAGES // SHARD_ROWS
    others = {process.pid for process in workers_here()}
    monkeypatch.setitem(cluster_module._SETTINGS, "distributed.scheduler.allowed-failures", 0)
    with start_cluster(ClusterSpec.parse("local:1")) as cluster:
        with monkeypatch.context() as patch, Killer(tmp_path, num_units, every=3, at_most=1, sparing=others):
            patch.setattr(cluster_job, "ALLOWED_DEATHS", 0)
            with pytest.raises(UsageError, match=r"unit 0000\d\d of .* was under way on 1 workers that died\. Look at"):
                run_on_cluster([images], cluster)
        with Killer(
            tmp_path, num_units, every=3, at_most=1
        ) as killer:  # where the scheduler gives up, the job does not
            (extraction,) = run_on_cluster([images], cluster)
    assert len(killer.receipts) == 1
    assert digest_of(extraction) == digest_of(alone[0])


@pytest.fixture
def strangers(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A scheduler with a worker that somebody else started; they run in this process."""
    from distributed import LocalCluster

    num_threads = torch.get_num_threads()
    cluster = LocalCluster(
        n_workers=1,
        threads_per_worker=2,
        processes=False,
        protocol="tcp://",
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
    )
    yield SimpleNamespace(address=cluster.scheduler_address, close=cluster.close)
    cluster.close()
    torch.set_num_threads(num_threads)


def test_a_scheduler_that_is_there_is_used_and_left_there(
    strangers: SimpleNamespace, tasks: tuple[ImageTask, TextTask], alone: list[Extraction]
) -> None:
    for _ in range(2):
        with start_cluster(ClusterSpec.parse(strangers.address)) as cluster:
            assert cluster.workers_per_host == 1
            extractions = run_on_cluster(tasks, cluster)
    assert [digest_of(there) for there in extractions] == [digest_of(here) for here in alone]


def test_a_scheduler_that_goes_away_is_missed(
    strangers: SimpleNamespace, tasks: tuple[ImageTask, TextTask], tmp_path: Path, alone: list[Extraction]
) -> None:
    def close_soon() -> None:
        wait_until(lambda: receipts_under(tmp_path) > 2)
        strangers.close()

    with start_cluster(ClusterSpec.parse(strangers.address)) as cluster, ThreadPoolExecutor(1) as threads:
        closed = threads.submit(close_soon)
        with pytest.raises(UsageError, match=rf"the scheduler {strangers.address} is gone\. What was published stays"):
            run_on_cluster(tasks, cluster)
        closed.result()
    assert digest_of(run_job(tasks[0].open("cpu"))) == digest_of(alone[0])


def test_a_scheduler_that_is_not_there_is_missed(
    tasks: tuple[ImageTask, TextTask], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "_CONNECT_S", 1)
    with (
        start_cluster(ClusterSpec.parse("tcp://127.0.0.1:1")) as cluster,
        pytest.raises(
            UsageError, match=r"no scheduler answers at tcp://127\.0\.0\.1:1 .*; start one with `dask scheduler`"
        ),
    ):
        run_on_cluster(tasks, cluster)


CLIENT = """
    import sys
    from pathlib import Path
    from extract.cluster import ClusterSpec, start_cluster
    from extract.cluster_job import run_on_cluster
    from extract.encoders.specs import ImageEncoderSpec
    from extract.image_job import ImageJobConfig
    from extract.tasks import ImageTask

    if __name__ == "__main__":
        samples, out, encoder = sys.argv[1:]
        config = ImageJobConfig(Path(samples), Path(out), shard_rows=2, views=("whole", "flip", "crop-0.9", "crop-0.8"))
        with start_cluster(ClusterSpec.parse("local:1")) as cluster:
            run_on_cluster([ImageTask(config, ImageEncoderSpec(encoder))], cluster)
"""


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL])
def test_a_client_that_is_stopped_takes_its_workers_with_it_and_leaves_what_is_done(
    tasks: tuple[ImageTask, TextTask], tmp_path: Path, blow: signal.Signals
) -> None:
    images = tasks[0]
    program = tmp_path / "client.py"
    program.write_text(textwrap.dedent(CLIENT))
    paths = [str(images.config.samples), str(images.config.out), images.encoder.source]
    client = subprocess.Popen(
        [sys.executable, str(program), *paths],
        env={**os.environ, "PYTHONPATH": str(Path(cluster_job.__file__).parent.parent)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: receipts_under(tmp_path) > 2)
    workers = psutil.Process(client.pid).children(recursive=True)
    if blow == signal.SIGINT:
        os.killpg(client.pid, blow)  # as in a terminal, where Ctrl-C reaches workers too
    else:
        client.kill()
    said = client.communicate(timeout=60)[1]
    assert said.count("Traceback") == said.count("KeyboardInterrupt") == (blow == signal.SIGINT)
    assert workers
    wait_until(lambda: not any(worker.is_running() and worker.status() != "zombie" for worker in workers))
    before, num_units = receipts_under(tmp_path), 4 * NUM_IMAGES // SHARD_ROWS
    assert 2 < before < num_units
    config = replace(images.config, views=("whole", "flip", "crop-0.9", "crop-0.8"))
    again = run_job(ImageTask(config, ImageEncoderSpec(images.encoder.source)).open("cpu"))
    assert (again.num_reused, again.num_encoded) == (SHARD_ROWS * before, SHARD_ROWS * (num_units - before))


# What the user sees


def test_a_mistake_in_the_name_of_a_cluster_is_named() -> None:
    mistakes = {
        "local": "say how many workers there are to be, such as local:2",
        "local:0": "say how many workers there are to be, such as local:2",
        "local:two": "say how many workers there are to be, such as local:2",
        "lokal:2": "unknown cluster 'lokal:2': did you mean 'local:N'?",
        "slurm": "name it with --slurm-options",
        "tcp://host": "give host and port, such as tcp://host:8786",
        "tls://host:port": "give host and port, such as tls://host:8786",
        "tcp://host:99999": "give host and port",
        "tcp://:8786": "give host and port",
        "http://host:80": "unknown cluster",
        "": "unknown cluster",
    }
    for text, complaint in mistakes.items():
        with pytest.raises(UsageError, match=complaint.replace("?", r"\?")):
            ClusterSpec.parse(text)
    with pytest.raises(UsageError, match="--slurm-options goes with slurm; leave it out"):
        ClusterSpec.parse("local:2", Path("options.toml"))


def test_clusters_are_parsed() -> None:
    assert ClusterSpec.parse("local:12") == ClusterSpec(num_local=12)
    assert ClusterSpec.parse("tcp://node-3.example.org:8786") == ClusterSpec(address="tcp://node-3.example.org:8786")
    assert ClusterSpec.parse("tls://[::1]:8786").address == "tls://[::1]:8786"


def report(worker: str, num_items: int = 10, num_failures: int = 0, **rates: float) -> UnitReport:
    return UnitReport(0, num_items, num_failures, worker, seconds=0.5, rates={"job": 1.0, **rates})


def test_the_crew_is_summed_up_in_a_few_words() -> None:
    crew = Crew()
    assert crew.look([]) == "no worker is there yet; waiting."
    assert crew.look(["a", "b"]) == "2 workers came; 2 at work."
    assert crew.look(["a", "b"]) is None
    assert crew.summary() == "2 workers"
    crew.report(report("a", decode=100.0, forward=20.0))
    assert crew.summary() == "2 workers (20/s), forward binds"
    crew.report(report("b", num_failures=3, decode=100.0, forward=20.0))
    assert crew.summary() == "2 workers (20, 20/s), forward binds, 3 failed"
    assert crew.look(["b", "c", "d"]) == "1 worker lost and 2 workers came; 3 at work."
    assert crew.summary() == "3 workers (20/s), forward binds, 3 failed"
    assert crew.look(["b"]) == "2 workers lost; 1 at work."
    crew.look("abcdefgh")
    for worker in "cdefgh":
        crew.report(report(worker, num_items=5, forward=10.0))
    assert crew.summary().startswith("8 workers (10 to 20/s), forward binds")


def test_a_stages_rate_is_that_of_all_workers_together() -> None:
    crew = Crew()
    assert crew.stages().rates == {}
    for worker in "abc":
        crew.report(report(worker, decode=100.0, forward=20.0))
    assert crew.stages().rates == pytest.approx({"decode": 300, "forward": 60}, rel=0.05)
    crew.report(UnitReport(0, 10, 0, "d"))  # done already: no work of anybody's
    assert crew.stages().rates == pytest.approx({"decode": 300, "forward": 60}, rel=0.05)


def test_dask_is_not_imported_without_a_cluster(samples_path: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from headstart import cli; import extract.cluster, extract.cluster_job;"
        f"code = cli.run(['extract', {str(samples_path)!r}, '--out', {str(tmp_path)!r}, '--input-size', '32', '32']);"
        "sys.exit(code or any(name in sys.modules for name in ('dask', 'distributed', 'dask_jobqueue')))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("image_features-*.zarr"))
