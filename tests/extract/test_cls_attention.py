"""Attention outputs are those of the CLS row of the last block, over the patches alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb

from cache_schema.masks import Size
from extract.encoders import families as product
from extract.encoders.image import HubImageEncoder, load_image_encoder
from extract.encoders.protocols import ImageEncoding
from extract.encoders.specs import AttentionOutput, ImageEncoderSpec
from extract.encoders.vision_transformer import VisionTransformer
from extract.preprocessing import Preprocessing
from tests.extract.image_checkpoints import (
    DINO,
    FAMILIES,
    NUM_HEADS,
    WIDTH,
    load_tower,
    make_checkpoints,
    noise_images,
)

ALL: tuple[AttentionOutput, ...] = ("logits", "head_tokens", "mean_token")
GRID = (3, 5)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def load(checkpoint: Path, name: str, **settings: Any) -> HubImageEncoder:
    return load_image_encoder(ImageEncoderSpec(str(checkpoint), input_size=size_of(name), **settings))


def size_of(name: str) -> Size:
    return GRID[0] * FAMILIES[name].step, GRID[1] * FAMILIES[name].step


def pixels_of(name: str, num_images: int = 2) -> Tensor:
    return torch.from_numpy(np.stack(noise_images([size_of(name)] * num_images)))


def encode(checkpoint: Path, name: str, **settings: Any) -> ImageEncoding:
    return load(checkpoint, name, **settings).encode(pixels_of(name))


def normalised(checkpoint: Path, name: str) -> Tensor:
    settings = load(checkpoint, name).identity["preprocessing"]
    preprocessing = Preprocessing(size_of(name), settings["mean"], settings["std"], settings["resample"])
    return preprocessing.normalise(pixels_of(name)).contiguous()


@torch.no_grad()
def naive_logits(model: Any, name: str, pixels: Tensor) -> Tensor:
    """Everything in float64, by the weights of the last block, out of what goes into it."""
    model = model.double()
    output = model(pixel_values=pixels.double(), output_hidden_states=True)
    blocks = model.model.layer if name == "dinov3_vit" else model.encoder.layer
    attention = blocks[-1].attention
    states = blocks[-1].norm1(output.hidden_states[-2])
    query, keys = (
        projection(states).unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj)
    )
    if name == "dinov3_vit":
        query, keys = apply_rotary_pos_emb(query, keys, *model.rope_embeddings(pixels.double()))
    num_prefix = 1 + FAMILIES[name].num_registers
    logits = query[:, :, :1] @ keys[:, :, num_prefix:].transpose(2, 3) / (WIDTH / NUM_HEADS) ** 0.5
    return logits[:, :, 0].unflatten(-1, GRID)


@pytest.mark.parametrize("name", DINO)
def test_logits_are_those_of_the_cls_query_and_the_keys_of_patches(checkpoints: dict[str, Path], name: str) -> None:
    logits = encode(checkpoints[name], name, attention=("logits",)).attention["logits"]
    expected = naive_logits(load_tower(checkpoints[name]), name, normalised(checkpoints[name], name))
    assert logits.shape == (2, NUM_HEADS, *GRID)
    assert expected.std() > 0.05, "weights too small to tell anything"
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", DINO)
def test_their_softmax_is_transformers_attention_without_cls_and_registers(
    checkpoints: dict[str, Path], name: str
) -> None:
    model = type(load_tower(checkpoints[name])).from_pretrained(checkpoints[name], attn_implementation="eager").eval()
    with torch.no_grad():
        output = model(pixel_values=normalised(checkpoints[name], name), output_attentions=True)
    row = output.attentions[-1][:, :, 0, 1 + FAMILIES[name].num_registers :]
    logits = encode(checkpoints[name], name, attention=("logits",)).attention["logits"]
    torch.testing.assert_close(logits.flatten(2).softmax(-1), row / row.sum(-1, keepdim=True), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", DINO)
def test_tokens_are_patches_weighted_by_attention_and_divided_by_their_number_once_more(
    checkpoints: dict[str, Path], name: str
) -> None:
    encoding = encode(checkpoints[name], name, attention=ALL)
    logits = encoding.attention["logits"].double().flatten(2).numpy()
    patches = encoding.features["last"].double().flatten(1, 2).numpy()
    for image in range(2):
        for head in range(NUM_HEADS):
            weights = np.exp(logits[image, head])
            expected = (weights / weights.sum()) @ patches[image] / patches.shape[1]
            np.testing.assert_allclose(encoding.attention["head_tokens"][image, head], expected, rtol=0, atol=1e-6)
        weights = np.exp(logits[image].mean(0))
        expected = (weights / weights.sum()) @ patches[image] / patches.shape[1]
        np.testing.assert_allclose(encoding.attention["mean_token"][image], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("outputs", [("mean_token",), ("head_tokens", "logits"), ALL])
def test_what_is_asked_for_is_given_in_its_order_and_shape(
    checkpoints: dict[str, Path], outputs: tuple[AttentionOutput, ...]
) -> None:
    encoder = load(checkpoints["dinov2"], "dinov2", attention=outputs)
    shapes = {"logits": (NUM_HEADS, *GRID), "head_tokens": (NUM_HEADS, WIDTH), "mean_token": (WIDTH,)}
    said = encoder.encode(pixels_of("dinov2")).attention
    assert list(said) == list(encoder.attention_shapes) == list(outputs)
    for output in outputs:
        assert said[output].shape == (2, *encoder.attention_shapes[output]) == (2, *shapes[output])


def test_with_attention_alone_there_is_still_the_cls_token_it_belongs_to(checkpoints: dict[str, Path]) -> None:
    encoder = load(checkpoints["dinov3_vit"], "dinov3_vit", layers=(), attention=("mean_token",))
    encoding = encoder.encode(pixels_of("dinov3_vit"))
    assert encoder.grids == encoding.features == {}
    assert encoder.cls_widths == {"last": WIDTH}
    expected = encode(checkpoints["dinov3_vit"], "dinov3_vit")
    assert torch.equal(encoding.cls["last"], expected.cls["last"])


def test_attention_is_of_the_last_block_whichever_layers_are_asked_for(checkpoints: dict[str, Path]) -> None:
    shallow = encode(checkpoints["dinov2"], "dinov2", layers=("1",), attention=ALL)
    deep = encode(checkpoints["dinov2"], "dinov2", layers=("last",), attention=ALL)
    assert tuple(shallow.features) == tuple(shallow.cls) == ("1",)
    for output in ALL:
        assert torch.equal(shallow.attention[output], deep.attention[output])


@pytest.mark.parametrize("name", DINO)
def test_attention_changes_no_feature_and_builds_no_square_of_weights(checkpoints: dict[str, Path], name: str) -> None:
    with_attention = load(checkpoints[name], name, attention=ALL).encode(pixels_of(name))
    without = load(checkpoints[name], name).encode(pixels_of(name))
    assert torch.equal(with_attention.features["last"], without.features["last"])
    model = load_tower(checkpoints[name])
    VisionTransformer(model, product.TRANSFORMERS[name], ("last",), ALL, size_of(name))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", DINO)
@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_under_half_precision_only_the_projections_are_rounded(
    checkpoints: dict[str, Path], name: str, precision: Any, tolerance: float
) -> None:
    half = encode(checkpoints[name], name, attention=ALL, precision=precision).attention
    full = encode(checkpoints[name], name, attention=ALL).attention
    for output in ALL:
        assert half[output].dtype == torch.float32
        within = tolerance * float(full[output].abs().max())
        torch.testing.assert_close(half[output], full[output], rtol=0, atol=within)
    # From half-precision queries and keys, in float32: no logit is a half-precision number by itself.
    logits = half["logits"]
    assert (logits.to(getattr(torch, precision)).float() != logits).float().mean() > 0.5


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT still asks for it
def test_an_adapter_that_is_not_merged_is_heard_too(checkpoints: dict[str, Path]) -> None:
    pixels = normalised(checkpoints["dinov3_vit"], "dinov3_vit")
    lora = LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False)

    def tower_of(model: Any) -> VisionTransformer:
        family = product.TRANSFORMERS["dinov3_vit"]
        return VisionTransformer(model, family, ("last",), ("logits",), size_of("dinov3_vit")).eval()

    adapted: Any = get_peft_model(load_tower(checkpoints["dinov3_vit"]), lora)
    with torch.no_grad():
        plain = tower_of(load_tower(checkpoints["dinov3_vit"]))(pixels).attention["logits"]
        apart = tower_of(adapted.base_model.model)(pixels).attention["logits"]
        merged = tower_of(adapted.merge_and_unload())(pixels).attention["logits"]
    assert not torch.allclose(apart, plain, atol=1e-2)
    torch.testing.assert_close(apart, merged, rtol=0, atol=1e-4)
