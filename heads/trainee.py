"""One head in training: its weights, optimizer, randomness and progress. It is handed batches and validations."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from cache_schema import atomic
from cache_schema.errors import UsageError
from cache_schema.features import FeatureCache
from heads.checkpoint import HeadSpec, save_head
from heads.data import Batch
from heads.embedding import Embedder, gather_pairs
from heads.inputs import Head, HeadInputs, HeadOutputs
from heads.losses import CONTRASTIVE_TERMS, Targets, mask_iou, overlap, resize_logits, total_loss
from heads.retrieval import Retrieval
from heads.runs import METRICS, Progress, has_state, read_state, run_identity, score_of, write_state
from heads.train_config import TrainConfig

_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainee:
    """A head with all that its training changes, restored where an earlier run was killed.

    Its randomness is its own: what other heads draw beside it changes nothing.

    Args:
        recorded: what else config.json should say.

    Raises:
        UsageError: the head or its arguments are unknown, or this device cannot train it so.
    """

    def __init__(
        self,
        config: TrainConfig,
        spec: HeadSpec,
        cache: FeatureCache,
        run_dir: Path,
        accelerator: Accelerator,
        recorded: Mapping[str, Any],
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self._spec = spec
        self._accelerator = accelerator
        self._device = accelerator.device
        if config.mixed_precision == "fp16" and self._device.type == "cpu":
            raise UsageError("mixed_precision=fp16 needs an accelerator; on a CPU take bf16, or no.")
        torch.manual_seed(config.seed)
        self.head: Head = spec.build(fresh=not has_state(run_dir))
        self._randomness = _Randomness(self._device)
        groups = config.parameter_groups(self.head)
        kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
        self.head.to(self._device)
        self._optimizer = kind(
            groups, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=config.mixed_precision == "fp16")
        self._ema = (
            None
            if config.ema is None
            else AveragedModel(
                self.head,
                multi_avg_fn=get_ema_multi_avg_fn(config.ema),  # type: ignore[no-untyped-call]
                use_buffers=True,
            )
        )
        self.progress = Progress()
        self._restore()
        self._model: nn.Module = accelerator.prepare_model(Embedder(self.head) if config.compares_only else self.head)
        if accelerator.is_main_process:
            more = {"encoder_fingerprints": cache.encoder_fingerprints, **recorded, **self._initial()}
            atomic.write_json(run_dir / "config.json", {**run_identity(config, cache), **more})
        self._started = time.perf_counter() - self.progress.elapsed_s
        self._saved_at = self.progress.step
        self._scores = _Scores()
        self._compares = any(name in CONTRASTIVE_TERMS for name in config.loss)

    @property
    def learnt_grids(self) -> tuple[str, ...]:
        """The layers whose token grids it learns from."""
        return self.head.embedded_layers if self.config.compares_only else self.head.layers

    @property
    def is_exhausted(self) -> bool:
        """Whether it has not become better for as long as its patience lasts."""
        return self.progress.is_exhausted(self.config.patience)

    @property
    def kept(self) -> Head:
        """The head whose weights are validated and kept."""
        if self._ema is None:
            return self.head
        averaged = self._ema.module
        assert isinstance(averaged, Head)
        return averaged

    def step(self, batch: Batch, waited_s: float, steps_per_epoch: int) -> None:
        """Learn from one batch. Gradients of a group of batches make one step; groups end with the epoch.

        Raises:
            UsageError: the loss is no longer finite.
        """
        started, config, progress = time.perf_counter(), self.config, self.progress
        for group in self._optimizer.param_groups:
            share = group["share"] * config.learning_rate_share(progress.step, config.epochs * steps_per_epoch)
            group["lr"] = config.learning_rate * share
        place = progress.step % steps_per_epoch
        place_in_group = place % config.accumulate
        group_size = min(config.accumulate, steps_per_epoch - (place - place_in_group))
        takes_step = place_in_group + 1 == group_size
        inputs, targets = self._load(batch)
        with self._randomness, nullcontext() if takes_step else self._accelerator.no_sync(self._model):
            with self._autocast():
                loss = total_loss(*gather_pairs(self._model(inputs), targets), config.loss, config.loss_arguments)
            if not torch.isfinite(loss):
                raise UsageError(
                    f"the loss of {config.head} is {loss.item()} at step {progress.step + 1}: "
                    "lower learning_rate, or clip_norm."
                )
            self._scaler.scale(loss / group_size).backward()  # type: ignore[no-untyped-call]
        if takes_step:
            self._take_step()
        progress.step += 1
        progress.loss_sum += loss.item()
        progress.loss_count += 1
        progress.data_wait_s += waited_s
        progress.train_s += waited_s + time.perf_counter() - started
        due = progress.step - self._saved_at >= config.checkpoint_steps
        if takes_step and due and place + 1 < steps_per_epoch:
            self._save_state()

    @torch.inference_mode()
    def score(self, batch: Batch) -> None:
        """Count one batch of a validation."""
        inputs, targets = self._load(batch)
        kept = self.kept.eval()
        with self._autocast():
            asked = kept if targets.masks.numel() or not self.config.compares_only else Embedder(kept)
            outputs: HeadOutputs = asked(inputs)
        kept.train()
        if self._compares and outputs.embeddings is not None:
            assert targets.image_index is not None
            assert targets.image_ids is not None
            self._scores.retrieval.add(outputs.embeddings, targets.image_index, targets.image_ids)
        loss = total_loss(outputs, targets, self.config.loss, self.config.loss_arguments)
        self._scores.loss += float(loss) * len(batch.samples)
        self._scores.num += len(batch.samples)
        if targets.masks.numel():
            predicted = resize_logits(outputs.mask_logits.float(), self.config.target_size) > 0
            truth = targets.masks > 0.5
            intersection, union = overlap(predicted, truth, targets.labelled)
            self._scores.ious += mask_iou(predicted, truth, targets.labelled).double().tolist()
            self._scores.intersection += int(intersection.sum())
            self._scores.union += int(union.sum())

    def finish_scores(self) -> dict[str, Any]:
        """Scores of the batches since the last call, in all processes; recall of retrieval where the loss compares.

        At the targets' resolution, threshold 0.5; an empty mask for an empty truth counts as 1. They steer training.
        The scores to report are measured at the images' original sizes, by `evaluate`.
        """
        scores, self._scores = _Scores.gather(self._scores, self._accelerator), _Scores()
        if not math.isfinite(scores.loss):
            raise UsageError(
                f"the validation loss of {self.config.head} is {scores.loss} after step {self.progress.step}: "
                "lower learning_rate, or clip_norm."
            )
        has_masks = bool(scores.ious)
        recall = scores.retrieval.recall() if scores.retrieval else {}
        return {
            "val_loss": scores.loss / scores.num,
            "val_mean_iou": float(np.mean(scores.ious)) if has_masks else None,
            "val_overall_iou": scores.intersection / max(1, scores.union) if has_masks else None,
            "val_resolution": list(self.config.target_size),
            **{f"val_{name}": value for name, value in recall.items()},
        }

    def end_epoch(self, epoch: int, scores: Mapping[str, Any]) -> dict[str, Any]:
        """Note a validation, and keep the head, as the best if it is; returns what metrics.jsonl says of it."""
        progress = self.progress
        entry = {
            "step": progress.step,
            "epoch": epoch + 1,
            "train_loss": progress.loss_sum / progress.loss_count,
            **scores,
            "learning_rate": max(
                group["lr"] / group["share"] for group in self._optimizer.param_groups if group["share"]
            ),
            "train_s": round(progress.train_s, 3),
            "data_wait_s": round(progress.data_wait_s, 3),
            "elapsed_s": round(time.perf_counter() - self._started, 3),
        }
        improved = not progress.history or score_of(entry) > score_of(progress.best)
        self.progress = Progress(progress.step, time.perf_counter() - self._started, history=[*progress.history, entry])
        if self._accelerator.is_main_process:
            if improved:
                save_head(self.run_dir / "best", self._spec, self.kept)
            save_head(self.run_dir / "last", self._spec, self.kept)
            lines = "".join(json.dumps(line, allow_nan=False) + "\n" for line in self.progress.history)
            atomic.write_file(self.run_dir / METRICS, lines.encode())
        self._save_state()
        return entry

    def _initial(self) -> dict[str, Any]:
        """What the head took over from another checkpoint, told once and recorded for good."""
        path = self.run_dir / "config.json"
        if path.is_file():
            recorded = json.loads(path.read_bytes())
            return {"initial": recorded["initial"]} if "initial" in recorded else {}
        report = getattr(self.head, "initial_report", None)
        if report is None:
            return {}
        tqdm.write(report.summary())
        return {"initial": report.to_dict()}

    def _load(self, batch: Batch) -> tuple[HeadInputs, Targets]:
        targets = batch.targets_at.get(self.config.target_size, batch.unmasked)
        return batch.inputs.to(self._device), targets.to(self._device)

    def _take_step(self) -> None:
        if self.config.clip_norm:
            self._scaler.unscale_(self._optimizer)
            torch.nn.utils.clip_grad_norm_(self.head.parameters(), self.config.clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        if self._ema is not None:
            self._ema.update_parameters(self.head)

    def _autocast(self) -> AbstractContextManager[Any]:
        half = _HALVES.get(self.config.mixed_precision)
        return nullcontext() if half is None else torch.autocast(self._device.type, half)

    def _save_state(self) -> None:
        self._saved_at = self.progress.step
        if not self._accelerator.is_main_process:
            return
        self.progress.elapsed_s = time.perf_counter() - self._started
        state = {
            "progress": dataclasses.asdict(self.progress),
            "head": self.head.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "ema": None if self._ema is None else self._ema.state_dict(),
            "randomness": self._randomness.states,
        }
        write_state(self.run_dir, state)

    def _restore(self) -> None:
        state = read_state(self.run_dir)
        if state is None:
            return
        self.head.load_state_dict(state["head"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        if self._ema is not None:
            self._ema.load_state_dict(state["ema"])
        self._randomness.states = state["randomness"]
        self.progress = Progress(**state["progress"])


class _Randomness:
    """torch's random states of one head. Inside a `with` block they are the global ones, which come back after it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.states = self._read()
        self._others: list[Tensor] = []

    def __enter__(self) -> None:
        self._others = self._read()
        self._write(self.states)

    def __exit__(self, *exception: object) -> None:
        self.states = self._read()
        self._write(self._others)

    def _read(self) -> list[Tensor]:
        on_device = [torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else []
        return [torch.get_rng_state(), *on_device]

    def _write(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self._device)


@dataclass
class _Scores:
    """Sums of a validation."""

    loss: float = 0.0
    num: int = 0
    ious: list[float] = field(default_factory=list)
    intersection: int = 0
    union: int = 0
    retrieval: Retrieval = field(default_factory=Retrieval)

    @classmethod
    def gather(cls, mine: _Scores, accelerator: Accelerator) -> _Scores:
        """The sums of all processes, in the order of their ranks."""
        if accelerator.num_processes == 1:
            return mine
        every: list[_Scores] = gather_object([mine])
        return cls(
            sum(scores.loss for scores in every),
            sum(scores.num for scores in every),
            [iou for scores in every for iou in scores.ious],
            sum(scores.intersection for scores in every),
            sum(scores.union for scores in every),
            Retrieval.merge(scores.retrieval for scores in every),
        )
