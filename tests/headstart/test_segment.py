"""`headstart openvocab` and `headstart segment`: from a run, or a file of weights, to scores and pictures."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from cache_schema.store import open_store
from evaluate.open_vocabulary.label_pictures import OPACITY, class_colour
from extract.prepare import PrepareConfig, prepare
from headstart import api, cli
from headstart.segment_commands import BENCHMARK_NAMES
from tests.evaluate.open_vocabulary.layouts import LAYOUTS, SIZES, make_benchmark_folder
from tests.evaluate.open_vocabulary.oracle import slow_scores
from tests.headstart.shell import Shell

if TYPE_CHECKING:
    from cache_schema.features import FeatureCache
    from extract.encoders.protocols import ImageEncoder
    from extract.encoders.tiny import TinyEncoders
    from heads.runs import Training

SMALL = ("--short-side", 48, "--window", 48, "--stride", 24, "--templates", "1")


@pytest.fixture(scope="module")
def linear(run: Training, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that may be written to, beside the encoders that it names."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(run.run_dir.parent.parent / "encoders", home / "encoders")
    return Path(shutil.copytree(run.run_dir, home / "runs" / run.run_dir.name))


@pytest.fixture(scope="module")
def talk2dino(feature_cache: FeatureCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of Talk2DINO, trained for a moment."""
    settings = {"epochs": 1, "alignment": "mean_patch", "target_size": [16, 24]}
    return api.train("talk2dino", feature_cache, tmp_path_factory.mktemp("t2d"), settings=settings).run_dir


@pytest.fixture(scope="module")
def weights(talk2dino: Path) -> Path:
    """The projection of that run, as the authors publish theirs."""
    from heads.checkpoint import load_head
    from heads.talk2dino import Talk2DinoHead, write_talk2dino

    _, head = load_head(talk2dino / "best")
    assert isinstance(head, Talk2DinoHead)
    path = talk2dino / "projection.pth"
    write_talk2dino(head, path)
    return path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """Red on the left, blue on the right, and nothing in between: (40, 64) pixels."""
    pixels = np.zeros((40, 64, 3), np.uint8)
    pixels[:, :32, 0], pixels[:, 32:, 2] = 255, 255
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def read_labels(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The label maps that are made from now on."""
    from evaluate.open_vocabulary.live_windows import SeenImage
    from evaluate.open_vocabulary.segmenter import Segmenter

    made: list[np.ndarray] = []
    label = Segmenter.label

    def keep(self: Segmenter, image: SeenImage) -> np.ndarray:
        made.append(label(self, image))
        return made[-1]

    monkeypatch.setattr(Segmenter, "label", keep)
    return made


def test_a_dataset_as_it_is_published_is_scored_in_one_command(
    linear: Path, tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_benchmark_folder(tmp_path / "data", "voc21")["val"]
    labels, out = read_labels(monkeypatch), tmp_path / "out"
    command = ("openvocab", linear, "voc21", "--data", tmp_path / "data", "--out", out, *SMALL)
    code, results = shell.json(*command, "--background-level", 0.4)
    assert code == cli.DONE
    assert json.loads((out / "results.json").read_text()) == {key: results[key] for key in results if key != "out"}
    expected = slow_scores(labels, [image.truth for image in images], 21)
    assert {name: results["metrics"][name] for name in expected} == pytest.approx(expected)
    assert results["metrics"]["num_images"] == len(SIZES)
    assert results["protocol"]["background"] == 0.4
    assert results["protocol"]["scores"] == "sigmoid of mask logits"
    assert results["protocol"]["cleaning"] == 0
    assert set(results["provenance"]) == {
        "model",
        "head_sha256",
        "encoders",
        "encoder_fingerprints",
        "notes",
        "samples",
    }
    table = list(csv.DictReader((out / "classes.csv").read_text().splitlines()))
    assert [row["name"] for row in table][:2] == ["background", "aeroplane"]
    for row, scores in zip(table, results["classes"], strict=True):
        assert row["iou"] == ("" if scores["iou"] is None else str(scores["iou"]))
    stores = list((out / "stores").iterdir())
    code, printed = shell.run(*command, "--background-level", 0.4)
    assert list((out / "stores").iterdir()) == stores
    assert f"mIoU {results['metrics']['miou']:.4f}" in printed
    assert "untrained" in printed
    lines = [line.split()[0] for line in printed.splitlines() if line.strip()]
    assert [name for name in lines if name in [row["name"] for row in table]] == [row["name"] for row in table]


def test_among_the_stores_of_a_folder_the_benchmark_s_own_is_taken(linear: Path, tmp_path: Path, shell: Shell) -> None:
    paths = {}
    for name in ("voc20", "voc21", "cityscapes"):
        make_benchmark_folder(tmp_path / name, name)
        paths[name] = prepare(PrepareConfig(name, tmp_path / name, tmp_path / "stores")).path
    _, from_folder = shell.json("openvocab", linear, "voc20", "--data", tmp_path / "stores", *SMALL)
    _, from_store = shell.json("openvocab", linear, "voc20", "--data", paths["voc20"], *SMALL)
    assert from_folder["metrics"] == from_store["metrics"]
    assert from_folder["protocol"]["background"] is None
    assert Path(from_folder["out"]) == linear / "open-vocabulary" / "voc20"
    assert not (linear / "open-vocabulary/voc20/stores").exists()
    message = shell.mistake("openvocab", linear, "ade20k", "--data", tmp_path / "stores")
    assert "holds no samples store of ade20k; make one with `headstart prepare ade20k`" in message
    message = shell.mistake("openvocab", linear, "voc21", "--data", paths["voc20"])
    assert "holds voc20, not voc21" in message
    make_benchmark_folder(tmp_path / "other", "voc20", seed=1)
    prepare(PrepareConfig("voc20", tmp_path / "other", tmp_path / "stores"))
    message = shell.mistake("openvocab", linear, "voc20", "--data", tmp_path / "stores")
    assert "holds 2 samples stores of voc20" in message


def test_images_that_were_moved_are_found_where_one_says(linear: Path, tmp_path: Path, shell: Shell) -> None:
    make_benchmark_folder(tmp_path / "data", "ade20k")
    store = prepare(PrepareConfig("ade20k", tmp_path / "data", tmp_path / "stores")).path
    command = ("openvocab", linear, "ade20k", "--data", store, "--out", tmp_path / "out", *SMALL)
    _, before = shell.json(*command)
    (tmp_path / "data/ADEChallengeData2016/images").rename(tmp_path / "elsewhere")
    assert "elsewhere" not in shell.mistake(*command)
    _, after = shell.json(*command, "--image-dir", tmp_path / "elsewhere")
    assert after["metrics"] == before["metrics"]


def test_a_file_of_weights_scores_as_the_run_it_is_of(
    talk2dino: Path, weights: Path, tiny_encoders: TinyEncoders, tmp_path: Path, shell: Shell
) -> None:
    make_benchmark_folder(tmp_path / "data", "voc21")
    common = ("voc21", "--data", tmp_path / "data", "--out", tmp_path / "out", *SMALL, "--background-level", 0.52)
    _, of_run = shell.json("openvocab", talk2dino, *common)
    encoders = ("--image-encoder", tiny_encoders.image, "--text-encoder", tiny_encoders.text, "--input-size", 64, 96)
    _, of_weights = shell.json("openvocab", weights, *common, *encoders)
    assert of_weights["protocol"] == of_run["protocol"]
    assert of_run["protocol"]["cleaning"] == 0.2
    assert of_run["protocol"]["scores"] == "sigmoid of cosines"
    # The run rounds features to float16, as its cache did.
    assert of_weights["metrics"]["aacc"] == pytest.approx(of_run["metrics"]["aacc"], abs=0.02)
    assert of_weights["provenance"]["encoder_fingerprints"] == of_run["provenance"]["encoder_fingerprints"]


def test_windows_may_come_out_of_a_cache_of_the_run_s_encoder(
    talk2dino: Path, image_encoder: ImageEncoder, tiny_encoders: TinyEncoders, tmp_path: Path, shell: Shell
) -> None:
    from extract.encoders.image import load_image_encoder
    from extract.encoders.specs import ImageEncoderSpec
    from extract.image_job import ImageJobConfig, extract_images

    make_benchmark_folder(tmp_path / "data", "ade20k")
    store = prepare(PrepareConfig("ade20k", tmp_path / "data", tmp_path / "stores")).path
    assert isinstance(store, Path)
    views = ("whole", "windows-1-0.5")
    cached = extract_images(ImageJobConfig(store, tmp_path / "stores", views=views), image_encoder)
    other = load_image_encoder(ImageEncoderSpec(str(tiny_encoders.image), input_size=(32, 32)))
    of_other = extract_images(ImageJobConfig(store, tmp_path / "stores", views=views), other)
    common = ("openvocab", talk2dino, "ade20k", "--data", store, "--out", tmp_path / "out", *SMALL)
    _, live = shell.json(*common)
    (tmp_path / "data/ADEChallengeData2016/images").rename(tmp_path / "images are not looked at")
    _, results = shell.json(*common, "--images", cached.path)
    assert results["provenance"]["image_features"] == open_store(cached.path).header.fingerprint
    assert (live["protocol"]["windows_of"], results["protocol"]["windows_of"]) == ("resized image", "original image")
    assert results["metrics"]["num_pixels"] == live["metrics"]["num_pixels"]
    assert results["metrics"]["aacc"] == pytest.approx(live["metrics"]["aacc"], abs=0.1)
    assert "extract with that encoder, at that input size" in shell.mistake(*common, "--images", of_other.path)


def test_talk2dino_has_the_published_background_where_nobody_names_another(
    talk2dino: Path, photo: Path, shell: Shell
) -> None:
    command = ("segment", talk2dino, "--image", photo, "--classes", "cat", "--out", photo.with_name("map.png"), *SMALL)
    _, without = shell.json(*command)
    assert (without["protocol"]["background"], without["protocol"]["cleaning"]) == (None, 0)
    assert [found["name"] for found in without["classes"]] == ["cat"]
    _, with_background = shell.json(*command, "--background", "--pamr")
    protocol = with_background["protocol"]
    assert (protocol["background"], protocol["cleaning"], protocol["pamr"]["iterations"]) == (0.55, 0.2, 10)
    assert [found["name"] for found in with_background["classes"]] == ["background", "cat"]


def test_live_features_are_rounded_as_the_run_s_cache_rounded_them_and_cached_ones_are_left(
    linear: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evaluate.open_vocabulary.classes import parse_classes
    from headstart import open_vocabulary
    from headstart.open_heads import Choices, open_head

    asked: list[str] = []
    make_scorer = open_vocabulary.make_scorer

    def listen(*arguments: Any, image_dtype: str, **named: Any) -> Any:
        asked.append(image_dtype)
        return make_scorer(*arguments, image_dtype=image_dtype, **named)

    monkeypatch.setattr(open_vocabulary, "make_scorer", listen)
    opened, classes = open_head(linear, Choices()), parse_classes("cat,dog")
    for cached in (False, True):
        open_vocabulary.open_segmenter(opened, classes, Choices(), background=False, cached=cached)
    assert asked == ["float16", "float32"]


def test_a_picture_gets_a_map_in_colours_with_its_legend(
    linear: Path, photo: Path, tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, out = read_labels(monkeypatch), tmp_path / "maps" / "map.png"
    command = ("segment", linear, "--image", photo, "--classes", "pikachu,traffic_sign,forest,road", "--out", out)
    code, result = shell.json(*command, *SMALL)
    assert code == cli.DONE
    assert [found["name"] for found in result["classes"]] == ["pikachu", "traffic sign", "forest", "road"]
    assert sum(found["share"] for found in result["classes"]) == pytest.approx(1)
    assert result["size"] == [40, 64]
    picture = np.asarray(Image.open(out))
    for row, column, below in ((20, 5, (255, 0, 0)), (20, 60, (0, 0, 255))):
        above = class_colour(int(labels[0][row, column]))
        expected = [round(under * (1 - OPACITY) + over * OPACITY) for under, over in zip(below, above, strict=True)]
        assert picture[row, column].tolist() == expected
    assert picture.shape[0] > 40
    code, printed = shell.run(*command, *SMALL)
    assert "traffic sign: " in printed
    assert f"map: {out}" in printed


def test_names_are_prompted_with_blanks(
    linear: Path, photo: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    from extract.encoders.text import HubTextEncoder

    asked: list[str] = []
    tokenize = HubTextEncoder.tokenize

    def listen(self: HubTextEncoder, prompts: list[str]) -> list[list[int]]:
        asked.extend(prompts)
        return tokenize(self, prompts)

    monkeypatch.setattr(HubTextEncoder, "tokenize", listen)
    shell.json("segment", linear, "--image", photo, "--classes", "a_b,c", "--out", photo.with_name("map.png"), *SMALL)
    assert asked == ["a photo of a a b.", "a photo of a c."]


def test_mistakes_are_named_with_their_remedy(
    linear: Path, talk2dino: Path, weights: Path, photo: Path, tiny_encoders: TinyEncoders, tmp_path: Path, shell: Shell
) -> None:
    out = tmp_path / "map.png"

    def segment(model: Path, *arguments: object, classes: str = "cat", image: Path = photo) -> str:
        message = shell.mistake("segment", model, "--image", image, "--classes", classes, "--out", out, *arguments)
        assert not out.exists()
        return message

    assert "a run knows its encoders: leave out --image-encoder" in segment(linear, "--image-encoder", "dinov2-base")
    assert "name --image-encoder and --text-encoder" in segment(weights)
    assert "only Talk2DINO's projection cleans the background" in segment(linear, "--cleaning", 0.2)
    assert "leave out --background-level" in segment(linear, "--background-level", 0.5)
    assert "scores lie between 0 and 1" in segment(linear, "--background", "--background-level", 1.5)
    assert "name 0 (none) or more" in segment(talk2dino, "--cleaning", -1)
    assert "cat stands there twice" in segment(linear, classes="cat,cat")
    assert "is not a run folder" in segment(tmp_path / "nothing")
    assert "cannot be used" in segment(linear, image=tmp_path / "nothing.jpg")
    assert "leave gaps" in segment(linear, "--window", 32, "--stride", 64)
    assert "at least 1" in segment(linear, "--batch-size", 0)
    other = ("--image-encoder", tiny_encoders.image, "--text-encoder", tiny_encoders.text, "--input-size", 64, 90)
    assert "90" in segment(weights, *other)
    (tmp_path / "no.pth").write_bytes(b"no weights")
    assert "no.pth" in segment(tmp_path / "no.pth", *other[:4])
    message = shell.mistake("openvocab", linear, "voc", "--data", tmp_path)
    assert "unknown benchmark 'voc'" in message
    (tmp_path / "empty").mkdir()
    message = shell.mistake("openvocab", linear, "voc21", "--data", tmp_path / "empty", "--out", tmp_path / "out")
    assert "JPEGImages" in message


def test_background_cleaning_needs_an_encoder_that_shows_its_attention(
    weights: Path, tiny_encoders: TinyEncoders, photo: Path, shell: Shell, tmp_path: Path
) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    sizes = {"hidden_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    CLIPVisionModel(CLIPVisionConfig(**sizes, patch_size=16, image_size=32)).save_pretrained(tmp_path / "clip")
    CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(tmp_path / "clip")
    command = ("segment", weights, "--image", photo, "--classes", "cat", "--out", tmp_path / "map.png", *SMALL)
    command += ("--image-encoder", tmp_path / "clip", "--text-encoder", tiny_encoders.text, "--input-size", 32, 32)
    assert "do without background cleaning by --cleaning 0" in shell.mistake(*command, "--background")
    assert shell.json(*command, "--background", "--cleaning", 0)[1]["protocol"]["background"] == 0.55


def test_weights_of_other_widths_are_refused(
    tiny_encoders: TinyEncoders, photo: Path, shell: Shell, tmp_path: Path
) -> None:
    from heads.talk2dino import Talk2DinoHead, write_talk2dino

    write_talk2dino(Talk2DinoHead(image_width=8, pooled_width=96, layer="last"), tmp_path / "narrow.pth")
    command = ("segment", tmp_path / "narrow.pth", "--image", photo, "--classes", "cat", "--out", tmp_path / "map.png")
    command += ("--image-encoder", tiny_encoders.image, "--text-encoder", tiny_encoders.text, "--input-size", 32, 32)
    message = shell.mistake(*command)
    assert "projects prompts of width 96 to image tokens of width 8" in message
    assert "Name the encoders it was trained with" in message


def test_the_names_in_the_help_are_the_benchmarks() -> None:
    assert set(BENCHMARK_NAMES) == set(LAYOUTS)


def test_asking_for_help_imports_nothing_heavy() -> None:
    code = "import sys, headstart.segment_commands; print({'torch', 'transformers', 'zarr'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
