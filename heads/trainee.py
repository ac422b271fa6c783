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
from heads.checkpoint import HeadSpec, load_head, save_head
from heads.data import Batch
from heads.embedding import Embedder, gather_pairs
from heads.gradient_cache import backward_in_parts
from heads.inputs import Head, HeadInputs, HeadOutputs
from heads.live import LiveBatch, LiveEncoders, LiveInputs
from heads.losses import CONTRASTIVE_TERMS, Targets, mask_iou, overlap, resize_logits, total_loss
from heads.retrieval import Retrieval
from heads.runs import METRICS, Progress, has_state, read_state, score_of, write_state
from heads.train_config import TrainConfig

_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainee:
    """A head with all that its training changes, restored where an earlier run was killed.

    Its randomness is its own: what other heads draw beside it changes nothing.

    Args:
        recorded: what config.json should say.
        encoders: those that learn with it.
        initial: a trained head to go on from.

    Raises:
        UsageError: the head or its arguments are unknown, `initial` is another head, or this device cannot train it so.
    """

    def __init__(
        self,
        config: TrainConfig,
        spec: HeadSpec,
        run_dir: Path,
        accelerator: Accelerator,
        recorded: Mapping[str, Any],
        *,
        encoders: LiveEncoders | None = None,
        initial: Path | None = None,
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self.starts_trained = initial is not None
        self._encoders = encoders
        self._spec = spec
        self._accelerator = accelerator
        self._device = accelerator.device
        if config.mixed_precision == "fp16" and self._device.type == "cpu":
            raise UsageError("mixed_precision=fp16 needs an accelerator; on a CPU take bf16, or no.")
        torch.manual_seed(config.seed)
        self.head: Head = spec.build(fresh=not has_state(run_dir))
        if initial is not None:
            _take_over(self.head, initial)
        self._randomness = _Randomness(self._device)
        groups = config.parameter_groups(self.head)
        if encoders is not None:
            encoders.to(self._device)
            groups += [{"params": encoders.parameters, "share": encoders.rate}] if encoders.parameters else []
            if config.ema is not None:
                raise UsageError(
                    "a running mean of the weights (ema) is not kept of encoders that learn; leave it out."
                )
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
        self._best_adapters: dict[str, Tensor] = {}
        self._restore()
        self._model: nn.Module = accelerator.prepare_model(self._asked(self.head, config.compares_only).train())
        if accelerator.is_main_process:
            atomic.write_json(run_dir / "config.json", {**recorded, **self._initial()})
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
        with self._randomness, nullcontext() if takes_step else self._held():
            loss = self._backward(inputs, targets, group_size)
        if not torch.isfinite(loss):
            raise UsageError(
                f"the loss of {config.head} is {loss.item()} at step {progress.step + 1}: "
                "lower learning_rate, or clip_norm."
            )
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
        asked = self._asked(self.kept, self.config.compares_only and not targets.masks.numel()).eval()
        with self._autocast():
            outputs: HeadOutputs = asked(inputs)
        asked.train()
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

    def note_validation(self, epoch: int, scores: Mapping[str, Any]) -> dict[str, Any]:
        """Note a validation after so many epochs, and keep the head, as the best if it is.

        Returns:
            What metrics.jsonl says of it. Before the first step there is no training loss.
        """
        progress = self.progress
        entry = {
            "step": progress.step,
            "epoch": epoch,
            "train_loss": progress.loss_sum / progress.loss_count if progress.loss_count else None,
            **scores,
            "learning_rate": self._learning_rate(),
            "train_s": round(progress.train_s, 3),
            "data_wait_s": round(progress.data_wait_s, 3),
            "elapsed_s": round(time.perf_counter() - self._started, 3),
        }
        if self._encoders is not None and self.config.compares_only:  # adapters learn to match; masks are not asked for
            entry["selects"] = "val_loss"
        improved = not progress.history or score_of(entry) > score_of(progress.best)
        self.progress = Progress(progress.step, time.perf_counter() - self._started, history=[*progress.history, entry])
        if self._encoders is not None and improved:
            self._best_adapters = self._encoders.state()
        if self._accelerator.is_main_process:
            for name in ("best", "last") if improved else ("last",):
                save_head(self.run_dir / name, self._spec, self.kept)
                if self._encoders is not None:
                    self._encoders.save(self.run_dir if name == "best" else self.run_dir / name)
            lines = "".join(json.dumps(line, allow_nan=False) + "\n" for line in self.progress.history)
            atomic.write_file(self.run_dir / METRICS, lines.encode())
        self._save_state()
        return entry

    def load_best(self) -> None:
        """Go back to the weights of the best validation."""
        self.kept.load_state_dict(load_head(self.run_dir / "best")[1].state_dict())
        if self._encoders is not None:
            self._encoders.load_state(self._best_adapters)

    def _asked(self, head: Head, only_compares: bool) -> nn.Module:
        """What is called with inputs: a head or its embeddings, perhaps behind encoders."""
        learner = Embedder(head) if only_compares else head
        return learner if self._encoders is None else self._encoders.around(learner)

    def _backward(self, inputs: HeadInputs | LiveInputs, targets: Targets, group_size: int) -> Tensor:
        """Add the gradients of one batch to those of its group; returns the loss."""
        config, encoders = self.config, self._encoders

        def loss_of(outputs: HeadOutputs) -> Tensor:
            return total_loss(*gather_pairs(outputs, targets), config.loss, config.loss_arguments)

        def scaled(loss: Tensor) -> Tensor:
            return self._scaler.scale(loss / group_size)

        with self._autocast():
            in_parts = encoders.images_at_once if encoders is not None and config.compares_only else None
            if in_parts is not None:
                assert isinstance(inputs, LiveInputs)
                nothing = targets.masks.new_empty(len(targets.no_target), 0, 0)
                return backward_in_parts(
                    self._model,
                    inputs,
                    lambda embeddings: loss_of(HeadOutputs(nothing, embeddings=embeddings)),
                    images_at_once=in_parts,
                    scale=scaled,
                    held=self._held,
                )
            loss = loss_of(self._model(inputs))
        scaled(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _held(self) -> AbstractContextManager[Any]:
        """Processes do not exchange gradients within."""
        held: AbstractContextManager[Any] = self._accelerator.no_sync(self._model)
        return held

    def _learning_rate(self) -> float:
        groups = self._optimizer.param_groups
        return max((group["lr"] / group["share"] for group in groups if group["share"]), default=0.0)

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

    def _load(self, batch: Batch) -> tuple[HeadInputs | LiveInputs, Targets]:
        targets = batch.targets_at.get(self.config.target_size, batch.unmasked)
        inputs = batch.live if isinstance(batch, LiveBatch) else batch.inputs
        return inputs.to(self._device), targets.to(self._device)

    def _take_step(self) -> None:
        if self.config.clip_norm:
            self._scaler.unscale_(self._optimizer)
            parameters = [value for group in self._optimizer.param_groups for value in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
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
            "adapters": {} if self._encoders is None else self._encoders.state(),
            "best_adapters": self._best_adapters,
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
        if self._encoders is not None:
            self._encoders.load_state(state["adapters"])
            self._best_adapters = state["best_adapters"]
        self.progress = Progress(**state["progress"])


def _take_over(head: Head, folder: Path) -> None:
    """Give a head the weights of a trained one."""
    weights = load_head(folder)[1].state_dict()
    try:
        head.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise UsageError(
            f"the head at {folder} is another than is to be trained: {' '.join(str(error).split())}"
        ) from error


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
