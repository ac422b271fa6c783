"""The report of a finetuning: every part of it, on a folder that a finetuning left and on one that lacks a stage."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jaxtyping import UInt8

import headstart
from cache_schema.errors import UsageError
from cache_schema.features import FeatureCache
from evaluate.finetune_report import BeforeAfter, before_and_after, write_finetune_report
from evaluate.predictor import Prediction, open_image
from heads.finetune import FinetuneConfig, finetune
from heads.runs import Training
from heads.train import train
from heads.train_config import TrainConfig
from tests.evaluate.test_report import NASTY, Page
from tests.heads.live_encoders import FakeFactory
from tests.heads.test_finetune import BOTH, MASKS, quiet

DASH = "\N{EN DASH}"


def disc(width: int, size: tuple[int, int] = (30, 40)) -> np.ndarray:
    mask = np.zeros(size, np.bool_)
    mask[5:25, :width] = True
    return mask


IMAGE = np.full((30, 40, 3), 120, np.uint8)
PICTURES = [
    BeforeAfter(IMAGE, "the dog on the left", disc(20), disc(5), disc(18)),
    BeforeAfter(IMAGE, NASTY, disc(20), disc(10), disc(0)),
    BeforeAfter(IMAGE, "nothing changes", disc(20), disc(10), disc(10)),
]
STEPS: list[dict[str, Any]] = [
    {"name": "frozen", "mean_iou": 0.4123, "overall_iou": 0.5, "note": "the head alone"},
    {"name": "contrastive", "mean_iou": None, "overall_iou": None, "note": ""},
    {"name": "LoRA end to end", "mean_iou": 0.6789, "overall_iou": 0.7, "note": "<u>note"},
]


@pytest.fixture(scope="module")
def finished(feature_cache: FeatureCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages, of which the second goes on from a trained head."""
    folder = tmp_path_factory.mktemp("report")
    trained = train(dataclasses.replace(MASKS, epochs=3), feature_cache, folder / "cache")
    make(BOTH, feature_cache, folder / "run", head=trained.run_dir / "best")
    return folder / "run"


def make(config: FinetuneConfig, cache: FeatureCache, run_dir: Path, head: Path | None = None) -> None:
    finetune(config, cache, FakeFactory(cache, config.sides), run_dir, head=head, say=quiet)


def changed(run_dir: Path, out: Path, **told: Any) -> Path:
    """A copy that says something else."""
    shutil.copytree(run_dir, out, ignore=shutil.ignore_patterns("*.safetensors", "report.html"))
    path = out / "finetuning.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **told}))
    return out


@pytest.fixture(scope="module")
def html(finished: Path) -> str:
    return write_finetune_report(finished, PICTURES, STEPS).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def row_of(page: Page, name: str) -> list[str]:
    (row,) = [row for row in page.rows if row[0] == name]
    return list(row)


# The page


def test_the_page_stands_alone_in_the_folder_of_the_finetuning(finished: Path, html: str, page: Page) -> None:
    assert (finished / "report.html").read_text(encoding="utf-8") == html
    for _, attrs in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "poster", "data", "action"):
            assert (attrs.get(name) or "#").startswith(("#", "data:"))
    assert not {"script", "iframe", "object", "embed", "base", "u"} & {tag for tag, _ in page.tags}
    assert not re.search(r"@import|url\((?!#)", html)


def test_all_sections_are_there_and_every_header_cell_says_what_it_heads(page: Page) -> None:
    sections = [attrs["id"] for attrs in page.of("section")]
    assert sections == ["steps", "training", "pictures", "parameters", "parity", "provenance"]
    assert {attrs.get("scope") for attrs in page.of("th")} == {"col", "row"}


def test_prompts_notes_and_names_are_text_and_never_markup(
    html: str, page: Page, finished: Path, tmp_path: Path
) -> None:
    assert "<script>" not in html
    assert NASTY in page.text
    assert "<u>note" in page.text
    told = json.loads((finished / "finetuning.json").read_bytes())
    nasty = changed(
        finished,
        tmp_path / "run",
        adapted={"image": ["<b>module"]},
        parity=[{**told["parity"][0], "name": "<i>features"}],
    )
    html = write_finetune_report(nasty, steps=[{**STEPS[0], "name": "<em>frozen"}]).read_text(encoding="utf-8")
    for markup in ("<b>module", "<i>features", "<em>"):
        assert markup not in html
        assert markup in Page(html).text


def test_a_page_written_twice_is_the_same_to_the_byte(finished: Path, html: str) -> None:
    assert write_finetune_report(finished, PICTURES, STEPS).read_text(encoding="utf-8") == html


def test_ids_are_unique_and_every_reference_has_its_target(html: str, page: Page) -> None:
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)
    assert {attrs["xlink:href"][1:] for attrs in page.of("use")} <= set(ids)


# Steps


def test_steps_stand_in_their_order_with_the_best_in_bold(html: str, page: Page) -> None:
    rows = [row for row in page.rows if row[0].startswith(("frozen", "contrastive", "LoRA"))]
    assert rows == [
        ["frozenthe head alone", "0.412", "0.500"],
        ["contrastive", DASH, DASH],
        ["LoRA end to end<u>note", "0.679", "0.700"],
    ]
    assert re.findall(r"<b>([^<]+)</b>", html) == ["0.679"]


@pytest.mark.parametrize(
    ("steps", "finding"),
    [
        (STEPS, "“LoRA end to end” reaches a mean IoU of 0.679; “frozen” reached 0.412."),
        (STEPS[::-1], "No step reaches more than “LoRA end to end” with a mean IoU of 0.679."),
        (STEPS[:2], "“frozen” reaches a mean IoU of 0.412."),
    ],
)
def test_the_finding_compares_the_best_step_with_the_first(
    steps: list[dict[str, Any]], finding: str, finished: Path, tmp_path: Path
) -> None:
    page = Page(write_finetune_report(changed(finished, tmp_path / "run"), steps=steps).read_text(encoding="utf-8"))
    assert finding in page.text


@pytest.mark.parametrize(
    ("best_step", "finding"),
    [
        (9, "The segmentation stage reaches a validation mean IoU of 0.345; it began at 0.123."),
        (0, "The segmentation stage found nothing better than what it began with, a validation mean IoU of 0.345."),
    ],
)
def test_without_steps_the_last_stage_is_compared_with_its_beginning(
    best_step: int, finding: str, finished: Path, tmp_path: Path
) -> None:
    stages = json.loads((finished / "finetuning.json").read_bytes())["stages"]
    stages["segmentation"] |= {"best_step": best_step, "best_val_mean_iou": 0.345}
    run_dir = changed(finished, tmp_path / "run", stages=stages)
    path = run_dir / "segmentation" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["epoch"] == 0
    lines[0]["val_mean_iou"] = 0.123
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_finetune_report(run_dir).read_text(encoding="utf-8"))
    assert finding in page.text
    assert "steps" not in [attrs["id"] for attrs in page.of("section")]


# Stages


def test_the_curves_of_both_stages_are_of_what_metrics_say(finished: Path, page: Page) -> None:
    labels = [svg["aria-label"] for svg in page.of("svg")]
    ends = {
        stage: json.loads((finished / stage / "metrics.jsonl").read_text().splitlines()[-1])
        for stage in ("contrastive", "segmentation")
    }
    one, two = ends["contrastive"], ends["segmentation"]
    assert labels == [
        f"Loss of the contrastive stage over training steps: training ends at {one['train_loss']:.3g}, "
        f"validation ends at {one['val_loss']:.3g}.",
        "Validation mean IoU of the contrastive stage over training steps: validation ends at "
        f"{one['val_mean_iou']:.3g}.",
        "Validation recall@1 of the contrastive stage over training steps: text to image ends at "
        f"{one['val_text_to_image_recall@1']:.3g}, image to text ends at {one['val_image_to_text_recall@1']:.3g}.",
        f"Loss of the segmentation stage over training steps: training ends at {two['train_loss']:.3g}, "
        f"validation ends at {two['val_loss']:.3g}.",
        "Validation mean IoU of the segmentation stage over training steps: validation ends at "
        f"{two['val_mean_iou']:.3g}.",
    ]
    assert "Validation masks are compared at 16 × 16 pixels." in page.text  # noqa: RUF001


def test_the_table_says_how_each_stage_came_out(finished: Path, page: Page) -> None:
    told = json.loads((finished / "finetuning.json").read_bytes())["stages"]
    for name, head in (("contrastive", "talk2dino"), ("segmentation", "linear")):
        training = told[name]
        row = row_of(page, name.capitalize() + head)
        assert row[1:3] == [str(training["num_steps"]), str(training["best_step"])]
        assert row[3:5] == [f"{training['best_val_mean_iou']:.3f}", f"{training['best_val_loss']:.3f}"]


def test_a_stage_without_masks_has_dashes_and_no_curve_of_them(finished: Path, tmp_path: Path) -> None:
    told = json.loads((finished / "finetuning.json").read_bytes())["stages"]
    one = {**told["contrastive"], "best_val_mean_iou": None}
    run_dir = changed(finished, tmp_path / "run", stages={"contrastive": one})
    path = run_dir / "contrastive" / "metrics.jsonl"
    lines = [json.loads(line) | {"val_mean_iou": None} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_finetune_report(run_dir).read_text(encoding="utf-8"))
    assert [svg["aria-label"].partition(" over")[0] for svg in page.of("svg")] == [
        "Loss of the contrastive stage",
        "Validation recall@1 of the contrastive stage",
    ]
    assert row_of(page, "Contrastivetalk2dino")[3] == DASH
    (best,) = [line for line in lines if line["step"] == one["best_step"]]
    recall = best["val_text_to_image_recall@1"]
    assert f"reaches a validation recall@1 from text to image of {recall:.3f}." in page.text
    assert "Segmentation" not in page.text
    assert "Validation masks" not in page.text


@pytest.mark.parametrize("stage", ["contrastive", "segmentation"])
def test_either_stage_may_be_missing(stage: str, feature_cache: FeatureCache, tmp_path: Path) -> None:
    other = "segmentation" if stage == "contrastive" else "contrastive"
    nothing: dict[str, TrainConfig | None] = {other: None}
    config = dataclasses.replace(BOTH, sides=("image",), **nothing)  # type: ignore[arg-type]
    make(config, feature_cache, tmp_path / "run")
    page = Page(write_finetune_report(tmp_path / "run").read_text(encoding="utf-8"))
    assert "LoRA finetuning of the image encoder" in page.text
    assert f"{stage.capitalize()} stage" in page.text
    assert other.capitalize() not in page.text
    assert f"the {other} stage" not in page.text


def test_a_stage_whose_folder_was_removed_is_still_told(finished: Path, tmp_path: Path) -> None:
    run_dir = changed(finished, tmp_path / "run")
    shutil.rmtree(run_dir / "contrastive")
    page = Page(write_finetune_report(run_dir).read_text(encoding="utf-8"))
    assert "No validation was recorded of this stage." in page.text
    assert row_of(page, "Contrastivetalk2dino")
    assert len(page.of("svg")) == 2


# What was adapted


def test_parameters_and_modules_are_those_of_the_finetuning(finished: Path, page: Page) -> None:
    told = json.loads((finished / "finetuning.json").read_bytes())
    learned, frozen = told["num_adapted"], told["num_encoder"]
    assert row_of(page, "Adapters, which learn") == [
        "Adapters, which learn",
        f"{learned}",
        f"{learned / (learned + frozen):.2%}",
    ]
    assert row_of(page, "Encoders beside them, as they were")[1] == f"{frozen}"
    assert row_of(page, "Head of the segmentation stage")[2] == DASH
    assert "Image encoder: 1 module " in page.text
    assert "Text encoder: 1 module " in page.text


def test_a_long_list_of_modules_is_folded_and_a_short_one_is_not(finished: Path, tmp_path: Path) -> None:
    names = [f"encoder.layer.{block}.attention.{name}" for block in range(12) for name in ("query", "value")]
    run_dir = changed(
        finished, tmp_path / "run", adapted={"image": names, "text": ["fc1"]}, num_adapted=1500, num_encoder=998_500
    )
    page = Page(write_finetune_report(run_dir).read_text(encoding="utf-8"))
    assert "Image encoder: 24 modules 12 query, 12 value" in page.text
    assert all(name in page.text for name in names)
    assert ["open" in attrs for attrs in page.of("details")] == [False, True]
    assert row_of(page, "Adapters, which learn")[1:] == ["1.5 k", "0.15%"]
    assert "1.5 k parameters beside 998 k that stayed as they were" in page.text


def test_parity_is_shown_as_finely_as_it_is_checked(finished: Path, tmp_path: Path) -> None:
    parity = {
        "name": "image features 9",
        "num": 12345,
        "mean_cosine": 0.99999,
        "least_cosine": 0.9995,
        "max_error": 0.01234,
    }
    page = Page(write_finetune_report(changed(finished, tmp_path / "run", parity=[parity])).read_text(encoding="utf-8"))
    assert row_of(page, "image features 9")[1:] == ["12,345", "0.999990", "0.999500", "0.0123"]


def test_settings_and_stores_are_listed(page: Page, feature_cache: FeatureCache) -> None:
    assert row_of(page, "rank")[1] == "8"
    assert row_of(page, "sides")[1] == "image, text"
    assert row_of(page, "dora")[1] == "no"
    assert not [row for row in page.rows if row[0] == "target modules"]
    assert row_of(page, "image features")[1] == feature_cache.fingerprints["image_features"]


def test_a_head_that_learned_alone_is_said_to(finished: Path, tmp_path: Path, page: Page) -> None:
    run_dir = changed(finished, tmp_path / "run")
    path = run_dir / "config.json"
    config = json.loads(path.read_bytes())
    path.write_text(json.dumps({**config, "finetune": {**config["finetune"], "head_alone": True}}))
    assert "a head learned alone" in Page(write_finetune_report(run_dir).read_text(encoding="utf-8")).text
    assert "a head learned alone" not in page.text


# Pictures


def test_every_picture_shows_image_truth_before_and_after_with_their_iou(page: Page) -> None:
    images = page.of("img")
    assert len(images) == 4 * len(PICTURES)
    assert all(image["alt"] and image["width"] and image["height"] for image in images)
    assert [image["alt"].partition(":")[0] for image in images[:4]] == [
        "The image, 40 by 30 pixels",
        "Truth",
        "Before",
        "After",
    ]
    assert images[7]["alt"] == "After: nothing is marked"
    text = page.text[page.text.index("“the dog on the left”") :]
    captions = re.findall(r"(?:Before|After): IoU \d\.\d\d", text)
    assert captions == [
        "Before: IoU 0.25",
        "After: IoU 0.90",
        "Before: IoU 0.50",
        "After: IoU 0.00",
        "Before: IoU 0.50",
        "After: IoU 0.50",
    ]
    assert "Of 3 samples the IoU rises in 1 and falls in 1." in page.text


def test_a_page_with_many_large_pictures_stays_light(finished: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
    masks = [disc(width, (240, 320)) for width in (20, 100, 300)]
    path = write_finetune_report(changed(finished, tmp_path / "run"), [BeforeAfter(noise, "noise", *masks)] * 32)
    assert path.stat().st_size < 4_000_000


def test_a_page_without_pictures_says_so(finished: Path, tmp_path: Path) -> None:
    page = Page(write_finetune_report(changed(finished, tmp_path / "run")).read_text(encoding="utf-8"))
    assert "No picture was kept." in page.text
    assert not page.of("img")


class MarksAll:
    """Marks the same everywhere, and remembers what it was asked."""

    def __init__(self, value: bool) -> None:
        self.value = value
        self.asked: list[tuple[Any, str]] = []

    def set_image(self, image: UInt8[np.ndarray, "h w 3"]) -> None:
        self.image = image

    def predict(self, prompts: str) -> Sequence[Prediction]:
        self.asked.append((self.image, prompts))
        mask = np.full(self.image.shape[:2], self.value)
        return [Prediction(prompts, mask, mask.astype(np.float32))]


def test_samples_are_spread_over_the_images_of_a_split(feature_cache: FeatureCache) -> None:
    samples = feature_cache.samples.samples
    image_dir = feature_cache.samples.image_dir
    assert image_dir is not None
    firsts: dict[int, int] = {}
    for row in feature_cache.usable_samples("train").tolist():
        if not samples.no_target[row]:
            firsts.setdefault(int(samples.image_rows[row]), row)
    rows = sorted(firsts.values())
    before, after = MarksAll(False), MarksAll(True)
    found = before_and_after(feature_cache, before, after, "train", num=3)
    expected = [rows[0], rows[round((len(rows) - 1) / 2)], rows[-1]]
    assert [picture.prompt for picture in found] == [samples.prompts[samples.prompt_rows[row]] for row in expected]
    for picture, row in zip(found, expected, strict=True):
        path = image_dir / samples.images.paths[samples.image_rows[row]]
        np.testing.assert_array_equal(picture.image, open_image(path))
        np.testing.assert_array_equal(picture.truth, samples.target(row))
        assert picture.truth.any()
        assert not picture.before.any()
        assert picture.after.all()
    assert [prompt for _, prompt in before.asked] == [prompt for _, prompt in after.asked]
    assert len(before_and_after(feature_cache, before, after, "train", num=10_000)) == len(rows)


def test_trained_heads_are_asked_what_they_see_in_pixels(feature_cache: FeatureCache, run: Training) -> None:
    predictor = headstart.load(run, device="cpu")
    found = before_and_after(feature_cache, predictor, MarksAll(True), "val", num=2)
    assert len({picture.prompt for picture in found}) == 2
    for picture in found:
        (prediction,) = predictor.set_image(picture.image).predict(picture.prompt)
        np.testing.assert_array_equal(picture.before, prediction.mask)


def test_samples_without_a_target_or_a_mask_are_not_shown(feature_cache: FeatureCache) -> None:
    samples = feature_cache.samples.samples
    rows = feature_cache.usable_samples("val").tolist()
    absent, no_target = list(samples.targets), samples.no_target.copy()
    kept = [row for row in rows if not samples.no_target[row]][-1]
    for row in rows:
        if row != kept:
            absent[row] = b"" if row % 2 else absent[row]
            no_target[row] = not row % 2
    some = dataclasses.replace(samples, targets=absent, no_target=no_target)
    cache = dataclasses.replace(feature_cache, samples=dataclasses.replace(feature_cache.samples, samples=some))
    (picture,) = before_and_after(cache, MarksAll(False), MarksAll(True), "val")
    assert picture.prompt == samples.prompts[samples.prompt_rows[kept]]


def test_pictures_that_are_gone_are_left_out(feature_cache: FeatureCache, tmp_path: Path) -> None:
    before, after = MarksAll(False), MarksAll(True)
    for image_dir in (None, tmp_path):
        moved = dataclasses.replace(
            feature_cache, samples=dataclasses.replace(feature_cache.samples, image_dir=image_dir)
        )
        assert before_and_after(moved, before, after, "val") == []
    with pytest.raises(UsageError, match="unknown split 'vall': did you mean 'val'"):
        before_and_after(feature_cache, before, after, "vall")


def test_pixels_that_nobody_labelled_count_for_nobody(
    feature_cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = feature_cache.samples.samples
    monkeypatch.setattr(type(samples), "ignored_pixels", lambda self, row: ~self.target(row))
    (picture,) = before_and_after(feature_cache, MarksAll(False), MarksAll(True), "val", num=1)
    np.testing.assert_array_equal(picture.after, picture.truth)
    assert picture.ious == (0.0, 1.0)


# Refusals


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no folder .*: name what `headstart finetune` printed"):
        write_finetune_report(tmp_path / "run")


def test_an_unfinished_finetuning_is_refused_and_left_as_it_is(finished: Path, tmp_path: Path) -> None:
    run_dir = changed(finished, tmp_path / "run")
    (run_dir / "finetuning.json").unlink()
    with pytest.raises(UsageError, match=r"no finished finetuning, for it lacks finetuning\.json: .* or run it again"):
        write_finetune_report(run_dir)
    assert not (run_dir / "report.html").exists()


@pytest.mark.parametrize("name", ["finetuning.json", "config.json"])
def test_a_damaged_record_is_refused(name: str, finished: Path, tmp_path: Path) -> None:
    run_dir = changed(finished, tmp_path / "run")
    (run_dir / name).write_text("{")
    with pytest.raises(UsageError, match=r"holds no finetuning that can be read \(.*\): name what"):
        write_finetune_report(run_dir)
