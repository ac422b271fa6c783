"""`headstart bench heads`: train heads under one budget with several seeds, score them, and leave a leaderboard."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_schema.errors import UsageError
from cache_schema.features import FeatureCache
from evaluate.leaderboard import Contender, make_leaderboard
from evaluate.leaderboard_files import write_leaderboard
from heads.checkpoint import HeadSpec
from heads.data import feature_shapes
from heads.dry_run import DryRun, dry_run
from heads.inputs import FeatureShapes
from heads.residency import Residency
from heads.runs import has_state, read_training, run_name
from heads.train import SHARED_SETTINGS
from heads.train_config import TrainConfig
from headstart.api import train_heads
from headstart.encoders import notes_on_encoders
from headstart.recipes import make_configs


@dataclass(frozen=True)
class BenchPlan:
    """What will be compared.

    Args:
        configs: by recipe, how each head is trained with its first seed.
        left_out: recipes that this cache cannot serve, and why.
    """

    configs: Mapping[str, TrainConfig]
    left_out: Mapping[str, str]
    num_seeds: int

    def of_seed(self, seed: int) -> list[TrainConfig]:
        """How every head is trained with one seed, which also decides the order of the samples: for all the same."""
        return [dataclasses.replace(config, seed=seed, data_seed=None) for config in self.configs.values()]

    def run_dirs(self, runs: Path, cache: FeatureCache) -> dict[str, list[Path]]:
        """By recipe, the folder of the run with each seed."""
        names = list(self.configs)
        of_seeds = [[runs / run_name(config, cache) for config in self.of_seed(seed)] for seed in range(self.num_seeds)]
        return {name: [folders[place] for folders in of_seeds] for place, name in enumerate(names)}


def plan_bench(
    recipes: Sequence[str],
    cache: FeatureCache,
    runs: Path,
    *,
    num_seeds: int = 3,
    split: str = "val",
    settings: Mapping[str, Any] | None = None,
    skip_impossible: bool = False,
) -> BenchPlan:
    """Find every fault before anything is trained.

    Raises:
        UsageError: a recipe or setting is unknown, heads have different budgets, the split is unknown or has no masks,
            or the cache cannot serve some heads (all are named) and they are not to be skipped.
    """
    if num_seeds < 1:
        raise UsageError(f"--seeds is {num_seeds}: give a whole number of at least 1.")
    fixed = sorted({"seed", "data_seed"} & {key.rpartition(".")[2] for key in settings or {}})
    if fixed:
        raise UsageError(f"{' and '.join(fixed)} cannot be set here: seeds are 0, 1, ... as many as --seeds says.")
    configs = dict(zip(recipes, make_configs(recipes, settings), strict=True))
    plan = BenchPlan(configs, {}, num_seeds)
    folders, shapes = plan.run_dirs(runs, cache), feature_shapes(cache)
    faults = {name: _fault(config, shapes, folders[name]) for name, config in configs.items()}
    impossible = {name: fault for name, fault in faults.items() if fault is not None}
    possible = {name: config for name, config in configs.items() if name not in impossible}
    if impossible and not (skip_impossible and possible):
        lines = "".join(f"\n  {name}: {why}" for name, why in impossible.items())
        remedy = "" if not possible else "\nMend that, leave them out, or go on without them: --skip-impossible."
        raise UsageError(f"this cache cannot serve {', '.join(impossible)}; nothing was trained.{lines}{remedy}")
    _require_one_budget(possible)
    cache.samples.samples.require_masks(cache.usable_samples(split))
    return BenchPlan(possible, impossible, num_seeds)


def bench_heads(
    recipes: Sequence[str],
    cache: FeatureCache,
    runs: Path | str = "runs",
    out: Path | str = "leaderboard",
    *,
    num_seeds: int = 3,
    split: str = "val",
    settings: Mapping[str, Any] | None = None,
    skip_impossible: bool = False,
    residency: Residency = "auto",
) -> dict[str, Any]:
    """Compare heads by their recipes: train them all in one pass for each seed, score them, and write a leaderboard.

    Finished runs are not trained again, and a killed one goes on, so that the same call goes on where it was.

    Args:
        settings: values to replace in the recipes that know them; `{"film.dim": 64}` is for one alone.
        skip_impossible: leave out heads that the cache cannot serve instead of stopping.

    Returns:
        The object in leaderboard.json.

    Raises:
        UsageError: as `plan_bench`, or training failed.
    """
    runs, out = Path(runs), Path(out)
    plan = plan_bench(
        recipes, cache, runs, num_seeds=num_seeds, split=split, settings=settings, skip_impossible=skip_impossible
    )
    out.mkdir(parents=True, exist_ok=True)
    for seed in range(num_seeds):
        train_heads(plan.of_seed(seed), cache, runs, residency=residency)
    contenders = [Contender(name, folders) for name, folders in plan.run_dirs(runs, cache).items()]
    notes = notes_on_encoders(cache)
    board = make_leaderboard(contenders, cache, split=split, left_out=plan.left_out, notes=notes)
    write_leaderboard(board, out)
    return board


def try_bench(plan: BenchPlan, cache: FeatureCache) -> dict[str, DryRun]:
    """By recipe, what a few steps say that the comparison will take. Nothing is written, and nothing is trained."""
    return {recipe: dry_run(config, cache) for recipe, config in plan.configs.items()}


def _fault(config: TrainConfig, shapes: FeatureShapes, run_dirs: Sequence[Path]) -> str | None:
    """What keeps a head from being trained on a cache of these shapes."""
    begins = any(read_training(run_dir) is None and not has_state(run_dir) for run_dir in run_dirs)
    try:
        config.parameter_groups(HeadSpec(config.head, config.arguments, shapes).build(fresh=begins))
    except UsageError as fault:
        return str(fault)
    return None


def _require_one_budget(configs: Mapping[str, TrainConfig]) -> None:
    """All differences at once, each with its remedy."""
    faults = []
    for name in SHARED_SETTINGS:
        values = {recipe: getattr(config, name) for recipe, config in configs.items()}
        if len(set(values.values())) > 1:
            said = ", ".join(f"{recipe} {value}" for recipe, value in values.items())
            faults.append(f"{name} ({said})")
    if faults:
        remedy = " ".join(f"{fault.partition(' ')[0]}=..." for fault in faults)
        raise UsageError(f"heads are compared under one budget, but differ in {'; '.join(faults)}: --set {remedy}")
