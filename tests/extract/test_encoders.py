"""Image encoders return what transformers returns for the same checkpoint and the same images."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Dinov2Model

from cache_schema.masks import Size
from extract.encoders import families as product
from extract.encoders.image import HubImageEncoder, load_image_encoder
from extract.encoders.protocols import ImageEncoder, ImageEncoding
from extract.encoders.specs import ImageEncoderSpec, Precision
from extract.encoders.vision_transformer import VisionTransformer
from extract.preprocessing import Preprocessing
from tests.extract.image_checkpoints import (
    DINO,
    FAMILIES,
    NUM_BLOCKS,
    PYRAMIDS,
    STAGES,
    TRANSFORMERS,
    encode,
    expected_layer,
    forward_directly,
    load_tower,
    make_checkpoints,
    noise_images,
)

GRIDS = {name: ((2, 2), (1, 3)) if FAMILIES[name].is_pyramid else ((4, 4), (2, 5), (6, 3)) for name in FAMILIES}
CASES = [(name, grid) for name, grids in GRIDS.items() for grid in grids]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small random checkpoint of each family of image encoders."""
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def load(checkpoint: Path, **settings: Any) -> HubImageEncoder:
    return load_image_encoder(ImageEncoderSpec(str(checkpoint), **settings))


def size_of(name: str, grid: tuple[int, int]) -> Size:
    return grid[0] * FAMILIES[name].step, grid[1] * FAMILIES[name].step


def images_for(name: str, size: Size) -> list[NDArray[np.uint8]]:
    """Of other shapes than the input, which are squashed; NaFlex keeps shapes, so for it of the input's shape."""
    if name.startswith("siglip2"):
        return noise_images([(2 * size[0], 2 * size[1]), (3 * size[0], 3 * size[1])])
    return noise_images([(50, 90), (131, 33)])


# Features


@pytest.mark.parametrize(("name", "grid"), CASES)
def test_layers_and_cls_tokens_are_those_of_transformers(
    checkpoints: dict[str, Path], name: str, grid: tuple[int, int]
) -> None:
    family, size = FAMILIES[name], size_of(name, grid)
    images = images_for(name, size)
    output = forward_directly(name, load_tower(checkpoints[name]), images, size)
    encoder = load(checkpoints[name], layers=family.layers, input_size=size)
    encoding = encode(encoder, images)
    assert tuple(encoding.features) == tuple(encoder.grids) == family.layers
    assert encoding.attention == encoder.attention_shapes == {}
    for layer in family.layers:
        features, cls = expected_layer(name, output, layer, encoder.grids[layer][:2])
        assert features.abs().max() > 0.01
        # Convolutions in channels-last may sum in another order; everything else is the same to the last bit.
        within = 1e-5 * float(features.abs().max()) if name == "resnet" else 0
        torch.testing.assert_close(encoding.features[layer], features, rtol=0, atol=within)
        assert encoding.features[layer].shape == (2, *encoder.grids[layer])
        assert (layer in encoding.cls) == (layer in encoder.cls_widths) == (cls is not None)
        if cls is not None:
            torch.testing.assert_close(encoding.cls[layer], cls, rtol=0, atol=0)
            assert encoding.cls[layer].shape == (2, encoder.cls_widths[layer])


def test_cls_tokens_are_there_where_a_model_has_them(checkpoints: dict[str, Path]) -> None:
    with_cls = {name: set(load(checkpoints[name], layers=FAMILIES[name].layers).cls_widths) for name in FAMILIES}
    every = {"last", "0", "1", "2", "3"}
    assert with_cls == {
        **dict.fromkeys((*DINO, "clip", "clip_vision_model"), every),
        **{name: set() for name in FAMILIES if name.startswith("siglip") or name == "resnet"},
        "dinov3_convnext": {"last"},
    }


def test_stages_of_a_pyramid_have_grids_of_their_own(checkpoints: dict[str, Path]) -> None:
    for name in PYRAMIDS:
        encoder = load(checkpoints[name], layers=("1", "2", "3", "4", "last"), input_size=(64, 96))
        grids = {str(number): (64 >> number + 1, 96 >> number + 1, STAGES[number - 1]) for number in range(1, 5)}
        assert encoder.grids == {**grids, "last": (2, 3, STAGES[-1])}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_number_with_norm_is_that_block_through_the_final_norm(checkpoints: dict[str, Path], name: str) -> None:
    side = FAMILIES[name].side
    images, model = images_for(name, (side, side)), load_tower(checkpoints[name])
    output = forward_directly(name, model, images, (side, side))
    norm = next(getattr(model, place) for place in ("layernorm", "norm", "post_layernorm") if hasattr(model, place))
    encoding = encode(load(checkpoints[name], layers=("1+norm", f"{NUM_BLOCKS}+norm", "last", "1")), images)
    grid = (encoding.features["1"].shape[1], encoding.features["1"].shape[2])
    with torch.no_grad():
        output.hidden_states = tuple(map(norm, output.hidden_states))
    for number in (1, NUM_BLOCKS):
        features, cls = expected_layer(name, output, str(number), grid)
        torch.testing.assert_close(encoding.features[f"{number}+norm"], features, rtol=0, atol=0)
        assert cls is None or torch.equal(encoding.cls[f"{number}+norm"], cls)
    assert not torch.equal(encoding.features["1"], encoding.features["1+norm"])
    is_normed = torch.equal(encoding.features["last"], encoding.features[f"{NUM_BLOCKS}+norm"])
    assert is_normed == (not name.startswith("clip")), "only CLIP leaves its last hidden state as it is"


@pytest.mark.parametrize("name", FAMILIES)
def test_what_else_is_asked_for_makes_no_difference_to_a_layer(checkpoints: dict[str, Path], name: str) -> None:
    family = FAMILIES[name]
    images = noise_images([(40, 40)])
    together = encode(load(checkpoints[name], layers=family.layers), images)
    for layer in family.layers:
        alone = encode(load(checkpoints[name], layers=(layer,)), images)
        assert tuple(alone.features) == (layer,)
        assert torch.equal(alone.features[layer], together.features[layer])
        assert (layer in alone.cls) == (layer in together.cls)


def test_what_lies_behind_the_deepest_layer_is_not_even_kept(checkpoints: dict[str, Path]) -> None:
    num_weights = []
    for layers in (("0",), ("1",), ("2+norm", "1"), ("3",), ("last",)):
        family = product.TRANSFORMERS["siglip"]
        tower = VisionTransformer(load_tower(checkpoints["siglip"]), family, layers, (), (64, 64))
        num_weights.append(sum(weight.numel() for weight in tower.parameters()))
    block = num_weights[2] - num_weights[1]
    assert block > 0
    assert [number - num_weights[0] for number in num_weights] == [0, 0, block, 2 * block, 2 * block]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_grids_are_row_major_and_stand_upright(checkpoints: dict[str, Path], name: str) -> None:
    step = FAMILIES[name].step
    encoder = load(checkpoints[name], layers=("0",), input_size=(3 * step, 5 * step))
    plain = np.zeros((3 * step, 5 * step, 3), np.uint8)
    marked = plain.copy()
    marked[2 * step :, step : 2 * step] = 255
    changed = (encode(encoder, [marked]).features["0"] - encode(encoder, [plain]).features["0"]).abs().amax(-1)
    assert (changed > 1e-3).nonzero().tolist() == [[0, 2, 1]]


@pytest.mark.parametrize("name", PYRAMIDS)
def test_maps_of_a_pyramid_stand_upright(checkpoints: dict[str, Path], name: str) -> None:
    encoder = load(checkpoints[name], layers=("1",), input_size=(64, 96))
    plain = np.zeros((64, 96, 3), np.uint8)
    marked = plain.copy()
    marked[50:52, 20:22] = 255
    changed = (encode(encoder, [marked]).features["1"] - encode(encoder, [plain]).features["1"]).abs().sum(-1)[0]
    row, column = np.unravel_index(int(changed.argmax()), changed.shape)
    assert abs(row - 50 / 4) < 3
    assert abs(column - 20 / 4) < 3


@pytest.mark.parametrize("name", FAMILIES)
def test_who_stands_beside_an_image_in_a_batch_makes_no_difference(checkpoints: dict[str, Path], name: str) -> None:
    encoder = load(checkpoints[name], layers=(FAMILIES[name].layers[2], "last"))
    images = noise_images([(64, 64)] * 5)
    batch = encode(encoder, images)
    for row in range(5):
        alone = encode(encoder, images[row : row + 1])
        for layer, features in batch.features.items():
            within = 1e-5 * float(features.abs().max())
            torch.testing.assert_close(alone.features[layer][0], features[row], rtol=0, atol=within)


@pytest.mark.parametrize("name", FAMILIES)
def test_encoders_are_frozen_and_say_the_same_again(checkpoints: dict[str, Path], name: str) -> None:
    encoder = load(checkpoints[name])
    images = noise_images([(64, 64)])
    first, second = (encode(encoder, images).features["last"] for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert first.dtype == torch.float32
    assert isinstance(encoder, ImageEncoder)


# Precision


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_half_precision_is_autocast_and_close_to_full_precision(
    checkpoints: dict[str, Path], name: str, precision: Precision, tolerance: float
) -> None:
    side = FAMILIES[name].side
    images = images_for(name, (side, side))
    with torch.autocast("cpu", getattr(torch, precision)):
        output = forward_directly(name, load_tower(checkpoints[name]), images, (side, side))
    layers = FAMILIES[name].layers
    half, full = (
        encode(load(checkpoints[name], layers=layers, precision=kind), images) for kind in (precision, "float32")
    )
    for layer in layers:
        grid = (half.features[layer].shape[1], half.features[layer].shape[2])
        scale = float(full.features[layer].abs().max())
        assert float((half.features[layer] - full.features[layer]).abs().max()) < tolerance * scale
        plain = expected_layer(name, output, layer, grid)[0]
        within = tolerance / 5 * scale if name == "resnet" else 0  # in channels-last, sums are rounded elsewhere
        torch.testing.assert_close(half.features[layer], plain, rtol=0, atol=within)
    assert not torch.equal(half.features["last"].float(), full.features["last"])


def test_float32_is_float32_whatever_the_caller_and_the_graphics_card_would_like(
    checkpoints: dict[str, Path],
) -> None:
    encoder, images = load(checkpoints["dinov2"]), noise_images([(56, 56)])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encode(encoder, images).features["last"], encode(encoder, images).features["last"])
        autocast = encode(encoder, images).features["last"]
    assert torch.equal(autocast, encode(encoder, images).features["last"])


def test_convolutions_are_not_rounded_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asking(VisionTransformer):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.allowed = True

        def forward(self, pixels: Tensor) -> ImageEncoding:
            self.allowed = torch.backends.cudnn.allow_tf32
            return ImageEncoding({})

    tower = Asking()
    preprocessing = Preprocessing((8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    HubImageEncoder(tower, preprocessing, {}, "asking").encode(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))
    assert not tower.allowed
    assert torch.backends.cudnn.allow_tf32


def test_a_checkpoint_saved_in_half_precision_is_computed_in_full(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    half = Path(shutil.copytree(checkpoints["dinov2"], tmp_path / "half"))
    Dinov2Model.from_pretrained(checkpoints["dinov2"], dtype=torch.float16).save_pretrained(half)
    assert encode(load(half), noise_images([(56, 56)])).features["last"].dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's compiler still scripts a class
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_say_the_same_within_rounding(checkpoints: dict[str, Path]) -> None:
    spec = ImageEncoderSpec(str(checkpoints["dinov3_vit"]), layers=("1", "last"), attention=("logits",))
    compiled, plain = load_image_encoder(spec, compiled=True), load_image_encoder(spec)
    images = noise_images([(64, 64)] * 2)
    expected = encode(plain, images)
    for _ in range(2):
        said = encode(compiled, images)
        for layer in spec.layers:
            torch.testing.assert_close(said.features[layer], expected.features[layer], rtol=0, atol=1e-4)
        torch.testing.assert_close(said.attention["logits"], expected.attention["logits"], rtol=0, atol=1e-4)
    assert compiled.identity == plain.identity
