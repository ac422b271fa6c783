"""On a CUDA device the same job gives the same features within the rounding of its kernels. Skipped where none is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from cache_schema.store import open_store
from extract.devices import CopyStream, InputBuffers, make_timer, on_device
from extract.encoders.specs import ImageEncoderSpec, TextEncoderSpec
from extract.image_job import ImageJobConfig
from extract.job import run_job
from extract.prompt_job import PromptJobConfig
from extract.tasks import ImageTask, TextTask

if TYPE_CHECKING:
    from extract.encoders.tiny import TinyEncoders

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
LAST = f"cuda:{torch.cuda.device_count() - 1}" if torch.cuda.is_available() else "cuda"
"""Where a machine has several, not the one that is current."""


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_images_are_encoded_as_on_the_cpu(
    samples_path: Path, tiny_encoders: TinyEncoders, tmp_path: Path, dtype: str
) -> None:
    config = ImageJobConfig(samples_path, tmp_path / "cpu", dtype=dtype, batch_size=3, shard_rows=8)
    spec = ImageEncoderSpec(str(tiny_encoders.image), layers=("1", "last"), attention=("head_tokens",))
    stores = [
        open_store(run_job(ImageTask(replace(config, out=tmp_path / device), spec).open(device)).path)
        for device in ("cpu", LAST)
    ]
    assert stores[0].header.fingerprint == stores[1].header.fingerprint
    assert all(store.read("valid").all() for store in stores)
    for name in ("features/1", "features/last", "cls/last", "attention/head_tokens"):
        on_cpu, on_cuda = (store.read(name).astype(np.float32) for store in stores)
        np.testing.assert_allclose(on_cuda, on_cpu, atol=2 if name.startswith("features") and dtype == "int8" else 2e-2)


def test_prompts_are_encoded_as_on_the_cpu(samples_path: Path, tiny_encoders: TinyEncoders, tmp_path: Path) -> None:
    spec = TextEncoderSpec(str(tiny_encoders.text))
    on_cpu, on_cuda = (
        open_store(run_job(TextTask(PromptJobConfig(samples_path, tmp_path / device), spec).open(device)).path)
        for device in ("cpu", LAST)
    )
    np.testing.assert_allclose(on_cuda.read("tokens"), on_cpu.read("tokens"), atol=2e-2)


def test_a_pinned_buffer_is_not_filled_again_before_it_was_copied() -> None:
    device = torch.device(LAST)
    buffers = InputBuffers(device)
    batches = [[np.full((256, 256, 3), 10 * number + place, np.uint8) for place in range(8)] for number in range(12)]
    with on_device(device):
        copies = []
        for images in batches:
            with buffers.stacked(images) as stacked:
                copies.append(stacked.clone())
    for images, copy in zip(batches, copies, strict=True):
        assert torch.equal(copy.cpu(), torch.from_numpy(np.stack(images)))


def test_what_is_copied_back_waits_for_what_was_queued_before() -> None:
    device = torch.device(LAST)
    with on_device(device):
        copies, host = CopyStream(device), torch.empty(4096, 4096, pin_memory=True)
        values = torch.ones(4096, 4096, device=device)
        with make_timer(device) as timer:
            for _ in range(50):
                values = values @ torch.eye(4096, device=device)
        with copies.after(copies.mark()):
            host.copy_(values, non_blocking=True)
    assert (host == 1).all()
    assert timer.seconds() > 0
