"""The loop from a cache to adapted encoders and back to a cache, with the tiny encoders: nothing jumps on the way."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cache_schema.errors import StoreMismatchError, UsageError
from cache_schema.features import FeatureCache, open_cache
from cache_schema.fingerprint import fingerprint
from extract.encoders.image import load_image_encoder
from extract.encoders.text import load_text_encoder
from extract.image_job import ImageJobConfig, extract_images
from extract.prompt_job import PromptJobConfig, extract_prompts
from heads.data import feature_shapes
from heads.finetune import Finetuning
from heads.runs import read_run_config
from heads.train import TrainRequest, train_together
from headstart import api, cli
from headstart.encoders import image_spec_of_store, load_recorded_encoders, text_spec_of_store
from headstart.finetune_commands import FINETUNE_RECIPE_NAMES
from headstart.finetune_recipes import FINETUNE_RECIPES, make_finetune_config
from headstart.finetuning import HubEncoders
from tests.heads.test_train import KilledError, kill_after

BRIEF = {
    "batch_size": 16,
    "prompts_per_image": 4,
    "epochs": 1,
    "target_size": [16, 24],
    "checkpoint_steps": 1,
}
SETTINGS = {
    **{f"contrastive.{name}": value for name, value in BRIEF.items()},
    **{f"segmentation.{name}": value for name, value in BRIEF.items()},
    "contrastive.layer": "last",
    "segmentation.layers": ["last"],
    "segmentation.dim": 16,
    "segmentation.inner_dim": 16,
    "segmentation.hidden_dim": 16,
    "rank": 4,
}


def as_options(settings: dict[str, Any]) -> list[str]:
    return [f"{name}={json.dumps(value)}" for name, value in settings.items()]


def extract_with(adapters: Path, cache: FeatureCache, out: Path) -> FeatureCache:
    """The images and prompts of a cache, by its encoders with a run's adapters."""
    specs = (
        image_spec_of_store(cache.images.store.path, cache.images.store.header),
        text_spec_of_store(cache.prompts.store.path, cache.prompts.store.header),
    )
    image = load_image_encoder(dataclasses.replace(specs[0], adapter=str(adapters / "adapter")))
    text = load_text_encoder(dataclasses.replace(specs[1], adapter=str(adapters / "text_adapter")))
    samples = cache.samples.path
    images = extract_images(ImageJobConfig(samples, out), image).path
    return open_cache(samples, images, extract_prompts(PromptJobConfig(samples, out), text).path)


@pytest.fixture(scope="module")
def finetuned(feature_cache: FeatureCache, tmp_path_factory: pytest.TempPathFactory) -> Finetuning:
    return api.finetune("scenes", feature_cache, tmp_path_factory.mktemp("runs"), settings=SETTINGS, merge=True)


@pytest.fixture(scope="module")
def new_cache(
    finetuned: Finetuning, feature_cache: FeatureCache, tmp_path_factory: pytest.TempPathFactory
) -> FeatureCache:
    return extract_with(finetuned.run_dir, feature_cache, tmp_path_factory.mktemp("stores"))


def test_the_adapted_encoders_come_back_to_a_cache_without_a_jump(
    finetuned: Finetuning, new_cache: FeatureCache, feature_cache: FeatureCache, tmp_path: Path
) -> None:
    segmentation = finetuned.stages["segmentation"]
    assert new_cache.encoder_fingerprints != feature_cache.encoder_fingerprints
    recorded = json.loads((segmentation.run_dir / "config.json").read_bytes())
    assert recorded["encoder_fingerprints"] == new_cache.encoder_fingerprints
    config = make_finetune_config("scenes", SETTINGS).segmentation
    assert config is not None
    request = TrainRequest(config, tmp_path / "run", initial=segmentation.run_dir / "best")
    train_together([request], new_cache, trackers=())
    start = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert start["epoch"] == 0
    assert start["val_mean_iou"] == pytest.approx(segmentation.best_val_mean_iou, abs=5e-3)
    assert start["val_loss"] == pytest.approx(segmentation.best_val_loss, abs=5e-3)


def test_a_finetuned_head_is_scored_on_its_own_encoders_alone(
    finetuned: Finetuning, new_cache: FeatureCache, feature_cache: FeatureCache, tmp_path: Path
) -> None:
    run = finetuned.stages["segmentation"]
    results = api.evaluate(run, new_cache, out=tmp_path)
    assert results["runs"][0]["metrics"]["num_samples"] > 0
    with pytest.raises(StoreMismatchError):
        api.evaluate(run, feature_cache, out=tmp_path)


def test_a_finetuned_head_predicts_with_the_adapted_encoders(finetuned: Finetuning, new_cache: FeatureCache) -> None:
    run_dir = finetuned.stages["segmentation"].run_dir
    image, text = load_recorded_encoders(run_dir, read_run_config(run_dir), "cpu")
    found = {"image": fingerprint(image.identity), "text": fingerprint(text.identity)}
    assert found == new_cache.encoder_fingerprints
    image_of_noise = np.random.default_rng(0).integers(0, 255, (48, 72, 3), np.uint8)
    (prediction,) = api.load(run_dir, device="cpu").set_image(image_of_noise).predict("the red circle")
    assert prediction.mask.shape == (48, 72)


def test_merged_encoders_say_what_adapted_ones_say(finetuned: Finetuning, new_cache: FeatureCache) -> None:
    spec = image_spec_of_store(new_cache.images.store.path, new_cache.images.store.header)
    merged = dataclasses.replace(spec, source=str(finetuned.run_dir / "merged_image"), adapter=None)
    pixels = torch.randint(0, 255, (2, 64, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found, expected = load_image_encoder(merged).encode(pixels), load_image_encoder(spec).encode(pixels)
    torch.testing.assert_close(found.features["last"], expected.features["last"], atol=1e-5, rtol=1e-4)
    text = text_spec_of_store(new_cache.prompts.store.path, new_cache.prompts.store.header)
    merged_text = dataclasses.replace(text, source=str(finetuned.run_dir / "merged_text"), adapter=None)
    token_ids = load_text_encoder(text).tokenize(["the red circle", "all squares"])
    torch.testing.assert_close(
        load_text_encoder(merged_text).encode(token_ids).pooled,
        load_text_encoder(text).encode(token_ids).pooled,
        atol=1e-5,
        rtol=1e-4,
    )


def test_starting_before_the_first_adapted_block_loses_nothing(
    feature_cache: FeatureCache, samples_path: Path, tmp_path: Path, tiny_encoders: Any
) -> None:
    spec = image_spec_of_store(feature_cache.images.store.path, feature_cache.images.store.header)
    states = extract_images(
        ImageJobConfig(samples_path, tmp_path, dtype="float32"),
        load_image_encoder(dataclasses.replace(spec, layers=("1+tokens",))),
    ).path
    settings = {**SETTINGS, "contrastive": None, "sides": ["image"], "first_block": 1}
    settings = {name: value for name, value in settings.items() if not name.startswith("contrastive.")}
    config = make_finetune_config("scenes", settings)
    with pytest.raises(UsageError, match="holds no layers, of which a head reads one or more"):
        feature_shapes(open_cache(samples_path, states, feature_cache.prompts.store.path))
    whole = api.finetune(config, feature_cache, tmp_path / "whole")
    resumed = api.finetune(
        dataclasses.replace(config, from_states=True), feature_cache, tmp_path / "resumed", states=states
    )
    lines = [
        json.loads((found.run_dir / "segmentation" / "metrics.jsonl").read_text().splitlines()[-1])
        for found in (whole, resumed)
    ]
    for name in ("train_loss", "val_loss"):
        assert lines[1][name] == pytest.approx(lines[0][name], rel=1e-3)
    weights = [load_file(found.run_dir / "adapter" / "adapter_model.safetensors") for found in (whole, resumed)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-3, rtol=1e-2)
    assert all(".layer.0." not in name for name in weights[0])


# The command


def test_the_command_says_what_it_adapts_and_where_adapters_are(
    feature_cache: FeatureCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stores = feature_cache.samples.path.parent
    named = ["--images", str(feature_cache.images.store.path), "--prompts", str(feature_cache.prompts.store.path)]
    settings = {name: value for name, value in SETTINGS.items() if not name.startswith("segmentation")}
    options = ["--stores", str(stores), *named, "--runs", str(tmp_path), "--set", "segmentation=null"]
    assert cli.run(["finetune", "scenes", *options, *as_options(settings)]) == cli.DONE
    printed = capsys.readouterr().out
    assert "live features are those of the cache" in printed
    assert "image: encoder.layer.0.attention.q_proj" in printed
    (run_dir,) = tmp_path.iterdir()
    assert f"image adapter: {run_dir / 'adapter'}" in printed
    assert not (run_dir / "segmentation").exists()


def test_the_names_in_the_help_are_those_there_are() -> None:
    assert set(FINETUNE_RECIPE_NAMES) == set(FINETUNE_RECIPES)


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ("juraz", {}, r"unknown recipe 'juraz': did you mean 'juras'"),
        ("juras", {"rnak": 4}, r"unknown setting of recipe 'juras' 'rnak': did you mean 'rank'"),
        ("juras", {"contrastive.epoch": 4}, r"the contrastive stage of recipe 'juras' 'epoch': did you mean 'epochs'"),
        ("pseg", {"contrastive.epochs": 4}, r"has no contrastive stage"),
        ("juras", {"contrastive": 4}, r"contrastive=null leaves the stage out"),
        ("juras", {"rank": "four"}, r"rank cannot be 'four': give something like 8"),
        ("juras", {"sides": "image"}, r"sides cannot be 'image': give something like \['image', 'text'\]"),
        ("juras", {"sides": ["picture"]}, r"unknown side 'picture'"),
    ],
)
def test_what_cannot_be_meant_is_said(recipe: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_finetune_config(recipe, settings)


def test_settings_of_the_stages_and_of_lora_are_taken() -> None:
    config = make_finetune_config(
        "juras",
        {
            "target_modules": ["query"],
            "images_at_once": 4,
            "alpha": 8,
            "segmentation.depth": 2,
            "contrastive.epochs": 3,
        },
    )
    assert config.target_modules == ("query",)
    assert config.images_at_once == 4
    assert config.alpha == 8.0
    assert config.segmentation is not None
    assert config.segmentation.arguments["depth"] == 2
    assert config.contrastive is not None
    assert config.contrastive.epochs == 3


def test_stores_of_states_are_asked_for_and_refused_in_time(feature_cache: FeatureCache, tmp_path: Path) -> None:
    config = make_finetune_config("scenes", {"first_block": 1, "from_states": True})
    with pytest.raises(UsageError, match=r"extract it with --layers 1\+tokens, and name it with --states"):
        api.finetune(config, feature_cache, tmp_path)
    with pytest.raises(UsageError, match="from_states=true alone"):
        api.finetune("scenes", feature_cache, tmp_path, states=feature_cache.images.store.path)
    with pytest.raises(UsageError, match="no segmentation stage"):
        api.finetune("scenes", feature_cache, tmp_path, settings={"segmentation": None}, head=tmp_path)
    with pytest.raises(UsageError, match="a FinetuneConfig already has its own"):
        api.finetune(config, feature_cache, tmp_path, settings={"rank": 2})


def test_a_cache_of_adapted_encoders_goes_on_with_their_adapters(
    finetuned: Finetuning, new_cache: FeatureCache, tmp_path: Path
) -> None:
    settings = {key: value for key, value in SETTINGS.items() if not key.startswith("contrastive")}
    config = make_finetune_config("scenes", {**settings, "contrastive": None})
    live = HubEncoders(new_cache, config)
    before = load_file(finetuned.run_dir / "adapter" / "adapter_model.safetensors")
    live.adapted(None, learn=True).save(tmp_path / "begins")
    begins = load_file(tmp_path / "begins" / "adapter" / "adapter_model.safetensors")
    assert begins.keys() == before.keys()
    assert all(torch.equal(begins[name], before[name]) for name in before)

    again = api.finetune("scenes", new_cache, tmp_path, settings={**settings, "contrastive": None})
    assert min(one.mean_cosine for one in again.parity) > 0.999
    after = load_file(again.run_dir / "adapter" / "adapter_model.safetensors")
    assert after.keys() == before.keys()
    assert not all(torch.equal(after[name], before[name]) for name in before)
    third = extract_with(again.run_dir, new_cache, tmp_path / "stores")
    recorded = read_run_config(again.stages["segmentation"].run_dir)
    assert recorded["encoder_fingerprints"] == third.encoder_fingerprints


def test_adapters_that_go_on_are_those_the_settings_describe(new_cache: FeatureCache, tmp_path: Path) -> None:
    settings = {key: value for key, value in SETTINGS.items() if not key.startswith("contrastive")}
    with pytest.raises(UsageError, match=r"rank is 4 there and 8 here.*Set them as they are there"):
        api.finetune("scenes", new_cache, tmp_path, settings={**settings, "contrastive": None, "rank": 8})
    with pytest.raises(UsageError, match=r"it adapts \d+ modules, of which \d+ are among the \d+ here"):
        api.finetune("scenes", new_cache, tmp_path, settings={**settings, "contrastive": None, "first_block": 1})


@pytest.mark.parametrize(("num_losses", "stage_killed"), [(3, "contrastive"), (8, "segmentation")])
def test_a_killed_finetuning_ends_with_the_same_weights(
    finetuned: Finetuning, feature_cache: FeatureCache, tmp_path: Path, num_losses: int, stage_killed: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, num_losses)
        with pytest.raises(KilledError):
            api.finetune("scenes", feature_cache, tmp_path, settings=SETTINGS)
    (run_dir,) = tmp_path.iterdir()
    last_begun = sorted(run_dir.rglob("state.pt"), key=lambda path: path.stat().st_mtime)
    assert [path.parent.name for path in last_begun[-1:]] == [stage_killed]
    again = api.finetune("scenes", feature_cache, tmp_path, settings=SETTINGS)
    for stage in ("contrastive", "segmentation"):
        for file in ("adapter/adapter_model.safetensors", "text_adapter/adapter_model.safetensors"):
            expected, found = (load_file(run / stage / file) for run in (finetuned.run_dir, again.run_dir))
            assert all(torch.equal(found[name], expected[name]) for name in expected)
        expected, found = (
            load_file(run / stage / "best" / "model.safetensors") for run in (finetuned.run_dir, again.run_dir)
        )
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_contrastive_stage_keeps_the_adapters_with_the_least_loss(
    feature_cache: FeatureCache, tmp_path: Path
) -> None:
    """The scenes have masks, which say nothing of how well images and prompts match."""
    settings = {name: value for name, value in SETTINGS.items() if not name.startswith("segmentation")}
    settings |= {"segmentation": None, "contrastive.epochs": 4, "contrastive.learning_rate": 0.05}
    found = api.finetune("scenes", feature_cache, tmp_path, settings=settings).stages["contrastive"]
    lines = [json.loads(line) for line in (found.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert {line["selects"] for line in lines} == {"val_loss"}
    assert lines[0]["val_mean_iou"] is not None
    assert found.best_step == min(lines, key=lambda line: line["val_loss"])["step"]
    assert found.best_val_loss == min(line["val_loss"] for line in lines)


def test_a_head_of_another_cache_is_refused(
    finetuned: Finetuning, new_cache: FeatureCache, feature_cache: FeatureCache, tmp_path: Path
) -> None:
    head = finetuned.stages["segmentation"].run_dir
    with pytest.raises(StoreMismatchError, match="another image and text encoder"):
        api.finetune("scenes", feature_cache, tmp_path, settings={**SETTINGS, "contrastive.epochs": 2}, head=head)
