"""What a head says of a view comes back to its place in the image, whatever the encoder cut off or added."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from cache_schema.errors import UsageError
from cache_schema.features import FeatureCache, open_cache
from cache_schema.masks import Size, encode_mask
from cache_schema.samples import ImageTable, Samples, write_samples
from cache_schema.views import ASPECTS, Aspect, View, average_views
from evaluate.evaluation import predict_masks
from evaluate.predictor import Predictor, probabilities_in_image
from evaluate.protocols import Protocol
from extract.image_job import ImageJobConfig, extract_images
from extract.prompt_job import PromptJobConfig, extract_prompts
from heads.data import CachedSplit, Draw
from heads.inputs import Head, HeadInputs, HeadOutputs
from heads.losses import resize_logits
from tests.extract.toys import ToyImageEncoder, ToyTextEncoder

INPUT_SIZE = (96, 72)
VIEWS = ("whole", "flip", "scale-0.8", "scale-1.2+flip", "windows-1-0.5")
PROMPT = "the red one"


@dataclass
class SharpEncoder(ToyImageEncoder):
    """Average colours on a fine grid of an upright input, which no image here has the shape of."""

    shape: Size = INPUT_SIZE

    @property
    def grids(self) -> Mapping[str, tuple[int, int, int]]:
        return {"fine": (self.shape[0] // 2, self.shape[1] // 2, 3)}

    @property
    def cls_widths(self) -> Mapping[str, int]:
        return {"fine": 3}

    def preprocess(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.array(Image.fromarray(image).resize(self.shape[::-1]))


class RedHead(Head):
    """Marks what is red."""

    layers = ("fine",)

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(40.0))

    def forward(self, inputs: HeadInputs) -> HeadOutputs:
        tokens = inputs.features["fine"].index_select(0, inputs.image_index)
        return HeadOutputs(self.slope * (tokens[..., 0] - tokens[..., 1] - 0.5))


@dataclass(frozen=True)
class Drawn:
    """A red box, XYXY, on a grey image with a green stripe at its top."""

    size: Size
    box: tuple[int, int, int, int]

    @property
    def truth(self) -> NDArray[np.bool_]:
        left, top, right, bottom = self.box
        mask = np.zeros(self.size, np.bool_)
        mask[top:bottom, left:right] = True
        return mask

    @property
    def image(self) -> NDArray[np.uint8]:
        image = np.full((*self.size, 3), 128, np.uint8)
        image[: self.size[0] // 8] = (0, 200, 0)
        image[self.truth] = (255, 0, 0)
        return image


DRAWN = (
    Drawn((120, 300), (125, 20, 170, 90)),
    Drawn((300, 120), (45, 140, 100, 185)),
    Drawn((130, 130), (30, 30, 80, 110)),
)
"""Wide, tall and square, with a red box that every view of it shows whole."""


def write_task(folder: Path) -> Path:
    files = []
    for drawn in DRAWN:
        buffer = io.BytesIO()
        Image.fromarray(drawn.image).save(buffer, "PNG")
        files.append(buffer.getvalue())
    for number, data in enumerate(files):
        (folder / f"{number}.png").write_bytes(data)
    num = len(files)
    samples = Samples(
        images=ImageTable(
            ids=[str(number) for number in range(num)],
            paths=[f"{number}.png" for number in range(num)],
            sizes=np.array([drawn.size for drawn in DRAWN], np.int32),
            sha256=[hashlib.sha256(data).hexdigest() for data in files],
        ),
        prompts=[PROMPT],
        ids=[str(number) for number in range(num)],
        image_rows=np.arange(num, dtype=np.int32),
        prompt_rows=np.zeros(num, np.int32),
        targets=[encode_mask(drawn.truth) for drawn in DRAWN],
        no_target=np.zeros(num, np.bool_),
        splits=["val"] * num,
        tags={},
    )
    return write_samples(folder, samples, dataset="drawn", sources={}, image_dir=folder, libraries={})[0]


@pytest.fixture(scope="module", params=ASPECTS)
def aspect(request: pytest.FixtureRequest) -> Aspect:
    value: Aspect = request.param
    return value


@pytest.fixture(scope="module")
def encoder(aspect: Aspect) -> SharpEncoder:
    shape = (96, 96) if aspect == "crop" else INPUT_SIZE  # windows that are cut to another shape leave gaps
    return SharpEncoder(identity={"class": "sharp", "aspect": aspect}, aspect=aspect, shape=shape)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, encoder: SharpEncoder) -> FeatureCache:
    folder = tmp_path_factory.mktemp("drawn")
    samples = write_task(folder)
    images = extract_images(ImageJobConfig(samples, folder, views=VIEWS, shard_rows=3), encoder)
    prompts = extract_prompts(PromptJobConfig(samples, folder), ToyTextEncoder())
    return open_cache(samples, images.path, prompts.path)


def iou(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    return float((first & second).sum() / (first | second).sum())


def masks_of(cache: FeatureCache, view: int) -> dict[int, NDArray[np.bool_]]:
    data = CachedSplit(cache, "val", None, all_views=True)
    draws = [Draw(data.samples[:2], np.full(2, view)), Draw(data.samples[2:], np.full(1, view))]
    return {row: predicted.mask for row, predicted in predict_masks(RedHead(), cache, data, draws)}


# From a cache, and from pixels


@pytest.mark.parametrize("view", range(4))
def test_a_red_box_is_found_at_its_place_in_the_image_in_every_view(cache: FeatureCache, view: int) -> None:
    assert len(cache.images.fixed_specs) == 4
    masks = masks_of(cache, view)
    assert sorted(masks) == [0, 1, 2]
    for row, drawn in enumerate(DRAWN):
        assert masks[row].shape == drawn.size
        assert iou(masks[row], drawn.truth) > 0.85
        shown = cache.images.views[int(cache.image_rows[row]) + view]
        assert not masks[row][~shown.place(np.ones(shown.size, np.bool_), drawn.size, False)].any()


def test_the_truth_comes_back_exactly(cache: FeatureCache) -> None:
    for image, drawn in enumerate(DRAWN):
        for row in cache.images.rows_of_image(image)[:4]:
            view = cache.images.views[row]
            np.testing.assert_array_equal(
                view.place(view.apply_to_mask(drawn.truth), drawn.size, False), drawn.truth, f"view {view}"
            )


def test_a_red_box_is_found_at_its_place_from_pixels(cache: FeatureCache, encoder: SharpEncoder) -> None:
    predictor = Predictor(RedHead(), encoder, ToyTextEncoder())
    from_cache = masks_of(cache, 0)
    for row, drawn in enumerate(DRAWN):
        (prediction,) = predictor.set_image(drawn.image).predict(PROMPT)
        np.testing.assert_array_equal(prediction.mask, from_cache[row])
        assert prediction.probability.shape == drawn.size


def test_what_an_encoder_does_not_look_at_is_never_marked() -> None:
    image = np.zeros((100, 400, 3), np.uint8)
    image[..., 0] = 255
    seen = {}
    for aspect in ASPECTS:
        predictor = Predictor(
            RedHead(), SharpEncoder(aspect=aspect), ToyTextEncoder(), protocol=Protocol(threshold=0.0)
        )
        (prediction,) = predictor.set_image(image).predict(PROMPT)
        seen[aspect] = prediction.mask
        assert set(prediction.probability[~prediction.mask].tolist()) <= {0.0}
    assert seen["squash"].all()
    assert seen["letterbox"].all()
    assert np.flatnonzero(seen["crop"].all(0)).tolist() == [*range(162, 237)]
    assert not seen["crop"][:, [*range(162), *range(237, 400)]].any()


def test_an_image_that_is_too_long_and_thin_to_be_shown_in_its_shape_is_refused() -> None:
    line = np.zeros((1, 12_000, 3), np.uint8)
    predictor = Predictor(RedHead(), SharpEncoder(aspect="letterbox"), ToyTextEncoder())
    with pytest.raises(UsageError, match=r"an image of 1 x 12000 pixels .* is too long and thin for toy"):
        predictor.set_image(line)
    squashing = Predictor(RedHead(), SharpEncoder(), ToyTextEncoder())
    assert squashing.set_image(line).predict(PROMPT)[0].mask.shape == (1, 12_000)


# From several windows


def test_windows_are_put_together_to_the_image(cache: FeatureCache) -> None:
    head = RedHead()
    for image, drawn in enumerate(DRAWN):
        rows = list(cache.images.rows_of_image(image))[4:]
        assert len(rows) == (4 if drawn.size[0] != drawn.size[1] else 1)
        views = [cache.images.views[row] for row in rows]
        tokens = torch.from_numpy(cache.images.features("fine").read(rows)).float()
        logits = head.slope.detach() * (tokens[..., 0] - tokens[..., 1] - 0.5)
        values = (resize_logits(one[None], view.size)[0].numpy() for one, view in zip(logits, views, strict=True))
        assert iou(average_views(views, values, drawn.size) > 0, drawn.truth) > 0.85


# One view


def test_a_whole_image_is_resized_and_nothing_else() -> None:
    logits = torch.randn(3, 5, 7, generator=torch.manual_seed(0)) * 4
    whole = View((0, 0, 90, 60), False)
    expected = torch.nn.functional.interpolate(logits[:, None], size=(60, 90), mode="bilinear")[:, 0].sigmoid()
    np.testing.assert_array_equal(probabilities_in_image(logits, whole, (60, 90)), expected.numpy())
    mirrored = probabilities_in_image(logits.flip(2), replace(whole, flip=True), (60, 90))
    np.testing.assert_allclose(mirrored, expected.numpy(), atol=1e-5)


def test_half_precision_logits_are_resized_in_float32() -> None:
    logits = (torch.randn(2, 5, 7, generator=torch.manual_seed(0)) * 4).bfloat16()
    view = View((-3, 5, 20, 22), True)
    exact = probabilities_in_image(logits.float(), view, (30, 19))
    np.testing.assert_array_equal(probabilities_in_image(logits, view, (30, 19)), exact)
    assert exact.dtype == np.float32
    assert not exact[:, :5].any()
    assert not exact[:, 22:].any()
    assert (exact[:, 5:22] > 0).all()
