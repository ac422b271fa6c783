from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from evaluate.pictures import (
    PREDICTED_COLOUR,
    TRUTH_COLOUR,
    data_uri,
    encode_jpeg,
    encode_png,
    overlay,
    triptych,
)

GREY = np.full((60, 80, 3), 100, np.uint8)


def square(top=20, bottom=40, left=20, right=50, size=(60, 80)):
    mask = np.zeros(size, np.bool_)
    mask[top:bottom, left:right] = True
    return mask


def opened(encoded):
    return Image.open(io.BytesIO(encoded))


def test_an_overlay_tints_the_inside_and_leaves_the_outside_alone():
    picture = overlay(GREY, square(), colour=(200, 0, 100), alpha=0.5)
    assert picture[30, 35].tolist() == [150, 50, 100]
    assert picture[5, 5].tolist() == [100, 100, 100]


def test_the_outline_is_the_colour_inside_and_white_around_a_dark_one():
    picture = overlay(GREY, square(), colour=TRUTH_COLOUR)
    assert picture[20, 35].tolist() == list(TRUTH_COLOUR)
    assert picture[19, 35].tolist() == [255, 255, 255]
    assert picture[18, 35].tolist() == [100, 100, 100]


def test_the_outline_is_near_black_around_a_light_colour():
    picture = overlay(GREY, square(), colour=PREDICTED_COLOUR)
    assert picture[20, 35].tolist() == list(PREDICTED_COLOUR)
    assert picture[19, 35].max() < 50


def test_the_outline_is_wider_on_a_large_image():
    image, mask = np.full((800, 800, 3), 100, np.uint8), square(200, 600, 200, 600, size=(800, 800))
    assert (overlay(image, mask)[196:200, 400] < 50).all()


def test_an_empty_mask_changes_nothing_and_the_image_given_is_never_touched():
    before = GREY.copy()
    assert np.array_equal(overlay(GREY, np.zeros((60, 80), np.bool_)), before)
    overlay(GREY, square())
    assert np.array_equal(GREY, before)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 2)])
def test_the_smallest_images_can_be_drawn_on(size):
    assert overlay(np.zeros((*size, 3), np.uint8), np.ones(size, np.bool_)).shape == (*size, 3)


def test_a_mask_of_another_size_is_refused():
    with pytest.raises((ValueError, TypeError)):  # a runtime type checker may speak first
        overlay(GREY, square(size=(50, 80)))


def test_the_three_panels_have_one_size_and_show_truth_and_prediction():
    panels = triptych(GREY, square(), square(left=40, right=70), longest_side=160)
    assert {panel.shape for panel in panels} == {(120, 160, 3)}
    assert (panels.image == 100).all()
    assert panels.truth[60, 60, 2] > 110  # bluer
    assert panels.predicted[60, 110, 0] > 110  # redder
    assert panels.predicted[60, 60].tolist() == [100, 100, 100]


def test_a_mask_smaller_than_one_new_pixel_is_still_seen():
    image, dot = np.full((400, 400, 3), 100, np.uint8), square(100, 102, 100, 102, size=(400, 400))
    assert (triptych(image, dot, dot, longest_side=50).truth != 100).any()


def test_a_png_gives_back_the_very_pixels():
    image = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
    assert np.array_equal(np.asarray(opened(encode_png(image))), image)


def test_a_mask_becomes_a_black_and_white_png():
    written = np.asarray(opened(encode_png(square())))
    assert set(np.unique(written)) == {0, 255}
    assert np.array_equal(written == 255, square())


def test_a_jpeg_is_close_to_the_pixels():
    encoded = encode_jpeg(GREY)
    assert opened(encoded).format == "JPEG"
    assert np.abs(np.asarray(opened(encoded)).astype(int) - 100).max() <= 2


def test_a_data_uri_holds_the_file():
    head, body = data_uri(encode_png(GREY), "png").split(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(body) == encode_png(GREY)
