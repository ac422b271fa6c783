"""What the report computes for its plots, against slow plain counting."""

from __future__ import annotations

import re
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluate.report_calibration import NUM_BINS, calibrate, draw_calibration
from evaluate.report_lengths import MAX_LENGTHS, by_length, draw_lengths
from evaluate.report_pairs import Pair, count_both, draw_both, draw_differences

SHARES = st.floats(0, 1, allow_nan=False)


def random_ious(seed: int, num: int) -> np.ndarray:
    return np.random.default_rng(seed).random(num)


# Length of the prompt


def test_every_prompt_with_words_is_in_the_group_of_its_length() -> None:
    prompts = ["a b", "", "a", "a  b", "\n", "a b c d", "b"]
    groups = by_length(np.arange(7) / 10, prompts)
    assert [(group.label, group.iou.tolist()) for group in groups] == [
        ("1", [0.2, 0.6]),
        ("2", [0.0, 0.3]),
        ("4", [0.5]),
    ]
    assert [group.mean for group in groups] == pytest.approx([0.4, 0.15, 0.5])


def test_many_lengths_end_in_one_group_that_holds_the_rest() -> None:
    prompts = [" ".join("a" * length) for length in (*range(1, 40, 2), 3)]
    groups = by_length(random_ious(0, len(prompts)), prompts)
    assert len(groups) == MAX_LENGTHS
    assert [group.label for group in groups[-2:]] == ["25", "27+"]
    assert sum(len(group.iou) for group in groups) == len(prompts)
    assert len(groups[-1].iou) == len(range(27, 40, 2))


def test_few_samples_are_drawn_one_by_one_and_many_as_a_box() -> None:
    def rings(num: int) -> int:
        groups = by_length(np.linspace(0.1, 0.9, num), ["word"] * num)
        return len(
            re.findall(r"<use [^>]*fill-opacity: 0[^>]*stroke: #1f5fa8", draw_lengths("plot", "head", groups, 0))
        )

    assert rings(4) == 4
    assert rings(5) == 0


# Calibration


def naive_error(said: list[float], got: list[float]) -> float:
    error = 0.0
    for low in range(NUM_BINS):
        inside = [
            place
            for place, value in enumerate(said)
            if low == min(int(min(max(value, 0.0), 1.0) * NUM_BINS), NUM_BINS - 1)
        ]
        if inside:
            mean_said = statistics.fmean(min(max(said[place], 0.0), 1.0) for place in inside)
            error += len(inside) / len(said) * abs(mean_said - statistics.fmean(got[place] for place in inside))
    return error


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(-0.5, 1.5), SHARES), min_size=1, max_size=60))
def test_the_calibration_error_is_that_of_a_plain_count(pairs: list[tuple[float, float]]) -> None:
    said, got = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    found = calibrate(said, np.array(got))
    assert found is not None
    assert found.expected_error == pytest.approx(naive_error(said, got), abs=1e-9)
    assert found.counts.sum() == len(pairs)
    assert found.mean_achieved == pytest.approx(statistics.fmean(got), abs=1e-12)


def test_a_head_that_knows_its_ious_has_no_error() -> None:
    found = calibrate(random_ious(1, 500).tolist(), random_ious(1, 500))
    assert found is not None
    assert found.expected_error == 0
    assert found.correlation == pytest.approx(1)
    assert found.rank_correlation == pytest.approx(1)


def test_correlations_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy counts the correlations again")
    said, got = random_ious(2, 200).round(1), random_ious(3, 200).round(1)
    got[:50] = said[:50]
    found = calibrate(said.tolist(), got)
    assert found is not None
    assert found.correlation == pytest.approx(stats.pearsonr(said, got).statistic)
    assert found.rank_correlation == pytest.approx(stats.spearmanr(said, got).statistic)


def test_what_is_constant_correlates_with_nothing() -> None:
    found = calibrate([0.5] * 4, random_ious(4, 4))
    assert found is not None
    assert (found.correlation, found.rank_correlation) == (None, None)


def test_predictions_that_are_no_numbers_are_left_out_and_counted() -> None:
    found = calibrate([0.25, float("nan"), float("inf"), 0.75], np.array([0.5, 0.1, 0.1, 1.0]))
    assert found is not None
    assert (found.num_unusable, found.mean_predicted, found.mean_achieved) == (2, 0.5, 0.75)
    assert calibrate([float("nan")], np.array([0.5])) is None


def test_a_reliability_plot_has_a_dot_for_each_bin_that_holds_samples() -> None:
    found = calibrate([0.05, 0.06, 0.55, 1.0], np.array([0.1, 0.2, 0.3, 0.4]))
    assert found is not None
    svg = draw_calibration("plot", "a <head>", found, 1)
    assert found.counts.tolist() == [2, 0, 0, 0, 0, 1, 0, 0, 0, 1]
    line = re.search(r'<path d="([^"]*)" clip-path="[^"]*" style="fill: none; stroke: #b8450b; stroke-width: 1.4', svg)
    assert line is not None
    assert len(re.findall(r"[ML]", line[1])) == 3
    assert "&lt;head>" in svg


# Pairs


def pair(first: np.ndarray, second: np.ndarray) -> Pair:
    return Pair(("one", "other"), (0, 1), first, second)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(SHARES, SHARES), min_size=1, max_size=50))
def test_shares_and_cells_count_every_sample_once(ious: list[tuple[float, float]]) -> None:
    both = pair(np.array([first for first, _ in ious]), np.array([second for _, second in ious]))
    better, equal, worse = both.shares
    assert better == pytest.approx(sum(first > second for first, second in ious) / len(ious))
    assert worse == pytest.approx(sum(first < second for first, second in ious) / len(ious))
    assert better + equal + worse == pytest.approx(1)
    assert count_both(both).sum() == len(ious)


def test_a_cell_lies_where_its_samples_are() -> None:
    counts = count_both(pair(np.array([0.97, 1.0, 0.0]), np.array([0.02, 0.0, 1.0])))
    assert counts[0, 19] == 2, "to the left of the plot, high up"
    assert counts[19, 0] == 1
    svg = draw_both("plot", pair(np.array([0.97, 1.0, 0.0]), np.array([0.02, 0.0, 1.0])))
    assert "67% of the samples lie above the line" in svg


def test_a_plot_of_many_samples_is_as_small_as_one_of_few() -> None:
    few, many = (draw_both("plot", pair(random_ious(5, num), random_ious(6, num))) for num in (20_000, 200_000))
    assert len(many) < 1.1 * len(few) < 200_000


def test_equal_heads_fall_into_the_middle_bar() -> None:
    svg = draw_differences("plot", pair(np.full(10, 0.5), np.array([0.5] * 9 + [0.3])))
    assert "within 0.025 for 90% of the samples" in svg
    assert "mean +0.020" in svg
    bars = re.findall(
        r'd="M \S+ (\S+) \nL \S+ \S+ \nL \S+ (\S+) [^"]*" clip-path="[^"]*" style="fill: (#\w+); stroke: #fff', svg
    )
    drawn = [(abs(float(foot) - float(top)), colour) for foot, top, colour in bars if foot != top]
    (equal, grey), (better, colour) = drawn
    assert equal / better == pytest.approx(9, rel=0.001)
    assert (grey, colour) == ("#8a8a83", "#1f5fa8"), "the colour of the better head"


def test_a_plot_drawn_twice_is_the_same_to_the_byte() -> None:
    both = pair(random_ious(7, 50), random_ious(8, 50))
    groups = by_length(both.first, ["a b"] * 50)
    calibration = calibrate(both.second.tolist(), both.first)
    assert calibration is not None
    for draw in (
        lambda: draw_both("plot", both),
        lambda: draw_differences("plot", both),
        lambda: draw_lengths("plot", "head", groups, 0),
        lambda: draw_calibration("plot", "head", calibration, 0),
    ):
        assert draw() == draw()
