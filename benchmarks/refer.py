"""Datasets made from a seed in the layouts of RefCOCO and gRefCOCO: annotations like theirs, small JPEG files."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

Layout = Literal["refcoco", "grefcoco"]

SIZE = 480, 640
"""(H, W) of every image."""

REFS_PER_IMAGE = 2
SENTENCES_PER_REF = 3
SAMPLES_PER_IMAGE = REFS_PER_IMAGE * SENTENCES_PER_REF
LEAST_POINTS, MOST_POINTS = 20, 60
_MANY_TARGETS, _NO_TARGET = 0.2, 0.1
_NUM_CATEGORIES = 80
_SPLITS = ("train", "train", "train", "train", "train", "train", "train", "train", "val", "testA")
_WORDS = (
    "left right top bottom front back middle big small red green blue white black striped standing sitting closest to "
    "the of in on with a man woman guy girl kid dog cat horse car bus pizza chair couch shirt hat umbrella bike second"
).split()
_PICKLE_PROTOCOL = 0


def write_images(folder: Path, num_images: int) -> None:
    """Files of about 15 KB that differ in a comment, with COCO's names."""
    folder.mkdir(parents=True)
    height, width = SIZE
    y, x = np.linspace(0, 255, height)[:, None], np.linspace(0, 255, width)
    grain = np.random.default_rng(0).normal(0, 6, (height // 4, width // 4)).repeat(4, 0).repeat(4, 1)
    pixels = np.stack([y + grain, x + grain, (x + y) / 2 + grain], axis=-1).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=60)
    data = buffer.getvalue()
    for number in range(num_images):
        comment = b"\xff\xfe\x00\x0a" + b"%08d" % number
        (folder / _file_name(number)).write_bytes(data[:2] + comment + data[2:])


def write_annotations(root: Path, layout: Layout, num_images: int, seed: int = 0) -> None:
    """`instances.json` and the list of refs over so many images, `SAMPLES_PER_IMAGE` samples each."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    instances = {
        "images": [_image(number) for number in range(num_images)],
        "annotations": list(_annotations(num_images, rng)),
        "categories": [{"id": number, "name": f"category {number}"} for number in range(_NUM_CATEGORIES)],
    }
    (root / "instances.json").write_text(json.dumps(instances))
    refs = list(_refs(layout, num_images, rng))
    if layout == "refcoco":
        (root / "refs(unc).p").write_bytes(pickle.dumps(refs, _PICKLE_PROTOCOL))
    else:
        (root / "grefs(unc).json").write_text(json.dumps(refs))


def _file_name(number: int) -> str:
    return f"COCO_train2014_{number:012d}.jpg"


def _image(number: int) -> dict[str, Any]:
    return {"id": number, "file_name": _file_name(number), "height": SIZE[0], "width": SIZE[1]}


def _annotations(num_images: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    for ann_id in range(num_images * REFS_PER_IMAGE):
        yield {
            "segmentation": [_outline(rng)],
            "area": 5000.0,
            "iscrowd": 0,
            "image_id": ann_id // REFS_PER_IMAGE,
            "bbox": [10.0, 10.0, 80.0, 80.0],
            "category_id": int(rng.integers(_NUM_CATEGORIES)),
            "id": ann_id,
        }


def _outline(rng: np.random.Generator) -> list[float]:
    """A closed outline without crossings, as people draw them."""
    num = int(rng.integers(LEAST_POINTS, MOST_POINTS + 1))
    angle = np.sort(rng.uniform(0, 2 * np.pi, num))
    radius = rng.uniform(30, 130) * rng.uniform(0.8, 1.2, num)
    height, width = SIZE
    x = (rng.uniform(60, width - 60) + radius * np.cos(angle)).clip(0, width)
    y = (rng.uniform(60, height - 60) + radius * np.sin(angle)).clip(0, height)
    outline: list[float] = np.stack([x, y], axis=1).round(2).ravel().tolist()
    return outline


def _refs(layout: Layout, num_images: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    for ref_id in range(num_images * REFS_PER_IMAGE):
        image = ref_id // REFS_PER_IMAGE
        sent_ids = [ref_id * SENTENCES_PER_REF + number for number in range(SENTENCES_PER_REF)]
        ref: dict[str, Any] = {
            "sent_ids": sent_ids,
            "file_name": f"COCO_train2014_{image:012d}_{ref_id}.jpg",
            "ann_id": ref_id,
            "ref_id": ref_id,
            "image_id": image,
            "split": _SPLITS[image % len(_SPLITS)],
            "sentences": [_sentence(sent_id, rng) for sent_id in sent_ids],
            "category_id": 1,
        }
        if layout == "grefcoco":
            ref["ann_id"] = _targets(ref_id, image, rng)
            ref["no_target"] = ref["ann_id"] == [-1]
        yield ref


def _targets(ref_id: int, image: int, rng: np.random.Generator) -> list[int]:
    chance = rng.random()
    if chance < _NO_TARGET:
        return [-1]
    first = image * REFS_PER_IMAGE
    return list(range(first, first + REFS_PER_IMAGE)) if chance < _NO_TARGET + _MANY_TARGETS else [ref_id]


def _sentence(sent_id: int, rng: np.random.Generator) -> dict[str, Any]:
    tokens = [_WORDS[place] for place in rng.integers(len(_WORDS), size=rng.integers(2, 9))]
    sent = " ".join(tokens)
    return {"tokens": tokens, "raw": sent.capitalize(), "sent_id": sent_id, "sent": sent}
