"""docs/your-own-data.md is followed to the letter: whoever copies it ends with a report and masks, as it promises."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PAGE = Path(__file__).parents[2] / "docs" / "your-own-data.md"
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code on the page, and the text before it, back to the block before that."""

    language: str
    content: str
    before: str


def blocks() -> list[Block]:
    page, found, end = PAGE.read_text("utf-8"), [], 0
    for match in _BLOCK.finditer(page):
        found.append(Block(match[1], match[2], page[end : match.start()]))
        end = match.end()
    return found


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What a person types into a shell where headstart is installed, without a network."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.run(["bash", "-ec", script], cwd=folder, env=environment, capture_output=True, text=True)


@dataclass(frozen=True)
class Walk:
    """A folder in which every command of the page was run, and what each block of commands printed."""

    folder: Path
    printed: list[str]


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    folder, printed = tmp_path_factory.mktemp("walk"), []
    for block in blocks():
        if block.language == "python":
            (name,) = re.findall(r"Save this as `(\w+\.py)`", block.before)
            (folder / name).write_text(block.content, "utf-8")
        elif block.language == "sh":
            done = run(block.content, folder)
            assert done.returncode == 0, f"{block.content}\n{done.stdout}\n{done.stderr}"
            printed.append(done.stdout)
    return Walk(folder, printed)


def test_the_page_goes_all_the_way_to_a_report_and_masks(walk: Walk) -> None:
    assert (walk.folder / "report" / "report.html").stat().st_size > 10_000
    (scored,) = json.loads((walk.folder / "report" / "results.json").read_text())["runs"]
    assert scored["metrics"]["num_samples"] == 16
    masks = sorted((walk.folder / "predictions").glob("004-*.mask.png"))
    assert [mask.name for mask in masks] == [
        "004-1-the-blue-triangle.mask.png",
        "004-2-the-square-on-the-right.mask.png",
    ]
    for mask in masks:
        assert np.asarray(Image.open(mask)).shape == (240, 320)
    assert list((walk.folder / "sheets").glob("*.png"))


def test_the_head_of_the_page_learns_more_than_the_baselines_know(walk: Walk) -> None:
    results = json.loads((walk.folder / "report" / "results.json").read_text())
    best = max(metrics["mean_iou"] for metrics in results["baselines"].values())
    assert results["runs"][0]["metrics"]["mean_iou"] > best


def test_the_page_shows_what_its_commands_print(walk: Walk) -> None:
    """But for fingerprints, times and scores, which differ from machine to machine."""
    shown = [block.content for block in blocks() if block.language == "text"]
    for printed, page in zip(walk.printed, shown, strict=False):
        assert steady(page) == [line for line in steady(printed) if line in steady(page)]


def steady(text: str) -> list[str]:
    """Lines without figures of one machine (scores, rates), and with no fingerprint."""
    lines = [re.sub(r"[0-9a-f]{12}", "#", line).rstrip() for line in text.splitlines()]
    return [line for line in lines if line and line != "..." and not re.search(r"\d\.\d| s\b|/s\b|B\b", line)]


def test_the_faults_of_the_page_are_those_that_are_told(walk: Walk) -> None:
    found = blocks()
    (index,) = (index for index, block in enumerate(found) if block.language == "jsonl")
    mydata = walk.folder / "mydata"
    sound = (mydata / "samples.jsonl").read_bytes()
    try:
        (mydata / "samples.jsonl").write_text(found[index].content)
        done = run("headstart prepare custom mydata --check", walk.folder)
    finally:
        (mydata / "samples.jsonl").write_bytes(sound)
    assert done.returncode == 1
    assert done.stdout == found[index + 1].content


def test_the_json_of_the_page_is_read(tmp_path: Path) -> None:
    from extract.datasets.custom import read_custom
    from extract.datasets.faults import FaultReport
    from extract.datasets.records import Source

    (content,) = (block.content for block in blocks() if block.language == "json")
    (tmp_path / "annotations.json").write_text(content)
    faults = FaultReport()
    samples = list(read_custom(Source(tmp_path, faults)).samples)
    assert faults.faults == []
    assert [(sample.id, sample.prompt) for sample in samples] == [
        ("10:0", "the old dog"),
        ("11:0", "the dog on the right"),
        ("11:1", "the smaller dog"),
    ]
