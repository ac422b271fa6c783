"""Clear away what nobody needs, and nothing else."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from headstart import cli
from tests.headstart.shell import (
    Home,
    Shell,
    extract,
    packed_home,
)


def let_rest(folder: Path) -> None:
    """Make everything in a folder two hours old."""
    then = time.time() - 7200
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (then, then))


def garbage_of(shell: Shell, *arguments: object) -> dict[str, str]:
    """What may be cleared away, and why."""
    code, result = shell.json("cache", "gc", *arguments)
    assert code == cli.DONE
    assert result["num_bytes"] == sum(item["num_bytes"] for item in result["garbage"])
    return {Path(item["path"]).name: item["reason"] for item in result["garbage"]}


def test_whole_stores_are_no_garbage(home: Home, shell: Shell) -> None:
    let_rest(home.folder)
    assert garbage_of(shell, home.stores) == {}
    code, printed = shell.run("cache", "gc", home.stores, "--yes")
    assert code == cli.DONE
    assert len(printed.splitlines()) == 1
    assert shell.run("cache", "verify", home.stores)[0] == cli.DONE


def test_an_unfinished_store_is_shown_first_and_removed_when_told_to(home: Home, shell: Shell) -> None:
    (home.images / "manifest.json").unlink()
    let_rest(home.folder)
    assert garbage_of(shell, home.stores) == {home.images.name: "its job has not finished"}
    code, printed = shell.run("cache", "gc", home.stores)
    assert code == cli.DONE
    assert str(home.images) in printed
    assert "--yes" in printed
    assert home.images.is_dir(), "nothing goes without --yes"
    code, result = shell.json("cache", "gc", home.stores, "--yes")
    assert code == cli.DONE
    assert result["removed"]
    assert result["num_bytes"] > 0
    assert {path.name for path in home.stores.iterdir()} == {home.prompts.name, home.samples.name}


def test_what_killed_jobs_left_in_the_making_goes(home: Home, shell: Shell) -> None:
    left = [
        home.images / "features" / "last" / ".c.1.0.0.0.0123456789abcdef.tmp",
        home.images / "receipts" / ".000001.json.0123456789abcdef.tmp",
        home.stores / f".{home.images.stem}.h5.0123456789abcdef.tmp",
    ]
    for path in left:
        path.write_bytes(b"half")
    folder = home.stores / ".tiny-dinov2-reg.0123456789abcdef.tmp"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")
    let_rest(home.folder)
    found = garbage_of(shell, home.stores)
    assert found == dict.fromkeys([path.name for path in (*left, folder)], "a killed job left it in the making")
    code, result = shell.json("cache", "gc", home.stores, "--yes")
    assert code == cli.DONE
    assert result["num_bytes"] == 4 * len(b"half")
    assert not any(path.exists() for path in (*left, folder))
    assert shell.run("cache", "verify", home.stores)[0] == cli.DONE


def test_what_is_young_stays(home: Home, shell: Shell) -> None:
    (home.images / "manifest.json").unlink()
    (home.stores / ".leftover.tmp").write_bytes(b"half")
    assert garbage_of(shell, home.stores, "--yes") == {}
    let_rest(home.folder)
    (home.images / "receipts" / "000001.json").touch()
    assert garbage_of(shell, home.stores).keys() == {".leftover.tmp"}, "one young file keeps a store"
    assert garbage_of(shell, home.stores, "--idle-minutes", 0).keys() == {".leftover.tmp", home.images.name}
    assert garbage_of(shell, home.stores, "--idle-minutes", 180) == {}
    assert home.images.is_dir()


def test_stores_that_no_run_uses_go_if_runs_are_named(home: Home, trained: Path, shell: Shell) -> None:
    code, extracted = extract(shell, home, home.stores, "--dtype", "int8", "--input-size", 32, 32)
    assert code == cli.DONE
    unused = {Path(extracted[kind]["path"]).name for kind in ("images", "prompts")} - {
        home.images.name,
        home.prompts.name,
    }
    let_rest(home.folder)
    assert garbage_of(shell, home.stores) == {}
    found = garbage_of(shell, home.stores, "--runs", trained, "--yes")
    assert found == dict.fromkeys(unused, f"no run under {trained} uses it")
    assert {path.name for path in home.stores.glob("*-*.*")} == {
        home.images.name,
        home.prompts.name,
        home.samples.name,
    }


def test_samples_stay_while_features_made_from_them_do(home: Home, trained: Path, shell: Shell) -> None:
    (config,) = trained.glob("*/config.json")
    recorded = json.loads(config.read_text())
    recorded["stores"]["samples"] = "0" * 64  # a part of these samples, in another folder
    config.write_text(json.dumps(recorded))
    let_rest(home.folder)
    assert garbage_of(shell, home.stores, "--runs", trained) == {}
    recorded["stores"] = dict.fromkeys(recorded["stores"], "0" * 64)
    config.write_text(json.dumps(recorded))
    found = garbage_of(shell, home.stores, "--runs", trained)
    assert found.keys() == {home.images.name, home.prompts.name, home.samples.name}


@pytest.mark.parametrize("harm", ["shard gone", "receipt garbled", "root garbled"])
def test_a_damaged_store_is_for_repair_and_no_garbage(home: Home, trained: Path, shell: Shell, harm: str) -> None:
    (config,) = trained.glob("*/config.json")
    recorded = json.loads(config.read_text())
    recorded["stores"] = dict.fromkeys(recorded["stores"], "0" * 64)
    config.write_text(json.dumps(recorded))
    if harm == "shard gone":
        (home.images / "features/1/c.2.0.0.0").unlink()
    elif harm == "receipt garbled":
        (home.images / "receipts/000001.json").write_text("{")
    else:
        (home.images / "zarr.json").write_text("{")
    let_rest(home.folder)
    assert garbage_of(shell, home.stores) == {}
    assert home.images.name not in garbage_of(shell, home.stores, "--runs", trained)


def test_a_folder_without_runs_does_not_make_everything_garbage(home: Home, shell: Shell) -> None:
    let_rest(home.folder)
    assert "no folder at" in shell.mistake("cache", "gc", home.stores, "--runs", home.folder / "rnus")
    (home.folder / "empty").mkdir()
    for folder in (home.folder / "empty", home.stores):
        assert str(folder) in shell.mistake("cache", "gc", home.stores, "--runs", folder, "--yes")
    assert home.images.is_dir()


def test_runs_that_cannot_be_read_stop_the_clearing(home: Home, trained: Path, shell: Shell) -> None:
    (config,) = trained.glob("*/config.json")
    config.write_text("{")
    let_rest(home.folder)
    assert "is not a run folder" in shell.mistake("cache", "gc", home.stores, "--runs", trained, "--yes")
    assert home.images.is_dir()


def test_garbage_among_files_is_found_and_files_in_use_stay(home: Home, trained: Path, shell: Shell) -> None:
    files = packed_home(home, shell)
    extract(shell, home, files, "--container", "hdf5")
    let_rest(home.folder)
    assert garbage_of(shell, files) == {}
    found = garbage_of(shell, files, "--runs", trained, "--yes")
    assert len(found) == 2
    assert {path.name for path in files.iterdir()} == {
        path.with_suffix(".h5").name for path in (home.images, home.prompts, home.samples)
    }
