"""The LoRA stages: encoders learn end to end, first to match images and prompts, then together with a head.

Encoders are handed in. What comes out is adapters, in PEFT's format, and a head; with the adapters the same encoders
are other encoders, whose features are extracted and cached as ever.

run/
    contrastive/, segmentation/   a run folder each (see `heads.runs`), with adapter/ and text_adapter/ of its best
    adapter/, text_adapter/       the adapters of the last stage
    finetuning.json               written last: what was adapted, and how each stage came out
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from cache_schema import atomic
from cache_schema.errors import UsageError, require_at_least, unknown_name
from cache_schema.features import FeatureCache
from cache_schema.fingerprint import digest_file, fingerprint
from heads.checkpoint import WEIGHTS
from heads.live import ADAPTERS, LiveEncoders
from heads.parity import Parity, check_parity
from heads.runs import Training, refuse_other_run
from heads.train import TrainRequest, train_together
from heads.train_config import TrainConfig

STAGES = ("contrastive", "segmentation")
FINISHED = "finetuning.json"


@dataclass(frozen=True)
class FinetuneConfig:
    """How encoders and a head are finetuned, as plain values.

    Args:
        contrastive: a first stage, in which adapters learn with a head that compares images and prompts; None for none.
        segmentation: a second, in which a head learns masks; None for none.
        sides: whose encoders are adapted: image, text, or both. The other stays frozen and is read from the cache.
        rank, alpha, dropout: of LoRA (Hu et al. 2021): updates are B A x alpha / rank.
        target_modules: short names of the modules that get one; None for all projections of attention and MLP.
        first_block: the first block of the image encoder that is adapted.
        from_states: read the hidden states before that block from a cache and start the forward pass there.
        dora, rank_stabilised: PEFT's variants (Liu et al. 2024; Kalajdzievski 2023, alpha / sqrt(rank)).
        adapter_rate: learning rate of the adapters, as a share of the stage's.
        head_alone: in the second stage the adapters stay as the first left them.
        gradient_checkpointing: keep the inputs of blocks alone, and compute the rest again for gradients.
        images_at_once: see `LiveEncoders`.
        parity_samples: on how many samples live and cached features are compared before the first step.
    """

    contrastive: TrainConfig | None = None
    segmentation: TrainConfig | None = None
    sides: tuple[str, ...] = ("image",)
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None
    first_block: int = 0
    from_states: bool = False
    dora: bool = False
    rank_stabilised: bool = False
    adapter_rate: float = 1.0
    head_alone: bool = False
    gradient_checkpointing: bool = False
    images_at_once: int | None = None
    parity_samples: int = 8

    def __post_init__(self) -> None:
        if not self.stages:
            raise UsageError("there is no stage to train; leave contrastive or segmentation in.")
        for side in self.sides:
            if side not in ADAPTERS:
                raise unknown_name("side", side, ADAPTERS)
        if not self.sides or len(set(self.sides)) < len(self.sides):
            raise UsageError(f"sides is {list(self.sides)}: name image, text, or both.")
        require_at_least(self, 1, "rank", "parity_samples")
        if self.images_at_once is not None:
            require_at_least(self, 1, "images_at_once")
        if self.first_block and "image" not in self.sides:
            raise UsageError("first_block is of the image encoder, which is not adapted; leave it at 0.")
        if not self.adapter_rate > 0:
            raise UsageError(f"adapter_rate is {self.adapter_rate}: give a number above 0.")
        if self.contrastive is not None and not self.contrastive.compares_only:
            raise UsageError(
                f"the contrastive stage's loss is {dict(self.contrastive.loss)}: give it terms that compare, such as "
                '{"clip_contrastive": 1}.'
            )
        if self.head_alone and (self.contrastive is None or self.segmentation is None):
            raise UsageError("head_alone keeps the adapters of the contrastive stage: it needs both stages.")
        if self.from_states and ("image" not in self.sides or not self.first_block):
            raise UsageError("from_states starts before first_block of an adapted image encoder: give one above 0.")

    @property
    def stages(self) -> dict[str, TrainConfig]:
        """The stages there are, in order."""
        return {name: config for name in STAGES if (config := getattr(self, name)) is not None}

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the adapters beside stages, stores and seeds."""
        names = ["sides", "rank", "alpha", "dropout", "target_modules", "first_block", "from_states"]
        names += ["dora", "rank_stabilised", "adapter_rate", "head_alone"]
        values = {name: getattr(self, name) for name in names}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@runtime_checkable
class EncoderFactory(Protocol):
    """Makes the encoders of a cache live."""

    def frozen(self) -> LiveEncoders:
        """Those that are to be adapted, without an adapter."""
        ...

    def adapted(self, adapters: Path | None, *, learn: bool) -> LiveEncoders:
        """With the adapters of a folder; or with those of the cache's own encoders, or fresh ones."""
        ...


@dataclass(frozen=True)
class Finetuning:
    """What came of it.

    Args:
        parity: how near live features were to the cache's before the first step.
        adapted: by side, names of the modules that have an adapter.
        num_adapted, num_encoder: parameters of the adapters, and of the adapted encoders without them.
        stages: by name.
    """

    run_dir: Path
    parity: Sequence[Parity]
    adapted: Mapping[str, Sequence[str]]
    num_adapted: int
    num_encoder: int
    stages: Mapping[str, Training] = field(default_factory=dict)

    @property
    def adapters(self) -> dict[str, Path]:
        """The folder of each side's adapter."""
        return {side: self.run_dir / ADAPTERS[side] for side in self.adapted}

    def to_dict(self) -> dict[str, Any]:
        return {
            "run_dir": str(self.run_dir),
            "parity": [parity.to_dict() for parity in self.parity],
            "adapted": {side: list(names) for side, names in self.adapted.items()},
            "num_adapted": self.num_adapted,
            "num_encoder": self.num_encoder,
            "stages": {name: training.to_dict() for name, training in self.stages.items()},
        }


def finetune_identity(config: FinetuneConfig, cache: FeatureCache, head: Path | None) -> dict[str, Any]:
    """Everything that decides what a finetuning learns."""
    return {
        "stages": {name: dataclasses.asdict(stage) for name, stage in config.stages.items()},
        "stores": cache.fingerprints,
        "finetune": {**config.identity, "initial_head": _digest_head(head)},
    }


def finetune_name(config: FinetuneConfig, cache: FeatureCache, head: Path | None = None) -> str:
    """A folder name: the sides that are adapted and the first 12 digits of the fingerprint."""
    digest = fingerprint(json.loads(json.dumps(finetune_identity(config, cache, head))))
    return f"lora-{'-'.join(config.sides)}-{digest[:12]}"


def finetune(
    config: FinetuneConfig,
    cache: FeatureCache,
    encoders: EncoderFactory,
    run_dir: Path,
    *,
    head: Path | None = None,
    recorded: Mapping[str, Any] | None = None,
    trackers: Sequence[str] = ("tensorboard",),
    say: Callable[[str], object] = print,
) -> Finetuning:
    """Finetune encoders in one stage or two, or go on where an earlier call was killed; a finished one is left alone.

    Args:
        head: a trained head, such as a run's best/, that the segmentation stage goes on from.
        recorded: what else the config.json of each stage should say.
        say: is told what people should see: the modules with an adapter, the parity, each stage's outcome.

    Raises:
        UsageError: as `train_together`, or the run folder holds another run.
        StoreMismatchError: live encoders do not say what the cache says.
    """
    identity = finetune_identity(config, cache, head)
    refuse_other_run(run_dir, identity)
    atomic.write_json(run_dir / "config.json", identity)
    parity = check_parity(encoders.frozen(), next(iter(config.stages.values())).train_split, num=config.parity_samples)
    say("live features are those of the cache:\n" + "\n".join(f"  {one.summary()}" for one in parity))
    adapters: Path | None = None
    trainings: dict[str, Training] = {}
    adapted: Mapping[str, Sequence[str]] = {}
    num_adapted = num_encoder = 0
    for name, stage in config.stages.items():
        learn = not (config.head_alone and name == "segmentation")
        live = encoders.adapted(adapters, learn=learn)
        if adapters is None:
            adapted, num_adapted = live.adapted_modules, sum(value.numel() for value in live.parameters)
            everything = [value for encoder in live.sides.values() for value in encoder.parameters()]
            num_encoder = sum(value.numel() for value in everything) - num_adapted
            say(_shown(adapted, num_adapted, num_encoder))
        request = TrainRequest(
            stage,
            run_dir / name,
            recorded or {},
            {"finetune": {**identity["finetune"], "stage": name, "before": _digests(adapters)}},
            head if name == "segmentation" else None,
        )
        trainings[name] = train_together([request], cache, encoders=live, trackers=trackers)[0]
        say(trainings[name].summary())
        if learn:
            adapters = run_dir / name
    assert adapters is not None
    for side in adapted:
        _copy_adapter(adapters / ADAPTERS[side], run_dir / ADAPTERS[side])
    found = Finetuning(run_dir, parity, adapted, num_adapted, num_encoder, trainings)
    atomic.write_json(run_dir / FINISHED, found.to_dict())
    return found


def read_finetuning(run_dir: Path) -> dict[str, Any] | None:
    """What a finished finetuning recorded; None if it is not finished."""
    path = run_dir / FINISHED
    return json.loads(path.read_bytes()) if path.is_file() else None


def _shown(adapted: Mapping[str, Sequence[str]], num_adapted: int, num_encoder: int) -> str:
    lines = [f"{num_adapted:,} parameters of adapters learn beside {num_encoder:,} that stay as they are:"]
    lines += [f"  {side}: {name}" for side, names in adapted.items() for name in names]
    return "\n".join(lines)


def _digest_head(head: Path | None) -> str | None:
    if head is None:
        return None
    if not (head / WEIGHTS).is_file():
        raise UsageError(f"no head at {head}: name a run's best/ or last/.")
    return digest_file(head / WEIGHTS)


def _digests(adapters: Path | None) -> dict[str, str]:
    """Of the adapters that a stage begins with."""
    if adapters is None:
        return {}
    files = {side: adapters / folder / "adapter_model.safetensors" for side, folder in ADAPTERS.items()}
    return {side: digest_file(file) for side, file in files.items() if file.is_file()}


def _copy_adapter(source: Path, target: Path) -> None:
    """Whole files, one after the other; a reader of a run that goes on finds either. Equal ones are left alone."""
    for file in sorted(source.iterdir()):
        copy = target / file.name
        if file.is_file() and not (copy.is_file() and copy.read_bytes() == file.read_bytes()):
            atomic.write_file(copy, file.read_bytes())
