"""The image job by its own process, or by the workers of a local cluster."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.images import write_task
from benchmarks.measuring import Ready, Request
from cache_schema.samples import open_samples
from extract.cluster import ClusterSpec, start_cluster
from extract.cluster_job import run_on_cluster
from extract.encoders.specs import ImageEncoderSpec
from extract.image_job import ImageJobConfig
from extract.job import Extraction, run_job
from extract.tasks import ImageTask

_UNITS_TO_START = 4
"""Units of one image that are done for each worker before: all workers are there then, with all they import."""


def make_task(request: Request) -> Ready:
    """The job as `headstart extract` runs it, with or without a cluster. What it took to start is told apart.

    The job's own time, which counts from when this process has opened the encoder, is told too; workers open it once
    more each, within that time.
    """
    store = open_samples(Path(request.samples))
    assert store.image_dir is not None
    images, out = store.samples.images, Path(request.out)
    num_first = _UNITS_TO_START * max(1, request.workers)
    first = write_task([store.image_dir / path for path in images.paths[:num_first]], num_first, images.sizes[0], out)
    config = ImageJobConfig(store.path, out, batch_size=request.batch_size, shard_rows=request.shard_rows)
    task = ImageTask(config, ImageEncoderSpec(request.checkpoint, precision=request.precision))
    trial = replace(task, config=replace(config, samples=first, shard_rows=1))
    stack = ExitStack()
    cluster = stack.enter_context(start_cluster(ClusterSpec(request.workers), device=request.device))

    def extract(some: ImageTask) -> Extraction:
        if request.workers:
            return run_on_cluster([some], cluster)[0]
        return run_job(some.open(request.device))

    started = time.perf_counter()
    extract(trial)
    start_up_s = time.perf_counter() - started

    def run() -> Mapping[str, Any]:
        return {"job_s": extract(task).seconds, "start_up_s": start_up_s}

    return Ready(len(images), lambda: None, run, stack.close)
