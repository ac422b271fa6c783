"""List, verify and repair stores by the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cache_schema.store import open_store
from headstart import cli
from tests.headstart.shell import NUM_VIEWS, SHARD_ROWS, Home, Shell, digest_of, flip, named


@pytest.mark.parametrize("command", ["info", "list", "verify", "repair", "convert", "gc"])
def test_every_cache_command_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["cache", command, "--help"]) == cli.DONE
    printed = capsys.readouterr().out
    assert f"usage: headstart cache {command}" in printed
    assert "Example: headstart cache" in printed


# list


def test_a_list_has_one_line_for_each_store(home: Home, shell: Shell) -> None:
    (home.prompts / "manifest.json").unlink()
    code, printed = shell.run("cache", "list", home.stores)
    assert code == cli.DONE
    lines = {line.split()[0]: line for line in printed.splitlines()[1:]}
    assert lines.keys() == {home.images.name, home.prompts.name, home.samples.name}
    assert lines[home.images.name].endswith(" complete")
    assert f" {NUM_VIEWS} " in lines[home.images.name]
    assert "tiny-dinov2-reg" in lines[home.images.name]
    assert lines[home.prompts.name].endswith("NOT COMPLETE")
    assert "scenes" in lines[home.samples.name]


def test_a_list_is_one_json_object_too(home: Home, shell: Shell) -> None:
    (home.images / "zarr.json").write_text("{")
    code, listed = shell.json("cache", "list", home.stores)
    assert code == cli.DONE
    kinds = {Path(store["path"]).name: store["kind"] for store in listed["stores"]}
    assert kinds == {home.images.name: None, home.prompts.name: "prompt_features", home.samples.name: "samples"}


def test_an_empty_folder_has_nothing_to_list(tmp_path: Path, shell: Shell) -> None:
    assert "holds no store" in shell.mistake("cache", "list", tmp_path)


# verify


def test_sound_stores_are_said_to_be(home: Home, shell: Shell) -> None:
    code, printed = shell.run("cache", "verify", home.stores)
    assert code == cli.DONE
    assert [line.rpartition(", ")[2] for line in printed.splitlines()] == ["sound"] * 3
    code, result = shell.json("cache", "verify", home.images)
    assert code == cli.DONE
    (store,) = result["stores"]
    assert store["sound"]
    assert store["num_checked"] == store["num_shards"] > 0
    assert store["num_bytes"] == open_store(home.images).manifest.num_bytes


def test_every_damaged_file_is_named_and_no_other(home: Home, shell: Shell) -> None:
    flip(home.images / "features/last/c.1.0.0.0")
    (home.images / "features/1/c.2.0.0.0").unlink()
    (home.images / "cls/1/c.0.0").write_bytes(b"short")
    (home.images / "view/zarr.json").unlink()
    flip(home.prompts / "tokens/c.0.0")
    harmed = {
        home.images.name: ["cls/1/c.0.0", "features/1/c.2.0.0.0", "features/last/c.1.0.0.0", "view/zarr.json"],
        home.prompts.name: ["tokens/c.0.0"],
        home.samples.name: [],
    }
    code, result = shell.json("cache", "verify", home.stores)
    assert code == cli.WANTING
    assert named(result) == harmed
    assert [store["sound"] for store in result["stores"]] == [False, False, True]
    code, printed = shell.run("cache", "verify", home.stores)
    assert code == cli.WANTING
    assert all(f"  {key}: " in printed for keys in harmed.values() for key in keys)


def test_a_store_that_lost_its_manifest_is_wanting(home: Home, shell: Shell) -> None:
    (home.images / "manifest.json").unlink()
    code, result = shell.json("cache", "verify", home.images)
    assert code == cli.WANTING
    assert named(result) == {home.images.name: ["manifest.json"]}


def test_units_without_a_receipt_are_named_even_where_another_receipt_is_garbled(home: Home, shell: Shell) -> None:
    (home.images / "receipts/000000.json").write_text("no receipt")
    (home.images / "receipts/000002.json").unlink()
    code, result = shell.json("cache", "verify", home.images)
    assert code == cli.WANTING
    keys = named(result)[home.images.name]
    assert "receipts/000000.json" in keys
    assert any("c.2" in key or "000002" in key for key in keys)


@pytest.mark.parametrize("harm", ["root cut short", "root gone", "file cut short"])
def test_a_store_that_cannot_be_opened_is_wanting_and_hides_no_other(home: Home, shell: Shell, harm: str) -> None:
    if harm == "root cut short":
        (home.images / "zarr.json").write_text('{"zarr')
    elif harm == "root gone":
        (home.images / "zarr.json").unlink()
    else:
        shell.run("cache", "convert", home.images, "--to", "hdf5")
        shutil.rmtree(home.images)
        path = home.images.with_suffix(".h5")
        path.write_bytes(path.read_bytes()[:2000])
    flip(home.prompts / "tokens/c.0.0")
    code, result = shell.json("cache", "verify", home.stores)
    assert code == cli.WANTING
    assert [store["sound"] for store in result["stores"]] == [False, False, True]
    assert named(result)[home.prompts.name] == ["tokens/c.0.0"]


def test_a_sample_reads_its_share_of_the_shards_and_the_same_ones_again(home: Home, shell: Shell) -> None:
    for path in (home.images / "features").rglob("c.*"):
        flip(path)
    found = {}
    for seed in (0, 0, 1, 2):
        _, result = shell.json("cache", "verify", home.images, "--sample", 0.25, "--seed", seed)
        (store,) = result["stores"]
        assert store["num_checked"] == -(-store["num_shards"] // 4)
        assert found.setdefault(seed, named(result)) == named(result)
        assert len(named(result)[home.images.name]) < 6
    assert len({json.dumps(keys) for keys in found.values()}) > 1


def test_a_file_that_is_gone_is_found_whatever_the_sample(home: Home, shell: Shell) -> None:
    (home.images / "features/1/c.2.0.0.0").unlink()
    for seed in range(3):
        code, result = shell.json("cache", "verify", home.images, "--sample", 0.01, "--seed", seed)
        assert code == cli.WANTING
        assert "features/1/c.2.0.0.0" in named(result)[home.images.name]


@pytest.mark.parametrize("sample", ["0", "-1", "1.5", "nan"])
def test_a_sample_is_a_share(home: Home, shell: Shell, sample: str) -> None:
    assert "give a share of the shards above 0 and up to 1" in shell.mistake(
        "cache", "verify", home.images, "--sample", sample
    )


@pytest.mark.parametrize("threads", ["0", "-2"])
def test_threads_to_verify_with_are_at_least_one(home: Home, shell: Shell, threads: str) -> None:
    assert "threads" in shell.mistake("cache", "verify", home.images, "--threads", threads)


# repair


def test_a_repair_makes_the_store_what_it_was(home: Home, shell: Shell) -> None:
    digest = digest_of(home.images)
    flip(home.images / "features/last/c.1.0.0.0")
    (home.images / "cls/1/c.1.0").unlink()
    code, repaired = shell.json("cache", "repair", home.images, "--device", "cpu")
    assert code == cli.DONE
    assert repaired["damaged"] == ["cls/1/c.1.0", "features/last/c.1.0.0.0"]
    assert repaired["num_encoded"] == SHARD_ROWS
    assert repaired["digest_before"] == repaired["digest_after"] == digest_of(home.images) == digest
    assert shell.run("cache", "verify", home.stores)[0] == cli.DONE


def test_a_repair_says_what_it_did_and_then_that_there_is_nothing_to_do(home: Home, shell: Shell) -> None:
    flip(home.images / "valid/c.2")
    (home.images / "receipts/000000.json").unlink()
    code, printed = shell.run("cache", "repair", home.images)
    assert code == cli.DONE
    assert "extracting 16 rows again; every digest is what it was" in printed
    assert "  valid/c.2" in printed.splitlines()
    code, printed = shell.run("cache", "repair", home.images)
    assert code == cli.DONE
    assert printed.startswith("nothing to repair: every file of ")


def test_prompt_features_are_repaired_too(home: Home, shell: Shell) -> None:
    digest = digest_of(home.prompts)
    flip(home.prompts / "pooled/c.0.0")
    code, repaired = shell.json("cache", "repair", home.prompts)
    assert code == cli.DONE
    assert repaired["damaged"] == ["pooled/c.0.0"]
    assert 0 < repaired["num_encoded"] <= 32
    assert digest_of(home.prompts) == digest


def test_a_lost_manifest_is_made_again(home: Home, shell: Shell) -> None:
    digest = digest_of(home.images)
    (home.images / "manifest.json").unlink()
    code, repaired = shell.json("cache", "repair", home.images)
    assert code == cli.DONE
    assert (repaired["num_encoded"], repaired["digest_before"], repaired["digest_after"]) == (0, None, digest)


def test_a_store_is_repaired_without_images_where_no_image_is_needed(home: Home, shell: Shell) -> None:
    shutil.rmtree(home.folder / "scenes")
    (home.images / "features/last/zarr.json").unlink()
    code, repaired = shell.json("cache", "repair", home.images)
    assert code == cli.DONE
    assert repaired["num_encoded"] == 0


def test_samples_and_images_that_were_moved_are_named(home: Home, shell: Shell) -> None:
    digest = digest_of(home.images)
    flip(home.images / "features/last/c.1.0.0.0")
    elsewhere = home.folder / "elsewhere"
    elsewhere.mkdir()
    home.samples.rename(elsewhere / home.samples.name)
    (home.folder / "scenes" / "images").rename(elsewhere / "images")
    assert home.samples.name in shell.mistake("cache", "repair", home.images)
    samples = ("--samples", elsewhere / home.samples.name)
    assert "--image-dir" in shell.mistake("cache", "repair", home.images, *samples)
    code, repaired = shell.json("cache", "repair", home.images, *samples, "--image-dir", elsewhere / "images")
    assert code == cli.DONE
    assert repaired["digest_after"] == digest


def test_another_encoder_touches_nothing(home: Home, shell: Shell) -> None:
    flip(home.images / "features/last/c.1.0.0.0")
    processor = home.folder / "encoders" / "tiny-dinov2-reg" / "preprocessor_config.json"
    processor.write_text(processor.read_text().replace("0.485", "0.5"))
    before = {path: path.stat().st_mtime_ns for path in home.images.rglob("*")}
    assert "is not the one" in shell.mistake("cache", "repair", home.images)
    assert {path: path.stat().st_mtime_ns for path in home.images.rglob("*")} == before


def test_an_encoder_that_is_gone_is_named(home: Home, shell: Shell) -> None:
    flip(home.images / "features/last/c.1.0.0.0")
    shutil.rmtree(home.folder / "encoders")
    assert "tiny-dinov2-reg" in shell.mistake("cache", "repair", home.images)


def test_what_cannot_be_repaired_is_said_with_what_to_do_instead(home: Home, shell: Shell) -> None:
    assert "headstart prepare" in shell.mistake("cache", "repair", home.samples)
    assert ".zarr" in shell.mistake("cache", "repair", home.stores)
    assert "no store at" in shell.mistake("cache", "repair", home.stores / "image_features-0123456789ab.zarr")


def test_a_compressed_store_is_still_one_after_a_repair(home: Home, shell: Shell) -> None:
    values = open_store(home.images).read("features/last")
    _, converted = shell.json(
        "cache", "convert", home.images, "--to", "zarr", "--out", home.folder / "small", "--zstd", 3
    )
    path = Path(converted["path"])
    digest = digest_of(path)
    flip(path / "features/last/c.1.0.0.0")
    samples = ("--samples", home.samples)
    code, repaired = shell.json("cache", "repair", path, *samples)
    assert code == cli.DONE
    assert repaired["num_encoded"] == SHARD_ROWS
    np.testing.assert_array_equal(open_store(path).read("features/last"), values)
    assert digest_of(path) == digest


Harm = Callable[[Home], object]


@pytest.mark.parametrize(
    "harm",
    [
        lambda home: flip(home.images / "features/last/c.1.0.0.0"),
        lambda home: (home.images / "features/last/c.1.0.0.0").unlink(),
        lambda home: (home.images / "receipts/000001.json").write_text("{"),
        lambda home: (home.images / "manifest.json").unlink(),
        lambda home: (home.images / "features/last/zarr.json").unlink(),
    ],
    ids=["bit flipped", "shard gone", "receipt garbled", "manifest gone", "metadata gone"],
)
def test_after_whatever_harm_the_command_that_errors_name_mends_the_store(home: Home, shell: Shell, harm: Harm) -> None:
    values, digest = open_store(home.images).read("features/last"), digest_of(home.images)
    harm(home)
    assert shell.run("cache", "verify", home.images)[0] == cli.WANTING
    assert shell.run("cache", "repair", home.images)[0] == cli.DONE
    assert shell.run("cache", "verify", home.images)[0] == cli.DONE
    np.testing.assert_array_equal(open_store(home.images).read("features/last"), values)
    assert digest_of(home.images) == digest
