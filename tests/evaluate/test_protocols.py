"""Protocols: what they say of themselves, and what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cache_schema.errors import UsageError
from evaluate.metrics import compute, score_mask
from evaluate.protocols import ORIGINAL_SIZE, PROTOCOLS, Protocol, find_protocol
from headstart.evaluate_commands import PROTOCOL_NAMES

SECTION_4 = {"resolution", "threshold", "comparison", "empty_union", "sentence_policy", "no_target_px"}


def test_each_is_found_by_the_name_it_bears_and_the_command_line_offers_them_all() -> None:
    assert {name: find_protocol(name).name for name in PROTOCOLS} == {name: name for name in PROTOCOLS}
    assert tuple(PROTOCOLS) == PROTOCOL_NAMES
    assert find_protocol("original-size") is ORIGINAL_SIZE


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=list(PROTOCOLS))
def test_each_writes_all_its_fields_as_plain_json(protocol: Protocol) -> None:
    told = protocol.to_dict()
    assert json.loads(json.dumps(told)) == told
    assert told.keys() >= {*SECTION_4, "name", "version", "prediction_resize", "truth_resize", "headline"}
    assert Protocol(**{**told, "headline": tuple(told["headline"])}) == protocol


def test_no_two_say_the_same() -> None:
    said = [json.dumps({**protocol.to_dict(), "name": ""}) for protocol in PROTOCOLS.values()]
    assert len(set(said)) == len(said)


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=list(PROTOCOLS))
def test_what_is_shown_first_is_computed(protocol: Protocol) -> None:
    mask = np.ones((8, 8), np.bool_)
    assert set(protocol.headline) <= compute((score_mask(mask, mask, protocol=protocol),)).keys()


@pytest.mark.parametrize(
    ("name", "grid"),
    [("original-size", None), ("gref", None), ("resized-480", (480, 480)), ("resized-224", (224, 224))],
)
def test_masks_are_compared_where_the_name_says(name: str, grid: tuple[int, int] | None) -> None:
    assert PROTOCOLS[name].grid == grid


def test_a_grid_is_height_by_width() -> None:
    assert Protocol(resolution="30x50").grid == (30, 50)


@pytest.mark.parametrize(
    ("protocol", "marked"),
    [(Protocol(), [False, False, True]), (PROTOCOLS["original-size-inclusive"], [False, True, True])],
)
def test_the_threshold_itself_is_marked_under_greater_or_equal_alone(protocol: Protocol, marked: list[bool]) -> None:
    assert protocol.binarize(np.array([0.4, 0.5, 0.6])).tolist() == marked


@pytest.mark.parametrize(
    ("threshold", "comparison"), [(-0.1, ">"), (1.0, ">"), (1.5, ">"), (0.0, ">="), (1.01, ">="), (float("nan"), ">")]
)
def test_a_threshold_that_marks_all_or_nothing_is_refused(threshold: float, comparison: str) -> None:
    with pytest.raises(ValueError, match="give a threshold from 0 to 1"):
        Protocol(threshold=threshold, comparison=comparison)


@pytest.mark.parametrize(("threshold", "comparison"), [(0.0, ">"), (1.0, ">=")])
def test_a_threshold_at_the_edge_is_taken_where_something_can_be_marked_and_something_not(
    threshold: float, comparison: str
) -> None:
    assert Protocol(threshold=threshold, comparison=comparison).binarize(np.array([0.0, 1.0])).tolist() == [False, True]


@pytest.mark.parametrize("resolution", ["480", "0x480", "480x", "480X480", "480x480 ", "x", "-1x4", "Original"])
def test_a_resolution_that_is_none_is_refused(resolution: str) -> None:
    with pytest.raises(ValueError, match="a resolution is 'original' or like '480x480'"):
        Protocol(resolution=resolution)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'resized-480'"):
        find_protocol("resized-48")
