"""A LoRA adapter is laid on wholly or refused, and is part of the identity."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from cache_schema.errors import UsageError
from cache_schema.fingerprint import canonical_json
from extract.encoders.image import HubImageEncoder, load_image_encoder
from extract.encoders.loading import digest_weights, lay_adapter
from extract.encoders.specs import ImageEncoderSpec
from tests.extract.image_checkpoints import (
    FAMILIES,
    encode,
    expected_layer,
    forward_directly,
    load_tower,
    make_checkpoints,
    noise_images,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT still asks for it

TARGETS = {
    "dinov2": ["q_proj", "v_proj", "fc1"],
    "dinov2_with_registers": ["k_proj"],
    "dinov3_vit": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"],
    "clip": ["q_proj", "v_proj"],
    "siglip2": ["q_proj", "out_proj", "patch_embedding"],
    "resnet": ["convolution"],
    "dinov3_convnext": ["pointwise_conv1", "pointwise_conv2"],
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def save_adapter(checkpoint: Path, folder: Path, targets: list[str], seed: int = 0, **settings: Any) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **settings)
        model: Any = get_peft_model(load_tower(checkpoint), config)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the small DINOv2."""
    return save_adapter(checkpoints["dinov2"], tmp_path_factory.mktemp("adapter"), TARGETS["dinov2"])


def load(checkpoint: Path, adapter: Path | None = None, **settings: Any) -> HubImageEncoder:
    return load_image_encoder(
        ImageEncoderSpec(str(checkpoint), adapter=None if adapter is None else str(adapter), **settings)
    )


def changed(adapter: Path, folder: Path, **settings: Any) -> Path:
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_bytes())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    return folder


def reweighted(adapter: Path, folder: Path, change: Any) -> Path:
    shutil.copytree(adapter, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "lora_alpha": 3}, {"use_dora": True}])
def test_features_are_those_of_the_adapted_model_within_rounding(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    folder = save_adapter(checkpoints[name], tmp_path / "adapter", TARGETS[name], **settings)
    side = FAMILIES[name].side
    images = noise_images([(side, side)] * 2)
    adapted: Any = PeftModel.from_pretrained(load_tower(checkpoints[name]), folder).eval()
    output = forward_directly(name, adapted, images, (side, side))
    encoding = encode(load(checkpoints[name], folder, layers=("1", "last")), images)
    plain = encode(load(checkpoints[name], layers=("1", "last")), images)
    for layer, features in encoding.features.items():
        expected = expected_layer(name, output, layer, (features.shape[1], features.shape[2]))[0]
        within = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(features, expected, rtol=0, atol=within)
        assert float((features - plain.features[layer]).abs().max()) > 100 * within, "the adapter does nothing"


@pytest.mark.filterwarnings("ignore:Adapter .* was active.*:UserWarning")
def test_a_module_that_was_trained_as_a_whole_comes_along(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model: Any = get_peft_model(
        load_tower(checkpoints["dinov2"]), LoraConfig(target_modules=["q_proj"], modules_to_save=["layernorm"])
    )
    with torch.no_grad():
        model.base_model.model.layernorm.modules_to_save["default"].bias.fill_(7)
    model.save_pretrained(tmp_path / "adapter")
    merged, _ = lay_adapter(load_tower(checkpoints["dinov2"]), str(tmp_path / "adapter"))
    assert (merged.layernorm.bias == 7).all()
    assert not any(parameter.requires_grad for parameter in merged.parameters())


def test_the_identity_names_the_bare_weights_and_the_adapter(
    checkpoints: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    bare, adapted = load(checkpoints["dinov2"]), load(checkpoints["dinov2"], adapter)
    assert adapted.identity["weights"] == bare.identity["weights"]
    assert {**adapted.identity, "adapter": None} == bare.identity
    assert len(adapted.identity["adapter"]) == 64
    assert (adapted.adapter, bare.adapter) == (str(adapter), None)
    moved = Path(shutil.copytree(adapter, tmp_path / "elsewhere"))
    assert load(checkpoints["dinov2"], moved).identity == adapted.identity
    assert b"elsewhere" not in canonical_json(load(checkpoints["dinov2"], moved).identity)


def test_whatever_decides_what_an_adapter_does_changes_its_digest_and_nothing_else_does(
    checkpoints: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    incidental = changed(
        adapter,
        tmp_path / "incidental",
        base_model_name_or_path="/some/where",
        peft_version="0.0.1",
        inference_mode=False,
        task_type="FEATURE_EXTRACTION",
        target_modules=list(reversed(json.loads((adapter / "adapter_config.json").read_bytes())["target_modules"])),
    )
    first = "base_model.model.encoder.layer.0.attention.q_proj.lora_B.weight"
    others = [
        changed(adapter, tmp_path / "stronger", lora_alpha=16),
        changed(adapter, tmp_path / "stabilised", use_rslora=True),
        reweighted(adapter, tmp_path / "nudged", lambda weights: weights[first].mul_(1.001)),
    ]
    digest = load(checkpoints["dinov2"], adapter).identity["adapter"]
    assert load(checkpoints["dinov2"], incidental).identity["adapter"] == digest
    assert len({digest, *(load(checkpoints["dinov2"], other).identity["adapter"] for other in others)}) == 4


def test_laying_it_on_gives_the_model_it_was_given(checkpoints: dict[str, Path], adapter: Path) -> None:
    model = load_tower(checkpoints["dinov2"])
    names, before = set(model.state_dict()), digest_weights(model)
    merged, digest = lay_adapter(model, str(adapter))
    assert type(merged) is type(model)
    assert set(merged.state_dict()) == names
    assert digest_weights(merged) != before
    assert lay_adapter(load_tower(checkpoints["dinov2"]), str(adapter))[1] == digest


# Refusals


def test_a_place_that_is_no_adapter_folder_is_refused_in_one_sentence(
    checkpoints: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    shutil.copy(adapter / "adapter_config.json", tmp_path)
    for place in (checkpoints["dinov2"], tmp_path / "nowhere", tmp_path):
        with pytest.raises(
            UsageError, match=r"is no adapter folder: it lacks adapter_config\.json or adapter_model"
        ) as caught:
            load(checkpoints["dinov2"], place)
        assert "\n" not in str(caught.value)
    (tmp_path / "adapter_config.json").write_text("{")
    shutil.copy(adapter / "adapter_model.safetensors", tmp_path)
    with pytest.raises(UsageError, match=r"adapter_config\.json is not JSON"):
        load(checkpoints["dinov2"], tmp_path)


def test_an_adapter_of_another_kind_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    config = IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"])
    model: Any = get_peft_model(load_tower(checkpoints["dinov2"]), config)
    model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="holds an adapter of type IA3; LoRA adapters can be laid on an encoder"):
        load(checkpoints["dinov2"], tmp_path)


LORA = "base_model.model.encoder.layer.0.attention.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.pop(LORA),
        lambda weights: weights.update({LORA.replace("layer.0", "layer.9"): weights[LORA].clone()}),
        lambda weights: weights.update({LORA: torch.zeros(4, 5)}),
        lambda weights: weights.update({LORA: weights[LORA] * float("nan")}),
        lambda weights: weights.clear(),
    ],
    ids=["a weight too few", "a weight too many", "a weight of another shape", "no numbers", "none at all"],
)
def test_an_adapter_with_a_weight_out_of_place_is_refused(
    checkpoints: dict[str, Path], adapter: Path, tmp_path: Path, change: Any
) -> None:
    with pytest.raises(
        UsageError, match=r"cannot be laid on Dinov2Model \(.*name an adapter that was made for"
    ) as caught:
        load(checkpoints["dinov2"], reweighted(adapter, tmp_path / "odd", change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["dinov3_vit", "clip", "resnet"])
def test_an_adapter_of_another_model_is_refused(checkpoints: dict[str, Path], adapter: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be laid on"):
        load(checkpoints[name], adapter)


def test_an_adapter_of_a_larger_model_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = save_adapter(checkpoints["dinov2"], tmp_path / "adapter", ["fc1"])
    shallow = Path(shutil.copytree(checkpoints["dinov2"], tmp_path / "shallow"))
    config = json.loads((shallow / "config.json").read_bytes())
    for stages in ("out_features", "out_indices", "stage_names"):
        config.pop(stages, None)
    (shallow / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(UsageError, match=r"2 of its weights have no place and 0 places no weight, first .*layer\.2"):
        load(shallow, folder)


def test_settings_that_this_version_does_not_know_are_not_ignored(
    checkpoints: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"cannot be laid on .*Unexpected keyword arguments \['use_magic'\]"):
        load(checkpoints["dinov2"], changed(adapter, tmp_path / "newer", use_magic=True))


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_no_code_of_a_pickled_adapter_is_ever_run(checkpoints: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    pickled = changed(adapter, tmp_path / "pickled")
    weights = load_file(pickled / "adapter_model.safetensors")
    (pickled / "adapter_model.safetensors").unlink()
    torch.save({**weights, "bomb": Bomb(tmp_path / "mark")}, pickled / "adapter_model.bin")
    with pytest.raises(UsageError, match="cannot be laid on"):
        load(checkpoints["dinov2"], pickled)
    assert not (tmp_path / "mark").exists()
    torch.save(weights, pickled / "adapter_model.bin")
    assert load(checkpoints["dinov2"], pickled).identity == load(checkpoints["dinov2"], adapter).identity
