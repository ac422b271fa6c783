"""int8 stores: every token within half a step of what the encoder says, in half the room, or in the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_schema.errors import UsageError
from cache_schema.features import FeatureCache, ImageFeatures
from cache_schema.quantize import dequantize
from cache_schema.store import Store, open_store
from extract.encoders.protocols import ImageEncoding
from extract.image_job import ImageJobConfig, extract_images
from extract.images import decode_image
from tests.extract.toys import NUM_IMAGES, SHARD_ROWS, ToyImageEncoder, digest_of, flip_byte, pool

if TYPE_CHECKING:
    from extract.encoders.protocols import ImageEncoder

ROUNDING = 1 + 1e-5
"""What float32 adds when a value lies half-way between two steps."""


@dataclass
class WideEncoder(ToyImageEncoder):
    """Colours mixed into `width` channels of very different sizes."""

    width: int = 384

    @property
    def grids(self) -> Mapping[str, tuple[int, int, int]]:
        return {"wide": (4, 6, self.width)}

    @property
    def cls_widths(self) -> Mapping[str, int]:
        return {"wide": self.width}

    def encode(self, pixels: Tensor) -> ImageEncoding:
        self.encoded.append(len(pixels))
        mix = torch.randn(3, self.width, generator=torch.Generator().manual_seed(0)).exp() * self.scale
        means = [pool(image, 4, 6) for image in pixels.permute(0, 3, 1, 2).float() / 255]
        grid = torch.stack([(mean - 0.5) @ mix for mean in means])
        return ImageEncoding({"wide": grid}, {"wide": grid[:, 0, 0]})


@dataclass
class StainedEncoder(ToyImageEncoder):
    """Gives one token of every image the same value in all its channels."""

    value: float = 0.0

    def encode(self, pixels: Tensor) -> ImageEncoding:
        encoding = super().encode(pixels)
        encoding.features["coarse"][:, 1, 0] = self.value
        return encoding


@pytest.fixture
def int8_config(config: ImageJobConfig) -> ImageJobConfig:
    return replace(config, dtype="int8")


def extract(config: ImageJobConfig, encoder: ToyImageEncoder, dtype: str) -> Store:
    return open_store(extract_images(replace(config, dtype=dtype), encoder).path)


def kept(store: Store, layer: str) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The whole numbers of an int8 store, and the scale of each token."""
    features = ImageFeatures(store)
    scale = features.scale(layer)
    assert scale is not None
    assert scale.dtype == np.float16
    return features.features(layer).read(), scale.read().astype(np.float32)


def stored_bytes(store: Store, *kinds: str) -> int:
    """Bytes of the files of some arrays, checksums and shard indices included."""
    files = [(key, stored) for receipt in store.receipts() for key, stored in receipt.files.items()]
    return sum(stored.num_bytes for key, stored in files if key.split("/")[0] in kinds)


@pytest.mark.parametrize("encoder", [ToyImageEncoder(), WideEncoder(), WideEncoder(scale=1e-6), WideEncoder(scale=900)])
def test_no_value_is_off_by_more_than_half_a_step(config: ImageJobConfig, encoder: ToyImageEncoder) -> None:
    exact, quantized = extract(config, encoder, "float32"), extract(config, encoder, "int8")
    assert quantized.read("valid").all()
    for layer in encoder.grids:
        tokens = exact.read(f"features/{layer}")
        values, scale = kept(quantized, layer)
        assert values.dtype == np.int8
        assert scale.shape == tokens.shape[:-1]
        assert values.min() >= -127
        assert np.all(np.abs(tokens - values * scale[..., None]) <= ROUNDING * scale[..., None] / 2)
        np.testing.assert_array_equal(values * scale[..., None], dequantize(values, scale.astype(np.float16)))


def test_a_step_is_as_fine_as_the_tokens_largest_value_allows(config: ImageJobConfig) -> None:
    encoder = WideEncoder()
    tokens = extract(config, encoder, "float32").read("features/wide")
    values, scale = kept(extract(config, encoder, "int8"), "wide")
    largest = np.abs(tokens).max(-1)
    assert np.all(127 * scale >= largest)
    assert np.all(127 * scale <= largest * (1 + 2**-10)), "rounded up to the next float16 and no further"
    assert np.all(np.abs(values).max(-1) == 127)


def test_a_real_encoders_tokens_are_kept_within_half_a_step(
    int8_cache: FeatureCache, image_encoder: ImageEncoder
) -> None:
    images, samples = int8_cache.images, int8_cache.samples
    for number in range(0, len(samples.samples.images), 5):
        image = decode_image((samples.image_dir / samples.samples.images.paths[number]).read_bytes())
        encoding = image_encoder.encode(torch.from_numpy(image_encoder.preprocess(image))[None])
        row = int(int8_cache.image_rows[number])
        for layer in images.layers:
            values, scale = (array[row][..., None] for array in kept(images.store, layer))
            tokens = encoding.features[layer][0].numpy()
            assert np.all(np.abs(tokens - values[..., 0] * scale) <= ROUNDING * scale / 2)


def test_what_is_small_is_kept_as_float16(config: ImageJobConfig) -> None:
    encoder = WideEncoder()
    half, quantized = extract(config, encoder, "float16"), extract(config, encoder, "int8")
    assert quantized.array("cls/wide").dtype == np.float16
    np.testing.assert_array_equal(quantized.read("cls/wide"), half.read("cls/wide"))


# Room


@pytest.mark.parametrize("width", [384, 768, 1024])
def test_tokens_and_scales_take_half_the_room_of_float16(config: ImageJobConfig, width: int) -> None:
    encoder = WideEncoder(width=width)
    half, quantized = extract(config, encoder, "float16"), extract(config, encoder, "int8")
    assert stored_bytes(quantized, "features", "scale") <= 0.51 * stored_bytes(half, "features", "scale")


def test_at_the_tiny_width_a_scale_weighs_more(feature_cache: FeatureCache, int8_cache: FeatureCache) -> None:
    """96 channels: 98 bytes for a token instead of 192, and two checksums for an image instead of one."""
    num_images, tokens, num_shards, num_layers = 24, 4 * 6, 3, 2
    crc, entry = 4, 16
    overhead = num_images * (crc + entry) + num_shards * crc  # of one array
    half = stored_bytes(feature_cache.images.store, "features", "scale")
    quantized = stored_bytes(int8_cache.images.store, "features", "scale")
    assert half == num_layers * (num_images * tokens * 192 + overhead)
    assert quantized == num_layers * (num_images * tokens * 98 + 2 * overhead)
    assert quantized / half == pytest.approx(0.517, abs=1e-3)


# What cannot be scaled


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e7, -1e7])
def test_tokens_that_no_float16_can_scale_are_in_the_ledger_and_nowhere_else(
    int8_config: ImageJobConfig, value: float
) -> None:
    store = open_store(extract_images(int8_config, StainedEncoder(value=value)).path)
    assert not store.read("valid").any()
    failures = store.failures()
    assert sorted(failure.row for failure in failures) == list(range(NUM_IMAGES))
    assert {failure.reason for failure in failures} == {"its features are not finite in float16"}
    for name in ("features/fine", "features/coarse", "scale/fine", "scale/coarse", "cls/fine"):
        assert not store.read(name).any(), name


@pytest.mark.parametrize("value", [0.0, 1e-9, 65_504.0, 1e6, -8e6])
def test_tokens_that_are_merely_large_or_small_are_kept(int8_config: ImageJobConfig, value: float) -> None:
    store = open_store(extract_images(int8_config, StainedEncoder(value=value)).path)
    assert store.read("valid").all()
    values, scale = kept(store, "coarse")
    assert np.all(np.abs(value - values[:, 1, 0] * scale[:, 1, 0, None]) <= ROUNDING * scale[:, 1, 0, None] / 2)
    if value == 0:
        assert not scale[:, 1, 0].any()


def test_a_data_type_nobody_knows_is_refused(config: ImageJobConfig) -> None:
    with pytest.raises(UsageError, match="unknown dtype 'int4': did you mean 'int8'"):
        replace(config, dtype="int4")


# A store like any other


def test_int8_is_another_store_with_the_same_bytes_each_time(int8_config: ImageJobConfig) -> None:
    first = extract_images(int8_config, ToyImageEncoder())
    assert first.path != extract_images(replace(int8_config, dtype="float16"), ToyImageEncoder()).path
    other = replace(int8_config, out=int8_config.out / "other", batch_size=32)
    assert digest_of(extract_images(other, ToyImageEncoder())) == digest_of(first)
    assert not extract_images(int8_config, ToyImageEncoder(fails_at_batch=0)).num_encoded


def test_a_scale_that_was_harmed_is_made_again(int8_config: ImageJobConfig) -> None:
    first = extract_images(int8_config, ToyImageEncoder())
    digest = digest_of(first)
    flip_byte(first.path / "scale" / "fine" / "c.1.0.0")
    encoder = ToyImageEncoder()
    assert digest_of(extract_images(int8_config, encoder, repair=first.path)) == digest
    assert sum(encoder.encoded) == SHARD_ROWS
