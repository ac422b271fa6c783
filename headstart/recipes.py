"""Named recipes: everything that is trained by name, as plain values, with what to expect of them beside them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from cache_schema.errors import UsageError, unknown_name
from heads import head_arguments
from heads.train import TrainConfig

RECIPES: dict[str, TrainConfig] = {
    # The floor: about 15 seconds on scenes with two cores.
    "linear": TrainConfig(head="linear", epochs=6, batch_size=64, learning_rate=3e-3, target_size=(48, 48)),
    # What the demo trains on scenes: about three minutes on two cores, validation mean_iou above 0.6.
    "cross_attention": TrainConfig(
        head="cross_attention",
        arguments={
            "dim": 64,
            "inner_dim": 64,
            "num_heads": 4,
            "hidden_dim": 128,
            "image_depth": 2,
            "depth": 2,
            "self_attention": True,
            "upsample": 4,
        },
        epochs=6,
        batch_size=16,
        prompts_per_image=2,
        learning_rate=1e-3,
        target_size=(48, 48),
        checkpoint_steps=250,
    ),
    # JurasSigLIP's second stage: its fusion and head, its losses and optimiser, on frozen features.
    "juras": TrainConfig(
        head="cross_attention",
        loss={"dice": 1.0, "focal": 1.0},
        epochs=20,
        batch_size=64,
        learning_rate=3e-4,
        weight_decay=1e-2,
        target_size=(512, 512),
    ),
}


def make_config(recipe: str, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """A recipe with some of its values replaced: fields of `TrainConfig`, or arguments of the head.

    Raises:
        UsageError: the recipe or a key is unknown.
    """
    if recipe not in RECIPES:
        raise unknown_name("recipe", recipe, RECIPES)
    config = RECIPES[recipe]
    fields = {field.name for field in dataclasses.fields(TrainConfig)} - {"arguments", "head"}
    arguments = dict(config.arguments)
    replaced: dict[str, Any] = {}
    for key, value in (overrides or {}).items():
        if key in fields:
            replaced[key] = _like(key, value, getattr(config, key))
        elif key in head_arguments(config.head):
            arguments[key] = value
        else:
            raise unknown_name(f"setting of recipe {recipe!r}", key, fields | head_arguments(config.head))
    return dataclasses.replace(config, arguments=arguments, **replaced)


def _like(key: str, value: Any, example: Any) -> Any:
    """`value`, if it is of the kind of the value it replaces."""
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(example, float) and type(value) is int:
        value = float(value)
    optional = key == "patience" and value is None
    fits = type(value) is type(example)
    if fits and isinstance(example, tuple):
        fits = len(value) == len(example) and all(type(item) is int for item in value)
    if fits and isinstance(example, Mapping):
        fits = all(type(weight) in (int, float) for weight in value.values())
    if not optional and not fits:
        raise UsageError(f"{key} cannot be {value!r}: give something like {example!r}.")
    return value


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` pairs, with values in JSON (`depth=3`, `loss={"bce": 1}`); what is not JSON is taken as text.

    >>> parse_overrides(["depth=3", "mixed_precision=bf16", "target_size=[64, 64]"])
    {'depth': 3, 'mixed_precision': 'bf16', 'target_size': [64, 64]}
    """
    parsed = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"{pair!r} is not a setting: write key=value, such as epochs=5.")
        try:
            parsed[key] = json.loads(value)
        except ValueError:
            parsed[key] = value
    return parsed
