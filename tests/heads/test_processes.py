"""Several processes train one head: each takes its share of the batches, and they agree on everything."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cache_schema.features import FeatureCache
from heads.checkpoint import load_head
from heads.train import train
from heads.train_config import TrainConfig
from tests.processes import run_in_processes

CONFIG = TrainConfig(
    head="cross_attention",
    arguments={"dim": 8, "inner_dim": 8, "num_heads": 2, "hidden_dim": 16},
    loss={"bce": 1.0},
    epochs=2,
    batch_size=6,
    prompts_per_image=2,
    learning_rate=1e-2,
    schedule="constant",
    warmup=0.0,
    clip_norm=0.0,
    target_size=(8, 8),
)


def train_in_processes(num: int, config: TrainConfig, cache: FeatureCache, run_dir: Path) -> list[dict[str, Any]]:
    stores = [cache.samples.path, cache.images.store.path, cache.prompts.store.path]
    asked = {"stores": list(map(str, stores)), "config": dataclasses.asdict(config), "run_dir": str(run_dir)}
    printed = run_in_processes(num, ["-m", "tests.heads.train_apart", json.dumps(asked)])
    return [json.loads(stdout.strip().splitlines()[-1]) for stdout in printed]


@pytest.fixture(scope="module")
def together(feature_cache: FeatureCache, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train_in_processes(2, CONFIG, feature_cache, tmp_path_factory.mktemp("runs") / "together")


def test_processes_agree_on_what_came_of_it(together: list[dict[str, Any]]) -> None:
    first, second = ({key: value for key, value in told.items() if key != "seconds"} for told in together)
    assert first == second


def test_a_loss_that_compares_looks_at_the_pairs_of_all_processes(feature_cache: FeatureCache, tmp_path: Path) -> None:
    """Two processes with half the batch each learn what one learns from the whole."""
    config = dataclasses.replace(
        CONFIG,
        head="talk2dino",
        arguments={"alignment": "cls", "contrastive_scale": 10.0, "contrastive_bias": -5.0},
        loss={"clip_contrastive": 1.0, "sigmoid_contrastive": 0.1},
    )
    told = train_in_processes(2, config, feature_cache, tmp_path / "together")
    alone = train(dataclasses.replace(config, batch_size=12), feature_cache, tmp_path / "alone")
    assert told[0]["num_steps"] == alone.num_steps
    expected = load_head(alone.run_dir / "last")[1].state_dict()
    found = load_head(Path(told[0]["run_dir"]) / "last")[1].state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-2)
    recall = [
        json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["val_text_to_image_recall@1"]
        for run in (Path(told[0]["run_dir"]), alone.run_dir)
    ]
    assert recall[0] == pytest.approx(recall[1], abs=0.05)


def test_two_processes_learn_what_one_learns_from_both_their_batches(
    together: list[dict[str, Any]], feature_cache: FeatureCache, tmp_path: Path
) -> None:
    alone = train(dataclasses.replace(CONFIG, accumulate=2), feature_cache, tmp_path / "alone")
    assert together[0]["num_steps"] == alone.num_steps // 2
    expected = load_head(alone.run_dir / "last")[1].state_dict()
    found = load_head(Path(together[0]["run_dir"]) / "last")[1].state_dict()
    assert alone.num_steps % (2 * CONFIG.epochs) == 0, "else the processes come out even with one batch more"
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-2)
    assert together[0]["best_val_loss"] == pytest.approx(alone.best_val_loss, rel=0.05)
