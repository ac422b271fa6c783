"""What int8 costs and saves: bytes on disk, the largest error, and the score of trained heads.

    python -m benchmarks.int8 --demo demo --json int8.json

Takes the stores and heads of `headstart demo` (made if they are not there), extracts the same images as int8, scores
each head on both caches, and trains it anew on the int8 one.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import Library, Report, Row, describe_machine, to_stderr
from cache_schema.features import FeatureCache
from cache_schema.layout import ArrayLayout
from cache_schema.quantize import dequantize, quantize
from cache_schema.store import StoreHeader, StoreWriter, open_store
from extract.encoders.image import load_image_encoder
from extract.image_job import ImageJobConfig, extract_images
from headstart import api
from headstart.demo import run_demo
from headstart.encoders import image_spec

LIBRARIES = (Library("torch", "torch"), Library("numpy", "numpy"))
WIDTHS = (96, 384, 768)
"""Channels of a token: those of the embedded encoder, of ViT-S and of ViT-B."""


def main() -> None:
    """Parse the command line, run, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="folder of `headstart demo`")
    parser.add_argument("--heads", nargs="+", default=["linear", "cross_attention"])
    arguments = parser.parse_args()
    report = run(arguments.demo, arguments.heads)
    print(report.to_text())
    if arguments.json:
        report.write_json(arguments.json)


def run(demo: Path, heads: list[str], num_images: int = 2000) -> Report:
    """Measure bytes for tokens of several widths, then error and scores on the demo's scenes."""
    report = Report("int8", describe_machine(demo.parent, LIBRARIES), {"dataset": "scenes", "split": "val"})
    for width in WIDTHS:
        share = bytes_share(width)
        report.rows.append(Row(f"bytes of int8 over float16, {width} channels", share, "", "shard files, with scales"))
    run_demo(demo, num_images)
    stores = demo / "stores"
    samples = next(stores.glob("samples-*.zarr"))
    config = ImageJobConfig(samples, stores / "int8", dtype="int8")
    int8 = extract_images(config, load_image_encoder(image_spec("tiny", demo / "encoders")))
    prompts = next(stores.glob("prompt_features-*.zarr"))
    float16 = next(stores.glob("image_features-*.zarr"))
    caches = {
        "float16": api.open_cache(stores, samples=samples, images=float16, prompts=prompts),
        "int8": api.open_cache(stores, samples=samples, images=int8.path, prompts=prompts),
    }
    report.rows.append(Row("largest error over its bound", error_over_bound(caches), "", "float16 rounding included"))
    for head in heads:
        to_stderr(f"training {head} on the int8 cache")
        trained = {name: api.train(head, cache, demo / "runs") for name, cache in caches.items()}
        scores = {}
        for trained_on, scored_on in (("float16", "float16"), ("float16", "int8"), ("int8", "int8")):
            with tempfile.TemporaryDirectory() as folder:
                results = api.evaluate(trained[trained_on], caches[scored_on], out=folder)
            scores[trained_on, scored_on] = results["runs"][0]["metrics"]["mean_iou"]
            name = f"{head}, trained on {trained_on}, scored on {scored_on}"
            report.rows.append(Row(name, scores[trained_on, scored_on], "mean_iou"))
        for trained_on in ("float16", "int8"):
            change = scores[trained_on, "int8"] - scores["float16", "float16"]
            report.rows.append(Row(f"{head}: change, trained on {trained_on}", change, "mean_iou"))
    return report


def bytes_share(width: int, num_rows: int = 64) -> float:
    """Bytes of a shard of int8 tokens and the shard of their scales, over those of the float16 tokens."""
    tokens = np.random.default_rng(0).standard_normal((num_rows, 16, 16, width), np.float32)
    values, scale = quantize(tokens)
    axes = ("view", "grid_h", "grid_w", "channel")
    arrays: dict[str, list[NDArray[Any]]] = {"int8": [values, scale], "float16": [tokens.astype(np.float16)]}
    num_bytes = {}
    for name, stored in arrays.items():
        layouts = [
            ArrayLayout(f"array-{array.ndim}", array.shape, array.dtype, 1, num_rows, axes[: array.ndim])
            for array in stored
        ]
        with tempfile.TemporaryDirectory() as folder:
            writer = StoreWriter(Path(folder), StoreHeader("image_features", {"name": name}, {}), layouts, ())
            writer.begin()
            shards = {(layout.name, 0): array for layout, array in zip(layouts, stored, strict=True)}
            writer.commit("000000", (0, num_rows), shards)
            writer.finish(["000000"])
            num_bytes[name] = open_store(writer.path).manifest.num_bytes
    return num_bytes["int8"] / num_bytes["float16"]


def error_over_bound(caches: dict[str, FeatureCache]) -> float:
    """The largest difference between the two caches, in units of what quantisation and float16 may differ by."""
    worst = 0.0
    for layer in caches["int8"].images.layers:
        scales = caches["int8"].images.scale(layer)
        assert scales is not None
        for start in range(0, len(scales), 256):
            rows = np.arange(start, min(start + 256, len(scales)))
            exact = caches["float16"].images.features(layer).read(rows).astype(np.float32)
            scale = scales.read(rows)
            stored = dequantize(caches["int8"].images.features(layer).read(rows), scale)
            rounding = np.spacing(np.abs(exact).astype(np.float16)).astype(np.float32)
            bound = scale.astype(np.float32)[..., None] / 2 + rounding
            worst = max(worst, float((np.abs(stored - exact) / bound).max()))
    return worst


if __name__ == "__main__":
    main()
