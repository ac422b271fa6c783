"""headstart compare: two runs from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from headstart import cli
from tests.headstart.shell import Home, Shell


@pytest.fixture
def runs(trained: Path) -> tuple[Path, Path]:
    """The trained run, and the same head once more."""
    (first,) = trained.iterdir()
    second = trained / "again"
    shutil.copytree(first, second)
    return first, second


def test_two_runs_are_compared_on_the_stores_they_were_trained_on(
    runs: tuple[Path, Path], shell: Shell, tmp_path: Path
) -> None:
    out = tmp_path / "comparison"
    code, printed = shell.run("compare", *runs, "--out", out, "--protocol", "resized-224")
    assert code == cli.DONE
    assert {path.name for path in out.iterdir()} == {"comparison.html", "comparison.json", "samples.csv"}
    results = json.loads((out / "comparison.json").read_text())
    assert [run["head"] for run in results["runs"]] == [run.name for run in runs]
    assert results["protocol"]["name"] == "resized-224"
    assert "difference" in printed
    assert f"{results['runs'][0]['metrics']['mean_iou']:.3f}" in printed
    assert f"stays the same in {results['samples']['num']}" in printed


def test_json_is_the_object_in_the_file(runs: tuple[Path, Path], home: Home, shell: Shell, tmp_path: Path) -> None:
    code, results = shell.json("compare", *runs, "--out", tmp_path / "c", "--stores", home.stores, "--split", "test")
    assert code == cli.DONE
    assert results == json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert results["protocol"]["split"] == "test"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{first}", "{tmp}/nowhere"], "is not a run folder"),
        (["{first}", "{first}", "--split", "vla"], "did you mean 'val'"),
        (["{first}", "{first}", "--protocol", "gre"], "did you mean 'gref'"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    arguments: list[str], message: str, runs: tuple[Path, Path], shell: Shell, tmp_path: Path
) -> None:
    filled = [argument.format(first=runs[0], tmp=tmp_path) for argument in arguments]
    assert message in shell.mistake("compare", *filled, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
