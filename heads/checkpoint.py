"""A trained head on disk: `model.safetensors` and a `config.json` that says how to build it. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from cache_schema import atomic
from cache_schema.errors import UsageError
from heads import build_head
from heads.inputs import FeatureShapes, Head

CONFIG, WEIGHTS = "config.json", "model.safetensors"
"""The files of a head."""


@dataclass(frozen=True)
class HeadSpec:
    """What it takes to build a head again, without its weights."""

    head: str
    arguments: Mapping[str, Any]
    shapes: FeatureShapes

    def build(self, *, fresh: bool = True) -> Head:
        """The head, with weights of its own making.

        Args:
            fresh: whether it is about to learn. Another checkpoint that its arguments name as `initial` is read for
                that alone; a head whose weights are loaded anyway does without it.
        """
        arguments = (
            self.arguments if fresh else {**self.arguments, **dict.fromkeys({"initial"} & self.arguments.keys())}
        )
        return build_head(self.head, self.shapes, arguments)

    def to_dict(self) -> dict[str, Any]:
        return {"head": self.head, "arguments": dict(self.arguments), "shapes": self.shapes.to_dict()}


def save_head(folder: Path, spec: HeadSpec, head: Head) -> None:
    """Write a head's weights and config, each file whole or not at all."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    atomic.write_json(folder / CONFIG, spec.to_dict())
    atomic.write_file(folder / WEIGHTS, save(weights))


def load_head(folder: Path) -> tuple[HeadSpec, Head]:
    """Build the head a folder describes and load its weights, all of them, in evaluation mode.

    Raises:
        UsageError: the folder holds no head, or weights that do not fit it.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise UsageError(
            f"no head at {folder}: it needs config.json and model.safetensors. Name a run's best/ or last/."
        )
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        spec = HeadSpec(config["head"], config["arguments"], FeatureShapes.from_dict(config["shapes"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder}/config.json does not describe a head ({error!r}).") from error
    head = spec.build(fresh=False)
    try:
        weights = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{folder}/model.safetensors cannot be read ({error}); train the head again.") from error
    try:
        head.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise UsageError(
            f"{folder}/model.safetensors does not fit its config.json: {' '.join(str(error).split())}"
        ) from error
    return spec, head.eval()
