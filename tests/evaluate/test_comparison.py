"""Two runs compared: differences and counts against a plain recount, the page, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_schema.errors import StoreMismatchError, UsageError
from cache_schema.features import FeatureCache, open_cache
from cache_schema.samples import write_samples
from evaluate.comparison import compare_runs
from evaluate.comparison_page import ChangedSample, write_comparison_page
from evaluate.evaluation import evaluate_run
from evaluate.metrics import compute
from heads.runs import Training
from tests.browser import Browser, Size
from tests.page_laws import broken_laws


@pytest.fixture(scope="module")
def other(workspace: Path, feature_cache: FeatureCache) -> Training:
    """Another head on the same stores, hardly trained."""
    from headstart import api

    settings = {"epochs": 1, "target_size": [16, 24], "learning_rate": 1e-5, "seed": 3}
    return api.train("linear", feature_cache, workspace / "other-runs", settings=settings)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def results(run: Training, other: Training, feature_cache: FeatureCache, out: Path) -> dict[str, Any]:
    caches = (feature_cache, feature_cache)
    return compare_runs(run.run_dir, other.run_dir, caches, out, notes=["Encoders are <untrained>."])


def test_the_file_holds_what_is_returned(results: dict[str, Any], out: Path) -> None:
    assert json.loads((out / "comparison.json").read_text()) == json.loads(json.dumps(results))


def test_differences_are_those_of_the_two_runs_scored_one_by_one(
    results: dict[str, Any], run: Training, other: Training, feature_cache: FeatureCache
) -> None:
    first, second = (evaluate_run(one.run_dir, feature_cache, "val") for one in (run, other))
    for name, found in results["differences"].items():
        one, two = compute((first.scores,))[name], compute((second.scores,))[name]
        assert (found["first"], found["second"]) == (one, two)
        assert found["difference"] == (None if one is None or two is None else two - one)
    change = second.scores.iou - first.scores.iou
    counts = results["samples"]
    assert [counts[name] for name in ("num", "won", "lost", "same")] == [
        len(change),
        np.count_nonzero(change > 0),
        np.count_nonzero(change < 0),
        np.count_nonzero(change == 0),
    ]
    assert counts["lost"] > 0
    half = [scores.iou >= 0.5 for scores in (first.scores, second.scores)]
    assert counts["fell_below_0.5"] == np.count_nonzero(half[0] & ~half[1])
    assert counts["reached_0.5"] == np.count_nonzero(half[1] & ~half[0])


def test_the_most_changed_samples_come_first(results: dict[str, Any]) -> None:
    for name, sign in (("most_won", 1), ("most_lost", -1)):
        changes = [sign * (sample["iou"][1] - sample["iou"][0]) for sample in results["samples"][name]]
        assert changes == sorted(changes, reverse=True)
        assert all(change > 0 for change in changes)


def test_slices_stand_side_by_side(results: dict[str, Any], run: Training, feature_cache: FeatureCache) -> None:
    evaluation = evaluate_run(run.run_dir, feature_cache, "val")
    kinds = feature_cache.samples.samples.tags["kind"]
    for kind, found in results["slices"]["kind"].items():
        chosen = [iou for iou, row in zip(evaluation.scores.iou, evaluation.samples, strict=True) if kinds[row] == kind]
        assert found["num_samples"] == len(chosen)
        assert found["mean_iou"][0] == pytest.approx(np.mean(chosen))
    assert results["slices"].keys() >= {"kind", "prompt_length", "object_size"}


def test_a_run_compared_with_itself_does_not_differ(run: Training, feature_cache: FeatureCache, tmp_path: Path) -> None:
    results = compare_runs(run.run_dir, run.run_dir, (feature_cache, feature_cache), tmp_path)
    assert results["samples"]["same"] == results["samples"]["num"]
    assert {found["difference"] for found in results["differences"].values()} <= {0.0, None}
    page = (tmp_path / "comparison.html").read_text()
    assert "these samples do not tell the two apart" in page
    assert "No picture to show." in page


class Page(HTMLParser):
    """What a page is made of: its text, where its pictures come from, and its tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_the_page_holds_its_pictures_and_nothing_from_elsewhere(results: dict[str, Any], out: Path) -> None:
    page = Page((out / "comparison.html").read_text())
    shown = min(6, len({sample["image"] for sample in results["samples"]["most_won"]}))
    shown += min(6, len({sample["image"] for sample in results["samples"]["most_lost"]}))
    assert page.tags.count("img") == 4 * shown > 0
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    assert "script" not in page.tags
    assert "Encoders are <untrained>." in page.text
    for run in results["runs"]:
        assert run["head"] in page.text
    assert f"falls in {results['samples']['lost']}" in page.text


@pytest.mark.parametrize("size", ["phone", "desktop"])
def test_the_page_breaks_no_law_in_a_browser(browser: Browser, results: dict[str, Any], out: Path, size: Size) -> None:
    assert browser.visit(out / "comparison.html", broken_laws, size=size) == []


def test_names_and_prompts_on_the_page_are_text(results: dict[str, Any], tmp_path: Path) -> None:
    hostile = "</p><script>alert(1)</script>"
    renamed = {**results, "runs": [{**one, "head": f"{hostile}{place}"} for place, one in enumerate(results["runs"])]}
    mask = np.zeros((20, 30), np.bool_)
    sample = ChangedSample(np.zeros((20, 30, 3), np.uint8), mask, (mask, ~mask), (0.25, 0.75), hostile, hostile)
    path = write_comparison_page(tmp_path / "page.html", renamed, np.array([0.5, -0.25]), [sample], [hostile])
    page = Page(path.read_text())
    assert "script" not in page.tags
    assert page.text.count(hostile) > 5
    again = write_comparison_page(tmp_path / "again.html", renamed, np.array([0.5, -0.25]), [sample], [hostile])
    assert again.read_bytes() == path.read_bytes()


def test_runs_on_other_features_of_the_same_samples_are_compared(
    run: Training, feature_cache: FeatureCache, int8_cache: FeatureCache, workspace: Path, tmp_path: Path
) -> None:
    """Each on its own features: int8 changes little."""
    results = compare_runs(run.run_dir, run.run_dir, (feature_cache, int8_cache), tmp_path)
    assert results["provenance"]["first"]["samples"] == results["provenance"]["second"]["samples"]
    assert results["provenance"]["first"] != results["provenance"]["second"]
    assert results["samples"]["won"] + results["samples"]["lost"] > 0
    assert abs(results["differences"]["mean_iou"]["difference"]) < 0.05


def test_runs_of_other_samples_are_refused(run: Training, feature_cache: FeatureCache, tmp_path: Path) -> None:
    store, paths = feature_cache.samples, [feature_cache.images.store.path, feature_cache.prompts.store.path]
    path, _ = write_samples(
        tmp_path, store.samples, dataset="renamed", sources={}, image_dir=store.image_dir, libraries={}
    )
    with pytest.raises(StoreMismatchError, match="the runs are of other samples"):
        compare_runs(run.run_dir, run.run_dir, (feature_cache, open_cache(path, *paths)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_samples_that_one_store_lacks_are_named(
    run: Training, feature_cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [store.path for store in (feature_cache.samples, feature_cache.images.store, feature_cache.prompts.store)]
    lacking = open_cache(*paths)
    every = lacking.usable_samples("val")
    monkeypatch.setattr(type(lacking), "usable_samples", lambda self, split: every[1:] if self is lacking else every)
    with pytest.raises(StoreMismatchError, match="1 samples of val have image features in one store only"):
        compare_runs(run.run_dir, run.run_dir, (feature_cache, lacking), tmp_path)


def test_a_folder_that_is_no_run_is_refused(run: Training, feature_cache: FeatureCache, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not trained to its end"):
        compare_runs(run.run_dir, tmp_path / "nowhere", (feature_cache, feature_cache), tmp_path / "out")


def test_a_picture_that_is_gone_is_left_out(
    run: Training, other: Training, feature_cache: FeatureCache, tmp_path: Path
) -> None:
    shutil.copytree(feature_cache.samples.image_dir, tmp_path / "images")
    for picture in (path for path in (tmp_path / "images").rglob("*") if path.suffix in (".jpg", ".png")):
        picture.unlink()
    paths = [store.path for store in (feature_cache.samples, feature_cache.images.store, feature_cache.prompts.store)]
    caches = (open_cache(*paths, tmp_path / "images"), feature_cache)
    results = compare_runs(run.run_dir, other.run_dir, caches, tmp_path / "out")
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert results["samples"]["lost"] > 0
    assert not re.search(r"<img", page)
