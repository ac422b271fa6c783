"""Ways to get the features of a folder of images: ours, the bare forward pass that limits it, and two usual scripts.

All load and warm up first. What comes of the pipeline and of the bare forward pass is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Dinov2Model, pipeline
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from benchmarks.measuring import Ready, Request, finish
from benchmarks.stand_in import StandIn
from cache_schema.samples import open_samples
from extract.encoders.image import load_image_encoder
from extract.encoders.precision import HALVES, halve_weights
from extract.encoders.protocols import ImageEncoder
from extract.encoders.specs import ImageEncoderSpec
from extract.image_job import ImageJobConfig, extract_images

SERIAL_BATCH = 64
_READY_BATCHES = 8
"""So many batches of pixels are made for the bare forward pass, which takes them again and again."""


def make_bare(request: Request) -> Ready:
    """The limit: the model on pixels that are tensors on its device already, with all cores at each batch."""
    num_images, forward = _make_forward(request)

    def run() -> Mapping[str, Any]:
        for start in range(0, num_images, request.batch_size):
            forward(start, min(request.batch_size, num_images - start))
        finish(request.device)
        return {}

    return Ready(num_images, partial(forward, 0, min(request.batch_size, num_images)), run)


def make_bare_threads(request: Request) -> Ready:
    """The same on a CPU with as many batches under way as there are cores, each computed by one thread."""
    num_images, forward = _make_forward(request)
    num_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(num_threads, initializer=use_one_core)

    def run() -> Mapping[str, Any]:
        starts = range(0, num_images, request.batch_size)
        list(pool.map(lambda start: forward(start, min(request.batch_size, num_images - start)), starts))
        return {}

    def warm_up() -> None:
        list(pool.map(lambda start: forward(start, 1), range(num_threads)))

    def close() -> None:
        pool.shutdown()
        torch.set_num_threads(num_threads)  # of threads that are yet to come

    return Ready(num_images, warm_up, run, close)


def use_one_core() -> None:
    """Have this thread compute by itself. Asking first settles how many others it would take, which it does once."""
    torch.get_num_threads()
    torch.set_num_threads(1)


def _make_forward(request: Request) -> tuple[int, Callable[[int, int], None]]:
    """How many images there are, and the forward pass of so many from the one with a number on; drops what it gives."""
    model = _load_model(request)
    halve_weights(model.encoder, request.precision)  # autocast would do so in every pass
    num_images, side = len(_paths(request)), int(model.config.image_size)
    num_ready = min(num_images, _READY_BATCHES * request.batch_size)
    generator = torch.Generator(request.device).manual_seed(0)
    pixels = torch.randn((num_ready, 3, side, side), device=request.device, generator=generator)
    half = HALVES.get(request.precision)

    @torch.inference_mode()
    def forward(start: int, num: int) -> None:
        first = start % num_ready
        with torch.autocast(request.device, dtype=half, enabled=half is not None):
            model(pixel_values=pixels[first : first + num])

    forward(0, 1)
    return num_images, forward


def make_ours(request: Request) -> Ready:
    """The whole job, from opening the samples store to the manifest of the finished feature store."""
    spec = ImageEncoderSpec(request.checkpoint, precision=request.precision)
    return _make_job(request, load_image_encoder(spec, device=request.device))


def make_stand_in(request: Request) -> Ready:
    """The whole job with an encoder that takes no time."""
    return _make_job(request, StandIn())


def make_pipeline(request: Request) -> Ready:
    """What the documentation of transformers shows: a pipeline that is given one file after the other."""
    extract = pipeline(
        "image-feature-extraction",
        model=_load_model(request),
        image_processor=BitImageProcessorPil.from_pretrained(request.checkpoint),
        device=request.device,
    )
    paths = _paths(request)

    def run(num: int) -> Mapping[str, Any]:
        for path in paths[:num]:
            extract(str(path), return_tensors=True)
        finish(request.device)
        return {}

    run(1)
    return Ready(len(paths), partial(run, 1), partial(run, len(paths)))


def make_serial(request: Request) -> Ready:
    """A script in the manner of Talk2DINO's: batches of 64 that the main thread decodes, float32, everything kept in
    memory, and one file written at the end."""
    model, paths = _load_model(request), _paths(request)
    processor = BitImageProcessorPil.from_pretrained(request.checkpoint)

    @torch.inference_mode()
    def encode(batch: list[Path]) -> dict[str, dict[str, torch.Tensor]]:
        images = [Image.open(path).convert("RGB") for path in batch]
        pixels = processor(images=images, return_tensors="pt")["pixel_values"].to(request.device)
        tokens = model(pixel_values=pixels).last_hidden_state.cpu()
        return {path.name: {"cls": row[0], "patches": row[1:]} for path, row in zip(batch, tokens, strict=True)}

    def run() -> Mapping[str, Any]:
        features: dict[str, dict[str, torch.Tensor]] = {}
        for start in range(0, len(paths), SERIAL_BATCH):
            features |= {f"{start} {name}": row for name, row in encode(paths[start : start + SERIAL_BATCH]).items()}
        torch.save(features, Path(request.out) / "features.pth")
        return {}

    encode(paths[:1])
    return Ready(len(paths), partial(encode, paths[:SERIAL_BATCH]), run)


def _make_job(request: Request, encoder: ImageEncoder) -> Ready:
    config = ImageJobConfig(
        Path(request.samples), Path(request.out), batch_size=request.batch_size, shard_rows=request.shard_rows
    )
    paths = _paths(request)
    with Image.open(paths[0]) as image:
        shown = torch.from_numpy(np.array(encoder.preprocess(np.asarray(image))))

    def encode(num: int) -> None:
        encoder.encode(shown.expand(num, -1, -1, -1).to(request.device))
        finish(request.device)

    def run() -> Mapping[str, Any]:
        stages = extract_images(config, encoder).stages
        return {"stages": stages.to_dict(), "binds": stages.binds}

    encode(1)
    return Ready(len(paths), partial(encode, min(request.batch_size, len(paths))), run)


def _paths(request: Request) -> list[Path]:
    store = open_samples(Path(request.samples))
    assert store.image_dir is not None
    return [store.image_dir / path for path in store.samples.images.paths]


def _load_model(request: Request) -> Dinov2Model:
    return Dinov2Model.from_pretrained(request.checkpoint, dtype=torch.float32).eval().to(request.device)
