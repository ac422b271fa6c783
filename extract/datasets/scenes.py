"""A dataset that makes itself: scenes of simple things, prompts about them, and exact masks, in gRefCOCO's layout.

It stands in for real data where there is none at hand. What it writes is read by the very reader of gRefCOCO.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from cache_schema import atomic
from cache_schema.errors import UsageError, require_at_least
from cache_schema.fingerprint import digest_file
from cache_schema.masks import encode_mask
from extract.datasets.grefcoco import read_grefcoco
from extract.datasets.records import Dataset, Source
from extract.datasets.references import NO_TARGET
from extract.datasets.scene_language import Expression, express
from extract.datasets.scene_objects import SHAPES, Scene, SceneObject, make_scene

GENERATOR_VERSION = 1
"""Raised whenever the same config would give other images or prompts."""

MARKER = "scenes.json"
"""Written last: its presence, in agreement with what lies beside it, means that the dataset is complete."""

_IMAGE_FOLDER, _INSTANCES, _REFS = "images", "instances.json", "grefs(unc).json"
_INFO = {"description": "headstart scenes"}
_JPEG_QUALITY = 92
_SPLITS = {3: "val", 6: "test", 10: "val", 13: "test", 17: "val"}  # by index modulo 20; all others train


@dataclass(frozen=True)
class ScenesConfig:
    """What to make, and where. Image i depends on `seed` and i alone, so a larger dataset begins with the smaller."""

    out: Path
    num_images: int = 800
    seed: int = 0
    prompts_per_image: int = 8

    def __post_init__(self) -> None:
        require_at_least(self, 1, "num_images", "prompts_per_image")
        require_at_least(self, 0, "seed")


def make_scenes(config: ScenesConfig) -> Path:
    """Write the dataset to `config.out`, unless it is there complete and unharmed; return its folder.

    Raises:
        UsageError: the folder holds another dataset's annotation files, which would be overwritten.
    """
    if _is_complete(config):
        return config.out
    _clear(config.out)
    (config.out / _IMAGE_FOLDER).mkdir(parents=True, exist_ok=True)
    tables = _Tables()
    image_digests = []
    for index in tqdm(range(config.num_images), desc="scenes", unit="image"):
        rng = np.random.default_rng([config.seed, index])
        scene = make_scene(rng)
        image = _encode_jpeg(scene)
        _image_path(config.out, index).write_bytes(image)
        image_digests.append(hashlib.sha256(image).hexdigest())
        tables.add(index, scene, express(scene, config.prompts_per_image, rng))
    atomic.fsync_tree(config.out / _IMAGE_FOLDER)
    atomic.write_file(config.out / _INSTANCES, _compact_json(tables.instances()))
    atomic.write_file(config.out / _REFS, _compact_json(tables.refs))
    atomic.write_json(config.out / MARKER, _marker(config, image_digests))
    return config.out


def open_scenes(source: Source) -> Dataset:
    """Open what `make_scenes` wrote. Tags: `kind` beside gRefCOCO's `targets` and `category`."""
    return read_grefcoco(source, name="scenes")


class _Tables:
    """The rows of both annotation files, with ids that count up from image to image."""

    def __init__(self) -> None:
        self.refs: list[dict[str, Any]] = []
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        self._num_sentences = 0

    def instances(self) -> dict[str, Any]:
        categories = [{"id": _category_id(shape), "name": shape, "supercategory": "shape"} for shape in SHAPES]
        return {"info": _INFO, "images": self._images, "annotations": self._annotations, "categories": categories}

    def add(self, index: int, scene: Scene, expressions: Iterable[Expression]) -> None:
        H, W = scene.size
        image: dict[str, Any] = {"id": index + 1, "file_name": _image_path(Path(), index).name, "height": H, "width": W}
        self._images.append(image)
        annotations = [self._annotate(item, image["id"]) for item in scene.objects]
        for expression in expressions:
            self._refer(expression, [annotations[member] for member in expression.members], image)

    def _annotate(self, item: SceneObject, image_id: int) -> dict[str, Any]:
        x0, y0, x1, y1 = item.box
        annotation = {
            "id": len(self._annotations) + 1,
            "image_id": image_id,
            "category_id": _category_id(item.shape),
            "segmentation": {"size": list(item.visible.shape), "counts": encode_mask(item.visible).decode("ascii")},
            "area": item.visible_area,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "iscrowd": 0,
        }
        self._annotations.append(annotation)
        return annotation

    def _refer(self, expression: Expression, targets: list[dict[str, Any]], image: dict[str, Any]) -> None:
        sent_ids = [self._num_sentences + number for number in range(len(expression.forms))]
        self._num_sentences += len(sent_ids)
        self.refs.append(
            {
                "ref_id": len(self.refs),
                "ann_id": [target["id"] for target in targets] or [NO_TARGET],
                "image_id": image["id"],
                "category_id": [target["category_id"] for target in targets] or [NO_TARGET],
                "split": _SPLITS.get((image["id"] - 1) % 20, "train"),
                "file_name": image["file_name"],
                "sentences": [
                    {"sent_id": sent_id, "sent": form, "raw": form, "tokens": form.split()}
                    for sent_id, form in zip(sent_ids, expression.forms, strict=True)
                ],
                "sent_ids": sent_ids,
                "no_target": not targets,
                "tags": {"kind": expression.kind},
            }
        )


def _is_complete(config: ScenesConfig) -> bool:
    """Whether the folder holds what this config asks for, byte by byte as it was written."""
    try:
        marker = json.loads((config.out / MARKER).read_bytes())
        digests = [digest_file(_image_path(config.out, index)) for index in range(config.num_images)]
        return bool(marker == _marker(config, digests))
    except (FileNotFoundError, ValueError):
        return False


def _marker(config: ScenesConfig, image_digests: list[str]) -> dict[str, Any]:
    return {
        "version": GENERATOR_VERSION,
        "config": {name: value for name, value in asdict(config).items() if name != "out"},
        "sha256": {
            _INSTANCES: digest_file(config.out / _INSTANCES),
            _REFS: digest_file(config.out / _REFS),
            _IMAGE_FOLDER: hashlib.sha256("\n".join(image_digests).encode()).hexdigest(),
        },
    }


def _clear(out: Path) -> None:
    """Withdraw what an earlier run declared, so that a new one that is cut short cannot pass for it."""
    ours = _compact_json(_INFO)
    for name in (_REFS, _INSTANCES):
        if (out / name).exists() and not (out / MARKER).exists() and ours not in _head(out / _INSTANCES):
            raise UsageError(f"{out} holds a {name} that is another dataset's. Name another folder.")
    stale_images = (out / _IMAGE_FOLDER).glob("scene_" + "[0-9]" * 6 + ".jpg")
    for path in (out / MARKER, out / _REFS, out / _INSTANCES, *stale_images):
        path.unlink(missing_ok=True)


def _image_path(out: Path, index: int) -> Path:
    return out / _IMAGE_FOLDER / f"scene_{index:06d}.jpg"


def _category_id(shape: str) -> int:
    return SHAPES.index(shape) + 1


def _encode_jpeg(scene: Scene) -> bytes:
    buffer = BytesIO()
    Image.fromarray(scene.image).save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def _compact_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _head(path: Path, num_bytes: int = 200) -> bytes:
    """The first bytes of a file; none where there is no file."""
    if not path.exists():
        return b""
    with path.open("rb") as file:
        return file.read(num_bytes)
