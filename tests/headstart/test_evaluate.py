"""headstart evaluate: protocols, the files it leaves, COCO results, and mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import headstart
from headstart import cli
from headstart.evaluate_commands import PROTOCOL_NAMES
from headstart.stores import stores_of_run
from tests.headstart.shell import Home, Shell


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


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_left_lies_with_the_only_run(
    run_dir: Path, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, printed = shell.run("evaluate", run_dir)
    assert code == cli.DONE
    assert f"report: {run_dir / 'report.html'}" in printed
    assert (run_dir / "report.html").is_file()
    assert not (tmp_path / "report").exists()


def test_what_is_left_of_several_runs_lies_in_a_folder_of_its_own(
    run_dir: Path, home: Home, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copies = [tmp_path / name for name in ("a", "b")]
    for copy in copies:
        shutil.copytree(run_dir, copy)
    code, printed = shell.run("evaluate", *copies, "--stores", home.stores)
    assert code == cli.DONE
    assert f"report: {Path('report') / 'report.html'}" in printed
    runs = {folder: json.loads((folder / "results.json").read_text())["runs"] for folder in (Path("report"), *copies)}
    assert [len(entries) for entries in runs.values()] == [2, 1, 1]
    assert [runs[copy][0] for copy in copies] == runs[Path("report")]


def test_scores_on_other_stores_leave_the_folder_of_the_run_alone(
    run_dir: Path, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run says that it was trained on other samples, which makes those it is scored on the other ones."""
    monkeypatch.chdir(tmp_path)
    stores = stores_of_run(run_dir)
    shutil.copytree(run_dir, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["stores"]["samples"] = "0" * 64
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    before = contents(tmp_path / "run")
    headstart.evaluate(tmp_path / "run", stores.open())
    assert contents(tmp_path / "run") == before
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"results.json", "samples.csv", "report.html"}


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
