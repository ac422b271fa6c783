"""One benchmark: label maps of its images against the truth, to numbers for all classes together and for each."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cache_schema import atomic
from cache_schema.errors import UsageError
from cache_schema.samples import SamplesStore
from evaluate.open_vocabulary.benchmarks import IGNORED, Benchmark, LabelledImage, read_truth
from evaluate.open_vocabulary.confusion import ConfusionMatrix
from evaluate.open_vocabulary.live_windows import SeenImage
from evaluate.open_vocabulary.segmenter import Segmenter

RESULTS, TABLE = "results.json", "classes.csv"
"""What an evaluation leaves in its folder."""

_COLUMNS = ("name", "iou", "accuracy", "truth_px", "predicted_px")


@dataclass(frozen=True)
class BenchmarkRun:
    """A confusion matrix over the images of a split, and what it took."""

    matrix: ConfusionMatrix
    num_images: int
    seconds: float


def run_benchmark(
    segmenter: Segmenter,
    benchmark: Benchmark,
    store: SamplesStore,
    images: Sequence[LabelledImage],
    seen: Iterable[SeenImage],
) -> BenchmarkRun:
    """Compare label maps with the truth, image by image: no more than a few images are in memory.

    Args:
        images: what `list_images` gave.
        seen: what an encoder said of their windows, in the same order.

    Raises:
        UsageError: the benchmark has a background and the segmenter has none, or the other way round; or an image has
            another size than its truth.
    """
    if benchmark.has_background != (segmenter.protocol.background is not None):
        needs = "has a background: name its level" if benchmark.has_background else "has no background: name no level"
        raise UsageError(f"{benchmark.name} {needs}.")
    started = time.perf_counter()
    matrix = ConfusionMatrix(len(benchmark.names), IGNORED)
    shown = tqdm(images, desc=f"segmenting {benchmark.name}", unit="image")
    for image, looked_at in zip(shown, seen, strict=True):
        truth = read_truth(store.samples, image.samples)
        if looked_at.windows.original_size != truth.shape:
            (height, width), (true_height, true_width) = looked_at.windows.original_size, truth.shape
            raise UsageError(
                f"image {store.samples.images.ids[image.row]} has {height} x {width} pixels (height x width), its label"
                f" map {true_height} x {true_width}: the file was changed; prepare the dataset again."
            )
        matrix.update(segmenter.label(looked_at), truth)
    return BenchmarkRun(matrix, len(images), time.perf_counter() - started)


def image_paths(store: SamplesStore, images: Iterable[LabelledImage]) -> list[Path]:
    """The files of images.

    Raises:
        UsageError: the store does not say where its images lie.
    """
    if store.image_dir is None:
        raise UsageError(f"{store.path} does not say where its images lie; name their folder with --image-dir.")
    return [store.image_dir / store.samples.images.paths[image.row] for image in images]


def make_results(
    run: BenchmarkRun, benchmark: Benchmark, split: str, protocol: Mapping[str, Any], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """What is written to results.json: numbers, and beside them all that decides them."""
    return {
        "benchmark": benchmark.name,
        "metrics": {**run.matrix.metrics(), "num_images": run.num_images},
        "classes": run.matrix.per_class_table(list(benchmark.names)),
        "protocol": {**protocol, "dataset": benchmark.name, "split": split, "ignored": "pixels of no class"},
        "provenance": dict(provenance),
        "seconds": {"evaluate": round(run.seconds, 3)},
    }


def write_results(out: Path, results: Mapping[str, Any]) -> None:
    """Leave `results.json`, and its table of classes as `classes.csv`, under `out`."""
    table = io.StringIO()
    writer = csv.DictWriter(table, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(results["classes"])
    out.mkdir(parents=True, exist_ok=True)
    atomic.write_file(out / TABLE, table.getvalue().encode())
    atomic.write_json(out / RESULTS, dict(results))
