"""Masks survive compression, and nothing that pycocotools would crash on reaches it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from cache_schema.masks import decode_mask, empty_mask, encode_mask, union_of_segmentations

H, W = 12, 20
MASKS = hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12))
SMALL_MASKS = hnp.arrays(np.bool_, (H, W))


def box(x0: int, y0: int, x1: int, y1: int) -> NDArray[np.bool_]:
    mask = np.zeros((H, W), np.bool_)
    mask[y0:y1, x0:x1] = True
    return mask


def polygon(x0: float, y0: float, x1: float, y1: float) -> list[float]:
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def runs_of(mask: NDArray[np.bool_]) -> list[int]:
    """COCO's uncompressed counts: lengths of alternating runs, down the columns, of zeros first."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat.astype(np.int8))) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return [0, *runs] if flat[0] else runs


def run_lengths(counts: Any, size: Any = (H, W)) -> dict[str, Any]:
    return {"size": list(size), "counts": counts}


@given(MASKS)
def test_a_mask_comes_back_as_it_was(mask: NDArray[np.bool_]) -> None:
    decoded = decode_mask(encode_mask(mask), mask.shape)
    assert decoded.dtype == np.bool_
    np.testing.assert_array_equal(decoded, mask)


def test_a_mask_may_lie_in_memory_in_any_order() -> None:
    mask = box(3, 1, 9, 8)
    wide = np.zeros((H, 2 * W), np.bool_)
    wide[:, ::2] = mask
    assert encode_mask(np.asfortranarray(mask)) == encode_mask(wide[:, ::2]) == encode_mask(mask)


@given(MASKS)
def test_counts_are_those_of_coco(mask: NDArray[np.bool_]) -> None:
    height, width = mask.shape
    uncompressed = {"size": [height, width], "counts": runs_of(mask)}
    assert encode_mask(mask) == coco_mask.frPyObjects(uncompressed, height, width)["counts"]


@pytest.mark.parametrize("shape", [(4,), (1, 4, 4)])
def test_what_is_not_height_by_width_is_no_mask(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"a mask is \(H, W\)"):
        encode_mask(np.zeros(shape, np.bool_))


def test_the_empty_mask_has_the_size_and_no_pixel() -> None:
    np.testing.assert_array_equal(decode_mask(empty_mask((H, W)), (H, W)), np.zeros((H, W), np.bool_))


@given(st.lists(SMALL_MASKS, max_size=4))
def test_a_union_counts_pixels_that_are_covered_twice_once(masks: list[NDArray[np.bool_]]) -> None:
    forms = [encode_mask, lambda mask: encode_mask(mask).decode(), runs_of]
    fields = [run_lengths(forms[number % 3](mask)) for number, mask in enumerate(masks)]
    union = decode_mask(union_of_segmentations(fields, (H, W)), (H, W))
    np.testing.assert_array_equal(union, np.any([np.zeros((H, W), np.bool_), *masks], axis=0))


def test_polygons_run_lengths_and_their_overlaps_are_joined() -> None:
    fields = [[polygon(2, 1, 8, 6), polygon(12, 2, 16, 4)], run_lengths(runs_of(box(6, 4, 10, 9)))]
    union = decode_mask(union_of_segmentations(fields, (H, W)), (H, W))
    np.testing.assert_array_equal(union, box(2, 1, 8, 6) | box(12, 2, 16, 4) | box(6, 4, 10, 9))


def test_a_polygon_is_clamped_to_the_image() -> None:
    union = decode_mask(union_of_segmentations([[polygon(-5, -5, 4, W + 4)]], (H, W)), (H, W))
    np.testing.assert_array_equal(union, box(0, 0, 4, H))


FAR = 2 * max(H, W)


@pytest.mark.parametrize(
    ("segmentation", "complaint"),
    [
        (None, "list of polygons or run lengths"),
        ([], "list of polygons or run lengths"),
        ("counts", "list of polygons or run lengths"),
        (b"counts", "list of polygons or run lengths"),
        (7, "list of polygons or run lengths"),
        ([1.0, 1.0, 5.0, 1.0, 5.0, 5.0], "must be a list of numbers"),
        (["112233"], "must be a list of numbers"),
        ([[1, 1, 5, 1, "5", 5]], "must be a list of numbers"),
        ([[1, 1, 5, 1, None, 5]], "must be a list of numbers"),
        ([[1, 1, 5, 1, True, 5]], "must be a list of numbers"),
        ([[]], "at least three x, y pairs"),
        ([[1, 1, 5, 1]], "at least three x, y pairs"),
        ([[1, 1, 5, 1, 5, 5, 9]], "at least three x, y pairs"),
        ([[1, 1, FAR + 1, 1, 5, 5]], "far outside the image of 12 x 20 pixels"),
        ([[1, 1, 5, -1e300, 5, 5]], "far outside"),
        ([[1, 1, 5, 10**400, 5, 5]], "far outside"),
        ([[1, 1, float("nan"), 1, 5, 5]], "far outside"),
        ([[1, 1, float("inf"), 1, 5, 5]], "far outside"),
        ({}, "must hold 'counts' and 'size'"),
        ({"counts": [H * W]}, "must hold 'counts' and 'size'"),
        ({"size": [H, W], "counts": None}, "must hold 'counts' and 'size'"),
        ({"size": H * W, "counts": [H * W]}, "must hold 'counts' and 'size'"),
        (run_lengths([H * W], (W, H)), r"the image's size \[12, 20\]"),
        (run_lengths([H * W - 1]), "add up to the image's pixels"),
        (run_lengths([H * W, 1]), "add up to the image's pixels"),
        (run_lengths([]), "add up to the image's pixels"),
        (run_lengths([-1, H * W + 1]), "whole numbers"),
        (run_lengths([float(H * W)]), "whole numbers"),
        (run_lengths([True, H * W - 1]), "whole numbers"),
        (run_lengths(["1", H * W - 1]), "whole numbers"),
        (run_lengths(""), "add up to the image's pixels"),
        (run_lengths("\x7f"), "hold the character"),
        (run_lengths(" "), "hold the character"),
        (run_lengths("o"), "cut short"),
        (run_lengths(encode_mask(box(1, 1, 4, 4))[:-1]), "cut short|add up"),
        (run_lengths("é".encode()), "ascii"),
    ],
)
def test_a_segmentation_that_would_crash_the_library_is_refused(segmentation: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        union_of_segmentations([segmentation], (H, W))


def assert_drawn_as_coco_draws_them_or_refused(counts: str) -> None:
    try:
        union = union_of_segmentations([run_lengths(counts)], (H, W))
    except ValueError:
        return
    expected = coco_mask.decode(run_lengths(counts.encode()))
    np.testing.assert_array_equal(decode_mask(union, (H, W)), expected)


@given(st.text(alphabet=[chr(code) for code in range(46, 114)], max_size=12))
def test_any_compressed_counts_are_drawn_as_coco_draws_them_or_refused(counts: str) -> None:
    assert_drawn_as_coco_draws_them_or_refused(counts)


@given(SMALL_MASKS, st.data())
def test_compressed_counts_with_a_lost_or_changed_character_are_too(
    mask: NDArray[np.bool_], data: st.DataObject
) -> None:
    counts = encode_mask(mask).decode()
    place = data.draw(st.integers(0, len(counts) - 1))
    changed = data.draw(st.sampled_from(["", "0", "1", "O", "P", "o"]))
    assert_drawn_as_coco_draws_them_or_refused(counts[:place] + changed + counts[place + 1 :])
