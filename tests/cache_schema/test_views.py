"""A view is a box and a flip: what it does to an image it does to the image's mask, and its inverse puts it back."""

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
from cache_schema.views import (
    ASPECTS,
    MAX_WINDOWS,
    PADDING_RGB,
    Aspect,
    View,
    average_views,
    check_views,
    fit_view,
    make_view,
    make_views,
)

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))
INPUT_SIZES = st.tuples(st.integers(1, 30), st.integers(1, 30))
ASPECT = st.sampled_from(ASPECTS)
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


# The way back


@given(SIZES, INPUT_SIZES, ASPECT, st.booleans(), st.data())
def test_what_a_view_shows_of_a_mask_is_put_back_where_it_was(
    size: Size, input_size: Size, aspect: Aspect, outside: bool, data: st.DataObject
) -> None:
    made = SPECS.map(lambda spec: make_view(spec, 1, size, digest_of("image")))
    view = data.draw(views(size) | made.map(lambda view: fit_view(view, input_size, aspect)))
    mask = np.random.default_rng(data.draw(st.integers(0, 9))).random(size) < 0.5
    left, top, right, bottom = view.box
    rows, columns = np.mgrid[: size[0], : size[1]]
    shown = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    placed = view.place(view.apply_to_mask(mask), size, outside)
    assert placed.dtype == np.bool_
    assert (placed == np.where(shown, mask, outside)).all()


@given(SIZES, st.data())
def test_padding_falls_off(size: Size, data: st.DataObject) -> None:
    view = data.draw(views(size))
    everywhere = view.place(np.ones(view.size, np.bool_), size, False)
    assert (everywhere == view.place(view.apply_to_mask(np.ones(size, np.bool_)), size, False)).all()


@given(SIZES, st.data())
def test_scores_of_several_classes_are_put_back_each_for_itself(size: Size, data: st.DataObject) -> None:
    view = data.draw(views(size))
    scores = np.random.default_rng(0).standard_normal((2, 3, *view.size)).astype(np.float32)
    placed = view.place(scores, size, -9)
    assert placed.dtype == np.float32
    assert placed.shape == (2, 3, *size)
    for place in np.ndindex(2, 3):
        assert (placed[place] == view.place(scores[place], size, -9)).all()


def test_values_of_another_size_than_the_views_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the view shows \(2, 3\) pixels; got values of \(3, 2\)"):
        View((1, 1, 4, 3), False).place(np.zeros((3, 2)), (8, 8), 0)


@given(SIZES, st.integers(1, 5), st.data())
def test_views_that_overlap_are_averaged(size: Size, num_views: int, data: st.DataObject) -> None:
    whole = make_view("whole", 0, size, "")
    chosen = [whole, *(data.draw(views(size)) for _ in range(num_views))]
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    scores = [rng.integers(-100, 100, (2, *view.size)).astype(np.float32) for view in chosen]
    mean = average_views(chosen, iter(scores), size)
    layers = np.stack(
        [view.place(score.astype(np.float64), size, np.nan) for view, score in zip(chosen, scores, strict=True)]
    )
    assert mean.dtype == np.float32
    assert mean.shape == (2, *size)
    np.testing.assert_allclose(mean, np.nanmean(layers, axis=0), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.bool_])
def test_a_mean_has_at_least_the_precision_of_float32(dtype: type) -> None:
    boxes = [View((0, 0, 3, 2), False), View((1, 0, 3, 2), True), View((0, 0, 3, 2), True)]
    mean = average_views(boxes, (np.ones(view.size, dtype) for view in boxes), (2, 3))
    assert mean.dtype == (np.float64 if dtype is np.float64 else np.float32)
    assert (mean == 1).all()


@pytest.mark.parametrize("boxes", [[], [(0, 0, 3, 4)], [(0, 0, 4, 3), (-2, 3, 3, 6)]])
def test_a_pixel_that_no_view_shows_has_no_mean(boxes: list[tuple[int, int, int, int]]) -> None:
    chosen = [View(box, False) for box in boxes]
    with pytest.raises(ValueError, match=r"of 16 pixels of the image are in no view"):
        average_views(chosen, (np.zeros(view.size) for view in chosen), (4, 4))


# What an encoder's input shows


@given(SIZES, INPUT_SIZES, SPECS)
def test_squashing_shows_all_of_a_view(size: Size, input_size: Size, spec: str) -> None:
    view = make_view(spec, 1, size, digest_of("image"))
    assert fit_view(view, input_size, "squash") == view


@given(SIZES, INPUT_SIZES, SPECS)
def test_a_crop_cuts_the_longer_side_and_a_letterbox_extends_the_shorter_one(
    size: Size, input_size: Size, spec: str
) -> None:
    view = make_view(spec, 1, size, digest_of("image"))
    inner, outer = fit_view(view, input_size, "crop"), fit_view(view, input_size, "letterbox")
    assert inner.flip == outer.flip == view.flip
    assert inner.size[0] <= view.size[0] <= outer.size[0]
    assert inner.size[1] <= view.size[1] <= outer.size[1]
    for fitted, kept in ((inner, min), (outer, max)):
        assert sum(old != new for old, new in zip(view.size, fitted.size, strict=True)) <= 1, "only one side changes"
        height, width = fitted.size
        ratio = kept(view.size[0] / input_size[0], view.size[1] / input_size[1])
        assert abs(height - max(1, ratio * input_size[0])) <= 0.5 + 1e-6
        assert abs(width - max(1, ratio * input_size[1])) <= 0.5 + 1e-6
        for start, stop in ((0, 2), (1, 3)):
            off_centre = view.box[start] + view.box[stop] - fitted.box[start] - fitted.box[stop]
            assert abs(off_centre) <= 1, "around the centre"


@given(SIZES, ASPECT)
def test_a_view_of_the_inputs_shape_is_left_as_it_is(size: Size, aspect: Aspect) -> None:
    view = make_view("flip", 1, size, "")
    assert fit_view(view, size, aspect) == fit_view(view, (3 * size[0], 3 * size[1]), aspect) == view


def test_aspects_by_hand() -> None:
    wide, tall = make_view("whole", 0, (100, 201), ""), make_view("flip", 1, (201, 100), "")
    assert fit_view(wide, (32, 32), "crop").box == (50, 0, 150, 100)
    assert fit_view(tall, (32, 32), "crop") == View((0, 50, 100, 150), True)
    assert fit_view(wide, (32, 32), "letterbox").box == (0, -51, 201, 150)
    assert fit_view(tall, (32, 32), "letterbox") == View((-51, 0, 150, 201), True)
    assert fit_view(wide, (64, 32), "crop").box == (75, 0, 125, 100)
    assert fit_view(make_view("whole", 0, (1, 9000), ""), (1, 1), "crop").size == (1, 1)


# Windows


def mmseg_windows(size: Size, side: int, step: int) -> list[tuple[int, int, int, int]]:
    """Sliding windows as mmsegmentation makes them: (left, top, right, bottom), row by row."""
    (height, width), boxes = size, []
    for row in range(max(height - side + step - 1, 0) // step + 1):
        for column in range(max(width - side + step - 1, 0) // step + 1):
            bottom, right = min(row * step + side, height), min(column * step + side, width)
            boxes.append((max(right - side, 0), max(bottom - side, 0), right, bottom))
    return boxes


SHARES = st.integers(10, 100).flatmap(lambda side: st.tuples(st.just(side), st.integers(1, side)))
"""Side and step of windows, in hundredths of the shorter side."""


@given(SIZES, SHARES)
def test_windows_lie_where_mmsegmentation_puts_them(size: Size, shares: tuple[int, int]) -> None:
    spec = f"windows-{shares[0] / 100}-{shares[1] / 100}"
    check_views(["whole", spec])
    whole, *windows = make_views(["whole", spec], size, "")
    side, step = (max(1, round(share / 100 * min(size))) for share in shares)
    assert whole.box == (0, 0, size[1], size[0])
    assert [window.box for window in windows] == mmseg_windows(size, side, step)
    assert not any(window.flip for window in windows)


@given(SIZES, SHARES)
def test_windows_are_squares_of_the_image_that_cover_all_of_it(size: Size, shares: tuple[int, int]) -> None:
    windows = make_views(["whole", f"windows-{shares[0] / 100}-{shares[1] / 100}"], size, "")[1:]
    mask = np.random.default_rng(0).random(size) < 0.5
    assert len({window.size for window in windows}) == 1
    assert windows[0].size[0] == windows[0].size[1]
    assert len({window.box for window in windows}) == len(windows)
    seen = [window.apply_to_mask(mask) for window in windows]
    assert (average_views(windows, seen, size) == mask).all()


def test_windows_by_hand() -> None:
    specs = ["whole", "flip", "windows-1-0.5"]
    assert [view.box for view in make_views(specs, (480, 640), "")[2:]] == [(0, 0, 480, 480), (160, 0, 640, 480)]
    assert [view.box for view in make_views(specs, (480, 480), "")[2:]] == [(0, 0, 480, 480)]
    assert [view.box[:2] for view in make_views(specs, (1100, 480), "")[2:]] == [(0, 0), (0, 240), (0, 480), (0, 620)]
    assert [view.box for view in make_views(["whole", "windows-0.5-0.5"], (3, 5), "")[1:]] == [
        (left, top, left + 2, top + 2) for top in (0, 1) for left in (0, 2, 3)
    ]


def test_fixed_views_come_first_and_crops_are_drawn_by_their_place_in_the_list() -> None:
    specs = ["whole", "crop-0.5", "flip", "crop-0.5", "windows-1-1"]
    made = make_views(specs, (64, 96), digest_of("image"))
    assert made[:4] == [make_view(spec, number, (64, 96), digest_of("image")) for number, spec in enumerate(specs[:4])]
    assert made[1] != made[3]
    assert [view.box for view in made[4:]] == [(0, 0, 64, 64), (32, 0, 96, 64)]


@pytest.mark.parametrize(("size", "spec"), [((1, 5000), "windows-1-1"), ((1000, 1000), "windows-0.1-0.01")])
def test_an_image_of_too_many_windows_is_named_by_its_size(size: Size, spec: str) -> None:
    with pytest.raises(UsageError, match=rf"an image of {size[0]} x {size[1]} pixels .* has \d+ windows of {spec}"):
        make_views(["whole", spec], size, "")
    assert len(make_views(["whole", "windows-1-1"], (1, MAX_WINDOWS), "")) == 1 + MAX_WINDOWS


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
        *"windows windows- windows-1 windows-1-0.5+flip windows-1-0.5-0.5 windows-1--1 windows-.5-.5".split(),
    ],
)
def test_an_unknown_view_is_refused_with_the_remedy(spec: str) -> None:
    remedy = r"unknown view .*: a view is whole, flip, scale-S or crop-S .*, or windows-A-B .*, which comes last\."
    with pytest.raises(UsageError, match=remedy) as caught:
        check_views(["whole", spec])
    assert repr(spec) in str(caught.value)


@pytest.mark.parametrize("spec", ["scale-0", "scale-0.09", "scale-10.1", "crop-0", "crop-1.1", "crop-20"])
def test_a_view_out_of_range_is_refused_with_the_range(spec: str) -> None:
    with pytest.raises(UsageError, match=r"scales go from 0\.1 to 10, crops from 0\.1 to 1\."):
        make_view(spec, 1, (8, 8), "")


@pytest.mark.parametrize(
    "spec", ["windows-0-0", "windows-1-0", "windows-0.09-0.05", "windows-1.1-0.5", "windows-0.5-0.6", "windows-2-1"]
)
def test_windows_out_of_range_are_refused_with_the_range(spec: str) -> None:
    sentence = rf"view '{spec}' is out of range: sides go from 0\.1 to 1, steps from above 0 to the side\."
    with pytest.raises(UsageError, match=sentence):
        check_views(["whole", spec])


@pytest.mark.parametrize("specs", [["whole", "windows-1-1", "flip"], ["whole", "windows-1-1", "windows-1-0.5"]])
def test_windows_come_once_and_last(specs: Sequence[str]) -> None:
    with pytest.raises(UsageError, match=r"view windows-1-1 is not the last: name windows once, behind"):
        check_views(specs)


@pytest.mark.parametrize("specs", [[], ["flip"], ["crop-1"], ["windows-1-1"], ["flip", "whole"]])
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
    check_views(["whole", "windows-0.1-0.1"])
    check_views(["whole", "flip", "crop-0.8", "windows-1-0.25"])
