"""Encoders that learn say what the frozen ones say until they have learned, and their adapters open everywhere.

Oracles are the frozen encoders, and plain transformers with plain PEFT.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, Dinov2Config, Dinov2Model

from cache_schema.errors import UsageError
from extract.encoders.image import load_image_encoder
from extract.encoders.live import LiveImageEncoder, LiveTextEncoder
from extract.encoders.loading import load_checkpoint
from extract.encoders.lora import LoraSpec
from extract.encoders.protocols import ImageEncoding, TextEncoding
from extract.encoders.specs import ImageEncoderSpec, TextEncoderSpec
from extract.encoders.text import TEXT_FAMILIES, load_text_encoder
from tests.extract import text_checkpoints
from tests.extract.image_checkpoints import (
    FAMILIES,
    TRANSFORMERS,
    expected_layer,
    forward_directly,
    load_tower,
    make_checkpoints,
    noise_images,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT still asks for it

IMAGE_NAMES = TRANSFORMERS
TEXT_NAMES = tuple(name for name in text_checkpoints.NAMES if not name.endswith("-tower"))
LAYERS = ("1", "2+norm", "last")
PROMPTS = ["the red dog", "a circle left of the red circle", "dog"]
SPEC = LoraSpec(rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_checkpoints(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    for name in text_checkpoints.NAMES:
        text_checkpoints.save_text_checkpoint(name, folder / name)
    return {name: folder / name for name in text_checkpoints.NAMES}


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def spec_of(checkpoint: Path, **settings: Any) -> ImageEncoderSpec:
    return ImageEncoderSpec(str(checkpoint), **{"layers": LAYERS, **settings})


def pixels_of(name: str, num: int = 2) -> Tensor:
    side = FAMILIES[name].side
    return torch.stack([torch.from_numpy(image) for image in noise_images([(side, side)] * num)])


def tensors_of(encoding: ImageEncoding | TextEncoding) -> dict[str, Tensor]:
    if isinstance(encoding, TextEncoding):
        real = encoding.mask[..., None]
        return {"tokens": torch.where(real, encoding.tokens, 0), "pooled": encoding.pooled}
    kinds = {"features": encoding.features, "cls": encoding.cls, "attention": encoding.attention}
    return {f"{kind}/{name}": tensor for kind, of_kind in kinds.items() for name, tensor in of_kind.items()}


def assert_same(found: Any, expected: Any, within: float = 1e-5) -> None:
    found, expected = tensors_of(found), tensors_of(expected)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = max(1.0, float(tensor.detach().abs().max()))
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=within * scale)


def assert_other(found: Any, expected: Any) -> None:
    """Every output differs by more than rounding."""
    found, expected = tensors_of(found), tensors_of(expected)
    for name, tensor in expected.items():
        change = (found[name] - tensor).detach().abs().max()
        assert change > 1e-3 * tensor.detach().abs().max(), f"{name} did not change"


def step(encoder: nn.Module, given: Any, rate: float = 0.05) -> None:
    """One step of an optimizer towards outputs that were drawn at random; twice, so that A learns as well as B."""
    learning = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=rate)
    encoder.train()
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(encoder(given)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    encoder.eval()


def loss_of(encoding: ImageEncoding | TextEncoding) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    terms = [
        tensor.float() * torch.randn(tensor.shape, generator=generator) for tensor in tensors_of(encoding).values()
    ]
    return torch.stack([term.mean() for term in terms]).sum()


def learned_image_encoder(checkpoint: Path, name: str, lora: LoraSpec = SPEC, **settings: Any) -> LiveImageEncoder:
    encoder = LiveImageEncoder.load(spec_of(checkpoint, **settings), lora)
    step(encoder, pixels_of(name))
    return encoder


def learned_text_encoder(checkpoint: Path, lora: LoraSpec = SPEC) -> LiveTextEncoder:
    encoder = LiveTextEncoder.load(TextEncoderSpec(str(checkpoint)), lora)
    step(encoder, encoder.tokenize(PROMPTS))
    return encoder


# What a live encoder says


@pytest.mark.parametrize("name", IMAGE_NAMES)
def test_before_it_learns_an_image_encoder_says_bit_for_bit_what_the_frozen_one_says(
    checkpoints: dict[str, Path], name: str
) -> None:
    attention = ("logits", "head_tokens", "mean_token") if name.startswith("dino") else ()
    side = FAMILIES[name].side + FAMILIES[name].step
    spec = spec_of(checkpoints[name], attention=attention, input_size=(FAMILIES[name].side, side))
    frozen = load_image_encoder(spec)
    image = noise_images([(FAMILIES[name].side, side)] * 2)
    pixels = torch.stack([torch.from_numpy(frozen.preprocess(one)) for one in image])
    expected = frozen.encode(pixels)
    for live in (LiveImageEncoder.load(spec), LiveImageEncoder.load(spec, SPEC)):
        found = live(pixels)
        assert_same(found, expected, within=0)
        live.train()
        assert_same(live(pixels), expected, within=0)
        assert live.identity == frozen.identity
        assert (live.grids, live.cls_widths) == (frozen.grids, frozen.cls_widths)
        assert live.attention_shapes == frozen.attention_shapes
        assert (live.preprocess(image[0]) == frozen.preprocess(image[0])).all()


@pytest.mark.parametrize("name", text_checkpoints.NAMES)
def test_before_it_learns_a_text_encoder_says_bit_for_bit_what_the_frozen_one_says(
    texts: dict[str, Path], name: str
) -> None:
    spec = TextEncoderSpec(str(texts[name]))
    frozen = load_text_encoder(spec)
    token_ids = frozen.tokenize(PROMPTS)
    expected = frozen.encode(token_ids)
    for live in (LiveTextEncoder.load(spec), LiveTextEncoder.load(spec, SPEC)):
        assert live.tokenize(PROMPTS) == token_ids
        assert_same(live(token_ids), expected, within=0)
        live.train()
        assert_same(live(token_ids), expected, within=0)
        assert live.identity == frozen.identity
        assert (live.token_width, live.pooled_width) == (frozen.token_width, frozen.pooled_width)
        assert live.max_length == frozen.max_length


@pytest.mark.parametrize("settings", [{"dora": True}, {"rank_stabilised": True}, {"dropout": 0.5}])
def test_fresh_adapters_of_every_kind_change_nothing_yet(
    checkpoints: dict[str, Path], settings: dict[str, Any]
) -> None:
    spec, pixels = spec_of(checkpoints["dinov2"]), pixels_of("dinov2")
    live = LiveImageEncoder.load(spec, LoraSpec(**settings)).train()
    assert_same(live(pixels), load_image_encoder(spec).encode(pixels))


def assert_all_learn(encoder: nn.Module, given: Any) -> None:
    before = {name: parameter.clone() for name, parameter in encoder.named_parameters()}
    encoder.train()
    step(encoder, given)
    for name, parameter in encoder.named_parameters():
        learns = "lora_" in name
        assert parameter.requires_grad == learns, name
        assert (parameter != before[name]).any().item() == learns, name
        assert (parameter.grad is not None) == learns, name


@pytest.mark.parametrize("name", IMAGE_NAMES)
@pytest.mark.parametrize("dora", [False, True])
def test_every_weight_of_an_image_adapter_learns_and_no_other_does(
    checkpoints: dict[str, Path], name: str, dora: bool
) -> None:
    spec = spec_of(checkpoints[name])
    live = LiveImageEncoder.load(spec, LoraSpec(rank=4, dora=dora))
    before = live(pixels_of(name))
    assert_all_learn(live, pixels_of(name))
    assert_other(live(pixels_of(name)), before)


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_every_weight_of_a_text_adapter_learns_and_no_other_does(texts: dict[str, Path], name: str) -> None:
    live = LiveTextEncoder.load(TextEncoderSpec(str(texts[name])), SPEC)
    token_ids = live.tokenize(PROMPTS)
    before = live(token_ids)
    assert_all_learn(live, token_ids)
    assert_other(live(token_ids), before)


def test_adapters_are_in_no_block_that_nothing_is_asked_of(checkpoints: dict[str, Path]) -> None:
    live = LiveImageEncoder.load(spec_of(checkpoints["dinov2"], layers=("2",)), LoraSpec(first_block=1))
    assert {name.split(".")[2] for name in live.adapted_modules} == {"1"}
    assert_all_learn(live, pixels_of("dinov2"))
    with pytest.raises(UsageError, match="nothing to adapt from block 2 on"):
        LiveImageEncoder.load(spec_of(checkpoints["dinov2"], layers=("2",)), LoraSpec(first_block=2))
    with pytest.raises(UsageError, match="nothing to adapt from block 0 on"):
        LiveImageEncoder.load(spec_of(checkpoints["dinov2"], layers=("0",)), LoraSpec())


def test_the_report_counts_weights(checkpoints: dict[str, Path]) -> None:
    frozen = LiveImageEncoder.load(spec_of(checkpoints["dinov2"]))
    live = LiveImageEncoder.load(spec_of(checkpoints["dinov2"]), SPEC)
    assert (frozen.num_trainable, frozen.adapted_modules) == (0, ())
    assert frozen.num_parameters == sum(p.numel() for p in load_tower(checkpoints["dinov2"]).parameters())
    num_trainable = 3 * 4 * (4 * (32 + 32) + 2 * (32 + 128))
    assert live.num_trainable == num_trainable
    assert live.num_parameters == frozen.num_parameters + num_trainable
    assert len(live.adapted_modules) == 3 * 6
    assert len(live.state_dict()) == len({tensor.data_ptr() for tensor in live.state_dict().values()})


# Modes


@pytest.mark.parametrize("dora", [False, True])
def test_in_training_the_dropout_of_the_adapter_is_on_and_that_of_the_model_off(
    texts: dict[str, Path], dora: bool
) -> None:
    spec = TextEncoderSpec(str(texts["bert"]))
    live = learned_text_encoder(texts["bert"], LoraSpec(rank=4, dropout=0.5, dora=dora))
    token_ids = live.tokenize(PROMPTS)
    said = live(token_ids)
    assert_same(live(token_ids), said, within=0)
    live.train()
    assert_other(live(token_ids), live(token_ids))
    plain = LiveTextEncoder.load(spec, SPEC).train()
    assert plain.training
    assert any(isinstance(module, nn.Dropout) and module.p == 0.1 for module in plain.modules())
    assert_same(plain(token_ids), load_text_encoder(spec).encode(token_ids), within=0)
    live.eval()
    assert_same(live(token_ids), said, within=0)


def test_places_are_not_drawn_at_random_in_training(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((checkpoints["dinov3_vit"] / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pos_embed_rescale": 2.0, "drop_path_rate": 0.5}))
    live = LiveImageEncoder.load(spec_of(tmp_path), SPEC).train()
    pixels = pixels_of("dinov3_vit")
    assert_same(live(pixels), live(pixels), within=0)


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_in_evaluation_the_precision_of_the_spec_decides_and_in_training_the_callers_autocast(
    checkpoints: dict[str, Path], name: str
) -> None:
    pixels = pixels_of(name)
    exact, half = spec_of(checkpoints[name]), spec_of(checkpoints[name], precision="bfloat16")
    in_full, in_half = load_image_encoder(exact).encode(pixels), load_image_encoder(half).encode(pixels)
    assert_other_bits(in_full, in_half)
    of_full, of_half = LiveImageEncoder.load(exact, SPEC), LiveImageEncoder.load(half, SPEC)
    assert all(parameter.dtype == torch.float32 for parameter in of_half.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(of_full(pixels), in_full, within=0)
        assert_same(of_full.train()(pixels), in_half, within=0)
    assert_same(of_half(pixels), in_half, within=0)
    assert_same(of_half.train()(pixels), in_full, within=0)


def assert_other_bits(found: ImageEncoding, expected: ImageEncoding) -> None:
    assert any((tensor != tensors_of(found)[name]).any() for name, tensor in tensors_of(expected).items())


@pytest.mark.parametrize("name", ["clip", "bert"])
def test_the_precision_of_text_follows_the_same_rule(texts: dict[str, Path], name: str) -> None:
    spec = TextEncoderSpec(str(texts[name]))
    half = replace(spec, precision="bfloat16")
    live = LiveTextEncoder.load(spec, SPEC)
    token_ids = live.tokenize(PROMPTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(live(token_ids), load_text_encoder(spec).encode(token_ids), within=0)
        assert_same(live.train()(token_ids), load_text_encoder(half).encode(token_ids), within=0)


def gradients(encoder: nn.Module, given: Any) -> dict[str, Tensor]:
    encoder.zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        loss_of(encoder(given)).backward()  # type: ignore[no-untyped-call]
    return {name: parameter.grad for name, parameter in encoder.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", [*IMAGE_NAMES, "text clip", "text bert", "text siglip2-fixed"])
def test_checkpointing_runs_blocks_twice_and_gives_the_same_gradients(
    checkpoints: dict[str, Path], texts: dict[str, Path], name: str
) -> None:
    lora = LoraSpec(rank=4, dropout=0.3)
    live: Any
    if name.startswith("text "):
        live = learned_text_encoder(texts[name.removeprefix("text ")], lora)
        given: Any = live.tokenize(PROMPTS)
    else:
        live, given = learned_image_encoder(checkpoints[name], name, lora), pixels_of(name)
    watched = live.get_submodule("_tower._model").get_submodule(live.adapted_modules[0])
    calls: list[int] = []
    watched.register_forward_hook(lambda *_: calls.append(1))
    live.train()
    plain = gradients(live, given)
    assert len(calls) == 1
    live.gradient_checkpointing(True)
    again = gradients(live, given)
    assert len(calls) == 3
    live.gradient_checkpointing(False)
    assert gradients(live, given).keys() == again.keys() == plain.keys()
    assert len(calls) == 4
    for parameter, gradient in plain.items():
        torch.testing.assert_close(again[parameter], gradient, rtol=1e-5, atol=1e-7)


# Adapters on the disk


@pytest.mark.parametrize("name", IMAGE_NAMES)
def test_an_image_adapter_opens_in_plain_peft_in_a_frozen_encoder_and_goes_on_learning(
    checkpoints: dict[str, Path], tmp_path: Path, name: str
) -> None:
    live, pixels = learned_image_encoder(checkpoints[name], name), pixels_of(name)
    said = live(pixels)
    live.save_adapter(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    spec = spec_of(checkpoints[name], adapter=str(tmp_path / "adapter"))
    frozen = load_image_encoder(spec)
    assert_same(frozen.encode(pixels), said, within=1e-4)

    adapted: Any = PeftModel.from_pretrained(load_tower(checkpoints[name]), tmp_path / "adapter").eval()
    side = FAMILIES[name].side
    output = forward_directly(name, adapted, [image.numpy() for image in pixels], (side, side))
    for layer in ("1", "last"):
        expected = expected_layer(name, output, layer, live.grids[layer][:2])[0]
        torch.testing.assert_close(said.features[layer], expected, rtol=0, atol=1e-4 * float(expected.abs().max()))

    resumed = LiveImageEncoder.load(spec_of(checkpoints[name]), adapter=str(tmp_path / "adapter"))
    assert_same(resumed(pixels), said, within=0)
    assert resumed.adapted_modules == live.adapted_modules
    assert resumed.num_trainable == live.num_trainable
    assert resumed.identity == frozen.identity
    assert_all_learn(resumed, pixels)
    resumed.save_adapter(tmp_path / "adapter")
    assert_same(load_image_encoder(spec).encode(pixels), resumed(pixels), within=1e-4)


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_a_text_adapter_opens_in_plain_peft_in_a_frozen_encoder_and_goes_on_learning(
    texts: dict[str, Path], tmp_path: Path, name: str
) -> None:
    live = learned_text_encoder(texts[name])
    token_ids = live.tokenize(PROMPTS)
    said = live(token_ids)
    live.save_adapter(tmp_path / "adapter")
    frozen = load_text_encoder(TextEncoderSpec(str(texts[name]), adapter=str(tmp_path / "adapter")))
    assert_same(frozen.encode(token_ids), said, within=1e-4)

    family = TEXT_FAMILIES[json.loads((texts[name] / "config.json").read_bytes())["model_type"]]
    plain = load_checkpoint(family.model_class, str(texts[name]))
    peft: Any = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    assert_same(said, through(peft, texts[name], live), within=1e-4)

    resumed = LiveTextEncoder.load(TextEncoderSpec(str(texts[name])), adapter=str(tmp_path / "adapter"))
    assert_same(resumed(token_ids), said, within=0)
    assert resumed.identity == frozen.identity
    assert_all_learn(resumed, token_ids)


@torch.no_grad()
def through(model: Any, folder: Path, live: LiveTextEncoder) -> TextEncoding:
    """What a plain model says of the prompts, padded to the limit at the side of the family."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = live.tokenize(PROMPTS)
    is_siglip = "siglip" in folder.name
    length = live.max_length if is_siglip else max(map(len, ids))
    left = folder.name.endswith("left")
    rows, masks = [], []
    for row in ids:
        gap = length - len(row)
        filler = [tokenizer.pad_token_id if is_siglip else row[-1]] * gap
        rows.append([*filler, *row] if left else [*row, *filler])
        masks.append([0] * gap + [1] * len(row) if left else [1] * len(row) + [0] * gap)
    attended = {} if is_siglip else {"attention_mask": torch.tensor(masks)}
    output = model(input_ids=torch.tensor(rows), **attended)
    longest = max(map(len, ids))
    tokens = torch.zeros(len(ids), longest, output.last_hidden_state.shape[-1])
    mask = torch.zeros(len(ids), longest, dtype=torch.bool)
    for number, row in enumerate(ids):
        state = output.last_hidden_state[number]
        tokens[number, : len(row)] = state[-len(row) :] if left else state[: len(row)]
        mask[number, : len(row)] = True
    pooled = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
    return TextEncoding(tokens, mask, pooled)


def test_an_adapter_on_the_disk_tells_nothing_of_the_machine(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    live = learned_image_encoder(checkpoints["dinov2"], "dinov2")
    live.save_adapter(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_bytes())
    assert settings["base_model_name_or_path"] == "dinov2"
    for path in (tmp_path / "adapter").iterdir():
        assert str(checkpoints["dinov2"].parent).encode() not in path.read_bytes()
        assert b"/tmp" not in path.read_bytes()
    assert settings["target_modules"] == sorted(live.adapted_modules)
    first = [path.read_bytes() for path in sorted((tmp_path / "adapter").iterdir())]
    live.save_adapter(tmp_path / "adapter")
    assert [path.read_bytes() for path in sorted((tmp_path / "adapter").iterdir())] == first


@pytest.mark.parametrize("name", IMAGE_NAMES)
def test_a_merged_image_encoder_is_a_whole_checkpoint(checkpoints: dict[str, Path], tmp_path: Path, name: str) -> None:
    live, pixels = learned_image_encoder(checkpoints[name], name, layers=("1", "2")), pixels_of(name)
    said = live(pixels)
    live.save_merged(tmp_path / "merged")
    assert_same(live(pixels), said, within=0)
    whole = AutoModel.from_pretrained(tmp_path / "merged")
    assert type(whole) is type(FAMILIES[name].make())
    assert next(whole.parameters()).dtype == torch.float32
    original = AutoModel.from_pretrained(checkpoints[name])
    weights = original.state_dict()
    others = {key for key, weight in whole.state_dict().items() if (weight != weights[key]).any()}
    prefix = "vision_model." if hasattr(whole, "vision_model") else ""
    assert others == {f"{prefix}{module}.weight" for module in live.adapted_modules}

    side = FAMILIES[name].side
    output = forward_directly(name, load_tower(tmp_path / "merged"), [image.numpy() for image in pixels], (side, side))
    for layer, features in said.features.items():
        expected = expected_layer(name, output, layer, live.grids[layer][:2])[0]
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    merged = load_image_encoder(spec_of(tmp_path / "merged", layers=("1", "2")))
    assert_same(merged.encode(pixels), said, within=1e-4)
    bare = load_image_encoder(spec_of(checkpoints[name])).identity
    assert {**merged.identity, "weights": bare["weights"]} == bare
    assert merged.identity["weights"] != bare["weights"]


@pytest.mark.parametrize("name", text_checkpoints.NAMES)
def test_a_merged_text_encoder_is_a_whole_checkpoint(texts: dict[str, Path], tmp_path: Path, name: str) -> None:
    live = learned_text_encoder(texts[name])
    token_ids = live.tokenize(PROMPTS)
    said = live(token_ids)
    live.save_merged(tmp_path / "merged")
    assert_same(live(token_ids), said, within=0)
    merged = load_text_encoder(TextEncoderSpec(str(tmp_path / "merged")))
    assert merged.tokenize(PROMPTS) == token_ids
    assert_same(merged.encode(token_ids), said, within=1e-4)
    bare = load_text_encoder(TextEncoderSpec(str(texts[name]))).identity
    assert {**merged.identity, "weights": bare["weights"]} == bare
    config = json.loads((tmp_path / "merged" / "config.json").read_bytes())
    before = json.loads((texts[name] / "config.json").read_bytes())
    assert config["architectures"] == before["architectures"]
    assert config["dtype"] == "float32"
    plain: Any = getattr(transformers, before["architectures"][0]).from_pretrained(tmp_path / "merged").eval()
    if before["model_type"] in ("clip", "siglip", "siglip2"):
        assert hasattr(plain, "vision_model"), "the other tower is gone"
        family = TEXT_FAMILIES[before["model_type"]]
        plain = family.model_class.from_pretrained(tmp_path / "merged").eval()
    assert_same(said, through(plain, texts[name], live), within=1e-4)


def test_the_gated_mlp_of_the_largest_dinov2_is_merged_under_its_published_names(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    source = tmp_path / "giant"
    config = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        patch_size=14,
        image_size=56,
        use_swiglu_ffn=True,
        layerscale_value=0.5,
    )
    Dinov2Model(config).save_pretrained(source)
    shutil.copy(checkpoints["dinov2"] / "preprocessor_config.json", source)
    live = learned_image_encoder(source, "dinov2")
    live.save_adapter(tmp_path / "adapter")
    live.save_merged(tmp_path / "merged")
    published, merged = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "merged"))
    assert merged.keys() == published.keys()
    assert "encoder.layer.0.mlp.weights_in.weight" in merged
    pixels = pixels_of("dinov2")
    for spec in (spec_of(tmp_path / "merged"), spec_of(source, adapter=str(tmp_path / "adapter"))):
        assert_same(load_image_encoder(spec).encode(pixels), live(pixels), within=1e-4)


def test_a_merged_encoder_of_half_weights_is_not_rounded_again(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    half = tmp_path / "half"
    AutoModel.from_pretrained(checkpoints["clip"]).to(torch.float16).save_pretrained(half)
    (half / "preprocessor_config.json").write_bytes((checkpoints["clip"] / "preprocessor_config.json").read_bytes())
    live = learned_image_encoder(half, "clip")
    live.save_merged(tmp_path / "merged")
    assert AutoModel.from_pretrained(half).dtype == torch.float16
    assert AutoModel.from_pretrained(tmp_path / "merged").dtype == torch.float32


# Starting from a block


@pytest.mark.parametrize("name", IMAGE_NAMES)
@pytest.mark.parametrize("layer", ["0+tokens", "2+tokens"])
def test_all_tokens_of_a_hidden_state_are_a_layer(checkpoints: dict[str, Path], name: str, layer: str) -> None:
    pixels, side = pixels_of(name), FAMILIES[name].side
    output = forward_directly(name, load_tower(checkpoints[name]), [image.numpy() for image in pixels], (side, side))
    expected = output.hidden_states[int(layer[0])]
    encoder = load_image_encoder(spec_of(checkpoints[name], layers=(layer, "1")))
    encoding = encoder.encode(pixels)
    assert torch.equal(encoding.features[layer], expected[:, None])
    assert encoder.grids[layer] == (1, *expected.shape[1:])
    assert encoding.cls.keys() == encoder.cls_widths.keys() == ({"1"} if FAMILIES[name].has_cls else set())


def tokens_before(checkpoint: Path, start: int, pixels: Tensor, **settings: Any) -> Tensor:
    """What a job would cache for a later start: all tokens, as they are stored in float32."""
    encoding = load_image_encoder(spec_of(checkpoint, layers=(f"{start}+tokens",), **settings)).encode(pixels)
    return encoding.features[f"{start}+tokens"][:, 0].clone()


@pytest.mark.parametrize("name", IMAGE_NAMES)
@pytest.mark.parametrize("start", [0, 1, 2])
@pytest.mark.parametrize("larger", [False, True])
def test_going_on_from_cached_tokens_gives_the_features_and_gradients_of_the_whole_way(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, start: int, larger: bool
) -> None:
    family = FAMILIES[name]
    size = (family.side, family.side + family.step * larger)
    settings: dict[str, Any] = {
        "layers": (str(start), "2+tokens", "3+norm", "last"),
        "attention": ("logits", "mean_token") if name.startswith("dino") else (),
        "input_size": size,
    }
    pixels = torch.stack([torch.from_numpy(image) for image in noise_images([size] * 2)])
    spec = spec_of(checkpoints[name], **settings)
    whole = LiveImageEncoder.load(spec, LoraSpec(rank=4, first_block=start))
    step(whole, pixels)
    whole.save_adapter(tmp_path)
    later = LiveImageEncoder.load(spec, adapter=str(tmp_path), start=start)
    assert later.adapted_modules == whole.adapted_modules
    assert {name.split(".")[2] for name in later.adapted_modules} == {str(block) for block in range(start, 3)}
    assert later.identity["weights"] == whole.identity["weights"]
    assert later.num_parameters < whole.num_parameters
    tokens = tokens_before(checkpoints[name], start, pixels, input_size=size)
    assert_same(later(tokens), whole(pixels), within=0)
    assert_same(later.train()(tokens), whole.train()(pixels), within=0)
    expected = gradients(whole, pixels)
    found = gradients(later, tokens)
    assert found.keys() == expected.keys()
    assert found
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-5, atol=1e-7)
    later.gradient_checkpointing(True)
    for parameter, gradient in gradients(later, tokens).items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-5, atol=1e-7)


def test_what_learned_from_a_later_block_is_saved_as_ever(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    spec = spec_of(checkpoints["clip"], layers=("last",))
    later = LiveImageEncoder.load(spec, LoraSpec(rank=4, first_block=1), start=1)
    pixels = pixels_of("clip")
    tokens = tokens_before(checkpoints["clip"], 1, pixels)
    step(later, tokens)
    later.save_adapter(tmp_path / "adapter")
    later.save_merged(tmp_path / "merged")
    adapted = replace(spec, adapter=str(tmp_path / "adapter"))
    for frozen in (load_image_encoder(adapted), load_image_encoder(replace(spec, source=str(tmp_path / "merged")))):
        assert_same(frozen.encode(pixels), later(tokens), within=1e-4)


def test_a_start_that_cannot_be_is_refused_in_one_sentence(checkpoints: dict[str, Path]) -> None:
    spec = spec_of(checkpoints["dinov2"])
    refused(lambda: LiveImageEncoder.load(spec, start=2), "layer 1 comes before block 2, where the encoder starts")
    late = replace(spec, layers=("last",))
    refused(lambda: LiveImageEncoder.load(late, start=4), "Dinov2Model has 3 blocks")
    refused(lambda: LiveImageEncoder.load(late, start=-1), "Dinov2Model has 3 blocks")
    refused(lambda: LiveImageEncoder.load(late, LoraSpec(first_block=1), start=2), "set first_block to 2 or more")
    pyramid = spec_of(checkpoints["resnet"], layers=("last",))
    refused(lambda: LiveImageEncoder.load(pyramid, start=1), "only transformers start at a block")


def test_what_an_encoder_does_not_take_is_named(checkpoints: dict[str, Path]) -> None:
    spec = spec_of(checkpoints["dinov2"], layers=("last",))
    with pytest.raises(ValueError, match=r"starts at block 1: give it \(i, 17, d\) tokens, not \(2, 16, 32\)"):
        LiveImageEncoder.load(spec, start=1)(torch.zeros(2, 16, 32))
    with pytest.raises(ValueError, match=r"starts at the pixels: give it \(i, h, w, 3\), not \(2, 17, 32\)"):
        LiveImageEncoder.load(spec)(torch.zeros(2, 17, 32))


# Refusals


def refused(load: Callable[[], object], match: str) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        load()
    assert "\n" not in str(caught.value)


def test_what_cannot_learn_is_refused_in_one_sentence(
    checkpoints: dict[str, Path], texts: dict[str, Path], tmp_path: Path
) -> None:
    spec = spec_of(checkpoints["dinov2"])
    learned_image_encoder(checkpoints["dinov2"], "dinov2").save_adapter(tmp_path / "adapter")
    folder = str(tmp_path / "adapter")
    refused(lambda: LiveImageEncoder.load(replace(spec, adapter=folder), SPEC), "finetune --merge")
    refused(lambda: LiveTextEncoder.load(TextEncoderSpec(str(texts["bert"]), adapter=folder)), "finetune --merge")
    refused(
        lambda: LiveImageEncoder.load(spec, replace(SPEC, rank=SPEC.rank + 1), adapter=folder), "other settings: rank"
    )
    refused(lambda: LiveImageEncoder.load(spec_of(checkpoints["resnet"], layers=("last",)), SPEC), "convolutional")
    refused(lambda: LiveImageEncoder.load(replace(spec, layers=("2",)), adapter=folder), r"adapts encoder\.layer\.2\.")
    refused(lambda: LiveImageEncoder.load(spec, adapter=folder, start=1), r"adapts encoder\.layer\.0\..*starts")
    refused(lambda: LiveTextEncoder.load(TextEncoderSpec(str(texts["bert"])), adapter=folder), "cannot be laid on")
    bare = LiveImageEncoder.load(spec)
    refused(lambda: bare.save_adapter(tmp_path / "none"), "was loaded without an adapter")
    refused(lambda: bare.save_merged(tmp_path / "none"), "was loaded without an adapter")
    refused(lambda: bare.save_merged(tmp_path), "is there already")


def test_a_pyramid_is_live_but_learns_nothing(checkpoints: dict[str, Path]) -> None:
    spec = spec_of(checkpoints["resnet"], layers=("3", "last"))
    live, pixels = LiveImageEncoder.load(spec), pixels_of("resnet")
    live.gradient_checkpointing(True)
    assert live.num_trainable == 0
    assert_same(live.train()(pixels), load_image_encoder(spec).encode(pixels), within=0)
