"""The reader's benchmark measures what it says: right bytes, everyone named, ratios the right way round."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import arrays, loaders, reader, writers
from benchmarks.common import Library, Report, Row, Spread, take_turns
from benchmarks.reader import ReaderConfig, measure
from benchmarks.rows import DTYPE, Rows, WrongBytesError

NOT_THERE = {"zarrs", "litdata", "streaming", "webdataset"}


@pytest.fixture(autouse=True)
def _few_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is installed, only what tests always have takes part."""
    monkeypatch.setattr(Library, "is_installed", property(lambda self: self.module not in NOT_THERE))


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    return Rows.make(tmp_path, num_rows=12, row_shape=(2, 3), batch_rows=4)


def tiny(folder: Path, **options: Any) -> ReaderConfig:
    return ReaderConfig(dir=folder, num_rows=16, repeats=2, row_shape=(2, 3, 4), batch_rows=4, **options)


def row_called(report: Report, name: str) -> Row:
    (row,) = (row for row in report.rows if row.name == name)
    return row


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_everyone_is_measured_or_named(tmp_path: Path) -> None:
    report = measure(tiny(tmp_path))
    named = {row.name: row for row in report.rows}
    everyone = [*arrays.contenders(16), *loaders.contenders(), *writers.writers()]
    assert set(named) == {contender.name for contender in everyone}
    for contender in everyone:
        row = named[contender.name]
        if contender.is_installed:
            assert row.value is not None
            assert 0 < row.low <= row.value <= row.high
        else:
            assert (row.value, row.note) == (None, "not installed")
    assert {name for name, row in named.items() if row.value is None} >= {"zarrs", "litdata, 1 worker"}
    assert list(tmp_path.iterdir()) == [], "what was written is removed"


def test_json_holds_machine_rows_and_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "reader.json"
    wanted = ["--only", "gather", "reader, 2", "one tensor", "batches, 0", "write", "zarrs"]
    options = ["--num-rows", "128", "--repeats", "1", "--dir", str(tmp_path), "--json", str(path), *wanted]
    assert reader.main(options) == 0
    found = json.loads(path.read_text())
    assert found["benchmark"] == "reader"
    assert {"cpu", "cores", "memory_gib", "kernel", "filesystem", "python", "libraries"} == set(found["machine"])
    assert "tensorstore" in found["machine"]["libraries"]
    assert all({"name", "value", "unit"} <= set(row) for row in found["rows"])
    expected = {
        "reader, 2 threads / memmap gather",
        "reader, 2 threads, verified / memmap gather",
        "reader into one tensor, verified / fastest loader",
        "writer / raw write",
        "writer / tensorstore write",
    }
    assert expected <= set(found["ratios"]) == set(found["ratio_ranges"])
    assert all(isinstance(ratio, float) for ratio in found["ratios"].values())
    printed = capsys.readouterr().out
    assert "not installed" in printed
    assert all(name in printed for name in found["ratios"])


def test_no_file_names_the_machine_or_a_place_on_it(tmp_path: Path) -> None:
    text = json.dumps(measure(tiny(tmp_path, only=("gather",))).to_dict())
    assert str(tmp_path) not in text


def test_ratio_is_the_median_of_the_ratios_within_rounds() -> None:
    report = Report("some", {}, {})
    report.compare({"ours": [2.0, 30.0, 5.0], "other": [1.0, 10.0, 1.0]}, "ours", "other", "ours / other")
    report.compare({"ours": [1.0]}, "ours", "absent", "ours / absent")
    assert report.ratios == {"ours / other": Spread(3.0, 2.0, 5.0)}


def test_contenders_take_turns_and_another_goes_first_in_each_round() -> None:
    went: list[str] = []

    def turn(name: str) -> float:
        went.append(name)
        return float(len(went))

    rates = take_turns({"a": lambda: turn("a"), "b": lambda: turn("b")}, rounds=2)
    assert went == ["a", "b", "b", "a"]
    assert rates == {"a": [1.0, 4.0], "b": [2.0, 3.0]}


@pytest.mark.parametrize(
    ("taken", "in_order", "accepted"),
    [
        (slice(None), True, True),
        (slice(0, 8), True, True),
        (slice(None, None, -1), True, False),
        (slice(None, None, -1), False, True),
        (slice(0, 8), False, False),
        (slice(0, 0), True, False),
    ],
    ids=["all in order", "the first in order", "another order", "any order", "some are missing", "none"],
)
def test_returned_rows_are_held_to_the_truth(rows: Rows, taken: slice, in_order: bool, accepted: bool) -> None:
    batches = [np.array(rows.open()[rows.order[taken]])]
    if accepted:
        rows.require(batches, in_order, "somebody")
    else:
        with pytest.raises(WrongBytesError, match="somebody did not return"):
            rows.require(batches, in_order, "somebody")


def test_a_changed_byte_is_noticed(rows: Rows) -> None:
    batch = np.array(rows.open()[rows.order])
    batch.view(np.uint8)[3, 1, 2] ^= 1
    with pytest.raises(WrongBytesError):
        rows.require([batch], True, "somebody")


def test_a_writer_that_loses_rows_is_noticed(tmp_path: Path) -> None:
    def open_forgetful(folder: Path, shards: Sequence[Any]) -> Any:
        write = writers.open_raw(folder, shards)
        return lambda shards: write([np.zeros_like(shard) for shard in shards])

    forgetful = writers.Writer("forgetful", open_forgetful, writers.read_raw)
    with pytest.raises(WrongBytesError, match="forgetful"):
        forgetful.require(tmp_path / "written", [np.ones((2, 3), DTYPE)])


def test_cold_cache_is_measured_where_it_can_be_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "empty_cache", lambda folder: 0.0)
    report = measure(tiny(tmp_path, only=("gather", "reader, 2 threads"), cold=True))
    assert row_called(report, "cold: memmap gather").value is not None
    assert "cold: reader, 2 threads / memmap gather" in report.ratios


def test_cold_cache_is_said_to_be_left_out_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "empty_cache", lambda folder: 1.0)
    report = measure(tiny(tmp_path, only=("gather",), cold=True))
    left_out = row_called(report, "cold: all readers")
    assert left_out.value is None
    assert left_out.note.startswith("left out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-rows", "100"], "num_rows is 100"),
        (["--repeats", "0"], "repeats is 0"),
        (["--only", "nobody"], "nobody is left"),
    ],
)
def test_a_mistake_is_one_sentence(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert reader.main(options) == 2
    assert message in capsys.readouterr().err
