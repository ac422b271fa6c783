"""The whole road on the embedded dataset, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from extract.datasets.scenes import ScenesConfig, make_scenes
from extract.encoders import TINY
from extract.image_job import ImageJobConfig
from extract.job import run_job
from extract.prepare import PrepareConfig, prepare
from extract.prompt_job import PromptJobConfig
from extract.tasks import ImageTask, TextTask
from headstart import api
from headstart.encoders import UNTRAINED_NOTE, image_spec, text_spec
from headstart.tables import results_table

HEADS = ("cross_attention", "linear")
T = TypeVar("T")


def run_demo(out: Path, num_images: int) -> dict[str, Any]:
    """Make scenes, cache features, train `HEADS`, evaluate on val; leave results.json and report.html under `out`.

    Every stage leaves alone what it finds done, so a second call extracts and trains nothing, and a killed one goes on.
    """
    seconds: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = work()
        seconds[stage] = round(time.perf_counter() - started, 3)
        return result

    stores = out / "stores"
    scenes = timed("make scenes", lambda: make_scenes(ScenesConfig(out / "scenes", num_images=num_images)))
    prepared = timed("prepare", lambda: prepare(PrepareConfig("scenes", scenes, stores)))
    print(prepared.summary())
    print(f"note: {UNTRAINED_NOTE}")
    encoders = out / "encoders"
    images = timed(
        "extract images",
        lambda: run_job(ImageTask(ImageJobConfig(prepared.path, stores), image_spec(TINY, encoders)).open("cpu")),
    )
    print(images.summary("images"))
    prompts = timed(
        "extract prompts",
        lambda: run_job(TextTask(PromptJobConfig(prepared.path, stores), text_spec(TINY, encoders)).open("cpu")),
    )
    print(prompts.summary("prompts"))
    cache = api.open_cache(stores, samples=prepared.path, images=images.path, prompts=prompts.path)
    runs = []
    for head in HEADS:
        run = timed(f"train {head}", lambda head=head: api.train(head, cache, out / "runs"))  # type: ignore[misc]
        print(run.summary())
        runs.append(run)
    results = api.evaluate(runs, cache, out=out, seconds=seconds)
    print()
    print(results_table(results))
    print(f"\nreport: {out / 'report.html'}")
    return results
