"""Word attention: where it is asked for, of every head that looks at prompt tokens, and without changing a mask."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heads import HEADS, build_head
from heads.cross_attention import Attention, CrossAttentionHead
from heads.inputs import FeatureShapes, Head, HeadInputs
from tests.heads.laws import (
    LENGTHS,
    check_export,
    check_padding_is_not_seen,
    check_prompts_do_not_see_each_other,
    make_inputs,
    tensors_of,
)

SHAPES = FeatureShapes(
    {"3": (5, 7, 16), "last": (5, 7, 16)}, token_width=12, pooled_width=10, cls_widths={"3": 16, "last": 16}
)
SHOWING: dict[str, tuple[str, dict[str, Any]]] = {
    "juras": ("cross_attention", {"layers": ["last"]}),
    "deep": (
        "cross_attention",
        {"layers": ["3", "last"], "dim": 32, "image_depth": 1, "depth": 3, "self_attention": True, "upsample": 2},
    ),
    "pseg-tokens": ("two_way", {"text": "tokens", "dim": 32, "mlp_dim": 48, "num_heads": 4}),
    "both": ("two_way", {"text": "both", "dim": 32, "mlp_dim": 48, "num_heads": 4, "depth": 2, "no_target": True}),
    "text-driven": (
        "bidirectional",
        {"layers": ["last"], "dim": 32, "num_heads": 4, "hidden_dim": 24, "lstm_dim": 12, "stages": [16, 8]},
    ),
}
NOT_SHOWING: dict[str, dict[str, Any]] = {
    "linear": {},
    "film": {"layers": ["last"]},
    "clipseg": {"layers": ["3", "last"], "hidden_dim": 32, "patch_size": 4},
    "talk2dino": {"alignment": "cls"},
}


@pytest.fixture(params=SHOWING)
def head(request: pytest.FixtureRequest) -> Head:
    torch.manual_seed(0)
    name, arguments = SHOWING[request.param]
    head = build_head(name, SHAPES, arguments).eval()
    assert head.shows_attention is False
    head.shows_attention = True
    return head


def word_attention(head: Head, inputs: HeadInputs) -> Tensor:
    with torch.no_grad():
        attention = head(inputs).word_attention
    assert attention is not None
    return attention


def test_every_head_either_shows_attention_or_sees_no_tokens() -> None:
    assert {name for name, _ in SHOWING.values()} | set(NOT_SHOWING) == set(HEADS)
    for name, arguments in NOT_SHOWING.items():
        head = build_head(name, SHAPES, arguments).eval()
        assert not hasattr(head, "shows_attention")
        assert not head.reads_tokens
        assert head(make_inputs(SHAPES)).word_attention is None


def test_nothing_is_shown_unless_it_is_asked_for(head: Head) -> None:
    head.shows_attention = False
    assert head(make_inputs(SHAPES)).word_attention is None


def test_showing_attention_changes_no_answer(head: Head) -> None:
    inputs = make_inputs(SHAPES)
    with torch.no_grad():
        shown = tensors_of(head(inputs))
        head.shows_attention = False
        hidden = tensors_of(head(inputs))
    assert shown.keys() == {*hidden, "word_attention"}
    for name, expected in hidden.items():
        torch.testing.assert_close(shown[name], expected, atol=2e-5, rtol=1e-5)


def test_attention_is_a_share_on_one_grid_and_padding_has_none(head: Head) -> None:
    inputs = make_inputs(SHAPES)
    attention = word_attention(head, inputs)
    height, width = attention.shape[2:]
    assert attention.shape[:2] == (8, max(LENGTHS))
    assert height / width == 5 / 7
    assert not attention[~inputs.prompt_mask].any()
    assert (attention[inputs.prompt_mask] > 0).all()
    over_words, over_cells = attention.sum(1), attention.sum((2, 3))
    shared = over_cells[inputs.prompt_mask] if type(head).__name__ == "TwoWayHead" else over_words
    torch.testing.assert_close(shared, torch.ones_like(shared))


def test_the_laws_of_heads_hold_while_attention_is_shown(head: Head) -> None:
    inputs = make_inputs(SHAPES)
    check_prompts_do_not_see_each_other(head, inputs)
    check_padding_is_not_seen(head, inputs)
    check_export(head, inputs, make_inputs(SHAPES, num_images=2, num_prompts=5, seed=1))


def test_attention_of_a_prompt_is_about_its_own_image(head: Head) -> None:
    inputs = make_inputs(SHAPES)
    before = word_attention(head, inputs)
    features = {name: torch.cat([grid[:2], grid[2:] + 1]) for name, grid in inputs.features.items()}
    after = word_attention(head, dataclasses.replace(inputs, features=features))
    changed = (after - before).abs().amax((1, 2, 3)) > 0
    assert changed.tolist() == [image == 2 for image in inputs.image_index.tolist()]


def test_cross_attention_shows_the_mean_over_heads_and_blocks_of_torchs_own_weights() -> None:
    torch.manual_seed(0)
    name, arguments = SHOWING["deep"]
    head = build_head(name, SHAPES, arguments).eval()
    assert isinstance(head, CrossAttentionHead)
    head.shows_attention = True
    inputs, asked = make_inputs(SHAPES), []
    for block in head.fusion:
        norms = [block.query_norm, block.context_norm]
        for norm in norms:
            norm.register_forward_hook(lambda module, args, output: asked.append(output))
    found = word_attention(head, inputs)
    weights = []
    for block, queries, context in zip(head.fusion, asked[::2], asked[1::2], strict=True):
        weights.append(as_torchs(block.attention)(queries, context, context, key_padding_mask=~inputs.prompt_mask)[1])
    assert len(weights) == 3
    expected = torch.stack(weights).mean(0).transpose(1, 2).unflatten(2, (5, 7))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def as_torchs(attention: Attention) -> nn.MultiheadAttention:
    """The same weights in torch's attention. Its width is that of the heads together, so queries are projected here."""
    inner = len(attention.to_query.weight)

    class Projected(nn.MultiheadAttention):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
            projected = (attention.to_query(query), attention.to_key(key), attention.to_value(value))
            return super().forward(*projected, **options)

    torchs = Projected(inner, attention.num_heads, bias=False, batch_first=True).eval()
    with torch.no_grad():
        torchs.in_proj_weight.copy_(torch.eye(inner).repeat(3, 1))
    return torchs
