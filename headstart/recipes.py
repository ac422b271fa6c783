"""Named recipes: everything that is trained by name, as plain values, with what to expect of them beside them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from cache_schema.errors import UsageError, unknown_name
from heads import head_arguments, plain_arguments
from heads.train_config import TrainConfig

_PSEG = TrainConfig(
    head="two_way",
    arguments={"depth": 3, "initial": "facebook/sam-vit-base"},
    loss={"bce": 1.0, "dice": 1.0, "iou": 1.0},
    epochs=20,
    batch_size=32,
    learning_rate=2e-4,
    weight_decay=1e-2,
    rates={"neck": 0.5},
    warmup=0.1,
    clip_norm=1.0,
    mixed_precision="bf16",
    target_size=(224, 224),
)

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
        mixed_precision="bf16",
        target_size=(512, 512),
    ),
    # PromptSeg-Lightweight: SAM's two-way decoder of depth 3, the pooled prompt as a point, the neck at half the rate.
    "pseg": _PSEG,
    # What its authors wished for: every token of the prompt in the two-way blocks.
    "pseg-tokens": dataclasses.replace(_PSEG, arguments={**_PSEG.arguments, "text": "tokens"}),
    # CLIPSeg's decoder, trained anew; needs a CLIP image encoder's layers 4, 7 and 10.
    "clipseg": TrainConfig(
        head="clipseg",
        loss={"bce": 1.0},
        epochs=20,
        batch_size=64,
        learning_rate=1e-3,
        target_size=(352, 352),
    ),
    # The re-implementation of CLIPSeg with FiLM.
    "film": TrainConfig(
        head="film",
        loss={"bce": 1.0},
        optimizer="adam",
        epochs=20,
        batch_size=64,
        learning_rate=1e-3,
        weight_decay=0.0,
        schedule="constant",
        warmup=0.0,
        target_size=(224, 224),
    ),
    # Text-Driven Object Segmentation: BiLSTM, three bidirectional layers, a progressive decoder.
    "text-driven": TrainConfig(
        head="bidirectional",
        loss={"bce": 1.0, "dice": 1.0},
        epochs=40,
        batch_size=16,
        learning_rate=1e-4,
        weight_decay=1e-4,
        rates={"pyramid": 0.1, "words": 0.1},
        warmup=0.0,
        clip_norm=0.0,
        mixed_precision="bf16",
        target_size=(480, 480),
    ),
    # Talk2DINO: a projection of CLIP's text, trained on pairs of images and captions. Needs --attention head_tokens.
    "talk2dino": TrainConfig(
        head="talk2dino",
        loss={"info_nce": 1.0},
        optimizer="adam",
        epochs=100,
        batch_size=128,
        prompts_per_image=1,
        learning_rate=1e-4,
        weight_decay=0.0,
        schedule="constant",
        warmup=0.0,
        clip_norm=0.0,
        patience=None,
        target_size=(96, 96),
    ),
}

OPTIONAL: dict[str, type] = {"patience": int, "val_samples": int, "data_seed": int, "ema": float}
"""Settings that may be null, and what they are otherwise."""


def make_config(recipe: str, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """A recipe with some of its values replaced: fields of `TrainConfig`, or arguments of the head.

    Raises:
        UsageError: the recipe or a key is unknown.
    """
    if recipe not in RECIPES:
        raise unknown_name("recipe", recipe, RECIPES)
    return replace_settings(RECIPES[recipe], overrides or {}, f"recipe {recipe!r}")


def replace_settings(config: TrainConfig, overrides: Mapping[str, Any], of: str) -> TrainConfig:
    """A config with some of its values replaced: fields of `TrainConfig`, or arguments of the head.

    Raises:
        UsageError: a key is unknown; it says `of` what.
    """
    arguments = dict(config.arguments)
    replaced: dict[str, Any] = {}
    for key, value in overrides.items():
        if key in _FIELDS:
            replaced[key] = like(key, value, getattr(config, key), OPTIONAL)
        elif key in head_arguments(config.head):
            arguments[key] = value
        else:
            raise unknown_name(f"setting of {of}", key, _FIELDS | head_arguments(config.head))
    return dataclasses.replace(config, arguments=plain_arguments(config.head, arguments), **replaced)


def make_configs(recipes: Sequence[str], overrides: Mapping[str, Any] | None = None) -> list[TrainConfig]:
    """Several recipes with some of their values replaced.

    A setting counts for every recipe that knows it; one that is written `recipe.key` for that recipe alone.

    Raises:
        UsageError: a recipe is unknown or named twice, or no recipe knows a key.
    """
    settings: dict[str, dict[str, Any]] = {}
    for recipe in recipes:
        if recipe not in RECIPES:
            raise unknown_name("recipe", recipe, RECIPES)
        if recipe in settings:
            raise UsageError(f"recipe {recipe!r} is named twice; name each once.")
        settings[recipe] = {}
    known = {recipe: _FIELDS | head_arguments(RECIPES[recipe].head) for recipe in settings}
    for key, value in (overrides or {}).items():
        recipe, dot, own = key.partition(".")
        if dot and recipe in settings:
            settings[recipe][own] = value
            continue
        takers = [recipe for recipe in settings if key in known[recipe]]
        if not takers:
            raise unknown_name("setting of these recipes", key, set().union(*known.values()))
        for recipe in takers:
            settings[recipe].setdefault(key, value)
    return [make_config(recipe, own) for recipe, own in settings.items()]


def like(key: str, value: Any, example: Any, optional: Mapping[str, type]) -> Any:
    """`value`, if it is of the kind of the value it replaces, or of the kind of an `optional` setting, or null for it.

    Raises:
        UsageError: it is not.
    """
    if key in optional and value is None:
        return None
    kind = optional.get(key, type(example))
    if isinstance(value, list):
        value = tuple(value)
    if kind is float and type(value) is int:
        value = float(value)
    fits = isinstance(value, Mapping) if issubclass(kind, Mapping) else type(value) is kind
    if fits and kind is tuple:
        fits = len(value) == len(example) and all(type(item) in (int, type(example[0])) for item in value)
    if fits and key in ("loss", "rates"):
        fits = all(type(weight) in (int, float) for weight in value.values())
        value = {name: float(weight) for name, weight in value.items()} if fits else value
    if not fits:
        shown = {int: 5, float: 0.999}.get(kind, example) if key in optional else example
        raise UsageError(f"{key} cannot be {value!r}: give something like {shown!r}.")
    return value


_NOT_JSON = {"True": "true", "False": "false", "None": "null"}
"""What Python calls them; taken as text, each would count as true."""

_FIELDS = {field.name for field in dataclasses.fields(TrainConfig)} - {"arguments", "head"}


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
        if value in _NOT_JSON:
            raise UsageError(f"{pair!r} is not JSON: write {key}={_NOT_JSON[value]}.")
        try:
            parsed[key] = json.loads(value)
        except ValueError:
            parsed[key] = value
    return parsed
