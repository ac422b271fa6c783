from __future__ import annotations

import numpy as np
import pytest

from cache_schema.errors import UsageError
from cache_schema.masks import empty_mask, encode_mask
from evaluate.baselines import BASELINES, centre_prior, score_baselines

# pycocotools' decoder has not learnt NumPy 2's copy keyword; it returns the right mask.

SIZE = (40, 60)


def box(top, bottom, left, right, size=SIZE):
    mask = np.zeros(size, np.bool_)
    mask[top:bottom, left:right] = True
    return encode_mask(mask), size


NOTHING = (empty_mask(SIZE), SIZE)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 5), (40, 60), (427, 640)])
@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_is_a_mask_of_the_images_size(name, size):
    mask = BASELINES[name](size)
    assert mask.shape == size
    assert mask.dtype == np.bool_


def test_the_centre_prior_is_a_quarter_of_an_even_image_and_sits_in_the_middle():
    mask = centre_prior((40, 60))
    assert mask.mean() == 0.25
    assert np.array_equal(mask, mask[::-1, ::-1])
    assert mask[10:30, 15:45].all()


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (5, 7), (6, 9)])
def test_the_centre_prior_marks_something_even_on_tiny_images(size):
    assert centre_prior(size).any()


def test_all_empty_is_right_about_no_targets_and_nothing_else():
    metrics = score_baselines([NOTHING, box(0, 20, 0, 30)], [True, False])["all_empty"]
    assert metrics["mean_iou"] == 0.5
    assert metrics["overall_iou"] == 0
    assert (metrics["n_acc"], metrics["t_acc"]) == (1, 0)
    assert metrics["giou"] == 0.5


def test_all_full_scores_the_share_of_the_image_that_the_truth_covers():
    metrics = score_baselines([NOTHING, box(0, 20, 0, 30)], [True, False])["all_full"]
    assert metrics["mean_iou"] == pytest.approx(0.25 / 2)
    assert metrics["overall_iou"] == pytest.approx(0.25 / 2)
    assert metrics["recall"] == 1
    assert (metrics["n_acc"], metrics["t_acc"]) == (0, 1)


def test_the_centre_prior_is_perfect_on_the_central_box():
    assert score_baselines([box(10, 30, 15, 45)], [False])["centre_prior"]["mean_iou"] == 1


def test_the_centre_of_a_tiny_image_is_under_fifty_pixels_and_so_says_no_target():
    metrics = score_baselines([box(3, 9, 3, 9, size=(12, 12))], [False])["centre_prior"]
    assert metrics["mean_iou"] == 1
    assert metrics["t_acc"] == 0


def test_targets_are_taken_from_a_stream():
    targets = (box(row, row + 5, 0, 30) for row in range(10))
    metrics = score_baselines(targets, (False for _ in range(10)))
    assert set(metrics) == set(BASELINES)
    assert {values["num_samples"] for values in metrics.values()} == {10}


def test_a_missing_flag_is_noticed():
    with pytest.raises(ValueError, match="shorter"):
        score_baselines([NOTHING, NOTHING], [True])


def test_no_target_at_all_is_the_users_mistake():
    with pytest.raises(UsageError, match="no sample to score"):
        score_baselines([], [])
