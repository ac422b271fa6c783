"""The demo's road through both LoRA stages and back to a cache, on few scenes: every step is there and is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from heads.runs import read_history
from headstart import lora_demo
from headstart.lora_demo import run_lora_demo

NUM_IMAGES = 24


def test_the_road_ends_on_a_new_cache_and_is_walked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lora_demo, "EPOCHS", 1)
    results = run_lora_demo(tmp_path, NUM_IMAGES, num_seeds=2)
    names = [step["name"] for step in results["steps"]]
    assert [name.split()[0] for name in names] == ["frozen", "after", "end", "new"]
    assert [step["seeds"] for step in results["steps"]] == [2, 2, 1, 2]
    assert results["steps"][0]["mean_iou_spread"] > 0
    assert results["steps"][2]["mean_iou_spread"] is None
    stores = sorted(path.name.partition("-")[0] for path in (tmp_path / "stores").glob("*.zarr"))
    assert stores == ["image_features"] * 3 + ["prompt_features"] * 3 + ["samples"]
    assert json.loads((tmp_path / "results.json").read_bytes())["steps"] == results["steps"]
    stages = {name: Path(found["run_dir"]) for name, found in results["finetuning"].items()}
    assert all((run_dir / "report.html").is_file() for run_dir in stages.values())
    page = (stages["segmentation"] / "report.html").read_text()
    assert all(name in page for name in names)

    # The second stage begins with the first head on the cache of the first, on the encoders that made that cache.
    second = read_history(stages["segmentation"] / "segmentation")
    config = json.loads((stages["segmentation"] / "segmentation" / "config.json").read_bytes())
    heads = {
        json.loads((run / "config.json").read_bytes())["stores"]["image_features"]: run
        for run in tmp_path.glob("runs/cross_attention-*")
        if json.loads((run / "config.json").read_bytes())["config"]["seed"] == 0
    }
    first_head = read_history(heads[config["stores"]["image_features"]])
    assert second[0]["epoch"] == 0
    assert second[0]["val_mean_iou"] == pytest.approx(first_head[-1]["val_mean_iou"], abs=0.01)
    capsys.readouterr()

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = run_lora_demo(tmp_path, NUM_IMAGES, num_seeds=2)
    assert again["steps"] == results["steps"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before
    printed = capsys.readouterr().out
    assert "new heads on the cache of the adapted encoders" in printed
