"""SAM's decoder beside that of transformers with the same weights, and what is loaded from a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SamConfig, SamModel

from cache_schema.errors import UsageError
from heads.inputs import FeatureShapes
from heads.sam_decoder import FourierPositions, ProjectedAttention, SamDecoder
from heads.sam_weights import SamReport, load_sam
from heads.two_way import TwoWayHead, build_two_way

SHAPES = FeatureShapes({"last": (3, 5, 16)}, token_width=12, pooled_width=10)
SMALL = {"dim": 32, "mlp_dim": 48}
AS_SAM = {**SMALL, "depth": 2, "num_mask_tokens": 4}
TOLERANCE = 1e-4


def make_sam(dim: int = 32, mlp_dim: int = 48, **decoder: Any) -> SamModel:
    """A SAM with an image encoder of nothing and random weights, biases and norms everywhere."""
    torch.manual_seed(3)
    vision = {
        "hidden_size": dim,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "global_attn_indexes": [],
        "image_size": 64,
        "mlp_dim": 8,
        "num_pos_feats": dim // 2,
        "output_channels": dim,
        "scale": 1.0,
    }
    config = SamConfig(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": dim, "image_size": 64, "image_embedding_size": 4},
        mask_decoder_config={"hidden_size": dim, "mlp_dim": mlp_dim, "iou_head_hidden_dim": dim, **decoder},
    )
    model = SamModel(config).eval()
    with torch.no_grad():
        for parameter in model.mask_decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if dim < 256 else 0.1))
    return model


@pytest.fixture(scope="module")
def sam() -> SamModel:
    return make_sam()


@pytest.fixture(scope="module")
def checkpoint(sam: SamModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "sam"
    sam.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may harm."""
    return Path(shutil.copytree(checkpoint, tmp_path / "sam"))


def load(folder: Path, **arguments: Any) -> tuple[TwoWayHead, SamReport]:
    torch.manual_seed(0)
    head = build_two_way(SHAPES, initial=str(folder), **{**SMALL, **arguments}).eval()
    assert head.initial_report is not None
    return head, head.initial_report


def check_against_sam(
    decoder: SamDecoder, sam: SamModel, num_images: int, prompts_each: int, tolerance: float = TOLERANCE
) -> tuple[float, float]:
    """Both decoders on the same noise, on a grid that is not square; the greatest differences of masks and scores."""
    generator = torch.Generator().manual_seed(1)
    dim, height, width, num_tokens = decoder.iou_token.shape[1], 6, 9, 3
    image = torch.randn(num_images, dim, height, width, generator=generator)
    positions = torch.randn(height * width, dim, generator=generator)
    prompt = torch.randn(num_images, prompts_each, num_tokens, dim, generator=generator)
    with torch.no_grad():
        masks, scores = sam.mask_decoder(
            image_embeddings=image,
            image_positional_embeddings=positions.T.reshape(1, dim, height, width).repeat(num_images, 1, 1, 1),
            sparse_prompt_embeddings=prompt,
            dense_prompt_embeddings=torch.zeros_like(image),
            multimask_output=False,
        )
        index = torch.arange(num_images).repeat_interleave(prompts_each)
        found = decoder(image, positions, prompt.flatten(0, 1), None, index)
        weighed = decoder(image, positions, prompt.flatten(0, 1), None, index, weigh=True)
    masks, scores = masks.flatten(0, 2), scores.flatten()
    assert masks.std() > 0.05, "masks of nothing prove nothing"
    assert scores.std() > 1e-3
    assert found.attention is None
    torch.testing.assert_close(weighed.mask_logits, found.mask_logits, atol=tolerance, rtol=0)
    return float((found.mask_logits - masks).abs().max()), float((found.iou - scores).abs().max())


@pytest.mark.parametrize(("num_images", "prompts_each"), [(1, 5), (4, 1), (3, 2)])
def test_the_decoder_says_what_transformers_says(
    sam: SamModel, checkpoint: Path, num_images: int, prompts_each: int
) -> None:
    head, _ = load(checkpoint, depth=2, num_mask_tokens=4)
    assert max(check_against_sam(head.decoder, sam, num_images, prompts_each)) <= TOLERANCE


def test_a_decoder_of_sams_size_says_what_transformers_says(tmp_path: Path) -> None:
    sam = make_sam(dim=256, mlp_dim=2048)
    sam.save_pretrained(tmp_path)
    head, _ = load(tmp_path, dim=256, mlp_dim=2048, depth=2, num_mask_tokens=4)
    assert max(check_against_sam(head.decoder, sam, 1, 4)) <= TOLERANCE
    assert max(check_against_sam(head.decoder, sam, 3, 1)) <= TOLERANCE
    assert sum(parameter.numel() for parameter in sam.mask_decoder.parameters()) == 4_058_340


def test_the_epsilon_of_the_norms_is_the_one_that_is_asked_for(tmp_path: Path) -> None:
    sam = make_sam(layer_norm_eps=0.3)
    sam.save_pretrained(tmp_path)
    same, _ = load(tmp_path, depth=2, num_mask_tokens=4, norm_eps=0.3)
    other, _ = load(tmp_path, depth=2, num_mask_tokens=4)
    assert max(check_against_sam(same.decoder, sam, 2, 2)) <= TOLERANCE
    assert max(check_against_sam(other.decoder, sam, 2, 2)) > 100 * TOLERANCE


def test_positions_are_those_of_sam(sam: SamModel, checkpoint: Path) -> None:
    head, _ = load(checkpoint)
    with torch.no_grad():
        expected = sam.get_image_wide_positional_embeddings()[0].flatten(1).T
    torch.testing.assert_close(head.positions(4, 4), expected, atol=1e-5, rtol=0)


def test_positions_of_a_wide_grid_are_those_of_its_cells_centres(sam: SamModel, checkpoint: Path) -> None:
    head, _ = load(checkpoint)
    centres = [[[(x + 0.5) / 5, (y + 0.5) / 3] for x in range(5)] for y in range(3)]
    with torch.no_grad():
        expected = sam.shared_image_embedding(torch.tensor(centres)).flatten(0, 1)
    torch.testing.assert_close(head.positions(3, 5), expected, atol=1e-5, rtol=0)


def test_autocast_does_not_round_positions() -> None:
    positions = FourierPositions(16)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = positions(30, 40)
    assert torch.equal(rounded, positions(30, 40))


def test_attention_is_that_of_torch_and_weights_are_a_mean_over_heads() -> None:
    torch.manual_seed(0)
    ours = ProjectedAttention(dim=16, inner_dim=16, num_heads=4)
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    projections = (ours.to_query, ours.to_key, ours.to_value)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([projection.weight for projection in projections]))
        theirs.in_proj_bias.copy_(torch.cat([projection.bias for projection in projections]))
        theirs.out_proj.load_state_dict(ours.to_output.state_dict())
        tokens, image = torch.randn(2, 3, 16), torch.randn(2, 7, 16)
        mask = torch.arange(7) < torch.tensor([[7], [4]])
        projected = (ours.to_query(tokens), ours.to_key(image), ours.to_value(image))
        expected, weights = theirs(tokens, image, image)
        torch.testing.assert_close(ours(*projected), expected)
        torch.testing.assert_close(ours.with_weights(*projected), (expected, weights))
        torch.testing.assert_close(ours(*projected, mask), theirs(tokens, image, image, key_padding_mask=~mask)[0])


def test_the_report_accounts_for_every_weight(checkpoint: Path) -> None:
    head, report = load(checkpoint, depth=3, no_target=True)
    in_checkpoint = load_file(checkpoint / "model.safetensors")
    decoder = {name for name in in_checkpoint if name.startswith("mask_decoder.")}
    assert set(report.loaded) | set(report.copied) | set(report.fresh) == set(head.state_dict())
    assert len(report.loaded) + len(report.copied) + len(report.fresh) == len(head.state_dict())
    assert decoder == set(report.left) | {name for name in report.loaded.values() if name in decoder}
    assert all(name.startswith("mask_decoder.output_hypernetworks_mlps.") for name in report.left)
    assert len(report.left) == 3 * 6
    assert {name.split(".")[0] for name in report.fresh} == {"neck", "pooled_projection", "decoder"}
    assert {name for name in report.fresh if name.startswith("decoder.")} == {
        "decoder.no_target_token",
        *(f"decoder.no_target_head.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")),
    }
    assert report.first_rows == {
        "decoder.mask_tokens": (1, 4),
        "decoder.iou_head.4.weight": (1, 4),
        "decoder.iou_head.4.bias": (1, 4),
    }
    assert report.num_others == len(in_checkpoint) - len(decoder) - 1
    json.dumps(report.to_dict())
    assert f"{len(report.loaded)} tensors loaded" in report.summary()
    assert "decoder.mask_tokens: 1 of 4" in report.summary()


def test_what_is_loaded_is_the_checkpoints_and_a_third_block_is_a_copy_of_the_second(checkpoint: Path) -> None:
    head, report = load(checkpoint, depth=3)
    state, in_checkpoint = head.state_dict(), load_file(checkpoint / "model.safetensors")
    for name, theirs in {**report.loaded, **report.copied}.items():
        assert torch.equal(state[name], in_checkpoint[theirs][: len(state[name])]), name
    blocks = head.decoder.blocks
    assert set(report.copied) == {f"decoder.blocks.2.{name}" for name in blocks[2].state_dict()}
    assert all(torch.equal(value, blocks[1].state_dict()[name]) for name, value in blocks[2].state_dict().items())
    assert not torch.equal(blocks[1].mlp[0].weight, blocks[0].mlp[0].weight)
    with torch.no_grad():
        blocks[2].mlp[0].weight.zero_()
    assert blocks[1].mlp[0].weight.any(), "a copy is not the same tensor"


def test_a_shallower_head_leaves_the_second_block(checkpoint: Path) -> None:
    _, report = load(checkpoint, depth=1)
    assert not report.copied
    assert any(name.startswith("mask_decoder.transformer.layers.1.") for name in report.left)
    assert "transformer.layers" in report.summary()


def test_half_precision_is_loaded_as_float32(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in weights.items()}, copy / "model.safetensors")
    head, _ = load(copy)
    assert {tensor.dtype for tensor in head.state_dict().values()} == {torch.float32}
    expected = weights["mask_decoder.iou_token.weight"].half().float()
    assert torch.equal(head.decoder.iou_token.detach(), expected)


def test_positions_are_found_under_either_of_their_names(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    (name,) = (name for name in weights if name.endswith("positional_embedding"))
    other = {
        "shared_image_embedding.positional_embedding": "prompt_encoder.shared_embedding.positional_embedding",
        "prompt_encoder.shared_embedding.positional_embedding": "shared_image_embedding.positional_embedding",
    }[name]
    frequencies = weights.pop(name)
    save_file({**weights, other: frequencies}, copy / "model.safetensors")
    head, _ = load(copy)
    assert torch.equal(head.positions.frequencies, frequencies)


def test_one_missing_weight_is_refused_and_nothing_is_changed(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["mask_decoder.transformer.layers.1.layer_norm4.bias"]
    save_file(weights, copy / "model.safetensors")
    head = build_two_way(SHAPES, **SMALL)
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    with pytest.raises(UsageError, match=r"lacks 1 weights.*layers\.1\.layer_norm4\.bias"):
        load_sam(head, str(copy), num_heads=8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())


def test_a_weight_that_sam_has_not_is_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    save_file({**weights, "mask_decoder.hf_token.weight": torch.zeros(1, 32)}, copy / "model.safetensors")
    with pytest.raises(UsageError, match=r"1 weights that SAM's has not.*hf_token"):
        load(copy)


@pytest.mark.parametrize("arguments", [{"dim": 64}, {"mlp_dim": 64}, {"num_mask_tokens": 5}])
def test_weights_of_another_shape_are_refused_and_nothing_is_changed(
    checkpoint: Path, arguments: dict[str, int]
) -> None:
    head = build_two_way(SHAPES, **{**SMALL, **arguments})
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    with pytest.raises(UsageError, match=r"of this head \[.*dim=256, mlp_dim=2048"):
        load_sam(head, str(checkpoint), num_heads=8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())


def test_another_number_of_attention_heads_is_refused_although_its_weights_would_fit(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="set num_heads to the checkpoint's"):
        load(checkpoint, num_heads=4)


def test_a_checkpoint_of_another_model_is_refused_by_its_type(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_bytes())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "sam_hq"}))
    with pytest.raises(UsageError, match="type 'sam_hq'"):
        load(copy)


@pytest.mark.parametrize("content", ["[]", "{", '{"model_type": "sam", "mask_decoder_config": 3}'])
def test_a_config_that_is_none_is_refused(copy: Path, content: str) -> None:
    (copy / "config.json").write_text(content)
    with pytest.raises(UsageError, match="not the config of a model"):
        load(copy)


def test_a_file_that_is_cut_short_is_refused(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UsageError, match="cannot be read"):
        load(copy)


def test_a_folder_without_safetensors_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"holds no model\.safetensors"):
        load(copy)


@pytest.mark.parametrize("source", ["no/such/folder", "nowhere", "no-one/no-such-sam"])
def test_a_checkpoint_that_is_nowhere_is_the_users_mistake(source: str) -> None:
    with pytest.raises(UsageError, match="no SAM checkpoint"):
        build_two_way(SHAPES, **SMALL, initial=source)
