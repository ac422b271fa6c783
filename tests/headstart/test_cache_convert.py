"""Convert stores by the command line, and live with stores that lie in one file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cache_schema.store import open_store
from headstart import cli
from tests.headstart.shell import NUM_VIEWS, Home, Shell, digest_of, extract, flip, flip_in_hdf5, named, packed_home


def test_a_store_goes_into_one_file_and_back_and_is_what_it_was(home: Home, shell: Shell) -> None:
    digest, values = digest_of(home.images), open_store(home.images).read("features/last")
    code, there = shell.json("cache", "convert", home.images, "--to", "hdf5")
    path = home.images.with_suffix(".h5")
    assert (code, there) == (cli.DONE, {"path": str(path)})
    assert digest_of(path) == digest
    np.testing.assert_array_equal(open_store(path).read("features/last"), values)
    code, back = shell.json("cache", "convert", path, "--to", "zarr", "--out", home.folder / "back")
    assert (code, back) == (cli.DONE, {"path": str(home.folder / "back" / home.images.name)})
    assert digest_of(Path(back["path"])) == digest
    assert shell.run("cache", "verify", home.folder / "back")[0] == cli.DONE
    assert shell.run("cache", "verify", path)[0] == cli.DONE


def test_a_store_is_not_written_over_itself(home: Home, shell: Shell) -> None:
    digest = digest_of(home.images)
    assert "is the store itself" in shell.mistake("cache", "convert", home.images, "--to", "zarr")
    out = home.folder / "scenes" / ".." / "stores"
    assert "is the store itself" in shell.mistake("cache", "convert", home.images, "--to", "zarr", "--out", out)
    shell.run("cache", "convert", home.images, "--to", "hdf5")
    path = home.images.with_suffix(".h5")
    assert "is the store itself" in shell.mistake("cache", "convert", path, "--to", "hdf5")
    assert digest_of(home.images) == digest_of(path) == digest


@pytest.mark.parametrize("zstd", ["99", "23"])
def test_a_compression_level_that_zstd_lacks_is_the_users_mistake(home: Home, shell: Shell, zstd: str) -> None:
    out = home.folder / "small"
    shell.mistake("cache", "convert", home.images, "--to", "zarr", "--out", out, "--zstd", zstd)
    assert not out.exists()


def test_an_hdf5_file_is_not_compressed(home: Home, shell: Shell) -> None:
    assert "neither compressed nor remote" in shell.mistake(
        "cache", "convert", home.images, "--to", "hdf5", "--zstd", 3
    )


def test_a_compressed_store_is_not_turned_into_a_plain_one_under_its_own_shards(home: Home, shell: Shell) -> None:
    """Whatever the second conversion does, the store that is there afterwards can be read."""
    out, values = home.folder / "small", open_store(home.images).read("features/last")
    convert = ("cache", "convert", home.images, "--to", "zarr", "--out", out)
    assert shell.run(*convert, "--zstd", 3)[0] == cli.DONE
    shell.run(*convert)
    np.testing.assert_array_equal(open_store(out / home.images.name).read("features/last"), values)


def test_a_damaged_store_is_not_converted(home: Home, shell: Shell) -> None:
    flip(home.images / "features/last/c.1.0.0.0")
    sentence = shell.mistake("cache", "convert", home.images, "--to", "hdf5")
    assert "features/last/c.1.0.0.0" in sentence
    assert "headstart cache repair" in sentence
    assert not list(home.stores.glob("*.h5"))
    assert not list(home.stores.glob(".*.tmp"))


def test_the_remedy_for_a_damaged_hdf5_file_is_not_one_that_is_refused(home: Home, shell: Shell) -> None:
    shell.run("cache", "convert", home.images, "--to", "hdf5", "--out", home.folder / "packed")
    path = (home.folder / "packed" / home.images.name).with_suffix(".h5")
    flip_in_hdf5(path, "features/last")
    code, result = shell.json("cache", "verify", path)
    assert code == cli.WANTING
    assert named(result) == {path.name: ["features/last/c.0.0.0.0"]}
    remedy = shell.mistake("cache", "convert", path, "--to", "zarr", "--out", home.folder / "back")
    assert "cache repair" not in remedy, "which takes no HDF5 file"


# Stores in files


def test_stores_are_packed_into_files_and_not_extracted_twice(home: Home, shell: Shell) -> None:
    out = home.folder / "packed"
    code, first = extract(shell, home, out, "--container", "hdf5")
    assert code == cli.DONE
    paths = [Path(first[kind]["path"]) for kind in ("images", "prompts")]
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in paths)
    assert {path.suffix for path in paths} == {".h5"}
    assert first["images"]["num_encoded"] == NUM_VIEWS
    written = {path: path.stat().st_mtime_ns for path in paths}
    for container in (("--container", "hdf5"), ()):
        code, again = extract(shell, home, out, *container)
        assert code == cli.DONE
        assert [Path(again[kind]["path"]) for kind in ("images", "prompts")] == paths
        assert again["images"]["num_encoded"] == again["prompts"]["num_encoded"] == 0
    assert {path: path.stat().st_mtime_ns for path in paths} == written


def test_what_a_kill_left_while_packing_is_no_second_store(home: Home, shell: Shell) -> None:
    out = home.folder / "packed"
    _, first = extract(shell, home, out, "--container", "hdf5")
    path = Path(first["images"]["path"])
    _, back = shell.json("cache", "convert", path, "--to", "zarr")
    (Path(back["path"]) / "manifest.json").unlink()
    _, again = extract(shell, home, out, "--container", "hdf5")
    assert again["images"]["path"] == str(path)
    assert [found.name for found in out.glob("image_features-*")] == [path.name]


def test_what_people_read_of_an_extraction_into_files_names_the_files(home: Home, shell: Shell) -> None:
    encoders = ("--image-encoder", home.folder / "encoders/tiny-dinov2-reg")
    encoders += ("--text-encoder", home.folder / "encoders/tiny-clip-text", "--input-size", 32, 32)
    out = home.folder / "packed"
    _, printed = shell.run("extract", home.samples, "--out", out, *encoders, "--container", "hdf5")
    assert all(path.name in printed for path in out.iterdir())
    assert ".zarr" not in printed


def test_a_head_learns_the_same_from_stores_in_files(home: Home, shell: Shell) -> None:
    settings = ("--set", "epochs=1", "target_size=[8,8]")
    results, weights = [], []
    for stores, runs in ((home.stores, home.folder / "a"), (packed_home(home, shell), home.folder / "b")):
        code, trained = shell.json("train", "linear", "--stores", stores, "--runs", runs, *settings)
        assert code == cli.DONE
        code, evaluated = shell.json("evaluate", trained["run_dir"], "--out", runs / "report")
        assert code == cli.DONE
        assert (runs / "report" / "report.html").is_file()
        results.append(evaluated["runs"][0]["metrics"])
        weights.append((Path(trained["run_dir"]) / "best" / "model.safetensors").read_bytes())
    assert results[0] == results[1]
    assert weights[0] == weights[1]


def test_stores_in_files_are_listed_described_and_checked(home: Home, shell: Shell) -> None:
    files = packed_home(home, shell)
    code, listed = shell.json("cache", "list", files)
    assert code == cli.DONE
    assert [Path(store["path"]).suffix for store in listed["stores"]] == [".h5"] * 3
    assert all(store["complete"] for store in listed["stores"])
    _, folders = shell.json("cache", "info", home.stores)
    code, described = shell.json("cache", "info", files)
    assert code == cli.DONE
    for mine, yours in zip(described["stores"], folders["stores"], strict=True):
        for key in ("kind", "fingerprint", "num_bytes", "arrays", "num_rows", "identity", "failures"):
            assert mine[key] == yours[key]
    code, verified = shell.json("cache", "verify", files)
    assert code == cli.DONE
    assert all(store["num_checked"] == store["num_shards"] for store in verified["stores"])
