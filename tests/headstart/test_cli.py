"""The command line as a person and as a script meet it: help, output, exit codes, and one sentence for a mistake."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache_schema.features import FeatureCache
from evaluate.predictor import open_image
from heads.runs import Training
from headstart import cli


def one_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed for a mistake: one line on stderr, and no traceback."""
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("headstart: ")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["demo"],
        ["prepare"],
        ["datasets"],
        ["extract"],
        ["train"],
        ["sweep"],
        ["finetune"],
        ["bench", "heads"],
        ["publish"],
        ["evaluate"],
        ["predict"],
        ["cache"],
        ["cache", "info"],
    ],
)
def test_every_command_teaches(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*command, "--help"]) == cli.DONE
    assert "usage: headstart" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["trian"], ["train"], ["demo", "--num-imags", "3"], ["cache", "inf"]])
def test_arguments_that_do_not_parse_are_the_users_mistake(arguments: list[str]) -> None:
    assert cli.run(arguments) == cli.MISTAKE


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["prepare", "grefcoc", "{tmp}"], "unknown dataset 'grefcoc': did you mean 'grefcoco'"),
        (
            ["prepare", "grefcoco", "{tmp}/nowhere"],
            r"no folder at .*nowhere; name the one that holds grefs\(unc\).json",
        ),
        (["prepare", "grefcoco", "{tmp}"], r"grefs\(unc\).json is missing"),
        (["prepare", "grefcoco", "{tmp}", "--make", "5"], "only scenes can be made"),
        (["extract", "{tmp}/nowhere"], "no folder at"),
        (
            ["extract", "{samples}", "--image-encoder", "dinov2-bas"],
            "unknown encoder 'dinov2-bas': did you mean 'dinov2-base'",
        ),
        (["extract", "{samples}", "--image-encoder", "{tmp}/nowhere"], "there is no such folder"),
        (["extract", "{samples}", "--text-encoder", "nobody/nothing", "--out", "{tmp}"], "hub did not hand it out"),
        (["extract", "{samples}", "--layers", "9", "--out", "{tmp}"], "has no layer '9'"),
        (["extract", "{samples}", "--input-size", "100", "96", "--out", "{tmp}"], "no multiple of"),
        (["train", "cros_attention", "--stores", "{stores}"], "did you mean 'cross_attention'"),
        (["train", "linear", "--stores", "{tmp}"], "holds no store of samples"),
        (["train", "linear", "--stores", "{stores}", "--set", "epoch=3"], "did you mean 'epochs'"),
        (["train", "linear", "--stores", "{stores}", "--set", "epochs"], "write key=value"),
        (["train", "linear", "--stores", "{stores}", "--set", "epochs=many"], "epochs"),
        (["evaluate"], "name the run folders"),
        (["evaluate", "{tmp}/nowhere"], "is not a run folder"),
        (["evaluate", "{run}", "--split", "vla"], "did you mean 'val'"),
        (["predict", "{run}", "{tmp}/nowhere.jpg", "a circle"], "nowhere.jpg cannot be used"),
        (["predict", "{run}", "{tmp}/nowhere.jpg"], "there is no prompt"),
        (["predict", "{tmp}", "{image}", "a circle"], "is not a run folder"),
        (["cache", "info", "{tmp}"], "holds no store"),
        (["cache", "info", "{tmp}/nowhere"], "no folder at"),
    ],
)
def test_a_mistake_gets_one_sentence_with_the_remedy_and_exit_code_2(
    arguments: list[str],
    sentence: str,
    workspace: Path,
    samples_path: Path,
    feature_cache: FeatureCache,
    run: Training,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {
        "tmp": str(tmp_path),
        "samples": str(samples_path),
        "stores": str(workspace / "stores"),
        "run": str(run.run_dir),
        "image": str(next(feature_cache.samples.image_dir.iterdir())),
    }
    assert cli.run([argument.format(**names) for argument in arguments]) == cli.MISTAKE
    assert re.search(sentence, one_sentence(capsys))


def test_a_malformed_annotation_file_is_refused_with_the_item_named(
    scenes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(scenes_root, tmp_path / "scenes")
    path = tmp_path / "scenes" / "grefs(unc).json"
    refs = json.loads(path.read_text())
    del refs[3]["ann_id"]
    path.write_text(json.dumps(refs))
    assert cli.run(["prepare", "scenes", str(tmp_path / "scenes"), "--out", str(tmp_path)]) == cli.MISTAKE
    assert re.search(r"grefs\(unc\)\.json.*item 3.*'ann_id' is missing", one_sentence(capsys))


def test_the_road_can_be_walked_command_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run_json(*arguments: str) -> dict[str, object]:
        assert cli.run([*arguments, "--json"]) == cli.DONE
        parsed: dict[str, object] = json.loads(capsys.readouterr().out)
        return parsed

    stores, runs = str(tmp_path / "stores"), str(tmp_path / "runs")
    prepared = run_json("prepare", "scenes", str(tmp_path / "scenes"), "--make", "20", "--out", stores)
    assert prepared["num_images"] == 20
    run_json("extract", stores, "--input-size", "64", "64")
    trained = run_json(
        "train", "linear", "--stores", stores, "--runs", runs, "--set", "epochs=1", "target_size=[16,16]"
    )
    run_dir = str(trained["run_dir"])
    common = ("--stores", stores, "--runs", runs, "--set", "epochs=1", "target_size=[16,16]", "film.dim=16")
    before = sorted((tmp_path / "runs").iterdir())
    tried = run_json("train", "--heads", "linear,film", "--dry-run", *common)
    assert tried["runs"][0]["num_parameters"] == trained["num_parameters"]  # type: ignore[index]
    assert sorted((tmp_path / "runs").iterdir()) == before
    both = run_json("train", "--heads", "linear,film", *common)
    assert [one["reused"] for one in both["runs"]] == [True, False]  # type: ignore[index,call-overload,union-attr]
    published = run_json("publish", run_dir, "--out", str(tmp_path / "published"))
    assert published["url"] is None
    assert (tmp_path / "published" / "README.md").is_file()
    results = run_json("evaluate", run_dir, "--out", str(tmp_path / "report"))
    assert results["runs"][0]["head"] == "linear"  # type: ignore[index]
    assert (tmp_path / "report" / "report.html").is_file()
    image = np.zeros((50, 81, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "picture.png")
    predicted = run_json(
        "predict",
        run_dir,
        str(tmp_path / "picture.png"),
        "the red circle",
        "../up & away",
        "--out",
        str(tmp_path / "p"),
    )
    written = sorted(path.name for path in (tmp_path / "p").iterdir())
    assert written == [
        "picture-1-the-red-circle.mask.png",
        "picture-1-the-red-circle.overlay.png",
        "picture-2-up-away.mask.png",
        "picture-2-up-away.overlay.png",
        "predictions.json",
    ]
    for prediction in predicted["predictions"]:  # type: ignore[attr-defined]
        for picture in ("mask", "overlay"):
            assert open_image(Path(prediction[picture])).shape == (50, 81, 3)
    again = run_json("extract", stores, "--input-size", "64", "64")
    assert again["images"]["num_encoded"] == again["prompts"]["num_encoded"] == 0  # type: ignore[index]


def test_two_stores_of_one_kind_are_not_guessed_between(
    scenes_root: Path, samples_path: Path, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(workspace / "stores", tmp_path / "stores")
    out = str(tmp_path / "stores")
    assert cli.run(["extract", str(samples_path), "--out", out, "--input-size", "32", "32"]) == cli.DONE
    capsys.readouterr()
    assert cli.run(["train", "linear", "--stores", out]) == cli.MISTAKE
    assert "2 stores of image_features" in one_sentence(capsys)


def test_cache_info_tells_what_is_there(
    workspace: Path, feature_cache: FeatureCache, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["cache", "info", str(workspace / "stores")]) == cli.DONE
    printed = capsys.readouterr().out
    for fingerprint in feature_cache.fingerprints.values():
        assert fingerprint in printed
    assert "Dinov2WithRegistersModel" in printed
    assert "complete" in printed
    assert "NOT COMPLETE" not in printed


def test_cache_info_says_what_an_unfinished_store_lacks(
    feature_cache: FeatureCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / feature_cache.images.store.path.name
    shutil.copytree(feature_cache.images.store.path, store)
    (store / "manifest.json").unlink()
    assert cli.run(["cache", "info", str(store), "--json"]) == cli.WANTING
    (described,) = json.loads(capsys.readouterr().out)["stores"]
    assert not described["complete"]
    assert "has not finished" in described["problem"]


def test_a_fault_of_ours_is_not_blamed_on_the_user(
    monkeypatch: pytest.MonkeyPatch, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(path: Path) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("headstart.cache_info.describe_stores", broken)
    assert cli.run(["cache", "info", str(workspace)]) == cli.FAULT
    assert "a fault of ours" in capsys.readouterr().err
