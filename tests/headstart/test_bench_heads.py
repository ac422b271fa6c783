"""`headstart bench heads`: one budget, faults told before any training, nothing trained twice, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tyro

from cache_schema.errors import UsageError
from cache_schema.features import FeatureCache
from headstart import api, bench_heads
from headstart.bench_commands import BenchHeads
from headstart.encoders import UNTRAINED_NOTE
from headstart.recipes import RECIPES
from tests.headstart.shell import Home

BUDGET = {"epochs": 1, "batch_size": 16, "prompts_per_image": 4, "target_size": [8, 12]}
SETTINGS = {**BUDGET, "film.dim": 8, "film.num_heads": 2}
TOLD = [f"{key}={json.dumps(value)}" for key, value in SETTINGS.items()]


def command(*arguments: object) -> Any:
    """Parse and run `headstart bench heads ...`."""
    texts = [str(argument) for argument in arguments]
    return tyro.cli(BenchHeads, args=texts, config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)).run()


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_it_trains_scores_and_goes_on_where_it_was(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out"
    told = ("--heads", "linear,film", "--stores", home.stores, "--runs", runs, "--seeds", 2, "--split", "test")
    board = command(*told, "--out", out, "--set", *TOLD)
    assert {entry["name"] for entry in board["heads"]} == {"linear", "film"}
    assert [[run["seed"] for run in entry["runs"]] for entry in board["heads"]] == [[0, 1], [0, 1]]
    assert sorted(path.name for path in out.iterdir()) == [
        f"leaderboard.{suffix}" for suffix in ("csv", "html", "json", "md")
    ]
    assert json.loads((out / "leaderboard.json").read_text()) == json.loads(json.dumps(board))
    assert board["notes"] == [UNTRAINED_NOTE]
    printed = capsys.readouterr().out
    assert "linear" in printed
    assert str(out / "leaderboard.html") in printed

    before = stamps(runs)
    assert len(list(runs.iterdir())) == 4
    again = command(*told, "--out", tmp_path / "again", "--set", *TOLD)
    assert stamps(runs) == before
    for entry, other in zip(board["heads"], again["heads"], strict=True):
        assert entry["metrics"] == other["metrics"]

    (tmp_path / "runs" / Path(board["heads"][0]["runs"][1]["run_dir"]).name / "training.json").unlink()
    (tmp_path / "runs" / Path(board["heads"][0]["runs"][1]["run_dir"]).name / "metrics.jsonl").unlink()
    third = command(*told, "--out", tmp_path / "third", "--set", *TOLD)
    assert third["heads"][0]["metrics"] == board["heads"][0]["metrics"], "what is missing is trained again, to the bit"
    kept = {path for path, stamp in stamps(runs).items() if before.get(path) == stamp}
    assert {Path(path).parent.name for path in kept if path.endswith("training.json")} == {
        Path(run["run_dir"]).name
        for entry in board["heads"]
        for run in entry["runs"]
        if run is not board["heads"][0]["runs"][1]
    }


def test_each_run_is_the_one_that_train_makes(feature_cache: FeatureCache, tmp_path: Path) -> None:
    plan = bench_heads.plan_bench(["linear"], feature_cache, tmp_path, num_seeds=2, settings=BUDGET)
    alone = api.train("linear", feature_cache, tmp_path, settings={**BUDGET, "seed": 1}, trackers=())
    assert plan.run_dirs(tmp_path, feature_cache)["linear"][1] == alone.run_dir
    assert [config.order_seed for config in plan.of_seed(1)] == [1]


def test_heads_that_a_cache_cannot_serve_are_all_named_before_any_training(
    feature_cache: FeatureCache, tmp_path: Path
) -> None:
    recipes = ["clipseg", "linear", "talk2dino"]
    with pytest.raises(UsageError) as fault:
        bench_heads.bench_heads(recipes, feature_cache, tmp_path / "runs", tmp_path / "out", settings=BUDGET)
    lines = str(fault.value).splitlines()
    assert lines[0] == "this cache cannot serve clipseg, talk2dino; nothing was trained."
    assert "layer" in lines[1]
    assert "--attention" in lines[2]
    assert "--skip-impossible" in lines[3]
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "out").exists()


def test_the_others_go_on_without_them_if_that_is_asked_for(feature_cache: FeatureCache, tmp_path: Path) -> None:
    board = bench_heads.bench_heads(
        ["clipseg", "linear"],
        feature_cache,
        tmp_path / "runs",
        tmp_path / "out",
        num_seeds=1,
        settings=BUDGET,
        skip_impossible=True,
    )
    assert [entry["name"] for entry in board["heads"]] == ["linear"]
    assert "layer" in board["left_out"]["clipseg"]
    assert "clipseg" in (tmp_path / "out" / "leaderboard.md").read_text().partition("## Left out")[2]
    with pytest.raises(UsageError, match="cannot serve clipseg"):
        bench_heads.plan_bench(["clipseg"], feature_cache, tmp_path, settings=BUDGET, skip_impossible=True)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (
            {"settings": {"film.prompts_per_image": 2}},
            r"epochs \(linear 6, film 20\); prompts_per_image .*--set epochs=... prompts_per_image=...",
        ),
        ({"settings": {**BUDGET, "seed": 3}}, "seed cannot be set here"),
        ({"settings": {**BUDGET, "film.data_seed": 3}}, "data_seed cannot be set here"),
        ({"settings": {**BUDGET, "dimm": 3}}, "dimm"),
        ({"settings": BUDGET, "num_seeds": 0}, "--seeds is 0"),
        ({"settings": BUDGET, "split": "validation"}, "Known: test, train, val"),
    ],
)
def test_mistakes_are_told_before_any_training(
    feature_cache: FeatureCache, tmp_path: Path, told: dict[str, Any], said: str
) -> None:
    assert RECIPES["linear"].epochs != RECIPES["film"].epochs
    with pytest.raises(UsageError, match=said):
        bench_heads.bench_heads(["linear", "film"], feature_cache, tmp_path / "runs", tmp_path / "out", **told)
    assert not (tmp_path / "runs").exists()


def test_no_head_is_a_mistake(home: Home) -> None:
    with pytest.raises(UsageError, match="name the heads"):
        command("--heads", ",", "--stores", home.stores)


def test_a_dry_run_writes_nothing_and_says_what_it_takes(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ("--heads", "linear,film,clipseg", "--stores", home.stores, "--runs", tmp_path / "runs")
    found = command(*told, "--out", tmp_path / "out", "--set", *TOLD, "--skip-impossible", "--dry-run")
    assert [one["name"] for one in found["heads"]] == ["linear", "film"]
    assert found["left_out"].keys() == {"clipseg"}
    assert found["train_s"] == 3 * sum(one["epoch_s"] * one["epochs"] for one in found["heads"])
    assert "2 heads with 3 seeds each" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "out").exists()
