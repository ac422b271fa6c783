"""benchmarks/pamr.py at a size that takes seconds: every way refines to the same masks, and the report says what of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import pamr as benchmark
from benchmarks.pamr import (
    OURS,
    BenchmarkConfig,
    WrongMasksError,
    make_case,
    refine_at_once,
    refine_in_chunks,
    refine_plainly,
    run,
)

SMALL = BenchmarkConfig(num_classes=7, num_recomputed=5, height=30, width=41, rounds=2)


@pytest.mark.parametrize("refine", [refine_in_chunks, refine_plainly])
@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_every_way_gives_the_same_masks(refine, chunk):
    image, masks = (values.double() for values in make_case(SMALL))
    ours = refine_at_once(image, masks)

    plain = refine(image, masks, chunk) if refine is refine_in_chunks else refine(image.float(), masks.float(), chunk)
    torch.testing.assert_close(plain.double(), ours, rtol=0, atol=1e-5)
    assert (ours - masks).abs().max() > 0.01, "nothing was refined"


def test_the_case_is_the_same_each_time_and_fills_its_range():
    for once, again in zip(make_case(SMALL), make_case(SMALL), strict=True):
        assert torch.equal(once, again)
        assert 0 <= once.min() < 0.1
        assert 0.9 < once.max() <= 1


def test_the_report_has_a_rate_for_every_way_and_ratios_over_ours(tmp_path: Path):
    run(SMALL).write_json(tmp_path / "pamr.json")
    written = json.loads((tmp_path / "pamr.json").read_bytes())

    assert written["benchmark"] == "pamr"
    assert written["settings"]["num_classes"] == 7
    *rates, furthest = written["rows"]
    others = [
        f"{whose}, an affinity for {every}"
        for every in ("each class", "every 8 classes")
        for whose in ("plain", "ours")
    ]
    assert [row["name"] for row in rates] == [OURS, *others]
    assert all(0 < row["low"] <= row["value"] <= row["high"] for row in rates)
    assert [row["note"] for row in rates] == ["7 classes a turn"] + ["5 classes a turn"] * 4
    assert 0 <= furthest["value"] <= 1e-4
    assert set(written["ratios"]) == {f"one affinity over {name}" for name in others}


def test_a_way_that_refines_to_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmark, "refine_plainly", lambda image, masks, chunk: masks)
    with pytest.raises(WrongMasksError, match="plain, an affinity for each class gives masks"):
        run(SMALL)


def test_quick_gives_all_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "pamr.json"
    assert benchmark.main(["--quick", "--json", str(path)]) == 0
    assert len(json.loads(path.read_bytes())["ratios"]) == 4
    assert "classes/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "rounds is 0"),
        (["--num-classes", "3", "--num-recomputed", "4"], "num_classes is 3: give a whole number of at least 4"),
    ],
)
def test_a_mistake_is_one_sentence(options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert benchmark.main(options) == 2
    assert message in " ".join(capsys.readouterr().err.split())
