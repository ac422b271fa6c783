"""The evaluate stage: its numbers against a plain recount, its files, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cache_schema.errors import StoreMismatchError, UsageError
from cache_schema.features import FeatureCache
from evaluate.evaluation import evaluate_run, evaluate_runs
from heads.checkpoint import load_head
from heads.data import CachedSplit, Draw
from heads.runs import Training


def test_scores_are_those_of_masks_made_one_by_one_at_original_size(run: Training, feature_cache: FeatureCache) -> None:
    evaluation = evaluate_run(run.run_dir, feature_cache, "val")
    samples = feature_cache.samples.samples
    _, head = load_head(run.run_dir / "best")
    data = CachedSplit(feature_cache, "val", (1, 1))
    assert sorted(evaluation.samples.tolist()) == samples.rows_of_split("val").tolist()
    for place, row in enumerate(evaluation.samples.tolist()):
        with torch.inference_mode():
            logits = head(data.load(Draw.whole(np.array([row]))).inputs.to("cpu")).mask_logits
        resized = torch.nn.functional.interpolate(logits[None], size=samples.size_of(row), mode="bilinear")[0, 0]
        predicted, truth = (resized.sigmoid() > 0.5).numpy(), samples.target(row)
        # Batching may move a logit by a last bit, and a pixel with it.
        assert abs(int((predicted & truth).sum()) - int(evaluation.scores.intersection_px[place])) <= 2
        assert abs(int((predicted | truth).sum()) - int(evaluation.scores.union_px[place])) <= 2
        assert int(truth.sum()) == evaluation.scores.target_px[place]


def test_results_have_the_shape_that_scripts_rely_on(
    run: Training, feature_cache: FeatureCache, tmp_path: Path
) -> None:
    results = evaluate_runs([run.run_dir], feature_cache, tmp_path / "out", notes=["a note"])
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(results))
    (entry,) = results["runs"]
    assert entry["head"] == "linear"
    assert {"mean_iou", "overall_iou", "p_at_0.5", "giou", "n_acc"} <= entry["metrics"].keys()
    kinds = feature_cache.samples.samples.tags["kind"]
    of_val = {kinds[row] for row in feature_cache.samples.samples.rows_of_split("val")}
    assert entry["slices"]["kind"].keys() == of_val
    assert all({"mean_iou", "num_samples"} <= metrics.keys() for metrics in entry["slices"]["kind"].values())
    assert results["baselines"].keys() == {"all_empty", "all_full", "centre_prior"}
    assert results["protocol"]["resolution"] == "original"
    assert results["protocol"]["split"] == "val"
    assert json.loads((run.run_dir / "results.json").read_text())["runs"] == [json.loads(json.dumps(entry))]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "a note" in page
    assert "cross" in page or "circle" in page


def test_a_run_is_not_scored_on_features_of_another_encoder(
    run: Training, feature_cache: FeatureCache, tmp_path: Path
) -> None:
    other = tmp_path / "run"
    shutil.copytree(run.run_dir, other)
    config = json.loads((other / "config.json").read_text())
    config["encoder_fingerprints"]["image"] = "0" * 64
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(StoreMismatchError, match="another image encoder"):
        evaluate_run(other, feature_cache, "val")


def test_a_folder_that_is_no_run_is_refused(feature_cache: FeatureCache, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not trained to its end"):
        evaluate_run(tmp_path, feature_cache, "val")


def test_an_unknown_split_is_refused_with_the_known_ones(run: Training, feature_cache: FeatureCache) -> None:
    with pytest.raises(UsageError, match="Known: test, train, val"):
        evaluate_run(run.run_dir, feature_cache, "validation")
