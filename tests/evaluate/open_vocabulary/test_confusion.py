"""The confusion matrix against plain loops and torchmetrics, and that order and split never change a result."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassJaccardIndex

from cache_schema.errors import UsageError
from evaluate.open_vocabulary.confusion import ConfusionMatrix

NUM_CLASSES = 5


def random_maps(seed=0, size=(20, 30), num_classes=NUM_CLASSES, ignored=255):
    rng = np.random.default_rng(seed)
    predicted, truth = rng.integers(0, num_classes, (2, *size), dtype=np.uint8)
    truth[rng.random(size) < 0.2] = ignored
    return predicted, truth


def matrix_of(*pairs, num_classes=NUM_CLASSES):
    matrix = ConfusionMatrix(num_classes)
    for predicted, truth in pairs:
        matrix.update(np.asarray(predicted), np.asarray(truth))
    return matrix


def test_counts_and_scores_of_a_hand_worked_case():
    matrix = matrix_of(([[0, 0, 1], [1, 1, 2]], [[0, 1, 1], [1, 255, 0]]), num_classes=4)

    # Of class 0 one pixel is found and one taken for 2; of class 1 two are found and one taken for 0; one is ignored.
    assert matrix.counts.tolist() == [[1, 0, 1, 0], [1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert [row.iou for row in matrix.per_class()] == [1 / 3, 2 / 3, 0, None]
    assert [row.accuracy for row in matrix.per_class()] == [1 / 2, 2 / 3, None, None]
    assert [(row.truth_px, row.predicted_px) for row in matrix.per_class()] == [(2, 2), (3, 2), (0, 1), (0, 0)]
    assert matrix.metrics() == {
        "miou": pytest.approx((1 / 3 + 2 / 3 + 0) / 3),
        "aacc": 3 / 5,
        "macc": pytest.approx((1 / 2 + 2 / 3) / 2),
        "num_classes": 3,
        "num_pixels": 5,
    }


@pytest.mark.parametrize("seed", range(5))
def test_counts_equal_a_loop_over_pixels(seed):
    predicted, truth = random_maps(seed)
    expected = np.zeros((NUM_CLASSES, NUM_CLASSES), int)
    for said, true in zip(predicted.ravel().tolist(), truth.ravel().tolist(), strict=True):
        if true != 255:
            expected[true, said] += 1

    assert np.array_equal(matrix_of((predicted, truth)).counts, expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_used", [NUM_CLASSES, NUM_CLASSES - 2])
def test_scores_equal_those_of_torchmetrics(seed, num_used):
    predicted, truth = random_maps(seed, num_classes=num_used)  # classes that are never used are left out of the means
    matrix = matrix_of((predicted, truth))
    metrics, rows = matrix.metrics(), matrix.per_class()

    def oracle(metric, **options):
        return metric(NUM_CLASSES, ignore_index=255, **options)(
            *(torch.from_numpy(m).long() for m in (predicted, truth))
        )

    assert np.array_equal(oracle(MulticlassConfusionMatrix).numpy(), matrix.counts)
    assert metrics["miou"] == pytest.approx(float(oracle(MulticlassJaccardIndex, average="macro")), abs=1e-6)
    assert metrics["aacc"] == pytest.approx(float(oracle(MulticlassAccuracy, average="micro")), abs=1e-6)
    assert metrics["macc"] == pytest.approx(float(oracle(MulticlassAccuracy, average="macro")), abs=1e-6)
    for name, metric in (("iou", MulticlassJaccardIndex), ("accuracy", MulticlassAccuracy)):
        expected = oracle(metric, average="none").tolist()
        assert [getattr(row, name) for row in rows[:num_used]] == pytest.approx(expected[:num_used], abs=1e-6)
        assert [getattr(row, name) for row in rows[num_used:]] == [None] * (NUM_CLASSES - num_used)


def test_each_iou_equals_that_of_the_classs_masks():
    predicted, truth = random_maps(3)
    for row in matrix_of((predicted, truth)).per_class():
        said, true = (predicted == row.index) & (truth != 255), truth == row.index
        assert row.iou == np.count_nonzero(said & true) / np.count_nonzero(said | true)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2**16), st.integers(1, 40)), min_size=1, max_size=8),
    st.permutations(range(8)),
    st.integers(0, 8),
)
def test_neither_order_nor_split_nor_processes_change_a_result(images, order, cut):
    pairs = [random_maps(seed, (length,)) for seed, length in images]
    whole = matrix_of(tuple(np.concatenate(maps) for maps in zip(*pairs, strict=True)))
    shuffled = [pairs[place] for place in order if place < len(pairs)]

    for other in (matrix_of(*shuffled), matrix_of(*shuffled[:cut]) + matrix_of(*shuffled[cut:])):
        assert other == whole
        assert other.per_class() == whole.per_class()
        if whole.counts.any():
            assert other.metrics() == whole.metrics()


def test_joining_leaves_both_as_they_were():
    one, other = matrix_of(random_maps(0)), matrix_of(random_maps(1))
    before = one.counts, other.counts
    both = one + other
    both.update(*random_maps(2))

    assert np.array_equal(one.counts, before[0])
    assert np.array_equal(other.counts, before[1])
    assert not np.array_equal(both.counts, before[0] + before[1])


def test_what_is_given_away_is_a_copy():
    matrix = matrix_of(random_maps())
    matrix.counts[:] = 0
    assert matrix.counts.sum() > 0


def test_it_travels_between_processes():
    matrix = matrix_of(random_maps())
    assert pickle.loads(pickle.dumps(matrix)) == matrix


def test_a_perfect_prediction_scores_one_whatever_stands_on_ignored_pixels():
    _, truth = random_maps()
    metrics = matrix_of((np.where(truth == 255, 199, truth), truth)).metrics()
    assert (metrics["miou"], metrics["aacc"], metrics["macc"]) == (1, 1, 1)
    assert metrics["num_pixels"] == np.count_nonzero(truth != 255)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.uint16])
def test_any_integers_do(dtype):
    predicted, truth = random_maps()
    assert matrix_of((predicted.astype(dtype), truth.astype(dtype))) == matrix_of((predicted, truth))


def test_another_number_may_stand_for_ignored_pixels():
    predicted, truth = (maps.astype(np.int64) for maps in random_maps())
    other = ConfusionMatrix(NUM_CLASSES, ignored=-1)
    other.update(predicted, np.where(truth == 255, -1, truth))
    assert np.array_equal(other.counts, matrix_of((predicted, truth)).counts)
    assert other != matrix_of((predicted, truth))


@pytest.mark.parametrize(
    ("predicted", "truth", "message"),
    [
        ([0, 9], [0, 1], r"the prediction holds \[9\]: classes are 0 to 4"),
        ([0, -1], [0, 1], r"the prediction holds \[-1\]"),
        ([0, 1], [5, 6], r"the truth holds \[5, 6\]"),
        ([0, 1], [-2, 1], r"the truth holds \[-2\]"),
    ],
)
def test_a_number_that_is_no_class_is_refused_and_nothing_is_counted(predicted, truth, message):
    matrix = ConfusionMatrix(NUM_CLASSES)
    with pytest.raises(ValueError, match=message):
        matrix.update(np.array(predicted), np.array(truth))
    assert not matrix.counts.any()


def test_maps_of_different_sizes_are_refused():
    with pytest.raises((ValueError, TypeError)):  # a runtime type checker may speak first
        matrix_of((np.zeros((4, 4), np.uint8), np.zeros((4, 1), np.uint8)))


def test_matrices_of_different_kinds_are_not_added():
    with pytest.raises(ValueError, match=r"\(5, 255\) and \(4, 255\) cannot be added"):
        ConfusionMatrix(5) + ConfusionMatrix(4)
    with pytest.raises(ValueError, match="cannot be added"):
        ConfusionMatrix(5) + ConfusionMatrix(5, ignored=254)


@pytest.mark.parametrize(
    ("num_classes", "ignored", "message"),
    [(0, 255, "at least one class"), (5, 3, "numbered 3, which is one of 5"), (300, 255, "one of 300")],
)
def test_a_matrix_that_cannot_count_is_refused(num_classes, ignored, message):
    with pytest.raises(ValueError, match=message):
        ConfusionMatrix(num_classes, ignored)


@pytest.mark.parametrize("pairs", [[], [([0, 1], [255, 255])]])
def test_no_pixel_at_all_is_the_users_mistake(pairs):
    matrix = matrix_of(*pairs)
    assert [row.iou for row in matrix.per_class()] == [None] * NUM_CLASSES
    with pytest.raises(UsageError, match="there is no pixel to score"):
        matrix.metrics()


def test_the_table_has_a_row_for_each_class_and_is_plain_json():
    matrix = matrix_of(([0, 0, 1], [0, 1, 1]), num_classes=3)
    table = matrix.per_class_table(["cat", "dog", "sky"])

    assert json.loads(json.dumps(table)) == table
    assert table[0] == {"name": "cat", "index": 0, "iou": 0.5, "accuracy": 1, "truth_px": 1, "predicted_px": 2}
    assert [(row["name"], row["iou"]) for row in table[1:]] == [("dog", 0.5), ("sky", None)]
    assert json.loads(json.dumps(matrix.metrics())) == matrix.metrics()
    with pytest.raises(ValueError, match="2 names for 3 classes"):
        matrix.per_class_table(["cat", "dog"])
