"""The evaluate stage: its numbers against a plain recount, its files, and what it refuses."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from pycocotools import mask as coco_mask
from torch import nn

from cache_schema.errors import StoreMismatchError, UsageError
from cache_schema.features import FeatureCache
from evaluate import evaluation as evaluation_module
from evaluate import split_scores
from evaluate.evaluation import evaluate_run, evaluate_runs, label_runs, predict_rows
from evaluate.examples import Scored, make_examples, make_several
from evaluate.metrics import SampleScores, object_size, score_mask
from evaluate.protocols import PROTOCOLS
from evaluate.split_scores import score_split
from heads.checkpoint import load_head
from heads.data import CachedSplit, Draw
from heads.inputs import Head, HeadInputs, HeadOutputs
from heads.runs import Training
from tests.processes import run_in_processes


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


def columns_of(scores: SampleScores) -> dict[str, list[int]]:
    return {column.name: getattr(scores, column.name).tolist() for column in dataclasses.fields(scores)}


def test_counts_are_to_the_pixel_those_of_the_masks_in_the_pictures(run: Training, feature_cache: FeatureCache) -> None:
    evaluation = evaluate_run(run.run_dir, feature_cache, "val")
    predicted = predict_rows(evaluation.head, feature_cache, "val", evaluation.samples)
    samples = feature_cache.samples.samples
    plain = [
        score_mask(predicted[row].mask, samples.target(row), no_target=samples.no_target[row])
        for row in evaluation.samples.tolist()
    ]
    assert columns_of(evaluation.scores) == columns_of(SampleScores.concatenate(plain))


def test_neither_the_batch_nor_the_number_of_threads_changes_a_count(
    run: Training, feature_cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With logits that do not depend on the batch, as a head's do in a last bit."""
    head = Marker()
    whole = score_split(head, feature_cache, "val", Accelerator())
    for batch_size, cores in ((1, 1), (3, 3), (5, 2)):
        monkeypatch.setattr(split_scores, "BATCH_SIZE", batch_size)
        monkeypatch.setattr(split_scores, "default_threads", lambda cores=cores: cores)
        found = score_split(head, feature_cache, "val", Accelerator())
        assert found.samples.tolist() == whole.samples.tolist()
        assert columns_of(found.scores) == columns_of(whole.scores)
        assert found.predicted_iou.tolist() == whole.predicted_iou.tolist()


class Marker(Head):
    """Marks a box whose width and certainty a prompt's first pooled feature decides; and says two things more."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = ("last",)
        self.reads_tokens = False
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, inputs: HeadInputs) -> HeadOutputs:
        said = (inputs.pooled[:, 0] * 10 * self.scale).sigmoid()
        across = torch.linspace(0, 1, 12)
        logits = (said[:, None, None] - across).expand(-1, 8, -1) * 6
        return HeadOutputs(logits, iou=said, no_target_logits=said - 0.5)


def test_what_a_head_says_of_targets_and_of_its_own_masks_is_kept_by_sample(feature_cache: FeatureCache) -> None:
    found = score_split(Marker(), feature_cache, "val", Accelerator())
    pooled, samples = feature_cache.prompts.pooled(), feature_cache.samples.samples
    said = [
        1 / (1 + math.exp(-10 * float(pooled[feature_cache.prompt_rows[samples.prompt_rows[row]], 0])))
        for row in found.samples.tolist()
    ]
    assert found.predicted_iou == pytest.approx(said, abs=1e-5)
    assert found.scores.predicted_no_target.tolist() == [share > 0.5 for share in said]
    assert len(set(found.scores.predicted_px.tolist())) > 1


@pytest.mark.parametrize("batch_size", [3, 64], ids=["both have batches", "one has none"])
def test_two_processes_find_and_write_what_one_does(
    batch_size: int, run: Training, feature_cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(run.run_dir, run_dir)
    told = evaluate_in_processes(2, feature_cache, run_dir, tmp_path / "together", batch_size)
    monkeypatch.setattr(split_scores, "BATCH_SIZE", batch_size)
    alone = json.loads(json.dumps(evaluate_runs([run_dir], feature_cache, tmp_path / "alone", split="val")))
    for results in (*told, alone, json.loads((tmp_path / "together" / "results.json").read_text())):
        results["seconds"] = {}
    assert told == [alone, alone]
    tables = [(tmp_path / place / "samples.csv").read_bytes() for place in ("together", "alone")]
    assert tables[0] == tables[1]


def evaluate_in_processes(
    num: int, cache: FeatureCache, run_dir: Path, out: Path, batch_size: int
) -> list[dict[str, Any]]:
    stores = [str(path) for path in (cache.samples.path, cache.images.store.path, cache.prompts.store.path)]
    asked = {"stores": stores, "run_dir": str(run_dir), "out": str(out), "split": "val", "batch_size": batch_size}
    printed = run_in_processes(num, ["-m", "tests.evaluate.score_apart", json.dumps(asked)])
    return [json.loads(stdout.strip().splitlines()[-1]) for stdout in printed]


def test_intervals_hold_their_metrics_and_say_how_they_were_made(
    run: Training, feature_cache: FeatureCache, tmp_path: Path
) -> None:
    results = evaluate_runs([run.run_dir], feature_cache, tmp_path)
    (entry,) = results["runs"]
    images = feature_cache.samples.samples.image_rows[feature_cache.usable_samples("val")]
    assert results["bootstrap"]["num_images"] == len(set(images.tolist())) > 1
    assert entry["intervals"].keys() == entry["metrics"].keys() - {"num_samples"}
    low, high = entry["intervals"]["mean_iou"]
    assert low < entry["metrics"]["mean_iou"] < high


def test_every_sample_has_its_line_in_the_table(run: Training, feature_cache: FeatureCache, tmp_path: Path) -> None:
    evaluation = evaluate_run(run.run_dir, feature_cache, "val")
    results = evaluate_runs([run.run_dir], feature_cache, tmp_path)
    with (tmp_path / "samples.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["iou"]) for line in lines] == evaluation.scores.iou.tolist()
    mean = math.fsum(float(line["iou"]) for line in lines) / len(lines)
    assert mean == results["runs"][0]["metrics"]["mean_iou"]
    samples = feature_cache.samples.samples
    assert [line["id"] for line in lines] == [samples.ids[row] for row in evaluation.samples]
    assert (run.run_dir / "samples.csv").read_bytes() == (tmp_path / "samples.csv").read_bytes()


def test_a_protocol_decides_where_heads_and_baselines_are_compared(
    run: Training, feature_cache: FeatureCache, tmp_path: Path
) -> None:
    """Predictions at 480 x 480 are logits read there; truths are resized by torch."""
    protocol = PROTOCOLS["resized-480"]
    results = evaluate_runs([run.run_dir], feature_cache, tmp_path, protocol=protocol)
    assert results["protocol"]["name"] == "resized-480"
    assert "480x480" in (tmp_path / "report.html").read_text()
    samples, evaluation = feature_cache.samples.samples, evaluate_run(run.run_dir, feature_cache, "val", protocol)
    original = evaluate_run(run.run_dir, feature_cache, "val")
    assert evaluation.scores.area_px.tolist() == original.scores.target_px.tolist()
    shares = {name: [] for name in ("all_full", "centre_prior")}
    for place, row in enumerate(evaluation.samples.tolist()):
        mask = torch.from_numpy(samples.target(row))[None, None].float()
        truth = F.interpolate(mask, (480, 480), mode="nearest-exact")
        target_px = int(truth.sum())
        assert int(evaluation.scores.target_px[place]) == target_px
        central = int(truth[0, 0, 120:360, 120:360].sum())
        shares["all_full"].append(target_px / 480**2)
        shares["centre_prior"].append(central / (240**2 + target_px - central))
        assert abs(evaluation.scores.iou[place] - original.scores.iou[place]) < 0.1
    for name, ious in shares.items():
        assert results["baselines"][name]["mean_iou"] == pytest.approx(np.mean(ious))
    sizes = {object_size(area) for area in original.scores.target_px.tolist()}
    assert results["runs"][0]["slices"]["object_size"].keys() == sizes


def test_coco_results_are_the_masks_that_were_scored(
    run: Training, feature_cache: FeatureCache, tmp_path: Path
) -> None:
    results = evaluate_runs([run.run_dir], feature_cache, tmp_path, coco_results=tmp_path / "found.json")
    found = json.loads(Path(results["coco_results"]["results"]).read_text())
    truth = json.loads(Path(results["coco_results"]["truth"]).read_text())
    evaluation = evaluate_run(run.run_dir, feature_cache, "val")
    expected = {
        row + 1: iou
        for row, iou, px in zip(
            evaluation.samples.tolist(), evaluation.scores.iou, evaluation.scores.predicted_px, strict=True
        )
        if px
    }
    truths = {entry["image_id"]: entry["segmentation"] for entry in truth["annotations"]}
    ious = {
        entry["image_id"]: coco_mask.iou([entry["segmentation"]], [truths[entry["image_id"]]], [0])[0, 0]
        for entry in found
        if entry["image_id"] in truths
    }
    assert ious == pytest.approx({row: iou for row, iou in expected.items() if row in truths})
    assert {entry["image_id"] for entry in found} == expected.keys()
    assert all(0.5 < entry["score"] <= 1 for entry in found)


@pytest.mark.parametrize(
    ("num_runs", "name", "message"), [(2, "found.json", "one by one"), (1, "found.txt", r"let it end in \.json")]
)
def test_coco_results_that_cannot_be_are_refused_before_anything_is_scored(
    num_runs: int,
    name: str,
    message: str,
    run: Training,
    feature_cache: FeatureCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scored = []
    monkeypatch.setattr(evaluation_module, "evaluate_run", lambda *arguments: scored.append(arguments))
    with pytest.raises(UsageError, match=message):
        evaluate_runs([run.run_dir] * num_runs, feature_cache, tmp_path / "out", coco_results=tmp_path / name)
    assert scored == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [b"no image", b"", None], ids=["other bytes", "empty", "gone"])
def test_a_picture_that_cannot_be_read_is_left_out(
    damage: bytes | None, run: Training, feature_cache: FeatureCache, tmp_path: Path
) -> None:
    evaluation = evaluate_run(run.run_dir, feature_cache, "val")
    scored = Scored(evaluation.samples, evaluation.scores)
    store = feature_cache.samples
    assert store.image_dir is not None

    def predict(rows: np.ndarray) -> dict[int, np.ndarray]:
        return {row: store.samples.target(row) for row in rows.tolist()}

    before = make_examples(store, scored, predict), make_several(store, scored, predict)
    shutil.copytree(store.image_dir, tmp_path / "images")
    copied = dataclasses.replace(store, image_dir=tmp_path / "images")
    shown_first = store.samples.image_rows[scored.rows[np.argmax(evaluation.scores.iou)]]
    most = np.bincount(store.samples.image_rows[scored.rows]).argmax()
    for image in {int(shown_first), int(most)}:
        path = tmp_path / "images" / store.samples.images.paths[image]
        path.unlink() if damage is None else path.write_bytes(damage)
    examples, several = make_examples(copied, scored, predict), make_several(copied, scored, predict)
    assert 0 < len(examples) < len(before[0])
    assert 0 < len(several) < len(before[1])


def test_every_run_has_its_results_before_the_report_is_drawn(
    run: Training, feature_cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run.run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("results.json", "samples.csv"))

    def fail(*_: Any) -> None:
        raise OSError("no room for the report")

    monkeypatch.setattr(evaluation_module, "write_report", fail)
    with pytest.raises(OSError, match="no room"):
        evaluate_runs([tmp_path / "run"], feature_cache, tmp_path / "out")
    for folder in ("run", "out"):
        assert len(json.loads((tmp_path / folder / "results.json").read_text())["runs"]) == 1
        assert (tmp_path / folder / "samples.csv").is_file()


@pytest.mark.parametrize(
    ("runs", "labels"),
    [
        (["film runs/a", "linear runs/a"], ["film", "linear"]),
        (["film runs/a", "film runs/b"], ["a", "b"]),
        (["film one/a", "film two/a", "film two/b"], ["a (one)", "a (two)", "b"]),
        (["film x/one/a", "film y/one/a"], ["a (one)-1", "a (one)-2"]),
        (["film runs/a", "film runs/a"], ["a (runs)-1", "a (runs)-2"]),
    ],
)
def test_no_two_runs_are_called_the_same(
    runs: list[str], labels: list[str], run: Training, feature_cache: FeatureCache
) -> None:
    scored = evaluate_run(run.run_dir, feature_cache, "val")
    named = [one.split() for one in runs]
    evaluations = [dataclasses.replace(scored, name=head, run_dir=Path(folder)) for head, folder in named]
    assert label_runs(evaluations) == labels
