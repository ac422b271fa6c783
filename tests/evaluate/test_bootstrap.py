"""Intervals and paired differences, against replicates that are put together sample by sample."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluate.bootstrap import Bootstrap, bootstrap_intervals, paired_differences
from evaluate.metrics import SampleScores, compute, score_counts
from evaluate.protocols import ORIGINAL_SIZE

FEW = Bootstrap(num_replicates=40, level=0.8, seed=5)


def make_scores(seed, num, *, num_absent=0):
    rng = np.random.default_rng(seed)
    no_target = np.arange(num) < num_absent
    target = np.where(no_target, 0, rng.integers(60, 4000, num))
    predicted = rng.integers(0, 4000, num)
    both = (np.minimum(predicted, target) * rng.random(num)).astype(np.int64)
    return score_counts(
        both,
        predicted,
        target,
        area_px=target,
        no_target=no_target,
        predicted_no_target=None,
        protocol=ORIGINAL_SIZE,
    )


def images_of(seed, num, num_images):
    return np.random.default_rng([seed, 1]).integers(num_images, size=num) + 100


def put_together(scores, image_rows, drawn):
    """The scores of the samples of some images, one image after the other, as often as each was drawn."""
    images = np.unique(image_rows)
    return SampleScores.concatenate([scores.take(np.flatnonzero(image_rows == images[place])) for place in drawn])


@pytest.mark.parametrize("num_absent", [0, 9])
def test_an_interval_is_between_percentiles_of_metrics_over_drawn_images(num_absent):
    scores, image_rows = make_scores(0, 31, num_absent=num_absent), images_of(0, 31, 7)
    num_images = len(np.unique(image_rows))
    drawn = np.random.default_rng(FEW.seed).integers(num_images, size=(FEW.num_replicates, num_images))
    replicates = [compute((put_together(scores, image_rows, places),)) for places in drawn]
    found = bootstrap_intervals(scores, image_rows, FEW)
    assert found.keys() == replicates[0].keys() - {"num_samples"}
    for name, interval in found.items():
        values = [replicate[name] for replicate in replicates if replicate[name] is not None]
        if not values:
            assert interval is None
            continue
        assert interval == pytest.approx((np.percentile(values, 10), np.percentile(values, 90)), abs=1e-12)
    assert (found["n_acc"] is None) == (num_absent == 0)


def test_a_difference_is_paired_by_image_and_its_interval_that_of_the_same_replicates():
    first, second, image_rows = make_scores(1, 25), make_scores(2, 25), images_of(1, 25, 6)
    num_images = len(np.unique(image_rows))
    drawn = np.random.default_rng(FEW.seed).integers(num_images, size=(FEW.num_replicates, num_images))
    found = paired_differences(first, second, image_rows, FEW)
    for name, difference in found.items():
        one, other = compute((first,))[name], compute((second,))[name]
        assert (difference.first, difference.second) == (one, other)
        if one is None:
            assert (difference.difference, difference.interval, difference.p_value) == (None, None, None)
            continue
        assert difference.difference == other - one
        values = [
            compute((put_together(second, image_rows, places),))[name]
            - compute((put_together(first, image_rows, places),))[name]
            for places in drawn
        ]
        assert difference.interval == pytest.approx((np.percentile(values, 10), np.percentile(values, 90)), abs=1e-12)


def test_p_is_the_share_of_all_exchanges_that_differ_as_much():
    """Against all 2^8 exchanges of two runs on eight images, which many random ones come near."""
    first, second, image_rows = make_scores(3, 20), make_scores(4, 20), np.arange(20) % 8
    found = paired_differences(first, second, image_rows, Bootstrap(num_replicates=20_000))
    for name in ("mean_iou", "overall_iou", "dice", "p_at_0.5"):
        observed = abs(compute((second,))[name] - compute((first,))[name])
        differences = []
        for exchange in itertools.product((False, True), repeat=8):
            exchanged = np.array(exchange)[image_rows]
            mixed = [
                SampleScores(
                    **{
                        column: np.where(exchanged, getattr(theirs, column), getattr(ours, column))
                        for column in SampleScores.__slots__
                    }
                )
                for ours, theirs in ((first, second), (second, first))
            ]
            differences.append(abs(compute((mixed[1],))[name] - compute((mixed[0],))[name]))
        exact = np.mean(np.array(differences) >= observed - 1e-12)
        assert found[name].p_value == pytest.approx(exact, abs=0.02)


def test_equal_runs_differ_by_nothing_for_sure():
    scores, image_rows = make_scores(5, 30, num_absent=4), images_of(5, 30, 9)
    for difference in paired_differences(scores, scores, image_rows).values():
        assert (difference.difference, difference.interval) == (0.0, (0.0, 0.0))
        assert difference.p_value in (None, 1.0)


def test_a_run_that_is_better_on_every_image_is_told_apart_and_its_mirror_image_likewise():
    truth = np.full(40, 100)
    worse, better = (
        score_counts(
            np.full(40, both) + np.arange(40) % 7,
            np.full(40, 100),
            truth,
            area_px=truth,
            no_target=np.zeros(40, np.bool_),
            predicted_no_target=None,
            protocol=ORIGINAL_SIZE,
        )
        for both in (40, 60)
    )
    there = paired_differences(worse, better, np.arange(40))["mean_iou"]
    back = paired_differences(better, worse, np.arange(40))["mean_iou"]
    assert there.interval[0] > 0
    assert there.p_value == pytest.approx(1 / 1001)
    assert (back.difference, back.p_value) == (-there.difference, there.p_value)
    assert back.interval == pytest.approx((-there.interval[1], -there.interval[0]), abs=1e-12)


def test_samples_of_one_image_do_not_pass_for_independent_ones():
    """Every sample thrice in its image is no new knowledge; thrice as an image of its own would seem to be some."""
    scores, image_rows = make_scores(6, 60), np.arange(60)
    thrice = SampleScores.concatenate([scores] * 3)
    once = bootstrap_intervals(scores, image_rows)["mean_iou"]
    same_images = bootstrap_intervals(thrice, np.tile(image_rows, 3))["mean_iou"]
    as_if_other = bootstrap_intervals(thrice, np.arange(180))["mean_iou"]
    assert same_images == pytest.approx(once, abs=1e-12)
    assert as_if_other[1] - as_if_other[0] < 0.8 * (once[1] - once[0])


def test_one_image_says_nothing_about_others():
    first, second = make_scores(7, 8), make_scores(8, 8)
    image_rows = np.zeros(8, np.int64)
    assert set(bootstrap_intervals(first, image_rows).values()) == {None}
    found = paired_differences(first, second, image_rows)["mean_iou"]
    assert found.difference == compute((second,))["mean_iou"] - compute((first,))["mean_iou"]
    assert (found.interval, found.p_value) == (None, None)


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(24)))
def test_the_order_of_the_samples_never_changes_a_result(order):
    first, second = make_scores(9, 24, num_absent=5), make_scores(10, 24, num_absent=5)
    image_rows, places = images_of(9, 24, 6), np.array(order)
    assert bootstrap_intervals(first.take(places), image_rows[places], FEW) == bootstrap_intervals(
        first, image_rows, FEW
    )
    assert paired_differences(first.take(places), second.take(places), image_rows[places], FEW) == paired_differences(
        first, second, image_rows, FEW
    )


def test_many_replicates_are_drawn_in_blocks_and_another_seed_draws_others(monkeypatch):
    scores, image_rows = make_scores(11, 40), images_of(11, 40, 12)
    whole = bootstrap_intervals(scores, image_rows, FEW)
    monkeypatch.setattr("evaluate.bootstrap._BLOCK_VALUES", 100)
    assert bootstrap_intervals(scores, image_rows, FEW) == whole
    assert bootstrap_intervals(scores, image_rows, Bootstrap(40, 0.8, seed=6)) != whole
