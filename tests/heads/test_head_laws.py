"""The laws that hold for every head, for the heads that are not held to them in a file of tests of their own."""

from __future__ import annotations

import pytest
import torch

from heads import build_head
from heads.inputs import FeatureShapes, Head
from tests.heads.laws import (
    check_export,
    check_gradients_reach_everything,
    check_padding_is_not_seen,
    check_prompts_do_not_see_each_other,
    check_tokens_are_missed_by_who_reads_them,
    make_inputs,
    overfit,
    sum_of_outputs,
)

SHAPES = FeatureShapes({"3": (5, 7, 16), "last": (5, 7, 16)}, token_width=12, pooled_width=10)
HEADS = {
    "linear": ("linear", {}),
    "juras": ("cross_attention", {"layers": ["last"]}),
    "deep": (
        "cross_attention",
        {"layers": ["3", "last"], "dim": 32, "image_depth": 1, "depth": 2, "self_attention": True, "upsample": 2},
    ),
    "film": ("film", {"layers": ["last"]}),
    "projected film": ("film", {"layers": ["last"], "dim": 32, "num_heads": 4}),
    "film of two layers": ("film", {"layers": ["3", "last"], "residual": True, "upsample": 2}),
}


@pytest.fixture(params=HEADS)
def head(request: pytest.FixtureRequest) -> Head:
    torch.manual_seed(0)
    name, arguments = HEADS[request.param]
    return build_head(name, SHAPES, arguments)


def test_prompts_of_a_batch_do_not_see_each_other(head: Head) -> None:
    check_prompts_do_not_see_each_other(head, make_inputs(SHAPES))


def test_padding_is_not_seen(head: Head) -> None:
    check_padding_is_not_seen(head, make_inputs(SHAPES))


def test_tokens_are_missed_by_who_reads_them(head: Head) -> None:
    check_tokens_are_missed_by_who_reads_them(head, make_inputs(SHAPES))


def test_gradients_reach_every_parameter(head: Head) -> None:
    check_gradients_reach_everything(head, make_inputs(SHAPES), sum_of_outputs)


def test_a_head_can_be_exported_for_any_number_of_prompts(head: Head) -> None:
    check_export(head, make_inputs(SHAPES), make_inputs(SHAPES, num_images=2, num_prompts=5, seed=1))


def test_cross_attention_learns_eight_masks_by_heart() -> None:
    torch.manual_seed(0)
    name, arguments = HEADS["deep"]
    shapes = FeatureShapes({"3": (12, 12, 16), "last": (12, 12, 16)}, token_width=12, pooled_width=10)
    head = build_head(name, shapes, {**arguments, "upsample": 4})
    assert overfit(head, make_inputs(shapes), steps=200, rate=3e-3) > 0.95
