"""Training sees an image in one view an epoch, a mirrored one only where the prompt allows it; masks follow suit.

They follow what the encoder saw, which may be less or more than the view that was asked for.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cache_schema.features import FeatureCache, ImageFeatures, open_cache
from cache_schema.views import ASPECTS, View
from extract.image_job import ImageJobConfig, extract_images
from extract.job import Extraction
from heads.data import CachedSplit, Draw
from heads.residency import Residency
from tests.extract.toys import ToyImageEncoder

SIZE = (16, 24)
EPOCHS = range(40)
SIDES = {"left", "right", "leftmost", "rightmost"}


@pytest.fixture(scope="module")
def split(views_cache: FeatureCache) -> CachedSplit:
    return CachedSplit(views_cache, "train", SIZE, all_views=True)


@pytest.fixture(scope="module", params=ASPECTS)
def windows_cache(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    samples_path: Path,
    prompt_extraction: Extraction,
) -> FeatureCache:
    """Three fixed views and as many windows as each image asks for, by an encoder of each way of fitting images in."""
    shape = (8, 8) if request.param == "crop" else (8, 12)  # squares that are cut to another shape leave gaps
    encoder = ToyImageEncoder(identity={"class": "toy", "aspect": request.param}, aspect=request.param, shape=shape)
    views = ("whole", "flip", "crop-0.7", "windows-0.6-0.4")
    config = ImageJobConfig(samples_path, tmp_path_factory.mktemp("windows"), views=views, shard_rows=10)
    return open_cache(samples_path, extract_images(config, encoder).path, prompt_extraction.path)


def views_drawn(split: CachedSplit, *, seed: int = 0, epoch: int = 0, batch_size: int = 16, **how: int) -> NDArray:
    """The view in which each sample of a split is shown in one epoch, in the order of `split.samples`."""
    draws = split.epoch(seed=seed, epoch=epoch, batch_size=batch_size, **how)
    shown = {
        sample: view for draw in draws for sample, view in zip(draw.samples.tolist(), draw.views.tolist(), strict=True)
    }
    return np.array([shown[sample] for sample in split.samples.tolist()])


def prompts_of(cache: FeatureCache, split: CachedSplit) -> list[str]:
    samples = cache.samples.samples
    return [samples.prompts[row] for row in samples.prompt_rows[split.samples]]


def names_a_side(cache: FeatureCache, split: CachedSplit) -> NDArray:
    return np.array([bool(SIDES & set(prompt.split())) for prompt in prompts_of(cache, split)])


def with_prompts(cache: FeatureCache, prompts: Sequence[str]) -> FeatureCache:
    """The cache with other prompts in the place of its own, over and over."""
    samples = cache.samples.samples
    others = list(itertools.islice(itertools.cycle(prompts), len(samples.prompts)))
    store = dataclasses.replace(cache.samples, samples=dataclasses.replace(samples, prompts=others))
    return dataclasses.replace(cache, samples=store)


def with_invalid(cache: FeatureCache, rows: Sequence[int]) -> FeatureCache:
    """The cache as if some views had failed."""
    images = ImageFeatures(cache.images.store)
    valid = cache.images.valid.copy()
    valid[list(rows)] = False
    images.__dict__["valid"] = valid
    return dataclasses.replace(cache, images=images)


# Which view


def test_the_prompts_of_an_image_share_one_view_in_an_epoch(views_cache: FeatureCache, split: CachedSplit) -> None:
    images = views_cache.samples.samples.image_rows[split.samples]
    free = ~names_a_side(views_cache, split)
    for epoch in EPOCHS:
        drawn = views_drawn(split, epoch=epoch)
        for image in set(images.tolist()):
            assert len(set(drawn[(images == image) & free].tolist())) <= 1


def test_every_view_has_its_turn(views_cache: FeatureCache, split: CachedSplit) -> None:
    drawn = np.stack([views_drawn(split, epoch=epoch) for epoch in EPOCHS])
    free = ~names_a_side(views_cache, split)
    shares = np.bincount(drawn[:, free].reshape(-1), minlength=4) / drawn[:, free].size
    assert np.all(np.abs(shares - 0.25) < 0.06)
    assert all(set(of_sample.tolist()) == {0, 1, 2, 3} for of_sample in drawn[:, free].T)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 99),
    batch_size=st.integers(1, 99),
    prompts_per_image=st.integers(1, 9),
)
def test_which_view_an_image_is_shown_in_follows_from_seed_and_epoch_alone(
    split: CachedSplit, seed: int, epoch: int, batch_size: int, prompts_per_image: int
) -> None:
    asked = {"seed": seed, "epoch": epoch}
    first = views_drawn(split, **asked)
    np.testing.assert_array_equal(
        views_drawn(split, **asked, batch_size=batch_size, prompts_per_image=prompts_per_image), first
    )
    for rank in range(2):
        for draw in split.epoch(**asked, batch_size=batch_size, rank=rank, world_size=2):
            places = np.searchsorted(split.samples, draw.samples)
            np.testing.assert_array_equal(draw.views, first[places])


def test_another_epoch_or_seed_draws_other_views(split: CachedSplit) -> None:
    first = views_drawn(split)
    assert (views_drawn(split, epoch=1) != first).any()
    assert (views_drawn(split, seed=1) != first).any()


def test_validation_sees_whole_images_only(views_cache: FeatureCache, split: CachedSplit) -> None:
    whole = CachedSplit(views_cache, "train", SIZE)
    for part in (whole, split):
        assert not any(draw.views.any() for draw in part.in_order(16))
    for epoch in range(5):
        assert not views_drawn(whole, epoch=epoch).any()
    draw = whole.in_order(16)[0]
    inputs, images = whole.load(draw).inputs, views_cache.samples.samples.image_rows[draw.samples]
    rows = views_cache.image_rows[images]
    np.testing.assert_array_equal(
        inputs.features["last"][inputs.image_index], views_cache.images.features("last").read(rows)
    )
    assert all(not views_cache.images.views[row].flip for row in rows)


def test_windows_are_never_drawn(windows_cache: FeatureCache) -> None:
    part = CachedSplit(windows_cache, "train", None, all_views=True)
    drawn = np.stack([views_drawn(part, epoch=epoch) for epoch in range(10)])
    assert set(drawn.reshape(-1).tolist()) == {0, 1, 2}
    assert all(len(windows_cache.images.rows_of_image(image)) > 3 for image in range(len(windows_cache.image_rows)))


@pytest.mark.parametrize("residency", ["ram", "disk"])
def test_the_views_of_an_image_are_found_among_its_windows(windows_cache: FeatureCache, residency: Residency) -> None:
    samples, images = windows_cache.samples.samples, windows_cache.images
    part = CachedSplit(windows_cache, "train", None, residency=residency, all_views=True)
    for draw in part.epoch(seed=0, epoch=0, batch_size=16):
        inputs = part.load(draw).inputs
        for place, (sample, view) in enumerate(zip(draw.samples.tolist(), draw.views.tolist(), strict=True)):
            image = int(samples.image_rows[sample])
            row = images.ids.index(samples.images.ids[image]) + view
            np.testing.assert_array_equal(
                inputs.features["fine"][inputs.image_index[place]], images.features("fine").read([row])[0]
            )


# Sides


def test_a_prompt_that_names_a_side_is_never_asked_of_a_mirrored_image(
    views_cache: FeatureCache, split: CachedSplit
) -> None:
    mirrored = np.array([spec.endswith("flip") for spec in views_cache.images.view_specs])
    named = names_a_side(views_cache, split)
    assert 3 < named.sum() < len(named) - 3, "these tests need prompts with sides, and others"
    drawn = np.stack([views_drawn(split, epoch=epoch) for epoch in EPOCHS])
    assert not mirrored[drawn[:, named]].any()
    assert set(drawn[:, named].reshape(-1).tolist()) == {0, 2}, (
        "where nothing is mirrored, views are drawn all the same"
    )
    assert mirrored[drawn[:, ~named]].any()


@pytest.mark.parametrize(
    "prompt",
    [
        "the left one",
        "Right side",
        "LEFTMOST",
        "the rightmost of three",
        "left-hand man",
        "man (right)",
        "2nd from left",
        "lefthand",
        "topleft",
        "bottomright corner",
        "upperleft",
        "guy at 3 o'clock",
        "counterclockwise from the door",
    ],
)
def test_sides_are_known_by_many_names(views_cache: FeatureCache, prompt: str) -> None:
    part = CachedSplit(with_prompts(views_cache, [prompt]), "train", SIZE, all_views=True)
    drawn = np.stack([views_drawn(part, epoch=epoch) for epoch in range(10)])
    assert set(drawn.reshape(-1).tolist()) == {0, 2}


@pytest.mark.parametrize("prompt", ["the bright one", "a copyright sign", "cleft chin", "the top one", "", "lift"])
def test_other_words_name_no_side(views_cache: FeatureCache, prompt: str) -> None:
    part = CachedSplit(with_prompts(views_cache, [prompt]), "train", SIZE, all_views=True)
    drawn = np.stack([views_drawn(part, epoch=epoch) for epoch in range(10)])
    assert set(drawn.reshape(-1).tolist()) == {0, 1, 2, 3}


# Views that failed


def test_an_image_is_shown_whole_where_the_view_drawn_for_it_failed(
    views_cache: FeatureCache, split: CachedSplit
) -> None:
    images = views_cache.samples.samples.image_rows[split.samples]
    broken = int(images[0])
    lame = with_invalid(views_cache, [int(views_cache.image_rows[broken]) + 1])
    part = CachedSplit(lame, "train", SIZE, all_views=True)
    np.testing.assert_array_equal(part.samples, split.samples)
    for epoch in EPOCHS:
        before, after = views_drawn(split, epoch=epoch), views_drawn(part, epoch=epoch)
        failed = (images == broken) & (before == 1)
        assert not after[failed].any()
        np.testing.assert_array_equal(after[~failed], before[~failed])


def test_an_image_of_which_nothing_else_could_be_encoded_is_always_shown_whole(views_cache: FeatureCache) -> None:
    rows = (views_cache.image_rows[:, None] + np.arange(1, 4)).reshape(-1)
    part = CachedSplit(with_invalid(views_cache, rows.tolist()), "train", SIZE, all_views=True)
    assert not any(views_drawn(part, epoch=epoch).any() for epoch in range(10))


def test_a_view_that_failed_has_no_targets(views_cache: FeatureCache, split: CachedSplit) -> None:
    """A view of too many pixels fails, and a mask of as many would not fit into memory either."""
    images = views_cache.samples.samples.image_rows[split.samples]
    lame = with_invalid(views_cache, [int(views_cache.image_rows[images[0]]) + 2])
    part = CachedSplit(lame, "train", SIZE, all_views=True)
    for view in range(4):
        draw = Draw(split.samples, np.full(len(split.samples), view))
        before, after = split.load(draw).targets, part.load(draw).targets
        failed = torch.from_numpy((images == images[0]) & (view == 2))
        assert before[torch.from_numpy(images == images[0])].any()
        assert not after[failed].any()
        assert torch.equal(after[~failed], before[~failed])


# Targets


def seen_through(view: View, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A mask through a view, worked out pixel by pixel; it is empty beyond the image."""
    left, top, right, bottom = view.box
    rows, columns = np.mgrid[top:bottom, left:right]
    if view.flip:
        columns = columns[:, ::-1]
    inside = (rows >= 0) & (rows < mask.shape[0]) & (columns >= 0) & (columns < mask.shape[1])
    return inside & mask[rows.clip(0, mask.shape[0] - 1), columns.clip(0, mask.shape[1] - 1)]


def at_least_half(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which cells of a `SIZE` grid a mask covers by half or more, in whole numbers; cells may share a row of pixels."""
    (height, width), (num_rows, num_columns) = mask.shape, SIZE
    cells = np.zeros(SIZE, np.bool_)
    for row, column in itertools.product(range(num_rows), range(num_columns)):
        cell = mask[
            row * height // num_rows : -(-(row + 1) * height // num_rows),
            column * width // num_columns : -(-(column + 1) * width // num_columns),
        ]
        cells[row, column] = 2 * int(cell.sum()) >= cell.size
    return cells


@pytest.mark.parametrize("view", range(4))
def test_a_target_is_the_truth_seen_through_the_view(views_cache: FeatureCache, split: CachedSplit, view: int) -> None:
    samples = views_cache.samples.samples
    chosen = split.samples[::7]
    targets = split.load(Draw(chosen, np.full(len(chosen), view))).targets
    assert targets.any()
    assert set(targets.unique().tolist()) == {0.0, 1.0}
    for sample, target in zip(chosen.tolist(), targets, strict=True):
        row = views_cache.image_rows[samples.image_rows[sample]] + view
        seen = views_cache.images.views[row]
        truth = samples.target(sample)
        np.testing.assert_array_equal(seen.apply_to_mask(truth), seen_through(seen, truth))
        np.testing.assert_array_equal(target.numpy() > 0.5, at_least_half(seen_through(seen, truth)))


@pytest.mark.parametrize("view", range(3))
def test_a_target_is_the_truth_seen_by_the_encoder(windows_cache: FeatureCache, view: int) -> None:
    samples = windows_cache.samples.samples
    part = CachedSplit(windows_cache, "train", SIZE, all_views=True)
    targets = part.load(Draw(part.samples, np.full(len(part.samples), view))).targets
    assert targets.any()
    for sample, target in zip(part.samples.tolist(), targets, strict=True):
        seen = windows_cache.images.views[windows_cache.image_rows[samples.image_rows[sample]] + view]
        np.testing.assert_array_equal(target.numpy() > 0.5, at_least_half(seen_through(seen, samples.target(sample))))


def test_the_encoders_of_these_tests_see_less_and_more_than_the_image(windows_cache: FeatureCache) -> None:
    samples, images = windows_cache.samples.samples, windows_cache.images
    aspect = images.store.header.identity["encoder"]["aspect"]
    changed = [
        images.views[row].size != (height, width)
        for row, (height, width) in zip(windows_cache.image_rows.tolist(), samples.images.sizes.tolist(), strict=True)
    ]
    assert any(changed) == (aspect != "squash")


def test_a_mirrored_target_is_the_mirror_of_the_whole_ones(views_cache: FeatureCache, split: CachedSplit) -> None:
    whole = split.load(Draw(split.samples, np.zeros_like(split.samples))).targets
    mirrored = split.load(Draw(split.samples, np.ones_like(split.samples))).targets
    assert torch.equal(mirrored, whole.flip(2))
    assert not torch.equal(mirrored, whole)


def test_one_image_in_two_views_is_two_images_of_a_batch(views_cache: FeatureCache, split: CachedSplit) -> None:
    sample = split.samples[:1].repeat(3)
    batch = split.load(Draw(sample, np.array([1, 0, 1])))
    assert batch.inputs.image_index.tolist() == [1, 0, 1]
    assert batch.inputs.features["last"].shape[0] == 2
    first = int(views_cache.image_rows[views_cache.samples.samples.image_rows[sample[0]]])
    stored = views_cache.images.features("last").read([first, first + 1])
    np.testing.assert_array_equal(batch.inputs.features["last"], stored)
