"""The stages of finetuning on encoders whose answers are known: parity, no jump, resuming, what learns, what stays."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cache_schema.errors import StoreMismatchError, UsageError
from cache_schema.features import FeatureCache
from heads.data import CachedSplit
from heads.finetune import FinetuneConfig, finetune, finetune_name
from heads.live import LiveEncoders
from heads.parity import check_parity
from heads.train import TrainRequest, train, train_together
from heads.train_config import TrainConfig
from tests.heads.live_encoders import FakeFactory, FakeImages
from tests.heads.test_train import KilledError, kill_after, read_history

CONTRAST = TrainConfig(
    head="talk2dino",
    arguments={"alignment": "cls", "contrastive_scale": 10.0},
    loss={"clip_contrastive": 1.0},
    epochs=2,
    batch_size=8,
    prompts_per_image=2,
    learning_rate=3e-3,
    target_size=(16, 16),
    checkpoint_steps=2,
)
MASKS = TrainConfig(
    head="linear",
    epochs=2,
    batch_size=8,
    prompts_per_image=2,
    learning_rate=3e-3,
    target_size=(16, 16),
    checkpoint_steps=2,
)
BOTH = FinetuneConfig(CONTRAST, MASKS, sides=("image", "text"), parity_samples=4)


def quiet(text: str) -> None:
    pass


def run(config: FinetuneConfig, cache: FeatureCache, run_dir: Path, **options: Any) -> Any:
    factory = FakeFactory(cache, config.sides, dropout=config.dropout, images_at_once=config.images_at_once)
    return finetune(config, cache, factory, run_dir, say=quiet, **options)


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def finished(feature_cache: FeatureCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("finetune") / "run"
    run(BOTH, feature_cache, run_dir)
    return run_dir


# Parity


def test_encoders_that_say_what_the_cache_says_pass(feature_cache: FeatureCache) -> None:
    found = check_parity(FakeFactory(feature_cache, ("image", "text")).frozen(), "train", num=5)
    assert [parity.name for parity in found] == [
        "image features last",
        "image cls last",
        "prompt tokens",
        "prompt pooled",
    ]
    assert all(parity.holds and parity.max_error == 0 for parity in found)
    assert "cosine 1.000000 (least 1.000000), greatest error 0, 5 vectors" in found[-1].summary()


def test_encoders_that_say_something_else_are_named_with_what_differs(feature_cache: FeatureCache) -> None:
    live = FakeFactory(feature_cache).frozen()
    assert isinstance(live.image, FakeImages)
    torch.nn.init.normal_(live.image.adapter.up.weight)
    with pytest.raises(
        StoreMismatchError, match=r"DIFFERS image features last: cosine 0\.[\s\S]*fingerprints are the same"
    ):
        check_parity(live, "train")
    live.image.identity = {**live.image.identity, "weights": "0" * 64}
    with pytest.raises(
        StoreMismatchError, match=r"They differ in image\.weights \([0-9a-f]{12}\.\.\. in the cache, 000"
    ):
        check_parity(live, "train")


def test_features_of_another_shape_are_named(feature_cache: FeatureCache) -> None:
    live = FakeFactory(feature_cache).frozen()
    assert isinstance(live.image, FakeImages)
    height, width, channels = live.image.grid
    live.image.grid = [width * height, 1, channels]
    with pytest.raises(StoreMismatchError, match=r"take the encoder and the input size"):
        check_parity(live, "train")


# What is learned


def test_both_stages_leave_adapters_and_what_people_ask_for(finished: Path, feature_cache: FeatureCache) -> None:
    told = json.loads((finished / "finetuning.json").read_bytes())
    assert list(told["stages"]) == ["contrastive", "segmentation"]
    assert told["adapted"] == {"image": ["adapter"], "text": ["adapter"]}
    assert told["num_adapted"] == sum(
        value.numel()
        for live in FakeFactory(feature_cache, BOTH.sides).adapted(None, learn=True).sides.values()
        for value in live.parameters()
        if value.requires_grad
    )
    for name in ("adapter", "text_adapter"):
        first, second = adapter_of(finished / "contrastive" / name), adapter_of(finished / "segmentation" / name)
        assert first["up.weight"].abs().max() > 0
        assert not same(first, second)
        assert same(second, adapter_of(finished / name))
    for stage in ("contrastive", "segmentation"):
        assert len(read_history(finished / stage)) == 2
    config = json.loads((finished / "segmentation" / "config.json").read_bytes())
    assert set(config["finetune"]["before"]) == {"image", "text"}


def test_a_finished_one_is_left_alone(finished: Path, feature_cache: FeatureCache) -> None:
    files = {path: path.stat().st_mtime_ns for path in finished.rglob("adapter_model.safetensors")}
    again = run(BOTH, feature_cache, finished)
    assert all(training.reused for training in again.stages.values())
    kept = {path for path in files if path.parent.parent != finished}
    assert all(path.stat().st_mtime_ns == files[path] for path in kept)
    with pytest.raises(UsageError, match="holds a run with other settings"):
        run(dataclasses.replace(BOTH, rank=4), feature_cache, finished)


def test_a_trained_head_goes_on_without_a_jump(feature_cache: FeatureCache, tmp_path: Path) -> None:
    trained = train(dataclasses.replace(MASKS, epochs=3), feature_cache, tmp_path / "cache")
    assert trained.best_val_mean_iou is not None
    config = FinetuneConfig(segmentation=MASKS, parity_samples=4)
    run(config, feature_cache, tmp_path / "live", head=trained.run_dir / "best")
    history = read_history(tmp_path / "live" / "segmentation")
    assert [entry["epoch"] for entry in history] == [0, 1, 2]
    assert history[0]["step"] == 0
    assert history[0]["train_loss"] is None
    assert history[0]["val_mean_iou"] == pytest.approx(trained.best_val_mean_iou, abs=1e-6)


def test_a_head_of_another_shape_is_refused(feature_cache: FeatureCache, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is another than is to be trained"):
        run(
            FinetuneConfig(segmentation=dataclasses.replace(MASKS, head="film")),
            feature_cache,
            tmp_path / "run",
            head=finished / "segmentation" / "best",
        )
    with pytest.raises(UsageError, match="no head at"):
        finetune_name(BOTH, feature_cache, tmp_path)


def test_the_head_may_learn_alone(feature_cache: FeatureCache, finished: Path, tmp_path: Path) -> None:
    run(dataclasses.replace(BOTH, head_alone=True), feature_cache, tmp_path / "run")
    for name in ("adapter", "text_adapter"):
        assert same(adapter_of(tmp_path / "run" / name), adapter_of(tmp_path / "run" / "contrastive" / name))
        assert same(adapter_of(tmp_path / "run" / name), adapter_of(finished / "contrastive" / name))


@pytest.mark.parametrize("side", ["image", "text"])
def test_a_side_that_stays_frozen_is_read_from_the_cache(
    side: str, feature_cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[str, ...]] = []
    real = CachedSplit.load

    def note(self: CachedSplit, draw: Any) -> Any:
        batch = real(self, draw)
        loaded.append((*batch.inputs.features, *batch.inputs.cls))
        return batch

    config = dataclasses.replace(BOTH, contrastive=None, sides=(side,))
    live = FakeFactory(feature_cache, config.sides).adapted(None, learn=True)
    monkeypatch.setattr(CachedSplit, "load", note)
    request = TrainRequest(MASKS, tmp_path / "run")
    train_together([request], feature_cache, encoders=live)
    assert set(loaded) == ({()} if side == "image" else {("last", "last")})
    assert list(live.sides) == [side]
    assert all(value.abs().max() > 0 for value in live.state().values())


@pytest.mark.parametrize("num_losses", [3, 12])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_killed_finetuning_ends_exactly_like_an_uninterrupted_one(
    num_losses: int, dropout: float, feature_cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(BOTH, dropout=dropout)
    run(config, feature_cache, tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_after(patch, num_losses)
        with pytest.raises(KilledError):
            run(config, feature_cache, tmp_path / "killed")
    run(config, feature_cache, tmp_path / "killed")
    files = ["adapter", "text_adapter", "contrastive/adapter", "segmentation/last/text_adapter"]
    for name in files:
        assert same(adapter_of(tmp_path / "whole" / name), adapter_of(tmp_path / "killed" / name))
    for name in ("best", "last"):
        weights = [
            load_file(tmp_path / run / "segmentation" / name / "model.safetensors") for run in ("whole", "killed")
        ]
        assert same(*weights)
    assert read_history(tmp_path / "whole" / "segmentation") == read_history(tmp_path / "killed" / "segmentation")


def test_the_best_adapters_are_those_that_are_kept(feature_cache: FeatureCache, tmp_path: Path) -> None:
    """The rate is so high that training only ever gets worse than its start."""
    on_train = dataclasses.replace(MASKS, val_split="train")
    well = dataclasses.replace(on_train, epochs=25, learning_rate=2e-2, patience=None)
    trained = train(well, feature_cache, tmp_path / "cache")
    wild = dataclasses.replace(on_train, learning_rate=30.0, clip_norm=0.0, val_samples=8)
    live = FakeFactory(feature_cache).adapted(None, learn=True)
    request = TrainRequest(wild, tmp_path / "live", initial=trained.run_dir / "best")
    training = train_together([request], feature_cache, encoders=live)[0]
    assert training.best_step == 0
    assert adapter_of(tmp_path / "live" / "adapter")["up.weight"].abs().max() == 0
    assert adapter_of(tmp_path / "live" / "last" / "adapter")["up.weight"].abs().max() > 0
    # validated in full, with the adapters of the best
    assert training.best_val_mean_iou == pytest.approx(trained.best_val_mean_iou, abs=1e-6)


def test_a_batch_encoded_in_parts_teaches_the_same(feature_cache: FeatureCache, tmp_path: Path) -> None:
    config = dataclasses.replace(BOTH, segmentation=None, sides=("image",))
    run(config, feature_cache, tmp_path / "whole")
    run(dataclasses.replace(config, images_at_once=1), feature_cache, tmp_path / "parts")
    whole, parts = adapter_of(tmp_path / "whole" / "adapter"), adapter_of(tmp_path / "parts" / "adapter")
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, atol=1e-4, rtol=1e-2)
    heads = [load_file(tmp_path / run / "contrastive" / "last" / "model.safetensors") for run in ("whole", "parts")]
    assert not torch.equal(heads[0]["log_contrastive_scale"], torch.tensor(10.0).log())
    for key, value in heads[0].items():
        torch.testing.assert_close(heads[1][key], value, atol=1e-4, rtol=1e-2)


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"contrastive": None, "segmentation": None}, "there is no stage"),
        ({"sides": ("images",)}, "unknown side 'images': did you mean 'image'"),
        ({"sides": ()}, "name image, text, or both"),
        ({"sides": ("image", "image")}, "name image, text, or both"),
        ({"rank": 0}, "rank is 0"),
        ({"images_at_once": 0}, "images_at_once is 0"),
        ({"adapter_rate": 0.0}, "adapter_rate is 0.0"),
        ({"contrastive": MASKS}, "give it terms that compare"),
        ({"head_alone": True, "contrastive": None}, "it needs both stages"),
        ({"from_states": True}, "first_block of an adapted image encoder"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(BOTH, **settings)


def test_encoders_learn_with_one_head_without_a_running_mean(feature_cache: FeatureCache, tmp_path: Path) -> None:
    live: LiveEncoders = FakeFactory(feature_cache).adapted(None, learn=True)
    requests = [TrainRequest(MASKS, tmp_path / name) for name in ("one", "two")]
    with pytest.raises(UsageError, match="learn together with one head"):
        train_together(requests, feature_cache, encoders=live)
    with pytest.raises(UsageError, match="a running mean of the weights"):
        train_together([TrainRequest(dataclasses.replace(MASKS, ema=0.9), tmp_path)], feature_cache, encoders=live)
