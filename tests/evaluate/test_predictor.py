"""The predictor: from pixels to the same masks as from the cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

import headstart
from cache_schema.errors import UsageError
from cache_schema.features import FeatureCache
from cache_schema.views import Aspect, View
from evaluate.evaluation import predict_masks
from evaluate.predictor import Predictor
from heads import build_head
from heads.checkpoint import load_head
from heads.data import CachedSplit, Draw, feature_shapes
from heads.inputs import Head, HeadInputs, HeadOutputs
from heads.linear import build_linear
from heads.runs import Training
from tests.extract.toys import ToyImageEncoder, ToyTextEncoder

if TYPE_CHECKING:
    from extract.encoders.protocols import ImageEncoder, TextEncoder


NOISE = [np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8) for size in ((70, 110), (64, 100), (30, 20))]


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


def test_logits_are_the_heads_own_and_lie_over_the_view(predictor: Predictor) -> None:
    prediction = predictor.set_image(NOISE[0]).predict("the red circle")[0]
    assert prediction.logits.shape == (4, 6)
    assert prediction.logits.dtype == np.float32
    assert prediction.view == View((0, 0, 110, 70), False)
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(prediction.logits)[None, None], (70, 110), mode="bilinear"
    )
    np.testing.assert_allclose(prediction.probability, resized[0, 0].sigmoid().numpy(), atol=1e-6)


@pytest.mark.parametrize("aspect", ["crop", "letterbox"])
def test_what_the_encoder_does_not_see_is_never_marked(aspect: Aspect) -> None:
    head = SayingHead(HeadOutputs(torch.full((1, 4, 6), 3.0)))
    predictor = Predictor(head, ToyImageEncoder(aspect=aspect), ToyTextEncoder())
    prediction = predictor.set_image(np.zeros((8, 40, 3), np.uint8)).predict("circle")[0]
    marked = np.zeros((8, 40), np.bool_)
    marked[:, slice(14, 26) if aspect == "crop" else slice(None)] = True
    np.testing.assert_array_equal(prediction.mask, marked)
    assert prediction.view is not None
    assert prediction.view.size == ((8, 12) if aspect == "crop" else (27, 40))
    assert prediction.score == pytest.approx(1 / (1 + np.exp(-3)))


# What else a head says


def test_the_score_is_the_iou_that_the_head_expects() -> None:
    said = HeadOutputs(torch.full((2, 4, 6), 3.0), iou=torch.tensor([0.25, 1.5]))
    predictions = (
        Predictor(SayingHead(said), ToyImageEncoder(), ToyTextEncoder()).set_image(NOISE[0]).predict(["a", "b"])
    )
    assert [one.predicted_iou for one in predictions] == [0.25, 1.5]
    assert [one.score for one in predictions] == [0.25, 1.5]
    assert [one.no_target for one in predictions] == [None, None]


def test_without_one_it_is_the_mean_probability_of_what_is_marked() -> None:
    logits = torch.full((2, 8, 12), -1.0)
    logits[0, :4] = 2
    predictor = Predictor(SayingHead(HeadOutputs(logits)), ToyImageEncoder(), ToyTextEncoder())
    marked, nothing = predictor.set_image(np.zeros((8, 12, 3), np.uint8)).predict(["a", "b"])
    assert marked.predicted_iou is None
    assert marked.mask[:4].all()
    assert not marked.mask[4:].any()
    assert marked.score == pytest.approx(1 / (1 + np.exp(-2)))
    assert not nothing.mask.any()
    assert nothing.score == 0.0


def test_the_no_target_decision_is_told_and_changes_no_mask() -> None:
    said = HeadOutputs(torch.full((2, 4, 6), 3.0), no_target_logits=torch.tensor([0.1, -0.1]))
    predictions = (
        Predictor(SayingHead(said), ToyImageEncoder(), ToyTextEncoder()).set_image(NOISE[0]).predict(["a", "b"])
    )
    assert [one.no_target for one in predictions] == [True, False]
    assert all(one.mask.all() for one in predictions)


def test_attention_of_a_words_tokens_is_added_up_and_that_of_start_and_end_is_dropped() -> None:
    attention = torch.rand((2, 5, 2, 3), generator=torch.Generator().manual_seed(0))
    attention[1, 4] = 0
    head = SayingHead(HeadOutputs(torch.zeros(2, 4, 6), word_attention=attention))
    predictor = Predictor(head, ToyImageEncoder(), ToyTextEncoder())
    three, two = predictor.set_image(NOISE[0]).predict(["a red circle", "red circle"])
    assert three.words == ("a", "red", "circle")
    np.testing.assert_array_equal(three.attention, attention[0, 1:4])
    np.testing.assert_array_equal(two.attention, attention[1, 1:3])
    assert two.words == ("red", "circle")


def test_a_head_that_reads_tokens_shows_attention_and_one_of_pooled_prompts_has_none(
    feature_cache: FeatureCache, image_encoder: ImageEncoder, text_encoder: TextEncoder
) -> None:
    shapes = feature_shapes(feature_cache)
    reading = build_head("cross_attention", shapes, {"layers": ["last"]})
    predictor = Predictor(reading, image_encoder, text_encoder)
    assert predictor.has_attention
    (prediction,) = predictor.set_image(NOISE[0]).predict("all zeppelins")
    assert prediction.words == ("all", "zeppelins")  # the latter of several tokens
    assert prediction.attention is not None
    assert prediction.attention.shape == (2, 4, 6)
    assert 0 < prediction.attention.sum(0).max() < 1  # the rest goes to start and end
    assert prediction.attention[1].sum() > prediction.attention[0].sum()
    for name, arguments in (("linear", {}), ("two_way", {"text": "pooled", "dim": 32})):
        predictor = Predictor(build_head(name, shapes, arguments), image_encoder, text_encoder)
        assert not predictor.has_attention
        assert predictor.set_image(NOISE[0]).predict("a")[0].attention is None


# Pairs


@pytest.fixture(scope="module")
def deep(feature_cache: FeatureCache, image_encoder: ImageEncoder, text_encoder: TextEncoder) -> Predictor:
    """A head that says all that can be said."""
    torch.manual_seed(0)
    arguments = {"text": "both", "no_target": True, "dim": 32, "mlp_dim": 48, "num_heads": 4}
    head = build_head("two_way", feature_shapes(feature_cache), arguments)
    return Predictor(head, image_encoder, text_encoder)


PAIRS = [(0, "the red circle"), (1, "circle"), (0, "all large green shapes"), (2, "circle"), (0, "the red circle")]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_pairs_say_what_each_says_alone_in_the_order_asked(deep: Predictor, batch_size: int) -> None:
    images, prompts = [NOISE[image] for image, _ in PAIRS], [prompt for _, prompt in PAIRS]
    together = list(deep.predict_pairs(images, prompts, batch_size=batch_size))
    assert [one.prompt for one in together] == prompts
    for image, found in zip(images, together, strict=True):
        (alone,) = deep.set_image(image).predict(found.prompt)
        assert found.mask.shape == image.shape[:2]
        assert found.view == alone.view
        assert found.words == alone.words
        assert found.no_target == alone.no_target
        np.testing.assert_allclose(found.probability, alone.probability, atol=1e-3)
        assert found.predicted_iou == pytest.approx(alone.predicted_iou, abs=1e-3)
        np.testing.assert_allclose(found.attention, alone.attention, atol=1e-4)


def test_each_image_and_prompt_of_pairs_is_encoded_once_in_batches(tmp_path: Path) -> None:
    paths = []
    for number, image in enumerate(NOISE):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
        paths.append(tmp_path / f"{number}.png")
    seen, read = ToyImageEncoder(), ToyTextEncoder()
    predictor = Predictor(SayingHead(None), seen, read)
    images = [paths[0], str(paths[0]), paths[1], NOISE[2], NOISE[2], paths[0]]
    predictions = list(predictor.predict_pairs(images, ["a", "b", "a", "a", "b", "c"], batch_size=2))
    assert seen.encoded == [2, 1]
    assert read.encoded == [2, 1]
    for image, prediction in zip([0, 0, 1, 2, 2, 0], predictions, strict=True):
        alone = Predictor(SayingHead(None), ToyImageEncoder(), ToyTextEncoder()).set_image(NOISE[image]).predict("a")[0]
        np.testing.assert_array_equal(prediction.logits, alone.logits)


def test_pairs_are_worked_out_as_they_are_asked_for() -> None:
    seen = ToyImageEncoder()
    predictions = Predictor(SayingHead(None), seen, ToyTextEncoder()).predict_pairs(NOISE, "abc", batch_size=1)
    assert not seen.encoded
    next(predictions)
    assert seen.encoded == [1]


def test_pairs_leave_the_image_that_was_set(deep: Predictor) -> None:
    before = deep.set_image(NOISE[0]).predict("circle")[0]
    list(deep.predict_pairs([NOISE[1]], ["circle"]))
    np.testing.assert_array_equal(deep.predict("circle")[0].logits, before.logits)


def test_a_prepared_image_is_taken_as_it_is(deep: Predictor) -> None:
    prepared = deep.prepare(NOISE[1])
    assert prepared.pixels.shape == (64, 96, 3)
    assert prepared.size == (64, 100)
    expected = deep.set_image(NOISE[1]).predict("circle")[0]
    (found,) = deep.predict_pairs([prepared], ["circle"])
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-4)


@pytest.mark.parametrize(
    ("num_images", "prompts", "batch_size", "sentence"),
    [
        (2, ["a"], 4, "2 images and 1 prompts make no pairs"),
        (1, [" "], 4, "no prompt, or an empty one"),
        (0, [], 4, "no prompt"),
        (1, ["a"], 0, "batch_size is 0"),
    ],
)
def test_what_makes_no_pairs_is_refused_before_any_is_asked_for(
    predictor: Predictor, num_images: int, prompts: list[str], batch_size: int, sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        predictor.predict_pairs(NOISE[:num_images], prompts, batch_size=batch_size)


class SayingHead(Head):
    """Says what it is told to, or else the red of each cell."""

    layers = ("fine",)
    shows_attention = False

    def __init__(self, said: HeadOutputs | None) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(()))
        self.said = said

    def forward(self, inputs: HeadInputs) -> HeadOutputs:
        return self.said or HeadOutputs(inputs.features["fine"][inputs.image_index, ..., 0] + self.bias)


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
