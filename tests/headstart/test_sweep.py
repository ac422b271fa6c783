"""A sweep trains every combination once, as `headstart train` would, and survives what ends its processes."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_schema.errors import UsageError
from cache_schema.features import FeatureCache
from heads.runs import Training, run_name
from headstart import api, cli
from headstart.recipes import make_config, parse_overrides
from headstart.sweep import make_result, plan_sweep, sweep, train_command
from headstart.sweep_space import Choice, Range, SweepConfig, grid, parse_space, sample, show
from headstart.sweep_workers import Failure, Workplace, _take_gpu, train_apart
from tests.headstart.shell import Shell

QUICK = {"epochs": 1, "target_size": [16, 24]}
TYPED = ("--set", "epochs=1", "target_size=[16,24]")

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=6)
SEVERAL = st.lists(VALUES, min_size=2, max_size=5, unique_by=lambda value: json.dumps(value, sort_keys=True))


@pytest.fixture
def stores(workspace: Path, feature_cache: FeatureCache) -> str:
    """A folder with one store of each kind."""
    return str(workspace / "stores")


def digests(runs: Path) -> dict[str, tuple[int, bytes]]:
    """Of each finished run when it ended, and its best weights."""
    return {
        path.parent.name: (path.stat().st_mtime_ns, (path.parent / "best/model.safetensors").read_bytes())
        for path in runs.glob("*/training.json")
    }


def wait_until(happened: Callable[[], Any], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.005)


# What is typed


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("learning_rate=1e-4,3e-4", (1e-4, 3e-4)),
        ("patience=null, 5", (None, 5)),
        ("schedule=cosine, linear", ("cosine", "linear")),
        ("initial=null,facebook/sam-vit-base", (None, "facebook/sam-vit-base")),
        ("target_size=[[48,48],[96,96]]", ([48, 48], [96, 96])),
        ("target_size=[48,48],[96,96]", ([48, 48], [96, 96])),
        ('loss={"bce":1},{"bce":1,"dice":1}', ({"bce": 1}, {"bce": 1, "dice": 1})),
        ('text=["1","a,b"]', ("1", "a,b")),
        ("depth=1,2,1", (1, 2)),
        ('text=["int:1:4","log:1:2"]', ("int:1:4", "log:1:2")),
    ],
)
def test_values_are_read_as_they_are_meant(text: str, values: tuple[Any, ...]) -> None:
    assert parse_space([text]) == {text.partition("=")[0]: Choice(values)}


@pytest.mark.parametrize(
    ("texts", "complaint"),
    [
        ([], "nothing to try"),
        (["depth"], "write key=value"),
        (["=1,2"], "write key=value"),
        (["film.dim=1,2"], "write key=value"),
        (["depth=1"], "one value"),
        (["depth="], "one value|empty"),
        (["depth=1,1"], "one value"),
        (["target_size=[48,48]"], "one value"),
        (["target_size=[[48,48]]"], "one value"),
        (["schedule=cosine,,linear"], "empty"),
        (["schedule=cosine,"], "empty"),
        (["depth=[1,2"], "is not JSON"),
        (["loss={'bce':1},{'dice':1}"], "is not JSON"),
        (['loss={"bce":1,"bce":2},{"dice":1}'], "one key twice"),
        (["self_attention=True,False"], "write true"),
        (["patience=None,3"], "write null"),
        (["dropout=NaN,0.1"], "NaN"),
        (["dropout=-Infinity,0.1"], "-Infinity"),
        (["depth=1,2", "depth=3,4"], "there twice"),
        (["learning_rate=log:0:1"], "above 0"),
        (["learning_rate=log:1e-2:1e-5"], "below HIGH"),
        (["dropout=uniform:0"], "is no range"),
        (["dropout=uniform:0:nan"], "is no range"),
        (["dropout=uniform:0:inf"], "is no range"),
        (["depth=int:1:2.5"], "is no range"),
        (["depth=int:1:4,int:6:8"], "is no range"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(texts: list[str], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        parse_space(texts)


@given(SEVERAL)
def test_any_json_values_come_back_from_either_spelling(values: list[Any]) -> None:
    for text in (json.dumps(values), ", ".join(json.dumps(value) for value in values)):
        (choice,) = parse_space([f"key={text}"]).values()
        assert isinstance(choice, Choice)
        assert json.dumps(choice.values) == json.dumps(values)


@given(
    st.integers(1, 30), st.integers(1, 30), st.integers(), st.floats(1e-6, 1e-2), st.floats(2e-2, 1e3), st.booleans()
)
def test_a_smaller_draw_is_the_beginning_of_a_larger(
    few: int, more: int, seed: int, low: float, high: float, log: bool
) -> None:
    space = {"a": Range("log" if log else "uniform", low, high), "b": Range("int", -2, 3), "c": Choice(("x", None))}
    few, more = sorted((few, more))
    drawn = sample(space, more, seed)
    assert sample(space, few, seed) == drawn[:few]
    assert len({show(settings) for settings in drawn}) == more
    assert all(low <= settings["a"] <= high and settings["b"] in range(-2, 4) for settings in drawn)


def test_a_logarithmic_range_favours_no_decade() -> None:
    drawn = [settings["a"] for settings in sample({"a": Range("log", 1e-4, 1.0)}, 2000, 0)]
    shares = [sum(low <= value < low * 10 for value in drawn) / 2000 for low in (1e-4, 1e-3, 1e-2, 1e-1)]
    assert shares == pytest.approx([0.25] * 4, abs=0.04)


def test_all_of_a_small_space_can_be_drawn_and_no_more() -> None:
    space = {"a": Range("int", 1, 3), "b": Choice(("x", "y"))}
    assert {show(settings) for settings in sample(space, 6, 0)} == {f"a={a}, b={b}" for a in (1, 2, 3) for b in "xy"}
    with pytest.raises(UsageError, match="give --random 6"):
        sample(space, 7, 0)
    with pytest.raises(UsageError, match="at least 1"):
        sample(space, 0, 0)


def test_a_grid_holds_every_combination_in_order() -> None:
    space = parse_space(["depth=1,2", "schedule=cosine,linear"])
    assert [tuple(settings.values()) for settings in grid(space)] == [
        (1, "cosine"),
        (1, "linear"),
        (2, "cosine"),
        (2, "linear"),
    ]
    with pytest.raises(UsageError, match="give --random N"):
        grid(parse_space(["depth=int:1:4"]))


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), VALUES, max_size=4))
def test_the_printed_command_says_the_same_settings(settings: dict[str, Any]) -> None:
    words = shlex.split(train_command("film", settings, {"stores": "my stores", "samples": None}, Path("runs")))
    assert words[:7] == ["headstart", "train", "film", "--stores", "my stores", "--runs", "runs"]
    assert json.dumps(parse_overrides(words[8:])) == json.dumps(settings)


# What is planned


def test_every_impossible_combination_is_named_before_anything_starts(
    feature_cache: FeatureCache, stores: str, tmp_path: Path
) -> None:
    config = SweepConfig("linear", parse_space(["learning_rate=1e-3,-1", "layer=last,middle"]), QUICK)
    with pytest.raises(UsageError) as refused:
        sweep(config, {"stores": stores}, feature_cache, tmp_path / "runs", tmp_path / "out")
    message = str(refused.value)
    assert message.startswith("3 of 4 combinations cannot be trained")
    for settings in (
        "learning_rate=0.001, layer=middle",
        "learning_rate=-1, layer=last",
        "learning_rate=-1, layer=mid",
    ):
        assert f"\n  {settings}" in message
    assert not list(tmp_path.iterdir())


def test_a_complaint_about_all_combinations_is_said_once(feature_cache: FeatureCache) -> None:
    with pytest.raises(UsageError, match=r"^unknown setting of recipe 'linear' 'learn_rate': did you mean"):
        plan_sweep(SweepConfig("linear", parse_space(["learn_rate=1e-3,1e-4"])), feature_cache)


@pytest.mark.parametrize(
    ("over", "changes", "complaint"),
    [
        ("seed=1,2", {}, "give --seeds N"),
        ("epochs=1,2", {}, "named by --over and by --set"),
        ("depth=1,2", {"num_seeds": 0}, "--seeds is 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(over: str, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        SweepConfig("linear", parse_space([over]), QUICK, **changes)


def test_combinations_that_are_the_same_run_count_once(feature_cache: FeatureCache) -> None:
    config = SweepConfig("linear", parse_space(["learning_rate=1,1.0,0.5", "batch_size=8,16"]), QUICK, num_seeds=2)
    plan = plan_sweep(config, feature_cache)
    assert (len(plan.combinations), plan.num_duplicates, len(plan.configs)) == (4, 2, 8)
    assert [each.seed for each in plan.configs] == [0] * 4 + [1] * 4
    assert len({run_name(each, feature_cache) for each in plan.configs}) == 8


# What comes of it


def trained(score: float | None, loss: float = 1.0) -> Training:
    return Training(Path("runs/a"), 1, score, loss, 1, False, 10, 1.0, False)


def test_rows_are_ranked_by_their_mean_and_incomplete_ones_come_last(feature_cache: FeatureCache) -> None:
    config = SweepConfig("linear", parse_space(["batch_size=8,16,32,64"]), QUICK, num_seeds=2)
    plan = plan_sweep(config, feature_cache)
    failure = Failure("it is nan")
    outcomes = [[failure, failure], [trained(0.9), failure], [trained(0.2), trained(0.4)], [trained(0.5), trained(0.3)]]
    result = make_result(config, plan, outcomes)
    assert [row.settings["batch_size"] for row in result.rows] == [64, 32, 16, 8]
    assert result.rows[0].mean == pytest.approx(0.4)
    assert result.rows[0].spread == pytest.approx(stdev([0.5, 0.3]))
    assert (result.rows[2].spread, result.rows[3].mean) == (None, None)
    assert result.num_failed == 3
    assert "failed: batch_size=16, seed=1: it is nan" in result.lines()


def test_without_masks_the_lowest_loss_is_best(feature_cache: FeatureCache) -> None:
    config = SweepConfig("linear", parse_space(['loss={"bce":1.0},{"dice":1.0}']), QUICK)
    result = make_result(config, plan_sweep(config, feature_cache), [[trained(None, 2.0)], [trained(None, 1.5)]])
    assert (result.measure, [row.mean for row in result.rows]) == ("val_loss", [1.5, 2.0])
    assert "no masks" in result.notes[0]
    assert "loss are not measured alike" in result.notes[1]


def test_values_of_a_range_are_gathered_in_thirds(feature_cache: FeatureCache) -> None:
    config = SweepConfig("linear", parse_space(["batch_size=int:8:64"]), QUICK, num_random=6)
    plan = plan_sweep(config, feature_cache)
    sizes = [each.settings["batch_size"] for each in plan.combinations]
    found = make_result(config, plan, [[trained(size / 100)] for size in sizes]).marginals
    ordered = sorted(sizes)
    assert [each["value"] for each in found] == [f"{ordered[i]} to {ordered[i + 1]}" for i in (0, 2, 4)]
    assert [each["mean"] for each in found] == pytest.approx([(ordered[i] + ordered[i + 1]) / 200 for i in (0, 2, 4)])


def test_a_sweep_trains_what_each_run_learns_alone_and_nothing_twice(
    shell: Shell, feature_cache: FeatureCache, stores: str, tmp_path: Path
) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out"
    places = ("--stores", stores, "--runs", runs, "--out", out)
    over = ("--over", "learning_rate=1e-3,1e-1", 'loss={"bce":1.0},{"bce":1.0,"dice":1.0}')
    before = api.train("linear", feature_cache, runs, settings={**QUICK, "learning_rate": 1e-3, "loss": {"bce": 1.0}})
    assert not before.reused
    code, result = shell.json("sweep", "linear", *over, *places, *TYPED, "--seeds", 2)
    assert code == cli.DONE
    assert [run["reused"] for row in result["rows"] for run in row["runs"]].count(True) == 1
    assert len(digests(runs)) == 8
    for row in result["rows"]:
        for seed, run in enumerate(row["runs"]):
            settings = {**QUICK, **row["settings"], "seed": seed}
            alone = api.train("linear", feature_cache, tmp_path / "alone", settings=settings)
            assert (run["best_val_mean_iou"], run["best_val_loss"]) == (alone.best_val_mean_iou, alone.best_val_loss)
            weights = "best/model.safetensors"
            assert (Path(run["run_dir"]) / weights).read_bytes() == (alone.run_dir / weights).read_bytes()
    means = [row["mean"] for row in result["rows"]]
    assert means == sorted(means, reverse=True)
    for row in result["rows"]:
        scores = [run["best_val_mean_iou"] for run in row["runs"]]
        assert (row["mean"], row["spread"]) == (pytest.approx(mean(scores)), pytest.approx(stdev(scores)))
    for each in result["marginals"]:
        key, value = each["setting"], json.loads(each["value"])
        alike = [row["mean"] for row in result["rows"] if row["settings"][key] == value]
        assert (each["mean"], each["num_rows"]) == (pytest.approx(mean(alike)), 2)
    assert json.loads((out / "sweep.json").read_text()) == result
    rows = list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))
    assert [float(row["val_mean_iou"]) for row in rows] == means
    assert result["command"] in (out / "sweep.md").read_text()
    code, best = shell.json(*shlex.split(result["command"])[1:])
    assert best["reused"]
    assert best["run_dir"] == result["rows"][0]["runs"][0]["run_dir"]

    ended = digests(runs)
    code, again = shell.json("sweep", "linear", *over, *places, *TYPED, "--seeds", 2)
    assert code == cli.DONE
    assert all(run["reused"] for row in again["rows"] for run in row["runs"])
    assert digests(runs) == ended


def test_a_run_that_fails_ends_no_other(shell: Shell, stores: str, tmp_path: Path) -> None:
    places = ("--stores", stores, "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    over = ("--over", "learning_rate=1e30,1e-3", "batch_size=4,8")
    code, result = shell.json("sweep", "linear", *over, *places, *TYPED, "--processes", 1)
    assert code == cli.WANTING
    assert [len(row["runs"]) for row in result["rows"]] == [1, 1, 0, 0]
    failed = [row for row in result["rows"] if row["failures"]]
    assert [row["settings"]["learning_rate"] for row in failed] == [1e30, 1e30]
    assert all("lower learning_rate" in failure["reason"] for row in failed for failure in row["failures"])
    assert "learning_rate=0.001" in result["command"]


def test_a_dry_run_says_what_is_left_and_writes_nothing(shell: Shell, stores: str, tmp_path: Path) -> None:
    places = ("--stores", stores, "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    code, found = shell.json("sweep", "linear", "--over", "batch_size=8,16", *places, *TYPED, "--seeds", 3, "--dry-run")
    assert code == cli.DONE
    assert (found["num_runs"], found["num_trained"]) == (6, 0)
    assert [row["num_left"] for row in found["rows"]] == [3, 3]
    assert found["minutes_one_by_one"] == pytest.approx(sum(row["minutes"] for row in found["rows"]))
    assert not list(tmp_path.iterdir())


# What ends its processes


def test_a_process_that_is_killed_costs_one_run(stores: str, tmp_path: Path) -> None:
    configs = [make_config("linear", {**QUICK, "seed": seed}) for seed in range(3)]
    workplace = Workplace({"stores": stores}, tmp_path, "disk", 1)

    def kill_the_first() -> None:
        wait_until(lambda: [child for child in multiprocessing.active_children() if child.name == "sweep-0"])
        next(child for child in multiprocessing.active_children() if child.name == "sweep-0").kill()

    killer = threading.Thread(target=kill_the_first)
    killer.start()
    outcomes = {config.seed: outcome for config, outcome in train_apart(configs, workplace, 1)}
    killer.join()
    assert isinstance(outcomes[0], Failure)
    assert "was killed" in outcomes[0].reason
    assert isinstance(outcomes[1], Training)
    assert isinstance(outcomes[2], Training)
    assert not [child for child in multiprocessing.active_children() if child.name.startswith("sweep")]


def start(stores: str, folder: Path) -> subprocess.Popen[str]:
    """A sweep of 12 runs in a session of its own."""
    command = [sys.executable, "-m", "headstart.cli", "sweep", "linear", "--over", "learning_rate=1e-3,1e-2,1e-1"]
    command += ["batch_size=4,8", "--seeds", "2", "--set", "epochs=5", "target_size=[16,24]"]
    command += ["--stores", stores, "--runs", str(folder / "runs"), "--out", str(folder / "out")]
    return subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def children_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def any_finished(runs: Path) -> bool:
    return any(runs.glob("*/training.json"))


def have_ended(children: list[psutil.Process]) -> bool:
    return not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


LONG_RUN = """
import sys
from pathlib import Path
from headstart.recipes import make_config
from headstart.sweep_workers import Workplace, train_apart

if __name__ == "__main__":
    config = make_config("linear", {"epochs": 1000000, "target_size": [16, 24], "patience": None})
    list(train_apart([config], Workplace({"stores": sys.argv[1]}, Path(sys.argv[2]), "disk", 1), 1))
"""


def test_processes_end_with_their_parent_in_the_middle_of_a_run(stores: str, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", LONG_RUN, stores, str(tmp_path)])
    wait_until(lambda: any(tmp_path.glob("*/metrics.jsonl")) or process.poll() is not None)
    children = children_of(process)
    process.kill()
    process.wait()
    assert children
    wait_until(lambda: have_ended(children), seconds=20)


def test_a_sweep_that_is_killed_goes_on_where_it_was(shell: Shell, stores: str, tmp_path: Path) -> None:
    process = start(stores, tmp_path)
    wait_until(lambda: any_finished(tmp_path / "runs") or process.poll() is not None)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    ended = digests(tmp_path / "runs")
    assert 1 <= len(ended) < 12
    over = ("--over", "learning_rate=1e-3,1e-2,1e-1", "batch_size=4,8", "--seeds", 2)
    places = ("--stores", stores, "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    code, result = shell.json("sweep", "linear", *over, *places, "--set", "epochs=5", "target_size=[16,24]")
    assert code == cli.DONE
    reused = {Path(run["run_dir"]).name for row in result["rows"] for run in row["runs"] if run["reused"]}
    assert reused == ended.keys()
    after = digests(tmp_path / "runs")
    assert len(after) == 12
    assert {name: after[name] for name in ended} == ended


def test_ctrl_c_ends_all_processes_cleanly(stores: str, tmp_path: Path) -> None:
    process = start(stores, tmp_path)
    wait_until(lambda: any_finished(tmp_path / "runs") or process.poll() is not None)
    children = children_of(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to parent and children alike
    _, err = process.communicate(timeout=60)
    assert process.returncode == cli.INTERRUPTED, err
    assert "Traceback" not in err
    assert "run the same command again to go on" in err
    wait_until(lambda: have_ended(children))
    assert not list((tmp_path / "runs").rglob("*.tmp"))


@pytest.mark.parametrize(
    ("place", "num", "visible", "taken"), [(3, 2, None, "1"), (3, 2, "4,5", "5"), (0, 2, "GPU-a,GPU-b", "GPU-a")]
)
def test_processes_are_spread_over_gpus(
    place: int, num: int, visible: str | None, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    _take_gpu(place, num)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == taken


def test_one_gpu_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    _take_gpu(1, 1)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
