"""headstart evaluate: protocols, the files it leaves, COCO results, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headstart import cli
from headstart.evaluate_commands import PROTOCOL_NAMES
from tests.headstart.shell import Shell


@pytest.fixture
def run_dir(trained: Path) -> Path:
    (folder,) = trained.iterdir()
    return folder


@pytest.mark.parametrize("protocol", PROTOCOL_NAMES)
def test_every_protocol_is_scored_and_its_first_metrics_are_printed(
    protocol: str, run_dir: Path, shell: Shell, tmp_path: Path
) -> None:
    code, printed = shell.run("evaluate", run_dir, "--protocol", protocol, "--out", tmp_path / "report")
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert code == cli.DONE
    assert results["protocol"]["name"] == protocol
    assert f"protocol {protocol}" in printed
    assert "bootstrap over" in printed
    for name in results["protocol"]["headline"]:
        assert name in printed
    assert f"{results['runs'][0]['metrics'][results['protocol']['headline'][0]]:.3f}" in printed
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"results.json", "samples.csv", "report.html"}


def test_json_is_the_object_in_the_file(run_dir: Path, shell: Shell, tmp_path: Path) -> None:
    code, results = shell.json("evaluate", run_dir, "--out", tmp_path / "report")
    assert code == cli.DONE
    assert results == json.loads((tmp_path / "report" / "results.json").read_text())
    assert "coco_results" not in results


def test_coco_results_are_named_where_they_were_wanted(run_dir: Path, shell: Shell, tmp_path: Path) -> None:
    code, printed = shell.run("evaluate", run_dir, "--out", tmp_path, "--coco-results", tmp_path / "found.json")
    assert code == cli.DONE
    assert str(tmp_path / "found.truth.json") in printed
    assert len(json.loads((tmp_path / "found.json").read_text())) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocol", "resized-48"], "did you mean 'resized-480'"),
        (["--coco-results", "found.txt"], "let it end in .json"),
        (["--samples", "x"], "name it with --stores"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], message: str, run_dir: Path, shell: Shell) -> None:
    assert message in shell.mistake("evaluate", run_dir, *arguments)
