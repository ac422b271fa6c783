"""The extraction benchmark at a size that takes seconds: it measures what it says, and all contenders do the same."""

from __future__ import annotations

import io
import json
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.modules.module import register_module_forward_hook
from transformers import Dinov2Model

from benchmarks import extract
from benchmarks.apart import CONTENDERS, measure_apart, measure_here
from benchmarks.checkpoints import ImageModel
from benchmarks.common import Report
from benchmarks.extract import Amounts, ExtractConfig, run
from benchmarks.images import make_jpeg, write_images, write_task
from benchmarks.measuring import Measured, Request
from benchmarks.memory import PeakMemory
from benchmarks.prompts import make_prompts
from benchmarks.stand_in import StandIn
from cache_schema.store import open_store
from extract.encoders.protocols import ImageEncoder
from extract.job import pick_device

MODEL, LARGER = "dinov2-tiny@28", "dinov2-tiny@56"
SIZE = (24, 32)
TINY = Amounts(
    overlap_share=0.001,
    overhead_images=8,
    memory_images=4,
    scaling_images=4,
    num_prompts=12,
    padded_prompts=5,
    tiny_text=True,
)


def tiny(folder: Path, **options: object) -> ExtractConfig:
    config = ExtractConfig(
        dir=folder,
        models=(MODEL, LARGER),
        num_images=8,
        rounds=1,
        batch_size=2,
        shard_rows=4,
        amounts=TINY,
        image_size=SIZE,
    )
    return replace(config, **options)


def measure_without_cluster(request: Request) -> Measured:
    """Clusters have tests of their own."""
    return measure_here(replace(request, workers=0))


@pytest.fixture(scope="module")
def request_of_images(tmp_path_factory: pytest.TempPathFactory) -> Request:
    folder = tmp_path_factory.mktemp("contenders")
    samples = write_task(write_images(folder, 5, SIZE), 5, SIZE, folder)
    checkpoint = ImageModel.parse(MODEL).save(folder)
    return Request("", str(checkpoint), str(samples), batch_size=2, shard_rows=4)


def test_every_part_reports_rates_and_ratios(tmp_path: Path) -> None:
    report = run(tiny(tmp_path), measure_without_cluster)
    rows = {row.name: row for row in report.rows}
    told = {
        f"{MODEL}: headstart",
        f"{LARGER}: serial script",
        f"{MODEL}: headstart: its own word on forward",
        f"{MODEL}: memory of headstart over that of the serial script",
        "decode-bound: write alone",
        "overhead of a shard",
        "peak memory of a job on 16 images",
        f"{MODEL}: headstart, local:2",
        f"{MODEL}: start-up of local:1",
        "tiny-clip-text: bare forward, padded to the limit",
    }
    assert told <= set(rows)
    compared = {
        f"{MODEL}: headstart / bare forward",
        f"{LARGER}: headstart / transformers pipeline",
        "forward-bound: job / slowest stage alone",
        f"{MODEL}: local:2 / local:1",
        "tiny-clip-text: headstart / bare forward, sorted by length",
    }
    assert compared <= set(report.ratios)
    assert all(row.value > 0 for name, row in rows.items() if row.unit.endswith("/s"))
    assert all(ratio.median > 0 for ratio in report.ratios.values())
    assert "encoder: stand-in" in rows["write-bound: job"].note
    assert list(tmp_path.iterdir()) == [], "what was written is removed"
    assert str(tmp_path) not in json.dumps(report.to_dict())


@pytest.mark.skipif(pick_device() != "cpu", reason="an accelerator takes all images")
def test_models_that_compute_longer_get_fewer_images(tmp_path: Path) -> None:
    asked: dict[str, int] = {}

    def measure(request: Request) -> Measured:
        measured = measure_here(request)
        asked[Path(request.checkpoint).name] = measured.num_items
        return measured

    run(tiny(tmp_path, parts=("architectures",)), measure)
    assert asked[MODEL] == 8
    assert 2 <= asked[LARGER] < 8


def test_contenders_compute_the_same_features(request_of_images: Request, tmp_path: Path) -> None:
    made = {}
    for contender in ("ours", "serial"):
        made[contender] = tmp_path / contender
        made[contender].mkdir()
        request = replace(request_of_images, contender=contender, out=str(made[contender]))
        assert measure_here(request).num_items == 5
    (path,) = made["ours"].glob("image_features-*.zarr")
    kept = torch.load(made["serial"] / "features.pth", weights_only=True)
    store = open_store(path)
    features, cls = store.read("features/last"), store.read("cls/last")
    assert len(kept) == len(features)
    for row, tokens in enumerate(kept.values()):
        np.testing.assert_allclose(features[row].reshape(4, -1), tokens["patches"], atol=2e-3)
        np.testing.assert_allclose(cls[row], tokens["cls"], atol=2e-3)


@pytest.mark.parametrize(
    ("contender", "batches"), [("bare", [2, 2, 1]), ("bare, a thread a core", [2, 2, 1]), ("pipeline", [1] * 5)]
)
def test_the_others_encode_every_image_once(request_of_images: Request, contender: str, batches: list[int]) -> None:
    seen: list[int] = []

    def see(module: torch.nn.Module, arguments: object, output: object) -> None:
        if isinstance(module, Dinov2Model):
            seen.append(len(output.last_hidden_state))

    ready = CONTENDERS[contender](replace(request_of_images, contender=contender))
    with closing(ready), register_module_forward_hook(see):
        ready.run()
    assert sorted(seen, reverse=True) == batches


def test_a_contender_in_a_process_of_its_own_reports_back(request_of_images: Request) -> None:
    measured = measure_apart(replace(request_of_images, contender="bare"))
    assert measured.num_items == 5
    assert measured.seconds > 0
    assert measured.memory_bytes >= 0


def test_a_contender_that_fails_says_why(request_of_images: Request) -> None:
    with pytest.raises(RuntimeError, match="no-such-store"):
        measure_apart(replace(request_of_images, contender="bare", samples="no-such-store"))


def test_the_stand_in_is_an_encoder_that_only_waits() -> None:
    encoder = StandIn(wait_s=0.01, grid=(2, 3, 4), num_layers=2, input_size=(8, 8), batch_size=4)
    assert isinstance(encoder, ImageEncoder)
    pixels = torch.zeros(3, *encoder.preprocess(np.zeros((20, 10, 3), np.uint8)).shape, dtype=torch.uint8)
    started = time.perf_counter()
    encoding = encoder.encode(pixels)
    assert time.perf_counter() - started >= 0.01
    assert [tuple(encoding.features[layer].shape) for layer in ("0", "1")] == [(3, 2, 3, 4)] * 2


def test_memory_that_was_given_back_counts() -> None:
    with PeakMemory() as nothing:
        pass
    with PeakMemory() as memory:
        np.ones(2**25, np.uint8)
    assert memory.num_bytes > 2**25 - 2**21
    assert nothing.num_bytes < 2**23


def test_images_look_like_photographs_to_a_decoder() -> None:
    data = make_jpeg(3, (480, 640))
    assert data == make_jpeg(3, (480, 640)) != make_jpeg(4, (480, 640))
    assert 60_000 <= len(data) <= 120_000
    assert Image.open(io.BytesIO(data)).size == (640, 480)


def test_prompts_are_unique_and_of_all_lengths() -> None:
    prompts = make_prompts(500)
    assert len(set(prompts)) == 500
    assert {len(prompt.split()) for prompt in prompts} == set(range(2, 21))


def test_quick_takes_little(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extract, "run", lambda config: Report("extract", {}, config.settings))
    assert extract.main(["--quick", "--json", str(tmp_path / "extract.json")]) == 0
    written = json.loads((tmp_path / "extract.json").read_bytes())
    assert written["settings"]["rounds"] == 1
    assert {"benchmark", "machine", "rows", "ratios"} <= set(written)
    assert "rounds 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "dinov2-small"], "give an architecture"),
        (["--models", "dinov2-smal@224"], "did you mean 'dinov2-small'"),
        (["--models", "dinov2-small@225"], "a multiple of 14"),
        (["--rounds", "0"], "rounds is 0"),
    ],
)
def test_a_mistake_is_one_sentence(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert extract.main(options) == 2
    assert message in " ".join(capsys.readouterr().err.split())  # it was broken into lines
