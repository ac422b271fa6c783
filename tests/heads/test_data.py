"""The loader: what a batch holds, in which order, whatever the residency."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import heads.residency
from cache_schema.errors import UsageError
from cache_schema.features import FeatureCache, ImageFeatures, open_cache
from extract.encoders.protocols import ImageEncoding
from extract.image_job import ImageJobConfig, extract_images
from extract.job import Extraction
from heads.data import Batch, CachedSplit, Draw, feature_shapes
from heads.residency import Residency
from heads.train import train
from heads.train_config import TrainConfig
from tests.extract.toys import ToyImageEncoder

RESIDENCIES: tuple[Residency, ...] = ("device", "ram", "disk", "auto")
CACHES = ("feature_cache", "int8_cache", "views_cache")


@pytest.fixture(params=CACHES)
def any_cache(request: pytest.FixtureRequest) -> FeatureCache:
    """In float16, in int8, and with four views of each image."""
    cache: FeatureCache = request.getfixturevalue(request.param)
    return cache


@pytest.fixture(scope="module")
def split(feature_cache: FeatureCache) -> CachedSplit:
    return CachedSplit(feature_cache, "train", (16, 24))


def rows_of(draws: Sequence[Draw]) -> list[int]:
    """The samples of draws, end to end."""
    return [row for draw in draws for row in draw.samples.tolist()]


def draws_of(draws: Sequence[Draw]) -> list[tuple[list[int], list[int]]]:
    """Draws as plain lists, which can be compared."""
    return [(draw.samples.tolist(), draw.views.tolist()) for draw in draws]


def tensors_of(batch: Batch) -> dict[str, Tensor]:
    """Every tensor of a batch by name."""
    fields = {field.name: getattr(batch.inputs, field.name) for field in dataclasses.fields(batch.inputs)}
    single = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    layered = {
        f"{name}/{layer}": tensor
        for name, value in fields.items()
        if name not in single
        for layer, tensor in value.items()
    }
    return {"targets": batch.targets, "samples": torch.from_numpy(batch.samples), **single, **layered}


def assert_equal_batches(first: Batch, second: Batch) -> None:
    mine, yours = tensors_of(first), tensors_of(second)
    assert mine.keys() == yours.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor.double(), yours[name].double()), name


def test_a_batch_that_is_held_keeps_its_values(feature_cache: FeatureCache) -> None:
    """Memory is lent out again, but never while anybody has a tensor in it, were it a part of one."""
    split = CachedSplit(feature_cache, "train", None, residency="ram")
    draws = split.in_order(3) * 3
    held = [split.load(draw) for draw in draws]
    parts = [split.load(draw).inputs.features["last"][0, 1:] for draw in draws]
    passing = [split.load(draw).inputs.features["last"].sum().item() for draw in draws]
    for draw, batch, part, total in zip(draws, held, parts, passing, strict=True):
        again = CachedSplit(feature_cache, "train", None, residency="disk").load(draw)
        assert_equal_batches(batch, again)
        assert torch.equal(part.double(), again.inputs.features["last"][0, 1:].double())
        assert total == pytest.approx(batch.inputs.features["last"].float().sum().item(), rel=1e-2, abs=1)


def test_memory_of_batches_that_are_gone_is_lent_out_again(feature_cache: FeatureCache) -> None:
    split = CachedSplit(feature_cache, "train", None, residency="ram")
    (draw, *_) = split.in_order(3)
    seen = {split.load(draw).inputs.features["last"].data_ptr() for _ in range(5)}
    assert len(seen) == 1


@dataclass
class WithoutCls(ToyImageEncoder):
    """Token grids of two layers, one of which has a CLS token."""

    @property
    def cls_widths(self) -> Mapping[str, int]:
        return {"coarse": 3}

    def encode(self, pixels: Tensor) -> ImageEncoding:
        encoding = super().encode(pixels)
        return ImageEncoding(encoding.features, {"coarse": encoding.cls["coarse"]})


@dataclass
class WithoutLayers(ToyImageEncoder):
    """A CLS token and an attention output, and no token grid."""

    @property
    def grids(self) -> Mapping[str, tuple[int, int, int]]:
        return {}

    @property
    def cls_widths(self) -> Mapping[str, int]:
        return {"last": 3}

    @property
    def attention_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"mean_token": (3,)}

    def encode(self, pixels: Tensor) -> ImageEncoding:
        means = pixels.float().mean((1, 2)) / 255
        return ImageEncoding({}, {"last": means}, {"mean_token": means})


def cache_of(encoder: ToyImageEncoder, folder: Path, samples: Path, prompt_extraction: Extraction) -> FeatureCache:
    images = extract_images(ImageJobConfig(samples, folder, shard_rows=10), encoder)
    return open_cache(samples, images.path, prompt_extraction.path)


def test_the_shapes_of_a_cache_are_those_of_its_stores(any_cache: FeatureCache) -> None:
    shapes = feature_shapes(any_cache)
    assert shapes.grids == {"1": (4, 6, 96), "last": (4, 6, 96)}
    assert (shapes.token_width, shapes.pooled_width) == (96, 96)


# What a batch holds


def test_a_batch_holds_the_features_of_its_samples(any_cache: FeatureCache) -> None:
    split = CachedSplit(any_cache, "train", (16, 24), all_views=True)
    samples, images = any_cache.samples.samples, any_cache.images
    chosen = split.samples[[5, 0, 9, 1]]
    views = np.array([0, 3, 1, 2]) % len(images.view_specs)
    batch = split.load(Draw(chosen, views))
    assert batch.samples.tolist() == chosen.tolist()
    for place, (sample, view) in enumerate(zip(chosen, views, strict=True)):
        row = any_cache.image_rows[samples.image_rows[sample]] + view
        assert images.ids[row] == samples.images.ids[samples.image_rows[sample]]
        prompt = any_cache.prompt_rows[samples.prompt_rows[sample]]
        mine = int(batch.inputs.image_index[place])
        for layer in images.layers:
            stored = images.features(layer).read([row])[0]
            np.testing.assert_array_equal(batch.inputs.features[layer][mine], stored)
            np.testing.assert_array_equal(batch.inputs.cls[layer][mine], images.cls(layer).read([row])[0])
        start, stop = any_cache.prompts.offsets[[prompt, prompt + 1]]
        tokens = batch.inputs.prompt_tokens[place][batch.inputs.prompt_mask[place]]
        np.testing.assert_array_equal(tokens, any_cache.prompts.tokens()[start:stop])
        assert not batch.inputs.prompt_tokens[place][~batch.inputs.prompt_mask[place]].any()
        np.testing.assert_array_equal(batch.inputs.pooled[place], any_cache.prompts.pooled()[prompt])


def test_a_head_is_given_int8_tokens_times_their_scale(int8_cache: FeatureCache) -> None:
    split = CachedSplit(int8_cache, "train", (16, 24))
    batch = split.load(Draw.whole(split.samples[:1]))
    row = [int8_cache.image_rows[int8_cache.samples.samples.image_rows[split.samples[0]]]]
    inputs = batch.inputs.to("cpu")
    for layer in ("1", "last"):
        values = int8_cache.images.features(layer).read(row)
        scale = int8_cache.images.scale(layer)
        assert scale is not None
        assert values.dtype == np.int8
        assert batch.inputs.features[layer].dtype == torch.int8
        expected = values.astype(np.float32) * scale.read(row).astype(np.float32)[..., None]
        assert inputs.features[layer].dtype == torch.float32
        np.testing.assert_array_equal(inputs.features[layer].numpy(), expected)


def test_an_image_is_loaded_once_however_many_prompts_it_has(feature_cache: FeatureCache, split: CachedSplit) -> None:
    images = feature_cache.samples.samples.image_rows[split.samples]
    one_image = split.samples[images == images[0]]
    assert len(one_image) > 1
    assert split.load(Draw.whole(one_image)).inputs.features["last"].shape[0] == 1


def test_only_the_layers_that_are_asked_for_are_loaded(any_cache: FeatureCache) -> None:
    split = CachedSplit(any_cache, "train", (8, 8), layers=("last",))
    inputs = split.load(Draw.whole(split.samples[:3])).inputs
    assert list(inputs.features) == list(inputs.cls) == ["last"]


def test_a_target_cell_is_set_where_the_mask_covers_at_least_half_of_it(
    feature_cache: FeatureCache, split: CachedSplit
) -> None:
    row = int(split.samples[np.flatnonzero(~feature_cache.samples.samples.no_target[split.samples])[0]])
    mask = torch.from_numpy(feature_cache.samples.samples.target(row)).double()
    share = torch.nn.functional.adaptive_avg_pool2d(mask[None, None], (16, 24))[0, 0]
    target = split.load(Draw.whole(np.array([row]))).targets[0]
    assert target.any()
    assert torch.equal(target > 0.5, share >= 0.5)


def test_targets_that_nobody_asks_for_are_empty(feature_cache: FeatureCache) -> None:
    split = CachedSplit(feature_cache, "val", None)
    assert split.load(split.in_order(3)[0]).targets.shape == (3, 0, 0)


# What a store may lack


def test_only_layers_with_a_cls_token_give_one(
    tmp_path: Path, samples_path: Path, prompt_extraction: Extraction
) -> None:
    cache = cache_of(WithoutCls(), tmp_path, samples_path, prompt_extraction)
    for residency in RESIDENCIES:
        split = CachedSplit(cache, "train", (8, 8), residency=residency)
        inputs = split.load(Draw.whole(split.samples[:3])).inputs
        assert list(inputs.features) == ["fine", "coarse"]
        assert list(inputs.cls) == list(inputs.to("cpu").cls) == ["coarse"]
    split = CachedSplit(cache, "train", None, layers=("fine",))
    assert split.load(Draw.whole(split.samples[:3])).inputs.cls == {}


def test_a_head_is_told_which_of_its_layers_a_store_lacks(feature_cache: FeatureCache) -> None:
    with pytest.raises(UsageError, match=r"lacks layers that the head reads: 9, 10\. It holds 1, last"):
        CachedSplit(feature_cache, "train", None, layers=("9", "last", "10"))


def test_no_head_is_trained_on_a_store_without_layers(
    tmp_path: Path, samples_path: Path, prompt_extraction: Extraction
) -> None:
    cache = cache_of(WithoutLayers(), tmp_path, samples_path, prompt_extraction)
    assert cache.images.attention("mean_token").shape == (24, 3)
    for head, arguments in (("linear", {}), ("cross_attention", {"layers": ["last"]})):
        with pytest.raises(UsageError, match=r"image_features-.* holds no layers, of which a head reads one or more"):
            train(TrainConfig(head, arguments, epochs=1), cache, tmp_path / "run")
    with pytest.raises(UsageError, match=r"lacks layers that the head reads: last\. It holds none"):
        CachedSplit(cache, "val", None, layers=("last",))
    assert not (tmp_path / "run").exists()


# Where the features are


def test_values_and_order_are_the_same_wherever_the_features_are(any_cache: FeatureCache) -> None:
    splits = [
        CachedSplit(any_cache, "train", (8, 8), residency=residency, device="cpu", all_views=True)
        for residency in RESIDENCIES
    ]
    assert [part.residency for part in splits] == ["device", "ram", "disk", "ram"]
    orders = [part.epoch(seed=1, epoch=2, batch_size=7) for part in splits]
    for order in orders[1:]:
        assert draws_of(order) == draws_of(orders[0])
    for draws in zip(*orders, strict=True):
        batches = [part.load(draw) for part, draw in zip(splits, draws, strict=True)]
        for batch in batches[1:]:
            assert_equal_batches(batch, batches[0])


@pytest.mark.parametrize(("spare_bytes", "residency"), [(0, "ram"), (-2, "disk")])
def test_features_are_read_from_disk_where_they_would_fill_more_than_half_of_free_memory(
    any_cache: FeatureCache, monkeypatch: pytest.MonkeyPatch, spare_bytes: int, residency: Residency
) -> None:
    task, images = any_cache.samples.samples, any_cache.images
    num_images = len(set(task.image_rows[task.rows_of_split("train")].tolist()))
    arrays = [name for name in images.store.layouts if name.split("/")[0] in ("features", "scale", "cls")]
    row_bytes = sum(images.store.layouts[name].row_bytes for name in arrays)
    needed_bytes = num_images * len(images.view_specs) * row_bytes
    free = SimpleNamespace(available=2 * needed_bytes + spare_bytes)
    monkeypatch.setattr(heads.residency.psutil, "virtual_memory", lambda: free)
    assert CachedSplit(any_cache, "train", (8, 8), all_views=True).residency == residency


def test_a_residency_that_is_asked_for_is_not_second_guessed(
    feature_cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads.residency.psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    assert CachedSplit(feature_cache, "train", (8, 8), residency="ram").residency == "ram"


# Order


def test_an_epoch_holds_every_sample_once(split: CachedSplit) -> None:
    batches = split.epoch(seed=0, epoch=0, batch_size=10)
    assert sorted(rows_of(batches)) == sorted(split.samples.tolist())
    assert {len(batch.samples) for batch in batches[:-1]} == {10}


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else(split: CachedSplit) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return rows_of(split.epoch(seed=seed, epoch=epoch, batch_size=8))

    first = order(0, 0)
    np.random.default_rng().random(5)
    torch.rand(3)
    assert order(0, 0) == first
    assert order(0, 1) != first
    assert order(1, 0) != first


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 50),
    batch_size=st.integers(1, 90),
    prompts_per_image=st.integers(1, 9),
    world_size=st.integers(1, 3),
)
def test_ranks_deal_the_batches_of_one_process_round_and_the_first_again_to_come_out_even(
    split: CachedSplit, seed: int, epoch: int, batch_size: int, prompts_per_image: int, world_size: int
) -> None:
    asked = {"seed": seed, "epoch": epoch, "batch_size": batch_size, "prompts_per_image": prompts_per_image}
    alone = draws_of(split.epoch(**asked))
    shares = [draws_of(split.epoch(**asked, rank=rank, world_size=world_size)) for rank in range(world_size)]
    steps = -(-len(alone) // world_size)
    assert [len(share) for share in shares] == [steps] * world_size
    dealt = [share[step] for step in range(steps) for share in shares]
    assert dealt == [alone[place % len(alone)] for place in range(steps * world_size)]
    assert {row for samples, _ in dealt for row in samples} == set(split.samples.tolist())


@pytest.mark.parametrize("step", [0, 1, 4, 9])
def test_who_starts_at_a_step_gets_exactly_the_rest_of_the_epoch(any_cache: FeatureCache, step: int) -> None:
    def fresh(residency: Residency) -> CachedSplit:
        return CachedSplit(any_cache, "train", (8, 8), residency=residency, all_views=True)

    def draws(part: CachedSplit) -> list[Draw]:
        return part.epoch(seed=3, epoch=1, batch_size=7, rank=1, world_size=2)

    whole, resumed = fresh("ram"), fresh("disk")
    for draw in draws(whole):
        whole.load(draw)  # what went before leaves no trace
    rest, expected = draws(resumed)[step:], draws(whole)[step:]
    assert draws_of(rest) == draws_of(expected)
    for mine, yours in zip(rest, expected, strict=True):
        assert_equal_batches(resumed.load(mine), whole.load(yours))


def test_prompts_of_one_image_stand_side_by_side(feature_cache: FeatureCache, split: CachedSplit) -> None:
    dealt = rows_of(split.epoch(seed=0, epoch=0, batch_size=8, prompts_per_image=2))
    images = feature_cache.samples.samples.image_rows[dealt]
    assert np.mean(images[0::2] == images[1::2]) > 0.9


def test_validation_goes_through_every_sample_once_image_by_image(any_cache: FeatureCache) -> None:
    split = CachedSplit(any_cache, "val", (8, 8))
    draws = split.in_order(5)
    assert sorted(rows_of(draws)) == split.samples.tolist()
    images = any_cache.samples.samples.image_rows[rows_of(draws)]
    assert np.count_nonzero(np.diff(images)) == len(set(images.tolist())) - 1
    assert not any(draw.views.any() for draw in draws)


# What a split leaves out


def test_samples_of_an_image_that_failed_are_left_out_and_counted(any_cache: FeatureCache) -> None:
    samples = any_cache.samples.samples
    image = int(samples.image_rows[samples.rows_of_split("train")[0]])
    valid = any_cache.images.valid.copy()
    valid[any_cache.image_rows[image]] = False
    images = ImageFeatures(any_cache.images.store)
    images.__dict__["valid"] = valid
    split = CachedSplit(dataclasses.replace(any_cache, images=images), "train", (8, 8), all_views=True)
    lost = int((samples.image_rows[samples.rows_of_split("train")] == image).sum())
    assert len(split) == len(samples.rows_of_split("train")) - lost
    assert lost > 0
    assert image not in samples.image_rows[split.samples]


def test_a_split_of_nothing_but_failures_is_refused(feature_cache: FeatureCache) -> None:
    images = ImageFeatures(feature_cache.images.store)
    images.__dict__["valid"] = np.zeros_like(feature_cache.images.valid)
    with pytest.raises(UsageError, match="split 'val' holds no sample whose image could be encoded"):
        CachedSplit(dataclasses.replace(feature_cache, images=images), "val", (8, 8))


def test_an_unknown_split_is_named_with_the_nearest_known(feature_cache: FeatureCache) -> None:
    with pytest.raises(UsageError, match="did you mean 'train'"):
        CachedSplit(feature_cache, "trian", (8, 8))


def test_the_caches_of_these_tests_are_what_they_are_taken_for(
    int8_cache: FeatureCache, views_cache: FeatureCache
) -> None:
    assert int8_cache.images.features("last").dtype == np.int8
    assert len(views_cache.images.view_specs) == 4
    assert any(view.flip for view in views_cache.images.views)
