"""Views and data types by the command line: extract, describe, repair and train on them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cache_schema.store import open_store
from headstart import cli
from tests.headstart.shell import (
    NUM_VIEWS,
    Home,
    Shell,
    digest_of,
    extract,
    flip,
)


def test_views_in_int8_are_extracted_described_and_trained_on(home: Home, shell: Shell) -> None:
    out = home.folder / "views"
    shutil.copytree(home.samples, out / home.samples.name)
    views = ("whole", "flip", "crop-0.8")
    code, extracted = extract(shell, home, out, "--views", *views, "--dtype", "int8")
    assert code == cli.DONE
    assert extracted["images"]["num_encoded"] == NUM_VIEWS * len(views)
    code, described = shell.json("cache", "info", extracted["images"]["path"])
    assert code == cli.DONE
    (store,) = described["stores"]
    assert store["num_rows"] == NUM_VIEWS * len(views)
    assert store["identity"]["views"] == list(views)
    assert store["arrays"]["features/last"]["dtype"] == "int8"
    assert store["arrays"]["scale/last"]["dtype"] == store["arrays"]["cls/last"]["dtype"] == "float16"
    assert open_store(Path(extracted["prompts"]["path"])).header.identity["dtype"] == "float16"
    assert "views: whole, flip, crop-0.8" in shell.run("cache", "info", out)[1]
    code, again = extract(shell, home, out, "--views", *views, "--dtype", "int8")
    assert again["images"]["num_encoded"] == 0
    code, trained = shell.json(
        "train", "linear", "--stores", out, "--runs", home.folder / "runs", "--set", "epochs=1", "target_size=[8,8]"
    )
    assert code == cli.DONE
    code, evaluated = shell.json("evaluate", trained["run_dir"])
    assert code == cli.DONE
    assert 0 <= evaluated["runs"][0]["metrics"]["mean_iou"] <= 1


@pytest.mark.parametrize(
    ("views", "sentence"),
    [
        (["flip"], "views must begin with whole"),
        (["whole", "flop"], "unknown view 'flop'"),
        (["whole", "crop-3"], "view 'crop-3' is out of range"),
        (["whole", "flip", "flip"], "is named twice"),
        ([], "views"),
    ],
)
def test_views_that_cannot_be_get_one_sentence(home: Home, shell: Shell, views: list[str], sentence: str) -> None:
    out = home.folder / "out"
    assert sentence in shell.mistake("extract", home.samples, "--out", out, "--views", *views)
    assert not list(out.glob("*.zarr"))


@pytest.mark.parametrize(
    ("option", "value", "known"),
    [("--dtype", "int4", "int8"), ("--container", "tar", "hdf5")],
)
def test_a_choice_that_is_none_is_the_users_mistake(
    home: Home, capsys: pytest.CaptureFixture[str], option: str, value: str, known: str
) -> None:
    assert cli.run(["extract", str(home.samples), option, value]) == cli.MISTAKE
    printed = capsys.readouterr().err
    assert value in printed
    assert known in printed
    assert "Traceback" not in printed


def test_views_in_int8_are_repaired(home: Home, shell: Shell) -> None:
    out = home.folder / "other"
    _, extracted = extract(shell, home, out, "--views", "whole", "flip", "--dtype", "int8", "--shard-rows", 16)
    path = Path(extracted["images"]["path"])
    digest = digest_of(path)
    flip(path / "scale/last/c.1.0.0")
    code, repaired = shell.json("cache", "repair", path)
    assert code == cli.DONE
    assert repaired["num_encoded"] == 16
    assert digest_of(path) == digest
