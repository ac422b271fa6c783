"""The evaluate benchmark at a size that takes seconds: its samples are sound, and it says what it measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import evaluate as benchmark
from benchmarks.evaluate import QUICK_SAMPLES, BenchmarkConfig, run
from benchmarks.evaluating import (
    CONTENDERS,
    GRID,
    LOGITS,
    SIZE,
    Request,
    Scored,
    make_folder,
    score_apart,
    score_here,
)
from cache_schema.samples import open_samples

NUM_SAMPLES = 70


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    make_folder(folder, NUM_SAMPLES)
    return folder


def test_there_are_logits_for_every_sample_and_their_masks_are_of_many_sizes(folder: Path) -> None:
    samples = open_samples(next(folder.glob("samples-*"))).samples
    assert len(samples) == NUM_SAMPLES
    assert (folder / LOGITS).stat().st_size == NUM_SAMPLES * GRID[0] * GRID[1] * 4
    assert {samples.size_of(row) for row in range(NUM_SAMPLES)} == {SIZE}
    areas = np.array([samples.target(row).sum() for row in range(NUM_SAMPLES)])
    assert areas.min() > 500
    assert len(set(areas.tolist())) > NUM_SAMPLES / 2


def test_contenders_give_the_same_metrics_of_masks_that_are_neither_right_nor_wrong(folder: Path) -> None:
    found = {name: score_here(Request(name, str(folder), NUM_SAMPLES)) for name in CONTENDERS}
    first, *others = (scored.metrics for scored in found.values())
    assert all(other == first for other in others)
    assert 0.3 < first["mean_iou"] < 0.99
    assert first["num_samples"] == NUM_SAMPLES
    assert all(min(scored.seconds, scored.memory_bytes) > 0 for scored in found.values())


def test_fewer_samples_are_the_first_of_them(folder: Path) -> None:
    metrics = [score_here(Request(name, str(folder), 65)).metrics for name in ("ours", "plain")]
    assert metrics[0] == metrics[1]
    assert metrics[0]["num_samples"] == 65


def test_a_pass_in_a_process_of_its_own_reports_back_or_says_why_not(folder: Path) -> None:
    request = Request("ours", str(folder), 10)
    assert score_apart(request).metrics == score_here(request).metrics
    with pytest.raises(RuntimeError, match="KeyError: 'theirs'"):
        score_apart(replace(request, contender="theirs"))


def test_contenders_that_disagree_are_not_compared(tmp_path: Path) -> None:
    def measure(request: Request) -> Scored:
        return Scored(request.num_samples, 1.0, 1, {"mean_iou": 0.5 + 0.1 * (request.contender == "plain")})

    with pytest.raises(RuntimeError, match="plain gives other metrics"):
        run(BenchmarkConfig(dir=tmp_path, num_samples=8, rounds=1), measure)


def test_quick_gives_all_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "run", lambda config: run(config, score_here))
    path = tmp_path / "evaluate.json"
    assert benchmark.main(["--quick", "--dir", str(tmp_path), "--json", str(path)]) == 0
    written = json.loads(path.read_bytes())
    assert written["benchmark"] == "evaluate"
    assert written["settings"]["num_samples"] == QUICK_SAMPLES
    names = [row["name"] for row in written["rows"]]
    assert names == [
        label
        for contender, num in [*((name, QUICK_SAMPLES) for name in CONTENDERS), ("ours", QUICK_SAMPLES // 4)]
        for label in (f"{contender}: {num} samples", f"{contender}: {num} samples, peak memory")
    ] + ["ours: peak memory for each sample more"]
    assert all(row["value"] > 0 for row in written["rows"][:-1])
    assert written["ratios"].keys() == {"plain", "ours, one thread"}
    assert str(tmp_path) not in json.dumps(written)
    assert [file.name for file in tmp_path.iterdir()] == ["evaluate.json"], "what was made is removed"
    assert "samples/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"), [(["--rounds", "0"], "rounds is 0"), (["--num-samples", "3"], "num_samples is 3")]
)
def test_a_mistake_is_one_sentence(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(options) == 2
    assert message in " ".join(capsys.readouterr().err.split())
