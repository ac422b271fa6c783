"""The two-way head: the laws of every head, the figures of the systems it follows, and how text enters."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from heads.fpn_neck import FpnNeck
from heads.inputs import FeatureShapes, HeadInputs
from heads.sam_decoder import SamDecoder
from heads.two_way import TwoWayHead, build_two_way
from tests.heads.laws import (
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

VIT = FeatureShapes({"3": (5, 7, 16), "last": (5, 7, 16)}, token_width=12, pooled_width=10)
PYRAMID = FeatureShapes({"c3": (6, 8, 8), "c4": (3, 4, 12), "c5": (2, 2, 16)}, token_width=12, pooled_width=10)
SMALL = {"dim": 32, "mlp_dim": 48, "num_heads": 4}
HEADS: dict[str, tuple[FeatureShapes, dict[str, Any]]] = {
    "pooled": (VIT, {}),
    "tokens": (VIT, {"text": "tokens", "depth": 2, "layers": ["last"]}),
    "both, no target": (VIT, {"text": "both", "no_target": True, "num_mask_tokens": 4}),
    "pyramid": (PYRAMID, {"text": "tokens", "depth": 1, "no_target": True}),
}


def build(shapes: FeatureShapes = VIT, **arguments: Any) -> TwoWayHead:
    torch.manual_seed(0)
    return build_two_way(shapes, **{**SMALL, **arguments}).eval()


def num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(params=HEADS)
def case(request: pytest.FixtureRequest) -> tuple[TwoWayHead, HeadInputs, HeadInputs]:
    """A head, inputs for it, and inputs of other numbers of images, prompts and tokens."""
    shapes, arguments = HEADS[request.param]
    return build(shapes, **arguments), make_inputs(shapes), make_inputs(shapes, num_images=2, num_prompts=5, seed=1)


def test_prompts_of_a_batch_do_not_see_each_other(case: tuple[TwoWayHead, HeadInputs, HeadInputs]) -> None:
    check_prompts_do_not_see_each_other(case[0], case[1])


def test_padding_is_not_seen(case: tuple[TwoWayHead, HeadInputs, HeadInputs]) -> None:
    check_padding_is_not_seen(case[0], case[1])
    check_tokens_are_missed_by_who_reads_them(case[0], case[1])


def test_gradients_reach_every_parameter(case: tuple[TwoWayHead, HeadInputs, HeadInputs]) -> None:
    check_gradients_reach_everything(case[0], case[1], sum_of_outputs)


def test_a_head_can_be_exported_for_any_number_of_prompts(case: tuple[TwoWayHead, HeadInputs, HeadInputs]) -> None:
    check_export(*case)


def test_masks_have_four_times_the_finest_grid(case: tuple[TwoWayHead, HeadInputs, HeadInputs]) -> None:
    head, inputs, _ = case
    grids = [inputs.features[layer].shape[1:3] for layer in head.layers]
    assert head(inputs).mask_logits.shape == (8, 4 * max(h for h, _ in grids), 4 * max(w for _, w in grids))


@pytest.mark.parametrize("arguments", [{}, {"text": "tokens", "depth": 2}], ids=["pooled", "tokens"])
def test_it_learns_eight_masks_by_heart(arguments: dict[str, Any]) -> None:
    shapes = FeatureShapes({"3": (8, 8, 16), "last": (8, 8, 16)}, token_width=12, pooled_width=10)
    assert overfit(build(shapes, **arguments), make_inputs(shapes), steps=150, rate=3e-3) > 0.95


def test_the_decoder_has_sams_parameters_but_those_of_the_masks_it_does_not_draw() -> None:
    decoder = SamDecoder(depth=2, num_mask_tokens=4)
    transformer = [decoder.blocks, decoder.final_attention, decoder.final_norm]
    assert num_parameters(decoder.blocks[0]) == num_parameters(decoder.blocks[1]) == 1_579_520
    assert sum(map(num_parameters, transformer)) == 3_291_264
    other_masks = 3 * num_parameters(decoder.hyper) + 3 * (256 + 1)  # hyper-MLPs, rows of the IoU head
    assert num_parameters(decoder) == 3_638_145
    assert num_parameters(decoder) + other_masks == 4_058_340


def test_the_default_head_has_the_size_of_promptseg() -> None:
    shapes = FeatureShapes(dict.fromkeys(("3", "6", "9", "11"), (16, 16, 768)), token_width=512, pooled_width=512)
    head = build_two_way(shapes)
    assert head.layers == ("3", "6", "9", "11")
    # A block more and three mask tokens fewer than SAM; 9.35 million where about 9.3 are published.
    assert num_parameters(head.decoder) == 3_638_145 + 1_579_520 - 3 * 256
    assert num_parameters(head.neck) == 4_002_816
    assert num_parameters(head.pooled_projection) == 512 * 256 + 256
    assert num_parameters(head) == 9_351_041


def test_what_depends_on_the_image_alone_runs_once_for_each_image() -> None:
    head, rows = build(depth=2), {}

    def watch(name: str, module: torch.nn.Module) -> None:
        module.register_forward_hook(lambda module, args, output: rows.update({name: len(output)}))

    watch("neck", head.neck)
    for index, block in enumerate(head.decoder.blocks):
        watch(f"keys {index}", block.to_image.to_key)
        watch(f"values {index}", block.to_image.to_value)
        watch(f"queries {index}", block.from_image.to_query)
    head(make_inputs(VIT, num_images=2, num_prompts=7))
    once = {"neck": 2, "keys 0": 2, "values 0": 2, "queries 0": 2}
    assert rows == {**once, "keys 1": 7, "values 1": 7, "queries 1": 7}


def test_prompts_need_not_come_in_the_order_of_their_images() -> None:
    head, inputs = build(), make_inputs(VIT)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 4, 3])
    shuffled = select(inputs, order.tolist())
    torch.testing.assert_close(head(shuffled).mask_logits, head(inputs).mask_logits[order], atol=1e-5, rtol=1e-5)


def test_the_length_of_the_pooled_vector_says_nothing() -> None:
    head, inputs = build(), make_inputs(VIT)
    longer = dataclasses.replace(inputs, pooled=inputs.pooled * 50)
    torch.testing.assert_close(head(longer).mask_logits, head(inputs).mask_logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "reads"), [("pooled", {"pooled"}), ("tokens", {"tokens"}), ("both", {"pooled", "tokens"})]
)
def test_text_enters_as_it_was_asked_to(text: str, reads: set[str]) -> None:
    head, inputs = build(text=text), make_inputs(VIT)
    other = make_inputs(VIT, seed=1)
    changed = {
        "pooled": dataclasses.replace(inputs, pooled=other.pooled),
        "tokens": dataclasses.replace(inputs, prompt_tokens=other.prompt_tokens),
    }
    before = head(inputs).mask_logits
    assert {name for name, new in changed.items() if not torch.equal(head(new).mask_logits, before)} == reads


def test_not_even_a_nan_behind_a_prompt_is_seen() -> None:
    head, inputs = build(text="both"), make_inputs(VIT)
    spoiled = inputs.prompt_tokens.masked_fill(~inputs.prompt_mask[..., None], torch.nan)
    assert torch.equal(head(dataclasses.replace(inputs, prompt_tokens=spoiled)).mask_logits, head(inputs).mask_logits)


@pytest.mark.parametrize("text", ["tokens", "both"])
def test_each_word_looks_at_the_whole_image_and_padding_at_nothing(text: str) -> None:
    head, inputs = build(text=text), make_inputs(VIT)
    head.shows_attention = True
    seen = head(inputs).word_attention
    assert seen.shape == (8, 7, 5, 7)
    torch.testing.assert_close(seen.sum((2, 3)), inputs.prompt_mask.float())
    assert seen[0, 0].std() > 0


def test_word_attention_is_that_of_the_words_and_a_mean_over_blocks() -> None:
    head, inputs = build(text="both", no_target=True, depth=2), make_inputs(VIT)
    head.shows_attention = True
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        original = type(head.decoder.final_attention).look

        def look(self: Any, tokens: Any, image: Any, *, weigh: bool) -> Any:
            result = original(self, tokens, image, weigh=weigh)
            seen.append(result[1])
            return result

        patch.setattr(type(head.decoder.final_attention), "look", look)
        found = head(inputs).word_attention
    assert len(seen) == 3
    own = 3 + 1  # IoU, mask and no-target token, and the pooled prompt
    expected = torch.stack(seen).mean(0)[:, own:].unflatten(2, (5, 7)) * inputs.prompt_mask[:, :, None, None]
    torch.testing.assert_close(found, expected)


def test_a_pooled_prompt_has_no_words_to_show() -> None:
    head = build()
    head.shows_attention = True
    assert head(make_inputs(VIT)).word_attention is None


def test_there_is_a_no_target_logit_only_where_it_was_asked_for() -> None:
    inputs = make_inputs(VIT)
    assert build()(inputs).no_target_logits is None
    assert build(no_target=True)(inputs).no_target_logits.shape == (8,)
    assert build()(inputs).iou.shape == (8,)


def test_each_answer_comes_from_its_own_token() -> None:
    head, inputs, tokens = build(no_target=True, num_mask_tokens=2), make_inputs(VIT), []
    head.decoder.final_norm.register_forward_hook(lambda module, args, output: tokens.append(output))
    outputs = head(inputs)
    torch.testing.assert_close(outputs.iou, head.decoder.iou_head(tokens[0][:, 0]).flatten())
    torch.testing.assert_close(outputs.no_target_logits, head.decoder.no_target_head(tokens[0][:, 3]).flatten())


def test_the_image_is_seen_in_its_places() -> None:
    head, inputs = build(), make_inputs(VIT)
    upside_down = dataclasses.replace(inputs, features={name: grid.flip(1) for name, grid in inputs.features.items()})
    flipped = head(upside_down).mask_logits.flip(1)
    assert not torch.allclose(flipped, head(inputs).mask_logits, atol=1e-3)


def test_the_neck_brings_every_level_to_the_finest_grid() -> None:
    torch.manual_seed(0)
    neck = FpnNeck(grids=list(PYRAMID.grids.values()), dim=16)
    inputs = list(make_inputs(PYRAMID).features.values())
    image = neck(inputs)
    assert image.shape == (3, 16, 6, 8)
    for level in range(3):
        others = [grid + 1 if index == level else grid for index, grid in enumerate(inputs)]
        assert not torch.allclose(neck(others), image), f"level {level} is not read"


def test_a_trained_head_comes_back_without_the_checkpoint_it_started_from() -> None:
    head, inputs = build(text="both", no_target=True), make_inputs(VIT)
    torch.manual_seed(9)
    again = build_two_way(VIT, **SMALL, text="both", no_target=True).eval()
    assert not torch.allclose(again(inputs).mask_logits, head(inputs).mask_logits)
    again.load_state_dict(head.state_dict(), strict=True)
    assert torch.equal(again(inputs).mask_logits, head(inputs).mask_logits), "positions are weights too"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth must be at least 1"),
        ({"num_mask_tokens": 0}, "num_mask_tokens must be at least 1"),
        ({"text": "token"}, "did you mean 'tokens'"),
        ({"dim": 20}, "multiple of it; got 20"),
        ({"dim": 4}, "multiple of it; got 4"),
        ({"dim": 40, "num_heads": 8}, "an inner width of 20 cannot be shared by 8 heads"),
        ({"layers": ["7"]}, "unknown layer '7'"),
    ],
)
def test_a_head_that_cannot_be_built_says_why(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**arguments)
