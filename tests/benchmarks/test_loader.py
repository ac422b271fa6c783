"""benchmarks/loader.py at a size that takes seconds: it trains from disk and from RAM, and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.loader import Settings, run


def test_the_report_tells_waits_rates_and_memory(tmp_path: Path) -> None:
    settings = Settings(num_images=128, grid=(4, 4, 8), batch_size=32)
    report = run(settings, tmp_path, heads=("linear",))
    report.write_json(tmp_path / "loader.json")
    written = json.loads((tmp_path / "loader.json").read_bytes())
    assert written["benchmark"] == "loader"
    names = {row["name"] for row in written["rows"]}
    told = ("linear from disk: waiting for data", "linear from disk: anonymous memory", "linear from ram: step")
    assert set(told) <= names
    assert set(written["ratios"]) == {"linear: samples/s, disk / ram"}
    assert all(row["value"] is not None and row["value"] >= 0 for row in written["rows"])
    waiting = next(row for row in written["rows"] if row["name"] == "linear from disk: waiting for data")
    assert waiting["value"] <= 100
