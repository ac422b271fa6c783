"""The predictor: from pixels to the same masks as from the cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import headstart
from cache_schema.errors import UsageError
from cache_schema.features import FeatureCache
from evaluate.evaluation import predict_masks
from evaluate.predictor import Predictor
from heads.checkpoint import load_head
from heads.data import CachedSplit, Draw, feature_shapes
from heads.inputs import Head, HeadInputs, HeadOutputs
from heads.linear import build_linear
from heads.runs import Training
from tests.extract.toys import ToyImageEncoder, ToyTextEncoder

if TYPE_CHECKING:
    from extract.encoders.protocols import ImageEncoder, TextEncoder


@pytest.fixture(scope="module")
def predictor(run: Training) -> Predictor:
    return headstart.load(run, device="cpu")


@dataclass(frozen=True)
class Trained:
    """A head that was trained for a moment, and the cache it was trained on."""

    run: Training
    cache: FeatureCache


@pytest.fixture(params=["feature_cache", "int8_cache", "views_cache"])
def trained(request: pytest.FixtureRequest, workspace: Path) -> Trained:
    cache: FeatureCache = request.getfixturevalue(request.param)
    settings = {"epochs": 2, "target_size": [16, 24]}
    return Trained(headstart.train("linear", cache, workspace / "runs", settings=settings), cache)


def test_a_prediction_from_pixels_is_the_prediction_from_the_cache(trained: Trained) -> None:
    cache, predictor = trained.cache, headstart.load(trained.run, device="cpu")
    samples = cache.samples.samples
    _, head = load_head(trained.run.run_dir / "best")
    data = CachedSplit(cache, "val", (1, 1))
    from_cache = {row: predicted.mask for row, predicted in predict_masks(head, cache, data, data.in_order(8))}
    differing = total = 0
    for row, mask in from_cache.items():
        path = cache.samples.image_dir / samples.images.paths[samples.image_rows[row]]
        prediction = predictor.set_image(path).predict(samples.prompts[samples.prompt_rows[row]])[0]
        assert prediction.mask.shape == samples.size_of(row)
        differing += int((prediction.mask != mask).sum())
        total += mask.size
    # The encoders ran in other batches: float16 features may differ in their last bit.
    assert differing <= 1e-3 * total


def test_an_image_is_seen_as_an_int8_cache_keeps_it(
    int8_cache: FeatureCache,
    image_encoder: ImageEncoder,
    text_encoder: TextEncoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, samples = int8_cache, int8_cache.samples.samples
    seen: list[HeadInputs] = []
    head = build_linear(feature_shapes(cache))
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda inputs: (seen.append(inputs), forward(inputs))[1])
    predictor = Predictor(head, image_encoder, text_encoder, image_dtype="int8")
    data = CachedSplit(cache, "val", None)
    for sample in data.samples[::5]:
        image = samples.image_rows[sample]
        predictor.set_image(cache.samples.image_dir / samples.images.paths[image])
        predictor.predict(samples.prompts[samples.prompt_rows[sample]])
        kept = data.load(Draw.whole(np.array([sample]))).inputs.to("cpu")
        for layer in cache.images.layers:  # this cache was encoded image by image, as a predictor does it
            assert torch.equal(seen[-1].features[layer], kept.features[layer])
            assert torch.equal(seen[-1].cls[layer], kept.cls[layer])


def test_many_prompts_on_one_image_equal_each_prompt_alone(predictor: Predictor) -> None:
    image = np.random.default_rng(0).integers(0, 256, (70, 110, 3), np.uint8)
    prompts = ["the red circle", "all large green shapes", "circle"]
    together = predictor.set_image(image).predict(prompts)
    for prompt, prediction in zip(prompts, together, strict=True):
        alone = predictor.predict(prompt)[0]
        assert prediction.prompt == prompt
        assert prediction.mask.shape == (70, 110)
        np.testing.assert_allclose(prediction.probability, alone.probability, atol=1e-4)
        np.testing.assert_array_equal(prediction.mask, prediction.probability > 0.5)


class ListeningHead(Head):
    """Keeps what it was given."""

    layers = ("fine",)

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(()))
        self.heard: HeadInputs | None = None

    def forward(self, inputs: HeadInputs) -> HeadOutputs:
        self.heard = inputs
        return HeadOutputs(inputs.features["fine"][inputs.image_index, ..., 0] + self.bias)


@pytest.mark.parametrize("image_dtype", ["float16", "float32", "int8"])
def test_a_head_is_given_zeros_for_padding_whatever_the_encoder_says_of_it(image_dtype: str) -> None:
    head = ListeningHead()
    predictor = Predictor(head, ToyImageEncoder(), ToyTextEncoder(), image_dtype=image_dtype)
    predictor.set_image(np.zeros((5, 9, 3), np.uint8)).predict(["circle", "a red circle"])
    assert head.heard is not None
    tokens, mask = head.heard.prompt_tokens, head.heard.prompt_mask
    assert mask.sum(1).tolist() == [3, 5]
    assert not tokens[~mask].any()
    assert tokens[mask][:, 0].all()


def test_words_the_encoder_never_met_are_taken_all_the_same(predictor: Predictor) -> None:
    image = np.zeros((40, 40, 3), np.uint8)
    assert predictor.set_image(image).predict("an ultramarine zeppelin, né 1900 🎈")[0].mask.shape == (40, 40)


def test_a_prompt_before_an_image_is_told_what_to_do(run: Training) -> None:
    with pytest.raises(UsageError, match="call set_image"):
        headstart.load(run, device="cpu").predict("a")


@pytest.mark.parametrize("prompts", [[], [""], ["circle", "  "]])
def test_an_empty_prompt_is_refused(predictor: Predictor, prompts: list[str]) -> None:
    predictor.set_image(np.zeros((40, 40, 3), np.uint8))
    with pytest.raises(UsageError, match="no prompt"):
        predictor.predict(prompts)


def test_a_file_that_is_no_image_is_named(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UsageError, match=r"notes.txt cannot be used: not an image file"):
        predictor.set_image(tmp_path / "notes.txt")
