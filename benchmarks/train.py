"""Training heads from the cache beside the two ends it lies between, and several heads in one pass.

    python -m benchmarks.train --json train.json

For each head the same batches, by the same step: from the cache, as `headstart train` reads it; from tensors that are
on the device already, in float32, which is the limit; and with the frozen encoders in the loop, which decode and encode
the images and prompts of every batch anew. Each head has the batch size of its recipe. Encoders are of real
architectures with random weights, and all heads compute in float32 and take their loss at one size.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

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
from heads.data import Batch, CachedSplit, Draw, feature_shapes
from heads.inputs import StoredInputs
from heads.train import TrainRequest, train_together
from heads.train_config import TrainConfig
from heads.trainee import Trainee
from headstart.recipes import RECIPES, make_config

CACHE, MEMORY, LOOP = "from the cache", "in memory", "encoders in the loop"
LIBRARIES = tuple(Library(name, name) for name in ("torch", "transformers", "accelerate", "numpy"))
TARGET_SIZE = (64, 64)
MOST_BATCHES = 1000
"""A turn has no more than these, however little a batch takes, unless more are asked for."""

_DISTINCT_BATCHES = 12
"""A turn goes round at most so many batches: as tensors of float32 they have to fit into memory."""

_LOOP_BATCHES = 2
"""With the encoders in the loop a batch takes so long that a few of them tell the rate."""

_PROMPTS_PER_IMAGE = 4
"""As many as a scene has."""

_SHARED_BATCH = 32
"""Heads that are trained in one pass have one batch size, whatever their recipes say."""

_LAYERS = ("3", "4", "6", "7", "9", "10", "11", "last")
"""What the recipes read of a model of twelve blocks."""

_PUBLISHED_LAYERS = {"two_way": ["3", "6", "9", "11"]}
"""Of heads that read all that was cached unless they are told what they were published with."""


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
    together: tuple[str, ...] = ("linear", "talk2dino", "film", "cross_attention")
    """Heads that are trained in one pass, and one after the other."""
    num_images: int = 240
    """Scenes to make, with four prompts each."""
    batch_size: int | None = None
    """Prompts in a batch, for every head; by default what each recipe says, and 32 for heads in one pass."""
    prompts_per_image: int | None = None
    """Prompts of one image that share its features; by default 4, but 1 where a recipe says so."""
    num_batches: int = 12
    """Batches of one turn at least; with the encoders in the loop two."""
    turn_s: float = 2.0
    """Seconds that a turn should last, which takes more batches of light heads."""
    rounds: int = 3
    """How often every contender has its turn."""
    tiny_text: bool = False
    """A tiny text encoder in the place of CLIP's, to try the benchmark out."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "num_images", "num_batches", "rounds")
        for name in ("batch_size", "prompts_per_image"):
            if getattr(self, name) is not None:
                require_at_least(self, 1, name)
        if not 0 <= self.turn_s < math.inf:
            raise UsageError(f"turn_s is {self.turn_s}: give seconds, such as 2.")
        ImageModel.parse(self.model)
        for recipe in (*self.recipes, *self.together):
            make_config(recipe)

    @property
    def layers(self) -> tuple[str, ...]:
        """What is cached of the image encoder."""
        return ("1", "last") if ImageModel.parse(self.model).architecture == "dinov2-tiny" else _LAYERS

    @property
    def settings(self) -> dict[str, Any]:
        """What the figures depend on."""
        names = ("model", "num_images", "batch_size", "prompts_per_image", "num_batches", "turn_s", "rounds")
        return {name: getattr(self, name) for name in names} | {
            "target_size": list(TARGET_SIZE),
            "mixed_precision": "no",
        }

    def head_config(self, recipe: str) -> TrainConfig:
        """A recipe as it is measured alone: without an end and without a checkpoint on the way."""
        published = RECIPES[recipe].prompts_per_image
        settings: dict[str, Any] = {
            "target_size": list(TARGET_SIZE),
            "mixed_precision": "no",
            "accumulate": 1,
            "epochs": 10**6,
            "checkpoint_steps": 10**9,
            "prompts_per_image": self.prompts_per_image or (1 if published == 1 else _PROMPTS_PER_IMAGE),
        }
        layers = _PUBLISHED_LAYERS.get(RECIPES[recipe].head, [])
        if layers and set(layers) <= set(self.layers):
            settings["layers"] = layers
        if self.batch_size:
            settings["batch_size"] = self.batch_size
        config = make_config(recipe, settings)
        return replace(config, arguments={key: value for key, value in config.arguments.items() if key != "initial"})

    def shared_config(self, recipe: str) -> TrainConfig:
        """A recipe as it is measured beside others: one epoch, the same batches for all."""
        return replace(
            self.head_config(recipe),
            epochs=1,
            val_samples=8,
            batch_size=self.batch_size or _SHARED_BATCH,
            prompts_per_image=self.prompts_per_image or _PROMPTS_PER_IMAGE,
        )

    def batches_of_turn(self, batch_s: float) -> int:
        """How many batches of `batch_s` seconds make a turn."""
        return max(self.num_batches, min(MOST_BATCHES, math.ceil(self.turn_s / batch_s)))


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


@dataclass(frozen=True)
class Encoders:
    """Frozen encoders in the training loop, as a script without a cache has them.

    Args:
        image: gives what the head reads and no more; a transformer ends behind the deepest block that is read.
        cache: one that these encoders made, whose images and prompts they encode.
    """

    image: ImageEncoder
    text: TextEncoder
    cache: FeatureCache

    def encode(self, batch: Batch) -> Batch:
        """The batch with inputs that are computed now, from the files and texts of its samples; targets stay."""
        samples, image_dir = self.cache.samples.samples, self.cache.samples.image_dir
        assert image_dir is not None
        unique = {int(self.cache.image_rows[row]): row for row in samples.image_rows[batch.samples].tolist()}
        paths = [image_dir / samples.images.paths[unique[row]] for row in sorted(unique)]
        pixels = [torch.from_numpy(self.image.preprocess(decode_image(path.read_bytes()))) for path in paths]
        seen = self.image.encode(torch.stack(pixels))
        prompts = [samples.prompts[row] for row in samples.prompt_rows[batch.samples].tolist()]
        text = self.text.encode(self.text.tokenize(prompts))
        asked = batch.inputs
        reads_tokens = asked.prompt_mask.shape[1] > 0
        inputs = StoredInputs(  # clones, since no gradient may come to what inference mode made
            features={layer: seen.features[layer].clone() for layer in asked.features},
            scale={},
            cls={layer: seen.cls[layer].clone() for layer in asked.cls},
            prompt_tokens=text.tokens.masked_fill(~text.mask[..., None], 0) if reads_tokens else asked.prompt_tokens,
            prompt_mask=text.mask.clone() if reads_tokens else asked.prompt_mask,
            pooled=text.pooled.clone(),
            image_index=asked.image_index,
            attention={name: seen.attention[name].clone() for name in asked.attention},
        )
        return replace(batch, inputs=inputs)


def lay_on_device(batch: Batch, device: str) -> Batch:
    """A batch that a step takes as it is.

    Its inputs are in float32 on the device, where `StoredInputs.to` gives back the tensors it was given; so does
    `Targets.to`.
    """
    fields: Mapping[str, Any] = vars(batch.inputs.to(device))
    return replace(
        batch,
        inputs=StoredInputs(scale={}, **fields),
        unmasked=batch.unmasked.to(device),
        targets_at={size: targets.to(device) for size, targets in batch.targets_at.items()},
    )


class _Bench:
    """A cache, the encoders it was made with, and what is found."""

    def __init__(self, config: TrainBenchmarkConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._device = pick_device()
        self._accelerator = Accelerator(cpu=self._device == "cpu")
        self.report = Report("train", describe_machine(folder, LIBRARIES), config.settings)
        self._checkpoint = ImageModel.parse(config.model).save(folder)
        text = save_clip_text(folder, tiny=config.tiny_text)
        self._text_encoder = load_text_encoder(TextEncoderSpec(str(text)), device=self._device)
        self._cache = self._make_cache()

    def measure_head(self, recipe: str) -> None:
        """Samples a second of one head, by where its batches come from; or why it cannot be trained here."""
        try:
            self._compare_sources(recipe)
        except UsageError as error:
            self.report.rows.append(Row(recipe, None, "samples/s", f"left out: {error}"))

    def measure_together(self) -> None:
        """Seconds of one epoch of several heads, in one pass and one after the other; targets, checkpoints and all."""
        name = f"{len(self._config.together)} heads"
        try:
            self._compare_passes(name)
        except UsageError as error:
            self.report.rows.append(Row(name, None, "s", f"left out: {error}"))

    def _compare_sources(self, recipe: str) -> None:
        config = self._config.head_config(recipe)
        trainee = self._trainee(recipe, config)
        head = trainee.head
        split = CachedSplit(
            self._cache,
            "train",
            config.target_size if config.needs_masks else None,
            head.layers,
            "auto",
            self._device,
            attention=head.attention,
            grids=trainee.learnt_grids,
            tokens=head.reads_tokens,
        )
        draws = self._draws(split, config)
        kept = [lay_on_device(split.load(draw), self._device) for draw in draws]
        encoders = Encoders(self._load_image_encoder(head.layers, head.attention), self._text_encoder, self._cache)
        _learn(trainee, kept[:2])  # whatever happens only once
        num = self._config.batches_of_turn(min(_seconds(partial(_learn, trainee, [batch])) for batch in kept))
        sources: dict[str, Callable[[], Iterable[Batch]]] = {
            CACHE: lambda: split.batches(islice(cycle(draws), num)),
            MEMORY: lambda: islice(cycle(kept), num),
            LOOP: lambda: map(encoders.encode, islice(cycle(kept), _LOOP_BATCHES)),
        }
        notes = {
            CACHE: f"{num} batches a turn, features in {split.residency}",
            MEMORY: f"{num} batches a turn",
            LOOP: f"{_LOOP_BATCHES} batches a turn",
        }
        turns = {name: partial(_rate, trainee, source) for name, source in sources.items()}
        rates = take_turns(turns, self._config.rounds, lambda line: to_stderr(f"{recipe}, {line}"))
        about = (
            f"{sum(parameter.numel() for parameter in head.parameters()):,} parameters, "
            f"batch_size {len(draws[0].samples)}, prompts_per_image {config.prompts_per_image}"
        )
        for name, values in rates.items():
            self.report.rows.append(Row.of(f"{recipe}: {name}", values, "samples/s", f"{about}, {notes[name]}"))
        self.report.compare(rates, CACHE, MEMORY, f"{recipe}: {CACHE} / {MEMORY}")
        self.report.compare(rates, CACHE, LOOP, f"{recipe}: {CACHE} / {LOOP}")

    def _compare_passes(self, name: str) -> None:
        configs = [self._config.shared_config(recipe) for recipe in self._config.together]

        def epochs_a_second(groups: Sequence[Sequence[TrainConfig]], residency: Literal["disk", "ram"]) -> float:
            with tempfile.TemporaryDirectory(dir=self._folder) as runs:
                return 1 / _seconds(lambda: _train(groups, self._cache, residency, Path(runs)))

        ways = {"one pass": [configs], "one after the other": [[config] for config in configs]}
        turns = {
            f"{way}, features {place}": partial(epochs_a_second, groups, residency)
            for place, residency in _PLACES.items()
            for way, groups in ways.items()
        }
        rates = take_turns(turns, self._config.rounds, lambda line: to_stderr(f"together, {line}"))
        about = f"one epoch of {', '.join(self._config.together)}, batch_size {configs[0].batch_size}"
        for turn, values in rates.items():
            self.report.rows.append(Row.of(f"{name}, {turn}", [1 / value for value in values], "s", about))
        for place in _PLACES:
            ours, other = (f"{way}, features {place}" for way in ways)
            self.report.compare(rates, ours, other, f"{name}, features {place}: {' / '.join(ways)}")

    def _draws(self, split: CachedSplit, config: TrainConfig) -> list[Draw]:
        """The first batches of an epoch, those alone that are full if any is."""
        order = split.epoch(seed=0, epoch=0, batch_size=config.batch_size, prompts_per_image=config.prompts_per_image)
        full = [draw for draw in order if len(draw.samples) == config.batch_size]
        return (full or order)[: min(self._config.num_batches, _DISTINCT_BATCHES)]

    def _trainee(self, recipe: str, config: TrainConfig) -> Trainee:
        spec = HeadSpec(config.head, config.arguments, feature_shapes(self._cache))
        return Trainee(config, spec, self._folder / "trainees" / recipe, self._accelerator, {})

    def _load_image_encoder(self, layers: Sequence[str], attention: Sequence[Any]) -> ImageEncoder:
        spec = ImageEncoderSpec(str(self._checkpoint), layers=tuple(layers), attention=tuple(attention))
        return load_image_encoder(spec, device=self._device)

    def _make_cache(self) -> FeatureCache:
        to_stderr("making scenes and their features")
        scenes = make_scenes(
            ScenesConfig(self._folder / "scenes", self._config.num_images, prompts_per_image=_PROMPTS_PER_IMAGE)
        )
        samples = prepare(PrepareConfig("scenes", scenes, self._folder)).path
        encoder = self._load_image_encoder(self._config.layers, ["head_tokens"])
        images = extract_images(ImageJobConfig(samples, self._folder), encoder).path
        prompts = extract_prompts(PromptJobConfig(samples, self._folder), self._text_encoder).path
        return open_cache(samples, images, prompts)


_PLACES: dict[str, Literal["disk", "ram"]] = {"on disk": "disk", "in memory": "ram"}


def _train(
    groups: Sequence[Sequence[TrainConfig]], cache: FeatureCache, residency: Literal["disk", "ram"], runs: Path
) -> None:
    """Train the heads of each group in one pass, group after group."""
    for number, group in enumerate(groups):
        requests = [TrainRequest(config, runs / f"{number}-{place}") for place, config in enumerate(group)]
        train_together(requests, cache, residency=residency, trackers=())


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


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
