"""Heads that are served: what they share, what they remember, and how their answers are written."""

from __future__ import annotations

import base64
import io
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

import headstart
from cache_schema.errors import UsageError
from evaluate.predictor import Prediction, Predictor
from headstart.serve_limits import Limits, parse_prompts
from headstart.served_answer import render_answer
from headstart.served_heads import (
    NUM_ENCODED,
    Asked,
    RememberingEncoder,
    UnusablePictureError,
    load_served_heads,
)

if TYPE_CHECKING:
    from cache_schema.features import FeatureCache
    from heads.runs import Training

HOSTILE = '<img src=x onerror="window.harmed = true">${window.harmed = true}{{ window.harmed = true }}</figure>'


@pytest.fixture(scope="module")
def runs(workspace: Path, feature_cache: FeatureCache, run: Training) -> list[Path]:
    """Three heads on the same encoders: without attention, with it, and with an expected IoU besides."""
    small = {"epochs": 1, "target_size": [16, 24], "dim": 32}
    reading = headstart.train(
        "cross_attention", feature_cache, workspace / "runs", settings={**small, "inner_dim": 32, "hidden_dim": 32}
    )
    judging = headstart.train(
        "pseg-tokens", feature_cache, workspace / "runs", settings={**small, "no_target": True, "initial": None}
    )
    return [run.run_dir, reading.run_dir, judging.run_dir]


@pytest.fixture(scope="module")
def scene(runs: list[Path], scenes_root: Path) -> tuple[Path, list[str]]:
    """A picture and two prompts of which the first head marks a part, neither next to nothing nor nearly all."""
    predictor = headstart.load(runs[0])
    prompts = ["the red circle", "all squares", "the large striped shape", "the blue triangle on the left"]
    for path in sorted((scenes_root / "images").iterdir()):
        found = [one.prompt for one in predictor.set_image(path).predict(prompts) if 0.05 < one.mask.mean() < 0.9]
        if len(found) >= 2:
            return path, found[:2]
    raise AssertionError("the head marks nothing, or everything, in every scene")


def test_heads_on_equal_encoders_share_them_and_a_picture_is_encoded_once(
    runs: list[Path], scene: tuple[Path, list[str]]
) -> None:
    path, prompts = scene
    heads = load_served_heads(runs)
    assert heads.names == [run_dir.name for run_dir in runs]
    assert [heads.has_attention(name) for name in heads.names] == [False, True, True]
    (encoder,) = heads.encoders
    for name, run_dir in zip(heads.names, runs, strict=True):
        expected = headstart.load(run_dir).set_image(path).predict(prompts)
        for wanted in (prompts, prompts[1:]):
            for one in heads.ask(name, path, wanted).predictions:
                (same,) = (other for other in expected if other.prompt == one.prompt)
                np.testing.assert_allclose(one.logits, same.logits, atol=1e-4)
        assert encoder.num_encoded == 1


def test_an_encoder_remembers_the_last_pictures_only(image_encoder: Any) -> None:
    encoder = RememberingEncoder(image_encoder)
    pictures = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (NUM_ENCODED + 1, 64, 96, 3), np.uint8))
    for number, picture in enumerate(pictures, start=1):
        for _ in range(2):
            found = encoder.encode(picture[None])
            for layer, grid in image_encoder.encode(picture[None]).features.items():
                torch.testing.assert_close(found.features[layer], grid)
        assert encoder.num_encoded == number
    encoder.encode(pictures[1:2])
    assert encoder.num_encoded == NUM_ENCODED + 1
    encoder.encode(pictures[:1])
    assert encoder.num_encoded == NUM_ENCODED + 2, "the oldest is forgotten"


def test_large_pictures_are_answered_a_few_prompts_at_a_time(
    runs: list[Path], scene: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, prompts = scene
    heads = load_served_heads(runs[:1])
    whole = list(heads.ask(runs[0].name, path, prompts * 2).predictions)
    pixels = whole[0].mask.size
    asked: list[int] = []
    original = Predictor.predict

    def watch(self: Predictor, some: Any) -> Any:
        asked.append(len(some))
        return original(self, some)

    monkeypatch.setattr(Predictor, "predict", watch)
    monkeypatch.setattr("headstart.served_heads._MAX_MASKS_PIXELS", 3 * pixels)
    few = list(heads.ask(runs[0].name, path, prompts * 2).predictions)
    assert asked == [3, 1]
    for one, other in zip(few, whole, strict=True):
        assert one.prompt == other.prompt
        np.testing.assert_allclose(one.logits, other.logits, atol=1e-4)


def test_a_picture_that_cannot_be_used_is_named_without_its_folder(runs: list[Path], tmp_path: Path) -> None:
    heads = load_served_heads(runs[:1])
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UnusablePictureError, match=r"^text\.png cannot be used: not an image file") as bad:
        heads.ask(runs[0].name, tmp_path / "text.png", ["a dog"])
    with pytest.raises(UnusablePictureError, match=r"^gone\.png is no longer there: drop it again\.$"):
        heads.ask(runs[0].name, tmp_path / "gone.png", ["a dog"])
    assert str(tmp_path) not in str(bad.value)
    with pytest.raises(UsageError, match="no head is named 'other'"):
        heads.ask("other", tmp_path / "text.png", ["a dog"])


def test_runs_of_one_name_are_told_apart_by_their_folders(run: Training, workspace: Path) -> None:
    for place in ("here", "there"):
        shutil.copytree(run.run_dir, workspace / place / run.run_dir.name)
    places = [workspace / place / run.run_dir.name for place in ("here", "there")]
    assert load_served_heads(places).names == [f"{place}/{run.run_dir.name}" for place in ("here", "there")]
    with pytest.raises(UsageError, match="is named twice"):
        load_served_heads([places[0], places[0]])
    with pytest.raises(UsageError, match="there is no run to serve"):
        load_served_heads([])


# Answers


def prediction(prompt: str, **said: Any) -> Prediction:
    mask = np.zeros((40, 60), bool)
    mask[10:30, 20:40] = said.pop("marked", True)
    return Prediction(prompt, mask, np.where(mask[::4, ::4], 3.0, -3.0).astype(np.float32), **said)


def test_each_kind_of_score_is_called_by_its_name_and_no_target_is_said() -> None:
    image = np.full((40, 60, 3), 128, np.uint8)
    said = [
        prediction("a dog", predicted_iou=0.831, no_target=False),
        prediction("a cat", predicted_iou=0.2, no_target=True, marked=False),
        prediction("a cow"),
    ]
    page = render_answer("h", Asked(image, iter(said)), has_attention=False)
    first, second, third = re.findall(r'<figure class="hs-result">.*?</figure>', page, re.DOTALL)
    assert re.search(r"expected IoU <b>0\.83</b>", first)
    assert "no target" not in first
    assert "16.7% marked" in first
    assert re.search(r"no target</strong>.*expected IoU <b>0\.20</b>", second, re.DOTALL)
    assert "nothing marked" in second
    assert re.search(rf"mean probability <b>{said[2].score:.2f}</b>", third)


def test_names_and_prompts_are_escaped() -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    attention = np.ones((1, 2, 3), np.float32)
    said = prediction(HOSTILE, words=[HOSTILE], attention=attention)
    page = render_answer(HOSTILE, Asked(image, iter([said])), has_attention=True)
    assert "<img src=x" not in page
    assert page.count("&lt;img src=x") == 5  # head, prompt, word, and what is said of their pictures


def test_a_large_picture_is_shown_smaller() -> None:
    image = np.zeros((600, 3000, 3), np.uint8)
    said = Prediction("a dog", np.ones((600, 3000), bool), np.ones((6, 30), np.float32))
    page = render_answer("h", Asked(image, iter([said])), has_attention=False)
    (encoded,) = re.findall(r"base64,([^\"]+)", page)
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == (1024, 205)
    assert "3000 x 600 pixels" in page


def test_prompts_are_the_lines_that_are_not_blank() -> None:
    assert parse_prompts(" a dog \n\n\tthe cat\r\n", Limits()) == ["a dog", "the cat"]
    assert parse_prompts(None, Limits()) == []
    assert len(parse_prompts("a\n" * 16, Limits())) == 16
    with pytest.raises(UsageError, match="17 prompts are too many"):
        parse_prompts("a\n" * 17, Limits())
