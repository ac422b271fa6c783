"""The predictor: from pixels to the same masks as from the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import headstart
from cache_schema.errors import UsageError
from cache_schema.features import FeatureCache
from evaluate.evaluation import predict_masks
from evaluate.predictor import Predictor
from heads.checkpoint import load_head
from heads.data import CachedSplit
from heads.train import Training


@pytest.fixture(scope="module")
def predictor(run: Training) -> Predictor:
    return headstart.load(run, device="cpu")


def test_a_prediction_from_pixels_is_the_prediction_from_the_cache(
    predictor: Predictor, run: Training, feature_cache: FeatureCache
) -> None:
    samples = feature_cache.samples.samples
    _, head = load_head(run.run_dir / "best")
    data = CachedSplit(feature_cache, "val", (1, 1))
    from_cache = dict(predict_masks(head, feature_cache, data, data.in_order(8)))
    differing = total = 0
    for row, mask in from_cache.items():
        path = feature_cache.samples.image_dir / samples.images.paths[samples.image_rows[row]]
        prediction = predictor.set_image(path).predict(samples.prompts[samples.prompt_rows[row]])[0]
        assert prediction.mask.shape == samples.size_of(row)
        differing += int((prediction.mask != mask).sum())
        total += mask.size
    # The encoders ran in other batches: float16 features may differ in their last bit.
    assert differing <= 1e-3 * total


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
