"""What tests of every folder share: a small dataset, tiny encoders, and the stores that come of the two.

All of it is made once in a session and only ever read; a test that harms a store copies it first.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cache_schema.features import FeatureCache
    from extract.encoders.protocols import ImageEncoder, TextEncoder
    from extract.encoders.tiny import TinyEncoders
    from extract.job import Extraction
    from heads.runs import Training
    from tests.browser import Browser

NUM_IMAGES = 24
PROMPTS_PER_IMAGE = 4
LAYERS = ("1", "last")
VIEWS = ("whole", "flip", "crop-0.7", "scale-0.8+flip")


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """No test cuts the power, so none waits until the disk has kept a file. Processes of their own still do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Small tensors are slower in several threads, the more so where tests run side by side."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Debian's chromium, headless; whoever asks for it is skipped where there is none."""
    from tests.browser import open_browser

    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder under which everything below lies."""
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="session")
def scenes_root(workspace: Path) -> Path:
    """A dataset of 24 scenes with four prompts each; it has a train, a val and a test split."""
    from extract.datasets.scenes import ScenesConfig, make_scenes

    return make_scenes(ScenesConfig(workspace / "scenes", num_images=NUM_IMAGES, prompts_per_image=PROMPTS_PER_IMAGE))


@pytest.fixture(scope="session")
def samples_path(workspace: Path, scenes_root: Path) -> Path:
    """The samples store of those scenes."""
    from extract.prepare import PrepareConfig, prepare

    return prepare(PrepareConfig("scenes", scenes_root, workspace / "stores")).path


@pytest.fixture(scope="session")
def tiny_encoders(workspace: Path) -> TinyEncoders:
    """Folders of the two embedded checkpoints."""
    from extract.encoders.tiny import make_tiny_encoders

    return make_tiny_encoders(workspace / "encoders")


@pytest.fixture(scope="session")
def image_encoder(tiny_encoders: TinyEncoders) -> ImageEncoder:
    """The tiny image encoder at a small, non-square input: grids of 4 x 6 cells for the layers "1" and "last"."""
    from extract.encoders.image import load_image_encoder
    from extract.encoders.specs import ImageEncoderSpec

    return load_image_encoder(ImageEncoderSpec(str(tiny_encoders.image), layers=LAYERS, input_size=(64, 96)))


@pytest.fixture(scope="session")
def text_encoder(tiny_encoders: TinyEncoders) -> TextEncoder:
    """The tiny text encoder."""
    from extract.encoders.specs import TextEncoderSpec
    from extract.encoders.text import load_text_encoder

    return load_text_encoder(TextEncoderSpec(str(tiny_encoders.text)))


@pytest.fixture(scope="session")
def image_extraction(workspace: Path, samples_path: Path, image_encoder: ImageEncoder) -> Extraction:
    """Image features of the scenes, in shards of eight."""
    from extract.image_job import ImageJobConfig, extract_images

    return extract_images(ImageJobConfig(samples_path, workspace / "stores", shard_rows=8), image_encoder)


@pytest.fixture(scope="session")
def prompt_extraction(workspace: Path, samples_path: Path, text_encoder: TextEncoder) -> Extraction:
    """Prompt features of the scenes."""
    from extract.prompt_job import PromptJobConfig, extract_prompts

    config = PromptJobConfig(samples_path, workspace / "stores", unit_prompts=32, shard_tokens=128)
    return extract_prompts(config, text_encoder)


@pytest.fixture(scope="session")
def feature_cache(samples_path: Path, image_extraction: Extraction, prompt_extraction: Extraction) -> FeatureCache:
    """The three stores joined."""
    from cache_schema.features import open_cache

    return open_cache(samples_path, image_extraction.path, prompt_extraction.path)


@pytest.fixture(scope="session")
def run(workspace: Path, feature_cache: FeatureCache) -> Training:
    """A linear head that was trained on the three stores for a moment."""
    from headstart import api

    return api.train("linear", feature_cache, workspace / "runs", settings={"epochs": 2, "target_size": [16, 24]})


@pytest.fixture(scope="session")
def int8_cache(
    workspace: Path, samples_path: Path, image_encoder: ImageEncoder, prompt_extraction: Extraction
) -> FeatureCache:
    """The same images in int8, each encoded by itself, with the same prompts."""
    from cache_schema.features import open_cache
    from extract.image_job import ImageJobConfig, extract_images

    config = ImageJobConfig(samples_path, workspace / "int8", dtype="int8", batch_size=1, shard_rows=8)
    return open_cache(samples_path, extract_images(config, image_encoder).path, prompt_extraction.path)


@pytest.fixture(scope="session")
def views_cache(
    workspace: Path, samples_path: Path, image_encoder: ImageEncoder, prompt_extraction: Extraction
) -> FeatureCache:
    """The same images in four views each, in shards that cut between the views of an image, with the same prompts."""
    from cache_schema.features import open_cache
    from extract.image_job import ImageJobConfig, extract_images

    config = ImageJobConfig(samples_path, workspace / "views", shard_rows=10, views=VIEWS)
    return open_cache(samples_path, extract_images(config, image_encoder).path, prompt_extraction.path)
