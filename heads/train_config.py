"""How one head is trained, as plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from cache_schema.errors import UsageError, require_at_least, unknown_name
from cache_schema.masks import Size
from heads.losses import TERMS, compares_only, needs_masks

MIXED_PRECISIONS = ("no", "bf16", "fp16")
OPTIMIZERS = ("adamw", "adam")
SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class TrainConfig:
    """How to train one head.

    Args:
        head, arguments: which head, and the arguments its builder takes.
        loss: weight of each term of `heads.losses.TERMS`.
        loss_arguments: arguments of a term, by its name.
        prompts_per_image: prompts of one image that stand side by side in a batch and share its features.
        optimizer: adamw (decoupled weight decay) or adam.
        betas: decay rates of its running means.
        rates: by the beginning of parameters' names, what their learning rate is multiplied by.
        schedule: how the learning rate falls to 0 after the warm-up: cosine, linear, or constant (not at all).
        warmup: share of all steps over which the learning rate rises to `learning_rate`.
        clip_norm: gradients are scaled down to this norm; 0 leaves them alone.
        accumulate: batches whose gradients are averaged before the optimizer takes a step.
        ema: decay of a running mean of the weights, which is what is validated and kept then; None for the weights.
        patience: validations without a better score after which training stops; None never stops it.
        target_size: (H, W) at which the loss is taken and the validation score measured.
        val_samples: validate on so many samples of the split, the first of each image, and on all of them at the end;
            None for all of them always.
        checkpoint_steps: a killed run loses at most this many steps.
        seed: decides initial weights and dropout.
        data_seed: decides the order of the samples; None for `seed`. Heads that are trained in one pass share it.
    """

    head: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    loss: Mapping[str, float] = field(default_factory=lambda: {"bce": 1.0, "dice": 1.0})
    loss_arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    epochs: int = 20
    batch_size: int = 64
    prompts_per_image: int = 8
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    rates: Mapping[str, float] = field(default_factory=dict)
    schedule: str = "cosine"
    warmup: float = 0.05
    clip_norm: float = 1.0
    accumulate: int = 1
    ema: float | None = None
    patience: int | None = 5
    target_size: Size = (96, 96)
    val_samples: int | None = None
    checkpoint_steps: int = 100
    seed: int = 0
    data_seed: int | None = None
    mixed_precision: str = "no"
    train_split: str = "train"
    val_split: str = "val"

    def __post_init__(self) -> None:
        require_at_least(self, 1, "epochs", "batch_size", "prompts_per_image", "checkpoint_steps", "accumulate")
        if self.val_samples is not None:
            require_at_least(self, 1, "val_samples")
        for name in ("learning_rate", "weight_decay", "warmup", "clip_norm", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} is {getattr(self, name)}: give a number that is not negative.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"betas is {list(self.betas)}: give two numbers from 0 to below 1, such as [0.9, 0.999].")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UsageError(f"ema is {self.ema}: give a number between 0 and 1, such as 0.999, or null.")
        if len(self.target_size) != 2 or any(type(side) is not int or side < 1 for side in self.target_size):
            raise UsageError(f"target_size is {list(self.target_size)}: give a height and a width, such as [96, 96].")
        self._check_loss()
        for name, known in (("mixed_precision", MIXED_PRECISIONS), ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)

    def _check_loss(self) -> None:
        if not self.loss or not set(self.loss) <= set(TERMS):
            raise UsageError(f"loss is {dict(self.loss)}: give a weight for one or more of {', '.join(TERMS)}.")
        for name, values in (("loss", self.loss), ("rates", self.rates)):
            if any(type(value) not in (int, float) or not 0 <= value < math.inf for value in values.values()):
                raise UsageError(f"{name} is {dict(values)}: its values are numbers that are not negative.")
        for term in self.loss_arguments:
            if term not in self.loss:
                raise unknown_name("term in loss_arguments", term, self.loss)

    @property
    def order_seed(self) -> int:
        """What decides the order of the samples."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def needs_masks(self) -> bool:
        """Whether the loss looks at masks."""
        return needs_masks(self.loss)

    @property
    def compares_only(self) -> bool:
        """Whether the loss looks at embeddings alone."""
        return compares_only(self.loss)

    def learning_rate_share(self, step: int, num_steps: int) -> float:
        """Share of the peak learning rate at a step: a linear rise over `warmup` of all steps, then the schedule.

        >>> config = TrainConfig("linear", warmup=0.1)
        >>> [round(config.learning_rate_share(step, 100), 2) for step in (0, 9, 10, 55, 100)]
        [0.1, 1.0, 1.0, 0.5, 0.0]
        """
        warmup_steps = max(self.schedule != "constant", round(self.warmup * num_steps))
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if self.schedule == "constant":
            return 1.0
        done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
        return 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    def parameter_groups(self, head: nn.Module) -> list[dict[str, Any]]:
        """The head's parameters for an optimizer, those of one learning rate together; `share` is their multiplier.

        Raises:
            UsageError: no parameter's name begins as one of `rates` says.
        """
        groups: dict[float, list[nn.Parameter]] = {}
        used: set[str] = set()
        for name, parameter in head.named_parameters():
            if not parameter.requires_grad:
                continue
            matching = max((start for start in self.rates if name.startswith(start)), key=len, default=None)
            used |= {start for start in self.rates if name.startswith(start)}
            groups.setdefault(1.0 if matching is None else self.rates[matching], []).append(parameter)
        for start in self.rates.keys() - used:
            known = {name.partition(".")[0] for name, _ in head.named_parameters()}
            raise unknown_name("beginning of parameter names in rates", start, known)
        return [{"params": parameters, "share": share} for share, parameters in groups.items()]
