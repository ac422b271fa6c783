"""The prepare benchmark at a size that takes seconds: its datasets are sound, and it says what it measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from benchmarks import prepare as benchmark
from benchmarks.prepare import QUICK_IMAGES, BenchmarkConfig, run
from benchmarks.preparing import Request, prepare_apart, prepare_here
from benchmarks.refer import REFS_PER_IMAGE, SAMPLES_PER_IMAGE, SIZE, Layout, write_annotations, write_images
from cache_schema.samples import open_samples
from extract.prepare import PrepareConfig, prepare

NUM_IMAGES = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    write_images(folder / "images", NUM_IMAGES)
    for layout in get_args(Layout):
        write_annotations(folder / layout, layout, NUM_IMAGES)
    return folder


def request_of(folder: Path, layout: Layout, out: Path) -> Request:
    return Request(layout, str(folder / layout), str(folder / "images"), str(out))


@pytest.mark.parametrize("layout", get_args(Layout))
def test_the_datasets_are_without_a_fault_and_have_the_samples_that_are_counted(
    folder: Path, layout: Layout, tmp_path: Path
) -> None:
    prepared = prepare(PrepareConfig(layout, folder / layout, tmp_path, folder / "images"))
    assert not prepared.faults.num_faults
    samples = open_samples(prepared.path).samples
    assert len(samples) == NUM_IMAGES * SAMPLES_PER_IMAGE
    assert len(samples.images) == NUM_IMAGES == len(set(samples.images.sha256))
    assert {samples.size_of(row) for row in range(len(samples))} == {SIZE}
    assert samples.no_target.any() == (layout == "grefcoco")
    areas = [samples.target(row).sum() for row in np.flatnonzero(~samples.no_target)]
    assert min(areas) > 1000
    assert len(set(areas)) > NUM_IMAGES * REFS_PER_IMAGE / 2


def test_a_dataset_is_the_same_each_time_it_is_made(folder: Path, tmp_path: Path) -> None:
    write_annotations(tmp_path / "again", "refcoco", NUM_IMAGES)
    for name in ("refs(unc).p", "instances.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / "refcoco" / name).read_bytes()


def test_a_measurement_tells_samples_time_memory_and_size(folder: Path, tmp_path: Path) -> None:
    found = prepare_here(request_of(folder, "grefcoco", tmp_path))
    assert (found.num_samples, found.num_images) == (NUM_IMAGES * SAMPLES_PER_IMAGE, NUM_IMAGES)
    assert min(found.seconds, found.images_s, found.memory_bytes, found.store_bytes) > 0
    assert found.rate == found.num_samples / found.seconds


def test_a_measurement_in_a_process_of_its_own_reports_back_or_says_why_not(folder: Path, tmp_path: Path) -> None:
    request = request_of(folder, "refcoco", tmp_path)
    assert prepare_apart(request).num_samples == NUM_IMAGES * SAMPLES_PER_IMAGE
    with pytest.raises(RuntimeError, match=r"no folder at .*nowhere"):
        prepare_apart(replace(request, root=str(tmp_path / "nowhere")))


def test_every_layout_and_size_has_its_rows(tmp_path: Path) -> None:
    config = BenchmarkConfig(dir=tmp_path, num_images=NUM_IMAGES, rounds=2)
    report = run(config, prepare_here)
    rows = {row.name: row for row in report.rows}
    for layout in get_args(Layout):
        for num in (NUM_IMAGES // 4 * SAMPLES_PER_IMAGE, NUM_IMAGES * SAMPLES_PER_IMAGE):
            name = f"{layout}: {num} samples"
            for wanted in (name, f"{name}, peak memory", f"{name}, the store", f"{name}, images alone over all"):
                row = rows.pop(wanted)
                assert row.value is not None
                assert row.value > 0
                assert row.low <= row.value <= row.high
        assert rows.pop(f"{layout}: peak memory, 4 times the samples over one").value > 0
    assert not rows
    assert list(tmp_path.iterdir()) == [], "what was written is removed"
    assert str(tmp_path) not in json.dumps(report.to_dict())


def test_quick_gives_all_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_here(config: BenchmarkConfig) -> object:
        return run(config, prepare_here)

    monkeypatch.setattr(benchmark, "run", run_here)
    path = tmp_path / "prepare.json"
    assert benchmark.main(["--quick", "--dir", str(tmp_path), "--json", str(path)]) == 0
    written = json.loads(path.read_bytes())
    assert written["benchmark"] == "prepare"
    assert written["settings"]["num_samples"] == QUICK_IMAGES * SAMPLES_PER_IMAGE
    assert len(written["rows"]) == 18
    assert all(row["value"] > 0 for row in written["rows"])
    assert "samples/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"), [(["--rounds", "0"], "rounds is 0"), (["--num-images", "3"], "num_images is 3")]
)
def test_a_mistake_is_one_sentence(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(options) == 2
    assert message in " ".join(capsys.readouterr().err.split())
