from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from torchmetrics.classification import BinaryF1Score, BinaryJaccardIndex

from cache_schema.errors import UsageError
from evaluate.metrics import (
    SampleScores,
    compute,
    metric_ratios,
    object_size,
    prompt_length,
    score_counts,
    score_mask,
    slice_metrics,
    sort_values,
    standard_tags,
    update,
)
from evaluate.protocols import ORIGINAL_SIZE, Protocol


def mask_of(start, stop, size=(10, 100)):
    """A (H, W) mask whose pixels start to stop, counted row by row, are marked."""
    mask = np.zeros(size, np.bool_)
    mask.flat[start:stop] = True
    return mask


def sample(predicted, truth, **options):
    return score_mask(mask_of(*predicted), mask_of(*truth), **options)


def no_target(predicted_px):
    return sample((0, predicted_px), (0, 0), no_target=True)


HIT = sample((0, 100), (0, 100))
HALF = sample((0, 100), (0, 200))
MISS = sample((0, 100), (100, 400))
TARGET_TAKEN_FOR_NONE = sample((0, 20), (0, 100))
NO_TARGET_RECOGNISED = no_target(30)
NO_TARGET_MARKED = no_target(80)


class TestCounts:
    def test_one_sample_is_counted_in_pixels(self):
        scores = sample((0, 100), (50, 250))

        assert scores.intersection_px.tolist() == [50]
        assert scores.union_px.tolist() == [250]
        assert scores.predicted_px.tolist() == [100]
        assert scores.target_px.tolist() == [200]
        assert scores.iou.tolist() == [0.2]

    def test_an_empty_prediction_of_an_empty_truth_is_iou_one(self):
        assert no_target(0).iou.tolist() == [1.0]

    def test_iou_equals_the_one_of_pycocotools_on_random_masks(self):
        rng = np.random.default_rng(0)
        for _ in range(50):
            predicted, truth = rng.random((2, 17, 23)) < rng.random((2, 1, 1))
            encoded = [coco_mask.encode(np.asfortranarray(mask, np.uint8)) for mask in (predicted, truth)]
            oracle = coco_mask.iou(encoded[:1], encoded[1:], [0])[0, 0]
            assert score_mask(predicted, truth).iou[0] == pytest.approx(oracle, abs=1e-12)

    @pytest.mark.parametrize(("predicted_px", "says_no_target"), [(0, True), (49, True), (50, False)])
    def test_fewer_than_fifty_pixels_say_no_target(self, predicted_px, says_no_target):
        assert no_target(predicted_px).predicted_no_target.tolist() == [says_no_target]

    def test_what_a_head_says_about_the_target_outranks_the_pixel_rule(self):
        assert sample((0, 500), (0, 500), predicted_no_target=True).predicted_no_target.all()
        assert not sample((0, 3), (0, 3), predicted_no_target=False).predicted_no_target.any()

    def test_torchmetrics_finds_the_same_iou_and_dice_in_each_sample(self):
        rng = np.random.default_rng(1)
        iou, dice = BinaryJaccardIndex(zero_division=1.0), BinaryF1Score(zero_division=1.0)
        for _ in range(40):
            predicted, truth = rng.random((2, 13, 9)) < rng.choice([0.0, 0.1, 0.5, 1.0], (2, 1, 1))
            pair = torch.from_numpy(predicted), torch.from_numpy(truth)
            scores = score_mask(predicted, truth)
            assert scores.iou[0] == pytest.approx(float(iou(*pair)), abs=1e-6)
            assert compute((scores,))["dice"] == pytest.approx(float(dice(*pair)), abs=1e-6)

    def test_counts_that_were_taken_elsewhere_are_scored_alike(self):
        masks = [(mask_of(*predicted), mask_of(*truth)) for predicted, truth in (((0, 70), (30, 90)), ((5, 9), (0, 0)))]
        counted = score_counts(
            np.array([np.count_nonzero(predicted & truth) for predicted, truth in masks]),
            np.array([np.count_nonzero(predicted) for predicted, _ in masks]),
            np.array([np.count_nonzero(truth) for _, truth in masks]),
            area_px=np.array([np.count_nonzero(truth) for _, truth in masks]),
            no_target=np.array([False, True]),
            predicted_no_target=None,
            protocol=ORIGINAL_SIZE,
        )
        scored = [score_mask(*pair, no_target=absent) for pair, absent in zip(masks, (False, True), strict=True)]
        assert compute((counted,)) == compute(tuple(scored))

    def test_the_pixel_rule_is_the_protocols(self):
        assert sample((0, 50), (0, 50), protocol=Protocol(no_target_px=51)).predicted_no_target.all()

    def test_masks_of_different_sizes_are_refused(self):
        with pytest.raises((ValueError, TypeError)):  # a runtime type checker may speak first
            score_mask(np.ones((4, 4), np.bool_), np.ones((4, 1), np.bool_))

    def test_a_no_target_truth_with_pixels_is_refused(self):
        with pytest.raises(ValueError, match="has no pixels, this one has 7"):
            sample((0, 0), (0, 7), no_target=True)

    def test_scores_can_be_joined_and_chosen_from(self):
        joined = SampleScores.concatenate([HIT, HALF, MISS])

        assert len(joined) == 3
        assert joined.select(np.array([True, False, True])).iou.tolist() == [1.0, 0.0]
        assert len(SampleScores.concatenate([])) == 0


class TestPixelMetrics:
    def test_means_weigh_samples_and_overall_weighs_pixels(self):
        metrics = compute((HIT, HALF, MISS))

        assert metrics["mean_iou"] == pytest.approx((1 + 0.5 + 0) / 3)
        assert metrics["overall_iou"] == pytest.approx((100 + 100) / (100 + 200 + 400))
        assert metrics["median_iou"] == 0.5
        assert metrics["dice"] == pytest.approx((1 + 200 / 300 + 0) / 3)
        assert metrics["precision"] == pytest.approx(200 / 300)
        assert metrics["recall"] == pytest.approx(200 / 600)
        assert metrics["num_samples"] == 3

    def test_the_median_of_an_even_number_of_samples_lies_between_the_middle_two(self):
        assert compute((HIT, HALF))["median_iou"] == 0.75

    @pytest.mark.parametrize("tenths", [5, 6, 7, 8, 9])
    def test_precision_at_k_counts_an_iou_of_exactly_k(self, tenths):
        exactly = compute((sample((0, 10 * tenths), (0, 100)),))
        just_below = compute((sample((0, 10 * tenths - 1), (0, 100)),))

        assert exactly[f"p_at_0.{tenths}"] == 1
        assert just_below[f"p_at_0.{tenths}"] == 0

    def test_empty_against_empty_is_perfect_in_every_per_sample_metric(self):
        metrics = compute((no_target(0),))

        assert [metrics[name] for name in ("mean_iou", "overall_iou", "median_iou", "dice", "p_at_0.9")] == [1] * 5

    def test_precision_does_not_apply_where_nothing_is_marked(self):
        metrics = compute((sample((0, 0), (0, 10)),))
        assert metrics["precision"] is None
        assert metrics["recall"] == 0

    def test_the_no_target_decision_plays_no_part(self):
        said_none, said_some = (sample((0, 90), (0, 100), predicted_no_target=said) for said in (True, False))
        ours = ("mean_iou", "overall_iou", "median_iou", "dice", "p_at_0.5", "precision", "recall")

        assert [compute((said_none,))[name] for name in ours] == [compute((said_some,))[name] for name in ours]

    def test_no_sample_at_all_is_the_users_mistake(self):
        with pytest.raises(UsageError, match="choose a split that has samples"):
            compute(())

    def test_every_value_is_a_plain_number(self):
        metrics = compute((HIT, HALF, NO_TARGET_MARKED))
        assert json.loads(json.dumps(metrics)) == metrics
        assert {type(value) for value in metrics.values()} == {float, int}


def gres(samples):
    """What GRES's own loop adds up, sample by sample: (intersection, union, no target, said none) in, metrics out."""
    union = intersection = 0
    ious, absent, present, hits = [], [], [], {7: [], 8: [], 9: []}
    for inter, both, no_target_truth, said_none in samples:
        if no_target_truth:
            absent.append(said_none)
            ious.append(1.0 if said_none else 0.0)
            union += 0 if said_none else both
            continue
        inter = 0 if said_none else inter
        present.append(not said_none)
        ious.append(inter / both)
        intersection += inter
        union += both
        for tenths, hit in hits.items():
            hit.append(10 * inter >= tenths * both)
    share = {name: np.mean(values) if values else None for name, values in (("n_acc", absent), ("t_acc", present))}
    return {
        "giou": np.mean(ious),
        "ciou": intersection / union if union else 1.0,
        **share,
        **{f"target_p_at_0.{tenths}": np.mean(hit) if hit else None for tenths, hit in hits.items()},
    }


class TestGeneralisedMetrics:
    """The four combinations of truth and decision, as gRefCOCO counts them."""

    @pytest.mark.parametrize("seed", range(20))
    def test_any_mixture_is_what_one_adds_up_sample_by_sample(self, seed):
        rng = np.random.default_rng(seed)
        scores, plain = [], []
        for _ in range(int(rng.integers(1, 25))):
            absent, said_none = rng.random(2) < 0.4
            start, length = rng.integers(0, 100, 2)
            target = (0, 0) if absent else (0, int(rng.integers(1, 150)))
            one = sample((int(start), int(start + length)), target, no_target=absent, predicted_no_target=said_none)
            scores.append(one)
            plain.append((int(one.intersection_px[0]), int(one.union_px[0]), absent, said_none))
        metrics, expected = compute(tuple(scores)), gres(plain)
        assert {name: metrics[name] for name in expected} == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("one", "expected"),
        [
            (NO_TARGET_RECOGNISED, {"giou": 1, "ciou": 1, "n_acc": 1, "t_acc": None, "target_p_at_0.7": None}),
            (NO_TARGET_MARKED, {"giou": 0, "ciou": 0, "n_acc": 0, "t_acc": None, "target_p_at_0.7": None}),
            (TARGET_TAKEN_FOR_NONE, {"giou": 0, "ciou": 0, "n_acc": None, "t_acc": 0, "target_p_at_0.7": 0}),
            (HALF, {"giou": 0.5, "ciou": 0.5, "n_acc": None, "t_acc": 1, "target_p_at_0.7": 0}),
            (HIT, {"giou": 1, "ciou": 1, "n_acc": None, "t_acc": 1, "target_p_at_0.7": 1}),
        ],
    )
    def test_each_combination_alone(self, one, expected):
        metrics = compute((one,))
        assert {name: metrics[name] for name in expected} == expected

    def test_a_recognised_no_target_scores_one_and_adds_no_pixels(self):
        metrics = compute((NO_TARGET_RECOGNISED, HALF))
        assert metrics["giou"] == pytest.approx((1 + 0.5) / 2)
        assert metrics["ciou"] == pytest.approx(100 / 200)
        assert (metrics["n_acc"], metrics["t_acc"]) == (1, 1)

    def test_a_mask_where_there_is_no_target_scores_zero_and_adds_its_pixels_to_the_union(self):
        metrics = compute((NO_TARGET_MARKED, HALF))
        assert metrics["giou"] == pytest.approx((0 + 0.5) / 2)
        assert metrics["ciou"] == pytest.approx(100 / (80 + 200))
        assert (metrics["n_acc"], metrics["t_acc"]) == (0, 1)

    def test_a_target_taken_for_none_scores_zero_but_keeps_its_union(self):
        metrics = compute((TARGET_TAKEN_FOR_NONE, HALF))
        assert metrics["giou"] == pytest.approx((0 + 0.5) / 2)
        assert metrics["ciou"] == pytest.approx(100 / (100 + 200))
        assert (metrics["n_acc"], metrics["t_acc"]) == (None, 0.5)

    def test_a_target_taken_for_a_target_scores_its_iou(self):
        metrics = compute((HIT, HALF))
        assert (metrics["giou"], metrics["ciou"]) == (metrics["mean_iou"], metrics["overall_iou"])
        assert metrics["t_acc"] == 1

    def test_all_four_together(self):
        metrics = compute((NO_TARGET_RECOGNISED, NO_TARGET_MARKED, TARGET_TAKEN_FOR_NONE, HALF))
        assert metrics["giou"] == pytest.approx((1 + 0 + 0 + 0.5) / 4)
        assert metrics["ciou"] == pytest.approx(100 / (0 + 80 + 100 + 200))
        assert (metrics["n_acc"], metrics["t_acc"]) == (0.5, 0.5)

    def test_the_union_of_a_target_taken_for_none_includes_what_was_predicted(self):
        stray = sample((0, 40), (100, 200))
        assert compute((stray, HIT))["ciou"] == pytest.approx(100 / (140 + 100))

    def test_precision_at_k_over_targets_leaves_the_no_targets_out(self):
        metrics = compute((HIT, HALF, NO_TARGET_RECOGNISED, NO_TARGET_MARKED))
        assert metrics["target_p_at_0.7"] == 0.5
        assert metrics["p_at_0.7"] == 0.25

    def test_a_target_taken_for_none_misses_every_k(self):
        unsure = sample((0, 100), (0, 100), predicted_no_target=True)
        assert compute((unsure, HIT))["target_p_at_0.9"] == 0.5

    def test_without_any_target_the_target_metrics_do_not_apply(self):
        metrics = compute((NO_TARGET_RECOGNISED,))
        assert (metrics["t_acc"], metrics["target_p_at_0.7"], metrics["ciou"]) == (None, None, 1.0)


@st.composite
def scored_samples(draw):
    scores = []
    for _ in range(draw(st.integers(1, 30))):
        absent = draw(st.booleans())
        start, stop = draw(st.integers(0, 200)), draw(st.integers(0, 400))
        scores.append(sample((start, stop), (0, 0 if absent else draw(st.integers(1, 300))), no_target=absent))
    return scores


@settings(max_examples=60, deadline=None)
@given(scores=scored_samples(), data=st.data())
def test_neither_order_nor_batch_split_ever_changes_a_result(scores, data):
    expected = compute((SampleScores.concatenate(scores),))
    shuffled = data.draw(st.permutations(scores))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(scores)), max_size=4)))

    state = ()
    for start, stop in zip([0, *cuts], [*cuts, len(scores)], strict=True):
        state = update(state, SampleScores.concatenate(shuffled[start:stop]))

    assert compute(state) == expected


def test_every_ratio_is_a_metric_and_only_the_median_is_none():
    scores = SampleScores.concatenate([HIT, HALF, MISS, NO_TARGET_MARKED])
    metrics = compute((scores,))
    assert metrics.keys() - metric_ratios(scores).keys() == {"median_iou", "num_samples"}
    for name, ratio in metric_ratios(scores).items():
        assert metrics[name] == pytest.approx(ratio.part.sum() / ratio.whole.sum())


def test_a_state_stays_short_however_many_samples_come_and_keeps_their_order():
    state = ()
    for predicted_px in range(300):
        state = update(state, sample((0, predicted_px), (0, 300)))

    assert len(state) < 10
    assert SampleScores.concatenate(state).predicted_px.tolist() == list(range(300))


def test_an_update_leaves_the_state_it_was_given_alone():
    before = update((), HIT)
    update(before, HALF)
    assert compute(before)["num_samples"] == 1


class TestSlices:
    def test_each_value_of_a_tag_gets_its_own_metrics(self):
        scores = SampleScores.concatenate([HIT, HALF, MISS])
        slices = slice_metrics(scores, {"kind": ["attribute", "relation", "relation"]})

        assert slices["kind"]["attribute"]["mean_iou"] == 1
        assert slices["kind"]["relation"]["mean_iou"] == 0.25
        assert slices["kind"]["relation"]["overall_iou"] == pytest.approx(100 / 600)
        assert slices["kind"]["relation"]["num_samples"] == 2

    def test_a_sample_without_a_value_is_in_no_slice(self):
        slices = slice_metrics(SampleScores.concatenate([HIT, HALF]), {"category": [None, "dog"]})
        assert list(slices["category"]) == ["dog"]
        assert slices["category"]["dog"]["num_samples"] == 1

    def test_a_tag_of_another_length_is_refused(self):
        with pytest.raises(ValueError, match="'kind' has 1 values for 2 samples"):
            slice_metrics(SampleScores.concatenate([HIT, HALF]), {"kind": ["attribute"]})

    @pytest.mark.parametrize(
        ("num_words", "bucket"),
        [(0, None), (1, "1-2"), (2, "1-2"), (3, "3-4"), (4, "3-4"), (5, "5-7"), (7, "5-7"), (8, "8+"), (40, "8+")],
    )
    def test_prompts_are_sorted_by_their_number_of_words(self, num_words, bucket):
        assert prompt_length(" ".join(["word"] * num_words)) == bucket

    @pytest.mark.parametrize(
        ("area", "bucket"),
        [(0, "none"), (1, "small"), (1023, "small"), (1024, "medium"), (9215, "medium"), (9216, "large")],
    )
    def test_objects_are_sorted_by_cocos_areas(self, area, bucket):
        assert object_size(area) == bucket

    def test_the_standard_tags_run_parallel_to_the_scores(self):
        scores = SampleScores.concatenate([HIT, NO_TARGET_RECOGNISED])
        shrunk = replace(scores, target_px=scores.target_px // 100)
        assert standard_tags(shrunk, ["", ""])["object_size"] == ["small", "none"], "sizes are those of the image"
        assert standard_tags(scores, ["dog", "the dog on the left"]) == {
            "prompt_length": ["1-2", "5-7"],
            "object_size": ["small", "none"],
        }

    def test_buckets_keep_their_natural_order_and_other_values_are_sorted(self):
        assert sort_values({"large", "none", "medium"}) == ["none", "medium", "large"]
        assert sort_values({"8+", "1-2"}) == ["1-2", "8+"]
        assert sort_values({"zebra", "large"}) == ["large", "zebra"]
