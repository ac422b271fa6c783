"""Exporting a trained run: what is written, what it says, and a script that knows nothing but those files."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import headstart
from cache_schema.errors import UsageError
from cache_schema.features import open_cache
from evaluate import onnx_export
from evaluate.onnx_export import OnnxModel
from evaluate.pipeline import pad_prompts
from evaluate.predictor import Predictor
from extract.encoders.image import load_image_encoder
from extract.encoders.live import LiveImageEncoder
from extract.encoders.lora import LoraSpec
from extract.encoders.specs import ImageEncoderSpec, TextEncoderSpec
from extract.encoders.text import load_text_encoder
from extract.image_job import ImageJobConfig, extract_images
from heads.checkpoint import load_head
from headstart import exporting
from headstart.command import Wanting
from headstart.export_commands import Export
from headstart.exporting import export_run

if TYPE_CHECKING:
    from cache_schema.features import FeatureCache
    from extract.encoders.tiny import TinyEncoders
    from extract.job import Extraction
    from heads.runs import Training

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "onnx_predict.py"
PROMPTS = ["the red circle", "all LARGE green shapes", "circle"]

# Leaves torch, transformers and every package of this repository out of reach, then runs the script.
ALONE = """
import importlib.abc, runpy, sys
BLOCKED = {"torch", "transformers", "onnx", "headstart", "evaluate", "heads", "extract", "cache_schema"}
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not to be had here")
sys.meta_path.insert(0, Blocker())
try:
    import torch
except ImportError:
    pass
else:
    raise SystemExit("torch is not out of reach")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def exported(run: Training, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Head and pipeline of a run."""
    out = tmp_path_factory.mktemp("onnx") / "linear"
    result = Export(run.run_dir, out).run()
    assert not isinstance(result, Wanting)
    assert [part["part"] for part in result["exported"]] == ["head", "pipeline"]
    assert all(0 <= part["difference"] <= 1e-4 for part in result["exported"])
    assert [part["folder"] for part in result["exported"]] == [str(out / "head"), str(out / "pipeline")]
    return out


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def predict_alone(pipeline: Path, picture: Path, out: Path, *prompts: str) -> str:
    """What the script prints."""
    arguments = (SCRIPT, pipeline, picture, *prompts, "--out", out)
    command = [sys.executable, "-c", ALONE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_mask(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.mode == "L"
        values = np.asarray(picture)
    assert set(np.unique(values)) <= {0, 255}
    return values > 0


def save_picture(path: Path, size: tuple[int, int], seed: int = 0, orientation: int | None = None) -> Path:
    """Blobs of colour, so that masks have some shape; stored turned where an orientation is given."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    picture = Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    picture.save(path, exif=exif)
    return path


def test_a_folder_has_what_its_description_names_and_no_more(exported: Path) -> None:
    assert {path.name for path in (exported / "head").iterdir()} == {"model.onnx", "head.json"}
    files = {"model.onnx", "pipeline.json", "tokenizer.json"}
    assert {path.name for path in (exported / "pipeline").iterdir()} == files
    described = read_json(exported / "pipeline" / "pipeline.json")
    assert described["image"]["input_size"] == [64, 96]
    assert described["inputs"]["pixels"] == {"dtype": "uint8", "shape": ["images", 64, 96, 3]}
    assert described["inputs"]["token_ids"] == {"dtype": "int64", "shape": ["prompts", "tokens"]}
    assert described["outputs"]["mask_logits"]["shape"][0] == "prompts"
    assert read_json(exported / "head" / "head.json")["inputs"].keys() == {"features/last", "pooled", "image_index"}


def test_nothing_says_where_it_was_made(exported: Path, workspace: Path) -> None:
    for path in exported.rglob("*.*"):
        held = path.read_bytes()
        for name in (ROOT, workspace, exported):
            assert str(name).encode() not in held, f"{path.name} names {name}"
        assert b"site-packages" not in held


def test_the_pipeline_says_what_the_predictor_says(exported: Path, run: Training, tmp_path: Path) -> None:
    picture = save_picture(tmp_path / "picture.png", (70, 110))
    predictor = headstart.load(run, device="cpu").set_image(picture)
    session = onnxruntime.InferenceSession(exported / "pipeline" / "model.onnx")
    pixels = predictor.prepare(picture).pixels[None]
    for prompt in PROMPTS:
        printed = predict_alone(exported / "pipeline", picture, tmp_path / "mask.png", prompt)
        expected = predictor.predict(prompt)[0]
        mask = read_mask(tmp_path / "mask.png")
        assert mask.shape == expected.mask.shape == (70, 110)
        # Features are rounded in a cache and by the predictor, but not in the pipeline: where the two differ, the
        # predictor is undecided.
        assert np.abs(expected.probability[mask != expected.mask] - 0.5).max(initial=0) < 2e-3
        assert printed.startswith(f"{prompt}: {mask.mean():.1%} of the picture -> ")
    assert session.get_inputs()[0].shape[1:] == list(pixels.shape[1:])


@pytest.mark.parametrize(("cache", "recipe"), [("feature_cache", "cross_attention"), ("int8_cache", "linear")])
def test_masks_are_those_of_headstart_predict(
    cache: str, recipe: str, request: pytest.FixtureRequest, workspace: Path, tmp_path: Path
) -> None:
    features: FeatureCache = request.getfixturevalue(cache)
    small = {"dim": 16, "hidden_dim": 16, "inner_dim": 16, "image_depth": 1, "depth": 1}
    settings = {"epochs": 1, "target_size": [16, 24], **(small if recipe == "cross_attention" else {})}
    trained = headstart.train(recipe, features, workspace / "runs", settings=settings)
    export_run(trained.run_dir, tmp_path / "onnx", ["pipeline"])
    predictor = headstart.load(trained, device="cpu")
    differing = total = 0
    for seed, size in enumerate([(50, 90), (97, 41), (64, 96)]):
        picture = save_picture(tmp_path / f"{seed}.png", size, seed)
        predict_alone(tmp_path / "onnx" / "pipeline", picture, tmp_path / "mask.png", *PROMPTS)
        for number, expected in enumerate(predictor.set_image(picture).predict(PROMPTS), start=1):
            mask = read_mask(tmp_path / f"mask-{number}.png")
            differing, total = differing + int((mask != expected.mask).sum()), total + mask.size
    print(f"{cache}: {differing} of {total} pixels differ")
    assert differing <= (1e-3 if cache == "feature_cache" else 1e-2) * total


def test_an_adapter_is_merged_and_half_precision_left_behind(
    tiny_encoders: TinyEncoders, samples_path: Path, prompt_extraction: Extraction, tmp_path: Path
) -> None:
    spec = ImageEncoderSpec(str(tiny_encoders.image), layers=("last",), input_size=(32, 48), precision="bfloat16")
    live = LiveImageEncoder.load(spec, LoraSpec(rank=2))
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:  # which is nothing at first
                parameter.normal_(std=0.3)
    live.save_adapter(tmp_path / "adapter")
    encoders = [
        load_image_encoder(dataclasses.replace(spec, adapter=adapter)) for adapter in (None, str(tmp_path / "adapter"))
    ]
    images = extract_images(ImageJobConfig(samples_path, tmp_path / "stores"), encoders[1]).path
    cache = open_cache(samples_path, images, prompt_extraction.path)
    trained = headstart.train("linear", cache, tmp_path / "runs", settings={"epochs": 1, "target_size": [16, 24]})
    (exported,) = export_run(trained.run_dir, tmp_path / "onnx", ["pipeline"])
    assert exported.difference <= 1e-4

    picture = save_picture(tmp_path / "picture.png", (70, 110))
    predictor = headstart.load(trained, device="cpu").set_image(picture)
    pixels = torch.from_numpy(predictor.prepare(picture).pixels[None])
    text_spec = TextEncoderSpec(str(tiny_encoders.text))
    token_ids, token_mask = pad_prompts(load_text_encoder(text_spec).tokenize(PROMPTS))
    inputs = {"pixels": pixels, "token_ids": token_ids, "token_mask": token_mask, "image_index": torch.zeros(3).long()}
    found = OnnxModel(tmp_path / "onnx" / "pipeline" / "model.onnx").run(inputs)["mask_logits"]
    expected = np.stack([prediction.logits for prediction in predictor.predict(PROMPTS)])
    rounding = np.abs(found - expected).max()
    _, head = load_head(trained.run_dir / "best")
    bare = Predictor(head, encoders[0], load_text_encoder(text_spec)).set_image(picture).predict(PROMPTS)
    adapted = np.abs(np.stack([prediction.logits for prediction in bare]) - expected).max()
    assert 0 < rounding < 0.1 * adapted


def test_a_picture_that_lies_on_its_side_is_turned_as_we_turn_it(exported: Path, run: Training, tmp_path: Path) -> None:
    picture = save_picture(tmp_path / "picture.jpg", (60, 90), orientation=6)
    predict_alone(exported / "pipeline", picture, tmp_path / "mask.png", "circle")
    expected = headstart.load(run, device="cpu").set_image(picture).predict("circle")[0].mask
    mask = read_mask(tmp_path / "mask.png")
    assert mask.shape == expected.shape == (90, 60)
    assert (mask != expected).mean() <= 1e-3


def test_weights_that_are_too_many_for_one_file_lie_beside_it(run: Training, exported: Path, tmp_path: Path) -> None:
    export_run(run.run_dir, tmp_path, most_inline_bytes=1000)
    for part in ("head", "pipeline"):
        assert (tmp_path / part / "model.onnx.data").stat().st_size > 1000
        assert read_json(tmp_path / part / f"{part}.json")["weights"] == "model.onnx.data"
        assert read_json(exported / part / f"{part}.json")["weights"] is None
    assert (tmp_path / "pipeline/model.onnx").stat().st_size < (exported / "pipeline/model.onnx").stat().st_size
    inputs = {
        "pixels": torch.zeros(1, 64, 96, 3, dtype=torch.uint8),
        "token_ids": torch.ones(1, 2, dtype=torch.int64),
        "token_mask": torch.ones(1, 2, dtype=torch.bool),
        "image_index": torch.zeros(1, dtype=torch.int64),
    }
    apart, together = (OnnxModel(folder / "pipeline" / "model.onnx").run(inputs) for folder in (tmp_path, exported))
    np.testing.assert_array_equal(apart["mask_logits"], together["mask_logits"])


def test_a_file_that_is_too_far_off_is_not_kept(
    run: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Wrong(OnnxModel):
        def run(self, inputs: Any) -> Any:
            return {name: values + 2e-4 for name, values in super().run(inputs).items()}

    monkeypatch.setattr(exporting, "OnnxModel", Wrong)
    result = Export(run.run_dir, tmp_path / "onnx", "head").run()
    assert isinstance(result, Wanting)
    assert result["exported"][0]["folder"] is None
    assert result["exported"][0]["difference"] == pytest.approx(2e-4, rel=0.1)
    assert "not written" in capsys.readouterr().out
    assert not list((tmp_path / "onnx").iterdir())


def test_a_folder_in_the_way_is_named_before_anything_is_done(
    exported: Path, run: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (exported / "pipeline" / "model.onnx").read_bytes()
    monkeypatch.setattr(exporting, "load_head", lambda folder: pytest.fail("something was done"))
    with pytest.raises(UsageError, match="pipeline is there already; name another folder"):
        export_run(run.run_dir, exported, ["pipeline"])
    assert (exported / "pipeline" / "model.onnx").read_bytes() == before


def test_without_onnx_it_is_said_what_to_install(
    run: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = onnx_export.importlib.util.find_spec
    monkeypatch.setattr(
        onnx_export.importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else find(name, *rest)
    )
    with pytest.raises(UsageError, match=r'ONNX files need onnx: run `pip install "headstart\[onnx\]"`'):
        Export(run.run_dir, tmp_path / "onnx", "head").run()
    assert not (tmp_path / "onnx").exists()


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a run folder"):
        Export(tmp_path, tmp_path / "onnx").run()
