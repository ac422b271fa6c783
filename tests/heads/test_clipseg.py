"""The CLIPSeg head: the laws of heads, and the logits of `transformers.CLIPSegForImageSegmentation`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPSegConfig, CLIPSegForImageSegmentation

from cache_schema.errors import UsageError
from extract.encoders.image import load_image_encoder
from extract.encoders.specs import ImageEncoderSpec
from heads.clipseg import CLIPSegHead, build_clipseg
from heads.clipseg_weights import load_clipseg_weights
from heads.inputs import FeatureShapes, HeadInputs
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

WIDTHS = {"4": 16, "7": 16, "10": 24, "last": 16}
SHAPES = FeatureShapes(
    {layer: (5, 7, width) for layer, width in WIDTHS.items()}, token_width=12, pooled_width=10, cls_widths=WIDTHS
)
SMALL: dict[str, Any] = {"dim": 16, "hidden_dim": 32, "patch_size": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "faithful": {},
    "refined": {"refined": True, "patch_size": 8},
    "conditioned in the middle": {"conditional_layer": 1},
    "without CLS": {"with_cls": False, "layers": ["last", "4"]},
}


@pytest.fixture(params=VARIANTS)
def head(request: pytest.FixtureRequest) -> CLIPSegHead:
    torch.manual_seed(0)
    return build_clipseg(SHAPES, **{**SMALL, **VARIANTS[request.param]})


def test_prompts_of_a_batch_do_not_see_each_other(head: CLIPSegHead) -> None:
    check_prompts_do_not_see_each_other(head, make_inputs(SHAPES))


def test_padding_is_not_seen(head: CLIPSegHead) -> None:
    check_padding_is_not_seen(head, make_inputs(SHAPES))
    check_tokens_are_missed_by_who_reads_them(head, make_inputs(SHAPES))


def test_gradients_reach_every_parameter(head: CLIPSegHead) -> None:
    check_gradients_reach_everything(head, make_inputs(SHAPES), sum_of_outputs)


@pytest.mark.parametrize("gradients", [True, False])
def test_it_can_be_exported_for_any_number_of_images_and_prompts(head: CLIPSegHead, gradients: bool) -> None:
    with torch.set_grad_enabled(gradients):
        check_export(head, make_inputs(SHAPES), make_inputs(SHAPES, num_images=2, num_prompts=5, seed=1))


@pytest.mark.parametrize("refined", [False, True])
def test_it_learns_eight_masks_by_heart(refined: bool) -> None:
    torch.manual_seed(0)
    grids = dict.fromkeys(("4", "7", "10"), (8, 8, 16))
    shapes = FeatureShapes(grids, token_width=12, pooled_width=10, cls_widths=dict.fromkeys(grids, 16))
    head = build_clipseg(shapes, dim=32, hidden_dim=64, patch_size=8 if refined else 4, refined=refined)
    assert overfit(head, make_inputs(shapes), steps=200 if refined else 250, rate=3e-3) > 0.95


def test_dropout_acts_in_training_and_nowhere_else() -> None:
    torch.manual_seed(0)
    inputs = make_inputs(SHAPES)
    head = build_clipseg(SHAPES, **SMALL).train()
    assert not head(inputs).mask_logits.equal(head(inputs).mask_logits)
    assert head.eval()(inputs).mask_logits.equal(head(inputs).mask_logits)
    still = build_clipseg(SHAPES, **SMALL, dropout=0.0).train()
    assert still(inputs).mask_logits.equal(still(inputs).mask_logits)


def test_every_token_gives_a_square_of_its_patch() -> None:
    inputs = make_inputs(SHAPES)
    assert build_clipseg(SHAPES)(inputs).mask_logits.shape == (8, 5 * 16, 7 * 16)
    assert build_clipseg(SHAPES, refined=True)(inputs).mask_logits.shape == (8, 5 * 16, 7 * 16)
    assert build_clipseg(SHAPES, patch_size=5)(inputs).mask_logits.shape == (8, 25, 35)


@pytest.mark.parametrize("conditional_layer", [0, 1, 2])
def test_what_no_prompt_has_touched_is_computed_once_for_each_image(conditional_layer: int) -> None:
    head = build_clipseg(SHAPES, **SMALL, conditional_layer=conditional_layer)
    reduced, mixed = [], []
    for reduce, block in zip(head.reduces, head.blocks, strict=True):
        reduce.register_forward_hook(lambda module, inputs, output: reduced.append(len(output)))
        block.register_forward_hook(lambda module, inputs, output: mixed.append(len(output)))
    head(make_inputs(SHAPES, num_images=3, num_prompts=8))
    assert reduced == [3, 3, 3]
    assert mixed == [3] * conditional_layer + [8] * (3 - conditional_layer)


@pytest.mark.parametrize(("refined", "expected"), [(False, 1_073_153), (True, 1_127_009)])
def test_for_clip_it_has_as_many_parameters_as_the_decoder_of_transformers(refined: bool, expected: int) -> None:
    from transformers.models.clipseg.modeling_clipseg import CLIPSegDecoder

    config = CLIPSegConfig(vision_config={"patch_size": 16}, use_complex_transposed_convolution=refined)
    assert sum(parameter.numel() for parameter in CLIPSegDecoder(config).parameters()) == expected

    grids = dict.fromkeys(("4", "7", "10"), (22, 22, 768))
    shapes = FeatureShapes(grids, token_width=512, pooled_width=512, cls_widths=dict.fromkeys(grids, 768))
    head = build_clipseg(shapes, refined=refined)
    assert sum(parameter.numel() for parameter in head.parameters()) == expected


def make_checkpoint(
    folder: Path, *, num_blocks: int = 5, refined: bool = False, **settings: Any
) -> CLIPSegForImageSegmentation:
    """A small CLIPSeg whose every weight is drawn at random, saved as transformers saves it."""
    block = {"num_attention_heads": 2, "num_hidden_layers": num_blocks, "intermediate_size": 32}
    small = {
        "text_config": {**block, "hidden_size": 16, "vocab_size": 50, "num_hidden_layers": 1},
        "vision_config": {**block, "hidden_size": 24, "patch_size": 16, "image_size": 64},
        "projection_dim": 12,
        "reduce_dim": 16,
        "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 32,
        "extract_layers": [0, 2, 3],
        "use_complex_transposed_convolution": refined,
    }
    generator = torch.Generator().manual_seed(0)
    model = CLIPSegForImageSegmentation(CLIPSegConfig(**{**small, **settings})).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    model.save_pretrained(folder)
    return model


def read_by_head(model: CLIPSegForImageSegmentation, pixels: Tensor, num_prompts: int) -> HeadInputs:
    """What a cache would hold of some images: all hidden states, by number; prompts are noise."""
    generator = torch.Generator().manual_seed(1)
    height, width = (side // 16 for side in pixels.shape[2:])
    with torch.no_grad():
        hidden = model.clip.vision_model(pixels, output_hidden_states=True).hidden_states
    return HeadInputs(
        features={str(n): state[:, 1:].unflatten(1, (height, width)) for n, state in enumerate(hidden)},
        cls={str(n): state[:, 0] for n, state in enumerate(hidden)},
        prompt_tokens=torch.zeros(num_prompts, 1, 4),
        prompt_mask=torch.ones(num_prompts, 1, dtype=torch.bool),
        pooled=torch.randn((num_prompts, 12), generator=generator),
        image_index=torch.arange(num_prompts) % len(pixels),
    )


def shapes_of(inputs: HeadInputs) -> FeatureShapes:
    grids = {
        layer: (int(grid.shape[1]), int(grid.shape[2]), int(grid.shape[3])) for layer, grid in inputs.features.items()
    }
    return FeatureShapes(
        grids, 4, inputs.pooled.shape[1], {layer: tokens.shape[1] for layer, tokens in inputs.cls.items()}
    )


def noise_pixels(height: int, width: int) -> Tensor:
    return torch.randn((2, 3, height, width), generator=torch.Generator().manual_seed(2))


def build_for(inputs: HeadInputs, **arguments: Any) -> CLIPSegHead:
    return build_clipseg(
        shapes_of(inputs), **{"layers": ["1", "3", "4"], "dim": 16, "hidden_dim": 32, **arguments}
    ).eval()


def relative_difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("conditional_layer", [0, 2])
@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("side", [64, 112])
def test_with_the_weights_of_transformers_it_gives_the_same_logits(
    tmp_path: Path, side: int, refined: bool, conditional_layer: int
) -> None:
    model = make_checkpoint(tmp_path, refined=refined, conditional_layer=conditional_layer)
    pixels = noise_pixels(side, side)
    inputs = read_by_head(model, pixels, num_prompts=5)
    head = build_for(inputs, refined=refined, conditional_layer=conditional_layer)
    report = load_clipseg_weights(head, str(tmp_path))
    assert report.complete
    with torch.no_grad():
        expected = model(
            pixel_values=pixels[inputs.image_index], conditional_embeddings=inputs.pooled, interpolate_pos_encoding=True
        ).logits
        found = head(inputs).mask_logits
    assert relative_difference(found, expected) <= 1e-5
    assert relative_difference(head(inputs).mask_logits.detach(), expected) <= 1e-5, "torch's path with gradients"


@pytest.mark.parametrize("refined", [False, True])
def test_on_a_grid_that_is_not_square_it_does_what_transformers_does_up_to_its_last_reshape(
    tmp_path: Path, refined: bool
) -> None:
    """transformers takes every grid for a square, and stops there; what came before and comes behind is its own."""
    model = make_checkpoint(tmp_path, refined=refined)
    pixels = noise_pixels(48, 112)
    inputs = read_by_head(model, pixels, num_prompts=5)
    head = build_for(inputs, refined=refined)
    load_clipseg_weights(head, str(tmp_path))
    last: list[Tensor] = []
    model.decoder.layers[-1].register_forward_hook(lambda module, given, output: last.append(output))
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            model(pixel_values=pixels[inputs.image_index], conditional_embeddings=inputs.pooled)
        grid = last[0][:, 1:].transpose(1, 2).unflatten(2, (3, 7))
        expected = model.decoder.transposed_convolution(grid).squeeze(1)
        found = head(inputs).mask_logits
    assert found.shape == (5, 48, 112)
    assert relative_difference(found, expected) <= 1e-5


def test_features_that_were_extracted_from_clip_under_the_default_layers_give_the_same_logits(tmp_path: Path) -> None:
    """The layers 3, 6, 9 of CLIPSeg are the layers 4, 7, 10 of a cache."""
    model = make_checkpoint(tmp_path / "clipseg", num_blocks=11, extract_layers=[3, 6, 9])
    clip = CLIPModel(
        CLIPConfig(
            text_config=model.config.text_config.to_dict(),
            vision_config=model.config.vision_config.to_dict(),
            projection_dim=12,
        )
    )
    clip.load_state_dict(model.clip.state_dict())
    clip.save_pretrained(tmp_path / "clip")
    processor = CLIPImageProcessor(size={"height": 80, "width": 80}, do_center_crop=False)
    processor.save_pretrained(tmp_path / "clip")
    encoder = load_image_encoder(ImageEncoderSpec(str(tmp_path / "clip"), layers=("4", "7", "10"), input_size=(80, 80)))
    pictures = np.random.default_rng(0).integers(0, 256, (2, 80, 80, 3), dtype=np.uint8)

    encoded = encoder.encode(torch.from_numpy(pictures))
    pooled = torch.randn((2, 12), generator=torch.Generator().manual_seed(1))
    inputs = HeadInputs(
        encoded.features, encoded.cls, torch.zeros(2, 1, 4), torch.ones(2, 1, dtype=torch.bool), pooled, torch.arange(2)
    )
    head = build_clipseg(shapes_of(inputs), dim=16, hidden_dim=32).eval()
    assert load_clipseg_weights(head, str(tmp_path / "clipseg")).complete

    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    with torch.no_grad():
        expected = model(pixel_values=(pixels - mean) / std, conditional_embeddings=pooled).logits
        found = head(inputs).mask_logits
    assert relative_difference(found, expected) <= 1e-5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clipseg")
    make_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def read(checkpoint: Path) -> HeadInputs:
    return read_by_head(CLIPSegForImageSegmentation.from_pretrained(checkpoint), noise_pixels(64, 64), 2)


def test_the_report_names_every_tensor_of_the_decoder_and_every_parameter_of_the_head(
    checkpoint: Path, read: HeadInputs
) -> None:
    head = build_for(read)
    report = load_clipseg_weights(head, str(checkpoint))
    assert set(report.loaded) == {name for name, _ in head.named_parameters()}
    stored = [name for name in load_file(checkpoint / "model.safetensors") if name.startswith("decoder.")]
    assert sorted(name for names in report.loaded.values() for name in names) == sorted(stored)
    assert report.loaded["blocks.1.self_attn.in_proj_bias"] == tuple(
        f"decoder.layers.1.self_attn.{part}_proj.bias" for part in "qkv"
    )
    assert (report.fresh, report.left, report.differences) == ((), (), ())
    assert report.complete
    assert report.sha256 == hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    assert report.summary() == (
        f"started from {checkpoint} (SHA-256 {report.sha256[:12]}): 48 tensors loaded, 0 fresh, 0 left there"
    )
    assert json.loads(json.dumps(report.to_dict()))["loaded"]["film_mul.bias"] == ["decoder.film_mul.bias"]


MISFITS = [
    ({"num_heads": 2}, "num_heads is 2, not 4"),
    ({"conditional_layer": 1}, "conditional_layer is 1, not 0"),
    ({"layers": ["1", "2", "4"]}, r"layers is \['1', '2', '4'\], not \['1', '3', '4'\]"),
    ({"layers": ["4", "3", "1"]}, r"layers is \['4', '3', '1'\], not \['1', '3', '4'\]"),
    ({"layers": ["3", "4"]}, "there is no place for .*decoder.layers.2.mlp.fc1.weight"),
    ({"with_cls": False}, "with_cls is False, not True"),
    ({"refined": True}, "it has nothing for transposed_convolution.0.weight"),
    ({"patch_size": 8}, "it has nothing for transposed_convolution.weight; there is no place for decoder.transp"),
    ({"hidden_dim": 48}, "it has nothing for blocks.0.linear1.weight"),
]


@pytest.mark.parametrize(("arguments", "complaint"), MISFITS)
def test_a_checkpoint_of_another_decoder_is_refused_before_anything_changes(
    checkpoint: Path, read: HeadInputs, arguments: Mapping[str, Any], complaint: str
) -> None:
    head = build_for(read, **arguments)
    before = {name: weight.clone() for name, weight in head.state_dict().items()}
    with pytest.raises(UsageError, match=complaint):
        load_clipseg_weights(head, str(checkpoint))
    assert all(weight.equal(before[name]) for name, weight in head.state_dict().items())


def test_not_strictly_what_fits_is_loaded_and_the_rest_is_reported(checkpoint: Path, read: HeadInputs) -> None:
    head = build_for(read, patch_size=8, num_heads=2)
    before = {name: weight.clone() for name, weight in head.state_dict().items()}
    report = load_clipseg_weights(head, str(checkpoint), strict=False)
    stored = load_file(checkpoint / "model.safetensors")
    assert not report.complete
    assert report.fresh == ("transposed_convolution.weight",)
    assert report.left == ("decoder.transposed_convolution.weight",)
    assert report.differences == ("num_heads is 2, not 4",)
    after = head.state_dict()
    assert after["transposed_convolution.weight"].equal(before["transposed_convolution.weight"])
    assert after["reduces.2.weight"].equal(stored["decoder.reduces.2.weight"])


def test_a_tensor_that_is_missing_from_the_file_is_not_taken_from_chance(
    tmp_path: Path, checkpoint: Path, read: HeadInputs
) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    del weights["decoder.layers.1.self_attn.k_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    head = build_for(read)
    with pytest.raises(UsageError, match=r"has nothing for blocks\.1\.self_attn\.in_proj_weight; there is no place"):
        load_clipseg_weights(head, str(tmp_path))


def test_a_head_can_be_built_from_a_checkpoint(checkpoint: Path, read: HeadInputs) -> None:
    head = build_for(read, initial=str(checkpoint))
    assert head.initial_report is not None
    assert head.initial_report.complete
    assert head.film_add.bias.equal(load_file(checkpoint / "model.safetensors")["decoder.film_add.bias"])
    assert build_for(read).initial_report is None
    with pytest.raises(UsageError, match="num_heads is 2, not 4"):
        build_for(read, initial=str(checkpoint), num_heads=2)


def test_settings_that_a_config_leaves_out_are_those_of_transformers(
    tmp_path: Path, checkpoint: Path, read: HeadInputs
) -> None:
    (tmp_path / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "clipseg"}')
    report = load_clipseg_weights(build_for(read), str(tmp_path), strict=False)
    assert report.differences == ("layers is ['1', '3', '4'], not ['4', '7', '10']",)
    assert not report.complete
    assert report.summary().endswith("0 left there; layers is ['1', '3', '4'], not ['4', '7', '10']")
    default = CLIPSegConfig()
    assert tuple(default.extract_layers) == (3, 6, 9)
    assert (default.decoder_num_attention_heads, default.conditional_layer) == (4, 0)
    assert default.vision_config.layer_norm_eps == 1e-5
    (tmp_path / "config.json").write_text('{"model_type": "clipseg", "vision_config": {"layer_norm_eps": 1e-6}}')
    report = load_clipseg_weights(build_for(read), str(tmp_path), strict=False)
    assert report.differences[1:] == ("the epsilon of norms is 1e-05, not 1e-06",)


def test_what_is_no_clipseg_checkpoint_is_refused_in_one_sentence(
    tmp_path: Path, checkpoint: Path, read: HeadInputs
) -> None:
    head = build_for(read)
    config, weights = ((checkpoint / name).read_bytes() for name in ("config.json", "model.safetensors"))

    def refuse(source: str | Path, complaint: str) -> None:
        with pytest.raises(UsageError, match=complaint):
            load_clipseg_weights(head, str(source))

    def folder(name: str, config: bytes, weights: bytes | None) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes(config)
        if weights is not None:
            (tmp_path / name / "model.safetensors").write_bytes(weights)
        return tmp_path / name

    refuse(tmp_path / "nowhere", "no checkpoint at .*nowhere: there is no such folder")
    refuse("no-such/model", "no checkpoint 'no-such/model': .* the hub did not hand out config.json")
    refuse(folder("bare", config, None), "holds no model.safetensors: name a folder that save_pretrained wrote")
    refuse(folder("clip", b'{"model_type": "clip"}', weights), "is a model of type 'clip': name a CLIPSeg")
    refuse(folder("list", b"[]", weights), "is not the config of a model")
    refuse(folder("number", b'{"model_type": "clipseg", "extract_layers": 3}', weights), "is not the config of a model")
    refuse(folder("cut", config, weights[:1000]), "model.safetensors cannot be read .*; fetch the checkpoint again")


def test_without_layers_named_it_reads_those_of_clipseg_or_says_which_are_lacking() -> None:
    assert build_clipseg(SHAPES).layers == ("4", "7", "10")
    assert build_clipseg(SHAPES, layers="last").layers == ("last",)
    few = FeatureShapes({"4": (5, 7, 16), "last": (5, 7, 16)}, 12, 10, {"4": 16, "last": 16})
    said = r"reads layers 4, 7, 10 by default, but this cache lacks 7, 10: extract with --layers 4 7 10, or .* 4, last"
    with pytest.raises(UsageError, match=said):
        build_clipseg(few)


def test_layers_without_cls_tokens_are_refused_unless_it_is_told_to_do_without() -> None:
    bare = FeatureShapes(SHAPES.grids, 12, 10, {"4": 16})
    with pytest.raises(UsageError, match="layers 7, 10 were cached without"):
        build_clipseg(bare)
    assert build_clipseg(bare, with_cls=False)(make_inputs(bare)).mask_logits.shape == (8, 80, 112)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"dim": 30}, "a width of 30 cannot be shared by 4 heads"),
        ({"dim": 0}, "dim must be at least 1"),
        ({"hidden_dim": 0}, "hidden_dim must be at least 1"),
        ({"patch_size": 0}, "patch_size must be at least 1"),
        ({"patch_size": 2, "refined": True}, "patch_size of at least 4"),
        ({"conditional_layer": 3}, "conditional_layer is 3; give one from 0 to 2"),
        ({"conditional_layer": -1}, "conditional_layer is -1"),
        ({"dropout": -0.1}, "dropout is -0.1"),
    ],
)
def test_impossible_arguments_are_refused(arguments: Mapping[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        build_clipseg(SHAPES, **arguments)


def test_layers_of_different_grids_are_refused() -> None:
    grids = {"4": (5, 7, 16), "7": (5, 7, 16), "10": (3, 3, 16)}
    with pytest.raises(ValueError, match="different grids"):
        build_clipseg(FeatureShapes(grids, 12, 10, dict.fromkeys(grids, 16)))
