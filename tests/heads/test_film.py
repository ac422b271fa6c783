"""The FiLM head: the same numbers as its formula written with torch's own decoder layer. Its laws: `test_head_laws`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache_schema.errors import UsageError
from heads.film import DecoderLayer, FilmHead, build_film
from heads.inputs import FeatureShapes
from tests.heads.laws import make_inputs, overfit

SHAPES = FeatureShapes({"3": (5, 7, 16), "last": (5, 7, 24), "coarse": (2, 3, 16)}, token_width=12, pooled_width=10)
VARIANTS: dict[str, dict[str, Any]] = {
    "faithful": {},
    "projected": {"dim": 32, "num_heads": 4},
    "two layers": {"layers": ["3", "last"], "residual": True, "upsample": 2},
}


@pytest.fixture(params=VARIANTS)
def head(request: pytest.FixtureRequest) -> FilmHead:
    torch.manual_seed(0)
    return build_film(SHAPES, **{"layers": ["last"], **VARIANTS[request.param]})


def test_it_learns_eight_masks_by_heart() -> None:
    torch.manual_seed(0)
    shapes = FeatureShapes({"last": (8, 8, 16)}, token_width=12, pooled_width=10)
    head = build_film(shapes, dim=32, num_heads=4, upsample=4)
    assert overfit(head, make_inputs(shapes), rate=3e-3) > 0.95


def torch_layer_of(layer: DecoderLayer, dim: int, num_heads: int) -> nn.TransformerDecoderLayer:
    """torch's own decoder layer with the weights of ours; a parameter of ours without a place in it is an error."""
    weights: dict[str, Tensor] = dict(layer.state_dict())
    renamed: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        query, memory = (weights.pop(f"memory_attention.to_{part}.{kind}") for part in ("query", "memory"))
        renamed[f"multihead_attn.in_proj_{kind}"] = torch.cat([query, memory])
    places = {
        "self_attention": "self_attn",
        "self_norm": "norm1",
        "memory_attention.to_output": "multihead_attn.out_proj",
        "memory_norm": "norm2",
        "feed_forward.0": "linear1",
        "feed_forward.3": "linear2",
        "feed_forward_norm": "norm3",
    }
    for name, weight in weights.items():
        ours = next(place for place in places if name.startswith(f"{place}."))
        renamed[places[ours] + name.removeprefix(ours)] = weight
    expected = nn.TransformerDecoderLayer(dim, num_heads, dim_feedforward=4 * dim, dropout=0.1, batch_first=True)
    expected.load_state_dict(renamed, strict=True)
    return expected


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_it_says_what_the_formula_says_with_the_decoder_layer_of_torch(residual: bool, training: bool) -> None:
    torch.manual_seed(0)
    head = build_film(SHAPES, layers=["last"], num_heads=4, residual=residual)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    layer = torch_layer_of(head.decoder, 24, 4).train(training)
    head.train(training)
    for module in (*head.modules(), *layer.modules()):  # the same dropout twice cannot be had: none, then
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    inputs = make_inputs(SHAPES)

    memory = inputs.features["last"].flatten(1, 2)[inputs.image_index]
    gamma, beta = (F.linear(inputs.pooled, each.weight, each.bias) for each in (head.film.gamma, head.film.beta))
    conditioned = memory * ((1 + gamma) if residual else gamma)[:, None] + beta[:, None]
    expected = head.to_logits(layer(conditioned, memory)).view(-1, 5, 7)

    torch.testing.assert_close(head(inputs).mask_logits, expected, atol=1e-4, rtol=1e-4)


def test_dropout_acts_in_training_and_nowhere_else() -> None:
    torch.manual_seed(0)
    inputs = make_inputs(SHAPES)
    head = build_film(SHAPES, layers=["last"]).train()
    assert not head(inputs).mask_logits.equal(head(inputs).mask_logits)
    assert head.eval()(inputs).mask_logits.equal(head(inputs).mask_logits)
    still = build_film(SHAPES, layers=["last"], dropout=0.0).train()
    assert still(inputs).mask_logits.equal(still(inputs).mask_logits)


def test_attention_weights_are_dropped_too() -> None:
    torch.manual_seed(0)
    layer = DecoderLayer(dim=16, num_heads=2, dropout=0.5).train()
    tokens, projected = torch.randn(2, 3, 16), layer.memory_attention.project(torch.randn(2, 5, 16))
    assert not layer.memory_attention(tokens, projected).equal(layer.memory_attention(tokens, projected))
    assert layer.self_attention.dropout == 0.5


def test_all_three_branches_of_the_decoder_layer_are_dropped() -> None:
    torch.manual_seed(0)
    layer = DecoderLayer(dim=16, num_heads=2, dropout=0.5).train()
    assert [module.p for module in layer.modules() if isinstance(module, nn.Dropout)] == [0.5, 0.5]
    layer.dropout.p = 1.0
    tokens = torch.randn(2, 3, 16)
    found = layer(tokens, torch.randn(1, 5, 16), torch.zeros(2, dtype=torch.long))
    assert found.equal(layer.feed_forward_norm(layer.memory_norm(layer.self_norm(tokens))))


def test_initial_weights_of_the_memory_attention_are_drawn_as_torch_draws_them() -> None:
    torch.manual_seed(0)
    ours = DecoderLayer(dim=64, num_heads=4, dropout=0.1).memory_attention
    theirs = nn.MultiheadAttention(64, 4)
    drawn = torch.cat([ours.to_query.weight, ours.to_memory.weight])
    assert float(drawn.detach().abs().max()) == pytest.approx(
        float(theirs.in_proj_weight.detach().abs().max()), rel=0.01
    )
    assert float(drawn.detach().std()) == pytest.approx(float(theirs.in_proj_weight.detach().std()), rel=0.05)
    assert not any(projection.bias.any() for projection in (ours.to_query, ours.to_memory, ours.to_output))


def test_what_an_image_remembers_is_projected_once_for_all_its_prompts(head: FilmHead) -> None:
    seen: list[int] = []
    for module in (head.image_projection, head.decoder.memory_attention.to_memory):
        module.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    head.eval()(make_inputs(SHAPES, num_images=3, num_prompts=8))
    assert seen == [3, 3]


def test_its_size_follows_from_its_width() -> None:
    """16 d^2 + 19 d of the decoder layer, 2 (512 d + d) of FiLM, d + 1 of the logits."""
    shapes = FeatureShapes({"last": (14, 14, 768)}, token_width=512, pooled_width=512)
    assert sum(parameter.numel() for parameter in build_film(shapes).parameters()) == 10_240_513
    narrow = build_film(shapes, dim=64)
    assert sum(parameter.numel() for parameter in narrow.parameters()) == 768 * 64 + 64 + 66_752 + 65_664 + 65


def test_several_layers_are_projected_to_the_width_of_the_last() -> None:
    head = build_film(SHAPES, layers=["3", "last"])
    assert isinstance(head.image_projection, nn.Linear)
    assert (head.image_projection.in_features, head.image_projection.out_features) == (40, 24)
    assert isinstance(build_film(SHAPES, layers=["last"]).image_projection, nn.Identity)
    assert build_film(SHAPES, layers="3").layers == ("3",)


def test_without_a_layer_named_it_reads_the_last_that_was_cached() -> None:
    assert build_film(SHAPES).layers == ("coarse",)


@pytest.mark.parametrize("axis", [1, 2])
def test_logits_lie_where_their_tokens_lie(head: FilmHead, axis: int) -> None:
    """No token knows its place: a mirrored grid gives mirrored squares of logits."""
    inputs = make_inputs(SHAPES)
    mirrored = {layer: grid.flip(axis) for layer, grid in inputs.features.items()}
    head.eval()
    squares, found = (
        F.pixel_unshuffle(head(each).mask_logits[:, None], head.upsample)
        for each in (inputs, dataclasses.replace(inputs, features=mirrored))
    )
    torch.testing.assert_close(found, squares.flip(axis + 1), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, squares, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"layers": ["3", "coarse"]}, "different grids"),
        ({"dim": 30}, "a width of 30 cannot be shared by 8 heads"),
        ({"dim": 0}, "dim must be at least 1"),
        ({"num_heads": 0}, "num_heads must be at least 1"),
        ({"upsample": 0}, "upsample must be at least 1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_impossible_arguments_are_refused(arguments: Mapping[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        build_film(SHAPES, **arguments)


def test_a_layer_that_was_not_cached_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown layer 'lst': did you mean 'last'"):
        build_film(SHAPES, layers=["lst"])
