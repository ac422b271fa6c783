"""The training loop: one head or several, one cache, a run folder for each. Explicit, resumable inside an epoch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from tqdm import tqdm

from cache_schema import atomic
from cache_schema.errors import UsageError
from cache_schema.features import FeatureCache
from heads.checkpoint import HeadSpec
from heads.data import Batch, CachedSplit, Draw, feature_shapes, prefetch, timed
from heads.live import LiveEncoders
from heads.residency import Residency
from heads.runs import FINISHED, STATE, Training, read_training, refuse_other_run, run_identity
from heads.train_config import TrainConfig
from heads.trainee import Trainee

SHARED_SETTINGS = ("epochs", "batch_size", "prompts_per_image", "order_seed", "train_split", "val_split", "val_samples")
"""What heads that are trained in one pass must have in common, since they are given the same batches."""


@dataclass(frozen=True)
class TrainRequest:
    """One head to train.

    Args:
        recorded: what else its config.json should say.
        identity: what else decides what is learned, see `run_identity`.
        initial: a trained head of the same shape to go on from, such as a run's best/.
    """

    config: TrainConfig
    run_dir: Path
    recorded: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    initial: Path | None = None


def train(
    config: TrainConfig,
    cache: FeatureCache,
    run_dir: Path,
    *,
    recorded: Mapping[str, Any] | None = None,
    residency: Residency = "auto",
    trackers: Sequence[str] = ("tensorboard",),
) -> Training:
    """Train one head on one cache; see `train_together`."""
    request = TrainRequest(config, run_dir, recorded or {})
    return train_together([request], cache, residency=residency, trackers=trackers)[0]


def train_together(
    requests: Sequence[TrainRequest],
    cache: FeatureCache,
    *,
    residency: Residency = "auto",
    trackers: Sequence[str] = ("tensorboard",),
    encoders: LiveEncoders | None = None,
) -> list[Training]:
    """Train heads on one cache, each batch being read once for all of them, or go on where an earlier call was killed.

    What each learns is to the last bit what it learns alone. A finished run is left as it is.

    Args:
        trackers: what accelerate logs each validation to: tensorboard, wandb, ...
        encoders: those that learn with the head, of which there is one then.

    Raises:
        UsageError: a head or its arguments are unknown, the heads would see other batches, a run folder holds another
            run, or a loss is no longer finite.
    """
    _require_shared(requests)
    if encoders is not None and len(requests) > 1:
        raise UsageError("encoders learn together with one head; train the others on what they are extracted to.")
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"the tracker {name} is not installed; install it (pip install {name}) or leave it out.")
    AcceleratorState._reset_state(reset_partial_state=True)  # else a second call could not choose anew
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    shapes, trainees, finished = feature_shapes(cache), dict[int, Trainee](), dict[int, Training]()
    for place, request in enumerate(requests):
        spec = HeadSpec(request.config.head, request.config.arguments, shapes)
        identity = run_identity(request.config, cache, request.identity)
        refuse_other_run(request.run_dir, identity)
        if (training := read_training(request.run_dir)) is not None:
            finished[place] = training
        else:
            recorded = {"encoder_fingerprints": cache.encoder_fingerprints, **request.recorded}
            trainees[place] = Trainee(
                request.config,
                spec,
                request.run_dir,
                accelerator,
                {**identity, **recorded},
                encoders=encoders,
                initial=request.initial,
            )
    if trainees:
        loop = _Loop(list(trainees.values()), cache, residency, accelerator, trackers, encoders)
        loop.run()
        finished |= dict(zip(trainees, loop.finish(), strict=True))
    return [finished[place] for place in range(len(requests))]


class _Loop:
    """The passes over the data that some heads share."""

    def __init__(
        self,
        trainees: Sequence[Trainee],
        cache: FeatureCache,
        residency: Residency,
        accelerator: Accelerator,
        trackers: Sequence[str],
        encoders: LiveEncoders | None,
    ) -> None:
        self._trainees = trainees
        self._encoders = encoders
        self._accelerator = accelerator
        self._config = config = trainees[0].config
        heads = [trainee.head for trainee in trainees]
        layers = list(dict.fromkeys(layer for head in heads for layer in head.layers))
        attention = list(dict.fromkeys(name for head in heads for name in head.attention))
        sizes = [trainee.config.target_size for trainee in trainees if trainee.config.needs_masks]
        grids = list(dict.fromkeys(layer for trainee in trainees for layer in trainee.learnt_grids))
        tokens = any(head.reads_tokens for head in heads) and (encoders is None or encoders.text is None)
        if encoders is not None and encoders.image is not None:  # nothing of an image is read from the cache
            layers, attention, grids = [], [], []
        scored = [trainee.config.target_size for trainee in trainees] if _has_masks(cache, config.val_split) else []
        device = accelerator.device
        self._train = CachedSplit(
            cache,
            config.train_split,
            sizes,
            layers,
            residency,
            device,
            all_views=True,
            attention=attention,
            grids=grids,
            tokens=tokens,
        )
        self._val = CachedSplit(
            cache,
            config.val_split,
            scored,
            layers,
            residency,
            device,
            attention=attention,
            grids=layers if scored else grids,
            tokens=tokens,
        )
        self._steps_per_epoch = len(self._order(0))
        self._num_steps = config.epochs * self._steps_per_epoch
        self._trackers = [_Tracker(trainee, trackers, accelerator) for trainee in trainees]

    def run(self) -> None:
        """Train until every head has had its epochs or its patience is at an end."""
        begins = [trainee for trainee in self._trainees if trainee.starts_trained and not trainee.progress.history]
        self._validate(begins)
        for trainee in begins:
            trainee.note_validation(0, trainee.finish_scores())
        step = min(trainee.progress.step for trainee in self._trainees)
        names = ", ".join(trainee.config.head for trainee in self._trainees)
        shown = self._accelerator.is_main_process
        with tqdm(total=self._num_steps, initial=step, desc=f"training {names}", unit="step", disable=not shown) as bar:
            while step < self._num_steps and (active := self._active()):
                epoch, first = divmod(step, self._steps_per_epoch)
                order = self._order(epoch)[first:]
                for batch, waited_s in timed(self._batches(self._train, order)):
                    for trainee in active:
                        if trainee.progress.step == step:  # one that was further when it was killed waits
                            trainee.step(batch, waited_s, self._steps_per_epoch)
                    step += 1
                    bar.update()
                due = [trainee for trainee in active if trainee.progress.step == step]
                due = [trainee for trainee in due if trainee.progress.num_epochs <= epoch]
                self._validate(due)
                for trainee in due:
                    entry = trainee.note_validation(epoch + 1, trainee.finish_scores())
                    self._trackers[self._trainees.index(trainee)].log(entry)
                    bar.set_postfix_str(_shown(trainee, entry, len(self._trainees) > 1))

    def finish(self) -> list[Training]:
        """Validate the best heads in full where that was not done, and say that training is over."""
        found = []
        for trainee, tracker in zip(self._trainees, self._trackers, strict=True):
            best = dict(trainee.progress.best)
            if self._config.val_samples is not None:
                self._accelerator.wait_for_everyone()
                trainee.load_best()
                self._validate([trainee], in_full=True)
                best |= trainee.finish_scores()
            summary = {
                "best_step": best["step"],
                "best_val_mean_iou": best["val_mean_iou"],
                "best_val_loss": best["val_loss"],
                "num_steps": trainee.progress.step,
                "stopped_early": trainee.progress.step < self._num_steps,
                "num_parameters": sum(parameter.numel() for parameter in trainee.head.parameters()),
                "seconds": round(trainee.progress.elapsed_s, 3),
            }
            tracker.close()
            if self._accelerator.is_main_process:
                atomic.write_json(trainee.run_dir / FINISHED, summary)
                atomic.remove(trainee.run_dir / STATE)
            found.append(Training(trainee.run_dir, reused=False, **summary))
        self._accelerator.wait_for_everyone()
        return found

    def _active(self) -> list[Trainee]:
        return [trainee for trainee in self._trainees if not trainee.is_exhausted]

    def _order(self, epoch: int) -> list[Draw]:
        return self._train.epoch(
            seed=self._config.order_seed,
            epoch=epoch,
            batch_size=self._config.batch_size,
            prompts_per_image=self._config.prompts_per_image,
            rank=self._accelerator.process_index,
            world_size=self._accelerator.num_processes,
        )

    def _validate(self, trainees: Iterable[Trainee], *, in_full: bool = False) -> None:
        """Score heads on the validation split, each batch being read once; every process takes its share of batches."""
        trainees = list(trainees)
        if not trainees:
            return
        draws = self._val_draws(in_full)[self._accelerator.process_index :: self._accelerator.num_processes]
        for batch in self._batches(self._val, draws):
            for trainee in trainees:
                trainee.score(batch)

    def _batches(self, split: CachedSplit, draws: Iterable[Draw]) -> Iterator[Batch]:
        encoders = self._encoders
        return split.batches(draws) if encoders is None else prefetch(encoders.fill(split.load(draw)) for draw in draws)

    def _val_draws(self, in_full: bool) -> list[Draw]:
        num = self._config.val_samples
        if in_full or num is None or num >= len(self._val):
            return self._val.in_order(self._config.batch_size)
        every = np.concatenate([draw.samples for draw in self._val.in_order(self._config.batch_size)])
        chosen = np.linspace(0, len(every) - 1, num).round().astype(np.int64)
        return Draw.whole(every[chosen]).cut(self._config.batch_size)


class _Tracker:
    """Where the validations of one run are logged, beside metrics.jsonl."""

    def __init__(self, trainee: Trainee, trackers: Sequence[str], accelerator: Accelerator) -> None:
        self._accelerator = (
            Accelerator(log_with=list(trackers), project_dir=str(trainee.run_dir / "tensorboard"))
            if accelerator.is_main_process and trackers
            else None
        )
        if self._accelerator is not None:
            kwargs = {"tensorboard": {"purge_step": trainee.progress.step}, "wandb": {"name": trainee.run_dir.name}}
            kept = {name: value for name, value in kwargs.items() if name in trackers}
            self._accelerator.init_trackers("headstart" if "wandb" in trackers else "", init_kwargs=kept)

    def log(self, entry: Mapping[str, Any]) -> None:
        """One validation."""
        if self._accelerator is not None:
            numbers = {key: value for key, value in entry.items() if isinstance(value, float)}
            self._accelerator.log(numbers, step=entry["step"])

    def close(self) -> None:
        """Write what is not written yet."""
        if self._accelerator is not None:
            for tracker in self._accelerator.trackers:  # `end_training` would end the process group as well
                tracker.finish()


def _require_shared(requests: Sequence[TrainRequest]) -> None:
    if not requests:
        raise UsageError("there is no head to train; name a recipe.")
    folders = [request.run_dir.resolve() for request in requests]
    if len(set(folders)) < len(folders):
        raise UsageError("two of these runs are the same: name each recipe once, or give them other settings.")
    first = requests[0].config
    for request in requests[1:]:
        for name in SHARED_SETTINGS:
            mine, its = getattr(request.config, name), getattr(first, name)
            if mine != its:
                name = "data_seed" if name == "order_seed" else name
                raise UsageError(
                    f"{first.head} and {request.config.head} would see other batches: {name} is {its} and {mine}. Give "
                    f"one for all with --set {name}=..., or train them one by one."
                )


def _has_masks(cache: FeatureCache, split: str) -> bool:
    samples = cache.samples.samples
    return all(samples.targets[row] for row in cache.usable_samples(split).tolist())


def _shown(trainee: Trainee, entry: Mapping[str, Any], named: bool) -> str:
    score = "" if entry["val_mean_iou"] is None else f", val_mean_iou={entry['val_mean_iou']:.3f}"
    name = f"{trainee.config.head}: " if named else ""
    return f"{name}loss={entry['train_loss']:.3f}{score}"
