"""The loader under a real training run: how much of a step waits for data, and how much memory the stream takes.

    python -m benchmarks.loader --json loader.json

Makes stores with made-up values, far larger than the memory a run may take, drops them from the page cache where the
machine allows, and trains small heads on them with `heads.train.train`, features on disk and then in RAM.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from benchmarks.common import Library, Report, Row, describe_machine, to_stderr
from cache_schema.features import FeatureCache, open_cache
from cache_schema.layout import ArrayLayout
from cache_schema.masks import encode_mask
from cache_schema.ragged import offsets_of
from cache_schema.samples import ImageTable, Samples, digest_array, string_arrays, write_samples
from cache_schema.store import Commits, StaticArray, StoreHeader, StoreWriter
from heads.train import train
from heads.train_config import TrainConfig

LIBRARIES = (Library("torch", "torch"), Library("numpy", "numpy"), Library("awscrt", "awscrt"))
HEADS = {"linear": "train", "cross_attention": "few"}
"""The split that each head is trained on: the whole cache for the lightest, a part of it for one that computes long."""
IMAGE_SIZE = (96, 96)
SHARD_ROWS = 64
NUM_PROMPTS = 256
TOKENS_PER_PROMPT = 8
TEXT_WIDTH = 64


@dataclass(frozen=True)
class Settings:
    """How large the cache is, and how it is trained on.

    Args:
        grid: (gh, gw, d) of one image's token grid; (32, 32, 200) in float16 are 400 KB.
        prompts_per_image: samples that share one read.
    """

    num_images: int = 12_000
    grid: tuple[int, int, int] = (32, 32, 200)
    prompts_per_image: int = 2
    batch_size: int = 64
    seed: int = 0


def main() -> None:
    """Parse the command line, run, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--dir", type=Path, help="folder for the stores and runs, removed in the end")
    parser.add_argument("--num-images", type=int, default=Settings.num_images)
    parser.add_argument("--grid", type=int, nargs=3, default=Settings.grid, metavar=("GH", "GW", "D"))
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=list(HEADS))
    arguments = parser.parse_args()
    settings = Settings(num_images=arguments.num_images, grid=tuple(arguments.grid))
    with tempfile.TemporaryDirectory(dir=arguments.dir, prefix="headstart-bench-") as folder:
        report = run(settings, Path(folder), arguments.heads)
    print(report.to_text())
    if arguments.json:
        report.write_json(arguments.json)


def run(settings: Settings, folder: Path, heads: Sequence[str] = tuple(HEADS)) -> Report:
    """Train every head from disk, cold, and then from RAM; report waits, rates and memory."""
    to_stderr(f"writing {settings.num_images} images of {np.prod(settings.grid) * 2 / 1e3:.0f} KB")
    cache = make_cache(settings, folder)
    layout = cache.images.features("last").layout
    feature_bytes = layout.num_rows * layout.row_bytes
    report = Report(
        "loader",
        describe_machine(folder, LIBRARIES),
        {
            "images": settings.num_images,
            "row_bytes": layout.row_bytes,
            "batch_size": settings.batch_size,
            "prompts_per_image": settings.prompts_per_image,
        },
    )
    report.rows.append(Row("features on disk", feature_bytes / 2**30, "GiB"))
    rates = {}
    places: tuple[Literal["disk", "ram"], ...] = ("disk", "ram")
    for head in heads:
        for residency in places:
            if residency == "disk":
                drop_from_page_cache(cache)
            name = f"{head} from {residency}"
            to_stderr(f"training {name}")
            config = TrainConfig(
                head,
                train_split=HEADS[head],
                epochs=1,
                batch_size=settings.batch_size,
                prompts_per_image=settings.prompts_per_image,
                target_size=(32, 32),
                patience=None,
                checkpoint_steps=10**6,
            )
            run_dir = folder / "runs" / name.replace(" ", "-")
            with anonymous_memory() as memory:
                train(config, cache, run_dir, residency=residency)
            line = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
            step_ms = line["train_s"] / line["step"] * 1e3
            rates[name] = [line["step"] * settings.batch_size / line["train_s"]]
            report.rows += [
                Row(f"{name}: step", step_ms, "ms"),
                Row(f"{name}: waiting for data", 100 * line["data_wait_s"] / line["train_s"], "% of step time"),
                Row(f"{name}: samples", rates[name][0], "1/s"),
            ]
            if residency == "disk":
                warm = memory[len(memory) // 10 :]
                note = (
                    f"its most less its least once a tenth of the time has passed; {max(warm) / 2**20:.0f} MiB in all"
                )
                report.rows.append(Row(f"{name}: anonymous memory", (max(warm) - min(warm)) / 2**20, "MiB", note))
        report.compare(rates, f"{head} from disk", f"{head} from ram", f"{head}: samples/s, disk / ram")
    return report


def make_cache(settings: Settings, folder: Path) -> FeatureCache:
    """Stores of made-up images, prompts and samples, with every fiftieth image in the validation split."""
    rng = np.random.default_rng(settings.seed)
    num, each = settings.num_images, settings.prompts_per_image
    ids = [f"image-{row}" for row in range(num)]
    digests = [hashlib.sha256(image_id.encode()).hexdigest() for image_id in ids]
    sizes = np.tile(np.array(IMAGE_SIZE, np.int32), (num, 1))
    prompts = [f"prompt number {row}" for row in range(NUM_PROMPTS)]
    mask = np.zeros(IMAGE_SIZE, np.bool_)
    mask[20:70, 30:60] = True
    samples = Samples(
        images=ImageTable(ids, [f"{image_id}.jpg" for image_id in ids], sizes, digests),
        prompts=prompts,
        ids=[f"sample-{row}" for row in range(num * each)],
        image_rows=np.arange(num, dtype=np.int32).repeat(each),
        prompt_rows=rng.integers(NUM_PROMPTS, size=num * each).astype(np.int32),
        targets=[encode_mask(mask)] * (num * each),
        no_target=np.zeros(num * each, np.bool_),
        splits=[_split_of(row, num) for row in range(num) for _ in range(each)],
        tags={},
    )
    written, _ = write_samples(folder, samples, dataset="made-up", sources={}, image_dir=folder, libraries={})
    return open_cache(written, _write_images(settings, folder, ids, digests, sizes), _write_prompts(folder, prompts))


def _split_of(image: int, num_images: int) -> str:
    if image % 50 == 0:
        return "val"
    return "few" if image < num_images // 10 else "train"


def _write_images(
    settings: Settings,
    folder: Path,
    ids: list[str],
    digests: list[str],
    sizes: np.ndarray[tuple[int, int], np.dtype[np.int32]],
) -> Path:
    num, width = settings.num_images, settings.grid[2]
    float16 = np.dtype(np.float16)
    layouts = [
        ArrayLayout("valid", (num,), np.dtype(np.bool_), SHARD_ROWS, SHARD_ROWS, ("view",)),
        ArrayLayout(
            "features/last", (num, *settings.grid), float16, 1, SHARD_ROWS, ("view", "grid_h", "grid_w", "channel")
        ),
        ArrayLayout("cls/last", (num, width), float16, SHARD_ROWS, SHARD_ROWS, ("view", "channel")),
    ]
    view = np.tile(np.array([0, 0, *IMAGE_SIZE[::-1], 0], np.int32), (num, 1))
    static = [
        *string_arrays("image/id", ids, "view"),
        StaticArray("image/sha256", digest_array(digests), ("view", "byte")),
        StaticArray("original_size", sizes, ("view", "hw")),
        StaticArray("view", view, ("view", "box_and_flip")),
    ]
    identity = {
        "encoder": {"made-up": "image"},
        "outputs": {"layers": ["last"], "cls": ["last"], "attention": []},
        "dtype": "float16",
        "views": ["whole"],
    }
    writer = StoreWriter(folder, StoreHeader("image_features", identity, {}), layouts, static)
    writer.begin()
    values = np.random.default_rng(settings.seed).standard_normal((SHARD_ROWS, *settings.grid), np.float32)
    block = values.astype(np.float16)
    units = []
    with Commits(writer.commit) as commits:
        for shard in tqdm(range(-(-num // SHARD_ROWS)), desc="writing features", unit="shard"):
            rows = layouts[0].rows_of_shard(shard)
            shards = {
                ("valid", shard): np.ones(len(rows), np.bool_),
                ("features/last", shard): np.roll(block, shard, axis=0)[: len(rows)],
                ("cls/last", shard): block[: len(rows), 0, 0],
            }
            units.append(f"{shard:06d}")
            commits.commit(units[-1], (rows.start, rows.stop), shards)
    writer.finish(units)
    assert isinstance(writer.path, Path)
    return writer.path


def _write_prompts(folder: Path, prompts: list[str]) -> Path:
    rng = np.random.default_rng(1)
    lengths = [TOKENS_PER_PROMPT] * len(prompts)
    values = rng.standard_normal((sum(lengths), TEXT_WIDTH)).astype(np.float16)
    static = [
        *string_arrays("prompt/text", prompts, "prompt"),
        StaticArray("offsets", offsets_of(lengths), ("prompt_start",)),
        StaticArray("token_ids", np.zeros(sum(lengths), np.int32), ("token",)),
        StaticArray("tokens", values, ("token", "channel")),
        StaticArray("pooled", values[: len(prompts)], ("prompt", "pooled_channel")),
    ]
    writer = StoreWriter(folder, StoreHeader("prompt_features", {"encoder": {"made-up": "text"}}, {}), [], static)
    writer.begin()
    writer.finish(())
    assert isinstance(writer.path, Path)
    return writer.path


def drop_from_page_cache(cache: FeatureCache) -> None:
    """Ask the kernel to forget the features, so that they come from the disk."""
    path = cache.images.store.path
    assert isinstance(path, Path)
    for shard in (path / "features" / "last").glob("c.*"):
        descriptor = os.open(shard, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@contextmanager
def anonymous_memory(period_s: float = 0.05) -> Iterator[list[int]]:
    """Collect this process's anonymous memory in bytes, from the start of the block to its end."""
    values, stop = [_anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not stop.wait(period_s):
            values.append(_anonymous_bytes())

    thread = threading.Thread(target=watch, name="memory", daemon=True)
    thread.start()
    try:
        yield values
    finally:
        stop.set()
        thread.join()


def _anonymous_bytes() -> int:
    """RssAnon of this process: what it allocated itself, without files that are mapped or cached."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("this kernel does not tell anonymous memory")


if __name__ == "__main__":
    main()
