"""`headstart prepare` and `headstart datasets` as a user meets them: what they print, write, refuse and exit with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from extract.datasets import DATASETS
from headstart import cli
from headstart.prepare_commands import DATASET_NAMES, printable, printable_line
from tests.headstart.shell import Home, Shell


@pytest.fixture
def scenes(scenes_root: Path, tmp_path: Path) -> Path:
    """A dataset that a test may harm."""
    return Path(shutil.copytree(scenes_root, tmp_path / "harmed"))


def harm(scenes: Path) -> list[int]:
    """Take the annotations of twelve refs away; their ids."""
    path = scenes / "grefs(unc).json"
    refs = json.loads(path.read_text())
    for ref in refs[:12]:
        del ref["ann_id"]
    path.write_text(json.dumps(refs))
    return [ref["ref_id"] for ref in refs[:12]]


def test_help_names_every_dataset_that_there_is() -> None:
    assert set(DATASET_NAMES) == set(DATASETS)
    assert len(set(DATASET_NAMES)) == len(DATASET_NAMES)


def test_help_says_where_datasets_are_listed(shell: Shell) -> None:
    code, printed = shell.run("prepare", "--help")
    assert code == cli.DONE
    words = " ".join(printed.replace("\u2502", " ").split())
    assert "`headstart datasets`" in words
    assert all(name in words for name in DATASET_NAMES)
    assert "--check-leakage" in words


def test_datasets_are_listed_with_their_folders_and_counts(shell: Shell) -> None:
    code, printed = shell.run("datasets")
    assert code == cli.DONE
    assert "refs(unc).p" in printed
    assert "refs: train 42,404, val 3,811, testA 1,975, testB 1,810" in printed
    assert max(map(len, printed.splitlines())) <= 120
    code, found = shell.json("datasets")
    assert code == cli.DONE
    assert [dataset["name"] for dataset in found["datasets"]] == list(DATASETS)
    (refcoco,) = [dataset for dataset in found["datasets"] if dataset["name"] == "refcoco"]
    assert (refcoco["counted"], refcoco["published"]["testB"]) == ("refs", 1810)


def test_a_sound_dataset_passes_its_check_and_nothing_is_written(shell: Shell, scenes: Path, tmp_path: Path) -> None:
    code, printed = shell.run("prepare", "scenes", scenes, "--out", tmp_path / "stores", "--check")
    assert code == cli.DONE
    assert "24 images" in printed
    assert "no fault" in printed
    assert not (tmp_path / "stores").exists()


def test_a_check_names_every_fault_and_is_found_wanting(shell: Shell, scenes: Path, tmp_path: Path) -> None:
    ref_ids = harm(scenes)
    code, printed = shell.run("prepare", "scenes", scenes, "--out", tmp_path / "stores", "--check")
    assert code == cli.WANTING
    for place, ref_id in enumerate(ref_ids):
        where = f"{scenes / 'grefs(unc).json'}: item {place} (ref_id {ref_id}): 'ann_id' is missing"
        assert where in printed.splitlines()
    assert "12 faults" in printed.splitlines()
    assert not (tmp_path / "stores").exists()
    code, found = shell.json("prepare", "scenes", scenes, "--check")
    assert code == cli.WANTING
    assert found["num_faults"] == len(found["faults"]) == 12


def test_counts_that_are_not_the_published_ones_are_a_warning(
    shell: Shell, scenes: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import dataclasses

    reader = dataclasses.replace(DATASETS["scenes"], published={"train": 7, "minival": 3}, counted="images")
    monkeypatch.setitem(DATASETS, "scenes", reader)
    code, printed = shell.run("prepare", "scenes", scenes, "--check")
    assert code == cli.DONE
    assert "NOT AS PUBLISHED: split train has" in printed
    assert any(line.split() == ["minival", "0", "0", "3"] for line in printed.splitlines())
    code, printed = shell.run("prepare", "scenes", scenes, "--out", tmp_path / "stores")
    assert code == cli.DONE
    assert "NOT AS PUBLISHED: split train has" in printed


def test_a_fault_stops_everything_and_the_file_of_faults_has_all_of_them(
    shell: Shell, scenes: Path, tmp_path: Path
) -> None:
    ref_ids, faults = harm(scenes), tmp_path / "deep" / "faults.jsonl"
    sentence = shell.mistake("prepare", "scenes", scenes, "--out", tmp_path / "stores", "--strict", "--faults", faults)
    assert "has 12 faults" in sentence
    assert "--skip-bad" in sentence
    listed = [json.loads(line) for line in faults.read_text().splitlines()]
    assert [fault["where"] for fault in listed] == [f"item {n} (ref_id {ref})" for n, ref in enumerate(ref_ids)]
    assert {fault["source"] for fault in listed} == {str(scenes / "grefs(unc).json")}
    assert not (tmp_path / "stores").exists()


@pytest.mark.parametrize("option", ["--check", "--skip-bad"])
def test_the_file_of_faults_is_written_in_every_way(shell: Shell, scenes: Path, tmp_path: Path, option: str) -> None:
    harm(scenes)
    shell.run("prepare", "scenes", scenes, "--out", tmp_path / "stores", option, "--faults", tmp_path / "faults")
    assert len((tmp_path / "faults").read_text().splitlines()) == 12


def test_the_file_of_faults_is_empty_where_there_is_none(shell: Shell, scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "faults").write_text("of yesterday")
    code, _ = shell.run("prepare", "scenes", scenes, "--out", tmp_path / "stores", "--faults", tmp_path / "faults")
    assert code == cli.DONE
    assert (tmp_path / "faults").read_text() == ""


@pytest.mark.parametrize("option", ["--check", "--skip-bad", "--strict"])
def test_no_file_of_faults_is_written_where_the_dataset_could_not_be_read(
    shell: Shell, scenes: Path, tmp_path: Path, option: str
) -> None:
    (scenes / "grefs(unc).json").write_text("{")
    out = ["--out", tmp_path / "stores", "--faults", tmp_path / "faults"]
    assert "is not valid JSON" in shell.mistake("prepare", "scenes", scenes, *out, option)
    assert not (tmp_path / "faults").exists()


def test_items_with_a_fault_are_left_out_on_demand_and_loudly(shell: Shell, scenes: Path, tmp_path: Path) -> None:
    harm(scenes)
    code, printed = shell.run("prepare", "scenes", scenes, "--out", tmp_path / "stores", "--skip-bad")
    assert code == cli.DONE
    assert "LEFT OUT: " in printed
    assert "has 12 faults" in printed
    code, found = shell.json("prepare", "scenes", scenes, "--out", tmp_path / "stores", "--skip-bad")
    assert (code, found["reused"], found["num_faults"]) == (cli.DONE, True, 12)


def test_images_are_found_where_they_are_said_to_lie(shell: Shell, scenes: Path, tmp_path: Path) -> None:
    (scenes / "images").rename(tmp_path / "pictures")
    assert "--image-dir" in shell.mistake("prepare", "scenes", scenes)
    code, found = shell.json(
        "prepare", "scenes", scenes, "--image-dir", tmp_path / "pictures", "--out", tmp_path / "stores"
    )
    assert (code, found["num_images"]) == (cli.DONE, 24)


def test_a_dataset_with_nothing_in_it_is_found_wanting(shell: Shell, scenes: Path) -> None:
    (scenes / "grefs(unc).json").write_text("[]")
    code, printed = shell.run("prepare", "scenes", scenes, "--check")
    assert code == cli.WANTING
    assert "NO SAMPLE" in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "name a dataset and its folder, as in `headstart prepare refcoco /data/refcoco`"),
        (["refcoco"], "name the folder of refcoco, as in `headstart prepare refcoco FOLDER`"),
        (["refcocco", "{tmp}"], "unknown dataset 'refcocco': did you mean 'refcoco'"),
        (["my-folder"], "unknown dataset 'my-folder'"),
        (["refcoco", "{images}/zarr.json"], "zarr.json is a file; name the folder that holds it"),
        (["refcocco", "{tmp}", "--make", "3"], "unknown dataset 'refcocco': did you mean 'refcoco'"),
        (["refcoco", "{tmp}/nowhere"], "nowhere; name the one that holds refs(unc).p"),
        (
            ["refcoco", "s3://bucket/refcoco"],
            "s3://bucket/refcoco is remote, and datasets are read from a local folder",
        ),
        (["refcoco", "{tmp}", "--out", "nosuch://bucket/x"], "nosuch://bucket/x cannot be reached"),
        (["refcoco", "{tmp}", "--strict", "--skip-bad"], "--strict and --skip-bad exclude each other"),
        (["refcoco", "{tmp}", "--check", "--skip-bad"], "leave --check or --skip-bad out"),
        (["refcoco", "{tmp}", "--faults", "{tmp}"], "is a folder; name a file in it"),
        (["refcoco", "{tmp}", "--make", "3"], "only scenes can be made"),
        (["scenes", "{tmp}/new", "--make", "3", "--check"], "--check writes nothing, so nothing is made"),
        (["refcoco", "{tmp}"], "refs(unc).p is missing"),
        (["refcoco", "{tmp}", "--check-leakage", "{samples}"], "leave the rest out"),
        (["refcoco", "{tmp}", "--faults", "{images}/zarr.json/x"], "lies below a file"),
        (["--check-leakage"], "is given no store"),
        (["--check-leakage", "{tmp}/nowhere"], "no folder at"),
        (["--check-leakage", "{tmp}"], "holds no store of samples"),
        (["--check-leakage", "{tmp}/samples-0.zarr"], "samples-0.zarr"),
        (
            ["--check-leakage", "{images}"],
            "is a store of image_features, where one of samples is wanted; name that one",
        ),
        (["--check-leakage", "{samples}", "{samples}"], "named twice"),
    ],
)
def test_a_mistake_gets_one_sentence_with_the_remedy(
    shell: Shell, home: Home, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    (tmp_path / "empty").mkdir()
    names = {"tmp": str(tmp_path / "empty"), "samples": str(home.samples), "images": str(home.images)}
    assert sentence in shell.mistake("prepare", *(argument.format(**names) for argument in arguments))
    assert not list((tmp_path / "empty").iterdir())


def test_splits_of_one_store_are_compared(shell: Shell, home: Home) -> None:
    code, printed = shell.run("prepare", "--check-leakage", home.stores)
    assert code == cli.DONE
    assert "scenes/train" in printed
    assert "No image is in two different splits." in printed


def test_an_image_shared_between_stores_is_found_wanting(
    shell: Shell, home: Home, scenes: Path, tmp_path: Path
) -> None:
    path = scenes / "grefs(unc).json"
    path.write_text(path.read_text().replace('"val"', '"held out"'))
    _, prepared = shell.json("prepare", "scenes", scenes, "--out", tmp_path / "other")
    code, printed = shell.run("prepare", "--check-leakage", home.samples, tmp_path / "other")
    assert code == cli.WANTING
    assert "LEAKAGE: different splits share images: scenes#1/val and scenes#2/held out" in printed
    code, found = shell.json("prepare", "--check-leakage", home.samples, tmp_path / "other")
    assert code == cli.WANTING
    assert found["num_leaks"] >= 1
    assert found["stores"]["scenes#2"] == prepared["path"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb\x9bc", "a\ufffd[2Jb\ufffdc"),
        ("x\udc80", "x?"),
        ("a\n\tb", "a\n\tb"),
        ("a\u202eb\u2066c\u2028d", "a\ufffdb\ufffdc\ufffdd"),
        ("\u0448\u05d0\U0001f600", "\u0448\u05d0\U0001f600"),
    ],
)
def test_text_of_others_does_not_steer_the_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_line_of_others_stays_one_line() -> None:
    assert printable_line("a\nno fault\r\x1b") == "a\ufffdno fault\ufffd\ufffd"


HOSTILE = "\x1b]0;owned\x07\x9b2J\u202e"


def is_harmless(printed: str) -> bool:
    return not set(HOSTILE) - set("]0;owned2J") & set(printed)


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A dataset of one's own whose splits, tags and ids would steer a terminal."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    Image.new("RGB", (60, 40)).save(folder / "a.png")
    line = {"image": "a.png", "prompt": f"x{HOSTILE}", "box": [1, 1, 5, 5], "tags": {"k": f"v{HOSTILE}\nnext line"}}
    lines = [{**line, "split": split + HOSTILE, "id": split + HOSTILE} for split in ("train", "val")]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_nothing_that_is_printed_steers_the_terminal(shell: Shell, hostile: Path, tmp_path: Path) -> None:
    stores, sheets = tmp_path / "stores", tmp_path / "sheets"
    for arguments, expected in [
        (["prepare", "custom", hostile, "--check"], cli.DONE),
        (["prepare", "custom", hostile, "--out", stores], cli.DONE),
        (["samples", "show", stores, "--out", sheets], cli.DONE),
        (["samples", "show", stores, "--out", sheets, "--split", f"val{HOSTILE}"], cli.DONE),
        (["prepare", "--check-leakage", stores], cli.WANTING),
    ]:
        code, printed = shell.run(*arguments)
        assert code == expected
        assert "val\ufffd]0;owned" in printed
        assert is_harmless(printed)
        assert not [line for line in printed.splitlines() if line.startswith("next line")]


def test_a_fault_is_one_line_whatever_it_quotes(shell: Shell, scenes: Path) -> None:
    path = scenes / "grefs(unc).json"
    refs = json.loads(path.read_text())
    refs[0]["ref_id"] = f"1\nno fault{HOSTILE}"
    path.write_text(json.dumps(refs))
    code, printed = shell.run("prepare", "scenes", scenes, "--check")
    assert code == cli.WANTING
    assert is_harmless(printed)
    assert "1\ufffdno fault" in printed
    assert not [line for line in printed.splitlines() if line.startswith("no fault")]


def test_a_fault_with_bytes_that_are_no_text_can_be_printed(shell: Shell, scenes: Path) -> None:
    path = scenes / "instances.json"
    data = path.read_bytes()
    path.write_bytes(
        data.replace(b'"name":"circle"', b'"name":"cir\xffcle"').replace(b'"name": "circle"', b'"name": "\xff"')
    )
    assert path.read_bytes() != data
    code, printed = shell.run("prepare", "scenes", scenes, "--check")
    assert code == cli.WANTING
    printed.encode()
