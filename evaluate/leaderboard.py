"""The leaderboard: heads trained under one budget on one cache, each with several seeds, by what they are worth.

Says what quality costs. Knows nothing about how the runs were made, and nothing about files but their folders.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cache_schema.errors import UsageError
from cache_schema.features import FeatureCache
from evaluate.baselines import score_baselines
from evaluate.evaluation import Evaluation, evaluate_run
from evaluate.head_cost import describe_machine, measure_cost
from evaluate.metrics import Metrics, slice_metrics
from evaluate.protocols import ORIGINAL_SIZE, Protocol
from heads.runs import read_history, read_run_config, read_training

RANKED_BY = "mean_iou"
SHOWN_METRICS = (RANKED_BY, "overall_iou", "p_at_0.5")
"""The metrics of the table."""

SLICED_BY = "kind"
"""The tag of samples whose values get a column each."""

_SEEDS = ("seed", "data_seed")


@dataclass(frozen=True)
class Contender:
    """One line of the leaderboard: what it is called, and finished runs that differ in their seeds alone."""

    name: str
    run_dirs: Sequence[Path]


@dataclass(frozen=True)
class Spread:
    """A figure over seeds: its mean, its sample standard deviation (None for one seed), and its range."""

    mean: float
    sd: float | None
    low: float
    high: float
    values: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of one value for each seed.

        >>> Spread.of([0.25, 0.75, 0.5])
        Spread(mean=0.5, sd=0.25, low=0.25, high=0.75, values=[0.25, 0.75, 0.5])
        """
        sd = statistics.stdev(values) if len(values) > 1 else None
        return cls(math.fsum(values) / len(values), sd, min(values), max(values), list(values))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def make_leaderboard(
    contenders: Sequence[Contender],
    cache: FeatureCache,
    *,
    split: str = "val",
    protocol: Protocol = ORIGINAL_SIZE,
    left_out: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Score every run of every contender at the images' original sizes, measure each contender's cost once, and rank.

    Args:
        left_out: heads that do not take part, and why.
        notes: sentences a reader must know.

    Returns:
        The object of leaderboard.json: `heads` from the highest mean of `RANKED_BY` to the lowest, `baselines`,
        `budget` (the settings that all runs share; each head names its others), `protocol`, `provenance`, `machine`.

    Raises:
        UsageError: there is no contender, a run is not finished, or the split is unknown.
        StoreMismatchError: a run was trained on features of other encoders.
    """
    if not contenders:
        raise UsageError("a leaderboard needs a head at least; train one first.")
    settings = [_settings(contender) for contender in contenders]
    shared = {
        name: value
        for name, value in settings[0].items()
        if all(name in other and other[name] == value for other in settings[1:])
    }
    entries = [_entry(contender, cache, split, protocol) for contender in contenders]
    for entry, own in zip(entries, settings, strict=True):
        entry["settings"] = {name: value for name, value in own.items() if name not in shared}
    samples, rows = cache.samples.samples, cache.usable_samples(split)
    return {
        "heads": sorted(entries, key=lambda entry: (-entry["metrics"][RANKED_BY]["mean"], entry["name"])),
        "left_out": dict(left_out or {}),
        "baselines": score_baselines(
            ((samples.targets[row], samples.size_of(row)) for row in rows),
            (samples.no_target[row] for row in rows),
            (samples.ignored[row] for row in rows) if samples.ignored else None,
            protocol,
        ),
        "budget": {
            **shared,
            "train_samples": len(cache.usable_samples(settings[0]["train_split"])),
            "num_seeds": max(len(contender.run_dirs) for contender in contenders),
        },
        "protocol": {**protocol.to_dict(), "dataset": cache.samples.dataset, "split": split},
        "num_samples": len(rows),
        "num_left_out": len(samples.rows_of_split(split)) - len(rows),
        "provenance": cache.fingerprints,
        "machine": describe_machine(),
        "notes": list(notes),
    }


def _settings(contender: Contender) -> dict[str, Any]:
    """What all runs of a contender were trained with.

    Raises:
        UsageError: there is none, or they differ in more than their seeds.
    """
    if not contender.run_dirs:
        raise UsageError(f"{contender.name} has no run; train it first.")
    found = [read_run_config(run_dir)["config"] for run_dir in contender.run_dirs]
    for config in found:
        for name in _SEEDS:
            config.pop(name)
    if any(config != found[0] for config in found[1:]):
        raise UsageError(f"the runs of {contender.name} differ in more than their seeds; give each its own name.")
    first: dict[str, Any] = found[0]
    return first


def _entry(contender: Contender, cache: FeatureCache, split: str, protocol: Protocol) -> dict[str, Any]:
    evaluations = [evaluate_run(run_dir, cache, split, protocol) for run_dir in contender.run_dirs]
    metrics = [evaluation.metrics for evaluation in evaluations]
    slices = [_slices(evaluation, cache) for evaluation in evaluations]
    return {
        "name": contender.name,
        "head": evaluations[0].name,
        "metrics": {name: _spread(metrics, name) for name in SHOWN_METRICS},
        "slices": {
            value: {
                **_spread([found[value] for found in slices], RANKED_BY),
                "num_samples": slices[0][value]["num_samples"],
            }
            for value in slices[0]
        },
        "cost": {
            **measure_cost(evaluations[0].head, cache, split).to_dict(),
            "train_samples_per_s": _train_samples_per_s(contender.run_dirs, cache),
        },
        "runs": [
            {"run_dir": str(run_dir), **_training(run_dir), "metrics": found}
            for run_dir, found in zip(contender.run_dirs, metrics, strict=True)
        ],
    }


def _spread(metrics: Sequence[Metrics], name: str) -> dict[str, Any]:
    return Spread.of([float(found[name] or 0.0) for found in metrics]).to_dict()


def _slices(evaluation: Evaluation, cache: FeatureCache) -> dict[str, Metrics]:
    """Metrics of the samples of each kind; empty where samples have no such tag."""
    tags = cache.samples.samples.tags
    if SLICED_BY not in tags:
        return {}
    values = [tags[SLICED_BY][row] for row in evaluation.samples]
    return slice_metrics(evaluation.scores, {SLICED_BY: values})[SLICED_BY]


def _training(run_dir: Path) -> dict[str, Any]:
    """What a reader needs to judge how a run was trained."""
    training = read_training(run_dir)
    assert training is not None  # it was evaluated
    kept = ("best_step", "best_val_mean_iou", "num_steps", "stopped_early", "seconds")
    config = read_run_config(run_dir)["config"]
    return {"seed": config["seed"], **{name: getattr(training, name) for name in kept}}


def _train_samples_per_s(run_dirs: Sequence[Path], cache: FeatureCache) -> float | None:
    """Samples learned from in a second of training steps, waiting for data included; over all runs."""
    num, seconds = 0, 0.0
    for run_dir in run_dirs:
        train_split = read_run_config(run_dir)["config"]["train_split"]
        epochs = read_history(run_dir)
        num += len(epochs) * len(cache.usable_samples(train_split))
        seconds += math.fsum(epoch["train_s"] for epoch in epochs)
    return num / seconds if seconds else None
