"""One pass of scoring in a process of its own, so that its memory is its alone, and the samples that are scored.

python -m benchmarks.evaluating '{"contender": "ours", "folder": ..., "num_samples": 2500}'
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from benchmarks.memory import PeakMemory
from benchmarks.new_process import ask_apart
from cache_schema.masks import decode_mask, union_of_segmentations
from cache_schema.samples import ImageTable, Samples, open_samples, write_samples
from evaluate.metrics import Metrics, SampleScores, State, compute, score_mask, update
from evaluate.scoring import ScoringBatch, Truth, resize_nearest, score_batch, scoring_threads

SIZE = 480, 640
"""(H, W) of every image."""

GRID = 64, 64
"""(h, w) of the logits."""

SAMPLES_PER_IMAGE = 3
BATCH_SIZE = 64
LOGITS = "logits.f32"

_POINTS = 20, 60
_LOGIT_BYTES = 4 * math.prod(GRID)


@dataclass(frozen=True)
class Request:
    """Which contender scores the first so many samples of a folder."""

    contender: str
    folder: str
    num_samples: int


@dataclass(frozen=True)
class Scored:
    """What came of it: memory at most above what was in use once the samples store was open."""

    num_samples: int
    seconds: float
    memory_bytes: int
    metrics: Metrics

    @property
    def rate(self) -> float:
        """Samples per second."""
        return self.num_samples / self.seconds


def make_folder(folder: Path, num_samples: int) -> None:
    """A samples store, and the logits of a head that marks about the truth, each in the order of the samples."""
    rng = np.random.default_rng(0)
    num_images = -(-num_samples // SAMPLES_PER_IMAGE)
    targets = [_make_target(rng) for _ in range(num_samples)]
    names = [f"{number:06d}" for number in range(num_images)]
    samples = Samples(
        images=ImageTable(
            names,
            [f"{name}.jpg" for name in names],
            np.tile(np.array(SIZE, np.int32), (num_images, 1)),
            ["0" * 64] * num_images,
        ),
        prompts=["the one"],
        ids=[f"{number}" for number in range(num_samples)],
        image_rows=(np.arange(num_samples) // SAMPLES_PER_IMAGE).astype(np.int32),
        prompt_rows=np.zeros(num_samples, np.int32),
        targets=targets,
        no_target=np.zeros(num_samples, np.bool_),
        splits=["val"] * num_samples,
        tags={},
    )
    write_samples(folder, samples, dataset="made-up", sources={}, image_dir=folder, libraries={})
    with (folder / LOGITS).open("wb") as file:
        for target in targets:
            inside = resize_nearest(decode_mask(target, SIZE), GRID)
            logits = np.where(inside, 2.0, -2.0) + rng.normal(0, 1, GRID)
            file.write(logits.astype("<f4").tobytes())


def score_here(request: Request) -> Scored:
    """Score in this process."""
    folder = Path(request.folder)
    samples = open_samples(next(folder.glob("samples-*"))).samples
    with PeakMemory() as memory:
        started = time.perf_counter()
        metrics = CONTENDERS[request.contender](samples, folder / LOGITS, request.num_samples)
        seconds = time.perf_counter() - started
    return Scored(request.num_samples, seconds, memory.num_bytes, metrics)


def score_apart(request: Request) -> Scored:
    """Score in a new process.

    Raises:
        RuntimeError: it failed; the message ends with what it said.
    """
    return Scored(**ask_apart("benchmarks.evaluating", asdict(request), request.contender))


def _score_ours(num_threads: int | None) -> Callable[[Samples, Path, int], Metrics]:
    def score(samples: Samples, logits: Path, num_samples: int) -> Metrics:
        state: State = ()
        with scoring_threads(num_threads) as pool:
            for start, batch in _batches(logits, num_samples):
                truths = [Truth.of(samples, row) for row in range(start, start + len(batch))]
                views = [truth.whole for truth in truths]
                state = update(state, score_batch(ScoringBatch(torch.from_numpy(batch), views, truths), pool))
        return compute(state)

    return score


def _score_plainly(samples: Samples, logits: Path, num_samples: int) -> Metrics:
    """One after the other, as one writes it down: resize, probability, threshold, decode, count."""
    scores = []
    for start, batch in _batches(logits, num_samples):
        for place, values in enumerate(batch):
            resized = F.interpolate(
                torch.from_numpy(values)[None, None], size=SIZE, mode="bilinear", align_corners=False
            )
            predicted = resized[0, 0].sigmoid().numpy() > 0.5
            scores.append(score_mask(predicted, samples.target(start + place)))
    return compute((SampleScores.concatenate(scores),))


CONTENDERS: dict[str, Callable[[Samples, Path, int], Metrics]] = {
    "ours": _score_ours(None),
    "ours, one thread": _score_ours(1),
    "plain": _score_plainly,
}
"""By the name in a request: each gives the metrics of the first so many samples."""


def _batches(logits: Path, num_samples: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Where each batch begins, and its logits, read when they are wanted."""
    for start in range(0, num_samples, BATCH_SIZE):
        num = min(BATCH_SIZE, num_samples - start)
        values = np.fromfile(logits, "<f4", num * math.prod(GRID), offset=start * _LOGIT_BYTES)
        yield start, values.reshape(num, *GRID)


def _make_target(rng: np.random.Generator) -> bytes:
    """A star with as many points as people's outlines have, somewhere in the image."""
    height, width = SIZE
    num = int(rng.integers(*_POINTS))
    angles = np.sort(rng.uniform(0, 2 * np.pi, num))
    radii = rng.uniform(30, 160) * rng.uniform(0.6, 1, num)
    x = np.clip(rng.uniform(0.2, 0.8) * width + radii * np.cos(angles), 0, width)
    y = np.clip(rng.uniform(0.2, 0.8) * height + radii * np.sin(angles), 0, height)
    return union_of_segmentations([[np.stack([x, y], axis=1).ravel().tolist()]], SIZE)


if __name__ == "__main__":
    print(json.dumps(asdict(score_here(Request(**json.loads(sys.argv[1]))))))
