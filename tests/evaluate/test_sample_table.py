"""The table of single samples: everything is in it, and no name in it becomes a formula."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from evaluate.metrics import SampleScores, score_mask
from evaluate.sample_table import COLUMNS, TableRun, guard_text, write_sample_table
from tests.evaluate.sample_stores import Made, make_samples, pixels

HOSTILE = [
    '=HYPERLINK("http://x","y")',
    "+1",
    "-1",
    "@SUM(A1)",
    "\tx",
    "\rx",
    "\nx",
    "'tis",
    "''",
    "\uff1d1",
    "\uff0b1",
]


def write(path: Path, prompts: list[str], **options: object) -> list[dict[str, str]]:
    made = [Made(f"image {place % 2}", prompt, (0, 50), {"kind": prompt}) for place, prompt in enumerate(prompts)]
    samples = make_samples(made)
    scores = SampleScores.concatenate([score_mask(pixels(0, 30 + place), pixels(0, 50)) for place in range(len(made))])
    write_sample_table(path, [TableRun("film", np.arange(len(made)), scores, **options)], samples)
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_each_sample_of_each_head_has_a_line_with_all_that_is_known_of_it(tmp_path: Path) -> None:
    samples = make_samples(
        [
            Made("a", "the dog, on the left", (0, 60), {"kind": "relation", "category": "dog"}),
            Made("b", "a zebra", tags={"kind": "object"}),
        ]
    )
    scores = SampleScores.concatenate(
        [
            score_mask(pixels(40, 100), pixels(0, 60), predicted_no_target=False),
            score_mask(pixels(0, 7), pixels(0, 0), no_target=True),
        ]
    )
    runs = [
        TableRun("linear", np.array([0, 1]), scores),
        TableRun("pseg", np.array([1, 0]), scores.take(np.array([1, 0])), np.array([0.25, 0.1])),
    ]
    write_sample_table(tmp_path / "samples.csv", runs, samples)
    with (tmp_path / "samples.csv").open(encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    assert header == [*COLUMNS, "tag:category", "tag:kind"]
    first = ["sample 0", "a", "the dog, on the left", repr(20 / 100)]
    counts = ["20", "100", "60", "60", "60", "0", "0", "5-7", "small", "dog", "relation"]
    second = ["sample 1", "b", "a zebra", "0.0"]
    none = ["0", "7", "7", "0", "0", "1", "1", "1-2", "none", "", "object"]
    assert lines == [
        ["linear", *first, "", *counts],
        ["linear", *second, "", *none],
        ["pseg", *second, "0.25", *none],
        ["pseg", *first, "0.1", *counts],
    ]


def test_no_cell_begins_like_a_formula_and_every_text_comes_back(tmp_path: Path) -> None:
    lines = write(tmp_path / "samples.csv", HOSTILE)
    for line, prompt in zip(lines, HOSTILE, strict=True):
        for cell in (line["prompt"], line["tag:kind"]):
            assert cell == f"'{prompt}"
            assert cell.removeprefix("'") == prompt
    assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) for line in lines for cell in line.values())


@pytest.mark.parametrize("text", ["the dog", "", "x=1", "dog's", "é", '"quoted", with a comma', "two\nlines"])
def test_any_other_text_stays_as_it_is(tmp_path: Path, text: str) -> None:
    assert guard_text(text) == text
    assert write(tmp_path / "samples.csv", [text, "other"])[0]["prompt"] == text


def test_an_iou_is_written_to_its_last_digit(tmp_path: Path) -> None:
    lines = write(tmp_path / "samples.csv", ["a", "b", "c"], predicted_iou=np.array([1 / 3, 0.1, 0.7]))
    assert [float(line["iou"]) for line in lines] == [30 / 50, 31 / 50, 32 / 50]
    assert float(lines[0]["predicted_iou"]) == 1 / 3


def test_equal_results_give_equal_bytes(tmp_path: Path) -> None:
    write(tmp_path / "one.csv", ["a", "b"])
    write(tmp_path / "two.csv", ["a", "b"])
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.csv", "two.csv"]
