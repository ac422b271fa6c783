"""Predicted masks as COCO results, and the truths they are scored against by pycocotools' COCOeval.

Where samples have a fixed vocabulary, each is a category in an image, as in COCO. Where they have prompts of any kind,
each sample stands as an image of its own with one category: two prompts of one image do not compete for its objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from pycocotools import mask as coco_mask

from cache_schema import atomic
from cache_schema.errors import UsageError
from cache_schema.masks import Size, encode_mask
from cache_schema.samples import Samples

_CATEGORY_TAG = "category"
_ONLY_CATEGORY = "target"


@dataclass(frozen=True, slots=True)
class CocoFiles:
    """Where results and truths lie, and how many there are of each."""

    results: Path
    truth: Path
    num_results: int
    num_truths: int


@dataclass(frozen=True, slots=True, eq=False)
class Detection:
    """A sample, by its row, what is marked for it at original size, and how far the head trusts that."""

    row: int
    mask: Bool[np.ndarray, "h w"]
    score: float


def write_coco_results(path: Path, detections: Iterable[Detection], samples: Samples, rows: Sequence[int]) -> CocoFiles:
    """Write the results to `path`, and the truths of all `rows` to a file of that name with `.truth` in it.

    A result is `{image_id, category_id, segmentation: {size, counts}, score}`. A detection without a pixel gives none,
    as a detector that finds nothing says nothing; a sample without a target gives no truth, so what is marked for it
    counts as wrong. Pixels that nobody labelled are taken off both.

    Raises:
        UsageError: `path` is no name of a JSON file.
    """
    check_coco_path(path)
    truth_path = path.with_suffix(".truth.json")
    numbers = _Numbers(samples, rows)
    results = []
    for detection in detections:
        mask = detection.mask
        ignored = samples.ignored_pixels(detection.row)
        if ignored is not None:
            mask = mask & ~ignored
        if mask.any():
            segmentation = _segmentation(encode_mask(mask), mask.shape)
            results.append({**numbers.of(detection.row), "segmentation": segmentation, "score": detection.score})
    annotations = [
        {"id": number, **_annotation(numbers, samples, row)}
        for number, row in enumerate((row for row in rows if not samples.no_target[row]), start=1)
    ]  # from 1 on, since COCOeval takes 0 for "matched by none"
    truth = {
        "info": {"description": "one annotation for each sample that has a target"},
        "images": numbers.images(),
        "categories": [{"id": number, "name": name} for name, number in numbers.categories.items()],
        "annotations": annotations,
    }
    atomic.write_json(path, results)
    atomic.write_json(truth_path, truth)
    return CocoFiles(path, truth_path, len(results), len(annotations))


def check_coco_path(path: Path) -> None:
    """Refuse a name that COCO results cannot have.

    Raises:
        UsageError: `path` is no name of a JSON file.
    """
    if path.suffix != ".json":
        raise UsageError(f"{path} is no name for COCO results; let it end in .json.")


class _Numbers:
    """What images and categories are called by in the files."""

    def __init__(self, samples: Samples, rows: Sequence[int]) -> None:
        self._samples, self._rows = samples, rows
        names = samples.tags.get(_CATEGORY_TAG, ())
        self._by_category = bool(samples.classes) and all(names and names[row] in samples.classes for row in rows)
        kept = samples.classes if self._by_category else (_ONLY_CATEGORY,)
        self.categories = {name: number for number, name in enumerate(kept, start=1)}
        ids = {samples.images.ids[samples.image_rows[row]] for row in rows}
        own = {name: int(name) for name in ids if name.isascii() and name.isdecimal()}
        self._own = own if len(set(own.values())) == len(ids) else {}

    def of(self, row: int) -> dict[str, int]:
        """`image_id` and `category_id` of a sample."""
        if not self._by_category:
            return {"image_id": row + 1, "category_id": 1}
        image = int(self._samples.image_rows[row])
        name = self._samples.tags[_CATEGORY_TAG][row]
        assert name is not None
        image_id = self._own.get(self._samples.images.ids[image], image + 1)
        return {"image_id": image_id, "category_id": self.categories[name]}

    def images(self) -> list[dict[str, Any]]:
        """The images of the samples, each once; or one for each sample, which it names then."""
        samples, found = self._samples, dict[int, dict[str, Any]]()
        for row in self._rows:
            height, width = samples.size_of(row)
            number = self.of(row)["image_id"]
            path = samples.images.paths[samples.image_rows[row]]
            found[number] = {"id": number, "file_name": path, "height": height, "width": width}
            if not self._by_category:
                prompt = samples.prompts[samples.prompt_rows[row]]
                found[number] |= {"sample_id": samples.ids[row], "prompt": prompt}
        return list(found.values())


def _annotation(numbers: _Numbers, samples: Samples, row: int) -> dict[str, Any]:
    counts, size, ignored = samples.targets[row], samples.size_of(row), samples.ignored_pixels(row)
    if ignored is not None:
        counts = encode_mask(samples.target(row) & ~ignored)
    run_lengths = {"size": list(size), "counts": counts}
    return {
        **numbers.of(row),
        "segmentation": _segmentation(counts, size),
        "area": int(coco_mask.area(run_lengths)),
        "bbox": coco_mask.toBbox(run_lengths).tolist(),
        "iscrowd": 0,
    }


def _segmentation(counts: bytes, size: Size | tuple[int, ...]) -> dict[str, Any]:
    return {"size": list(size), "counts": counts.decode("ascii")}
