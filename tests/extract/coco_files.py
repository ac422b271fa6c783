"""Two images with everything that COCO's `instances.json` can hold, for the tests of the readers built on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cache_schema.masks import encode_mask

H, W = 40, 60
CAT, DOG = 17, 18
LEFT_BOX = [2.0, 4.0, 12.0, 4.0, 12.0, 14.0, 2.0, 14.0]
SHIFTED_BOX = [7.0, 9.0, 17.0, 9.0, 17.0, 19.0, 7.0, 19.0]
FAR_BOX = [40.0, 20.0, 50.0, 20.0, 50.0, 30.0, 40.0, 30.0]
LEFT, SHIFTED, FAR = (2, 4, 12, 14), (7, 9, 17, 19), (40, 20, 50, 30)
CROWD, COMPRESSED = (0, 0, 3, H), (55, 35, 60, 40)


def box_mask(*boxes: tuple[int, int, int, int]) -> NDArray[np.bool_]:
    """(H, W), True inside the boxes (x0, y0, x1, y1)."""
    mask = np.zeros((H, W), np.bool_)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = True
    return mask


def runs_of(mask: NDArray[np.bool_]) -> list[int]:
    """COCO's uncompressed counts: lengths of alternating runs, down the columns, of zeros first."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat.astype(np.int8))) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return [0, *runs] if flat[0] else runs


def annotation(ann_id: int, image_id: int, category_id: int, segmentation: Any, iscrowd: int = 0) -> dict[str, Any]:
    """One of COCO's annotations."""
    return {
        "id": ann_id,
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": segmentation,
        "area": 100.0,
        "bbox": [0.0, 0.0, 1.0, 1.0],
        "iscrowd": iscrowd,
    }


INSTANCES: dict[str, Any] = {
    "info": {"description": "a few of COCO's train2014"},
    "images": [
        {"id": 581857, "file_name": "COCO_train2014_000000581857.jpg", "height": H, "width": W},
        {"id": 909, "file_name": "COCO_train2014_000000000909.jpg", "height": W, "width": H},
    ],
    "annotations": [
        annotation(1, 581857, CAT, [LEFT_BOX]),
        annotation(2, 581857, CAT, [SHIFTED_BOX]),
        annotation(3, 581857, DOG, [LEFT_BOX, SHIFTED_BOX, FAR_BOX]),
        annotation(4, 581857, CAT, {"size": [H, W], "counts": runs_of(box_mask(CROWD))}, iscrowd=1),
        annotation(5, 581857, DOG, {"size": [H, W], "counts": encode_mask(box_mask(COMPRESSED)).decode()}),
        annotation(6, 909, DOG, [LEFT_BOX]),
    ],
    "categories": [
        {"id": CAT, "name": "cat", "supercategory": "animal"},
        {"id": DOG, "name": "dog", "supercategory": "animal"},
    ],
}
"""Polygons that overlap, several polygons, and run lengths of both kinds."""


def write_images(folder: Path) -> None:
    """The image files of `INSTANCES`."""
    folder.mkdir(parents=True, exist_ok=True)
    for image in INSTANCES["images"]:
        Image.new("RGB", (image["width"], image["height"])).save(folder / image["file_name"])


def write_instances(root: Path, instances: Any = INSTANCES) -> Path:
    """`instances.json` in a folder."""
    path = root / "instances.json"
    path.write_text(json.dumps(instances))
    return path


Change = Callable[[Any], object]
"""What spoils the content of a file."""


def without(*path: Any) -> Change:
    """Takes what lies at a path of keys and positions away."""
    return lambda content: _follow(content, path[:-1]).pop(path[-1])


def having(value: Any, *path: Any) -> Change:
    """Sets what lies there."""
    return lambda content: _follow(content, path[:-1]).__setitem__(path[-1], value)


def _follow(content: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        content = content[step]
    return content
