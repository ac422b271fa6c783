"""What a learning encoder is given for a row is what the job showed to the frozen one, or what it cached."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cache_schema.errors import StoreMismatchError, UsageError
from cache_schema.features import FeatureCache, ImageFeatures, open_cache
from cache_schema.store import open_store
from extract.encoders.image import load_image_encoder
from extract.encoders.live import LiveImageEncoder
from extract.encoders.lora import LoraSpec
from extract.encoders.specs import ImageEncoderSpec
from extract.image_job import ImageJobConfig, extract_images
from extract.images import decode_image
from extract.live_images import PixelSource, StateSource
from tests.conftest import LAYERS, VIEWS

if TYPE_CHECKING:
    from extract.encoders.tiny import TinyEncoders

ROWS = np.array([7, 0, 6, 50, 95, 4, 7])


@pytest.fixture(scope="module")
def spec(tiny_encoders: TinyEncoders) -> ImageEncoderSpec:
    """The encoder that the caches were made with."""
    return ImageEncoderSpec(str(tiny_encoders.image), layers=LAYERS, input_size=(64, 96))


def extract_states(
    samples: Path, spec: ImageEncoderSpec, out: Path, layers: tuple[str, ...] = ("1+tokens",), **settings: Any
) -> ImageFeatures:
    settings = {"dtype": "float32", "shard_rows": 10, "views": VIEWS, **settings}
    config = ImageJobConfig(samples, out, **settings)
    path = extract_images(config, load_image_encoder(replace(spec, layers=layers))).path
    return ImageFeatures(open_store(path, "image_features"))


@pytest.fixture(scope="module")
def states(samples_path: Path, spec: ImageEncoderSpec, tmp_path_factory: pytest.TempPathFactory) -> ImageFeatures:
    return extract_states(samples_path, spec, tmp_path_factory.mktemp("states"))


def assert_cached(encoder: LiveImageEncoder, given: torch.Tensor, cache: FeatureCache, rows: NDArray[np.int64]) -> None:
    """What is said of rows is what is cached of them, up to the float16 of the cache."""
    with torch.no_grad():
        encoding = encoder(given)
    for layer in encoder.grids:
        cached = torch.from_numpy(cache.images.features(layer).read(rows)).float()
        torch.testing.assert_close(encoding.features[layer], cached, rtol=2e-3, atol=2e-3)
        cls = torch.from_numpy(cache.images.cls(layer).read(rows)).float()
        torch.testing.assert_close(encoding.cls[layer], cls, rtol=2e-3, atol=2e-3)


# Pixels


def test_pixels_of_a_row_are_those_that_its_features_were_made_of(
    views_cache: FeatureCache, spec: ImageEncoderSpec
) -> None:
    encoder = LiveImageEncoder.load(spec, LoraSpec())
    pixels = PixelSource(views_cache, encoder).load(ROWS)
    assert pixels.shape == (len(ROWS), 64, 96, 3)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels[0], pixels[-1])
    assert_cached(encoder, pixels, views_cache, ROWS)


def test_an_image_is_decoded_once_for_all_of_its_views(
    views_cache: FeatureCache, spec: ImageEncoderSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []

    def decode(data: bytes) -> NDArray[np.uint8]:
        decoded.append(len(data))
        return decode_image(data)

    monkeypatch.setattr("extract.live_images.decode_image", decode)
    PixelSource(views_cache, LiveImageEncoder.load(spec)).load(np.arange(8)[::-1].copy())
    assert len(decoded) == 2


@pytest.mark.parametrize("aspect", ["crop", "letterbox"])
def test_views_that_were_cut_or_extended_are_shown_as_they_were(
    views_cache: FeatureCache, samples_path: Path, spec: ImageEncoderSpec, tmp_path: Path, aspect: Any
) -> None:
    fitted = replace(spec, aspect=aspect)
    job = ImageJobConfig(samples_path, tmp_path, views=VIEWS)
    cache = open_cache(
        samples_path, extract_images(job, load_image_encoder(fitted)).path, views_cache.prompts.store.path
    )
    encoder = LiveImageEncoder.load(fitted)
    assert_cached(encoder, PixelSource(cache, encoder).load(ROWS), cache, ROWS)


@pytest.fixture
def moved(views_cache: FeatureCache, tmp_path: Path) -> Path:
    """A copy of the image folder."""
    assert views_cache.samples.image_dir is not None
    return Path(shutil.copytree(views_cache.samples.image_dir, tmp_path / "moved"))


def test_a_file_that_is_gone_or_changed_is_named(
    views_cache: FeatureCache, spec: ImageEncoderSpec, moved: Path
) -> None:
    encoder = LiveImageEncoder.load(spec)
    source = PixelSource(views_cache, encoder, moved)
    assert torch.equal(source.load(ROWS), PixelSource(views_cache, encoder).load(ROWS))
    table = views_cache.samples.samples.images
    path, first = table.paths[1], int(views_cache.image_rows[1])
    data = (moved / path).read_bytes()
    (moved / path).write_bytes(data + b"\0")
    with pytest.raises(UsageError, match=rf"{path}'.*cannot be had: the file changed after.*--image-dir"):
        source.load(np.array([first]))
    (moved / path).unlink()
    with pytest.raises(UsageError, match=rf"{path}'.*cannot be had: .*--image-dir"):
        source.load(np.array([0, first + 1]))
    (moved / path).write_bytes(data)
    source.load(np.array([first]))
    with pytest.raises(UsageError, match=r"no images at .*nowhere: the folder is missing"):
        PixelSource(views_cache, encoder, moved / "nowhere")


def test_a_file_that_cannot_be_decoded_is_named(
    views_cache: FeatureCache, spec: ImageEncoderSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = PixelSource(views_cache, LiveImageEncoder.load(spec))
    monkeypatch.setattr("extract.live_images.decode_image", lambda data: np.zeros((1, 2, 3), np.uint8))
    with pytest.raises(UsageError, match="cannot be learned from: it has not the size"):
        source.load(np.array([0]))


def test_a_row_of_an_image_that_has_no_samples_is_refused(views_cache: FeatureCache, spec: ImageEncoderSpec) -> None:
    fewer = replace(views_cache, image_rows=views_cache.image_rows[1:])
    with pytest.raises(UsageError, match=r"row 0 shows .*, which the samples store does not have"):
        PixelSource(fewer, LiveImageEncoder.load(spec)).load(np.array([2]))


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"input_size": (96, 96)}, r"preprocessing\.input_size"), ({"aspect": "crop"}, r"preprocessing\.aspect")],
)
def test_an_encoder_that_sees_images_in_another_way_is_refused(
    views_cache: FeatureCache, spec: ImageEncoderSpec, settings: dict[str, Any], field: str
) -> None:
    with pytest.raises(StoreMismatchError, match=rf"^{field} of .* and of the encoder differ"):
        PixelSource(views_cache, LiveImageEncoder.load(replace(spec, **settings)))


# States


def test_from_the_tokens_of_a_row_come_its_features(
    views_cache: FeatureCache, spec: ImageEncoderSpec, states: ImageFeatures
) -> None:
    source = StateSource(states, views_cache)
    assert source.start == 1
    later = LiveImageEncoder.load(spec, LoraSpec(first_block=1), start=source.start)
    tokens = source.load(ROWS)
    assert tokens.shape == (len(ROWS), 1 + 4 + 24, 96)
    assert tokens.dtype == torch.float32
    assert_cached(later, tokens, views_cache, ROWS)
    whole = LiveImageEncoder.load(spec)
    with torch.no_grad():
        expected = whole(PixelSource(views_cache, whole).load(ROWS))
        found = later(tokens)
    for layer in LAYERS:
        torch.testing.assert_close(found.features[layer], expected.features[layer], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "within"), [("float16", 4e-3), ("int8", 0.05)])
def test_tokens_may_be_stored_in_less(
    views_cache: FeatureCache,
    samples_path: Path,
    spec: ImageEncoderSpec,
    states: ImageFeatures,
    tmp_path: Path,
    dtype: str,
    within: float,
) -> None:
    stored = StateSource(extract_states(samples_path, spec, tmp_path, dtype=dtype), views_cache).load(ROWS)
    assert stored.dtype == torch.float32
    exact = StateSource(states, views_cache).load(ROWS)
    difference = float((stored - exact).abs().max())
    assert 0 < difference < within * float(exact.abs().max())


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"aspect": "crop"}, r"encoder\.preprocessing\.aspect"),
        ({"precision": "bfloat16"}, r"encoder\.compute_dtype"),
        ({"input_size": (64, 64)}, r"encoder\.preprocessing\.input_size"),
    ],
)
def test_tokens_of_another_encoder_are_refused_by_the_field_that_differs(
    views_cache: FeatureCache,
    samples_path: Path,
    spec: ImageEncoderSpec,
    tmp_path: Path,
    settings: dict[str, Any],
    field: str,
) -> None:
    other = extract_states(samples_path, replace(spec, **settings), tmp_path)
    with pytest.raises(StoreMismatchError, match=rf"^{field} of .* differ \("):
        StateSource(other, views_cache)


def test_tokens_of_other_views_images_or_layers_are_refused(
    views_cache: FeatureCache, samples_path: Path, spec: ImageEncoderSpec, states: ImageFeatures, tmp_path: Path
) -> None:
    with pytest.raises(StoreMismatchError, match=r"^views of .* differ"):
        StateSource(extract_states(samples_path, spec, tmp_path, views=("whole", "flip")), views_cache)
    with pytest.raises(StoreMismatchError, match="has 0 layers with all tokens"):
        StateSource(views_cache.images, views_cache)
    with pytest.raises(StoreMismatchError, match="has 2 layers with all tokens"):
        StateSource(extract_states(samples_path, spec, tmp_path, ("1+tokens", "2+tokens")), views_cache)
    for name, value, field in (
        ("ids", ["x", *states.ids[1:]], "image/id"),
        ("ids", states.ids[1:], "image/id"),
        ("sha256", [*states.sha256[:-1], "0" * 64], "image/sha256"),
        ("views", states.views[::-1], "view"),
        ("valid", np.arange(len(states.ids)) != 5, "valid"),
    ):
        other = ImageFeatures(states.store)
        other.__dict__[name] = value
        with pytest.raises(StoreMismatchError, match=rf"^{field} of .* differ"):
            StateSource(other, views_cache)


def test_the_store_of_tokens_is_described_like_any_other(states: ImageFeatures) -> None:
    identity = json.loads((Path(str(states.store.path)) / "zarr.json").read_bytes())["attributes"]
    assert "1+tokens" in json.dumps(identity)
    assert states.layers == ("1+tokens",)
    assert states.cls_layers == ()
    assert states.features("1+tokens").shape[1:] == (1, 29, 96)
