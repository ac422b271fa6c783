"""Mistakes with values and places: each gets exit code 2, and what was there before stays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import headstart
from cache_schema.errors import UsageError
from cache_schema.features import FeatureCache
from evaluate.evaluation import evaluate_runs
from heads.runs import Training
from headstart import cli


@pytest.mark.parametrize(
    "setting",
    [
        "epochs=0",
        "batch_size=0",
        "checkpoint_steps=0",
        "prompts_per_image=0",
        "target_size=[48]",
        "target_size=[0,5]",
        "loss={}",
        'loss={"bce":"a"}',
        "mixed_precision=fp9",
        "learning_rate=-1",
        "seed=-1",
        "layer=foo",
    ],
)
def test_a_setting_out_of_range_is_the_users_mistake(
    setting: str, workspace: Path, feature_cache: FeatureCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "linear", "--stores", str(workspace / "stores"), "--runs", str(tmp_path / "runs")]
    assert cli.run([*command, "--set", setting]) == cli.MISTAKE
    assert setting.split("=")[0] in capsys.readouterr().err
    assert not list(tmp_path.rglob("config.json")), "a run that never began leaves no run folder"


@pytest.mark.parametrize("arguments", [["upsample=0"], ["hidden_dim=-1"], ["num_heads=0"], ["layers=last", "dim=2"]])
def test_an_argument_that_no_head_can_be_built_with_is_the_users_mistake(
    arguments: list[str], workspace: Path, feature_cache: FeatureCache, tmp_path: Path
) -> None:
    command = ["train", "cross_attention", "--stores", str(workspace / "stores"), "--runs", str(tmp_path / "runs")]
    assert cli.run([*command, "--set", *arguments]) == cli.MISTAKE


@pytest.mark.parametrize(
    "arguments",
    [["--device", "cuda:99"], ["--device", "foo"], ["--batch-size", "0"], ["--shard-rows", "0"], ["--layers"]],
)
def test_an_extraction_that_cannot_be_is_the_users_mistake(
    arguments: list[str], samples_path: Path, tmp_path: Path
) -> None:
    assert cli.run(["extract", str(samples_path), "--out", str(tmp_path), *arguments]) == cli.MISTAKE


def test_a_file_where_a_folder_is_wanted_is_named(
    scenes_root: Path, run: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for command in (
        ["prepare", "scenes", str(scenes_root), "--out", str(file)],
        ["evaluate", str(run.run_dir), "--out", str(file)],
        ["demo", "--out", str(file), "--num-images", "3"],
    ):
        assert cli.run(command) == cli.MISTAKE
        assert str(file) in capsys.readouterr().err


def test_a_loss_that_is_no_longer_finite_ends_training(feature_cache: FeatureCache, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"loss of linear is .* at step .*: lower learning_rate"):
        headstart.train(
            "linear",
            feature_cache,
            tmp_path,
            settings={"learning_rate": 1e38, "clip_norm": 1e30, "target_size": [8, 8]},
        )


def test_a_run_may_choose_another_precision_than_the_one_before(feature_cache: FeatureCache, tmp_path: Path) -> None:
    for precision in ("no", "bf16"):
        settings = {"epochs": 1, "target_size": [8, 8], "mixed_precision": precision}
        assert np.isfinite(headstart.train("linear", feature_cache, tmp_path, settings=settings).best_val_mean_iou)


def test_an_unfinished_run_is_not_evaluated_as_if_it_were(
    run: Training, feature_cache: FeatureCache, tmp_path: Path
) -> None:
    shutil.copytree(run.run_dir, tmp_path / "run")
    (tmp_path / "run" / "training.json").unlink()
    with pytest.raises(UsageError, match="is not trained to its end"):
        headstart.evaluate(tmp_path / "run", feature_cache)


def test_two_runs_of_one_head_are_told_apart(run: Training, feature_cache: FeatureCache, tmp_path: Path) -> None:
    shutil.copytree(run.run_dir, tmp_path / "linear-again")
    results = evaluate_runs([run.run_dir, tmp_path / "linear-again"], feature_cache, tmp_path / "out")
    assert [entry["head"] for entry in results["runs"]] == [run.run_dir.name, "linear-again"]
    assert len(results["seconds"]["evaluate"]) == 2


def test_a_run_evaluated_in_its_own_folder_keeps_the_whole_results(
    run: Training, feature_cache: FeatureCache, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        shutil.copytree(run.run_dir, tmp_path / name)
    results = headstart.evaluate([tmp_path / "a", tmp_path / "b"], feature_cache, out=tmp_path / "a")
    assert json.loads((tmp_path / "a" / "results.json").read_text()) == json.loads(json.dumps(results))
    assert len(json.loads((tmp_path / "b" / "results.json").read_text())["runs"]) == 1


def test_encoders_that_are_elsewhere_while_training_are_found_when_they_are_back(
    workspace: Path, feature_cache: FeatureCache, tmp_path: Path
) -> None:
    home = workspace / "encoders"
    home.rename(tmp_path / "away")
    try:
        settings = {"epochs": 1, "target_size": [8, 8], "seed": 5}
        trained = headstart.train("linear", feature_cache, workspace / "runs", settings=settings)
    finally:
        (tmp_path / "away").rename(home)
    assert headstart.load(trained, device="cpu").set_image(np.zeros((40, 40, 3), np.uint8)).predict("a circle")


def test_a_store_that_cannot_be_read_does_not_hide_the_others(
    workspace: Path, feature_cache: FeatureCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(workspace / "stores", tmp_path / "stores")
    (tmp_path / "stores" / feature_cache.images.store.path.name / "zarr.json").unlink()
    assert cli.run(["cache", "info", str(tmp_path / "stores")]) == cli.WANTING
    printed = capsys.readouterr().out
    assert "NOT READABLE" in printed
    assert feature_cache.fingerprints["samples"] in printed
    assert feature_cache.fingerprints["prompt_features"] in printed
