"""Images made from a seed, as JPEG files with a samples store that lists them. Knows no encoder."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from cache_schema.masks import Size, empty_mask
from cache_schema.samples import ImageTable, Samples, write_samples

QUALITY = 90
_LEAST_GRAIN, _MOST_GRAIN = 4.0, 8.0
_NUM_SHAPES = 16
_IMAGE_DIR = "images"


def make_jpeg(seed: int, size: Size) -> bytes:
    """A JPEG file of (H, W): coloured gradients, shapes and grain. Of 480 x 640 pixels it has 70 to 120 KB."""
    rng = np.random.default_rng(seed)
    height, width = size
    y, x = np.linspace(0, 1, height, dtype=np.float32)[:, None], np.linspace(0, 1, width, dtype=np.float32)
    waves = rng.normal(0, (5, 5, 2), (3, 3)).astype(np.float32)
    smooth = np.stack([128 + 90 * np.sin(across * x + down * y + phase) for across, down, phase in waves], axis=-1)
    picture = Image.fromarray(smooth.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for number in range(_NUM_SHAPES):
        left, top = rng.uniform(0, 0.9, 2)
        box = (left * width, top * height, (left + rng.uniform(0.02, 0.3)) * width, (top + 0.2) * height)
        colour = tuple(rng.integers(0, 256, 3).tolist())
        (draw.ellipse if number % 2 else draw.rectangle)(box, fill=colour)
    grain = rng.standard_normal(size, np.float32)[..., None] * rng.uniform(_LEAST_GRAIN, _MOST_GRAIN)
    pixels = (np.asarray(picture) + grain).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def write_images(folder: Path, num_files: int, size: Size) -> list[Path]:
    """Make so many JPEG files of one size."""
    image_dir = folder / _IMAGE_DIR
    image_dir.mkdir(parents=True)
    paths = [image_dir / f"{number:06d}.jpg" for number in range(num_files)]
    for number, path in enumerate(paths):
        path.write_bytes(make_jpeg(number, size))
    return paths


def write_task(
    files: Sequence[Path], num_images: int, size: Size, folder: Path, prompts: Sequence[str] = ("everything",)
) -> Path:
    """A samples store of so many images, which share the files where there are fewer of these; return its path.

    Args:
        files: in one folder.
        prompts: unique; one sample has the first of them.
    """
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files[:num_images]]
    places = [number % len(digests) for number in range(num_images)]
    samples = Samples(
        images=ImageTable(
            ids=[f"image-{number}" for number in range(num_images)],
            paths=[files[place].name for place in places],
            sizes=np.tile(np.array(size, np.int32), (num_images, 1)),
            sha256=[digests[place] for place in places],
        ),
        prompts=list(prompts),
        ids=["sample-0"],
        image_rows=np.zeros(1, np.int32),
        prompt_rows=np.zeros(1, np.int32),
        targets=[empty_mask(size)],
        no_target=np.ones(1, np.bool_),
        splits=["train"],
        tags={},
    )
    written, _ = write_samples(folder, samples, dataset="made-up", sources={}, image_dir=files[0].parent, libraries={})
    assert isinstance(written, Path)
    return written
