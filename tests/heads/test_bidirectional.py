"""The bidirectional head: the laws of all heads, its parts against torch's, and the figures of the published one."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cache_schema.errors import UsageError
from heads.bidirectional import Attention, BidirectionalHead, FusionLayer, build_bidirectional
from heads.bilstm import BiLSTM
from heads.conv_blocks import make_norm
from heads.feature_pyramid import make_levels
from heads.inputs import FeatureShapes, HeadInputs
from tests.heads.laws import (
    LENGTHS,
    check_export,
    check_gradients_reach_everything,
    check_padding_is_not_seen,
    check_prompts_do_not_see_each_other,
    check_tokens_are_missed_by_who_reads_them,
    make_inputs,
    overfit,
    select,
    sum_of_outputs,
)

STAGES = FeatureShapes(
    {"1": (16, 24, 6), "2": (8, 12, 8), "3": (4, 6, 10), "4": (2, 3, 12)}, token_width=12, pooled_width=10
)
ODD = FeatureShapes({"fine": (11, 9, 6), "coarse": (5, 4, 8), "coarsest": (3, 1, 8)}, token_width=12, pooled_width=10)
BLOCKS = FeatureShapes(dict.fromkeys(("3", "6", "9", "last"), (3, 5, 16)), token_width=12, pooled_width=10)
PUBLISHED = FeatureShapes(
    {"1": (120, 120, 256), "2": (60, 60, 512), "3": (30, 30, 1024), "4": (15, 15, 2048)},
    token_width=768,
    pooled_width=768,
)
SMALL: dict[str, Any] = {"dim": 16, "num_heads": 4, "hidden_dim": 24, "lstm_dim": 5, "stages": [12, 10, 8]}
HEADS: dict[str, tuple[FeatureShapes, dict[str, Any]]] = {
    "as published": (STAGES, {}),
    "all options": (STAGES, {"skips": True, "positions": True, "no_target": True, "norm": "group"}),
    "coarsest level fused": (STAGES, {"fused": -1, "skips": True, "num_layers": 1, "lstm_layers": 1}),
    "odd grids": (ODD, {"skips": True, "num_layers": 2}),
    "one layer of a transformer": (BLOCKS, {"skips": True, "num_layers": 1, "no_target": True}),
    "four layers of a transformer": (BLOCKS, {"layers": ["3", "6", "9", "last"], "skips": True, "num_layers": 1}),
}


def build(name: str, **arguments: Any) -> tuple[BidirectionalHead, FeatureShapes]:
    torch.manual_seed(0)
    shapes, own = HEADS[name]
    return build_bidirectional(shapes, **{**SMALL, **own, **arguments}), shapes


@pytest.fixture(params=HEADS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def with_moved_statistics(head: BidirectionalHead, inputs: HeadInputs) -> BidirectionalHead:
    """Batch norms whose running statistics are no longer 0 and 1."""
    head.train()
    with torch.no_grad():
        head(inputs)
    return head.eval()


def test_prompts_of_a_batch_do_not_see_each_other(name: str) -> None:
    head, shapes = build(name)
    inputs = make_inputs(shapes)
    check_prompts_do_not_see_each_other(with_moved_statistics(head, inputs), inputs)


def test_padding_is_not_seen(name: str) -> None:
    head, shapes = build(name)
    check_padding_is_not_seen(head, make_inputs(shapes), tolerance=0)
    check_tokens_are_missed_by_who_reads_them(head, make_inputs(shapes))


def test_gradients_reach_every_parameter(name: str) -> None:
    head, shapes = build(name, dropout=0.0)
    check_gradients_reach_everything(head, make_inputs(shapes), sum_of_outputs)


def test_it_can_be_exported_for_more_and_longer_prompts_than_it_was_traced_with() -> None:
    head, shapes = build("as published")
    inputs = make_inputs(shapes)
    shorter = select(inputs, [prompt for prompt, length in enumerate(LENGTHS) if length <= 5 and prompt % 3 < 2])
    assert shorter.prompt_tokens.shape[:2] == (6, 5)
    check_export(with_moved_statistics(head, inputs), shorter, inputs)


@pytest.mark.parametrize("name", ["all options", "one layer of a transformer"])
def test_it_can_be_exported_for_a_single_prompt_of_a_single_token(name: str) -> None:
    head, shapes = build(name, lstm_layers=1)
    inputs = make_inputs(shapes)
    check_export(with_moved_statistics(head, inputs), inputs, select(inputs, [LENGTHS.index(1)]))


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_it_learns_eight_masks_by_heart(norm: str) -> None:
    torch.manual_seed(0)
    shapes = FeatureShapes({"2": (8, 12, 8), "3": (4, 6, 10), "4": (2, 3, 12)}, token_width=12, pooled_width=10)
    head = build_bidirectional(
        shapes, **{**SMALL, "dim": 32, "skips": True, "num_layers": 2, "dropout": 0.0, "norm": norm}
    )
    assert overfit(head, make_inputs(shapes), steps=150, rate=4e-3) > 0.95


def test_the_bilstm_says_what_torchs_says_of_packed_sequences() -> None:
    torch.manual_seed(0)
    width, hidden_dim, num_layers = 6, 4, 3
    ours = BiLSTM(width=width, hidden_dim=hidden_dim, num_layers=num_layers).double()
    oracle = nn.LSTM(width, hidden_dim, num_layers, batch_first=True, bidirectional=True).double()
    weights = {}
    for layer in range(num_layers):
        for suffix, side in (("", "forwards"), ("_reverse", "backwards")):
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                weights[f"{side}.{layer}.{kind}_l0"] = oracle.get_parameter(f"{kind}_l{layer}{suffix}")
    ours.load_state_dict(weights)
    lengths = torch.tensor(LENGTHS)
    tokens = torch.randn(len(LENGTHS), max(LENGTHS), width, dtype=torch.float64)
    mask = torch.arange(max(LENGTHS)) < lengths[:, None]
    packed = nn.utils.rnn.pack_padded_sequence(tokens, lengths, batch_first=True, enforce_sorted=False)
    expected, _ = nn.utils.rnn.pad_packed_sequence(oracle(packed)[0], batch_first=True)
    torch.testing.assert_close(ours(tokens, mask), expected, atol=1e-14, rtol=0)


def test_the_bilstm_and_its_gradients_know_nothing_of_padding() -> None:
    torch.manual_seed(0)
    lstm = BiLSTM(width=6, hidden_dim=4, num_layers=2)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    tokens = torch.randn(len(LENGTHS), max(LENGTHS), 6)
    said = []
    for padding in (0.0, torch.nan):
        lstm.zero_grad()
        states = lstm(tokens.masked_fill(~mask[..., None], padding), mask)
        states.square().sum().backward()
        said.append([states, *(parameter.grad for parameter in lstm.parameters())])
    assert all(torch.equal(clean, spoiled) for clean, spoiled in zip(*said, strict=True))


def test_a_fusion_layer_says_what_torchs_attention_says() -> None:
    torch.manual_seed(0)
    dim, num_heads, num_prompts, num_cells, num_words = 16, 4, 3, 10, 5
    layer = FusionLayer(dim=dim, num_heads=num_heads, hidden_dim=24, dropout=0.1).eval()
    vision, words = torch.randn(num_prompts, num_cells, dim), torch.randn(num_prompts, num_words, dim)
    mask = torch.arange(num_words) < torch.tensor([[5], [2], [1]])
    words_oracle, vision_oracle = (as_torchs(attention) for attention in (layer.words_to_vision, layer.vision_to_words))
    told = layer.words_norm(words + words_oracle(words, vision, vision)[0])
    told = layer.words_mlp_norm(told + layer.words_mlp(told))
    seen, weights = vision_oracle(vision, told, told, key_padding_mask=~mask, average_attn_weights=False)
    seen = layer.vision_norm(vision + seen)
    seen = layer.vision_mlp_norm(seen + layer.vision_mlp(seen))
    ours = layer(vision, words, mask)
    for found, expected in zip(ours, (seen, told, weights), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


def as_torchs(attention: Attention) -> nn.MultiheadAttention:
    """The same attention as torch has it, with a bias of the keys of which nothing can be seen."""
    dim = attention.to_query.in_features
    oracle = nn.MultiheadAttention(dim, attention.num_heads, batch_first=True).eval()
    projections = (attention.to_query, attention.to_key, attention.to_value)
    with torch.no_grad():
        for biased in (attention.to_query, attention.to_value, attention.to_output):
            biased.bias.normal_()
        oracle.in_proj_weight.copy_(torch.cat([projection.weight for projection in projections]))
        oracle.in_proj_bias.copy_(torch.cat([attention.to_query.bias, torch.randn(dim), attention.to_value.bias]))
    oracle.out_proj.load_state_dict(attention.to_output.state_dict())
    return oracle


def test_masks_are_as_many_times_finer_than_the_fused_level_as_stages_say() -> None:
    for name, (height, width) in {
        "as published": (32, 48),
        "coarsest level fused": (16, 24),
        "one layer of a transformer": (24, 40),
    }.items():
        head, shapes = build(name)
        assert head(make_inputs(shapes)).mask_logits.shape == (8, height, width)


def test_each_cell_shares_its_attention_among_the_words() -> None:
    head, shapes = build("as published")
    inputs = make_inputs(shapes)
    head.shows_attention = True
    attention = head.eval()(inputs).word_attention
    assert attention is not None
    assert attention.shape == (8, max(LENGTHS), 4, 6)
    torch.testing.assert_close(attention.sum(1), torch.ones(8, 4, 6))
    assert not attention.transpose(0, 1)[~inputs.prompt_mask.T].any()
    assert (attention.transpose(0, 1)[inputs.prompt_mask.T] > 0).all()


def test_what_depends_on_the_image_alone_is_computed_once_for_each_image() -> None:
    head, shapes = build("all options")
    seen: dict[str, list[int]] = {}

    def watch(name: str) -> Any:
        return lambda module, args: seen.setdefault(name, []).append(len(args[0]))

    first = head.fusion[0]
    assert isinstance(first, FusionLayer)
    parts = {
        "refine": head.pyramid.refine[0],
        "cells": head.to_cells,
        "key": first.words_to_vision.to_key,
        "value": first.words_to_vision.to_value,
        "query": first.vision_to_words.to_query,
        "skip": head.decoder.skips[0],
    }
    for name, module in parts.items():
        module.register_forward_pre_hook(watch(name))
    head(make_inputs(shapes, num_images=2, num_prompts=7))
    assert seen == {name: [2] for name in parts}


def test_only_layers_that_count_are_read() -> None:
    assert build("as published")[0].layers == ("3", "4")
    assert build("as published", skips=True)[0].layers == ("1", "2", "3", "4")
    assert build("as published", skips=True, stages=[8])[0].layers == ("2", "3", "4")
    assert build("as published", fused=-1)[0].layers == ("4",)
    assert build("one layer of a transformer")[0].layers == ("last",)
    assert build("four layers of a transformer", skips=False)[0].layers == ("9", "last")


@pytest.mark.parametrize("layer", ["3", "4"])
def test_a_mask_depends_on_every_level_its_prompt_and_its_image(layer: str) -> None:
    head, shapes = build("as published")
    inputs = dataclasses.replace(make_inputs(shapes), image_index=torch.tensor([0, 0, 1, 2, 0, 1, 2, 0]))
    head = with_moved_statistics(head, inputs)
    logits = head(inputs).mask_logits
    assert not torch.allclose(logits[0], logits[1])
    other = {**inputs.features, layer: inputs.features[layer].flip(0)}
    changed = (head(dataclasses.replace(inputs, features=other)).mask_logits - logits).abs().amax((1, 2)) > 0
    assert changed.tolist() == [image != 1 for image in inputs.image_index.tolist()]


def test_mask_and_attention_change_most_where_the_image_does() -> None:
    shapes = FeatureShapes({"3": (10, 24, 8), "4": (5, 12, 8)}, token_width=12, pooled_width=10)
    torch.manual_seed(0)
    head = build_bidirectional(shapes, **SMALL).eval()
    head.shows_attention = True
    inputs = make_inputs(shapes, num_images=1, num_prompts=3)
    corner = inputs.features["3"].clone()
    corner[:, 0, 23] += 10
    before, after = head(inputs), head(dataclasses.replace(inputs, features={**inputs.features, "3": corner}))
    assert before.word_attention is not None
    assert after.word_attention is not None
    cells = (after.word_attention - before.word_attention).abs().sum((0, 1))
    pixels = (after.mask_logits - before.mask_logits).abs().sum(0)
    for change, scale in ((cells, 1), (pixels, 8)):
        row, column = divmod(int(change.argmax()), change.shape[1])
        assert row < 4 * scale
        assert column >= 20 * scale


def test_skips_take_up_the_finer_levels() -> None:
    head, shapes = build("as published", skips=True)
    inputs = make_inputs(shapes)
    logits = head.eval()(inputs).mask_logits
    for layer in ("1", "2"):
        other = {**inputs.features, layer: inputs.features[layer] + 1}
        assert not torch.allclose(head(dataclasses.replace(inputs, features=other)).mask_logits, logits)


def test_a_stage_takes_up_the_level_of_its_own_size() -> None:
    head, shapes = build("as published", skips=True)
    sizes: dict[str, list[torch.Size]] = {"stage": [], "skip": []}
    for kind, modules in (("stage", head.decoder.stages), ("skip", head.decoder.skips)):
        for module in modules:
            module.register_forward_hook(lambda module, args, output, kind=kind: sizes[kind].append(output.shape[1:]))
    head(make_inputs(shapes))
    assert sizes["skip"] == sizes["stage"][:2]


def test_only_positions_tell_the_cells_of_an_even_image_apart() -> None:
    shapes = FeatureShapes({"2": (16, 16, 8), "3": (8, 8, 8)}, token_width=12, pooled_width=10)
    inputs = make_inputs(shapes)
    inputs = dataclasses.replace(inputs, features={name: torch.ones_like(x) for name, x in inputs.features.items()})

    def spread(positions: bool) -> Tensor:
        torch.manual_seed(0)
        head = build_bidirectional(shapes, **SMALL, positions=positions).eval()
        head.shows_attention = True
        attention = head(inputs).word_attention
        assert attention is not None
        return attention[..., 5:-5, 5:-5].flatten(2).std(2).max()

    assert spread(positions=False) < 1e-6
    assert spread(positions=True) > 1e-4


def test_no_target_asks_the_pooled_prompt_and_the_image_and_is_left_out_by_default() -> None:
    head, shapes = build("as published", no_target=True)
    inputs = make_inputs(shapes)
    head = with_moved_statistics(head, inputs)
    said = head(inputs).no_target_logits
    assert said is not None
    assert said.shape == (8,)
    pooled = head(dataclasses.replace(inputs, pooled=inputs.pooled + 1)).no_target_logits
    image = head(dataclasses.replace(inputs, image_index=inputs.image_index.flip(0))).no_target_logits
    assert not torch.allclose(said, pooled)
    assert not torch.allclose(said, image)
    assert build("as published")[0](inputs).no_target_logits is None


def test_it_runs_in_mixed_precision() -> None:
    head, shapes = build("all options")
    inputs = make_inputs(shapes)
    full = head.eval()(inputs).mask_logits
    with torch.autocast("cpu", torch.bfloat16):
        half = head(inputs).mask_logits
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).abs().max() < 0.1 * full.abs().max()


def test_group_norm_has_up_to_eight_groups() -> None:
    norms = [make_norm("group", channels) for channels in (128, 12, 10, 5)]
    assert [norm.num_groups for norm in norms if isinstance(norm, nn.GroupNorm)] == [8, 4, 2, 1]


def test_levels_of_a_pyramid_may_be_named_in_any_order() -> None:
    assert [level.layer for level in make_levels(STAGES, ["4", "2", "3"])] == ["2", "3", "4"]


def test_levels_of_one_grid_are_made_from_fine_to_coarse() -> None:
    assert [(level.layer, level.stride) for level in make_levels(BLOCKS)] == [
        ("last", 0.25),
        ("last", 0.5),
        ("last", 1),
        ("last", 2),
    ]
    assert [level.layer for level in make_levels(BLOCKS, ["3", "6", "9", "last"])] == ["3", "6", "9", "last"]
    sizes = []
    head, shapes = build("one layer of a transformer")
    for lateral in head.pyramid.lateral:
        lateral.register_forward_hook(lambda module, args, output: sizes.append(tuple(output.shape[2:])))
    head(make_inputs(shapes))
    assert sizes == [(12, 20), (6, 10), (3, 5), (2, 3)]


def test_the_published_configuration_keeps_its_size() -> None:
    # The system publishes the size of the whole model alone, 145 M with encoders. These are counted by hand:
    lateral, convolution, norm = (1024 + 2048) * 256 + 2 * 256, 9 * 256 * 256, 2 * 256
    lstm = sum(2 * 4 * 192 * (width + 192 + 2) for width in (768, 384))
    attention = 4 * 256 * 256 + 3 * 256
    mlp = 2 * 256 * 1024 + 1024 + 256
    channels = (256, 128, 64, 32, 16)
    stages = sum(4 * given * wanted + 18 * wanted * wanted + 6 * wanted for given, wanted in pairwise(channels))
    expected = {
        "pyramid": lateral + (convolution + 256) + 2 * (convolution + norm),
        "to_cells": 256 * 256 + norm,
        "words": lstm + 384 * 256 + 256 + norm,
        "fusion": 3 * (2 * attention + 2 * mlp + 4 * norm),
        "decoder": stages + (9 * 16 * 16 + 2 * 16) + (16 + 1) + (9 * 16 + 16) + (16 + 1),
    }
    head = build_bidirectional(PUBLISHED)
    assert {name: num_parameters(child) for name, child in head.named_children()} == expected
    assert num_parameters(head) == 10_395_010
    assert num_parameters(build_bidirectional(PUBLISHED, no_target=True)) == 10_855_555
    assert num_parameters(build_bidirectional(PUBLISHED, skips=True)) == 14_182_978


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("shapes", "arguments", "message"),
    [
        (STAGES, {"fused": 4}, "there are 4 levels; fused is 4"),
        (STAGES, {"fused": -5}, "there are 4 levels; fused is -5"),
        (STAGES, {"fused": 0, "skips": True}, "which is the finest; fuse another one"),
        (STAGES, {"dim": 18}, "a width of 18 cannot be shared by 4 heads"),
        (STAGES, {"dim": 6, "num_heads": 2, "positions": True}, "multiple of 4"),
        (STAGES, {"stages": []}, "the number of stages must be at least 1"),
        (STAGES, {"stages": [8, 0]}, "a stage's channels must be at least 1"),
        (STAGES, {"lstm_layers": 0}, "lstm_layers must be at least 1"),
        (STAGES, {"num_layers": 0}, "num_layers must be at least 1"),
        (STAGES, {"layers": ["5"]}, "unknown layer '5'"),
        (STAGES, {"norm": "layer"}, "unknown norm 'layer'"),
        (BLOCKS, {"layers": ["3", "last"]}, r"layers 3 \(3 x 5\), last \(3 x 5\) are no pyramid"),
        (FeatureShapes({"a": (4, 4, 8), "b": (4, 4, 8), "c": (2, 2, 8)}, 12, 10), {}, "are no pyramid"),
        (FeatureShapes({"a": (4, 2, 8), "b": (2, 4, 8)}, 12, 10), {}, "are no pyramid"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_remedy(
    shapes: FeatureShapes, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, UsageError), match=message):
        build_bidirectional(shapes, **{**SMALL, **arguments})
