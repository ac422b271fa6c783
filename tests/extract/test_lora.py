"""Which modules of each family get an adapter, and what an adapter is made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import Dinov2Config, Dinov2Model, PreTrainedModel

from cache_schema.errors import UsageError
from extract.encoders import families
from extract.encoders.lora import LoraSpec, adapted_names, add_lora, load_lora, lora_targets, save_lora
from extract.encoders.text import TEXT_FAMILIES, load_text_model
from tests.extract import text_checkpoints
from tests.extract.image_checkpoints import TRANSFORMERS, load_tower, make_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT still asks for it

DINO = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PLAIN = ("mlp.fc1", "mlp.fc2")
CLIP = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", *PLAIN)
BERT = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
IMAGES: dict[str, tuple[str, Sequence[str]]] = {
    "dinov2": ("encoder.layer", (*DINO, *PLAIN)),
    "dinov2_with_registers": ("encoder.layer", (*DINO, *PLAIN)),
    "dinov3_vit": ("model.layer", (DINO[1], DINO[2], DINO[0], DINO[3], *GATED)),
    "clip": ("encoder.layers", CLIP),
    "clip_vision_model": ("encoder.layers", CLIP),
    "siglip": ("encoder.layers", CLIP),
    "siglip_vision_model": ("encoder.layers", CLIP),
    "siglip2": ("encoder.layers", CLIP),
    "siglip2_vision_model": ("encoder.layers", CLIP),
}
TEXTS: dict[str, tuple[str, Sequence[str]]] = {
    "clip": ("text_model.encoder.layers", CLIP),
    "clip-tower": ("text_model.encoder.layers", CLIP),
    "siglip2-fixed": ("encoder.layers", CLIP),
    "siglip2": ("encoder.layers", CLIP),
    "bert": ("encoder.layer", BERT),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_checkpoints(tmp_path_factory.mktemp("images"))


def image_targets(checkpoints: dict[str, Path], name: str, **settings: Any) -> list[str]:
    return lora_targets(load_tower(checkpoints[name]), families.TRANSFORMERS[name], LoraSpec(**settings))


def full(blocks: str, numbers: Sequence[int], paths: Sequence[str]) -> list[str]:
    return [f"{blocks}.{number}.{path}" for number in numbers for path in paths]


@pytest.mark.parametrize("name", IMAGES)
def test_of_an_image_encoder_all_projections_of_every_block_are_adapted(
    checkpoints: dict[str, Path], name: str
) -> None:
    blocks, paths = IMAGES[name]
    assert image_targets(checkpoints, name) == full(blocks, (0, 1, 2), paths)
    assert image_targets(checkpoints, name, first_block=2) == full(blocks, (2,), paths)


@pytest.mark.parametrize("name", TEXTS)
def test_of_a_text_encoder_all_projections_of_every_block_are_adapted(tmp_path: Path, name: str) -> None:
    text_checkpoints.save_text_checkpoint(name, tmp_path / name)
    family = TEXT_FAMILIES[name.partition("-")[0] if name != "clip-tower" else "clip_text_model"]
    model = load_text_model(str(tmp_path / name))
    blocks, paths = TEXTS[name]
    assert lora_targets(model, family, LoraSpec()) == full(blocks, (0, 1), paths)
    assert lora_targets(model, family, LoraSpec(first_block=1)) == full(blocks, (1,), paths)


def test_every_family_of_transformers_is_listed_here() -> None:
    assert IMAGES.keys() == families.TRANSFORMERS.keys() == set(TRANSFORMERS)
    assert {family.blocks for family in TEXT_FAMILIES.values()} == {blocks for blocks, _ in TEXTS.values()}


def test_the_gated_mlp_of_the_largest_dinov2_is_adapted() -> None:
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, use_swiglu_ffn=True)
    targets = lora_targets(Dinov2Model(config), families.TRANSFORMERS["dinov2"], LoraSpec())
    assert targets == full("encoder.layer", (0, 1), (*DINO, *GATED))


def test_modules_are_chosen_by_name_or_by_path(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    chosen = image_targets(checkpoints, "dinov2", target_modules=("fc1", "q_proj"), first_block=1)
    assert chosen == full("encoder.layer", (1, 2), ("attention.q_proj", "mlp.fc1"))
    text_checkpoints.save_text_checkpoint("bert", tmp_path / "bert")
    model, bert = load_text_model(str(tmp_path / "bert")), TEXT_FAMILIES["bert"]
    dense = [path for path in BERT if path.endswith("dense")]
    assert lora_targets(model, bert, LoraSpec(target_modules=("dense",))) == full("encoder.layer", (0, 1), dense)
    output = lora_targets(model, bert, LoraSpec(target_modules=("output.dense",)))
    assert output == full("encoder.layer", (0, 1), ["output.dense"])


@pytest.mark.parametrize("asked", ["query", "mlp", "projection", "encoder.layer.0.mlp.fc1"])
def test_a_module_that_a_block_does_not_have_is_refused_with_those_that_it_has(
    checkpoints: dict[str, Path], asked: str
) -> None:
    known = r"Known: fc1, fc2, k_proj, o_proj, q_proj, v_proj\."
    with pytest.raises(UsageError, match=rf"unknown target module '{asked}'.*{known}"):
        image_targets(checkpoints, "dinov2", target_modules=("fc1", asked))
    with pytest.raises(UsageError, match="did you mean 'q_proj'"):
        image_targets(checkpoints, "dinov2", target_modules=("qproj",))


@pytest.mark.parametrize("name", ["resnet", "dinov3_convnext"])
def test_a_convolutional_network_is_refused(checkpoints: dict[str, Path], name: str) -> None:
    with pytest.raises(UsageError, match="is a convolutional network; LoRA adapts the linear modules of transformers"):
        lora_targets(load_tower(checkpoints[name]), families.PYRAMIDS[name], LoraSpec())


def test_a_first_block_behind_the_last_is_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=r"nothing to adapt from block 3 on: of Dinov2Model, .* come of 3 blocks"):
        image_targets(checkpoints, "dinov2", first_block=3)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rank": 0}, "rank is 0: give a whole number of at least 1"),
        ({"first_block": -1}, "first_block is -1: give a whole number of at least 0"),
        ({"alpha": 0.0}, "alpha is 0.0: give a number above 0"),
        ({"alpha": float("nan")}, "alpha is nan: give a number above 0"),
        ({"dropout": 1.0}, "dropout is 1.0: give a share from 0 to below 1"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"target_modules": ()}, "no target module is named"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        LoraSpec(**settings)


def layers_of(model: PreTrainedModel) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@pytest.mark.parametrize(("stabilised", "scaling"), [(False, 3.0 / 4), (True, 3.0 / 2)])
def test_an_adapter_is_what_was_asked_for(checkpoints: dict[str, Path], stabilised: bool, scaling: float) -> None:
    model = load_tower(checkpoints["dinov2"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    spec = LoraSpec(rank=4, alpha=3.0, dropout=0.25, dora=True, rank_stabilised=stabilised)
    targets = lora_targets(model, families.TRANSFORMERS["dinov2"], spec)
    add_lora(model, targets, spec)
    assert list(adapted_names(model)) == targets
    for layer in layers_of(model):
        assert layer.scaling == {"default": scaling}
        assert layer.use_dora == {"default": True}
        assert layer.lora_dropout["default"].p == 0.25
        assert (layer.lora_B["default"].weight == 0).all()
        assert layer.lora_A["default"].weight.shape[0] == 4
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert len(learning) == 3 * len(targets)
    now = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())


def test_names_stay_whole_where_peft_would_shorten_them(tmp_path: Path) -> None:
    config = Dinov2Config(hidden_size=32, num_hidden_layers=6, num_attention_heads=4)
    model, spec = Dinov2Model(config), LoraSpec(rank=2, first_block=2)
    targets = lora_targets(model, families.TRANSFORMERS["dinov2"], spec)
    save_lora(add_lora(model, targets, spec), tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_bytes())
    assert settings["target_modules"] == sorted(targets)
    assert len(targets) == 24, "PEFT leaves fewer than 20 as they are"


def test_a_saved_adapter_learns_on(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    spec, family = LoraSpec(rank=4, dropout=0.25, first_block=1), families.TRANSFORMERS["dinov2"]
    model = load_tower(checkpoints["dinov2"])
    adapted = add_lora(model, lora_targets(model, family, spec), spec)
    for layer in layers_of(model):
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    save_lora(adapted, tmp_path / "adapter")
    again = load_tower(checkpoints["dinov2"])
    load_lora(again, str(tmp_path / "adapter"))
    assert adapted_names(again) == adapted_names(model)
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
        assert again.get_parameter(name).requires_grad == ("lora_" in name), name
    assert {layer.lora_dropout["default"].p for layer in layers_of(again)} == {0.25}
    with pytest.raises(UsageError, match="cannot be laid on CLIPVisionModel"):
        load_lora(load_tower(checkpoints["clip"]), str(tmp_path / "adapter"))
