"""The eight benchmarks of open-vocabulary segmentation: their classes, and the truth of their images.

The truth comes from a samples store as `headstart prepare` writes it, where every pixel was checked to be of one class
or ignored, and every image to have the size of its label map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray

from cache_schema.errors import UsageError, unknown_name
from cache_schema.samples import Samples, SamplesStore
from evaluate.open_vocabulary.classes import OpenClass
from extract.datasets.semantic_sets import SEMANTIC_SETS, open_classes

IGNORED = 255
"""Stands in label maps for pixels that do not count."""

TITLES = {
    "voc20": "VOC20",
    "voc21": "VOC21",
    "context59": "Context59",
    "context60": "Context60",
    "coco-object": "COCO-Object",
    "coco-stuff": "COCO-Stuff",
    "ade20k": "ADE20K",
    "cityscapes": "Cityscapes",
}
"""The benchmarks, by the name under which `headstart prepare` reads them; what papers call each."""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Args:
        name: a key of `TITLES`.
        classes: those that are prompted for, in the order of their numbers.
        has_background: whether background is number 0, before them; else its pixels are ignored.
    """

    name: str
    classes: tuple[OpenClass, ...]
    has_background: bool

    @property
    def title(self) -> str:
        return TITLES[self.name]

    @property
    def names(self) -> tuple[str, ...]:
        """What each number in a label map is called."""
        return SEMANTIC_SETS[self.name].class_names


def make_benchmark(name: str, *, aliases: bool = False) -> Benchmark:
    """A benchmark by name.

    Args:
        aliases: prompt for the other names of a class too, not for the name alone that the benchmark gives it.

    Raises:
        UsageError: there is no such benchmark.
    """
    if name not in TITLES:
        raise unknown_name("benchmark", name, TITLES)
    listed = open_classes(SEMANTIC_SETS[name].classes)
    classes = (
        OpenClass(called, (called, *others) if aliases else (called,))
        for called, others in zip(listed.names, listed.aliases, strict=True)
    )
    return Benchmark(name, tuple(classes), SEMANTIC_SETS[name].has_background)


@dataclass(frozen=True)
class LabelledImage:
    """One image of a split: its row in the store, and the rows of its samples, one for each class it shows."""

    row: int
    samples: NDArray[np.int64]


def list_images(store: SamplesStore, benchmark: Benchmark, split: str) -> list[LabelledImage]:
    """The images of a split, in the order of the store. An image of which no pixel counts is not in the store.

    Raises:
        UsageError: the store is of another dataset, or has no such split.
    """
    if store.dataset != benchmark.name or tuple(store.samples.classes) != benchmark.names:
        raise UsageError(
            f"{store.path} holds {store.dataset}, not {benchmark.name}; make its store with "
            f"`headstart prepare {benchmark.name}`, or name that benchmark."
        )
    rows = store.samples.rows_of_split(split)
    image_rows = store.samples.image_rows[rows]
    order = np.argsort(image_rows, kind="stable")
    images, starts = np.unique(image_rows[order], return_index=True)
    return [
        LabelledImage(int(image), of_image)
        for image, of_image in zip(images, np.split(rows[order], starts[1:]), strict=True)
    ]


def read_truth(samples: Samples, rows: Sequence[int] | NDArray[np.int64]) -> UInt8[np.ndarray, "h w"]:
    """The label map of an image, out of its samples: the number of each pixel's class, `IGNORED` where none counts."""
    labels = np.full(samples.size_of(int(rows[0])), IGNORED, np.uint8)
    for row in rows:
        labels[samples.target(int(row))] = samples.classes.index(samples.prompts[samples.prompt_rows[row]])
    return labels
