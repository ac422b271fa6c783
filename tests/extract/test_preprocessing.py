"""Preprocessing is that of transformers' processors on Pillow, to the last bit where they squash."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from cache_schema.masks import Size
from cache_schema.views import View
from extract.preprocessing import Preprocessing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COLOURS = {"image_mean": list(MEAN), "image_std": list(STD)}


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def prepare(preprocessing: Preprocessing, image: NDArray[np.uint8]) -> NDArray[np.float32]:
    resized = preprocessing.resize(image)
    normalised: NDArray[np.float32] = preprocessing.normalise(torch.tensor(resized)[None])[0].numpy()
    return normalised


@pytest.mark.parametrize("size", [(50, 70), (300, 200), (1, 1), (64, 96), (9, 400)])
@pytest.mark.parametrize("input_size", [(64, 96), (56, 56)])
@pytest.mark.parametrize(("resample", "code"), [("bicubic", 3), ("bilinear", 2)])
def test_processors_that_squash_are_equalled_to_the_last_bit(
    size: Size, input_size: Size, resample: str, code: int
) -> None:
    target = {"height": input_size[0], "width": input_size[1]}
    image = noise(*size, 3)
    pixels = prepare(Preprocessing(input_size, MEAN, STD, resample), image)
    assert pixels.dtype == np.float32
    for processor in (
        SiglipImageProcessorPil(size=target, resample=code, **COLOURS),
        BitImageProcessorPil(size=target, resample=code, do_center_crop=False, **COLOURS),
    ):
        expected = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("side", [64, 50, 200])
def test_processors_that_crop_are_equalled_on_images_of_the_inputs_shape(side: int) -> None:
    image = noise(side, side, 3)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, **COLOURS)
    expected = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(prepare(Preprocessing((64, 64), MEAN, STD, "bicubic"), image), expected)


def test_processors_that_crop_more_than_they_must_see_less() -> None:
    """DINOv2's brings the short side to 256 and keeps 224 of it: as if the image were cut there before."""
    image = noise(64, 64, 3)
    processor = BitImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}, **COLOURS)
    expected = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    preprocessing = Preprocessing((56, 56), MEAN, STD, "bicubic")
    assert not np.allclose(prepare(preprocessing, image), expected)
    np.testing.assert_array_equal(prepare(preprocessing, image[4:60, 4:60]), expected)


def test_a_processor_that_keeps_shapes_is_equalled_on_images_of_the_inputs_shape() -> None:
    image = noise(100, 150, 3)
    processor = Siglip2ImageProcessorPil(patch_size=16, max_num_patches=24, **COLOURS)
    said = processor(Image.fromarray(image), return_tensors="np")
    assert said["spatial_shapes"].tolist() == [[4, 6]]
    patches = said["pixel_values"].reshape(4, 6, 16, 16, 3).transpose(4, 0, 2, 1, 3).reshape(3, 64, 96)
    np.testing.assert_array_equal(prepare(Preprocessing((64, 96), MEAN, STD, "bilinear"), image), patches)


def test_every_colour_is_normalised_as_in_numpy() -> None:
    colours = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    scaled = colours.astype(np.float32) / np.float32(255)
    expected = (scaled - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    normalised = Preprocessing((16, 16), MEAN, STD, "bicubic").normalise(torch.tensor(colours)[None])
    assert normalised.dtype == torch.float32
    assert normalised.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(normalised[0].permute(1, 2, 0), expected)


def test_pixels_are_left_as_they_were() -> None:
    pixels = torch.tensor(noise(2, 8, 8, 3))
    before = pixels.clone()
    preprocessing = Preprocessing((8, 8), MEAN, STD, "bicubic")
    first = preprocessing.normalise(pixels)
    assert torch.equal(pixels, before)
    assert torch.equal(preprocessing.normalise(pixels), first), "constants were changed"


def test_the_whole_of_what_is_seen_is_kept_whatever_its_shape() -> None:
    image = np.zeros((40, 160, 3), np.uint8)
    image[:, :80] = 255
    preprocessing = Preprocessing((32, 32), MEAN, STD, "bilinear")
    resized = preprocessing.resize(image)
    assert resized.shape == (32, 32, 3)
    assert resized.dtype == np.uint8
    assert (resized[:, :14] == 255).all()
    assert (resized[:, 18:] == 0).all()


@pytest.mark.parametrize(
    ("aspect", "box"), [("squash", (0, 0, 160, 40)), ("crop", (60, 0, 100, 40)), ("letterbox", (0, -60, 160, 100))]
)
def test_the_aspect_decides_what_is_seen(aspect: str, box: tuple[int, int, int, int]) -> None:
    preprocessing = Preprocessing((32, 32), MEAN, STD, "bilinear", aspect)  # type: ignore[arg-type]
    assert preprocessing.fit(View((0, 0, 160, 40), True)) == View(box, True)


def test_all_that_decides_the_output_is_said() -> None:
    one = Preprocessing((64, 96), MEAN, STD, "bicubic").to_dict()
    assert (one["orientation"], one["resize"]) == ("exif", "pillow")
    others = [
        Preprocessing((96, 64), MEAN, STD, "bicubic"),
        Preprocessing((64, 96), STD, STD, "bicubic"),
        Preprocessing((64, 96), MEAN, MEAN, "bicubic"),
        Preprocessing((64, 96), MEAN, STD, "bilinear"),
        Preprocessing((64, 96), MEAN, STD, "bicubic", "crop"),
        Preprocessing((64, 96), MEAN, STD, "bicubic", "letterbox"),
    ]
    said = [one, *(other.to_dict() for other in others)]
    assert len({repr(settings) for settings in said}) == len(said)
