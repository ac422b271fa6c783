"""A dry run says what training takes, without leaving a trace."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cache_schema.errors import UsageError
from cache_schema.features import FeatureCache
from heads.dry_run import dry_run
from heads.train import train
from heads.train_config import TrainConfig

LINEAR = TrainConfig(head="linear", epochs=2, batch_size=8, target_size=(8, 8))


def test_parameters_steps_and_operations_are_those_of_the_run(feature_cache: FeatureCache, tmp_path: Path) -> None:
    found = dry_run(LINEAR, feature_cache)
    run = train(LINEAR, feature_cache, tmp_path / "run")
    assert found.num_parameters == found.num_trainable == run.num_parameters
    assert found.steps_per_epoch * LINEAR.epochs == run.num_steps
    _, grid_height, grid_width, width = feature_cache.images.features(feature_cache.images.layers[-1]).shape
    pooled = feature_cache.prompts.store.layouts["pooled"].shape[1]
    assert found.flops_per_prompt == pytest.approx(2 * width * (pooled + grid_height * grid_width))
    assert found.weight_bytes == 4 * 4 * found.num_parameters
    assert found.epoch_s == pytest.approx(found.step_s * found.steps_per_epoch)


def test_more_prompts_keep_more_for_the_backward_pass(feature_cache: FeatureCache) -> None:
    small, large = (dry_run(dataclasses.replace(LINEAR, batch_size=size), feature_cache) for size in (4, 16))
    assert 2 < large.activation_bytes / small.activation_bytes < 6
    assert small.feature_bytes == large.feature_bytes > 0


def test_the_table_names_what_people_ask_for(feature_cache: FeatureCache) -> None:
    table = dry_run(LINEAR, feature_cache).table()
    assert all(word in table for word in ("parameters", "GFLOP a prompt", "MB of features", "min for 2 epochs"))


def test_an_unknown_head_is_named(feature_cache: FeatureCache) -> None:
    with pytest.raises(UsageError, match="unknown head 'linea'"):
        dry_run(dataclasses.replace(LINEAR, head="linea"), feature_cache)
