"""Image encoders take sizes, layers and processors that make sense, and say what is wrong with others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_schema.errors import UsageError
from cache_schema.masks import Size
from cache_schema.views import View
from extract.encoders import IMAGE_ENCODERS, TEXT_ENCODERS, resolve_encoder
from extract.encoders import families as product
from extract.encoders.image import HubImageEncoder, load_image_encoder
from extract.encoders.sizes import own_size
from extract.encoders.specs import ImageEncoderSpec
from tests.extract.image_checkpoints import (
    COLOURS,
    DINO,
    FAMILIES,
    PYRAMIDS,
    STAGES,
    WIDTH,
    encode,
    forward_directly,
    load_tower,
    make_checkpoints,
    noise_images,
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small random checkpoint of each family of image encoders."""
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def load(checkpoint: Path, **settings: Any) -> HubImageEncoder:
    return load_image_encoder(ImageEncoderSpec(str(checkpoint), **settings))


def change(checkpoint: Path, parent: Path, file: str, **changes: Any) -> Path:
    """A copy of a checkpoint with other settings in one of its JSON files; those that become ... are left out."""
    copy = Path(shutil.copytree(checkpoint, parent / "changed", dirs_exist_ok=True))
    settings = {**json.loads((checkpoint / file).read_bytes()), **changes}
    (copy / file).write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))
    return copy


# Sizes and preprocessing


@pytest.mark.parametrize("name", FAMILIES)
def test_the_checkpoints_own_size_is_the_default(checkpoints: dict[str, Path], name: str) -> None:
    family = FAMILIES[name]
    encoder = load(checkpoints[name])
    cells = family.side // family.step
    assert encoder.grids == {"last": (cells, cells, STAGES[-1] if family.is_pyramid else WIDTH)}
    pixels = encoder.preprocess(np.zeros((10, 30, 3), np.uint8))
    assert pixels.shape == (family.side, family.side, 3)
    assert pixels.dtype == np.uint8


@pytest.mark.parametrize(
    ("said", "side"),
    [
        ({"size": 96}, 96),
        ({"size": {"shortest_edge": 96}}, 96),
        ({"size": {"height": 96, "width": 96}}, 96),
        ({"size": {"shortest_edge": 128}, "crop_size": {"height": 96, "width": 96}, "do_center_crop": True}, 96),
        ({"size": 128, "crop_size": 96, "do_center_crop": True}, 96),
        ({"size": 128, "crop_size": 96, "do_center_crop": False}, 128),
    ],
)
def test_a_resnets_own_size_is_what_its_processor_leaves_of_an_image(
    checkpoints: dict[str, Path], tmp_path: Path, said: dict[str, Any], side: int
) -> None:
    said = {"crop_size": ..., "do_center_crop": ..., **said}
    encoder = load(change(checkpoints["resnet"], tmp_path, "preprocessor_config.json", **said))
    assert encoder.grids == {"last": (side // 32, side // 32, STAGES[-1])}


def test_a_processor_that_names_no_size_must_be_given_one(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    sizeless = change(checkpoints["resnet"], tmp_path, "preprocessor_config.json", size=...)
    with pytest.raises(UsageError, match=r"does not say what size its images have; give an input size"):
        load(sizeless)


@pytest.mark.parametrize(
    ("name", "input_size", "nearest"),
    [
        ("dinov2", (56, 57), "56 x 56"),
        ("dinov2", (64, 56), "70 x 56"),
        ("dinov2", (3, 56), "14 x 56"),
        ("siglip2", (64, 100), "64 x 96"),
        ("resnet", (64, 100), "64 x 96"),
        ("dinov3_convnext", (80, 250), "64 x 256"),
    ],
)
def test_a_size_that_is_no_multiple_of_a_cell_is_refused_with_the_nearest_that_is(
    checkpoints: dict[str, Path], name: str, input_size: Size, nearest: str
) -> None:
    complaint = f"input size {input_size[0]} x {input_size[1]} is no multiple of .* the nearest size is {nearest}"
    with pytest.raises(UsageError, match=complaint):
        load(checkpoints[name], input_size=input_size)


def test_a_pyramid_takes_multiples_alone(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    odd = change(checkpoints["resnet"], tmp_path, "preprocessor_config.json", size=225)
    with pytest.raises(UsageError, match=r"input size 225 x 225 is no multiple of .* the nearest size is 224 x 224"):
        load(odd)
    assert load(odd, input_size=(32, 64)).grids == {"last": (1, 2, STAGES[-1])}


def test_a_size_of_its_own_that_is_no_multiple_is_taken_as_the_model_takes_it(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    odd = change(checkpoints["siglip_vision_model"], tmp_path, "config.json", image_size=70)
    images = noise_images([(70, 70)])
    output = forward_directly("siglip_vision_model", load_tower(odd), images, (70, 70))
    encoding = encode(load(odd), images)
    assert encoding.features["last"].shape == (1, 4, 4, WIDTH)
    assert load(odd, input_size=(70, 70)).identity == load(odd).identity
    # The oracle takes 70 for another size than its own 64, and interpolates positions from 4 x 4 to 4 x 4.
    torch.testing.assert_close(encoding.features["last"].flatten(1, 2), output.last_hidden_state, rtol=0, atol=1e-5)


def test_views_are_fitted_to_the_input(checkpoints: dict[str, Path]) -> None:
    encoder = load(checkpoints["dinov2"], input_size=(28, 56), aspect="crop")
    assert encoder.fit(View((0, 0, 100, 100), False)) == View((0, 25, 100, 75), False)
    assert load(checkpoints["dinov2"]).fit(View((0, 0, 90, 50), True)) == View((0, 0, 90, 50), True)


@pytest.mark.parametrize(
    ("name", "said", "resample"),
    [
        ("dinov2", ..., "bicubic"),
        ("dinov3_vit", ..., "bilinear"),
        ("siglip", ..., "bicubic"),
        ("siglip2", ..., "bilinear"),
        ("dinov3_convnext", ..., "bilinear"),
        ("dinov2", 2, "bilinear"),
        ("dinov3_vit", 3, "bicubic"),
    ],
)
def test_the_checkpoints_own_resampling_is_used_or_that_of_its_family(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, said: Any, resample: str
) -> None:
    checkpoint = change(checkpoints[name], tmp_path, "preprocessor_config.json", resample=said)
    assert load(checkpoint).identity["preprocessing"]["resample"] == resample


def test_one_mean_for_all_colours_will_do(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    grey = change(checkpoints["dinov2"], tmp_path, "preprocessor_config.json", image_mean=0.5, image_std=0.25)
    preprocessing = load(grey).identity["preprocessing"]
    assert (preprocessing["mean"], preprocessing["std"]) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ({"resample": 0}, r"resamples by Pillow's filter 0; known are \{2: 'bilinear', 3: 'bicubic'\}"),
        ({"do_rescale": False}, r"says do_rescale false"),
        ({"do_normalize": False}, r"says do_normalize false"),
        ({"rescale_factor": 1 / 127.5}, r"scales pixels by 0\.0078.*1/255"),
        ({"image_mean": ...}, r"lacks image_mean or image_std"),
        ({"image_std": [0.2, 0.2]}, r"lacks image_mean or image_std"),
        ({"image_std": [0.2, 0.2, 0]}, r"lacks image_mean or image_std"),
        ({"image_mean": ["0", "0", "0"]}, r"lacks image_mean or image_std"),
    ],
)
def test_a_processor_that_wants_what_is_not_done_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path, said: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        load(change(checkpoints["dinov2"], tmp_path, "preprocessor_config.json", **said))


# Refusals


@pytest.mark.parametrize(
    "layer", ["lats", "4", "-1", "", "01", "4+norm", "last+norm", "1+nrom", "4+tokens", "1+tokens+norm", "1 "]
)
def test_a_layer_that_is_not_there_is_met_with_those_that_are(checkpoints: dict[str, Path], layer: str) -> None:
    known = r"it has last, 0 to 3, 0\+norm to 3\+norm, and 0\+tokens to 3\+tokens"
    with pytest.raises(UsageError, match=rf"Dinov2Model has no layer '.*': {known}"):
        load(checkpoints["dinov2"], layers=("last", layer))


@pytest.mark.parametrize("layer", ["lats", "0", "5", "-1", "", "5+norm"])
def test_a_stage_that_is_not_there_is_met_with_those_that_are(checkpoints: dict[str, Path], layer: str) -> None:
    with pytest.raises(UsageError, match=r"ResNetModel has no layer '.*': it has last, and 1 to 4"):
        load(checkpoints["resnet"], layers=("last", layer))


@pytest.mark.parametrize("name", PYRAMIDS)
def test_stages_have_no_norm(checkpoints: dict[str, Path], name: str) -> None:
    with pytest.raises(UsageError, match=r"Model has no norm for a stage of its own; ask for 4 or last"):
        load(checkpoints[name], layers=("4+norm",))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in DINO])
def test_attention_outputs_are_for_the_dino_family(checkpoints: dict[str, Path], name: str) -> None:
    with pytest.raises(UsageError, match=r"Model has no attention outputs, only DINO's transformers do"):
        load(checkpoints[name], attention=("logits",))


# Names


def test_every_family_that_is_offered_is_tested_here() -> None:
    assert {*product.TRANSFORMERS, *product.PYRAMIDS} == FAMILIES.keys()
    assert set(PYRAMIDS) == product.PYRAMIDS.keys()


@pytest.mark.parametrize("known", [IMAGE_ENCODERS, TEXT_ENCODERS])
def test_a_short_name_stands_for_a_hub_id_and_folders_and_hub_ids_for_themselves(tmp_path: Path, known: Any) -> None:
    assert resolve_encoder("clip-base-16", known) == "openai/clip-vit-base-patch16"
    assert resolve_encoder("someone/some-model", known) == "someone/some-model"
    assert resolve_encoder(str(tmp_path), known) == str(tmp_path)
    with pytest.raises(UsageError, match=r"unknown encoder 'clip-bas-16': did you mean 'clip-base-16'\?"):
        resolve_encoder("clip-bas-16", known)


def test_presets_agree_with_themselves() -> None:
    for name, preset in IMAGE_ENCODERS.items():
        assert all(side % preset.patch == 0 for side in preset.input_size), name
        assert preset.width % 64 == 0, name
        assert preset.hub_id.count("/") == 1, name
    for presets in (IMAGE_ENCODERS, TEXT_ENCODERS):
        ids = [preset.hub_id for preset in presets.values()]
        assert len(set(ids)) == len(ids)
    for name in IMAGE_ENCODERS.keys() & TEXT_ENCODERS.keys():
        assert IMAGE_ENCODERS[name].hub_id == TEXT_ENCODERS[name].hub_id


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("dinov2-base", lambda: product.TRANSFORMERS["dinov2"].model_class.config_class(image_size=518, patch_size=14)),
        ("siglip2-base-naflex", lambda: product.TRANSFORMERS["siglip2"].model_class.config_class()),
        ("siglip-base-224", lambda: product.TRANSFORMERS["siglip"].model_class.config_class()),
        ("clip-base-32", lambda: product.TRANSFORMERS["clip"].model_class.config_class()),
    ],
)
def test_presets_are_what_their_configs_say(name: str, make: Callable[[], Any]) -> None:
    config, preset = make(), IMAGE_ENCODERS[name]
    assert own_size(config, COLOURS, name) == preset.input_size
    assert (config.patch_size, config.hidden_size) == (preset.patch, preset.width)
