"""Extraction by the command line: what it makes, what it says beforehand, and how it stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache_schema.features import ImageFeatures
from cache_schema.receipts import Receipt
from cache_schema.store import open_store
from headstart import api, cli
from tests.headstart.shell import NUM_VIEWS, Home, Shell, digest_of, extract


@pytest.mark.parametrize("aspect", ["squash", "crop", "letterbox"])
def test_an_aspect_policy_is_trained_evaluated_and_predicted_with(home: Home, shell: Shell, aspect: str) -> None:
    out = home.folder / "aspect"
    out.mkdir()
    (out / home.samples.name).symlink_to(home.samples)
    code, extracted = extract(shell, home, out, "--aspect", aspect)
    assert code == cli.DONE
    view = ImageFeatures(open_store(Path(extracted["images"]["path"]))).views[0]
    height, width = open_store(Path(extracted["images"]["path"])).read("original_size")[0]
    side = {"squash": (height, width), "crop": (min(height, width),) * 2, "letterbox": (max(height, width),) * 2}
    assert view.size == side[aspect]
    settings = ("epochs=1", "target_size=[8,8]")
    _, trained = shell.json("train", "linear", "--stores", out, "--runs", home.folder / "runs", "--set", *settings)
    code, evaluated = shell.json("evaluate", trained["run_dir"])
    assert code == cli.DONE
    assert 0 <= evaluated["runs"][0]["metrics"]["mean_iou"] <= 1
    picture = home.folder / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)).save(picture)
    (prediction,) = api.load(Path(trained["run_dir"])).set_image(picture).predict("the red circle")
    assert prediction.mask.shape == (50, 90)
    if aspect == "crop":
        assert not prediction.mask[:, :20].any()
        assert not prediction.mask[:, 70:].any()


def test_attention_outputs_and_normed_layers_are_kept_when_asked_for(home: Home, shell: Shell) -> None:
    out = home.folder / "attention"
    asked = ("--layers", "1", "2+norm", "last", "--attention", "logits", "head_tokens", "mean_token")
    code, extracted = extract(shell, home, out, *asked)
    assert code == cli.DONE
    store = open_store(Path(extracted["images"]["path"]))
    assert store.header.identity["outputs"] == {
        "layers": ["1", "2+norm", "last"],
        "cls": ["1", "2+norm", "last"],
        "attention": ["logits", "head_tokens", "mean_token"],
    }
    logits, patches = store.read("attention/logits").astype(np.float32), store.read("features/last").astype(np.float32)
    weights = np.exp(logits - logits.max((2, 3), keepdims=True))
    weights /= weights.sum((2, 3), keepdims=True)
    expected = np.einsum("nhyx,nyxd->nhd", weights, patches) / (weights.shape[2] * weights.shape[3])
    np.testing.assert_allclose(store.read("attention/head_tokens"), expected, atol=2e-3)
    assert store.read("attention/mean_token").shape == (NUM_VIEWS, 96)


def test_half_precision_makes_another_store_of_nearly_the_same_features(home: Home, shell: Shell) -> None:
    out = home.folder / "half"
    plain, half = (
        open_store(Path(extract(shell, home, out, "--precision", precision)[1]["images"]["path"]))
        for precision in ("float32", "bfloat16")
    )
    assert plain.path != half.path
    assert half.header.identity["encoder"]["compute_dtype"] == "bfloat16"
    a, b = (store.read("features/last").astype(np.float32) for store in (plain, half))
    assert not np.array_equal(a, b)
    assert np.sqrt(((a - b) ** 2).mean() / (a**2).mean()) < 0.02


def test_a_run_on_half_precision_predicts_with_it(home: Home, shell: Shell) -> None:
    out = home.folder / "half"
    out.mkdir()
    (out / home.samples.name).symlink_to(home.samples)
    extract(shell, home, out, "--precision", "bfloat16")
    settings = ("epochs=1", "target_size=[8,8]")
    _, trained = shell.json("train", "linear", "--stores", out, "--runs", home.folder / "runs", "--set", *settings)
    config = json.loads((Path(trained["run_dir"]) / "config.json").read_text())
    assert config["encoders"]["image"]["precision"] == config["encoders"]["text"]["precision"] == "bfloat16"
    picture = np.zeros((40, 40, 3), np.uint8)
    assert api.load(Path(trained["run_dir"])).set_image(picture).predict("all squares")[0].mask.shape == (40, 40)


# Plans


def test_a_plan_foresees_the_stores_that_are_made(home: Home, shell: Shell) -> None:
    out = home.folder / "planned"
    encoders = ("--image-encoder", home.folder / "encoders/tiny-dinov2-reg")
    encoders += ("--text-encoder", home.folder / "encoders/tiny-clip-text", "--input-size", 32, 32)
    code, plan = shell.json("plan", home.samples, "--out", out, *encoders, "--seconds", 1)
    assert code == cli.DONE
    assert not out.exists()
    _, extracted = extract(shell, home, out)
    for planned, kind in zip(plan["stores"], ("images", "prompts"), strict=True):
        path = Path(extracted[kind]["path"])
        assert planned["store"] == path.name
        num_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        assert planned["num_bytes"] == pytest.approx(num_bytes, rel=0.15)
        assert planned["binds"] in planned["rates"]
    assert "binds" in shell.run("plan", home.samples, "--out", out, *encoders, "--seconds", 1)[1]


def test_a_plan_that_does_not_fit_is_found_wanting_and_the_job_refused(
    home: Home, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = home.folder / "planned"
    monkeypatch.setattr("extract.job.free_bytes", lambda path: 1000)
    monkeypatch.setattr("extract.plan.free_bytes", lambda path: 1000)
    code, printed = shell.run("plan", home.samples, "--out", out, "--input-size", 32, 32, "--seconds", 1)
    assert code == cli.WANTING
    assert "THE DISK IS TOO SMALL" in printed
    assert "--overcommit" in shell.mistake("extract", home.samples, "--out", out, "--input-size", 32, 32)
    code, extracted = extract(shell, home, out, "--overcommit")
    assert code == cli.DONE
    assert extracted["images"]["num_encoded"] == NUM_VIEWS


def test_the_encoders_with_a_name_are_listed(shell: Shell) -> None:
    code, described = shell.json("encoders")
    assert code == cli.DONE
    assert {
        "dinov2-base",
        "dinov2-base-reg",
        "dinov3-vits16plus",
        "siglip2-base-512",
        "clip-base-16",
        "resnet-101",
    } <= {encoder["name"] for encoder in described["image"]}
    assert {"siglip2-base-512", "clip-base-16", "bert-base"} <= {encoder["name"] for encoder in described["text"]}
    printed = shell.run("encoders")[1]
    assert "facebook/dinov2-base" in printed


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--image-encoder", "dinov2-bas"), "did you mean 'dinov2-base'"),
        (("--text-encoder", "bert-bse"), "did you mean 'bert-base'"),
        (("--layers", "lst"), "lst"),
        (("--input-size", "33", "32"), "33 x 32"),
        (("--image-adapter", "nowhere"), "nowhere"),
        (("--slurm-options", "jobs.toml"), "--slurm-options goes with --cluster slurm"),
        (("--cluster", "lokal:2"), "lokal"),
        (("--device", "cuda:7"), "there is no device 'cuda:7' here"),
        (("--layers",), "no layer is asked for"),
    ],
)
def test_a_mistake_gets_one_sentence_before_anything_is_written(
    home: Home, shell: Shell, arguments: tuple[str, ...], sentence: str
) -> None:
    out = home.folder / "out"
    assert sentence in shell.mistake("extract", home.samples, "--out", out, *arguments)
    assert not list(out.glob("*.zarr"))


# Stopping


@pytest.mark.parametrize(
    ("signal_number", "code"), [(signal.SIGTERM, cli.TERMINATED), (signal.SIGINT, cli.INTERRUPTED)]
)
def test_a_job_that_is_told_to_stop_leaves_nothing_half_and_goes_on_later(
    home: Home, shell: Shell, signal_number: signal.Signals, code: int
) -> None:
    out = home.folder / "stopped"
    arguments = ["extract", str(home.samples), "--out", str(out), "--shard-rows", "1", "--batch-size", "1"]
    encoders = ["--image-encoder", str(home.folder / "encoders/tiny-dinov2-reg")]
    encoders += ["--text-encoder", str(home.folder / "encoders/tiny-clip-text"), "--input-size", "512", "512"]
    command = [sys.executable, "-m", "headstart.cli", *arguments, *encoders]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    while process.poll() is None and len(list(out.glob("image_features-*/receipts/0*.json"))) < 3:
        time.sleep(0.005)
    process.send_signal(signal_number)
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == code, printed
    assert "run the same command again to go on" in printed.splitlines()[-1]
    assert "Traceback" not in printed
    (store,) = out.glob("image_features-*")
    assert not (store / "manifest.json").exists()
    assert not list(out.rglob("*.tmp"))
    receipts = [Receipt.read(path) for path in store.glob("receipts/0*.json")]
    assert 3 <= len(receipts) < NUM_VIEWS
    assert all(receipt.is_honoured(store) for receipt in receipts)
    result = shell.json(*arguments, *encoders)[1]["images"]
    assert result["num_reused"] == len(receipts)
    untouched = shell.json(*arguments, *encoders, "--out", home.folder / "untouched")[1]["images"]
    assert digest_of(Path(result["path"])) == digest_of(Path(untouched["path"]))


def test_without_a_cluster_dask_is_not_imported(home: Home) -> None:
    out = str(home.folder / "out")
    code = (
        "import sys; from headstart import cli; "
        f"code = cli.run(['extract', {str(home.samples)!r}, '--out', {out!r}, '--input-size', '32', '32']); "
        "found = sorted({name.partition('.')[0] for name in sys.modules} & {'dask', 'distributed', 'dask_jobqueue'}); "
        "assert not found, found; sys.exit(code)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == cli.DONE
