"""The training benchmark at a size that takes seconds: it measures what it says, and all contenders do the same."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import train
from benchmarks.common import Report
from benchmarks.train import CACHE, LOOP, MEMORY, MOST_BATCHES, Encoders, TrainBenchmarkConfig, lay_on_device, run
from cache_schema.features import FeatureCache
from extract.encoders.protocols import ImageEncoder, TextEncoder
from extract.job import pick_device
from heads.data import Batch, CachedSplit
from heads.trainee import Trainee
from headstart.recipes import RECIPES

TINY = "--model dinov2-tiny@56 --tiny-text --num-images 12 --batch-size 4 --num-batches 2 --rounds 1".split()
NOT_HERE = {"clipseg"}
"""Recipes that read layers which a model of two blocks does not have."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What the benchmark writes of all recipes."""
    folder = tmp_path_factory.mktemp("train")
    path, work = folder / "train.json", folder / "work"
    work.mkdir()
    assert train.main([*TINY, "--turn-s", "0", "--dir", str(work), "--json", str(path)]) == 0
    assert list(work.iterdir()) == [], "what was written is removed"
    assert str(folder) not in path.read_text()
    loaded: Mapping[str, Any] = json.loads(path.read_bytes())
    return loaded


def tensors_of(batch: Batch) -> dict[str, Tensor]:
    """Everything of a batch that a step looks at, by name."""
    inputs = batch.inputs
    by_kind = {"features": inputs.features, "scale": inputs.scale, "cls": inputs.cls, "attention": inputs.attention}
    found = {f"{kind} {name}": value for kind, values in by_kind.items() for name, value in values.items()}
    found |= {name: getattr(inputs, name) for name in ("prompt_tokens", "prompt_mask", "pooled", "image_index")}
    for name, targets in {"unmasked": batch.unmasked, **batch.targets_at}.items():
        found |= {f"{name} {field}": value for field, value in vars(targets).items() if value is not None}
    return found


def draw(cache: FeatureCache, **options: Any) -> Batch:
    """Five prompts of three images, out of the order in which these lie in the cache."""
    split = CachedSplit(cache, "train", (8, 12), **options)
    (draws,) = split.in_order(len(split))[:1]
    chosen = [9, 0, 5, 1, 8]
    return split.load(type(draws)(draws.samples[chosen], draws.views[chosen]))


def test_every_recipe_has_its_rows_or_a_reason(written: Mapping[str, Any]) -> None:
    assert {"benchmark", "machine", "rows", "ratios"} <= set(written)
    assert written["benchmark"] == "train"
    rows = {row["name"]: row for row in written["rows"]}
    assert len(rows) == len(written["rows"])
    for recipe in RECIPES:
        if recipe in NOT_HERE:
            row = rows.pop(recipe)
            assert (row["value"], row["unit"]) == (None, "samples/s")
            assert "left out: " in row["note"]
            assert "4, 7, 10" in row["note"]
            continue
        for source in (CACHE, MEMORY, LOOP):
            row = rows.pop(f"{recipe}: {source}")
            assert row["unit"] == "samples/s"
            assert 0 < row["value"] < math.inf
            assert "batch_size 4" in row["note"]
    for way in ("one pass", "one after the other"):
        for place in ("on disk", "in memory"):
            row = rows.pop(f"4 heads, {way}, features {place}")
            assert row["unit"] == "s"
            assert 0 < row["value"] < math.inf
            assert "linear, talk2dino, film, cross_attention, batch_size 4" in row["note"]
    assert not rows


def test_ratios_are_of_the_rows_that_they_name(written: Mapping[str, Any]) -> None:
    values = {row["name"]: row["value"] for row in written["rows"]}
    expected = {
        f"{recipe}: {CACHE} / {other}": values[f"{recipe}: {CACHE}"] / values[f"{recipe}: {other}"]
        for recipe in RECIPES.keys() - NOT_HERE
        for other in (MEMORY, LOOP)
    } | {
        f"4 heads, features {place}: one pass / one after the other": values[
            f"4 heads, one after the other, features {place}"
        ]
        / values[f"4 heads, one pass, features {place}"]
        for place in ("on disk", "in memory")
    }
    assert written["ratios"] == pytest.approx(expected)
    assert all(0 < ratio < math.inf for ratio in written["ratios"].values())


def test_all_contenders_are_given_the_same_batches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[tuple[Trainee, list[Batch]]] = []

    def take(trainee: Trainee, source: Callable[[], Iterable[Batch]]) -> float:
        given.append((trainee, list(source())))
        return 1.0

    monkeypatch.setattr(train, "_rate", take)
    recipes = ("linear", "juras", "pseg", "talk2dino")
    run(TrainBenchmarkConfig(dir=tmp_path, recipes=recipes, together=("linear",), num_batches=5, **tiny(turn_s=0)))
    assert len(given) == 3 * len(recipes)
    for recipe, (trainee, read), (_, kept), (_, encoded) in zip(
        recipes, given[::3], given[1::3], given[2::3], strict=True
    ):
        assert len(read) == len(kept) == 5, recipe
        assert len(encoded) == 2
        assert len({tuple(batch.samples) for batch in kept}) == 5, "batches differ from one another"
        for batch, other in chain(zip(read, kept, strict=True), zip(encoded, kept, strict=False)):
            assert batch.samples.tolist() == other.samples.tolist()
            mine, its = tensors_of(batch), tensors_of(other)
            assert mine.keys() == its.keys()
            for name, tensor in mine.items():
                torch.testing.assert_close(
                    tensor.to(its[name]),
                    its[name],
                    rtol=1e-3,
                    atol=3e-3,
                    msg=partial("{} of {}: {}".format, name, recipe),
                )
        assert tuple(kept[0].inputs.features) == trainee.learnt_grids
        assert set(kept[0].inputs.attention) == set(trainee.head.attention)


def test_no_token_grid_is_read_for_a_loss_that_compares_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Batch] = []
    step = Trainee.step

    def look(trainee: Trainee, batch: Batch, *arguments: Any) -> None:
        seen.append(batch)
        step(trainee, batch, *arguments)

    monkeypatch.setattr(Trainee, "step", look)
    run(TrainBenchmarkConfig(dir=tmp_path, recipes=("talk2dino",), together=("talk2dino",), **tiny(turn_s=0)))
    assert seen
    assert not any(batch.inputs.features for batch in seen)
    assert all(batch.inputs.attention.keys() == {"head_tokens"} for batch in seen)


@pytest.mark.parametrize("name", ["feature_cache", "int8_cache"])
def test_a_step_takes_batches_in_memory_as_they_are(name: str, request: pytest.FixtureRequest) -> None:
    stored = draw(request.getfixturevalue(name))
    kept = lay_on_device(stored, "cpu")
    taken = kept.inputs.to("cpu")
    wanted = stored.inputs.to("cpu")
    for layer, grid in taken.features.items():
        assert grid is kept.inputs.features[layer], "neither copied nor converted"
        assert grid.dtype == torch.float32
        torch.testing.assert_close(grid, wanted.features[layer], rtol=0, atol=0)
    for layer, token in taken.cls.items():
        assert token is kept.inputs.cls[layer]
    for field in ("prompt_tokens", "prompt_mask", "pooled", "image_index"):
        assert getattr(taken, field) is getattr(kept.inputs, field)
    (targets,) = kept.targets_at.values()
    assert targets.to("cpu").masks is targets.masks


@pytest.mark.skipif(pick_device() == "cpu", reason="there is no accelerator")
def test_batches_in_memory_lie_on_the_accelerator(feature_cache: FeatureCache) -> None:
    kept = lay_on_device(draw(feature_cache), pick_device())
    assert {tensor.device.type for tensor in tensors_of(kept).values()} == {pick_device()}
    assert kept.inputs.to(pick_device()).features["last"] is kept.inputs.features["last"]


def test_encoders_in_the_loop_give_what_was_cached(
    feature_cache: FeatureCache, image_encoder: ImageEncoder, text_encoder: TextEncoder
) -> None:
    batch = draw(feature_cache)
    encoded = Encoders(image_encoder, text_encoder, feature_cache).encode(batch)
    mine, its = tensors_of(encoded), tensors_of(batch)
    assert mine.keys() == its.keys()
    assert encoded.samples is batch.samples
    for name, tensor in mine.items():
        torch.testing.assert_close(
            tensor, its[name].to(tensor), rtol=1e-3, atol=3e-3, msg=partial("{}: {}".format, name)
        )
        assert not tensor.is_inference(), "a head can learn from it"


def test_batches_are_those_of_the_recipe_unless_one_is_asked_for() -> None:
    config = TrainBenchmarkConfig()
    for recipe, published in RECIPES.items():
        measured = config.head_config(recipe)
        assert measured.batch_size == published.batch_size
        assert measured.prompts_per_image == (1 if published.prompts_per_image == 1 else 4)
        assert (measured.loss, measured.optimizer) == (published.loss, published.optimizer)
    assert config.head_config("talk2dino").prompts_per_image == 1
    forced = TrainBenchmarkConfig(batch_size=24, prompts_per_image=2)
    assert {(c.batch_size, c.prompts_per_image) for c in map(forced.head_config, RECIPES)} == {(24, 2)}
    assert {(c.batch_size, c.prompts_per_image) for c in map(forced.shared_config, RECIPES)} == {(24, 2)}


def test_heads_in_one_pass_see_the_same_batches_by_default() -> None:
    shared = [TrainBenchmarkConfig().shared_config(recipe) for recipe in RECIPES]
    assert len({(config.batch_size, config.prompts_per_image, config.epochs) for config in shared}) == 1


def test_nothing_is_initialised_from_another_checkpoint_and_layers_are_the_published_ones() -> None:
    arguments = TrainBenchmarkConfig().head_config("pseg").arguments
    assert "initial" not in arguments
    assert arguments["layers"] == ["3", "6", "9", "11"]
    assert "layers" not in TrainBenchmarkConfig(model="dinov2-tiny@56").head_config("pseg").arguments


@pytest.mark.parametrize(
    ("batch_s", "expected"), [(0.005, 400), (0.3, 12), (5.0, 12), (1e-6, MOST_BATCHES), (2 / 30.5, 31)]
)
def test_a_turn_takes_two_seconds_within_bounds(batch_s: float, expected: int) -> None:
    assert TrainBenchmarkConfig().batches_of_turn(batch_s) == expected


def test_what_was_asked_for_is_never_cut() -> None:
    assert TrainBenchmarkConfig(num_batches=2 * MOST_BATCHES).batches_of_turn(1e-6) == 2 * MOST_BATCHES


def test_heads_that_cannot_be_trained_together_are_a_row_with_a_reason(tmp_path: Path) -> None:
    report = run(TrainBenchmarkConfig(dir=tmp_path, recipes=(), together=("linear", "clipseg"), **tiny()))
    (row,) = report.rows
    assert (row.name, row.value, row.unit) == ("2 heads", None, "s")
    assert row.note.startswith("left out: CLIPSeg")
    assert not report.ratios


def tiny(**options: Any) -> dict[str, Any]:
    return {"model": "dinov2-tiny@56", "tiny_text": True, "num_images": 12, "batch_size": 4, "rounds": 1, **options}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "rounds is 0"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--prompts-per-image", "0"], "prompts_per_image is 0"),
        (["--turn-s", "-1"], "turn_s is -1"),
        (["--turn-s", "nan"], "turn_s is nan"),
        (["--recipes", "linea"], "did you mean 'linear'"),
        (["--together", "fim"], "did you mean 'film'"),
        (["--model", "dinov2-small"], "give an architecture"),
    ],
)
def test_a_mistake_is_one_sentence(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "run", lambda config: Report("train", {}, {}))
    assert train.main(options) == 2
    assert message in " ".join(capsys.readouterr().err.split())
