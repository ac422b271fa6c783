"""Recipes are plain values: each builds its head, and what is replaced in them is checked."""

from __future__ import annotations

from typing import Any

import pytest

from cache_schema.errors import UsageError
from heads import HEADS, build_head
from heads.inputs import FeatureShapes
from headstart.commands import RECIPE_NAMES
from headstart.recipes import RECIPES, make_config, make_configs, parse_overrides

LAYERS = ("3", "4", "6", "7", "9", "10", "11", "last")
SHAPES = FeatureShapes(
    grids=dict.fromkeys(LAYERS, (4, 4, 32)),
    token_width=12,
    pooled_width=12,
    cls_widths=dict.fromkeys(LAYERS, 32),
    attention={"head_tokens": (4, 32), "mean_token": (32,), "logits": (4, 4, 4)},
)


def test_the_names_in_the_help_are_those_there_are() -> None:
    assert set(RECIPE_NAMES) == set(RECIPES)
    assert len(RECIPE_NAMES) == len(set(RECIPE_NAMES))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_builds_its_head(recipe: str) -> None:
    config = RECIPES[recipe]
    arguments = {key: value for key, value in config.arguments.items() if key != "initial"}
    head = build_head(config.head, SHAPES, arguments)
    assert set(head.layers) <= set(LAYERS)
    config.parameter_groups(head)


def test_every_head_has_a_recipe() -> None:
    assert {config.head for config in RECIPES.values()} == set(HEADS)


@pytest.mark.parametrize(
    ("recipe", "published"),
    [
        ("juras", {"learning_rate": 3e-4, "weight_decay": 1e-2, "batch_size": 64, "loss": {"dice": 1.0, "focal": 1.0}}),
        ("pseg", {"learning_rate": 2e-4, "batch_size": 32, "epochs": 20, "rates": {"neck": 0.5}, "clip_norm": 1.0}),
        ("film", {"optimizer": "adam", "learning_rate": 1e-3, "loss": {"bce": 1.0}, "target_size": (224, 224)}),
        (
            "text-driven",
            {"target_size": (480, 480), "epochs": 40, "batch_size": 16, "rates": {"pyramid": 0.1, "words": 0.1}},
        ),
        (
            "talk2dino",
            {"optimizer": "adam", "learning_rate": 1e-4, "weight_decay": 0.0, "batch_size": 128, "epochs": 100},
        ),
    ],
)
def test_recipes_have_the_published_settings(recipe: str, published: dict[str, Any]) -> None:
    assert {key: getattr(RECIPES[recipe], key) for key in published} == published


def test_two_of_twenty_epochs_warm_up() -> None:
    config = RECIPES["pseg"]
    assert config.learning_rate_share(9, 100) == 1.0
    assert config.learning_rate_share(4, 100) == 0.5


def test_a_setting_counts_for_every_recipe_that_knows_it_and_one_with_a_name_for_that_alone() -> None:
    settings = {"epochs": 3, "dim": 64, "film.dim": 32, "linear.layer": "last"}
    linear, film, juras = make_configs(["linear", "film", "juras"], settings)
    assert [config.epochs for config in (linear, film, juras)] == [3, 3, 3]
    assert "dim" not in linear.arguments
    assert (film.arguments["dim"], juras.arguments["dim"]) == (32, 64)
    assert linear.arguments["layer"] == "last"


@pytest.mark.parametrize(
    ("recipes", "settings", "complaint"),
    [
        (["linnear"], {}, "unknown recipe 'linnear': did you mean 'linear'"),
        (["linear", "linear"], {}, "is named twice"),
        (["linear", "film"], {"epoch": 3}, "unknown setting of these recipes 'epoch': did you mean 'epochs'"),
        (["linear", "film"], {"film.dimm": 3}, "unknown setting of recipe 'film' 'dimm': did you mean 'dim'"),
        (["film"], {"juras.dim": 3}, "unknown setting of these recipes 'juras.dim'"),
    ],
)
def test_what_cannot_be_meant_is_said(recipes: list[str], settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        make_configs(recipes, settings)


@pytest.mark.parametrize(
    ("key", "value", "kept"),
    [
        ("patience", None, None),
        ("patience", 3, 3),
        ("ema", 0.99, 0.99),
        ("ema", None, None),
        ("val_samples", 100, 100),
        ("data_seed", 0, 0),
        ("learning_rate", 1, 1.0),
        ("betas", [0.9, 0.95], (0.9, 0.95)),
        ("target_size", [64, 32], (64, 32)),
        ("rates", {"neck": 0.1}, {"neck": 0.1}),
        ("loss", {"bce": 1}, {"bce": 1.0}),
        ("loss_arguments", {"bce": {}}, {"bce": {}}),
    ],
)
def test_values_of_the_right_kind_are_taken(key: str, value: Any, kept: Any) -> None:
    assert getattr(make_config("linear", {key: value}), key) == kept


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("epochs", "many", "epochs cannot be 'many': give something like 6"),
        ("ema", "much", "ema cannot be 'much': give something like 0.999"),
        ("ema", 1.5, "ema is 1.5"),
        ("val_samples", 2.5, "val_samples cannot be 2.5: give something like 5"),
        ("betas", [0.9], "betas cannot be"),
        ("rates", {"neck": "half"}, "rates cannot be"),
        ("optimizer", "adamm", "unknown optimizer 'adamm': did you mean 'adam'"),
        ("schedule", "cosin", "unknown schedule 'cosin': did you mean 'cosine'"),
        ("loss", {"bce": 1.0, "hinge": 1.0}, "give a weight for one or more of bce"),
        ("loss_arguments", {"focal": {}}, "unknown term in loss_arguments 'focal'"),
        ("accumulate", 0, "accumulate is 0: give a whole number of at least 1"),
    ],
)
def test_values_of_another_kind_are_refused_with_an_example(key: str, value: Any, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        make_config("linear", {key: value})


def test_a_whole_number_and_its_float_are_one_run() -> None:
    configs = [make_config("linear", {"loss": {"bce": weight}, "learning_rate": weight}) for weight in (1, 1.0)]
    assert repr(configs[0]) == repr(configs[1])


@pytest.mark.parametrize("value", ["True", "False", "None"])
def test_words_of_python_are_not_taken_for_text(value: str) -> None:
    with pytest.raises(UsageError, match=f"refined={value}' is not JSON: write refined="):
        parse_overrides([f"refined={value}"])


def test_a_whole_number_counts_as_a_float_where_one_is_taken() -> None:
    whole = make_config("talk2dino", {"logit_scale": 10, "hidden_layers": 2})
    assert whole == make_config("talk2dino", {"logit_scale": 10.0, "hidden_layers": 2})
    assert [type(whole.arguments[name]) for name in ("logit_scale", "hidden_layers")] == [float, int]
