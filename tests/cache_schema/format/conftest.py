"""Stores of every kind that the tests of the format read, made once, and one to be spoilt."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from cache_schema.convert import convert_store
from cache_schema.masks import encode_mask
from cache_schema.samples import open_samples, write_samples
from extract.encoders.specs import AttentionOutput
from tests.cache_schema.format.stores import Stores, ZarrStore

if TYPE_CHECKING:
    from extract.encoders.image import HubImageEncoder
    from extract.encoders.tiny import TinyEncoders
    from extract.job import Extraction

ATTENTION_OUTPUTS: tuple[AttentionOutput, ...] = ("logits", "mean_token", "head_tokens")


@pytest.fixture(scope="session")
def int8_images(tmp_path_factory: pytest.TempPathFactory, scenes_root: Path, image_encoder: HubImageEncoder) -> Path:
    """Three views of each image as int8; one image cannot be decoded."""
    from extract.image_job import ImageJobConfig, extract_images
    from extract.prepare import PrepareConfig, prepare

    root = tmp_path_factory.mktemp("format")
    shutil.copytree(scenes_root, root / "scenes")
    image = sorted((root / "scenes" / "images").iterdir())[3]
    image.write_bytes(image.read_bytes()[:-100])
    samples = prepare(PrepareConfig("scenes", root / "scenes", root)).path
    config = ImageJobConfig(samples, root, dtype="int8", views=("whole", "flip", "crop-0.5"), shard_rows=16)
    return extract_images(config, image_encoder).path


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_encoders: TinyEncoders) -> Path:
    """A LoRA adapter for the tiny image encoder."""
    from peft import LoraConfig, get_peft_model
    from transformers import Dinov2WithRegistersModel

    folder = tmp_path_factory.mktemp("format") / "adapter"
    model = Dinov2WithRegistersModel.from_pretrained(tiny_encoders.image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for what its next version will not have
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a text encoder that reads padding."""
    from tests.extract.text_checkpoints import save_text_checkpoint

    folder = tmp_path_factory.mktemp("format") / "siglip"
    save_text_checkpoint("siglip2-fixed", folder)
    return folder


@pytest.fixture(scope="session")
def with_attention(tmp_path_factory: pytest.TempPathFactory, samples_path: Path, tiny_encoders: TinyEncoders) -> Path:
    """Layers and attention outputs in float32, of images that are cut to the input's shape."""
    from extract.encoders.image import load_image_encoder
    from extract.encoders.specs import ImageEncoderSpec
    from extract.image_job import ImageJobConfig, extract_images

    spec = ImageEncoderSpec(
        str(tiny_encoders.image), ("2+norm", "last"), ATTENTION_OUTPUTS, input_size=(64, 96), aspect="crop"
    )
    config = ImageJobConfig(samples_path, tmp_path_factory.mktemp("format"), dtype="float32")
    return extract_images(config, load_image_encoder(spec)).path


@pytest.fixture(scope="session")
def without_layers(
    tmp_path_factory: pytest.TempPathFactory, samples_path: Path, tiny_encoders: TinyEncoders, adapter: Path
) -> Path:
    """Attention outputs of an adapted encoder for windows and letterboxes in half precision, and no layer."""
    from extract.encoders.image import load_image_encoder
    from extract.encoders.specs import ImageEncoderSpec
    from extract.image_job import ImageJobConfig, extract_images

    spec = ImageEncoderSpec(
        str(tiny_encoders.image),
        (),
        ATTENTION_OUTPUTS,
        input_size=(64, 96),
        aspect="letterbox",
        precision="bfloat16",
        adapter=str(adapter),
    )
    views = ("whole", "crop-0.8", "windows-0.8-0.5")
    config = ImageJobConfig(samples_path, tmp_path_factory.mktemp("format"), views=views, shard_rows=32)
    return extract_images(config, load_image_encoder(spec)).path


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory, samples_path: Path) -> Path:
    """Samples of a fixed vocabulary; some pixels of some of them nobody labelled, and one has no mask."""
    opened = open_samples(samples_path)
    samples, image_dir = opened.samples, opened.image_dir
    assert image_dir is not None
    corner = np.zeros(samples.size_of(0), np.bool_)
    corner[:2, :3] = True
    ignored = [encode_mask(corner), *[b""] * (len(samples) - 1)]
    changed = replace(samples, ignored=ignored, classes=("circle", "square"), targets=[b"", *samples.targets[1:]])
    out = tmp_path_factory.mktemp("format")
    libraries = dict.fromkeys(("numpy", "pycocotools"), "1")
    return write_samples(out, changed, dataset="labelled", sources={}, image_dir=image_dir, libraries=libraries)[0]


@pytest.fixture(scope="session")
def stores(
    tmp_path_factory: pytest.TempPathFactory,
    samples_path: Path,
    labelled: Path,
    image_extraction: Extraction,
    prompt_extraction: Extraction,
    int8_images: Path,
    with_attention: Path,
    without_layers: Path,
    siglip: Path,
) -> Stores:
    from extract.encoders.specs import TextEncoderSpec
    from extract.encoders.text import load_text_encoder
    from extract.prompt_job import PromptJobConfig, extract_prompts

    out = tmp_path_factory.mktemp("format")
    padded = load_text_encoder(TextEncoderSpec(str(siglip)))
    float32 = extract_prompts(PromptJobConfig(samples_path, out, dtype="float32"), padded).path
    images = (image_extraction.path, int8_images, with_attention, without_layers)
    plain = (samples_path, labelled, *images, prompt_extraction.path, float32)
    few = (samples_path, prompt_extraction.path, int8_images)
    return Stores(
        [ZarrStore(path) for path in plain],
        [ZarrStore(convert_store(path, out / "zstd", "zarr", zstd_level=3)) for path in few],
        [convert_store(path, out / "hdf5", "hdf5") for path in (*few, image_extraction.path)],
    )


@pytest.fixture
def small_store(tmp_path: Path, int8_images: Path) -> ZarrStore:
    """A copy of a store with failures, to be spoilt."""
    shutil.copytree(int8_images, tmp_path / int8_images.name)
    return ZarrStore(tmp_path / int8_images.name)
