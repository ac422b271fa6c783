"""Encoders return what transformers returns for the same checkpoint, and their identity says which one it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
)

from cache_schema.errors import UsageError
from cache_schema.fingerprint import canonical_json, fingerprint
from extract.encoders import IMAGE_ENCODERS, resolve_encoder
from extract.encoders.image import IMAGE_MODELS, VisionTransformerEncoder, load_image_encoder
from extract.encoders.text import TEXT_MODELS, load_text_encoder
from extract.encoders.tiny import TinyEncoders

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
PROCESSOR: dict[str, Any] = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES, patch_size=14, image_size=56)),
    "dinov2_with_registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**SIZES, patch_size=14, image_size=56, num_register_tokens=4)
    ),
    "dinov3_vit": lambda: DINOv3ViTModel(
        DINOv3ViTConfig(**SIZES, intermediate_size=64, patch_size=16, image_size=64, num_register_tokens=4)
    ),
}
NUM_REGISTERS = {"dinov2": 0, "dinov2_with_registers": 4, "dinov3_vit": 4}
LAYERS = ("last", "0", "1", "3")
PROMPTS = (
    "the red circle",
    "red",
    "",
    "two small dogs to the left of the largest striped triangle and a cat",
    "a zxqv, 3.5 and é",
    "Red  CIRCLE",
    "word " * 100,
)


def scramble(model: PreTrainedModel) -> PreTrainedModel:
    """Random values for what initialises to zeros or ones, so that every weight makes a difference."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small random checkpoint of each family of image encoders."""
    parent = tmp_path_factory.mktemp("checkpoints")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for family, make in FAMILIES.items():
            scramble(make()).save_pretrained(parent / family)
            (parent / family / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return {family: parent / family for family in FAMILIES}


@pytest.fixture(scope="module")
def text_checkpoints(tmp_path_factory: pytest.TempPathFactory, tiny_encoders: TinyEncoders) -> dict[str, Path]:
    """A text tower alone, and a whole CLIP model, with the tiny tokenizer."""
    parent = tmp_path_factory.mktemp("text")
    tokenizer = CLIPTokenizer.from_pretrained(tiny_encoders.text)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text: dict[str, Any] = {"vocab_size": len(tokenizer), "max_position_embeddings": 20, "projection_dim": 24}
    text |= {**sizes, **special}
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = {
            "tower": CLIPTextModelWithProjection(CLIPTextConfig(**text)),
            "whole": CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)),
        }
        for name, model in models.items():
            scramble(model).save_pretrained(parent / name)
            tokenizer.save_pretrained(parent / name)
    return {name: parent / name for name in models}


def copy_of(checkpoint: Path, parent: Path, name: str = "copy") -> Path:
    return Path(shutil.copytree(checkpoint, parent / name))


def change_weights(checkpoint: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    change(weights)
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})


def change_config(checkpoint: Path, **changes: Any) -> None:
    config = json.loads((checkpoint / "config.json").read_bytes())
    (checkpoint / "config.json").write_text(json.dumps(config | changes))


def pixels_of(height: int, width: int, num_images: int = 2) -> Tensor:
    return torch.randn(num_images, 3, height, width, generator=torch.Generator().manual_seed(height * width))


# Image encoders


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("patches", [(4, 4), (2, 5), (6, 3)])
def test_token_grids_and_cls_tokens_are_those_of_transformers(
    checkpoints: dict[str, Path], family: str, patches: tuple[int, int]
) -> None:
    model = IMAGE_MODELS[family].from_pretrained(checkpoints[family]).eval()
    height, width = (side * model.config.patch_size for side in patches)
    encoder = load_image_encoder(str(checkpoints[family]), layers=LAYERS, input_size=(height, width))
    pixels = pixels_of(height, width)
    with torch.inference_mode():
        output = model(pixel_values=pixels, output_hidden_states=True)
    encoding = encoder.encode(pixels)
    assert tuple(encoding.features) == tuple(encoding.cls) == LAYERS
    assert encoder.grids == dict.fromkeys(LAYERS, (*patches, 32))
    for layer in LAYERS:
        state = output.last_hidden_state if layer == "last" else output.hidden_states[int(layer)]
        grid = state[:, 1 + NUM_REGISTERS[family] :].reshape(2, *patches, 32)
        torch.testing.assert_close(encoding.features[layer], grid, rtol=0, atol=0)
        torch.testing.assert_close(encoding.cls[layer], state[:, 0], rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_numbered_layer_is_what_that_block_put_out(checkpoints: dict[str, Path], family: str) -> None:
    model = IMAGE_MODELS[family].from_pretrained(checkpoints[family]).eval()
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    outputs: list[Tensor] = []
    for block in blocks:
        block.register_forward_hook(lambda *call: outputs.append(call[2][0] if isinstance(call[2], tuple) else call[2]))
    side = model.config.image_size
    with torch.inference_mode():
        model(pixel_values=pixels_of(side, side))
    encoding = load_image_encoder(str(checkpoints[family]), layers=["1", "2", "3"]).encode(pixels_of(side, side))
    for number, output in enumerate(outputs, 1):
        torch.testing.assert_close(encoding.cls[str(number)], output[:, 0], rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_grids_are_row_major_and_stand_upright(checkpoints: dict[str, Path], family: str) -> None:
    patch = FAMILIES[family]().config.patch_size
    encoder = load_image_encoder(str(checkpoints[family]), layers=["0"], input_size=(3 * patch, 5 * patch))
    plain = torch.zeros(1, 3, 3 * patch, 5 * patch)
    marked = plain.clone()
    marked[:, :, 2 * patch : 3 * patch, 1 * patch : 2 * patch] = 1
    changed = (encoder.encode(marked).features["0"] != encoder.encode(plain).features["0"]).any(-1)
    assert changed.nonzero().tolist() == [[0, 2, 1]]


def test_a_batch_gives_what_its_images_give_one_by_one(checkpoints: dict[str, Path]) -> None:
    encoder = load_image_encoder(str(checkpoints["dinov3_vit"]), layers=["2", "last"])
    pixels = pixels_of(64, 64, 5)
    batch = encoder.encode(pixels)
    for row in range(5):
        single = encoder.encode(pixels[row : row + 1])
        torch.testing.assert_close(single.features["last"][0], batch.features["last"][row], rtol=0, atol=1e-5)
        torch.testing.assert_close(single.cls["2"][0], batch.cls["2"][row], rtol=0, atol=1e-5)


def test_the_checkpoints_own_size_and_normalisation_are_used(checkpoints: dict[str, Path]) -> None:
    encoder = load_image_encoder(str(checkpoints["dinov2"]))
    image = np.full((10, 30, 3), 255, np.uint8)
    pixels = encoder.preprocess(image)
    assert pixels.shape == (3, 56, 56)
    np.testing.assert_allclose(pixels[:, 0, 0], (1 - np.array([0.5, 0.4, 0.3])) / [0.2, 0.3, 0.4], rtol=1e-6)
    assert encoder.grids == {"last": (4, 4, 32)}


@pytest.mark.parametrize(
    ("family", "said", "resample"),
    [
        ("dinov2", {}, "bicubic"),
        ("dinov3_vit", {}, "bilinear"),
        ("dinov2", {"resample": 2}, "bilinear"),
        ("dinov3_vit", {"resample": 3}, "bicubic"),
    ],
)
def test_the_checkpoints_own_resampling_is_used_or_that_of_its_family(
    checkpoints: dict[str, Path], tmp_path: Path, family: str, said: dict[str, int], resample: str
) -> None:
    checkpoint = copy_of(checkpoints[family], tmp_path)
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | said))
    identity = load_image_encoder(str(checkpoint)).identity
    assert identity["preprocessing"]["resample"] == resample


def test_a_resampling_that_is_not_known_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = copy_of(checkpoints["dinov2"], tmp_path)
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | {"resample": 0}))
    with pytest.raises(UsageError, match=r"resamples by Pillow's filter 0; known are \[2, 3\]"):
        load_image_encoder(str(checkpoint))


def test_encoders_are_frozen_and_deterministic(checkpoints: dict[str, Path]) -> None:
    encoder = load_image_encoder(str(checkpoints["dinov2"]))
    first, second = (encoder.encode(pixels_of(56, 56)).features["last"] for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert first.dtype == torch.float32


def test_a_checkpoint_saved_in_half_precision_is_computed_in_full(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    half = tmp_path / "half"
    Dinov2Model.from_pretrained(checkpoints["dinov2"], dtype=torch.float16).save_pretrained(half)
    (half / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    assert load_image_encoder(str(half)).encode(pixels_of(56, 56)).features["last"].dtype == torch.float32


# Text encoders


@pytest.mark.parametrize("name", ["tower", "whole"])
def test_tokens_and_pooled_features_are_those_of_transformers_prompt_by_prompt(
    text_checkpoints: dict[str, Path], name: str
) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(text_checkpoints[name])
    encoder = load_text_encoder(str(text_checkpoints[name]))
    token_ids = encoder.tokenize(PROMPTS)
    encoding = encoder.encode(token_ids)
    assert encoding.tokens.shape == (len(PROMPTS), 20, encoder.token_width) == (len(PROMPTS), 20, 32)
    assert encoding.pooled.shape == (len(PROMPTS), encoder.pooled_width) == (len(PROMPTS), 24)
    assert encoding.mask.sum(1).tolist() == [len(ids) for ids in token_ids]
    model: Any
    if name == "tower":
        model = CLIPTextModelWithProjection.from_pretrained(text_checkpoints[name]).eval()
    else:
        model = CLIPModel.from_pretrained(text_checkpoints[name]).eval()
    for row, prompt in enumerate(PROMPTS):
        inputs = tokenizer(prompt, truncation=True, max_length=20, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == token_ids[row]
        with torch.inference_mode():
            if name == "tower":
                output = model(**inputs)
                tokens, pooled = output.last_hidden_state[0], output.text_embeds[0]
            else:
                output = model.text_model(**inputs)
                tokens, pooled = output.last_hidden_state[0], model.text_projection(output.pooler_output)[0]
        mask = encoding.mask[row]
        assert mask.tolist() == [True] * len(tokens) + [False] * (20 - len(tokens))
        torch.testing.assert_close(encoding.tokens[row][mask], tokens, rtol=0, atol=1e-5)
        torch.testing.assert_close(encoding.pooled[row], pooled, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["tower", "whole"])
def test_who_stands_beside_a_prompt_in_a_batch_makes_no_difference(
    text_checkpoints: dict[str, Path], name: str
) -> None:
    encoder = load_text_encoder(str(text_checkpoints[name]))
    token_ids = encoder.tokenize(PROMPTS)
    together = encoder.encode(token_ids)
    for rows in ([0], [1, 0], [3, 1, 2], [6, 2]):
        apart = encoder.encode([token_ids[row] for row in rows])
        for place, row in enumerate(rows):
            mask = apart.mask[place]
            expected = together.tokens[row][together.mask[row]]
            torch.testing.assert_close(apart.tokens[place][mask], expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(apart.pooled[place], together.pooled[row], rtol=0, atol=1e-5)


def test_long_prompts_are_cut_before_the_end_of_text_token(text_checkpoints: dict[str, Path]) -> None:
    encoder = load_text_encoder(str(text_checkpoints["tower"]))
    short, long = encoder.tokenize(["red", "red " * 100])
    assert encoder.max_length == len(long) == 20
    assert (long[0], long[-1]) == (short[0], short[-1])
    assert long[1:-1] == [short[1]] * 18


# Refusals


@pytest.mark.parametrize(
    ("layer", "hint"),
    [("lats", "did you mean 'last'"), ("4", "Known: 0, 1, 2, 3, last"), ("-1", "Known"), ("", "Known")],
)
def test_a_layer_that_is_not_there_is_met_with_those_that_are(
    checkpoints: dict[str, Path], layer: str, hint: str
) -> None:
    with pytest.raises(UsageError, match=f"unknown layer '{layer}': .*{hint}"):
        load_image_encoder(str(checkpoints["dinov2"]), layers=["last", layer])


@pytest.mark.parametrize("input_size", [(56, 57), (57, 56), (13, 56)])
def test_a_size_that_is_no_multiple_of_the_patch_is_refused(
    checkpoints: dict[str, Path], input_size: tuple[int, int]
) -> None:
    complaint = f"input size {input_size[0]} x {input_size[1]} is no multiple of .* patch of 14 pixels"
    with pytest.raises(UsageError, match=complaint):
        load_image_encoder(str(checkpoints["dinov2"]), input_size=input_size)


@pytest.mark.parametrize("load", [load_image_encoder, load_text_encoder])
def test_there_must_be_a_model_at_the_folder(tmp_path: Path, load: Callable[[str], object]) -> None:
    with pytest.raises(UsageError, match=r"no encoder at .*nowhere: there is no such folder"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"has model type None"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"is not a model folder that can be loaded .*not a valid JSON file"):
        load(str(tmp_path))


@pytest.mark.parametrize("load", [load_image_encoder, load_text_encoder])
def test_a_hub_id_that_cannot_be_had_is_said_in_one_sentence(load: Callable[[str], object]) -> None:
    with pytest.raises(
        UsageError, match=r"no encoder 'no-one/no-model': there is no such folder, and the hub"
    ) as caught:
        load("no-one/no-model")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("accept its licence at https://huggingface.co/no-one/no-model and log in.")


def test_a_model_of_another_family_is_refused(checkpoints: dict[str, Path], text_checkpoints: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=r"has model type 'clip_text_model'; image encoders are dinov2, dinov2_with"):
        load_image_encoder(str(text_checkpoints["tower"]))
    with pytest.raises(UsageError, match=r"has model type 'dinov2'; text encoders are clip, clip_text_model"):
        load_text_encoder(str(checkpoints["dinov2"]))


@pytest.mark.parametrize("weight", ["embeddings.cls_token", "layernorm.weight", "encoder.layer.2.mlp.fc1.bias"])
def test_a_checkpoint_that_lacks_a_weight_is_refused(checkpoints: dict[str, Path], tmp_path: Path, weight: str) -> None:
    checkpoint = copy_of(checkpoints["dinov2"], tmp_path)
    change_weights(checkpoint, lambda weights: weights.pop(weight))
    with pytest.raises(UsageError, match=f"lacks 1 weights that Dinov2Model needs \\(first: {weight}\\)"):
        load_image_encoder(str(checkpoint))


def test_a_text_checkpoint_that_lacks_its_projection_is_refused(
    text_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = copy_of(text_checkpoints["tower"], tmp_path)
    change_weights(checkpoint, lambda weights: weights.pop("text_projection.weight"))
    with pytest.raises(UsageError, match=r"lacks 1 weights that CLIPTextModelWithProjection needs"):
        load_text_encoder(str(checkpoint))


def test_a_checkpoint_without_a_weight_file_or_a_preprocessor_or_a_tokenizer_is_refused(
    checkpoints: dict[str, Path], text_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    no_weights = copy_of(checkpoints["dinov2"], tmp_path, "no weights")
    (no_weights / "model.safetensors").unlink()
    no_processor = copy_of(checkpoints["dinov2"], tmp_path, "no processor")
    (no_processor / "preprocessor_config.json").unlink()
    no_tokenizer = copy_of(text_checkpoints["tower"], tmp_path, "no tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (no_tokenizer / name).unlink()
    for load, checkpoint in (
        (load_image_encoder, no_weights),
        (load_image_encoder, no_processor),
        (load_text_encoder, no_tokenizer),
    ):
        with pytest.raises(UsageError, match="is not a model folder that can be loaded"):
            load(str(checkpoint))


@pytest.mark.parametrize("harm", ["weights cut short", "weights of another shape", "processor without a mean"])
def test_a_damaged_checkpoint_is_refused(checkpoints: dict[str, Path], tmp_path: Path, harm: str) -> None:
    checkpoint = copy_of(checkpoints["dinov2"], tmp_path)
    if harm == "weights cut short":
        path = checkpoint / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
    elif harm == "weights of another shape":
        change_config(checkpoint, hidden_size=16)
    else:
        (checkpoint / "preprocessor_config.json").write_text("{}")
    with pytest.raises(UsageError):
        load_image_encoder(str(checkpoint))


# Identity


def identities(encoders: Sequence[Any]) -> list[str]:
    return [fingerprint(encoder.identity) for encoder in encoders]


def test_the_same_checkpoint_has_the_same_identity_wherever_it_lies(
    checkpoints: dict[str, Path], text_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    loaders: list[tuple[Callable[[str], Any], Path]] = [
        *((load_image_encoder, path) for path in checkpoints.values()),
        *((load_text_encoder, path) for path in text_checkpoints.values()),
    ]
    for load, checkpoint in loaders:
        moved = copy_of(checkpoint, tmp_path, f"{checkpoint.name} elsewhere")
        assert load(str(moved)).identity == load(str(checkpoint)).identity
        assert b"elsewhere" not in canonical_json(load(str(moved)).identity)


def test_an_identity_is_plain_json(checkpoints: dict[str, Path], text_checkpoints: dict[str, Path]) -> None:
    for encoder in (
        load_image_encoder(str(checkpoints["dinov3_vit"])),
        load_text_encoder(str(text_checkpoints["whole"])),
    ):
        assert fingerprint(json.loads(json.dumps(encoder.identity))) == fingerprint(encoder.identity)


def test_whatever_decides_the_features_changes_the_identity(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = checkpoints["dinov2"]
    nudged = copy_of(checkpoint, tmp_path, "nudged")
    change_weights(nudged, lambda weights: weights["layernorm.bias"][3:4].mul_(1.0001))
    configured = copy_of(checkpoint, tmp_path, "configured")
    change_config(configured, layer_norm_eps=1e-5)
    normalised = copy_of(checkpoint, tmp_path, "normalised")
    (normalised / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, "image_mean": [0.5, 0.5, 0.5]}))
    encoders = [
        load_image_encoder(str(checkpoint)),
        load_image_encoder(str(nudged)),
        load_image_encoder(str(configured)),
        load_image_encoder(str(normalised)),
        load_image_encoder(str(checkpoint), layers=["2"]),
        load_image_encoder(str(checkpoint), layers=["2", "last"]),
        load_image_encoder(str(checkpoint), input_size=(56, 28)),
        load_image_encoder(str(checkpoint), input_size=(28, 56)),
    ]
    assert len(set(identities(encoders))) == len(encoders)


def test_another_tokenizer_or_weight_changes_a_text_encoders_identity(
    text_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = text_checkpoints["tower"]
    nudged = copy_of(checkpoint, tmp_path, "nudged")
    change_weights(nudged, lambda weights: weights["text_projection.weight"][0].mul_(1.0001))
    retokenized = copy_of(checkpoint, tmp_path, "retokenized")
    tokenizer = json.loads((retokenized / "tokenizer.json").read_bytes())
    tokenizer["model"]["merges"].pop()
    (retokenized / "tokenizer.json").write_text(json.dumps(tokenizer))
    encoders = [load_text_encoder(str(path)) for path in (checkpoint, nudged, retokenized)]
    assert len(set(identities(encoders))) == 3


@pytest.mark.parametrize("name", ["dinov2", "whole"])
def test_a_model_saved_in_many_files_has_the_same_identity(
    checkpoints: dict[str, Path], text_checkpoints: dict[str, Path], tmp_path: Path, name: str
) -> None:
    checkpoint = {**checkpoints, **text_checkpoints}[name]
    load: Any = load_text_encoder if name == "whole" else load_image_encoder
    model_class: Any = CLIPModel if name == "whole" else Dinov2Model
    whole, split = copy_of(checkpoint, tmp_path, "whole"), copy_of(checkpoint, tmp_path, "split")
    (split / "model.safetensors").unlink()
    model = model_class.from_pretrained(checkpoint)
    model.save_pretrained(whole)
    model.save_pretrained(split, max_shard_size="20KB")
    assert len(list(split.glob("*.safetensors"))) > 3
    assert load(str(split)).identity == load(str(whole)).identity


def test_using_a_text_encoder_does_not_change_its_identity(text_checkpoints: dict[str, Path]) -> None:
    used, unused = (load_text_encoder(str(text_checkpoints["tower"])) for _ in range(2))
    used.encode(used.tokenize(PROMPTS))
    assert used.identity == unused.identity


def test_using_an_image_encoder_does_not_change_its_identity(checkpoints: dict[str, Path]) -> None:
    used, unused = (load_image_encoder(str(checkpoints["dinov2"])) for _ in range(2))
    used.encode(pixels_of(56, 56))
    assert used.identity == unused.identity


def test_a_models_whole_config_is_part_of_its_identity_and_library_versions_are_not(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = copy_of(checkpoints["dinov2"], tmp_path)
    change_config(checkpoint, transformers_version="0.0.1", _name_or_path="/some/where", torch_dtype="float16")
    loaded = load_image_encoder(str(checkpoint))
    assert loaded.identity == load_image_encoder(str(checkpoints["dinov2"])).identity
    assert loaded.identity["config"]["model_type"] == "dinov2"
    assert loaded.identity["class"] == "Dinov2Model"


def test_names_paths_and_versions_inside_a_config_are_left_out_too(
    text_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = copy_of(text_checkpoints["whole"], tmp_path)
    text_config = json.loads((checkpoint / "config.json").read_bytes())["text_config"]
    change_config(
        checkpoint,
        text_config={
            **text_config,
            "_name_or_path": "elsewhere/model",
            "torch_dtype": None,
            "transformers_version": "4.0.0",
        },
    )
    assert load_text_encoder(str(checkpoint)).identity == load_text_encoder(str(text_checkpoints["whole"])).identity


# Names


def test_a_short_name_stands_for_a_hub_id_and_folders_and_hub_ids_for_themselves(tmp_path: Path) -> None:
    assert resolve_encoder("dinov2-small", IMAGE_ENCODERS) == "facebook/dinov2-small"
    assert resolve_encoder("someone/some-model", IMAGE_ENCODERS) == "someone/some-model"
    assert resolve_encoder(str(tmp_path), IMAGE_ENCODERS) == str(tmp_path)
    with pytest.raises(UsageError, match=r"unknown encoder 'dinov2-smal': did you mean 'dinov2-small'\?"):
        resolve_encoder("dinov2-smal", IMAGE_ENCODERS)


def test_every_family_that_is_offered_is_tested_here() -> None:
    assert FAMILIES.keys() == IMAGE_MODELS.keys()
    assert TEXT_MODELS.keys() == {"clip", "clip_text_model"}


def test_an_encoder_can_be_made_of_any_model_that_was_loaded(checkpoints: dict[str, Path]) -> None:
    model = Dinov2Model.from_pretrained(checkpoints["dinov2"]).eval()
    loaded = load_image_encoder(str(checkpoints["dinov2"]))
    made = VisionTransformerEncoder(model, {}, loaded._preprocessing, ["last"], "mine")
    torch.testing.assert_close(
        made.encode(pixels_of(56, 56)).features["last"], loaded.encode(pixels_of(56, 56)).features["last"]
    )
