"""Toys for the tests of jobs: encoders whose answers can be worked out by hand, and tasks of noise images."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cache_schema.masks import Size, empty_mask
from cache_schema.samples import ImageTable, Samples, open_samples, write_samples
from cache_schema.store import open_store
from cache_schema.views import Aspect, View, fit_view
from extract.encoders.protocols import ImageEncoding, TextEncoding
from extract.images import decode_image
from extract.job import Extraction

NUM_IMAGES, SHARD_ROWS = 10, 4


@dataclass
class ToyImageEncoder:
    """Average colours on two grids, worked out for each image by itself; it remembers how many images it was given."""

    name: str = "toy"
    device: str = "cpu"
    adapter: str | None = None
    identity: Mapping[str, Any] = field(default_factory=lambda: {"class": "toy"})
    scale: float = 1.0
    aspect: Aspect = "squash"
    shape: Size = (8, 12)
    seconds_per_batch: float = 0.0
    encoded: list[int] = field(default_factory=list)
    fails_at_batch: int | None = None

    @property
    def grids(self) -> Mapping[str, tuple[int, int, int]]:
        return {"fine": (4, 6, 3), "coarse": (2, 2, 3)}

    @property
    def cls_widths(self) -> Mapping[str, int]:
        return {"fine": 3, "coarse": 3}

    @property
    def attention_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {}

    def fit(self, view: View) -> View:
        return fit_view(view, self.shape, self.aspect)

    def preprocess(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.array(Image.fromarray(image).resize((12, 8)))

    def encode(self, pixels: Tensor) -> ImageEncoding:
        if len(self.encoded) == self.fails_at_batch:
            raise RuntimeError("the accelerator is on fire")
        time.sleep(self.seconds_per_batch)
        self.encoded.append(len(pixels))
        pixels = pixels.permute(0, 3, 1, 2).float() / 255
        grids = {
            layer: torch.stack([pool(image, height, width) for image in pixels]) * self.scale
            for layer, (height, width, _) in self.grids.items()
        }
        return ImageEncoding(grids, {layer: grid.mean((1, 2)) for layer, grid in grids.items()})


def pool(image: Tensor, height: int, width: int) -> Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(image, (height, width)).permute(1, 2, 0)


@dataclass
class ToyTextEncoder:
    """A token's feature tells its word and place, a prompt's its tokens; padding is NaN, which nothing may keep."""

    name: str = "toy text"
    adapter: str | None = None
    identity: Mapping[str, Any] = field(default_factory=lambda: {"class": "toy text"})
    token_width: int = 3
    pooled_width: int = 2
    scale: float = 1.0
    seconds_per_batch: float = 0.0
    encoded: list[int] = field(default_factory=list)

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        return [[1, *(3 + len(word) % 50 for word in prompt.split()), 2] for prompt in prompts]

    def encode(self, token_ids: Sequence[Sequence[int]]) -> TextEncoding:
        time.sleep(self.seconds_per_batch)
        self.encoded.append(len(token_ids))
        longest = max(map(len, token_ids))
        tokens = torch.full((len(token_ids), longest, self.token_width), torch.nan)
        mask = torch.zeros(len(token_ids), longest, dtype=torch.bool)
        pooled = torch.zeros(len(token_ids), self.pooled_width)
        for row, ids in enumerate(token_ids):
            for place, token in enumerate(ids):
                tokens[row, place] = torch.tensor([token, place, token / (place + 1)]) * self.scale
            mask[row, : len(ids)] = True
            pooled[row] = torch.tensor([len(ids), sum(ids) / 7]) * self.scale
        return TextEncoding(tokens, mask, pooled)


def noise_png(seed: int, height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def sizes_of(num_images: int) -> list[tuple[int, int]]:
    return [(8 + number, 20 - number % 5) for number in range(num_images)]


def write_task(
    folder: Path,
    files: Sequence[bytes] | None = None,
    prompts: Sequence[str] = ("all of it",),
    sizes: Sequence[tuple[int, int]] | None = None,
) -> Path:
    """A samples store of noise images (or `files`, whatever they hold), each with the first prompt."""
    sizes = sizes or sizes_of(len(files) if files else NUM_IMAGES)
    files = files or [noise_png(number, *size) for number, size in enumerate(sizes)]
    image_dir = folder / "images"
    image_dir.mkdir(parents=True)
    for number, data in enumerate(files):
        (image_dir / f"{number}.img").write_bytes(data)
    num = len(files)
    samples = Samples(
        images=ImageTable(
            ids=[f"image {number}" for number in range(num)],
            paths=[f"{number}.img" for number in range(num)],
            sizes=np.array(sizes, np.int32),
            sha256=[hashlib.sha256(data).hexdigest() for data in files],
        ),
        prompts=list(prompts),
        ids=[str(number) for number in range(num)],
        image_rows=np.arange(num, dtype=np.int32),
        prompt_rows=np.zeros(num, np.int32),
        targets=[empty_mask(size) for size in sizes],
        no_target=np.ones(num, np.bool_),
        splits=["train"] * num,
        tags={},
    )
    return write_samples(folder, samples, dataset="toy", sources={}, image_dir=image_dir, libraries={})[0]


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[3] ^= 16
    path.write_bytes(data)


def digest_of(extraction: Extraction) -> str:
    return open_store(extraction.path).manifest.digest


def expected_encoding(samples: Path, encoder: ToyImageEncoder, row: int) -> ImageEncoding:
    store = open_samples(samples)
    image = decode_image((store.image_dir / store.samples.images.paths[row]).read_bytes())
    return ToyImageEncoder(scale=encoder.scale).encode(torch.from_numpy(encoder.preprocess(image))[None])


@dataclass
class BlindingEncoder(ToyImageEncoder):
    """Says something that is no number of every image that is brighter on the left than on the right."""

    value: float = float("nan")

    def encode(self, pixels: Tensor) -> ImageEncoding:
        encoding = super().encode(pixels)
        bright = pixels.float()
        glaring = bright[:, :, :6].mean((1, 2, 3)) > bright[:, :, 6:].mean((1, 2, 3))
        encoding.cls["coarse"][glaring, 1] = self.value
        return encoding


def prompts_of(num_words: Sequence[int]) -> list[str]:
    """Prompts of so many words each, no two of them alike."""
    return [
        " ".join(["x" * (row + 1), *("y" * (1 + place % 9) for place in range(1, num))])
        for row, num in enumerate(num_words)
    ]
