"""Heads go to the Hugging Face Hub and come back: files without code, and a card that says what they were scored on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from cache_schema.errors import UsageError
from cache_schema.features import FeatureCache
from heads.checkpoint import load_head
from heads.hub import HubHead
from heads.runs import Training
from heads.train import train
from heads.train_config import TrainConfig


@pytest.fixture(scope="module")
def trained(feature_cache: FeatureCache, tmp_path_factory: pytest.TempPathFactory) -> Training:
    config = TrainConfig(head="linear", epochs=1, target_size=(8, 8))
    run = train(config, feature_cache, tmp_path_factory.mktemp("runs") / "run")
    results = {
        "protocol": {"dataset": "scenes", "split": "val", "threshold": 0.5},
        "runs": [
            {"run_dir": "elsewhere/other", "metrics": {"mean_iou": 0.75, "num_samples": 12, "p_at_0.5": 0.875}},
            {"run_dir": "elsewhere/run", "metrics": {"mean_iou": 0.25, "num_samples": 12, "p_at_0.5": 0.125}},
        ],
        "provenance": {**feature_cache.fingerprints, "split": "val"},
        "baselines": {"all_empty": {"mean_iou": 0.0625, "p_at_0.5": None}},
    }
    (run.run_dir / "results.json").write_text(json.dumps(results))
    return run


def test_a_head_comes_back_as_it_was(trained: Training, tmp_path: Path) -> None:
    HubHead.of_run(trained.run_dir).save_pretrained(tmp_path / "head")
    back = HubHead.from_pretrained(tmp_path / "head")
    spec, head = load_head(trained.run_dir / "best")
    assert back.spec == spec
    for name, value in head.state_dict().items():
        assert torch.equal(back.head.state_dict()[name], value)
    back.save_pretrained(tmp_path / "again")
    files = {path.name for path in (tmp_path / "head").iterdir()}
    assert files == {"config.json", "model.safetensors", "facts.json", "README.md"}
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "head" / name).read_bytes()


def test_the_card_names_protocol_scores_baselines_and_fingerprints(
    trained: Training, feature_cache: FeatureCache, tmp_path: Path
) -> None:
    HubHead.of_run(trained.run_dir).save_pretrained(tmp_path / "head")
    card = (tmp_path / "head" / "README.md").read_text()
    for part in ("pipeline_tag: image-segmentation", "threshold 0.5", "| linear | 0.250 | 0.125 |"):
        assert part in card
    assert "| (all_empty) | 0.062 | - |" in card
    assert all(digest in card for digest in feature_cache.fingerprints.values())
    assert all(digest in card for digest in feature_cache.encoder_fingerprints.values())
    assert str(tmp_path) not in card


def test_a_head_that_was_not_scored_says_nothing_of_scores(trained: Training, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("config.json", "best/config.json", "best/model.safetensors"):
        path = tmp_path / "run" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((trained.run_dir / name).read_bytes())
    HubHead.of_run(tmp_path / "run").save_pretrained(tmp_path / "head")
    assert "Scores" not in (tmp_path / "head" / "README.md").read_text()


@pytest.mark.parametrize("change", ["of other stores", "of other runs", "of two that cannot be told apart"])
def test_scores_that_are_not_of_this_run_on_its_stores_are_not_told(
    change: str, trained: Training, tmp_path: Path
) -> None:
    shutil.copytree(trained.run_dir, tmp_path / "run")
    path = tmp_path / "run" / "results.json"
    results = json.loads(path.read_text())
    assert HubHead.of_run(tmp_path / "run").facts["metrics"]["mean_iou"] == 0.25
    if change == "of other stores":
        results["provenance"]["samples"] = "0" * 64
    elif change == "of other runs":
        del results["runs"][1]
    else:
        results["runs"][0]["run_dir"] = "yonder/run"
    path.write_text(json.dumps(results))
    facts = HubHead.of_run(tmp_path / "run").facts
    assert facts["metrics"] is facts["protocol"] is facts["baselines"] is None


def test_of_runs_whose_folders_have_one_name_the_path_decides(trained: Training, tmp_path: Path) -> None:
    shutil.copytree(trained.run_dir, tmp_path / "run")
    path = tmp_path / "run" / "results.json"
    results = json.loads(path.read_text())
    results["runs"][0]["run_dir"] = str(tmp_path / "run")
    path.write_text(json.dumps(results))
    assert HubHead.of_run(tmp_path / "run").facts["metrics"]["mean_iou"] == 0.75


def test_what_is_no_folder_and_not_at_the_hub_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no head at nobody/nothing"):
        HubHead.from_pretrained("nobody/nothing", local_files_only=True)
    with pytest.raises(UsageError, match="it needs config"):
        HubHead.from_pretrained(tmp_path)
