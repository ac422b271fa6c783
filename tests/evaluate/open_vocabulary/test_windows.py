"""Sliding windows: where they lie, what they show, and that putting them together again is the plain mean."""

from __future__ import annotations

import json
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cache_schema.errors import UsageError
from cache_schema.views import PADDING_RGB, average_views, make_views
from evaluate.open_vocabulary.windows import SlidingWindow, Windows

SIDES = st.integers(1, 90)


@st.composite
def slides(draw):
    window = draw(st.integers(1, 24))
    short = draw(st.integers(1, 30))
    return SlidingWindow(short, draw(st.integers(short, 80)), window, draw(st.integers(1, window)))


def random_scores(plan, num_classes=3, grid=(4, 4), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((len(plan), num_classes, *grid), generator=generator, dtype=torch.float64).to(dtype)


def test_the_short_side_becomes_448_and_windows_slide_along_the_long_one():
    plan = SlidingWindow().plan((375, 500))

    assert plan.size == (448, 597)
    assert plan.boxes == ((0, 0, 448, 448), (149, 0, 597, 448))
    assert len(plan) == 2


@pytest.mark.parametrize(
    ("original", "size", "num_windows"),
    [
        ((448, 448), (448, 448), 1),
        ((1024, 2048), (448, 896), 3),
        ((500, 375), (597, 448), 2),
        ((10, 10), (448, 448), 1),
        ((448, 449), (448, 449), 2),
        ((448, 672), (448, 672), 2),
        ((448, 673), (448, 673), 3),
        ((333, 500), (448, 673), 3),
        ((100, 1000), (205, 2048), 9),  # the long side is reached first: lower than a window
        ((1, 100_000), (1, 2048), 9),
    ],
)
def test_sizes_and_numbers_of_windows_at_the_benchmarks_settings(original, size, num_windows):
    for given_, wanted in ((original, size), (original[::-1], size[::-1])):
        plan = SlidingWindow().plan(given_)
        assert plan.size == wanted
        assert len(plan) == num_windows


def starts(length, window, stride):
    """The rule of sliding inference, step by step: go on until the edge is reached, and shift what passes it back."""
    found, start = [], 0
    while start + window < length:
        found.append(start)
        start += stride
    return [*found, max(0, length - window)]


@settings(max_examples=100, deadline=None)
@given(slides(), SIDES, SIDES)
def test_windows_lie_inside_step_by_step_and_cover_every_pixel(slide, height, width):
    plan = slide.plan((height, width))
    covered = np.zeros(plan.size, bool)
    window = slide.window_px
    for left, top, right, bottom in plan.boxes:
        assert (right - left, bottom - top) == (window, window)
        assert 0 <= left <= max(0, plan.size[1] - window)
        assert 0 <= top <= max(0, plan.size[0] - window)
        covered[top:bottom, left:right] = True

    assert covered.all()
    assert len(set(plan.boxes)) == len(plan)
    rows, columns = (starts(length, window, slide.stride_px) for length in plan.size)
    assert [(left, top) for left, top, _, _ in plan.boxes] == [(left, top) for top in rows for left in columns]


@settings(max_examples=100, deadline=None)
@given(slides(), SIDES, SIDES)
def test_one_side_is_the_one_asked_for_and_the_shape_is_kept_to_the_nearest_pixel(slide, height, width):
    size = slide.plan((height, width)).size
    scale = min(slide.short_side_px / min(height, width), slide.long_side_px / max(height, width))

    assert min(size) == slide.short_side_px or max(size) == slide.long_side_px
    assert max(size) <= max(slide.long_side_px, 1)
    for resized, length in zip(size, (height, width), strict=True):
        assert abs(resized - max(1, length * scale)) <= 0.5 + 1e-9


def test_crops_show_the_pixels_of_the_resized_image_in_batches():
    image = np.random.default_rng(0).integers(0, 256, (30, 47, 3), dtype=np.uint8)
    plan = SlidingWindow(20, 100, 16, 5).plan((30, 47))
    resized = plan.resize(image)
    batches = list(plan.crops(resized, 3))

    assert np.array_equal(resized, Image.fromarray(image).resize((plan.size[1], 20), Image.Resampling.BILINEAR))
    assert [len(batch) for batch in batches] == [3] * (len(plan) // 3) + ([len(plan) % 3] if len(plan) % 3 else [])
    for box, crop in zip(plan.boxes, np.concatenate(batches), strict=True):
        left, top, right, bottom = box
        assert np.array_equal(crop, resized[top:bottom, left:right])


def test_an_image_smaller_than_a_window_is_padded_at_its_end_and_what_is_said_there_is_dropped():
    plan = SlidingWindow(6, 12, 10, 5).plan((6, 12))
    resized = np.full((6, 12, 3), 7, np.uint8)
    (crops,) = plan.crops(resized, 8)

    assert plan.boxes == ((0, 0, 10, 10), (2, 0, 12, 10))
    assert crops.shape == (2, 10, 10, 3)
    assert (crops[:, :6] == 7).all()
    assert (crops[:, 6:] == PADDING_RGB).all()

    scores = torch.zeros(2, 1, 10, 10)
    scores[:, :, 6:] = 1
    assert not plan.merge([scores], align_corners=True).any()


@pytest.mark.parametrize("align_corners", [True, False])
@settings(max_examples=40, deadline=None)
@given(slides(), SIDES, SIDES, st.integers(1, 4), st.tuples(st.integers(1, 6), st.integers(1, 6)), st.integers(0, 99))
def test_merging_is_the_mean_over_the_windows_of_each_pixel(
    align_corners, slide, height, width, num_classes, grid, seed
):
    plan = slide.plan((height, width))
    scores = random_scores(plan, num_classes, grid, seed)
    window = slide.window_px
    total, count = np.zeros((num_classes, *plan.size)), np.zeros(plan.size)
    for (left, top, _, _), said in zip(plan.boxes, scores.numpy(), strict=True):
        for row in range(top, min(top + window, plan.size[0])):
            for column in range(left, min(left + window, plan.size[1])):
                total[:, row, column] += bilinear(said, row - top, column - left, window, align_corners)
                count[row, column] += 1
    expected = total / count

    np.testing.assert_allclose(plan.merge([scores], align_corners=align_corners).numpy(), expected, rtol=0, atol=1e-12)


def bilinear(values, row, column, side, align_corners):
    """(c, gh, gw) values at a pixel of a square over which they lie: corner on corner, or as cells, edge on edge."""
    if align_corners:
        places = [
            place * (length - 1) / (side - 1) if side > 1 else 0
            for place, length in zip((row, column), values.shape[1:], strict=True)
        ]
    else:
        places = [
            min(max((place + 0.5) * length / side - 0.5, 0), length - 1)
            for place, length in zip((row, column), values.shape[1:], strict=True)
        ]
    (top, left), ends = (int(place) for place in places), values.shape[1:]
    below, right = min(top + 1, ends[0] - 1), min(left + 1, ends[1] - 1)
    down, across = places[0] - top, places[1] - left
    upper = (1 - across) * values[:, top, left] + across * values[:, top, right]
    lower = (1 - across) * values[:, below, left] + across * values[:, below, right]
    return (1 - down) * upper + down * lower


@settings(max_examples=40, deadline=None)
@given(slides(), SIDES, SIDES, st.floats(-100, 100))
def test_what_is_the_same_everywhere_stays_the_same(slide, height, width, value):
    plan = slide.plan((height, width))
    scores = torch.full((len(plan), 2, 3, 3), value, dtype=torch.float64)
    merged = plan.merge([scores], align_corners=True)

    torch.testing.assert_close(merged, torch.full_like(merged, value), rtol=0, atol=1e-12)
    original = plan.to_original(merged)
    assert original.shape == (2, height, width)
    torch.testing.assert_close(original, torch.full_like(original, value), rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(slides(), SIDES, SIDES, st.integers(1, 7))
def test_how_windows_are_cut_into_batches_changes_nothing(slide, height, width, batch_size):
    plan = slide.plan((height, width))
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    resized = plan.resize(image)
    scores = random_scores(plan, dtype=torch.float32)

    assert np.array_equal(
        np.concatenate(list(plan.crops(resized, batch_size))), np.concatenate(list(plan.crops(resized, len(plan))))
    )
    assert torch.equal(
        plan.merge(scores.split(batch_size), align_corners=True), plan.merge([scores], align_corners=True)
    )


def test_merging_takes_one_batch_after_the_other():
    plan = SlidingWindow(20, 100, 10, 5).plan((20, 60))
    scores = random_scores(plan)
    alive: list[weakref.ref[torch.Tensor]] = []

    def batches():
        for number in range(len(plan)):
            batch = scores[number : number + 1].clone()
            alive.append(weakref.ref(batch))
            yield batch
            del batch
            assert sum(reference() is not None for reference in alive) <= 1, "batches are kept"

    assert torch.equal(plan.merge(batches(), align_corners=True), plan.merge([scores], align_corners=True))
    assert len(alive) == len(plan)


def test_half_precision_is_added_up_in_float32():
    plan = SlidingWindow(20, 100, 10, 2).plan((20, 60))
    scores = random_scores(plan, dtype=torch.float16)
    merged = plan.merge([scores], align_corners=True)

    assert merged.dtype == torch.float32
    assert torch.equal(merged, plan.merge([scores.float()], align_corners=True))


@pytest.mark.parametrize("change", [-1, 1])
def test_scores_for_another_number_of_windows_are_refused(change):
    plan = SlidingWindow(20, 100, 10, 5).plan((20, 60))
    scores = torch.zeros(len(plan) + change, 2, 3, 3)
    with pytest.raises(ValueError, match="scores of"):
        plan.merge([scores], align_corners=True)


def test_the_cached_windows_of_an_image_are_merged_as_elsewhere():
    """Windows that were cut from the image at its own size, as views of a store are: `average_views` is the oracle."""
    size = (30, 71)
    views = make_views(["windows-0.8-0.3"], size, "")
    plan = Windows(size, size, tuple(view.box for view in views))
    scores = random_scores(plan, grid=(5, 5))
    at_size = [
        F.interpolate(said[None], view.size, mode="bilinear", align_corners=True)[0].numpy()
        for view, said in zip(views, scores, strict=True)
    ]

    merged = plan.merge([scores], align_corners=True)
    np.testing.assert_allclose(merged.numpy(), average_views(views, at_size, size), rtol=0, atol=1e-12)
    assert torch.equal(plan.to_original(merged), merged)


def test_back_to_the_original_size_is_bilinear_between_centres():
    plan = Windows((1, 4), (1, 2), ((0, 0, 2, 1),))
    assert plan.to_original(torch.tensor([[[0.0, 1.0]]])).tolist() == [[[0, 0.25, 0.75, 1]]]


@pytest.mark.parametrize("num_classes", [1, 15, 16, 17, 50])
def test_labels_are_the_argmax_at_the_original_size(num_classes):
    plan = SlidingWindow(20, 100, 10, 5).plan((33, 60))
    merged = plan.merge([random_scores(plan, num_classes, dtype=torch.float32)], align_corners=True)
    labels = plan.labels(merged)

    assert labels.shape == (33, 60)
    assert torch.equal(labels, plan.to_original(merged).argmax(0))


def test_of_equal_scores_the_first_class_is_taken():
    plan = SlidingWindow(20, 100, 10, 5).plan((20, 20))
    scores = torch.zeros(40, 20, 20)
    scores[[3, 5, 20, 39]] = 1
    assert (plan.labels(scores) == 3).all()


@pytest.mark.parametrize("call", ["resize", "crops"])
def test_an_image_of_another_size_is_refused(call):
    plan = SlidingWindow(20, 100, 10, 5).plan((30, 40))
    with pytest.raises(ValueError, match="windows"):
        list(getattr(plan, call)(np.zeros((40, 30, 3), np.uint8), *([2] if call == "crops" else [])))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stride_px": 449}, "448 px that are 449 px apart leave gaps"),
        ({"stride_px": 0}, "stride_px is 0"),
        ({"window_px": 0}, "window_px is 0"),
        ({"short_side_px": 0}, "short_side_px is 0"),
        ({"long_side_px": 447}, "long_side_px is 447: give a whole number of at least 448"),
    ],
)
def test_settings_that_do_not_cover_an_image_are_the_users_mistake(wrong, message):
    with pytest.raises(UsageError, match=message):
        SlidingWindow(**wrong)


def test_its_numbers_are_written_beside_the_scores():
    protocol = SlidingWindow().to_dict()
    assert json.loads(json.dumps(protocol)) == {
        "short_side_px": 448,
        "long_side_px": 2048,
        "window_px": 448,
        "stride_px": 224,
        "resize": "pillow bilinear",
    }
