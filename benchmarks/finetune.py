"""LoRA from block k on: a step that starts at cached hidden states beside one that starts at the pixels.

    python -m benchmarks.finetune --json finetune.json

Both learn the same adapters and the same head from the same batches, by the step of `headstart finetune`: one decodes
images and passes through all blocks, the other reads what goes into block k from a store and starts there. Their losses
are compared on the way. The encoder is of a real architecture with random weights.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from accelerate import Accelerator

from benchmarks.checkpoints import ARCHITECTURES, ImageModel, save_clip_text
from benchmarks.common import Library, Report, Row, describe_machine, measure_and_tell, take_turns, to_stderr
from cache_schema.errors import UsageError, require_at_least
from cache_schema.features import TOKENS, FeatureCache, ImageFeatures, open_cache
from cache_schema.store import open_store
from extract.datasets.scenes import ScenesConfig, make_scenes
from extract.encoders.image import load_image_encoder
from extract.encoders.specs import ImageEncoderSpec, TextEncoderSpec
from extract.encoders.text import load_text_encoder
from extract.image_job import ImageJobConfig, extract_images
from extract.prepare import PrepareConfig, prepare
from extract.prompt_job import PromptJobConfig, extract_prompts
from heads.checkpoint import HeadSpec
from heads.data import CachedSplit, Draw, feature_shapes
from heads.finetune import FinetuneConfig
from heads.live import LiveEncoders
from heads.trainee import Trainee
from headstart.finetuning import HubEncoders
from headstart.recipes import make_config

PIXELS, STATES = "from the pixels", "from cached states"
LIBRARIES = tuple(Library(name, name) for name in ("torch", "transformers", "peft", "accelerate", "numpy"))
TOLERANCE = 1e-3
"""How far losses may lie apart, as a share; states are kept in float32."""

_PROMPTS_PER_IMAGE = 4


@dataclass(frozen=True)
class FinetuneBenchmarkConfig:
    """Measure LoRA steps that start at the pixels and at block k."""

    json: Path | None = None
    """Write what was found to this file."""
    dir: Path | None = None
    """Folder to work in; the system's folder for temporary files by default."""
    model: str = "dinov2-small@224"
    """Architecture of the image encoder with its input size."""
    recipe: str = "linear"
    """Whose head learns along; a light one shows what the encoder takes."""
    first_blocks: tuple[int, ...] = (6, 9, 11)
    """The first blocks with an adapter, counted from 0."""
    num_images: int = 48
    """Scenes to make, with four prompts each."""
    batch_size: int = 32
    """Prompts in a batch, four of each image."""
    num_batches: int = 4
    """Batches of one turn."""
    rounds: int = 3
    """How often every contender has its turn."""
    tiny_text: bool = False
    """A tiny text encoder in the place of CLIP's, to try the benchmark out."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "num_images", "batch_size", "num_batches", "rounds")
        num_blocks = ARCHITECTURES[ImageModel.parse(self.model).architecture].num_layers
        for block in self.first_blocks:
            if not 0 < block < num_blocks:
                raise UsageError(f"first_blocks has {block}: {self.model} can start at blocks 1 to {num_blocks - 1}.")
        make_config(self.recipe)

    @property
    def settings(self) -> dict[str, Any]:
        """What the figures depend on."""
        names = ("model", "recipe", "num_images", "batch_size", "num_batches", "rounds")
        return {name: getattr(self, name) for name in names} | {"first_blocks": list(self.first_blocks)}

    def finetuning(self, first_block: int, from_states: bool) -> FinetuneConfig:
        """A segmentation stage without an end."""
        settings = {"epochs": 10**6, "checkpoint_steps": 10**9, "batch_size": self.batch_size}
        stage = make_config(self.recipe, {**settings, "prompts_per_image": _PROMPTS_PER_IMAGE})
        return FinetuneConfig(segmentation=stage, first_block=first_block, from_states=from_states)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return measure_and_tell(
        lambda: tyro.cli(FinetuneBenchmarkConfig, prog="python -m benchmarks.finetune", args=argv), run
    )


def run(config: FinetuneBenchmarkConfig) -> Report:
    """Make scenes, a cache and states, measure, and remove all of it.

    Raises:
        RuntimeError: the two ways do not have the same losses.
    """
    with tempfile.TemporaryDirectory(prefix="headstart-benchmark-", dir=config.dir) as temporary:
        bench = _Bench(config, Path(temporary))
        for block in config.first_blocks:
            bench.measure(block)
    return bench.report


class _Way:
    """Live encoders and a head, and the batches they learn from."""

    def __init__(self, config: FinetuneConfig, encoders: LiveEncoders, run_dir: Path, accelerator: Accelerator) -> None:
        (stage,) = config.stages.values()
        cache = encoders.cache
        spec = HeadSpec(stage.head, stage.arguments, feature_shapes(cache))
        self._encoders = encoders
        self._trainee = Trainee(stage, spec, run_dir, accelerator, {}, encoders=encoders)
        self._split = CachedSplit(cache, "train", stage.target_size, [], device=accelerator.device)

    def learn(self, draws: Sequence[Draw]) -> list[float]:
        """Learn from batches as `heads.train` does; returns the loss of each."""
        losses = []
        for draw in draws:
            before = self._trainee.progress.loss_sum
            self._trainee.step(self._encoders.fill(self._split.load(draw)), 0.0, 10**9)
            losses.append(self._trainee.progress.loss_sum - before)
        return losses


class _Bench:
    def __init__(self, config: FinetuneBenchmarkConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._accelerator = Accelerator()
        self.report = Report("finetune", describe_machine(folder, LIBRARIES), config.settings)
        self._spec = ImageEncoderSpec(str(ImageModel.parse(config.model).save(folder)))
        self._cache = self._make_cache(save_clip_text(folder, tiny=config.tiny_text))

    def measure(self, first_block: int) -> None:
        """Images a second with adapters from a block on, from the pixels and from what goes into that block."""
        to_stderr(f"making what goes into block {first_block}")
        states = self._extract((f"{first_block}{TOKENS}",), "float32")
        ways = {
            PIXELS: self._way(first_block, None),
            STATES: self._way(first_block, ImageFeatures(open_store(states, "image_features"))),
        }
        config = self._config
        split = CachedSplit(self._cache, "train", None, [])
        order = split.epoch(seed=0, epoch=0, batch_size=config.batch_size, prompts_per_image=_PROMPTS_PER_IMAGE)
        full = [draw for draw in order if len(draw.samples) == config.batch_size] or order
        draws = [full[place % len(full)] for place in range(config.num_batches)]
        worst = self._compare_losses(ways, draws)
        num_images = sum(len(draw.samples) for draw in draws) / _PROMPTS_PER_IMAGE
        turns = {name: partial(_rate, way, draws, num_images) for name, way in ways.items()}
        rates = take_turns(turns, config.rounds, lambda line: to_stderr(f"block {first_block}, {line}"))
        note = f"losses of {len(draws)} steps differ by at most {worst:.1e} of theirs"
        for name, values in rates.items():
            self.report.rows.append(Row.of(f"block {first_block}: {name}", values, "images/s", note))
        self.report.compare(rates, STATES, PIXELS, f"block {first_block}: {STATES} / {PIXELS}")

    def _compare_losses(self, ways: dict[str, _Way], draws: Sequence[Draw]) -> float:
        expected, found = (ways[name].learn(draws) for name in (PIXELS, STATES))
        worst = max(abs(ours - theirs) / abs(theirs) for ours, theirs in zip(found, expected, strict=True))
        if worst > TOLERANCE:
            raise RuntimeError(f"losses from cached states are {found}, from the pixels {expected}")
        return worst

    def _way(self, first_block: int, states: ImageFeatures | None) -> _Way:
        config = self._config.finetuning(first_block, states is not None)
        encoders = HubEncoders(self._cache, config, states).adapted(None, learn=True)
        name = f"{first_block}-{'pixels' if states is None else 'states'}"
        return _Way(config, encoders, self._folder / "runs" / name, self._accelerator)

    def _extract(self, layers: tuple[str, ...], dtype: str) -> Any:
        encoder = load_image_encoder(replace(self._spec, layers=layers))
        return extract_images(ImageJobConfig(self._samples, self._folder, dtype=dtype), encoder).path

    def _make_cache(self, text: Path) -> FeatureCache:
        to_stderr("making scenes and their features")
        scenes = make_scenes(
            ScenesConfig(self._folder / "scenes", self._config.num_images, prompts_per_image=_PROMPTS_PER_IMAGE)
        )
        self._samples = prepare(PrepareConfig("scenes", scenes, self._folder)).path
        prompts = extract_prompts(
            PromptJobConfig(self._samples, self._folder), load_text_encoder(TextEncoderSpec(str(text)))
        ).path
        return open_cache(self._samples, self._extract(("last",), "float16"), prompts)


def _rate(way: _Way, draws: Sequence[Draw], num_images: float) -> float:
    started = time.perf_counter()
    way.learn(draws)
    return num_images / (time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())
