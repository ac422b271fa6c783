"""The training loop: what it leaves behind, that it learns, and that killing it changes nothing."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import heads.train
import heads.trainee
from cache_schema.errors import UsageError
from cache_schema.features import FeatureCache
from heads.checkpoint import load_head
from heads.residency import Residency
from heads.runs import Training, run_name
from heads.train import TrainRequest, train, train_together
from heads.train_config import TrainConfig
from tests.heads.test_sam_weights import make_sam

SMALL = TrainConfig(
    head="cross_attention",
    arguments={"dim": 8, "inner_dim": 8, "num_heads": 2, "hidden_dim": 16, "depth": 1, "self_attention": True},
    epochs=3,
    batch_size=16,
    learning_rate=3e-3,
    target_size=(16, 24),
    checkpoint_steps=2,
)


class KilledError(Exception):
    pass


def kill_after(monkeypatch: pytest.MonkeyPatch, num_losses: int) -> None:
    """Let training die at its `num_losses`-th loss; whatever is on disk then is all that is left."""
    real, calls = heads.trainee.total_loss, [0]

    def dying(*args: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == num_losses:
            raise KilledError
        return real(*args)

    monkeypatch.setattr(heads.trainee, "total_loss", dying)


def read_lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """Every line without what a clock measured."""
    return [{key: value for key, value in line.items() if not key.endswith("_s")} for line in read_lines(run_dir)]


def weights_of(run: Training) -> list[bytes]:
    """The files of both checkpoints."""
    return [(run.run_dir / checkpoint / "model.safetensors").read_bytes() for checkpoint in ("best", "last")]


@pytest.fixture(scope="module")
def uninterrupted(feature_cache: FeatureCache, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return train(SMALL, feature_cache, tmp_path_factory.mktemp("runs") / "whole")


def test_a_run_folder_holds_what_scripts_rely_on(uninterrupted: Training, feature_cache: FeatureCache) -> None:
    run_dir = uninterrupted.run_dir
    config = json.loads((run_dir / "config.json").read_text())
    assert config["stores"] == feature_cache.fingerprints
    assert config["config"]["arguments"] == SMALL.arguments
    assert len(read_history(run_dir)) == SMALL.epochs
    for checkpoint in ("best", "last"):
        assert {path.name for path in (run_dir / checkpoint).iterdir()} == {"config.json", "model.safetensors"}
    assert list((run_dir / "tensorboard").rglob("events.out.*"))
    assert not (run_dir / "state.pt").exists()
    assert str(run_dir.parent) not in (run_dir / "config.json").read_text()


def test_a_validation_line_says_at_which_resolution_it_was_measured(uninterrupted: Training) -> None:
    line = read_history(uninterrupted.run_dir)[-1]
    assert line["val_resolution"] == [16, 24]
    assert {
        "step",
        "epoch",
        "train_loss",
        "val_loss",
        "val_mean_iou",
        "val_overall_iou",
        "learning_rate",
    } <= line.keys()
    assert {"data_wait_s", "train_s", "elapsed_s"} <= read_lines(uninterrupted.run_dir)[-1].keys()


def test_a_line_says_how_long_training_waited_for_batches(uninterrupted: Training) -> None:
    lines = read_lines(uninterrupted.run_dir)
    assert all(0 <= line["data_wait_s"] <= line["train_s"] for line in lines)
    assert sum(line["train_s"] for line in lines) <= lines[-1]["elapsed_s"] + 0.01  # each is rounded


def test_waits_of_a_killed_epoch_are_counted_on(
    feature_cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = heads.train.timed
    monkeypatch.setattr(heads.train, "timed", lambda items: ((item, 1.0) for item, _ in real(items)))
    with monkeypatch.context() as patch:
        kill_after(patch, 4)
        with pytest.raises(KilledError):
            train(SMALL, feature_cache, tmp_path / "run")
    lines = read_lines(train(SMALL, feature_cache, tmp_path / "run").run_dir)
    steps = [line["step"] for line in lines]
    assert [line["data_wait_s"] for line in lines] == [float(steps[0])] * len(lines)


def test_training_lowers_its_loss(uninterrupted: Training) -> None:
    losses = [line["train_loss"] for line in read_history(uninterrupted.run_dir)]
    assert losses[-1] < losses[0]


def test_the_best_checkpoint_is_the_one_of_the_best_validation(uninterrupted: Training) -> None:
    history = read_history(uninterrupted.run_dir)
    best = max(history, key=lambda line: line["val_mean_iou"])
    assert (uninterrupted.best_step, uninterrupted.best_val_mean_iou) == (best["step"], best["val_mean_iou"])


@pytest.mark.parametrize("num_losses", [1, 2, 4, 8, 9, 13])
def test_a_killed_run_goes_on_and_ends_exactly_like_an_uninterrupted_one(
    num_losses: int,
    uninterrupted: Training,
    feature_cache: FeatureCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        kill_after(patch, num_losses)
        with pytest.raises(KilledError):
            train(SMALL, feature_cache, tmp_path / "run")
    torch.manual_seed(12345)  # a fresh process would not have the old one's random state
    resumed = train(SMALL, feature_cache, tmp_path / "run")
    assert read_history(resumed.run_dir) == read_history(uninterrupted.run_dir)
    assert weights_of(resumed) == weights_of(uninterrupted)


def test_a_resumed_run_loses_at_most_one_checkpoint_interval(
    feature_cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_after(patch, 4)
        with pytest.raises(KilledError):
            train(SMALL, feature_cache, tmp_path / "run")
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["progress"]["step"] == 2


def test_a_finished_run_is_not_trained_again(
    uninterrupted: Training, feature_cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_after(monkeypatch, 1)
    again = train(SMALL, feature_cache, uninterrupted.run_dir)
    assert again.reused
    assert dataclasses.replace(again, reused=False) == uninterrupted


def test_equal_seeds_give_equal_heads_and_others_do_not(
    uninterrupted: Training, feature_cache: FeatureCache, tmp_path: Path
) -> None:
    same = train(SMALL, feature_cache, tmp_path / "same")
    other = train(dataclasses.replace(SMALL, seed=1), feature_cache, tmp_path / "other")
    reference = load_head(uninterrupted.run_dir / "last")[1].state_dict()
    assert all(
        torch.equal(value, reference[name]) for name, value in load_head(same.run_dir / "last")[1].state_dict().items()
    )
    assert any(
        not torch.equal(value, reference[name])
        for name, value in load_head(other.run_dir / "last")[1].state_dict().items()
    )


def test_training_stops_when_validation_no_longer_improves(feature_cache: FeatureCache, tmp_path: Path) -> None:
    still = dataclasses.replace(SMALL, learning_rate=1e-12, weight_decay=0.0, epochs=8, patience=2)
    run = train(still, feature_cache, tmp_path / "run")
    assert run.stopped_early
    assert len(read_history(run.run_dir)) == 3


def test_a_run_folder_of_other_settings_is_not_overwritten(
    uninterrupted: Training, feature_cache: FeatureCache
) -> None:
    with pytest.raises(UsageError, match="holds a run with other settings"):
        train(dataclasses.replace(SMALL, seed=7), feature_cache, uninterrupted.run_dir)


def test_an_unknown_loss_is_named(feature_cache: FeatureCache, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give a weight for one or more of bce, dice, focal"):
        train(dataclasses.replace(SMALL, loss={"hinge": 1.0}), feature_cache, tmp_path / "run")


def test_a_run_is_named_after_everything_that_decides_it(feature_cache: FeatureCache) -> None:
    names = {
        run_name(config, feature_cache)
        for config in (SMALL, dataclasses.replace(SMALL, seed=1), dataclasses.replace(SMALL, loss={"bce": 1.0}))
    }
    assert len(names) == 3
    assert all(name.startswith("cross_attention-") for name in names)


def test_dice_and_focal_train_too(feature_cache: FeatureCache, tmp_path: Path) -> None:
    config = TrainConfig(head="linear", loss={"dice": 1.0, "focal": 1.0}, epochs=2, target_size=(8, 8))
    history = read_history(train(config, feature_cache, tmp_path / "run").run_dir)
    assert history[-1]["train_loss"] < history[0]["train_loss"]


@pytest.mark.parametrize("kind", ["int8_cache", "views_cache"])
@pytest.mark.parametrize("residency", ["ram", "disk"])
def test_heads_learn_from_other_caches_too_and_go_on_exactly(
    kind: str,
    residency: Residency,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache: FeatureCache = request.getfixturevalue(kind)
    whole = train(SMALL, cache, tmp_path / "whole", residency=residency)
    losses = [line["train_loss"] for line in read_history(whole.run_dir)]
    assert losses[-1] < losses[0]
    with monkeypatch.context() as patch:
        kill_after(patch, 9)
        with pytest.raises(KilledError):
            train(SMALL, cache, tmp_path / "run", residency=residency)
    resumed = train(SMALL, cache, tmp_path / "run", residency=residency)
    assert read_history(resumed.run_dir) == read_history(whole.run_dir)
    assert weights_of(resumed) == weights_of(whole)


def test_where_features_are_kept_changes_nothing_that_is_learned(
    uninterrupted: Training, feature_cache: FeatureCache, tmp_path: Path
) -> None:
    for residency in ("device", "disk"):
        run = train(SMALL, feature_cache, tmp_path / residency, residency=residency)  # type: ignore[arg-type]
        assert read_history(run.run_dir) == read_history(uninterrupted.run_dir)
        assert weights_of(run) == weights_of(uninterrupted)


def test_other_stores_make_another_run(
    feature_cache: FeatureCache, int8_cache: FeatureCache, views_cache: FeatureCache
) -> None:
    assert len({run_name(SMALL, cache) for cache in (feature_cache, int8_cache, views_cache)}) == 3


# Several heads in one pass


LINEAR = TrainConfig(head="linear", epochs=3, batch_size=16, learning_rate=3e-3, target_size=(8, 8), checkpoint_steps=3)
DROPPING = dataclasses.replace(LINEAR, head="film", arguments={"dim": 8, "num_heads": 2}, seed=5, data_seed=0)
SEVERAL = (SMALL, LINEAR, DROPPING)


def requests(folder: Path, configs: tuple[TrainConfig, ...] = SEVERAL) -> list[TrainRequest]:
    return [TrainRequest(config, folder / str(number)) for number, config in enumerate(configs)]


@pytest.fixture(scope="module")
def alone(feature_cache: FeatureCache, tmp_path_factory: pytest.TempPathFactory) -> list[Training]:
    folder = tmp_path_factory.mktemp("alone")
    return [train(request.config, feature_cache, request.run_dir) for request in requests(folder)]


def assert_alike(found: list[Training], expected: list[Training]) -> None:
    for mine, its in zip(found, expected, strict=True):
        assert read_history(mine.run_dir) == read_history(its.run_dir)
        assert weights_of(mine) == weights_of(its)


def test_heads_that_share_a_pass_learn_to_the_bit_what_each_learns_alone(
    alone: list[Training], feature_cache: FeatureCache, tmp_path: Path
) -> None:
    assert_alike(train_together(requests(tmp_path), feature_cache), alone)


@pytest.mark.parametrize("num_losses", [1, 5, 14, 27])
def test_a_killed_pass_goes_on_with_each_head_where_it_was(
    num_losses: int,
    alone: list[Training],
    feature_cache: FeatureCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        kill_after(patch, num_losses)
        with pytest.raises(KilledError):
            train_together(requests(tmp_path), feature_cache)
    assert_alike(train_together(requests(tmp_path), feature_cache), alone)


def test_each_batch_is_read_once_for_all_heads(
    feature_cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {}
    real = heads.train.CachedSplit.load
    for name, configs in (("one", SEVERAL[:1]), ("three", SEVERAL)):
        loaded: list[int] = []

        def load(self: Any, draw: Any, loaded: list[int] = loaded) -> Any:
            loaded.append(len(draw.samples))
            return real(self, draw)

        monkeypatch.setattr(heads.train.CachedSplit, "load", load)
        train_together(requests(tmp_path / name, configs), feature_cache)
        counts[name] = loaded
    assert counts["three"] == counts["one"]


def test_a_head_that_stops_early_leaves_the_others_alone(
    alone: list[Training], feature_cache: FeatureCache, tmp_path: Path
) -> None:
    still = dataclasses.replace(SMALL, learning_rate=0.0, weight_decay=0.0, patience=1)
    found = train_together(requests(tmp_path, (still, LINEAR)), feature_cache)
    assert (found[0].stopped_early, found[1].stopped_early) == (True, False)
    assert_alike(found[1:], alone[1:2])


def test_a_finished_head_is_not_trained_again_beside_one_that_is_not(
    alone: list[Training], feature_cache: FeatureCache
) -> None:
    again = train_together(
        [TrainRequest(config, run.run_dir) for config, run in zip(SEVERAL, alone, strict=True)], feature_cache
    )
    assert all(run.reused for run in again)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"batch_size": 8}, "batch_size is 16 and 8"),
        ({"epochs": 2}, "epochs is 3 and 2"),
        ({"seed": 3}, "data_seed is 0 and 3"),
        ({"val_samples": 5}, "val_samples is None and 5"),
    ],
)
def test_heads_that_would_see_other_batches_are_refused(
    changes: dict[str, Any], complaint: str, feature_cache: FeatureCache, tmp_path: Path
) -> None:
    configs = (SMALL, dataclasses.replace(LINEAR, **changes))
    with pytest.raises(UsageError, match=complaint):
        train_together(requests(tmp_path, configs), feature_cache)
    assert not list(tmp_path.iterdir())


def test_one_run_twice_is_refused(feature_cache: FeatureCache, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two of these runs are the same"):
        train_together([TrainRequest(SMALL, tmp_path), TrainRequest(SMALL, tmp_path)], feature_cache)


# What else a recipe can ask for


def test_gradients_of_several_batches_make_one_step(feature_cache: FeatureCache, tmp_path: Path) -> None:
    """With every loss a mean over equal batches, two batches of 8 are one of 16."""
    loss = {"bce": 1.0}
    whole = dataclasses.replace(LINEAR, loss=loss, prompts_per_image=1, epochs=1, warmup=0.0, schedule="constant")
    halves = dataclasses.replace(whole, batch_size=8, accumulate=2)
    found = [train(config, feature_cache, tmp_path / str(config.batch_size)) for config in (whole, halves)]
    first, second = (load_head(run.run_dir / "last")[1].state_dict() for run in found)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=2e-4, rtol=0.05)
    assert found[1].num_steps >= 2 * found[0].num_steps - 1


def test_what_is_kept_with_ema_is_the_running_mean(feature_cache: FeatureCache, tmp_path: Path) -> None:
    slow = dataclasses.replace(LINEAR, ema=0.9, epochs=1)
    run = train(slow, feature_cache, tmp_path / "ema")
    plain = train(dataclasses.replace(slow, ema=None), feature_cache, tmp_path / "plain")
    averaged, last = (load_head(one.run_dir / "last")[1].state_dict() for one in (run, plain))
    assert any(not torch.equal(averaged[name], last[name]) for name in last)
    assert read_history(run.run_dir)[0]["train_loss"] == read_history(plain.run_dir)[0]["train_loss"]


def test_a_killed_run_with_ema_and_accumulation_goes_on_exactly(
    feature_cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(DROPPING, ema=0.9, accumulate=2, checkpoint_steps=1)
    whole = train(config, feature_cache, tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_after(patch, 4)
        with pytest.raises(KilledError):
            train(config, feature_cache, tmp_path / "run")
    resumed = train(config, feature_cache, tmp_path / "run")
    assert_alike([resumed], [whole])


def test_parameters_can_have_their_own_rates(feature_cache: FeatureCache, tmp_path: Path) -> None:
    config = dataclasses.replace(LINEAR, epochs=1, weight_decay=0.0)
    frozen = train(dataclasses.replace(config, rates={"projection": 0.0}), feature_cache, tmp_path / "frozen")
    spec, trained = load_head(frozen.run_dir / "last")
    torch.manual_seed(config.seed)
    initial, final = spec.build().state_dict(), trained.state_dict()
    assert torch.equal(final["projection.weight"], initial["projection.weight"])
    assert not torch.equal(final["bias"], initial["bias"])
    with pytest.raises(UsageError, match="unknown beginning of parameter names in rates 'projektion'"):
        train(dataclasses.replace(config, rates={"projektion": 0.5}), feature_cache, tmp_path / "other")


def test_a_validation_of_a_part_is_made_whole_at_the_end(feature_cache: FeatureCache, tmp_path: Path) -> None:
    part = dataclasses.replace(LINEAR, val_samples=3)
    run, full = (train(config, feature_cache, tmp_path / str(config.val_samples)) for config in (part, LINEAR))
    lines, whole = read_history(run.run_dir), read_history(full.run_dir)
    assert [line["train_loss"] for line in lines] == [line["train_loss"] for line in whole]
    assert [line["val_loss"] for line in lines] != [line["val_loss"] for line in whole]
    (same,) = (line for line in whole if line["step"] == run.best_step)
    assert (run.best_val_mean_iou, run.best_val_loss) == pytest.approx((same["val_mean_iou"], same["val_loss"]))


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.0), ("linear", 0.0), ("constant", 1.0)])
def test_schedules_rise_and_end_as_they_say(schedule: str, last: float) -> None:
    config = TrainConfig("linear", schedule=schedule, warmup=0.2)
    shares = [config.learning_rate_share(step, 10) for step in range(11)]
    assert shares[:2] == [0.5, 1.0]
    assert shares[-1] == pytest.approx(last)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(shares[1:]))


def test_a_head_that_began_from_another_checkpoint_never_needs_it_again(
    feature_cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_sam(dim=32).save_pretrained(tmp_path / "sam")
    arguments = {"dim": 32, "depth": 2, "num_heads": 8, "mlp_dim": 48, "initial": str(tmp_path / "sam")}
    config = dataclasses.replace(SMALL, head="two_way", arguments=arguments, loss={"bce": 1.0, "iou": 1.0}, epochs=2)
    with monkeypatch.context() as patch:
        kill_after(patch, 4)
        with pytest.raises(KilledError):
            train(config, feature_cache, tmp_path / "run")
    (tmp_path / "sam").rename(tmp_path / "gone")
    run = train(config, feature_cache, tmp_path / "run")
    spec, head = load_head(run.run_dir / "best")
    assert spec.arguments["initial"] == str(tmp_path / "sam")
    assert not head.training
    recorded = json.loads((run.run_dir / "config.json").read_text())
    assert len(recorded["initial"]["sha256"]) == 64
    with pytest.raises(UsageError, match="sam"):
        train(config, feature_cache, tmp_path / "another run")


def test_a_tracker_that_is_not_installed_is_said_before_anything_starts(
    feature_cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else real(name))
    with pytest.raises(UsageError, match="the tracker wandb is not installed"):
        train(LINEAR, feature_cache, tmp_path / "run", trackers=("wandb",))
    assert not (tmp_path / "run").exists()


def test_without_trackers_metrics_alone_are_written(feature_cache: FeatureCache, tmp_path: Path) -> None:
    run = train(LINEAR, feature_cache, tmp_path / "run", trackers=())
    assert len(read_history(run.run_dir)) == LINEAR.epochs
    assert not (run.run_dir / "tensorboard").exists()


def test_a_head_that_explodes_at_the_last_step_is_the_users_to_mend(
    feature_cache: FeatureCache, tmp_path: Path
) -> None:
    steep = dataclasses.replace(LINEAR, learning_rate=1e30, epochs=2, clip_norm=0.0)
    with pytest.raises(UsageError, match="lower learning_rate"):
        train(steep, feature_cache, tmp_path / "run")
    assert not (tmp_path / "run" / "best").exists()
