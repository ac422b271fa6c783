"""Pixel counts from logits, against the plain way: resize one by one, decode, compare whole masks."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cache_schema.masks import encode_mask
from cache_schema.views import View
from evaluate.metrics import SampleScores, compute, score_mask, update
from evaluate.predictor import probabilities_in_image
from evaluate.protocols import ORIGINAL_SIZE, PROTOCOLS, Protocol
from evaluate.scoring import ScoringBatch, Truth, resize_nearest, score_batch, scoring_threads

SIZES = [(48, 64), (64, 48), (37, 51), (1, 9), (120, 80)]
GRID = Protocol(name="grid", resolution="20x30")

# What is shown of an image that is h x w: all of it, a part, more than it, mirrored.
VIEWS = {
    "whole": lambda h, w: View((0, 0, w, h), False),
    "crop": lambda h, w: View((w // 4, 0, w - w // 4, h), False),
    "letterbox": lambda h, w: View((-5, -9, w + 5, h + 9), False),
    "crop and flip": lambda h, w: View((0, h // 4, max(1, w // 2), h), True),
}


def make_truth(rng, size, *, no_target=False, ignored=False):
    mask = np.zeros(size, np.bool_) if no_target else blob(rng, size)
    left_out = encode_mask(blob(rng, size)) if ignored else b""
    return Truth(encode_mask(mask), size, no_target, left_out)


def blob(rng, size):
    y, x = np.mgrid[: size[0], : size[1]]
    cy, cx = rng.uniform(0, size[0]), rng.uniform(0, size[1])
    return (y - cy) ** 2 / (size[0] / 3) ** 2 + (x - cx) ** 2 / (size[1] / 4) ** 2 < 1


def make_batch(seed, kind="whole", num=12, **options):
    rng = np.random.default_rng(seed)
    truths = [make_truth(rng, SIZES[k % len(SIZES)], no_target=k % 5 == 4, **options) for k in range(num)]
    coarse = torch.from_numpy(rng.normal(0, 2, (num, 1, 4, 5)).astype(np.float32))
    logits = F.interpolate(coarse, (16, 12), mode="bicubic")[:, 0].contiguous()
    return ScoringBatch(logits, [VIEWS[kind](*truth.size) for truth in truths], truths)


def score(batch, protocol=ORIGINAL_SIZE, num_threads=2):
    with scoring_threads(num_threads) as pool:
        return score_batch(batch, pool, protocol)


def same(scores, others):
    return all(np.array_equal(getattr(scores, c.name), getattr(others, c.name)) for c in fields(SampleScores))


def plain(batch, protocol):
    """The counts of whole masks at original size, one after the other, with nothing shared with the code."""
    found = []
    for logits, view, truth in zip(batch.logits, batch.views, batch.truths, strict=True):
        predicted = protocol.binarize(probabilities_in_image(logits[None], view, truth.size)[0])
        target, scored = truth.masks()
        if scored is not None:
            predicted = predicted & scored
        found.append(score_mask(predicted, target, no_target=truth.no_target, protocol=protocol))
    return SampleScores.concatenate(found)


@pytest.mark.parametrize("ignored", [False, True], ids=["all labelled", "some unlabelled"])
@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize(
    "protocol", [ORIGINAL_SIZE, Protocol(threshold=0.35, comparison=">=")], ids=["above 0.5", "0.35 or above"]
)
def test_counts_are_to_the_pixel_those_of_masks_placed_in_whole_images(protocol, kind, ignored):
    batch = make_batch(1, kind, ignored=ignored)
    scores = score(batch, protocol)
    assert same(scores, plain(batch, protocol))
    assert scores.intersection_px.any()
    assert (scores.predicted_px != scores.intersection_px).any()


@settings(max_examples=60, deadline=None)
@given(size=st.tuples(st.integers(1, 9), st.integers(1, 9)), share=st.sampled_from([0, 0.05, 0.5, 1]), data=st.data())
def test_all_of_a_target_lies_in_its_box_and_its_intersection_with_it(size, share, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    mask = rng.random(size) < share
    truth = Truth(encode_mask(mask), size)
    assert np.count_nonzero(mask[truth.box]) == np.count_nonzero(mask)
    logits = torch.from_numpy(rng.normal(0, 1, (1, *size)).astype(np.float32))
    batch = ScoringBatch(logits, [truth.whole], [truth])
    with ThreadPoolExecutor(1) as pool:
        assert same(score_batch(batch, pool), plain(batch, ORIGINAL_SIZE))


def test_logits_at_the_threshold_are_compared_as_their_probabilities_are():
    """A positive logit that is too small for a probability above a half is not marked, nor is a zero."""
    truth = Truth(encode_mask(np.ones((1, 8), np.bool_)), (1, 8))
    logits = torch.tensor([[[0.0, -0.0, 1e-9, 1e-7, 1.3e-7, 1e-6, -1e-9, float("nan")]]])
    expected = {protocol: int((COMPARED[protocol.comparison](logits.sigmoid())).sum()) for protocol in BOTH}
    for protocol in BOTH:
        found = score(ScoringBatch(logits, [truth.whole], [truth]), protocol)
        assert found.predicted_px.tolist() == [expected[protocol]]
    assert expected[BOTH[0]] < expected[BOTH[1]]


BOTH = [PROTOCOLS["original-size"], PROTOCOLS["original-size-inclusive"]]
COMPARED = {">": lambda share: share > 0.5, ">=": lambda share: share >= 0.5}


@pytest.mark.parametrize("size", [(48, 64), (7, 5), (1, 1), (481, 333)])
@pytest.mark.parametrize("grid", [(20, 30), (480, 480), (3, 1)])
def test_a_truth_on_a_grid_is_what_pillow_and_torch_call_nearest(size, grid):
    mask = np.random.default_rng(0).random(size) < 0.5
    found = resize_nearest(mask, grid)
    exact = F.interpolate(torch.from_numpy(mask)[None, None].float(), grid, mode="nearest-exact")[0, 0].numpy()
    assert np.array_equal(found, exact.astype(np.bool_))
    pillow = Image.fromarray(mask.astype(np.uint8)).resize(grid[::-1], Image.Resampling.NEAREST)
    inside = [(2 * np.arange(cells) + 1) * pixels % (2 * cells) > 0 for cells, pixels in zip(grid, size, strict=True)]
    chosen = np.ix_(*inside)  # cells whose centre lies on no edge between two pixels
    assert np.array_equal(found[chosen], np.asarray(pillow)[chosen].astype(np.bool_))


def read_bilinear(logits, y, x):
    """The value of a grid at a place where its corners are 0, 0 and its height and width; constant beyond its edge."""
    height, width = logits.shape
    y, x = min(max(y - 0.5, 0), height - 1), min(max(x - 0.5, 0), width - 1)
    top, left = min(int(y), height - 1), min(int(x), width - 1)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    upper = logits[top, left] * (1 - dx) + logits[top, right] * dx
    lower = logits[bottom, left] * (1 - dx) + logits[bottom, right] * dx
    return upper * (1 - dy) + lower * dy


@pytest.mark.parametrize("ignored", [False, True], ids=["all labelled", "some unlabelled"])
@pytest.mark.parametrize("kind", VIEWS)
def test_on_a_grid_logits_are_read_at_the_centres_of_its_cells(kind, ignored):
    batch = make_batch(2, kind, num=5, ignored=ignored)
    scores = score(batch, GRID)
    for place, (logits, view, truth) in enumerate(zip(batch.logits, batch.views, batch.truths, strict=True)):
        left, top, right, bottom = view.box
        target, scored = truth.masks()
        values = logits.double().numpy()
        predicted, truth_at = np.zeros(GRID.grid, np.bool_), np.zeros(GRID.grid, np.bool_)
        near = 0
        for row in range(GRID.grid[0]):
            for column in range(GRID.grid[1]):
                y, x = (row + 0.5) * truth.size[0] / GRID.grid[0], (column + 0.5) * truth.size[1] / GRID.grid[1]
                truth_at[row, column] = target[int(y), int(x)]
                if not (top <= y < bottom and left <= x < right) or (scored is not None and not scored[int(y), int(x)]):
                    continue
                across = (x - left) / (right - left)
                across = 1 - across if view.flip else across
                value = read_bilinear(values, (y - top) / (bottom - top) * values.shape[0], across * values.shape[1])
                near += abs(value) < 1e-4  # a last bit may decide
                predicted[row, column] = value > 0
        assert near <= 2
        assert abs(int(scores.predicted_px[place]) - int(predicted.sum())) <= near
        assert abs(int(scores.intersection_px[place]) - int((predicted & truth_at).sum())) <= near
        assert int(scores.target_px[place]) == int(truth_at.sum())
        assert int(scores.area_px[place]) == int(target.sum())


def test_what_a_head_says_of_the_target_outranks_the_number_of_pixels():
    batch = make_batch(3)
    said = np.arange(12) % 2 == 0
    assert score(replace(batch, said_no_target=said)).predicted_no_target.tolist() == said.tolist()
    by_pixels = score(batch)
    assert by_pixels.predicted_no_target.tolist() == (by_pixels.predicted_px < 50).tolist()


def test_a_no_target_truth_with_pixels_is_refused():
    truth = Truth(encode_mask(np.ones((4, 4), np.bool_)), (4, 4), no_target=True)
    with pytest.raises(ValueError, match="this one has 16"):
        score(ScoringBatch(torch.zeros(1, 2, 2), [truth.whole], [truth]))


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(12)), cuts=st.lists(st.integers(0, 12), max_size=4), grid=st.booleans())
def test_neither_order_nor_batch_split_nor_threads_ever_change_a_count(order, cuts, grid):
    protocol = GRID if grid else ORIGINAL_SIZE
    batch = make_batch(4, "letterbox")
    expected = score(batch, protocol, num_threads=1)
    state, places = (), [0, *sorted(cuts), 12]
    with ThreadPoolExecutor(3) as pool:
        for start, stop in itertools.pairwise(places):
            if start < stop:
                chosen = order[start:stop]
                views, truths = ([column[k] for k in chosen] for column in (batch.views, batch.truths))
                part = ScoringBatch(batch.logits[chosen], views, truths)
                state = update(state, score_batch(part, pool, protocol))
    assert same(SampleScores.concatenate(state), expected.take(np.array(order)))
    assert compute(state) == compute((expected,))


def test_half_precision_logits_are_resized_in_single_precision():
    batch = make_batch(5)
    half = replace(batch, logits=batch.logits.to(torch.bfloat16))
    assert same(score(half), score(replace(half, logits=half.logits.float())))


def test_scoring_leaves_the_threads_of_others_as_they_were():
    before = torch.get_num_threads()
    with scoring_threads(2) as pool:
        assert {pool.submit(torch.get_num_threads).result() for _ in range(4)} == {1}
        assert torch.get_num_threads() == before
        with ThreadPoolExecutor(1) as other:
            assert other.submit(torch.get_num_threads).result() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("protocol", [ORIGINAL_SIZE, GRID], ids=["original size", "grid"])
def test_a_cuda_device_counts_what_a_cpu_counts_but_for_a_last_bit(protocol, kind):
    batch = make_batch(6, kind, ignored=True)
    here, there = score(batch, protocol), score(replace(batch, logits=batch.logits.cuda()), protocol)
    assert np.abs(here.intersection_px - there.intersection_px).max() <= 2
    assert np.abs(here.predicted_px - there.predicted_px).max() <= 2
    assert np.array_equal(here.target_px, there.target_px)
