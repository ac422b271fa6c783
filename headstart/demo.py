"""The whole road on the embedded dataset, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cache_schema.atomic import StorePath
from cache_schema.features import FeatureCache
from extract.datasets.scenes import ScenesConfig, make_scenes
from extract.encoders import TINY
from extract.image_job import ImageJobConfig
from extract.job import run_job
from extract.prepare import PrepareConfig, prepare
from extract.prompt_job import PromptJobConfig
from extract.tasks import ImageTask, TextTask
from heads.live import ADAPTERS
from headstart import api
from headstart.encoders import UNTRAINED_NOTE, image_spec, text_spec
from headstart.tables import results_table

HEADS = ("cross_attention", "linear")
T = TypeVar("T")


class Stopwatch:
    """Seconds of each stage, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, stage: str, work: Callable[[], T]) -> T:
        """Do it, and note how long it took."""
        started = time.perf_counter()
        result = work()
        self.seconds[stage] = round(time.perf_counter() - started, 3)
        return result


def run_demo(out: Path, num_images: int) -> dict[str, Any]:
    """Make scenes, cache features, train `HEADS`, evaluate on val; leave results.json and report.html under `out`.

    Every stage leaves alone what it finds done, so a second call extracts and trains nothing, and a killed one goes on.
    """
    watch = Stopwatch()
    samples = make_samples(out, num_images, watch)
    cache = extract_tiny(out, samples, watch)
    runs = []
    for head in HEADS:
        run = watch.time(f"train {head}", lambda head=head: api.train(head, cache, out / "runs"))  # type: ignore[misc]
        print(run.summary())
        runs.append(run)
    results = api.evaluate(runs, cache, out=out, seconds=watch.seconds)
    print()
    print(results_table(results))
    print(f"\nreport: {out / 'report.html'}")
    return results


def make_samples(out: Path, num_images: int, watch: Stopwatch) -> StorePath:
    """Scenes and their samples store."""
    scenes = watch.time("make scenes", lambda: make_scenes(ScenesConfig(out / "scenes", num_images=num_images)))
    prepared = watch.time("prepare", lambda: prepare(PrepareConfig("scenes", scenes, out / "stores")))
    print(prepared.summary())
    print(f"note: {UNTRAINED_NOTE}")
    return prepared.path


def extract_tiny(out: Path, samples: StorePath, watch: Stopwatch, adapters: Path | None = None) -> FeatureCache:
    """Features by the tiny encoders, with the adapters of a finetuned run's folder if one is named."""
    image, text = (None if adapters is None else adapters / ADAPTERS[side] for side in ("image", "text"))
    stores, encoders = out / "stores", out / "encoders"
    what = "" if adapters is None else f" with the adapters of {adapters.name}"
    images = watch.time(
        f"extract images{what}",
        lambda: run_job(
            ImageTask(ImageJobConfig(samples, stores), image_spec(TINY, encoders, adapter=image)).open("cpu")
        ),
    )
    print(images.summary("images"))
    prompts = watch.time(
        f"extract prompts{what}",
        lambda: run_job(
            TextTask(PromptJobConfig(samples, stores), text_spec(TINY, encoders, adapter=text)).open("cpu")
        ),
    )
    print(prompts.summary("prompts"))
    return api.open_cache(stores, samples=samples, images=images.path, prompts=prompts.path)
