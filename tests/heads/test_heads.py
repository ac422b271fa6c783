"""Heads on their own: shapes, what they may and may not depend on, and the figures of the systems they follow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cache_schema.errors import UsageError
from heads import HEADS, build_head, head_arguments
from heads.cross_attention import CrossAttentionHead, sine_positions
from heads.inputs import FeatureShapes, HeadInputs

SHAPES = FeatureShapes({"3": (4, 6, 16), "last": (4, 6, 16)}, token_width=12, pooled_width=10)
ARGUMENTS = {
    "linear": {},
    "cross_attention": {
        "dim": 8,
        "inner_dim": 8,
        "num_heads": 2,
        "hidden_dim": 16,
        "image_depth": 1,
        "depth": 2,
        "self_attention": True,
        "upsample": 2,
    },
}


def make_inputs(num_images: int = 2, image_index: tuple[int, ...] = (0, 1, 1), seed: int = 0) -> HeadInputs:
    random = torch.Generator().manual_seed(seed)
    num_prompts = len(image_index)
    lengths = torch.tensor([3, 5, 2] * num_prompts)[:num_prompts]
    return HeadInputs(
        features={layer: torch.randn(num_images, *grid, generator=random) for layer, grid in SHAPES.grids.items()},
        cls={layer: torch.randn(num_images, grid[2], generator=random) for layer, grid in SHAPES.grids.items()},
        prompt_tokens=torch.randn(num_prompts, 5, SHAPES.token_width, generator=random),
        prompt_mask=torch.arange(5) < lengths[:, None],
        pooled=torch.randn(num_prompts, SHAPES.pooled_width, generator=random),
        image_index=torch.tensor(image_index),
    )


def select_prompt(inputs: HeadInputs, prompt: int) -> HeadInputs:
    image = int(inputs.image_index[prompt])
    return HeadInputs(
        features={layer: grid[image : image + 1] for layer, grid in inputs.features.items()},
        cls={layer: token[image : image + 1] for layer, token in inputs.cls.items()},
        prompt_tokens=inputs.prompt_tokens[prompt : prompt + 1],
        prompt_mask=inputs.prompt_mask[prompt : prompt + 1],
        pooled=inputs.pooled[prompt : prompt + 1],
        image_index=torch.zeros(1, dtype=torch.long),
    )


@pytest.fixture(params=sorted(ARGUMENTS))
def head(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_head(request.param, SHAPES, ARGUMENTS[request.param]).eval()


def test_every_head_is_tested_here_or_in_a_file_of_its_own() -> None:
    files = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    assert set(HEADS) <= set(ARGUMENTS) | files


def test_a_head_gives_one_mask_for_each_prompt(head: torch.nn.Module) -> None:
    logits = head(make_inputs()).mask_logits
    scale = getattr(head, "upsample", 1)
    assert logits.shape == (3, 4 * scale, 6 * scale)


def test_prompts_that_share_a_batch_do_not_see_each_other(head: torch.nn.Module) -> None:
    inputs = make_inputs()
    together = head(inputs).mask_logits
    for prompt in range(3):
        torch.testing.assert_close(together[prompt : prompt + 1], head(select_prompt(inputs, prompt)).mask_logits)


def test_padding_of_a_prompt_changes_nothing(head: torch.nn.Module) -> None:
    inputs = make_inputs()
    before = head(inputs).mask_logits
    inputs.prompt_tokens[~inputs.prompt_mask] = 1e3
    torch.testing.assert_close(head(inputs).mask_logits, before)


def test_a_mask_depends_on_its_prompt_and_on_its_image(head: torch.nn.Module) -> None:
    inputs = make_inputs(image_index=(0, 0, 1))
    logits = head(inputs).mask_logits
    assert not torch.allclose(logits[0], logits[1])
    swapped = HeadInputs(
        inputs.features, inputs.cls, inputs.prompt_tokens, inputs.prompt_mask, inputs.pooled, torch.tensor([1, 0, 1])
    )
    assert not torch.allclose(head(swapped).mask_logits[0], logits[0])


def test_the_image_stage_runs_once_for_each_image() -> None:
    head = build_head("cross_attention", SHAPES, ARGUMENTS["cross_attention"])
    seen = []
    head.image_mixing[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    head(make_inputs(num_images=2, image_index=(0, 1, 1, 0, 1, 1, 0)))
    assert seen == [2]


def test_gradients_are_the_same_to_the_last_bit_every_time() -> None:
    # Indexing with a tensor sums its gradients in whatever order the threads come: an exact resume would be lost.
    shapes = FeatureShapes({"last": (32, 32, 16)}, token_width=12, pooled_width=10)
    torch.manual_seed(0)
    head = build_head("cross_attention", shapes, {"dim": 64, "inner_dim": 8, "num_heads": 2, "hidden_dim": 8})
    inputs = HeadInputs(
        features={"last": torch.randn(2, 32, 32, 16)},
        cls={"last": torch.randn(2, 16)},
        prompt_tokens=torch.randn(32, 2, 12),
        prompt_mask=torch.ones(32, 2, dtype=torch.bool),
        pooled=torch.randn(32, 10),
        image_index=torch.arange(32) % 2,
    )

    def gradient() -> torch.Tensor:
        head.zero_grad()
        head(inputs).mask_logits.square().mean().backward()
        return head.image_projection.weight.grad.clone()

    first = gradient()
    assert all(torch.equal(gradient(), first) for _ in range(20))


def test_the_default_cross_attention_has_jurassiglips_fusion_and_head() -> None:
    shapes = FeatureShapes({"last": (32, 32, 384)}, token_width=768, pooled_width=768)
    head = build_head("cross_attention", shapes, {})
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in head.named_children()}
    assert counts.pop("prompt_projection") == 768 * 384
    assert sum(counts.values()) == 1_378_817


def test_without_self_attention_a_token_knows_nothing_of_its_neighbours() -> None:
    torch.manual_seed(0)
    head = CrossAttentionHead(image_width=16, token_width=12, layers=["last"], inner_dim=16)
    inputs = make_inputs(num_images=1, image_index=(0,))
    before = head(inputs).mask_logits
    inputs.features["last"][0, 0, 0] += 1
    after = head(inputs).mask_logits
    assert not torch.allclose(after[0, 0, 0], before[0, 0, 0])
    torch.testing.assert_close(after[0, 1:], before[0, 1:])


def test_each_token_gives_a_square_of_logits_in_its_own_place() -> None:
    torch.manual_seed(0)
    head = CrossAttentionHead(image_width=16, token_width=12, layers=["last"], inner_dim=16, upsample=3)
    inputs = make_inputs(num_images=1, image_index=(0,))
    before = head(inputs).mask_logits
    inputs.features["last"][0, 2, 5] += 1
    changed = (head(inputs).mask_logits != before)[0]
    assert changed[6:9, 15:18].all()
    assert changed.sum() == 9


def test_sine_positions_tell_every_cell_from_every_other() -> None:
    positions = sine_positions(12, 20, 32)
    distances = torch.cdist(positions, positions) + torch.eye(240) * 1e3
    assert distances.min() > 0.05


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("liner", {}, "did you mean 'linear'"),
        ("cross_attention", {"widht": 3}, "widht"),
        ("cross_attention", {"inner_dim": 10, "num_heads": 4}, "cannot be shared by 4 heads"),
        ("linear", {"layer": "7"}, "7"),
    ],
)
def test_a_head_that_cannot_be_built_is_the_users_mistake(
    name: str, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        build_head(name, SHAPES, arguments)


def test_layers_of_different_grids_are_refused_by_name() -> None:
    shapes = FeatureShapes({"1": (4, 4, 8), "2": (2, 2, 8)}, 12, 10)
    with pytest.raises(UsageError, match="layers 1, 2 have different grids"):
        build_head("cross_attention", shapes, {"layers": ["1", "2"]})


def test_the_arguments_of_a_head_are_known_by_name() -> None:
    assert "self_attention" in head_arguments("cross_attention")
    assert "shapes" not in head_arguments("cross_attention")
