"""The benchmark of LoRA steps at a size that takes seconds: both ways learn the same, and it says so if they do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import finetune
from benchmarks.finetune import PIXELS, STATES
from extract.live_images import StateSource

TINY = [
    *"--model dinov2-tiny@56 --tiny-text --num-images 12 --batch-size 8".split(),
    *"--num-batches 2 --rounds 1 --first-blocks 1".split(),
]


def test_it_compares_a_start_at_the_pixels_with_one_at_a_block(tmp_path: Path) -> None:
    path, work = tmp_path / "finetune.json", tmp_path / "work"
    work.mkdir()
    assert finetune.main([*TINY, "--dir", str(work), "--json", str(path)]) == 0
    assert list(work.iterdir()) == [], "what was written is removed"
    assert str(tmp_path) not in path.read_text()
    told = json.loads(path.read_bytes())
    rates = {row["name"]: row["value"] for row in told["rows"]}
    assert set(rates) == {f"block 1: {PIXELS}", f"block 1: {STATES}"}
    (ratio,) = told["ratios"].values()
    assert ratio == pytest.approx(rates[f"block 1: {STATES}"] / rates[f"block 1: {PIXELS}"], rel=0.01)


def test_losses_that_differ_are_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = StateSource.load

    def wrong(self: StateSource, rows: Any) -> Any:
        return real(self, rows).flip(1)

    monkeypatch.setattr(StateSource, "load", wrong)
    with pytest.raises(RuntimeError, match="losses from cached states"):
        finetune.main([*TINY, "--dir", str(tmp_path)])


def test_a_block_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune.main(["--first-blocks", "12"]) == 2
    assert "can start at blocks 1 to 11" in capsys.readouterr().err
