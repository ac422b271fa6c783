"""Several processes adapt encoders together: they learn what one learns from all their batches, and one speaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cache_schema.features import FeatureCache
from headstart import api
from tests.processes import run_in_processes

STAGE = {
    "batch_size": 6,
    "prompts_per_image": 2,
    "epochs": 1,
    "target_size": [8, 12],
    "learning_rate": 1e-2,
    "schedule": "constant",
    "warmup": 0.0,
    "clip_norm": 0.0,
}
SETTINGS: dict[str, Any] = {
    **{f"{stage}.{name}": value for stage in ("contrastive", "segmentation") for name, value in STAGE.items()},
    "segmentation.loss": {"bce": 1.0},
    "segmentation.dim": 8,
    "segmentation.inner_dim": 8,
    "segmentation.hidden_dim": 16,
    "segmentation.self_attention": False,
    "images_at_once": 2,
    "rank": 2,
    "adapter_rate": 0.1,
}


def finetune_in_processes(num: int, cache: FeatureCache, runs: Path) -> dict[str, Any]:
    stores = {"samples": cache.samples.path, "images": cache.images.store.path, "prompts": cache.prompts.store.path}
    named = [word for name, path in stores.items() for word in (f"--{name}", str(path))]
    settings = [f"{name}={json.dumps(value)}" for name, value in SETTINGS.items()]
    command = ["finetune", "scenes", "--stores", str(cache.samples.path.parent), *named, "--runs", str(runs), "--json"]
    first, *others = run_in_processes(num, ["-m", "headstart.cli", *command, "--set", *settings])
    assert others == [""] * (num - 1), "one process speaks"
    return json.loads(first)


def adapters_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return {
        f"{folder}/{name}": value
        for folder in ("adapter", "text_adapter")
        for name, value in load_file(run_dir / folder / "adapter_model.safetensors").items()
    }


def test_two_processes_adapt_encoders_as_one_does_with_both_their_batches(
    feature_cache: FeatureCache, tmp_path: Path
) -> None:
    first = finetune_in_processes(2, feature_cache, tmp_path / "together")
    alone = api.finetune(
        "scenes",
        feature_cache,
        tmp_path / "alone",
        settings={**SETTINGS, "contrastive.batch_size": 12, "images_at_once": 3, "segmentation.accumulate": 2},
    )
    steps = {name: stage["num_steps"] for name, stage in first["stages"].items()}
    assert steps["contrastive"] == alone.stages["contrastive"].num_steps
    assert 2 * steps["segmentation"] == alone.stages["segmentation"].num_steps
    together = Path(first["run_dir"])
    for stage in ("contrastive", "segmentation"):
        found, expected = adapters_of(together / stage), adapters_of(alone.run_dir / stage)
        assert found.keys() == expected.keys()
        moved = max(float(value.abs().max()) for name, value in expected.items() if "lora_B" in name)
        assert moved > 1e-3, "adapters begin with B = 0"
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=2e-4, rtol=2e-2, msg=f"{stage} {name}")
    assert first["stages"]["segmentation"]["best_val_loss"] == pytest.approx(
        alone.stages["segmentation"].best_val_loss, rel=0.05
    )
