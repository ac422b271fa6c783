"""Pipelines of every family of encoders as ONNX files: pixels and token ids to what the encoders themselves lead to."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from cache_schema.errors import UsageError
from cache_schema.views import WHOLE, fit_view, make_view
from evaluate.onnx_export import OnnxModel, write_onnx
from evaluate.pipeline import (
    PIPELINE_SIZES,
    ImageGraph,
    PaddingToLimit,
    Pipeline,
    PromptGraph,
    export_pipeline,
    pad_prompts,
)
from evaluate.predictor import Predictor, probabilities_in_image
from evaluate.tokenizer_file import make_tokenizer_json
from extract.encoders.families import PYRAMIDS, TRANSFORMERS
from extract.encoders.image import HubImageEncoder, load_image_encoder, load_image_parts
from extract.encoders.specs import ImageEncoderSpec, TextEncoderSpec
from extract.encoders.text import TEXT_FAMILIES, HubTextEncoder, TextFamily, load_text_encoder, load_text_parts
from extract.preprocessing import Preprocessing
from heads import build_head
from heads.inputs import FeatureShapes, Head
from tests.extract.image_checkpoints import FAMILIES, make_checkpoints, noise_images
from tests.extract.text_checkpoints import HAS_SENTENCEPIECE, LIMIT, NAMES, save_text_checkpoint

SCRIPT = Path(__file__).parents[2] / "docs" / "onnx_predict.py"
PROMPTS = ["red dog", "The DOG left of a circle, red red red red red", "a", "the a"]
PAIRS = (
    ("dinov2", "bert"),
    ("dinov2_with_registers", "clip-tower"),
    ("dinov3_vit", "siglip2-fixed"),
    ("clip", "clip"),
    ("siglip_vision_model", "siglip2-left"),
    ("siglip2", "siglip2"),
    ("resnet", "siglip2-tower"),
    ("dinov3_convnext", "siglip" if HAS_SENTENCEPIECE else "bert"),
)
"""Every class of image models and of text models; other checkpoints are towers of the same classes."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints by name, those of text with `text-` before it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    make_checkpoints(folder)
    for name in NAMES:
        save_text_checkpoint(name, folder / f"text-{name}")
    return folder


def make_head(image: HubImageEncoder, text: HubTextEncoder) -> Head:
    """One that reads tokens and cells alike."""
    shapes = FeatureShapes(dict(image.grids), text.token_width, text.pooled_width, dict(image.cls_widths))
    torch.manual_seed(0)
    return build_head("cross_attention", shapes, {"dim": 16, "inner_dim": 16, "hidden_dim": 16}).eval()


def make_prompt_graph(source: Path) -> tuple[PromptGraph, int]:
    """The graph of a text encoder, and the most tokens it takes."""
    loaded: list[tuple[PreTrainedModel, TextFamily]] = []

    def keep(model: PreTrainedModel, family: TextFamily) -> tuple[PreTrainedModel, None]:
        loaded.append((model, family))
        return model, None

    tower, identity = load_text_parts(TextEncoderSpec(str(source)), keep)
    (model, family), settings = loaded[0], identity["tokenizer"]
    padding = None
    if family.padded_to_limit:
        padding = PaddingToLimit(LIMIT, settings["padding"]["token"], settings["padding"]["side"] == "left")
    return PromptGraph(model, family.pooled, padding), tower.max_length


def make_inputs(text: HubTextEncoder, images: list[np.ndarray], prompts: list[str]) -> dict[str, Tensor]:
    token_ids, token_mask = pad_prompts(text.tokenize(prompts))
    index = torch.arange(len(prompts)) % len(images)
    pixels = torch.from_numpy(np.stack(images))
    return {"pixels": pixels, "token_ids": token_ids, "token_mask": token_mask, "image_index": index}


def test_every_class_of_encoders_has_its_pipeline(checkpoints: Path) -> None:
    def model_type(name: str) -> str:
        return str(json.loads((checkpoints / name / "config.json").read_bytes())["model_type"])

    families: dict[str, Any] = {**TRANSFORMERS, **PYRAMIDS}
    images = {families[model_type(image)].model_class for image, _ in PAIRS}
    texts = {TEXT_FAMILIES[model_type(f"text-{text}")].model_class for _, text in PAIRS}
    assert images == {family.model_class for family in families.values()}
    assert not HAS_SENTENCEPIECE or texts == {family.model_class for family in TEXT_FAMILIES.values()}


@pytest.mark.parametrize(("family", "tower"), PAIRS)
def test_a_pipeline_says_what_a_predictor_says_in_float32(
    family: str, tower: str, checkpoints: Path, tmp_path: Path
) -> None:
    step = FAMILIES[family].step
    size = (2 * step, 3 * step)  # not the checkpoint's own: positions are interpolated where a family has any
    spec = ImageEncoderSpec(str(checkpoints / family), layers=("1",), input_size=size)
    image, text_source = load_image_encoder(spec), checkpoints / f"text-{tower}"
    text = load_text_encoder(TextEncoderSpec(str(text_source)))
    head = make_head(image, text)
    parts = load_image_parts(spec, lambda model, _: (model, None), "float32")
    prompt_graph, max_tokens = make_prompt_graph(text_source)
    pipeline = Pipeline(ImageGraph(parts.tower, parts.preprocessing), prompt_graph, head)
    traced = make_inputs(text, noise_images([size] * 2), PROMPTS)
    program = export_pipeline(pipeline, traced, max_tokens)
    path = tmp_path / "model.onnx"
    write_onnx(program, path, inputs=list(PIPELINE_SIZES), outputs=["mask_logits"], sizes=PIPELINE_SIZES)
    model = OnnxModel(path)

    predictor = Predictor(head, image, text, image_dtype="float32", text_dtype="float32")
    for seed, (num_images, prompts) in enumerate([(1, PROMPTS[:1]), (1, PROMPTS), (3, [*PROMPTS, "a dog"])]):
        images = noise_images([size] * num_images, seed + 1)
        inputs = make_inputs(text, images, prompts)
        inputs["token_ids"][~inputs["token_mask"]] = 3  # what stands behind a prompt counts for nothing
        found = model.run(inputs)["mask_logits"]
        for row, prompt in enumerate(prompts):
            expected = predictor.set_image(images[row % num_images]).predict(prompt)[0].logits
            np.testing.assert_allclose(found[row], expected, rtol=0, atol=1e-4)
    assert np.ptp(found, axis=0).max() > 1e-3  # which is not one answer to everything


def test_attention_outputs_and_cls_tokens_pass_through_the_graph(checkpoints: Path) -> None:
    outputs = ("logits", "head_tokens", "mean_token")
    spec = ImageEncoderSpec(str(checkpoints / "dinov3_vit"), ("last", "2+norm"), outputs, (48, 80))  # type: ignore[arg-type]
    parts = load_image_parts(spec, lambda model, _: (model, None), "float32")
    pixels = torch.from_numpy(np.stack(noise_images([(48, 80)] * 2)))
    expected = load_image_encoder(spec).encode(pixels)
    with torch.no_grad():
        found = ImageGraph(parts.tower, parts.preprocessing)(pixels)
    for part in ("features", "cls", "attention"):
        assert getattr(found, part).keys() == getattr(expected, part).keys() != set()
        for name, values in getattr(found, part).items():
            torch.testing.assert_close(values, getattr(expected, part)[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tower", NAMES)
def test_a_prompt_graph_says_what_the_encoder_says_of_unpadded_prompts(tower: str, checkpoints: Path) -> None:
    source = checkpoints / f"text-{tower}"
    text, (graph, max_tokens) = load_text_encoder(TextEncoderSpec(str(source))), make_prompt_graph(source)
    token_ids = text.tokenize([*PROMPTS, "dog " * 50])
    assert max(map(len, token_ids)) == max_tokens == text.max_length
    expected = text.encode(token_ids)
    padded, mask = pad_prompts(token_ids)
    with torch.no_grad():
        found = graph(padded, mask)
    torch.testing.assert_close(found.tokens[mask], expected.tokens[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.pooled, expected.pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tower", NAMES)
def test_a_tokenizer_file_alone_gives_the_ids_that_the_encoder_gives(tower: str, checkpoints: Path) -> None:
    source = checkpoints / f"text-{tower}"
    text = load_text_encoder(TextEncoderSpec(str(source)))
    settings = text.identity["tokenizer"]
    if tower in ("siglip", "siglip-tower"):
        with pytest.raises(UsageError, match=r"SiglipTokenizer, which has no tokenizer.json; export the head alone"):
            make_tokenizer_json(str(source), settings, text.tokenize)
        return
    alone = Tokenizer.from_str(make_tokenizer_json(str(source), settings, text.tokenize))
    prompts = [*PROMPTS, "DOG dog, Dog!", "dog " * 50, "é 🎈 zeppelin"]
    assert [encoded.ids for encoded in alone.encode_batch(prompts)] == text.tokenize(prompts)


def test_a_tokenizer_that_would_say_something_else_is_refused(checkpoints: Path) -> None:
    source = str(checkpoints / "text-clip")
    with pytest.raises(UsageError, match=r"says other things from a tokenizer.json"):
        make_tokenizer_json(source, {"max_length": LIMIT}, lambda prompts: [[0, 1]] * len(prompts))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """docs/onnx_predict.py as a module."""
    spec = importlib.util.spec_from_file_location("onnx_predict", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("aspect", ["squash", "crop", "letterbox"])
@pytest.mark.parametrize("size", [(70, 110), (110, 71), (64, 96), (9, 200), (301, 3)])
def test_the_script_looks_at_a_picture_and_brings_logits_back_as_a_predictor_does(
    script: ModuleType, aspect: Any, size: tuple[int, int]
) -> None:
    preprocessing = Preprocessing((32, 48), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", aspect)
    settings = {"input_size": [32, 48], "aspect": aspect, "resample": "bicubic", "padding_rgb": [124, 116, 104]}
    picture = noise_images([size])[0]
    view = preprocessing.fit(make_view(WHOLE, 0, size, ""))
    box = script.find_box(size, [32, 48], aspect)
    assert box == view.box == fit_view(make_view(WHOLE, 0, size, ""), (32, 48), aspect).box
    np.testing.assert_array_equal(
        script.make_pixels(picture, box, settings)[0], preprocessing.resize(view.apply_to_image(picture))
    )
    for shape in [(8, 12), (1, 1), (128, 150)]:
        logits = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
        probability = probabilities_in_image(logits[None], view, size)[0]
        for threshold in (0.5, 0.3):
            mask = script.mask_of(logits.numpy(), box, size, {"threshold": threshold, "comparison": ">"})
            differing = mask != (probability > threshold)
            assert np.abs(probability[differing] - threshold).max(initial=0) < 1e-5
            assert mask.shape == size
