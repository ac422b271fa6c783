"""The eight benchmarks in small, in the layouts in which they are published, and what their numbers mean.

Truth is kept as whoever reads a dataset's paper would: the numbers in the files, and by hand which class each stands
for. Nothing here is read by the code under test but the files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIZES = ((40, 57), (61, 33), (34, 34))
"""(H, W) of the images of a split: wide, tall, square."""


@dataclass(frozen=True)
class Layout:
    """A benchmark in small.

    Args:
        place: where the image and the label map of a split's n-th image lie, below the root.
        stands_for: the class of each number that its label maps hold; None where a pixel does not count.
        listed: the file that lists a split's images, if one does.
        below: the folder that is named for the root, below it.
    """

    place: Callable[[str, int], tuple[str, str]]
    stands_for: Mapping[int, int | None]
    listed: str | None = None
    below: str = "."


def _voc(split: str, number: int) -> tuple[str, str]:
    key = f"{split}_{number:06}"
    return f"VOCdevkit/VOC2012/JPEGImages/{key}.jpg", f"VOCdevkit/VOC2012/SegmentationClass/{key}.png"


def _context(split: str, number: int) -> tuple[str, str]:
    key = f"{split}_{number:06}"
    return f"VOCdevkit/VOC2010/JPEGImages/{key}.jpg", f"VOCdevkit/VOC2010/SegmentationClassContext/{key}.png"


def _coco(split: str, number: int) -> tuple[str, str]:
    return f"images/{split}2017/{number:012}.jpg", f"annotations/{split}2017/{number:012}.png"


def _ade(split: str, number: int) -> tuple[str, str]:
    folder, key = {"train": "training", "val": "validation"}[split], f"ADE_{split}_{number:08}"
    home = "ADEChallengeData2016"
    return f"{home}/images/{folder}/{key}.jpg", f"{home}/annotations/{folder}/{key}.png"


def _cityscapes(split: str, number: int) -> tuple[str, str]:
    key = f"{split}/bonn/bonn_000000_{number:06}"
    return f"leftImg8bit/{key}_leftImg8bit.png", f"gtFine/{key}_gtFine_labelIds.png"


_VOC_LIST = "VOCdevkit/VOC2012/ImageSets/Segmentation/{}.txt"
_CONTEXT_LIST = "VOCdevkit/VOC2010/ImageSets/SegmentationContext/{}.txt"

LAYOUTS: dict[str, Layout] = {
    "voc20": Layout(_voc, {0: None, 1: 0, 8: 7, 15: 14, 20: 19, 255: None}, _VOC_LIST),
    "voc21": Layout(_voc, {0: 0, 1: 1, 8: 8, 15: 15, 20: 20, 255: None}, _VOC_LIST),
    "context59": Layout(_context, {0: None, 1: 0, 2: 1, 36: 35, 59: 58, 255: None}, _CONTEXT_LIST),
    "context60": Layout(_context, {0: 0, 1: 1, 2: 2, 36: 36, 59: 59, 255: None}, _CONTEXT_LIST),
    "coco-stuff": Layout(_coco, {0: 0, 16: 15, 91: 80, 95: 84, 181: 170, 255: None}),
    "coco-object": Layout(_coco, {0: 1, 16: 16, 91: 0, 95: 0, 181: 0, 255: 0}),
    "ade20k": Layout(_ade, {0: None, 1: 0, 9: 8, 90: 89, 150: 149}),
    "cityscapes": Layout(_cityscapes, {0: None, 4: None, 7: 0, 8: 1, 24: 11, 25: 12, 26: 13, 29: None, 33: 18}),
}

NUM_CLASSES = {
    "voc20": 20,
    "voc21": 21,
    "context59": 59,
    "context60": 60,
    "coco-stuff": 171,
    "coco-object": 81,
    "ade20k": 150,
    "cityscapes": 19,
}


@dataclass(frozen=True)
class MadeImage:
    """One image of a benchmark in small: its file, and (H, W) the class of each pixel, -1 where none counts."""

    path: Path
    truth: NDArray[np.int64]


def make_benchmark_folder(root: Path, name: str, seed: int = 0) -> dict[str, list[MadeImage]]:
    """Write a benchmark's train and val split; return their images in the order of their names."""
    layout, rng = LAYOUTS[name], np.random.default_rng(seed)
    splits: dict[str, list[MadeImage]] = {}
    for split in ("train", "val"):
        images = []
        for number, size in enumerate(SIZES, 101 if split == "val" else 1):
            image_path, labels_path = (root / below for below in layout.place(split, number))
            values = _patches(rng, size, np.array(list(layout.stands_for)))
            _save(image_path, rng.integers(0, 256, (*(1 + side // 4 for side in size), 3), np.uint8), size)
            _save(labels_path, values.astype(np.uint8), size)
            truth = np.vectorize({value: -1 if of is None else of for value, of in layout.stands_for.items()}.get)(
                values
            )
            images.append(MadeImage(image_path, truth))
        splits[split] = images
        if layout.listed is not None:
            path = root / layout.listed.format(split)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{image.path.stem}\n" for image in images))
    return splits


def _patches(rng: np.random.Generator, size: tuple[int, int], values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Squares of 7 pixels, each of one of the values; every value is there."""
    coarse = rng.choice(values, (-(-size[0] // 7), -(-size[1] // 7)))
    coarse.ravel()[: len(values)] = values
    return np.kron(coarse, np.ones((7, 7), np.int64))[: size[0], : size[1]]


def _save(path: Path, pixels: NDArray[np.uint8], size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if image.size != size[::-1]:
        image = image.resize(size[::-1], Image.Resampling.BICUBIC)
    image.save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
