"""Run folders: what a run is named after, what it records, and what it takes to go on with it.

run/
    config.json      what is trained, on which stores, with which settings
    metrics.jsonl    one JSON object for each validation
    best/, last/     the head at its best validation and at its last
    state.pt         everything an exact resume needs; removed when training is over
    training.json    written last: training is over
    tensorboard/     event files
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cache_schema import atomic
from cache_schema.errors import UsageError
from cache_schema.features import FeatureCache
from cache_schema.fingerprint import fingerprint
from heads.train_config import TrainConfig

STATE, FINISHED, METRICS = "state.pt", "training.json", "metrics.jsonl"


@dataclass(frozen=True)
class Training:
    """A finished run: its folder, its best validation, and whether it was there already.

    `best_val_mean_iou` is None where the validation split has no masks; `best_val_loss` is that of the same validation.
    """

    run_dir: Path
    best_step: int
    best_val_mean_iou: float | None
    best_val_loss: float
    num_steps: int
    stopped_early: bool
    num_parameters: int
    seconds: float
    reused: bool

    def summary(self) -> str:
        """One sentence for people."""
        how = "found trained" if self.reused else "trained"
        early = ", stopped early" if self.stopped_early else ""
        score = (
            f"validation loss {self.best_val_loss:.3f}"
            if self.best_val_mean_iou is None
            else f"validation mean_iou {self.best_val_mean_iou:.3f}"
        )
        return (
            f"{how} {self.run_dir.name}: {self.num_parameters:,} parameters, {self.num_steps} steps in "
            f"{self.seconds:.0f} s{early}, best {score} -> {self.run_dir}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "run_dir": str(self.run_dir)}


@dataclass
class Progress:
    """How far a run is. Losses and seconds are summed since the last validation; `history` holds every validation."""

    step: int = 0
    elapsed_s: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0
    train_s: float = 0.0
    data_wait_s: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_epochs(self) -> int:
        """Epochs that were validated; what a head that was trained before says at the start is none."""
        return sum(entry["epoch"] > 0 for entry in self.history)

    @property
    def best(self) -> dict[str, Any]:
        """The validation with the best score, the earliest of several."""
        return max(self.history, key=score_of)

    def is_exhausted(self, patience: int | None) -> bool:
        """Whether so many validations have passed without a better score."""
        if patience is None or not self.history:
            return False
        return len(self.history) - 1 - self.history.index(self.best) >= patience


def score_of(validation: Mapping[str, Any]) -> float:
    """What training tries to raise: the mean IoU; or the negative loss where there are no masks, or the validation says
    that it `selects`.
    """
    mean_iou = validation["val_mean_iou"]
    by_loss = mean_iou is None or validation.get("selects") == "val_loss"
    return float(-validation["val_loss"] if by_loss else mean_iou)


def run_identity(config: TrainConfig, cache: FeatureCache, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything that decides what a run learns: its settings and the fingerprints of its stores.

    Args:
        more: what else does, by a name of its own, such as encoders that learn with the head.
    """
    return {"config": dataclasses.asdict(config), "stores": cache.fingerprints, **(more or {})}


def run_name(config: TrainConfig, cache: FeatureCache, more: Mapping[str, Any] | None = None) -> str:
    """A folder name for a run: the head and the first 12 digits of the run's fingerprint."""
    return f"{config.head}-{fingerprint(run_identity(config, cache, more))[:12]}"


def read_run_config(run_dir: Path, *needed: str) -> dict[str, Any]:
    """A run's config.json, which must hold the keys `needed` beside those every run records.

    Raises:
        UsageError: the folder is no run folder.
    """
    try:
        config: dict[str, Any] = json.loads((run_dir / "config.json").read_bytes())
        if not {"config", "stores", "encoder_fingerprints", *needed} <= config.keys():
            raise ValueError("it lacks what a run of `headstart train` records")
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{run_dir} is not a run folder: its config.json cannot be read ({error}). "
            "Name what `headstart train` printed."
        ) from error
    return config


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """Every validation of a run, from the first on."""
    return [json.loads(line) for line in (run_dir / METRICS).read_text().splitlines()]


def read_training(run_dir: Path) -> Training | None:
    """What a finished run recorded; None if it is not finished."""
    path = run_dir / FINISHED
    return Training(run_dir, reused=True, **json.loads(path.read_bytes())) if path.is_file() else None


def refuse_other_run(run_dir: Path, identity: Mapping[str, Any]) -> None:
    """Make sure that a run folder which is there already is this run's.

    Raises:
        UsageError: it is another's.
    """
    path = run_dir / "config.json"
    if path.is_file():
        found, expected = json.loads(path.read_bytes()), json.loads(json.dumps(identity))
        if {key: found.get(key) for key in expected} != expected:
            raise UsageError(f"{run_dir} holds a run with other settings or stores; name another folder or remove it.")


def write_state(run_dir: Path, state: Mapping[str, Any]) -> None:
    """Everything an exact resume needs, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    atomic.write_file(run_dir / STATE, buffer.getbuffer())


def has_state(run_dir: Path) -> bool:
    """Whether there is something to go on with."""
    return (run_dir / STATE).is_file()


def read_state(run_dir: Path) -> dict[str, Any] | None:
    """What `write_state` wrote; None if there is nothing to go on with."""
    if not has_state(run_dir):
        return None
    state: dict[str, Any] = torch.load(run_dir / STATE, map_location="cpu", weights_only=True)
    return state
