"""The training loop: one head, one cache, one run folder. Explicit, resumable inside an epoch, no callbacks.

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
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from cache_schema import atomic
from cache_schema.errors import UsageError, require_at_least, unknown_name
from cache_schema.features import FeatureCache
from cache_schema.fingerprint import fingerprint
from cache_schema.masks import Size
from heads.checkpoint import HeadSpec, save_head
from heads.data import CachedSplit, Draw, Residency, feature_shapes, prefetch, timed
from heads.losses import TERMS, mask_loss, resize_logits

MIXED_PRECISIONS = ("no", "bf16")


@dataclass(frozen=True)
class TrainConfig:
    """How to train one head.

    Args:
        head, arguments: which head, and the arguments its builder takes.
        loss: weight of each term of `heads.losses.TERMS`.
        prompts_per_image: prompts of one image that stand side by side in a batch and share its features.
        warmup: share of all steps over which the learning rate rises to `learning_rate`; a cosine to 0 follows.
        clip_norm: gradients are scaled down to this norm.
        patience: validations without a better score after which training stops; None never stops it.
        target_size: (H, W) at which the loss is taken and the validation score measured.
        checkpoint_steps: a killed run loses at most this many steps.
    """

    head: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    loss: Mapping[str, float] = field(default_factory=lambda: {"bce": 1.0, "dice": 1.0})
    epochs: int = 20
    batch_size: int = 64
    prompts_per_image: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    warmup: float = 0.05
    clip_norm: float = 1.0
    patience: int | None = 5
    target_size: Size = (96, 96)
    checkpoint_steps: int = 100
    seed: int = 0
    mixed_precision: str = "no"
    train_split: str = "train"
    val_split: str = "val"

    def __post_init__(self) -> None:
        require_at_least(self, 1, "epochs", "batch_size", "prompts_per_image", "checkpoint_steps")
        for name in ("learning_rate", "weight_decay", "warmup", "clip_norm", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} is {getattr(self, name)}: give a number that is not negative.")
        if len(self.target_size) != 2 or any(type(side) is not int or side < 1 for side in self.target_size):
            raise UsageError(f"target_size is {list(self.target_size)}: give a height and a width, such as [96, 96].")
        if not self.loss or not set(self.loss) <= set(TERMS):
            raise UsageError(f"loss is {dict(self.loss)}: give a weight for one or more of {', '.join(TERMS)}.")
        if any(type(weight) not in (int, float) for weight in self.loss.values()):
            raise UsageError(f"loss is {dict(self.loss)}: weights are numbers.")
        if self.mixed_precision not in MIXED_PRECISIONS:
            raise unknown_name("mixed_precision", self.mixed_precision, MIXED_PRECISIONS)


@dataclass(frozen=True)
class Training:
    """A finished run: its folder, its best validation, and whether it was there already."""

    run_dir: Path
    best_step: int
    best_val_mean_iou: float
    num_steps: int
    stopped_early: bool
    num_parameters: int
    seconds: float
    reused: bool

    def summary(self) -> str:
        """One sentence for people."""
        how = "found trained" if self.reused else "trained"
        early = ", stopped early" if self.stopped_early else ""
        return (
            f"{how} {self.run_dir.name}: {self.num_parameters:,} parameters, {self.num_steps} steps in "
            f"{self.seconds:.0f} s{early}, best validation mean_iou {self.best_val_mean_iou:.3f} -> {self.run_dir}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "run_dir": str(self.run_dir)}


def train(
    config: TrainConfig,
    cache: FeatureCache,
    run_dir: Path,
    *,
    recorded: Mapping[str, Any] | None = None,
    residency: Residency = "auto",
) -> Training:
    """Train one head on one cache, or go on where an earlier call was killed; a finished run is left as it is.

    Args:
        recorded: what else config.json should say, for whoever evaluates the run or predicts on new images.

    Raises:
        UsageError: the head or its arguments are unknown, `run_dir` holds another run, or the loss is no longer finite.
    """
    AcceleratorState._reset_state(reset_partial_state=True)  # else a second run could not choose its own precision
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, log_with="tensorboard", project_dir=str(run_dir / "tensorboard")
    )
    spec = HeadSpec(config.head, config.arguments, feature_shapes(cache))
    torch.manual_seed(config.seed)
    head = spec.build()
    identity = run_identity(config, cache)
    _refuse_other_run(run_dir, identity)
    if (run_dir / "training.json").is_file():
        return Training(run_dir, reused=True, **json.loads((run_dir / "training.json").read_bytes()))

    device, size = accelerator.device, config.target_size
    train_split = CachedSplit(cache, config.train_split, size, head.layers, residency, device, all_views=True)
    val_split = CachedSplit(cache, config.val_split, size, head.layers, residency, device)
    steps_per_epoch = len(_epoch(config, train_split, 0, accelerator))
    num_steps = config.epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    model, optimizer = accelerator.prepare(head, optimizer)

    progress = _Progress()
    if (run_dir / "state.pt").is_file():
        progress = _restore(run_dir / "state.pt", head, optimizer)
    more = {"encoder_fingerprints": cache.encoder_fingerprints, **(recorded or {})}
    atomic.write_json(run_dir / "config.json", {**identity, **more})
    accelerator.init_trackers("", init_kwargs={"tensorboard": {"purge_step": progress.step}})
    bar = tqdm(total=num_steps, initial=progress.step, desc=f"training {config.head}", unit="step")
    started = time.perf_counter() - progress.elapsed_s

    while progress.step < num_steps and not _is_exhausted(progress, config):
        epoch, first = divmod(progress.step, steps_per_epoch)
        order = _epoch(config, train_split, epoch, accelerator)[first:]
        for batch, waited_s in timed(prefetch(train_split.load(draw) for draw in order)):
            step_started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * learning_rate_share(progress.step, num_steps, config.warmup)
            with accelerator.autocast():
                outputs = model(batch.inputs.to(device))
                loss = mask_loss(outputs.mask_logits, batch.targets.to(device), config.loss)
            if not torch.isfinite(loss):
                raise UsageError(
                    f"the loss of {config.head} is {loss.item()} at step {progress.step + 1}: "
                    "lower learning_rate, or clip_norm."
                )
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(head.parameters(), config.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            progress.step += 1
            progress.loss_sum += loss.item()
            progress.loss_count += 1
            progress.data_wait_s += waited_s
            progress.train_s += waited_s + time.perf_counter() - step_started
            bar.update()
            if progress.step % config.checkpoint_steps == 0 and progress.step % steps_per_epoch:
                progress.elapsed_s = time.perf_counter() - started
                _save_state(run_dir / "state.pt", progress, head, optimizer)

        entry = {
            "step": progress.step,
            "epoch": epoch + 1,
            "train_loss": progress.loss_sum / progress.loss_count,
            **validate(model, val_split, config, accelerator),
            "learning_rate": optimizer.param_groups[0]["lr"],
            "train_s": round(progress.train_s, 3),
            "data_wait_s": round(progress.data_wait_s, 3),
            "elapsed_s": round(time.perf_counter() - started, 3),
        }
        accelerator.log({key: value for key, value in entry.items() if isinstance(value, float)}, step=progress.step)
        improved = not progress.history or entry["val_mean_iou"] > progress.best["val_mean_iou"]
        progress = _Progress(progress.step, time.perf_counter() - started, history=[*progress.history, entry])
        bar.set_postfix(loss=f"{entry['train_loss']:.3f}", val_mean_iou=f"{entry['val_mean_iou']:.3f}")
        if accelerator.is_main_process:
            if improved:
                save_head(run_dir / "best", spec, head)
            save_head(run_dir / "last", spec, head)
            lines = "".join(json.dumps(line, allow_nan=False) + "\n" for line in progress.history)
            atomic.write_file(run_dir / "metrics.jsonl", lines.encode())
            _save_state(run_dir / "state.pt", progress, head, optimizer)

    bar.close()
    accelerator.end_training()
    summary = {
        "best_step": progress.best["step"],
        "best_val_mean_iou": progress.best["val_mean_iou"],
        "num_steps": progress.step,
        "stopped_early": progress.step < num_steps,
        "num_parameters": sum(parameter.numel() for parameter in head.parameters()),
        "seconds": round(progress.elapsed_s, 3),
    }
    atomic.write_json(run_dir / "training.json", summary)
    atomic.remove(run_dir / "state.pt")
    return Training(run_dir, reused=False, **summary)


def run_identity(config: TrainConfig, cache: FeatureCache) -> dict[str, Any]:
    """Everything that decides what a run learns: its settings and the fingerprints of its stores."""
    return {"config": dataclasses.asdict(config), "stores": cache.fingerprints}


def run_name(config: TrainConfig, cache: FeatureCache) -> str:
    """A folder name for a run: the head and the first 12 digits of the run's fingerprint."""
    return f"{config.head}-{fingerprint(run_identity(config, cache))[:12]}"


def learning_rate_share(step: int, num_steps: int, warmup: float) -> float:
    """Share of the peak learning rate at a step: a linear rise over `warmup` of all steps, then a cosine to 0.

    >>> [round(learning_rate_share(step, 100, 0.1), 2) for step in (0, 9, 10, 55, 100)]
    [0.1, 1.0, 1.0, 0.5, 0.0]
    """
    warmup_steps = max(1, round(warmup * num_steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, num_steps - warmup_steps)))


@torch.inference_mode()
def validate(model: nn.Module, split: CachedSplit, config: TrainConfig, accelerator: Accelerator) -> dict[str, Any]:
    """Validation scores at the targets' resolution, threshold 0.5; an empty prediction of an empty truth counts as 1.

    They steer training. The scores to report are measured at the images' original sizes, by `evaluate`.
    """
    model.eval()
    loss, ious, intersections, unions = 0.0, [], 0, 0
    for batch in prefetch(split.load(draw) for draw in split.in_order(config.batch_size)):
        logits = model(batch.inputs.to(accelerator.device)).mask_logits
        targets = batch.targets.to(accelerator.device)
        loss += float(mask_loss(logits, targets, config.loss)) * len(targets)
        predicted = resize_logits(logits.float(), config.target_size) > 0
        intersection, union = _overlap(predicted, targets > 0.5)
        ious += torch.where(union > 0, intersection / union.clamp(min=1), 1.0).tolist()
        intersections += int(intersection.sum())
        unions += int(union.sum())
    model.train()
    return {
        "val_loss": loss / len(split),
        "val_mean_iou": math.fsum(ious) / len(ious),
        "val_overall_iou": intersections / max(1, unions),
        "val_resolution": list(config.target_size),
    }


def _overlap(predicted: Tensor, truth: Tensor) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Pixels in both masks and pixels in either, for each of b masks."""
    intersection, union = (both.flatten(1).sum(1).cpu().double() for both in (predicted & truth, predicted | truth))
    return intersection, union


@dataclass
class _Progress:
    """How far a run is. Losses and seconds are summed since the last validation; `history` holds every validation."""

    step: int = 0
    elapsed_s: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0
    train_s: float = 0.0
    data_wait_s: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def best(self) -> dict[str, Any]:
        return max(self.history, key=lambda entry: entry["val_mean_iou"])


def _epoch(config: TrainConfig, split: CachedSplit, epoch: int, accelerator: Accelerator) -> list[Draw]:
    return split.epoch(
        seed=config.seed,
        epoch=epoch,
        batch_size=config.batch_size,
        prompts_per_image=config.prompts_per_image,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )


def _is_exhausted(progress: _Progress, config: TrainConfig) -> bool:
    if config.patience is None or not progress.history:
        return False
    since_best = len(progress.history) - 1 - progress.history.index(progress.best)
    return since_best >= config.patience


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


def _refuse_other_run(run_dir: Path, identity: Mapping[str, Any]) -> None:
    """Make sure that a run folder which is there already is this run's."""
    path = run_dir / "config.json"
    if path.is_file():
        found, expected = json.loads(path.read_bytes()), json.loads(json.dumps(identity))
        if {key: found.get(key) for key in expected} != expected:
            raise UsageError(f"{run_dir} holds a run with other settings or stores; name another folder or remove it.")


def _save_state(path: Path, progress: _Progress, head: nn.Module, optimizer: Any) -> None:
    buffer = io.BytesIO()
    state = {
        "progress": dataclasses.asdict(progress),
        "head": head.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }
    torch.save(state, buffer)
    atomic.write_file(path, buffer.getbuffer())


def _restore(path: Path, head: nn.Module, optimizer: Any) -> _Progress:
    state = torch.load(path, map_location="cpu", weights_only=True)
    head.load_state_dict(state["head"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    return _Progress(**state["progress"])
