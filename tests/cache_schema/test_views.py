"""A view is a box and a flip, and what it does to an image it does to the image's mask."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cache_schema.errors import UsageError
from cache_schema.masks import Size
from cache_schema.views import PADDING_RGB, View, check_views, make_view

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))
SCALES = st.floats(0.1, 10).map(lambda share: f"scale-{share!r}")
CROPS = st.floats(0.1, 1).map(lambda share: f"crop-{share!r}")
FLIPPED = st.sampled_from(["", "+flip"])
SPECS = st.sampled_from(["whole", "flip"]) | st.builds(lambda spec, flip: spec + flip, SCALES | CROPS, FLIPPED)


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def picture(size: Size) -> NDArray[np.uint8]:
    """An (H, W, 3) image in which every pixel says where it is, and none has the colour of the padding."""
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.full(size, 255)], axis=-1).astype(np.uint8)


@st.composite
def views(draw: st.DrawFn, size: Size) -> View:
    """Any box that shows a part of an image, up to a good way beyond its edges."""
    height, width = size
    left, top = draw(st.integers(-20, width - 1)), draw(st.integers(-20, height - 1))
    right, bottom = (
        draw(st.integers(max(left, 0) + 1, width + 20)),
        draw(st.integers(max(top, 0) + 1, height + 20)),
    )
    return View((left, top, right, bottom), draw(st.booleans()))


# What is seen


@given(SIZES, st.data())
def test_every_pixel_is_the_images_own_or_padding(size: Size, data: st.DataObject) -> None:
    view, image = data.draw(views(size)), picture(size)
    left, top, right, bottom = view.box
    seen = view.apply_to_image(image)
    assert seen.shape == (bottom - top, right - left, 3)
    assert seen.dtype == np.uint8
    for row in range(bottom - top):
        for column in range(right - left):
            y, x = top + row, left + (right - left - 1 - column if view.flip else column)
            inside = 0 <= y < size[0] and 0 <= x < size[1]
            assert seen[row, column].tolist() == ([y, x, 255] if inside else list(PADDING_RGB))


@given(SIZES, st.data())
def test_a_mask_goes_where_its_image_goes(size: Size, data: st.DataObject) -> None:
    view = data.draw(views(size) | SPECS.map(lambda spec: make_view(spec, 1, size, digest_of("image"))))
    mask = np.random.default_rng(data.draw(st.integers(0, 9))).random(size) < 0.5
    image = np.where(mask[..., None], np.uint8(255), np.uint8(0)) * np.ones(3, np.uint8)
    seen = view.apply_to_mask(mask)
    assert seen.dtype == np.bool_
    assert (seen == (view.apply_to_image(image) == 255).all(axis=-1)).all()


@given(SIZES, st.data())
def test_a_mirrored_view_is_the_view_mirrored(size: Size, data: st.DataObject) -> None:
    view = data.draw(views(size))
    other = View(view.box, not view.flip)
    assert (other.apply_to_image(picture(size)) == view.apply_to_image(picture(size))[:, ::-1]).all()


@given(SIZES)
def test_the_whole_image_is_the_image(size: Size) -> None:
    image = picture(size)
    assert (make_view("whole", 0, size, "").apply_to_image(image) == image).all()
    assert (make_view("flip", 1, size, "").apply_to_image(image) == image[:, ::-1]).all()
    for spec in ("scale-1", "crop-1"):
        assert make_view(spec, 1, size, "") == make_view("whole", 0, size, "")
        assert make_view(f"{spec}+flip", 1, size, "") == make_view("flip", 0, size, "")


@given(SIZES)
def test_an_image_is_left_as_it_was(size: Size) -> None:
    image = picture(size)
    make_view("flip", 1, size, "").apply_to_image(image)[...] = 0
    make_view("whole", 0, size, "").apply_to_image(image)[...] = 0
    assert (image == picture(size)).all()


@given(SIZES, SPECS)
def test_a_view_survives_its_row_in_a_store(size: Size, spec: str) -> None:
    view = make_view(spec, 2, size, digest_of("image"))
    row = np.array(view.to_row(), np.int32)
    assert View.from_row(row.tolist()) == view
    assert View.from_row(row) == view
    assert row.shape == (5,)


# What a spec makes


@given(SIZES, SCALES)
def test_a_scaled_view_lies_around_the_centre(size: Size, spec: str) -> None:
    height, width = size
    scale = float(spec.removeprefix("scale-"))
    left, top, right, bottom = make_view(spec, 1, size, "").box
    assert abs((right - left) - max(1, width / scale)) <= 0.5 + 1e-6
    assert abs((bottom - top) - max(1, height / scale)) <= 0.5 + 1e-6
    assert abs((left + right) - width) <= 1
    assert abs((top + bottom) - height) <= 1


def test_scaling_up_cuts_and_scaling_down_pads() -> None:
    assert make_view("scale-2", 1, (100, 200), "").box == (50, 25, 150, 75)
    assert make_view("scale-0.5", 1, (100, 200), "").box == (-100, -50, 300, 150)
    seen = make_view("scale-0.5", 1, (10, 20), "").apply_to_mask(np.ones((10, 20), np.bool_))
    assert seen.shape == (20, 40)
    assert seen.sum() == 200
    assert seen[5:15, 10:30].all()


@given(SIZES, CROPS, st.integers(0, 5), st.text(max_size=5))
def test_a_crop_lies_inside_and_is_the_same_each_time(size: Size, spec: str, number: int, image: str) -> None:
    height, width = size
    share = float(spec.removeprefix("crop-"))
    view = make_view(spec, number, size, digest_of(image))
    left, top, right, bottom = view.box
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert abs((right - left) - max(1, width * share)) <= 0.5
    assert abs((bottom - top) - max(1, height * share)) <= 0.5
    assert make_view(spec, number, size, digest_of(image)) == view
    assert make_view(f"{spec}+flip", number, size, digest_of(image)).flip


def test_crops_fall_everywhere_and_elsewhere_for_each_image_and_view() -> None:
    boxes = {
        make_view("crop-0.5", number, (64, 64), digest_of(str(image))).box for number in (1, 2) for image in range(400)
    }
    assert len(boxes) > 500
    lefts, tops = {box[0] for box in boxes}, {box[1] for box in boxes}
    assert lefts == tops == set(range(33)), "the edges too"


def test_a_crop_is_the_same_on_every_machine() -> None:
    """A store's fingerprint holds the spec alone, so the box that a spec makes may never change."""
    assert make_view("crop-0.5", 1, (480, 640), digest_of("image")).box == (307, 145, 627, 385)


# What is refused


@pytest.mark.parametrize(
    "spec",
    [
        "",
        " whole",
        "scale- 2",
        "crop-0.8\n",
        "crop-0.8+",
        "crop--1",
        *"hole Whole flip+flip whole+flip scale scale- crop-x zoom-2 crop-0.8+turn crop-nan scale-inf flip-2".split(),
    ],
)
def test_an_unknown_view_is_refused_with_the_remedy(spec: str) -> None:
    with pytest.raises(UsageError, match=r"unknown view .*: a view is whole, flip, scale-S or crop-S") as caught:
        make_view(spec, 1, (8, 8), "")
    assert repr(spec) in str(caught.value)
    with pytest.raises(UsageError):
        check_views(["whole", spec])


@pytest.mark.parametrize("spec", ["scale-0", "scale-0.09", "scale-10.1", "crop-0", "crop-1.1", "crop-20"])
def test_a_view_out_of_range_is_refused_with_the_range(spec: str) -> None:
    with pytest.raises(UsageError, match=r"scales go from 0\.1 to 10, crops from 0\.1 to 1\."):
        make_view(spec, 1, (8, 8), "")


@pytest.mark.parametrize("specs", [[], ["flip"], ["crop-1"], ["flip", "whole"]])
def test_the_whole_image_comes_first(specs: Sequence[str]) -> None:
    with pytest.raises(UsageError, match="views must begin with whole"):
        check_views(specs)


@pytest.mark.parametrize("specs", [["whole", "whole"], ["whole", "flip", "flip"], ["whole", "scale-2", "scale-2"]])
def test_a_view_that_would_be_the_same_twice_is_refused(specs: Sequence[str]) -> None:
    with pytest.raises(UsageError, match=rf"view {specs[-1]} is named twice; only crops"):
        check_views(specs)


def test_views_that_can_be_made_are_accepted() -> None:
    check_views(["whole"])
    check_views(["whole", "flip", "scale-0.5", "scale-0.5+flip", "crop-0.8", "crop-0.8", "crop-0.8+flip"])
