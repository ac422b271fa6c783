"""Named recipes of finetuning: two stages as plain values, with what is adapted between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from cache_schema.errors import UsageError, unknown_name
from heads.finetune import STAGES, FinetuneConfig
from heads.train_config import TrainConfig
from headstart.recipes import RECIPES, like, replace_settings

_CONTRASTIVE = TrainConfig(
    head="talk2dino",
    arguments={"text": "mean", "alignment": "cls", "hidden_layers": 0, "contrastive_scale": 1 / 0.07},
    loss={"clip_contrastive": 1.0},
    epochs=20,
    batch_size=64,
    prompts_per_image=1,
    learning_rate=1e-4,
    weight_decay=1e-2,
    patience=5,
    mixed_precision="bf16",
)

FINETUNE_RECIPES: dict[str, FinetuneConfig] = {
    # JurasSigLIP: both towers learn to match images and prompts; then all is frozen but fusion and head.
    "juras": FinetuneConfig(
        contrastive=_CONTRASTIVE,
        segmentation=RECIPES["juras"],
        sides=("image", "text"),
        rank=8,
        alpha=16.0,
        dropout=0.0,
        head_alone=True,
    ),
    # What PromptSeg's authors wished for: its decoder with an image encoder that learns along, at a tenth of its rate.
    "pseg": FinetuneConfig(segmentation=RECIPES["pseg"], sides=("image",), rank=8, alpha=16.0, adapter_rate=0.1),
    # What the demo does on scenes with the tiny encoders: both stages, both towers, in minutes on two cores.
    "scenes": FinetuneConfig(
        contrastive=dataclasses.replace(
            _CONTRASTIVE,
            arguments={"text": "mean", "alignment": "mean_patch", "contrastive_scale": 10.0},
            epochs=1,
            batch_size=32,
            prompts_per_image=4,
            learning_rate=2e-4,
            mixed_precision="no",
            target_size=(48, 48),
        ),
        segmentation=dataclasses.replace(
            RECIPES["cross_attention"],
            arguments={**RECIPES["cross_attention"].arguments, "image_depth": 1, "depth": 1},
            epochs=4,
            patience=None,
        ),
        sides=("image", "text"),
        rank=16,
        alpha=32.0,
        adapter_rate=3.0,
    ),
}

_OPTIONAL: dict[str, type] = {"images_at_once": int}
_LISTS = {"sides": ["image", "text"], "target_modules": ["q_proj", "v_proj"]}
"""Settings that are lists of names, each with an example."""

_FIELDS = {field.name for field in dataclasses.fields(FinetuneConfig)} - set(STAGES)


def make_finetune_config(recipe: str, overrides: Mapping[str, Any] | None = None) -> FinetuneConfig:
    """A recipe with some of its values replaced.

    Args:
        overrides: fields of `FinetuneConfig`; settings of a stage as `contrastive.epochs` or `segmentation.dim`; or
            `contrastive=None` to leave a stage out.

    Raises:
        UsageError: the recipe or a key is unknown, or a value is of another kind.
    """
    if recipe not in FINETUNE_RECIPES:
        raise unknown_name("recipe", recipe, FINETUNE_RECIPES)
    config = FINETUNE_RECIPES[recipe]
    stages: dict[str, TrainConfig | None] = {name: getattr(config, name) for name in STAGES}
    of_stage: dict[str, dict[str, Any]] = {name: {} for name in STAGES}
    replaced: dict[str, Any] = {}
    for key, value in (overrides or {}).items():
        stage, dot, own = key.partition(".")
        if key in STAGES:
            if value is not None:
                raise UsageError(f"{key} cannot be {value!r}: {key}=null leaves the stage out, {key}.epochs=5 sets it.")
            stages[key] = None
        elif dot and stage in STAGES:
            of_stage[stage][own] = value
        elif key in _LISTS:
            replaced[key] = _names(key, value)
        elif key in _FIELDS:
            replaced[key] = like(key, value, getattr(config, key), _OPTIONAL)
        else:
            known = {f"{name}.{field.name}" for name in STAGES for field in dataclasses.fields(TrainConfig)}
            raise unknown_name(f"setting of recipe {recipe!r}", key, _FIELDS | known | set(STAGES))
    for name, settings in of_stage.items():
        stage_config = stages[name]
        if settings and stage_config is None:
            raise UsageError(f"recipe {recipe!r} has no {name} stage to set {', '.join(settings)} of.")
        if stage_config is not None:
            stages[name] = replace_settings(stage_config, settings, f"the {name} stage of recipe {recipe!r}")
    return dataclasses.replace(config, **stages, **replaced)  # type: ignore[arg-type]


def _names(key: str, value: Any) -> tuple[str, ...] | None:
    if key == "target_modules" and value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UsageError(f"{key} cannot be {value!r}: give something like {_LISTS[key]!r}.")
    return tuple(value)
