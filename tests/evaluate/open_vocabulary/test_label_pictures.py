"""Label maps as pictures: the right colour at the right pixel, and every class in the legend."""

from __future__ import annotations

import colorsys
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from evaluate.open_vocabulary.label_pictures import OPACITY, LabelPicture, class_colour

RED, BLUE = (200, 10, 20), (5, 30, 220)
H, W = 60, 90


@pytest.fixture
def image() -> NDArray[np.uint8]:
    """Red on the left, blue on the right."""
    pixels = np.empty((H, W, 3), np.uint8)
    pixels[:, :45], pixels[:, 45:] = RED, BLUE
    return pixels


def blend(below: tuple[int, int, int], above: tuple[int, int, int]) -> list[int]:
    return [round(under * (1 - OPACITY) + over * OPACITY) for under, over in zip(below, above, strict=True)]


def test_a_known_colour_lies_at_a_known_pixel_in_rgb(image: NDArray[np.uint8]) -> None:
    labels = np.zeros((H, W), np.int64)
    labels[30:] = 1
    picture = LabelPicture(("sky", "road"), ((250, 200, 0), (0, 100, 50)))
    drawn = picture.draw(image, labels)
    assert drawn[0, 0].tolist() == blend(RED, (250, 200, 0)) == [230, 124, 8]
    assert drawn[0, 80].tolist() == blend(BLUE, (250, 200, 0))
    assert drawn[59, 80].tolist() == blend(BLUE, (0, 100, 50)) == [2, 72, 118]
    assert np.array_equal(drawn[:H, :W], picture.draw_map(image, labels))


def test_background_shows_the_image_as_it_is(image: NDArray[np.uint8]) -> None:
    picture = LabelPicture.of(["cat"], background=True)
    assert picture.classes == ("background", "cat")
    labels = np.zeros((H, W), np.int64)
    labels[:10] = 1
    drawn = picture.draw_map(image, labels)
    assert np.array_equal(drawn[10:], image[10:])
    assert drawn[0, 0].tolist() == blend(RED, class_colour(0))


def test_the_legend_has_a_swatch_for_every_class_largest_first(image: NDArray[np.uint8]) -> None:
    names = [f"class {number}" for number in range(30)]
    picture = LabelPicture.of(names, background=False)
    labels = np.full((H, W), 7)
    labels[:20] = 3
    labels[0, 0] = 12
    legend = picture.draw(image, labels)[H:]
    places = {}
    for number, colour in enumerate(picture.colours):
        found = np.argwhere((legend == colour).all(-1))
        assert len(found) >= 100, f"class {number} has no swatch"
        places[number] = (found[:, 1].min(), found[:, 0].min())
    order = sorted(places, key=lambda number: places[number])  # down the columns, then to the next one
    assert order[:3] == [7, 3, 12]
    assert order[3:] == [number for number in range(30) if number not in (3, 7, 12)]


def test_a_picture_is_as_large_as_its_image_and_a_legend_that_can_be_read(image: NDArray[np.uint8]) -> None:
    drawn = LabelPicture.of(["cat", "dog"], background=False).draw(image, np.zeros((H, W), np.int64))
    assert drawn.shape[1] >= 400
    assert (drawn[:H, W:] == 255).all()
    wide = LabelPicture.of(["cat"], background=False).draw(np.zeros((300, 700, 3), np.uint8), np.zeros((300, 700), int))
    assert wide.shape[1] == 700


def test_long_and_strange_names_stay_inside_the_picture(image: NDArray[np.uint8]) -> None:
    names = ["w" * 300, "<b>&amp;</b>", "كلب", "🚦 sign", "\x1b[31m"]
    drawn = LabelPicture.of(names, background=True).draw(image, np.zeros((H, W), np.int64))
    assert (drawn[H:, -4:] == 255).all()


def test_shares_add_up(image: NDArray[np.uint8]) -> None:
    labels = np.zeros((H, W), np.int64)
    labels[:15] = 2
    assert LabelPicture.of(["a", "b", "c"], background=False).shares(labels) == [0.75, 0, 0.25]


def test_the_first_classes_have_colours_that_are_far_apart() -> None:
    colours = np.array([class_colour(number) for number in range(21)], float)
    apart = np.abs(colours[:, None] - colours[None]).sum(-1) + 1000 * np.eye(21)
    assert apart.min() > 40
    hues = sorted(colorsys.rgb_to_hsv(*(part / 255 for part in class_colour(number)))[0] for number in range(7))
    assert min(after - before for before, after in pairwise(hues)) > 0.08


def test_a_label_map_of_another_size_is_refused(image: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match="resize one of them"):
        LabelPicture.of(["a"], background=False).draw_map(image, np.zeros((H, W + 1), np.int64))
