"""Training heads from the cache beside the two ends it lies between, and several heads in one pass.

    python -m benchmarks.train --json train.json

For each head the same batches, by the same step: from the cache, as `headstart train` reads it; from tensors that are
in memory already, which is the limit; and with the frozen encoders in the loop, which decode and encode the images and
prompts of every batch anew. Encoders are of real architectures with random weights.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from accelerate import Accelerator

from benchmarks.checkpoints import ImageModel, save_clip_text
from benchmarks.common import Library, Report, Row, describe_machine, measure_and_tell, take_turns, to_stderr
from cache_schema.errors import UsageError, require_at_least
from cache_schema.features import FeatureCache, open_cache
from extract.datasets.scenes import ScenesConfig, make_scenes
from extract.encoders.image import load_image_encoder
from extract.encoders.protocols import ImageEncoder, TextEncoder
from extract.encoders.specs import ImageEncoderSpec, TextEncoderSpec
from extract.encoders.text import load_text_encoder
from extract.image_job import ImageJobConfig, extract_images
from extract.images import decode_image
from extract.job import pick_device
from extract.prepare import PrepareConfig, prepare
from extract.prompt_job import PromptJobConfig, extract_prompts
from heads.checkpoint import HeadSpec
from heads.data import Batch, CachedSplit, Draw, feature_shapes, prefetch
from heads.inputs import StoredInputs
from heads.train import TrainRequest, train_together
from heads.train_config import TrainConfig
from heads.trainee import Trainee
from headstart.recipes import RECIPES, make_config

CACHE, MEMORY, LOOP = "from the cache", "in memory", "encoders in the loop"
LIBRARIES = tuple(Library(name, name) for name in ("torch", "transformers", "accelerate", "numpy"))
TARGET_SIZE = (64, 64)
_LOOP_BATCHES = 2
"""With the encoders in the loop a batch takes so long that a few of them tell the rate."""


@dataclass(frozen=True)
class TrainBenchmarkConfig:
    """Measure training: from the cache, from memory, with the encoders in the loop, and several heads in one pass."""

    json: Path | None = None
    """Write what was found to this file."""
    dir: Path | None = None
    """Folder to work in; the system's folder for temporary files by default."""
    model: str = "dinov2-small@224"
    """Architecture of the image encoder with its input size."""
    recipes: tuple[str, ...] = tuple(RECIPES)
    """Whose heads to train."""
    together: tuple[str, ...] = ("linear", "film", "juras", "cross_attention")
    """Heads that are trained in one pass, and one after the other."""
    num_images: int = 240
    """Scenes to make, with four prompts each."""
    batch_size: int = 32
    """Prompts in a batch, for every head."""
    num_batches: int = 12
    """Batches of one measurement; with the encoders in the loop two."""
    rounds: int = 3
    """How often every contender has its turn."""
    tiny_text: Annotated[bool, tyro.conf.Suppress] = False

    def __post_init__(self) -> None:
        require_at_least(self, 1, "num_images", "batch_size", "num_batches", "rounds")
        ImageModel.parse(self.model)
        for recipe in (*self.recipes, *self.together):
            make_config(recipe)

    @property
    def settings(self) -> dict[str, Any]:
        """What the figures depend on."""
        names = ("model", "num_images", "batch_size", "num_batches", "rounds")
        return {name: getattr(self, name) for name in names} | {"target_size": list(TARGET_SIZE)}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return measure_and_tell(
        lambda: tyro.cli(TrainBenchmarkConfig, prog="python -m benchmarks.train", args=argv),
        run,
    )


def run(config: TrainBenchmarkConfig) -> Report:
    """Make scenes and a cache, measure, and remove all of it."""
    with tempfile.TemporaryDirectory(prefix="headstart-benchmark-", dir=config.dir) as temporary:
        bench = _Bench(config, Path(temporary))
        for recipe in config.recipes:
            bench.measure_head(recipe)
        bench.measure_together()
    return bench.report


class _Bench:
    """A cache, the encoders it was made with, and what is found."""

    def __init__(self, config: TrainBenchmarkConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._device = pick_device()
        self._accelerator = Accelerator(cpu=self._device == "cpu")
        machine = describe_machine(folder, LIBRARIES)
        self.report = Report("train", machine, config.settings)
        self._image_encoder, self._text_encoder = self._load_encoders()
        self._cache = self._make_cache()

    def measure_head(self, recipe: str) -> None:
        """Samples a second of one head, by where its batches come from."""
        config = self._head_config(recipe)
        try:
            trainee = self._trainee(recipe, config)
        except UsageError as error:
            self.report.rows.append(Row(recipe, None, "samples/s", f"left out: {error}"))
            return
        head = trainee.head
        split = CachedSplit(
            self._cache, "train", config.target_size, head.layers, "auto", self._device, attention=head.attention
        )
        order = split.epoch(seed=0, epoch=0, batch_size=config.batch_size, prompts_per_image=config.prompts_per_image)
        draws = list(islice(cycle(order), self._config.num_batches))
        kept = [_to_device(split.load(draw), self._device) for draw in draws]
        few = draws[:_LOOP_BATCHES]
        sources: dict[str, Callable[[], Iterable[Batch]]] = {
            CACHE: lambda: prefetch(split.load(draw) for draw in draws),
            MEMORY: lambda: kept,
            LOOP: lambda: (self._encode(split.load(draw), draw) for draw in few),
        }
        _learn(trainee, kept[:2])  # whatever happens only once
        turns = {name: partial(_rate, trainee, source) for name, source in sources.items()}
        rates = take_turns(turns, self._config.rounds, lambda line: to_stderr(f"{recipe}, {line}"))
        num_parameters = sum(parameter.numel() for parameter in head.parameters())
        for name, values in rates.items():
            self.report.rows.append(Row.of(f"{recipe}: {name}", values, "samples/s", f"{num_parameters:,} parameters"))
        self.report.compare(rates, CACHE, MEMORY, f"{recipe}: {CACHE} / {MEMORY}")
        self.report.compare(rates, CACHE, LOOP, f"{recipe}: {CACHE} / {LOOP}")

    def measure_together(self) -> None:
        """Seconds of one epoch of several heads, in one pass and one after the other, targets and all."""
        configs = [replace(self._head_config(name), epochs=1, val_samples=8) for name in self._config.together]
        names = ", ".join(self._config.together)

        def train(groups: Sequence[Sequence[TrainConfig]]) -> float:
            with tempfile.TemporaryDirectory(dir=self._folder) as runs:
                started = time.perf_counter()
                for group in groups:
                    requests = [
                        TrainRequest(config, Path(runs) / f"{config.head}-{configs.index(config)}") for config in group
                    ]
                    train_together(requests, self._cache, residency="disk", trackers=())
                return 1 / (time.perf_counter() - started)

        turns = {
            "one pass": partial(train, [configs]),
            "one after the other": partial(train, [[config] for config in configs]),
        }
        rates = take_turns(turns, self._config.rounds, lambda line: to_stderr(f"together, {line}"))
        for name, values in rates.items():
            seconds = [1 / value for value in values]
            self.report.rows.append(Row.of(f"{len(configs)} heads, {name}", seconds, "s", f"{names}; features on disk"))
        self.report.compare(rates, "one pass", "one after the other", f"{len(configs)} heads: one pass / one by one")

    def _head_config(self, recipe: str) -> TrainConfig:
        settings: dict[str, Any] = {
            "batch_size": self._config.batch_size,
            "prompts_per_image": 4,
            "target_size": list(TARGET_SIZE),
            "mixed_precision": "no",
            "epochs": 10**6,
            "accumulate": 1,
        }
        config = make_config(recipe, settings)
        arguments = {key: value for key, value in config.arguments.items() if key != "initial"}
        return replace(config, arguments=arguments)

    def _trainee(self, recipe: str, config: TrainConfig) -> Trainee:
        spec = HeadSpec(config.head, config.arguments, feature_shapes(self._cache))
        return Trainee(config, spec, self._cache, self._folder / "trainees" / recipe, self._accelerator, {})

    def _load_encoders(self) -> tuple[ImageEncoder, TextEncoder]:
        model = ImageModel.parse(self._config.model)
        checkpoint, text = model.save(self._folder), save_clip_text(self._folder, tiny=self._config.tiny_text)
        layers = ("1", "last") if model.architecture == "dinov2-tiny" else _LAYERS
        spec = ImageEncoderSpec(str(checkpoint), layers=layers, attention=("head_tokens",))
        return (
            load_image_encoder(spec, device=self._device),
            load_text_encoder(TextEncoderSpec(str(text)), device=self._device),
        )

    def _make_cache(self) -> FeatureCache:
        to_stderr("making scenes and their features")
        scenes = make_scenes(ScenesConfig(self._folder / "scenes", self._config.num_images, prompts_per_image=4))
        samples = prepare(PrepareConfig("scenes", scenes, self._folder)).path
        images = extract_images(ImageJobConfig(samples, self._folder), self._image_encoder).path
        prompts = extract_prompts(PromptJobConfig(samples, self._folder), self._text_encoder).path
        return open_cache(samples, images, prompts)

    def _encode(self, batch: Batch, draw: Draw) -> Batch:
        """The batch with inputs that the encoders give now, of the files and texts; targets stay."""
        samples, image_dir = self._cache.samples.samples, self._cache.samples.image_dir
        assert image_dir is not None
        rows = samples.image_rows[draw.samples]
        unique = sorted(set(rows.tolist()), key=lambda row: int(self._cache.image_rows[row]))
        encoder, text_encoder = self._image_encoder, self._text_encoder
        pixels = [
            torch.from_numpy(encoder.preprocess(decode_image((image_dir / samples.images.paths[row]).read_bytes())))
            for row in unique
        ]
        with torch.inference_mode():
            seen = encoder.encode(torch.stack(pixels).to(self._device))
            prompts = [samples.prompts[samples.prompt_rows[row]] for row in draw.samples]
            text = text_encoder.encode(text_encoder.tokenize(prompts))
        head_inputs = batch.inputs
        inputs = StoredInputs(
            features={layer: seen.features[layer].clone() for layer in head_inputs.features},
            scale={},
            cls={layer: seen.cls[layer].clone() for layer in head_inputs.cls},
            prompt_tokens=text.tokens.masked_fill(~text.mask[..., None], 0).clone(),
            prompt_mask=text.mask.clone(),
            pooled=text.pooled.clone(),
            image_index=head_inputs.image_index,
            attention={name: seen.attention[name].clone() for name in head_inputs.attention},
        )
        return replace(batch, inputs=inputs)


_LAYERS = ("3", "4", "6", "7", "9", "10", "11", "last")
"""What the recipes read of a model of twelve blocks."""


def _to_device(batch: Batch, device: str) -> Batch:
    moved = batch.inputs.to(device)
    fields: Mapping[str, Any] = vars(moved)
    targets = {size: kept.to(device) for size, kept in batch.targets_at.items()}
    return replace(
        batch, inputs=StoredInputs(scale={}, **fields), unmasked=batch.unmasked.to(device), targets_at=targets
    )


def _learn(trainee: Trainee, batches: Iterable[Batch]) -> int:
    num_samples = 0
    for batch in batches:
        trainee.step(batch, 0.0, 10**9)
        num_samples += len(batch.samples)
    return num_samples


def _rate(trainee: Trainee, source: Callable[[], Iterable[Batch]]) -> float:
    started = time.perf_counter()
    num_samples = _learn(trainee, source())
    return num_samples / (time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())
