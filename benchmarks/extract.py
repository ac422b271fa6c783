"""The extraction job beside the bare forward pass that limits it and beside the scripts it replaces, in one run.

    python -m benchmarks.extract --json extract.json

Contenders take turns, round after round, each in a process of its own, and a ratio is the median of the ratios within
each round. Models are of real architectures with random weights. On a CPU, models that compute longer get fewer images.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import tyro

from benchmarks.apart import measure_apart
from benchmarks.checkpoints import ImageModel, save_clip_text
from benchmarks.common import Library, Report, Row, describe_machine, measure_and_tell, to_stderr
from benchmarks.images import write_images, write_task
from benchmarks.measuring import Measure, Request, Rounds, measure_rounds, rate_rows, rates_of, stage_rows
from benchmarks.overlap import CASES, measure_overlap
from benchmarks.prompts import make_prompts
from cache_schema.errors import UsageError, require_at_least
from cache_schema.masks import Size
from extract.encoders.specs import Precision
from extract.job import pick_device
from extract.prompt_job import PromptJobConfig

Part = Literal["architectures", "overlap", "overhead", "scaling", "text"]

BARE, OURS, PIPELINE, SERIAL = "bare forward", "headstart", "transformers pipeline", "serial script"
BARE_THREADS = f"{BARE}, a batch on each core"
HALF: Precision = "bfloat16"
LIBRARIES = tuple(
    Library(*names)
    for names in (
        ("torch", "torch"),
        ("transformers", "transformers"),
        ("pillow", "PIL"),
        ("numpy", "numpy"),
        ("distributed", "distributed"),
    )
)
IMAGE_SIZE: Size = (480, 640)
TINY_SIZE: Size = (32, 32)
TINY_FILES = 16
LATER_ROUNDS = 2
"""Rounds of models after the first, and of prompts: they take long."""


@dataclass(frozen=True)
class Amounts:
    """How much is done by each part but the first."""

    overlap_share: float = 1.0
    overhead_images: int = 512
    memory_images: int = 512
    scaling_images: int = 128
    num_prompts: int = 5000
    padded_prompts: int = 256
    tiny_text: bool = False


QUICK = Amounts(
    overlap_share=0.05,
    overhead_images=64,
    memory_images=64,
    scaling_images=16,
    num_prompts=256,
    padded_prompts=128,
    tiny_text=True,
)


@dataclass(frozen=True)
class ExtractConfig:
    """Measure the extraction job: whole, stage by stage, and beside others. Takes some gigabytes of disk."""

    json: Path | None = None
    """Write what was found to this file."""
    dir: Path | None = None
    """Folder to work in, on the disk to measure; the system's folder for temporary files by default."""
    parts: tuple[Part, ...] = get_args(Part)
    """What to measure."""
    models: tuple[str, ...] = ("dinov2-small@224", "dinov2-base@224", "dinov2-small@448", "dinov2-base@448")
    """Architectures with their input sizes. `scaling` takes the first."""
    num_images: int = 320
    """Images for the first model. On a CPU, models that compute longer get fewer, but a batch at the least."""
    rounds: int = 3
    """Rounds of the first model and of the parts after it; other models and prompts have two at the most."""
    batch_size: int = 32
    """Images in a batch of ours and of the bare forward pass. The serial script has 64, the pipeline 1."""
    shard_rows: int = 64
    """Images in one shard of ours."""
    quick: bool = False
    """Only try everything out: a tiny model, few images, one round. The figures are worth nothing."""
    amounts: Annotated[Amounts, tyro.conf.Suppress] = Amounts()
    image_size: Annotated[Size, tyro.conf.Suppress] = IMAGE_SIZE

    def __post_init__(self) -> None:
        require_at_least(self, 1, "num_images", "rounds", "batch_size", "shard_rows")
        for name in self.models:
            ImageModel.parse(name)
        if not self.models or not self.parts:
            raise UsageError("nothing is left to measure; name a part and a model at least.")

    def shortened(self) -> ExtractConfig:
        """What `quick` asks for."""
        models = ("dinov2-tiny@56",)
        return replace(self, models=models, num_images=64, rounds=1, batch_size=8, shard_rows=16, amounts=QUICK)

    @property
    def settings(self) -> dict[str, Any]:
        """What the figures depend on."""
        return {
            "parts": list(self.parts),
            "num_images": self.num_images,
            "image_size": list(self.image_size),
            "rounds": self.rounds,
            "batch_size": self.batch_size,
            "shard_rows": self.shard_rows,
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return measure_and_tell(
        lambda: tyro.cli(
            ExtractConfig, prog="python -m benchmarks.extract", args=argv, config=(tyro.conf.FlagCreatePairsOff,)
        ),
        lambda config: run(config.shortened() if config.quick else config),
    )


def run(config: ExtractConfig, measure: Measure = measure_apart) -> Report:
    """Make images and models, measure, and remove all of it.

    Args:
        measure: how one contender is measured.
    """
    with tempfile.TemporaryDirectory(prefix="headstart-benchmark-", dir=config.dir) as temporary:
        bench = Bench(config, measure, Path(temporary))
        parts: dict[Part, Callable[[], None]] = {
            "architectures": bench.architectures,
            "overlap": bench.overlap,
            "overhead": bench.overhead,
            "scaling": bench.scaling,
            "text": bench.text,
        }
        for part in config.parts:
            parts[part]()
    return bench.report


class Bench:
    """The parts, which share images and report."""

    def __init__(self, config: ExtractConfig, measure: Measure, folder: Path) -> None:
        self._config = config
        self._measure = measure
        self._folder = folder
        self._device = pick_device()
        machine = describe_machine(folder, LIBRARIES)
        if self._device == "cuda":
            machine["device"] = torch.cuda.get_device_name()
        to_stderr("making the images")
        self._files = write_images(folder, config.num_images, config.image_size)
        kilobytes = sum(file.stat().st_size for file in self._files) / len(self._files) / 1e3
        self.report = Report("extract", machine, {**config.settings, "kilobytes_an_image": round(kilobytes)})

    def architectures(self) -> None:
        """Ours, the bare forward pass, the pipeline and the serial script, for each model."""
        for place, model in enumerate(map(ImageModel.parse, self._config.models)):
            num_rounds = self._config.rounds if place == 0 else min(LATER_ROUNDS, self._config.rounds)
            request = self._request(self._checkpoint(model), self._task(self._num_images(model)))
            requests = {
                OURS: replace(request, contender="ours"),
                BARE: replace(request, contender="bare"),
                SERIAL: replace(request, contender="serial"),
                PIPELINE: replace(request, contender="pipeline"),
            }
            if place == 0 and self._device == "cpu":
                requests[BARE_THREADS] = replace(request, contender="bare, a thread a core")
            if self._device == "cuda":
                halves = {name: replace(requests[name], precision=HALF) for name in (OURS, BARE)}
                requests |= {f"{name}, {HALF}": half for name, half in halves.items()}
            found = measure_rounds(requests, num_rounds, self._measure, self._folder, str(model))
            self._report_model(str(model), found)

    def _report_model(self, model: str, found: Rounds) -> None:
        rates, notes = rates_of(found), {OURS: f"{found[OURS][0].num_items} images, from files to the manifest"}
        self.report.rows += rate_rows(found, model, "images/s", notes)
        for name in found:
            if name.startswith(OURS):
                self.report.rows += stage_rows(found[name], f"{model}: {name}", "images/s")
        for name, measured in found.items():
            mebibytes = [one.memory_bytes / 2**20 for one in measured]
            self.report.rows.append(Row.of(f"{model}: {name}, peak memory", mebibytes, "MiB", "above the loaded model"))
        shares = [mine.memory_bytes / its.memory_bytes for mine, its in zip(found[OURS], found[SERIAL], strict=True)]
        self.report.rows.append(Row.of(f"{model}: memory of {OURS} over that of the {SERIAL}", shares, ""))
        for other in (BARE, BARE_THREADS, SERIAL, PIPELINE):
            self.report.compare(rates, OURS, other, f"{model}: {OURS} / {other}")
        for other in (f"{BARE}, {HALF}", SERIAL, PIPELINE):
            self.report.compare(rates, f"{OURS}, {HALF}", other, f"{model}: {OURS}, {HALF} / {other}")

    def overlap(self) -> None:
        """The whole job and its stages alone, with a stand-in for the encoder."""
        cases = [case.shortened(self._config.amounts.overlap_share) for case in CASES]
        measure_overlap(cases, self._config.rounds, self._folder, self.report)

    def overhead(self) -> None:
        """What a shard costs beside its rows, and the memory of two jobs of which one is four times as long."""
        amounts, rounds = self._config.amounts, self._config.rounds
        tiny = self._folder / "tiny"
        files = write_images(tiny, TINY_FILES, TINY_SIZE)
        request = self._request(self._folder, write_task(files, amounts.overhead_images, TINY_SIZE, tiny))
        request = replace(request, contender="stand-in")
        many, few = "a shard for each image", f"shards of {self._config.shard_rows}"
        requests = {many: replace(request, shard_rows=1), few: request}
        found = measure_rounds(requests, rounds, self._measure, self._folder, "overhead")
        num_more = amounts.overhead_images - -(-amounts.overhead_images // self._config.shard_rows)
        extra_s = [(one.seconds - other.seconds) / num_more for one, other in zip(found[many], found[few], strict=True)]
        note = "encoder: stand-in; images of 32 x 32 pixels; with the call of the encoder, which no batch shares"
        self.report.rows.append(Row.of("overhead of a shard", [1000 * seconds for seconds in extra_s], "ms", note))

        counts = amounts.memory_images, 4 * amounts.memory_images
        requests = {f"{count} images": replace(request, samples=str(self._task(count))) for count in counts}
        found = measure_rounds(requests, rounds, self._measure, self._folder, "memory")
        peaks = {name: [one.memory_bytes / 2**20 for one in measured] for name, measured in found.items()}
        for name, values in peaks.items():
            self.report.rows.append(Row.of(f"peak memory of a job on {name}", values, "MiB", "encoder: stand-in"))
        growth = [more / less for less, more in zip(*peaks.values(), strict=True)]
        self.report.rows.append(Row.of("peak memory of the longer job over the shorter's", growth, ""))

    def scaling(self) -> None:
        """The job as a task of this machine alone, and of one and two workers of a local cluster."""
        model, amounts = ImageModel.parse(self._config.models[0]), self._config.amounts
        request = self._request(self._checkpoint(model), self._task(amounts.scaling_images))
        requests = {"no cluster": 0, "local:1": 1, "local:2": 2}
        found = measure_rounds(
            {name: replace(request, contender="task", workers=workers) for name, workers in requests.items()},
            self._config.rounds,
            self._measure,
            self._folder,
            "scaling",
        )
        rates = {name: [one.num_items / one.facts["job_s"] for one in measured] for name, measured in found.items()}
        for name, values in rates.items():
            note = "workers open the encoder within that time" if requests[name] else ""
            self.report.rows.append(Row.of(f"{model}: {OURS}, {name}", values, "images/s", note))
        for name, measured in found.items():
            if requests[name]:
                values = [one.facts["start_up_s"] for one in measured]
                note = "until each worker has done a first unit"
                self.report.rows.append(Row.of(f"{model}: start-up of {name}", values, "s", note))
        for name, other in (("local:1", "no cluster"), ("local:2", "no cluster"), ("local:2", "local:1")):
            self.report.compare(rates, name, other, f"{model}: {name} / {other}")

    def text(self) -> None:
        """The prompt job beside the bare text tower, with prompts of like lengths together and in their order."""
        amounts = self._config.amounts
        checkpoint = save_clip_text(self._folder, tiny=amounts.tiny_text)
        prompts = make_prompts(amounts.num_prompts)
        samples = write_task(self._files, 1, self._config.image_size, self._folder, prompts)
        request = replace(self._request(checkpoint, samples), batch_size=PromptJobConfig.batch_size)
        sorted_bare, padded = f"{BARE}, sorted by length", f"{BARE}, padded to the limit"
        requests = {
            OURS: replace(request, contender="our prompts"),
            sorted_bare: replace(request, contender="bare prompts"),
            padded: replace(request, contender="padded prompts", limit=amounts.padded_prompts),
        }
        num_rounds = min(LATER_ROUNDS, self._config.rounds)
        found = measure_rounds(requests, num_rounds, self._measure, self._folder, "text")
        notes = {OURS: f"{len(prompts)} prompts, tokenized within that time", padded: "unsorted"}
        what = checkpoint.name
        self.report.rows += rate_rows(found, what, "prompts/s", notes)
        self.report.rows += stage_rows(found[OURS], f"{what}: {OURS}", "prompts/s")
        for other in (sorted_bare, padded):
            self.report.compare(rates_of(found), OURS, other, f"{what}: {OURS} / {other}")

    def _request(self, checkpoint: Path, samples: Path) -> Request:
        config = self._config
        return Request(
            contender="",
            checkpoint=str(checkpoint),
            samples=str(samples),
            batch_size=config.batch_size,
            shard_rows=config.shard_rows,
            device=self._device,
        )

    def _checkpoint(self, model: ImageModel) -> Path:
        path = self._folder / str(model)
        return path if path.exists() else model.save(self._folder)

    def _task(self, num_images: int) -> Path:
        return write_task(self._files, num_images, self._config.image_size, self._folder)

    def _num_images(self, model: ImageModel) -> int:
        if self._device != "cpu":
            return self._config.num_images
        share = ImageModel.parse(self._config.models[0]).cost / model.cost
        return min(self._config.num_images, max(self._config.batch_size, round(share * self._config.num_images)))


if __name__ == "__main__":
    sys.exit(main())
