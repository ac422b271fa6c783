"""The loader: what a batch holds, in which order, whatever the residency."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from cache_schema.errors import UsageError
from cache_schema.features import FeatureCache, ImageFeatures
from heads.data import CachedSplit, feature_shapes, prefetch


@pytest.fixture(scope="module")
def split(feature_cache: FeatureCache) -> CachedSplit:
    return CachedSplit(feature_cache, "train", (16, 24))


def test_the_shapes_of_a_cache_are_those_of_its_stores(feature_cache: FeatureCache) -> None:
    shapes = feature_shapes(feature_cache)
    assert shapes.grids == {"1": (4, 6, 96), "last": (4, 6, 96)}
    assert (shapes.token_width, shapes.pooled_width) == (96, 96)


def test_a_batch_holds_the_features_of_its_samples(feature_cache: FeatureCache, split: CachedSplit) -> None:
    samples = feature_cache.samples.samples
    chosen = split.samples[[5, 0, 9, 1]]
    batch = split.load(chosen)
    for place, row in enumerate(chosen):
        image = feature_cache.image_rows[samples.image_rows[row]]
        prompt = feature_cache.prompt_rows[samples.prompt_rows[row]]
        mine = int(batch.inputs.image_index[place])
        np.testing.assert_array_equal(
            batch.inputs.features["last"][mine], feature_cache.images.features("last").read([image])[0]
        )
        np.testing.assert_array_equal(batch.inputs.cls["1"][mine], feature_cache.images.cls("1").read([image])[0])
        start, stop = feature_cache.prompts.offsets[[prompt, prompt + 1]]
        tokens = batch.inputs.prompt_tokens[place][batch.inputs.prompt_mask[place]]
        np.testing.assert_array_equal(tokens, feature_cache.prompts.tokens()[start:stop])
        np.testing.assert_array_equal(batch.inputs.pooled[place], feature_cache.prompts.pooled()[prompt])


def test_an_image_is_loaded_once_however_many_prompts_it_has(feature_cache: FeatureCache, split: CachedSplit) -> None:
    images = feature_cache.samples.samples.image_rows[split.samples]
    one_image = split.samples[images == images[0]]
    assert len(one_image) > 1
    assert split.load(one_image).inputs.features["last"].shape[0] == 1


def test_a_target_cell_is_set_where_the_mask_covers_at_least_half_of_it(
    feature_cache: FeatureCache, split: CachedSplit
) -> None:
    row = int(split.samples[np.flatnonzero(~feature_cache.samples.samples.no_target[split.samples])[0]])
    mask = torch.from_numpy(feature_cache.samples.samples.target(row)).double()
    share = torch.nn.functional.adaptive_avg_pool2d(mask[None, None], (16, 24))[0, 0]
    target = split.load(np.array([row])).targets[0]
    assert target.any()
    assert torch.equal(target > 0.5, share >= 0.5)


def test_values_and_order_are_the_same_in_ram_and_on_disk(feature_cache: FeatureCache) -> None:
    in_ram, on_disk = (
        CachedSplit(feature_cache, "train", (8, 8), residency=residency)  # type: ignore[arg-type]
        for residency in ("ram", "disk")
    )
    orders = [part.epoch(seed=1, epoch=2, batch_size=7) for part in (in_ram, on_disk)]
    for of_ram, of_disk in zip(*orders, strict=True):
        np.testing.assert_array_equal(of_ram, of_disk)
        first, second = in_ram.load(of_ram), on_disk.load(of_disk)
        assert torch.equal(first.targets, second.targets)
        for layer in first.inputs.features:
            assert torch.equal(first.inputs.features[layer], second.inputs.features[layer])
            assert torch.equal(first.inputs.cls[layer], second.inputs.cls[layer])


def test_an_epoch_holds_every_sample_once(split: CachedSplit) -> None:
    batches = split.epoch(seed=0, epoch=0, batch_size=10)
    assert sorted(np.concatenate(batches).tolist()) == sorted(split.samples.tolist())
    assert {len(batch) for batch in batches[:-1]} == {10}


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else(split: CachedSplit) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [int(row) for batch in split.epoch(seed=seed, epoch=epoch, batch_size=8) for row in batch]

    first = order(0, 0)
    np.random.default_rng().random(5)
    torch.rand(3)
    assert order(0, 0) == first
    assert order(0, 1) != first
    assert order(1, 0) != first


def test_ranks_share_an_epoch_evenly(split: CachedSplit) -> None:
    shares = [split.epoch(seed=0, epoch=3, batch_size=8, rank=rank, world_size=3) for rank in range(3)]
    assert len({len(share) for share in shares}) == 1
    seen = {int(row) for share in shares for batch in share for row in batch}
    assert seen == set(split.samples.tolist())


def test_prompts_of_one_image_stand_side_by_side(feature_cache: FeatureCache, split: CachedSplit) -> None:
    dealt = np.concatenate(split.epoch(seed=0, epoch=0, batch_size=8, prompts_per_image=2))
    images = feature_cache.samples.samples.image_rows[dealt]
    assert np.mean(images[0::2] == images[1::2]) > 0.9


def test_samples_of_an_image_that_failed_are_left_out_and_counted(feature_cache: FeatureCache) -> None:
    samples = feature_cache.samples.samples
    image = int(samples.image_rows[samples.rows_of_split("train")[0]])
    valid = feature_cache.images.valid.copy()
    valid[feature_cache.image_rows[image]] = False
    images = ImageFeatures(feature_cache.images.store)
    images.__dict__["valid"] = valid
    split = CachedSplit(dataclasses.replace(feature_cache, images=images), "train", (8, 8))
    lost = int((samples.image_rows[samples.rows_of_split("train")] == image).sum())
    assert len(split) == len(samples.rows_of_split("train")) - lost
    assert lost > 0
    assert image not in samples.image_rows[split.samples]


def test_an_unknown_split_is_named_with_the_nearest_known(feature_cache: FeatureCache) -> None:
    with pytest.raises(UsageError, match="did you mean 'train'"):
        CachedSplit(feature_cache, "trian", (8, 8))


def test_prefetch_keeps_order_and_hands_over_errors() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise OSError("the disk is gone")

    drawn = prefetch(items())
    assert [next(drawn) for _ in range(5)] == list(range(5))
    with pytest.raises(OSError, match="the disk is gone"):
        next(drawn)


def test_prefetch_ends_its_thread_when_its_consumer_leaves_early() -> None:
    before = threading.active_count()
    for item in prefetch(range(1000)):
        if item == 3:
            break
    assert threading.active_count() == before
