"""The whole road as a person walks it: once, twice, and killed on the way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache_schema.store import open_store

NUM_IMAGES = 60


def start_demo(out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "headstart.cli", "demo", "--out", str(out), "--num-images", str(NUM_IMAGES)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish_demo(out: Path) -> str:
    process = start_demo(out)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


def kill_demo_when(out: Path, condition: Callable[[], bool]) -> None:
    """Start the demo and SIGKILL it as soon as `condition` holds."""
    process = start_demo(out)
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the demo ended before it could be killed"
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def digests(out: Path) -> dict[str, str]:
    return {path.name: open_store(path).manifest.digest for path in sorted((out / "stores").glob("*.zarr"))}


def final_metrics(out: Path) -> list[dict[str, Any]]:
    results = json.loads((out / "results.json").read_text())
    return [{key: run[key] for key in ("head", "metrics", "slices")} for run in results["runs"]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo") / "whole"
    return out, finish_demo(out)


def test_the_demo_leaves_a_report_and_results(finished: tuple[Path, str]) -> None:
    out, printed = finished
    results = json.loads((out / "results.json").read_text())
    assert [run["head"] for run in results["runs"]] == ["cross_attention", "linear"]
    assert results["baselines"].keys() == {"all_empty", "all_full", "centre_prior"}
    assert {"make scenes", "extract images", "train linear"} <= results["seconds"].keys()
    assert "untrained" in printed
    page = (out / "report.html").read_text()
    assert "untrained" in page


def test_a_second_demo_extracts_and_trains_nothing_and_says_so(finished: tuple[Path, str]) -> None:
    out, _ = finished
    before, metrics = digests(out), final_metrics(out)
    printed = finish_demo(out)
    assert printed.count("nothing to extract") == 2
    assert printed.count("found trained") == 2
    assert digests(out) == before
    assert final_metrics(out) == metrics


def test_killed_in_extraction_and_in_training_it_ends_like_an_uninterrupted_one(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    stores, runs = out / "stores", out / "runs"
    kill_demo_when(out, lambda: len(list((out / "scenes" / "images").glob("*.jpg"))) > NUM_IMAGES // 2)
    kill_demo_when(out, lambda: any(stores.glob("image_features-*.zarr/zarr.json")))
    assert not any(stores.glob("image_features-*.zarr/manifest.json"))
    kill_demo_when(out, lambda: any(runs.glob("cross_attention-*/state.pt")))
    kill_demo_when(out, lambda: any(runs.glob("linear-*/metrics.jsonl")))
    assert not any(runs.glob("linear-*/training.json"))
    finish_demo(out)
    assert digests(out) == digests(finished[0])
    assert final_metrics(out) == final_metrics(finished[0])
