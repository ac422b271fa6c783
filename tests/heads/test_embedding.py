"""Losses that only compare: what is read for them, which images are one and the same, and what validation tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_schema.errors import UsageError
from cache_schema.features import FeatureCache
from heads.contrastive import clip_contrastive, info_nce, sigmoid_contrastive
from heads.data import CachedSplit, Draw
from heads.dry_run import dry_run
from heads.embedding import Embedder
from heads.inputs import Embeddings, HeadInputs, HeadOutputs
from heads.linear import build_linear
from heads.talk2dino import Talk2DinoHead
from heads.train import TrainRequest, train, train_together
from heads.train_config import TrainConfig
from tests.heads.laws import make_inputs
from tests.heads.test_talk2dino import SHAPES, make_head

COMPARE = TrainConfig(
    head="talk2dino",
    arguments={"alignment": "cls"},
    loss={"clip_contrastive": 1.0},
    epochs=2,
    batch_size=8,
    prompts_per_image=2,
    target_size=(8, 8),
)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool, tuple[str, ...]]]:
    """What is asked of a head: which method, in training or not, with which token grids."""
    calls: list[tuple[str, bool, tuple[str, ...]]] = []
    for name in ("forward", "embed"):
        method = getattr(Talk2DinoHead, name)

        def note(self: Talk2DinoHead, inputs: HeadInputs, name: str = name, method: Any = method) -> Any:
            calls.append((name, self.training, tuple(inputs.features)))
            return method(self, inputs)

        monkeypatch.setattr(Talk2DinoHead, name, note)
    return calls


def test_learning_by_comparison_reads_no_token_grids(
    seen: list[tuple[str, bool, tuple[str, ...]]], feature_cache: FeatureCache, tmp_path: Path
) -> None:
    train(COMPARE, feature_cache, tmp_path / "run")
    assert {call for call in seen if call[1]} == {("embed", True, ())}
    # where there are masks, validation asks for them
    assert {call for call in seen if not call[1]} == {("forward", False, ("last",))}


def test_a_mean_of_patches_is_learned_from_the_grid(
    seen: list[tuple[str, bool, tuple[str, ...]]], feature_cache: FeatureCache, tmp_path: Path
) -> None:
    config = TrainConfig(**{**vars(COMPARE), "arguments": {"alignment": "mean_patch"}, "epochs": 1})
    train(config, feature_cache, tmp_path / "run")
    assert {call for call in seen if call[1]} == {("embed", True, ("last",))}


def test_beside_a_head_that_draws_masks_it_learns_the_same(feature_cache: FeatureCache, tmp_path: Path) -> None:
    linear = TrainConfig("linear", epochs=2, batch_size=8, prompts_per_image=2, target_size=(8, 8))
    alone = train(COMPARE, feature_cache, tmp_path / "alone")
    requests = [TrainRequest(COMPARE, tmp_path / "compare"), TrainRequest(linear, tmp_path / "linear")]
    together = train_together(requests, feature_cache)[0]
    weights = [(run / "last" / "model.safetensors").read_bytes() for run in (alone.run_dir, together.run_dir)]
    assert weights[0] == weights[1]


def test_validation_tells_how_well_prompts_find_their_images(feature_cache: FeatureCache, tmp_path: Path) -> None:
    train(COMPARE, feature_cache, tmp_path / "run")
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for entry in entries:
        recall = [entry[f"val_text_to_image_recall@{rank}"] for rank in (1, 5, 10)]
        assert 0 <= recall[0] <= recall[1] <= recall[2] <= 1
        assert entry["val_mean_iou"] is not None
    num_images = len(set(feature_cache.samples.samples.image_rows[feature_cache.usable_samples("val")].tolist()))
    assert num_images > 1, "else everything is found"
    other = TrainConfig("linear", epochs=1, target_size=(8, 8))
    train(other, feature_cache, tmp_path / "linear")
    assert "recall" not in (tmp_path / "linear" / "metrics.jsonl").read_text()


def test_a_dry_run_counts_what_is_read(feature_cache: FeatureCache) -> None:
    comparing = dry_run(COMPARE, feature_cache)
    drawing = dry_run(TrainConfig(**{**vars(COMPARE), "loss": {"bce": 1.0}}), feature_cache)
    layout = feature_cache.images.features("last").layout
    num_images = len(set(feature_cache.samples.samples.image_rows[feature_cache.usable_samples("train")].tolist()))
    assert drawing.feature_bytes - comparing.feature_bytes == num_images * layout.row_bytes


def test_a_head_that_compares_nothing_says_so(feature_cache: FeatureCache, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gives no embeddings"):
        train(TrainConfig("linear", loss={"info_nce": 1.0}, target_size=(8, 8)), feature_cache, tmp_path / "run")
    head, inputs = build_linear(SHAPES), make_inputs(SHAPES)
    with pytest.raises(UsageError, match="take talk2dino"):
        Embedder(head)(inputs)


def test_two_views_of_an_image_are_one_image(views_cache: FeatureCache) -> None:
    split = CachedSplit(views_cache, "train", None, grids=(), all_views=True)
    first = split.samples[0]
    of_one = np.flatnonzero(views_cache.samples.samples.image_rows == views_cache.samples.samples.image_rows[first])
    batch = split.load(Draw(np.array([of_one[0], of_one[1], split.samples[-1]]), np.array([0, 2, 0])))
    assert not batch.inputs.features
    assert batch.inputs.image_index.tolist() == [0, 1, 2]
    assert batch.unmasked.image_ids is not None
    first_id, second_id, other_id = batch.unmasked.image_ids.tolist()
    assert first_id == second_id != other_id


@pytest.mark.parametrize("loss", [clip_contrastive, info_nce, sigmoid_contrastive])
def test_images_with_one_id_count_as_one(loss: Any) -> None:
    """Three images, of which the first two are the same: as if prompts of both were about the first."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(3, 1, 5, generator=generator)
    image[1] = image[0]
    embeddings = Embeddings(image, torch.randn(4, 5, generator=generator), torch.tensor(3.0), torch.tensor(-1.0))
    apart, merged = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 0, 2, 0])
    more = {} if loss is sigmoid_contrastive else {"same_image": "masked"}
    found = loss(embeddings, apart, torch.tensor([7, 7, 9]), **more)
    torch.testing.assert_close(found, loss(embeddings, merged, **more))
    assert not torch.isclose(found, loss(embeddings, apart, **more))


def test_an_embedder_gives_masks_of_nothing() -> None:
    outputs: HeadOutputs = Embedder(make_head())(make_inputs(SHAPES))
    assert outputs.mask_logits.shape == (8, 0, 0)
    assert outputs.embeddings is not None
