"""A sweep: one recipe trained with many settings and seeds, each an ordinary run in a process beside others."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cache_schema.errors import UsageError
from cache_schema.features import FeatureCache
from heads.checkpoint import HeadSpec
from heads.data import feature_shapes
from heads.dry_run import dry_run
from heads.residency import Residency
from heads.runs import Training, read_training, refuse_other_run, run_identity, run_name
from heads.train_config import TrainConfig
from headstart.recipes import make_config
from headstart.sweep_result import Row, SweepResult, aligned, write_result
from headstart.sweep_space import Settings, SweepConfig, show, show_value
from headstart.sweep_workers import Failure, Workplace, train_apart


@dataclass(frozen=True)
class Combination:
    """One choice of the settings that vary, and its config for each seed."""

    settings: Settings
    configs: tuple[TrainConfig, ...]


@dataclass(frozen=True)
class Plan:
    """Every combination once, and how many were the same run as another."""

    combinations: tuple[Combination, ...]
    num_duplicates: int

    @property
    def configs(self) -> list[TrainConfig]:
        """All runs, the first seed of every combination before the second of any."""
        return [
            config for of_seed in zip(*(each.configs for each in self.combinations), strict=True) for config in of_seed
        ]


def plan_sweep(config: SweepConfig, cache: FeatureCache) -> Plan:
    """Make every combination's configs, and make sure that its head can be built for this cache.

    Raises:
        UsageError: some cannot be; the message names all of them.
    """
    listed = config.combinations()
    shapes = feature_shapes(cache)
    combinations: dict[str, Combination] = {}
    complaints: dict[str, list[str]] = {}
    for settings in listed:
        try:
            first = make_config(config.recipe, {**config.fixed, **settings})
            first.parameter_groups(HeadSpec(first.head, first.arguments, shapes).build(fresh=False))
        except UsageError as error:
            complaints.setdefault(str(error), []).append(show(settings))
            continue
        configs = [dataclasses.replace(first, seed=first.seed + place) for place in range(config.num_seeds)]
        combinations.setdefault(run_name(first, cache), Combination(settings, tuple(configs)))
    if complaints:
        raise _refusal(complaints, len(listed))
    return Plan(tuple(combinations.values()), len(listed) - len(combinations))


def sweep(
    config: SweepConfig,
    stores: Mapping[str, str | None],
    cache: FeatureCache,
    runs: Path,
    out: Path,
    *,
    num_processes: int = 2,
    residency: Residency = "auto",
) -> SweepResult:
    """Train every combination that is not trained yet, in processes of their own, and write the table to `out`.

    A sweep that was killed goes on where it was: runs that are finished are not trained again.

    Args:
        stores: the arguments with which `headstart.open_cache` gave `cache`.
        num_processes: how many runs are trained at once; torch's threads are divided among them.
        residency: where features are kept; "auto" leaves them on the disk, whose pages processes share, if there are
            several.

    Raises:
        UsageError: there are combinations that cannot be; nothing is trained then.
    """
    if num_processes < 1:
        raise UsageError(f"--processes is {num_processes}: give a whole number of at least 1.")
    plan = plan_sweep(config, cache)
    outcomes: dict[str, Training | Failure] = {**find_trained(plan.configs, cache, runs)}
    waiting = [each for each in plan.configs if run_name(each, cache) not in outcomes]
    if residency == "auto" and num_processes > 1:
        residency = "disk"
    workplace = Workplace(stores, runs, residency, max(1, torch.get_num_threads() // num_processes))
    bar = tqdm(total=len(plan.configs), initial=len(outcomes), desc=f"sweeping {config.recipe}", unit="run")
    with bar, contextlib.closing(train_apart(waiting, workplace, num_processes)) as trained:
        bar.set_postfix_str(_best_of(outcomes.values()))
        for each, outcome in trained:
            outcomes[run_name(each, cache)] = outcome
            if isinstance(outcome, Failure) and outcome.trace:
                tqdm.write(outcome.trace, file=sys.stderr)
            bar.update()
            bar.set_postfix_str(_best_of(outcomes.values()))
    result = make_result(
        config, plan, [[outcomes[run_name(c, cache)] for c in each.configs] for each in plan.combinations]
    )
    if not (best := result.rows[0]).failures:
        command = train_command(config.recipe, {**config.fixed, **best.settings}, stores, runs)
        result = dataclasses.replace(result, command=command)
    write_result(result, out)
    return result


def find_trained(configs: Sequence[TrainConfig], cache: FeatureCache, runs: Path) -> dict[str, Training]:
    """The runs that are finished already, by their names.

    Raises:
        UsageError: a run folder holds another run.
    """
    found = {}
    for config in configs:
        run_dir = runs / run_name(config, cache)
        refuse_other_run(run_dir, run_identity(config, cache))
        if (training := read_training(run_dir)) is not None:
            found[run_dir.name] = training
    return found


def try_out(plan: Plan, cache: FeatureCache, runs: Path, num_processes: int) -> dict[str, Any]:
    """What a sweep will take: a few steps of each combination that is not trained yet. Nothing is written."""
    trained = find_trained(plan.configs, cache, runs)
    rows: list[dict[str, Any]] = []
    for each in plan.combinations:
        num_left = sum(run_name(config, cache) not in trained for config in each.configs)
        tried = dry_run(each.configs[0], cache) if num_left else None
        minutes = None if tried is None else num_left * tried.epoch_s * tried.epochs / 60
        rows.append(
            {"settings": each.settings, "num_left": num_left, "minutes": minutes, "tried": tried and tried.to_dict()}
        )
    total = sum(row["minutes"] or 0.0 for row in rows)
    return {
        "rows": rows,
        "num_runs": len(plan.configs),
        "num_trained": len(trained),
        "num_duplicates": plan.num_duplicates,
        "minutes_one_by_one": total,
        "processes": num_processes,
    }


def shown_tryout(found: Mapping[str, Any]) -> list[str]:
    """The same for people."""
    header = ["settings", "runs left", "parameters", "minutes"]
    rows = [
        [
            show(row["settings"]),
            str(row["num_left"]),
            "-" if row["tried"] is None else f"{row['tried']['num_parameters']}",
            "-" if row["minutes"] is None else f"{row['minutes']:.1f}",
        ]
        for row in found["rows"]
    ]
    return [
        *aligned(header, rows),
        "",
        f"{found['num_runs']} runs, {found['num_trained']} of them trained already; the rest takes "
        f"{found['minutes_one_by_one']:.1f} min one by one, without validation, and at best "
        f"1/{found['processes']} of that in {found['processes']} processes",
    ]


def train_command(recipe: str, settings: Mapping[str, Any], stores: Mapping[str, str | None], runs: Path) -> str:
    """The command line that trains a recipe with these settings."""
    words = ["headstart", "train", recipe]
    for option, place in stores.items():
        words += [] if place is None else [f"--{option}", place]
    words += ["--runs", str(runs)]
    if settings:
        words += ["--set", *(f"{key}={show_value(value)}" for key, value in settings.items())]
    return shlex.join(words)


def make_result(config: SweepConfig, plan: Plan, outcomes: Sequence[Sequence[Training | Failure]]) -> SweepResult:
    """The table, from what came of each combination's runs."""
    every = [outcome for of_combination in outcomes for outcome in of_combination]
    has_masks = all(outcome.best_val_mean_iou is not None for outcome in every if isinstance(outcome, Training))
    rows = []
    for each, of_combination in zip(plan.combinations, outcomes, strict=True):
        runs = [outcome for outcome in of_combination if isinstance(outcome, Training)]
        scores = [run.best_val_mean_iou if has_masks else run.best_val_loss for run in runs]
        by_seed = {config.seed: outcome for config, outcome in zip(each.configs, of_combination, strict=True)}
        rows.append(Row(each.settings, by_seed, tuple(score for score in scores if score is not None)))
    sign = -1 if has_masks else 1
    rows.sort(key=lambda row: (bool(row.failures), row.mean is None, sign * (row.mean or 0.0)))
    return SweepResult(config, "val_mean_iou" if has_masks else "val_loss", tuple(rows), plan.num_duplicates, None)


def _refusal(complaints: Mapping[str, Sequence[str]], num_listed: int) -> UsageError:
    num_refused = sum(len(shown) for shown in complaints.values())
    if num_refused == num_listed and len(complaints) == 1:
        return UsageError(next(iter(complaints)))
    lines = [f"  {settings}: {complaint}" for complaint, shown in complaints.items() for settings in shown]
    return UsageError(
        f"{num_refused} of {num_listed} combinations cannot be trained; change or leave out these values:\n"
        + "\n".join(lines)
    )


def _best_of(outcomes: Collection[Training | Failure]) -> str:
    trained = [outcome for outcome in outcomes if isinstance(outcome, Training)]
    scores = [training.best_val_mean_iou for training in trained if training.best_val_mean_iou is not None]
    failed = len(outcomes) - len(trained)
    parts = [f"best val_mean_iou={max(scores):.3f}"] if scores else []
    if trained and not scores:
        parts = [f"best val_loss={min(training.best_val_loss for training in trained):.3f}"]
    return ", ".join([*parts, *([f"{failed} failed"] if failed else [])])
