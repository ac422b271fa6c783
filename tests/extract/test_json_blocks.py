"""JSON read block by block is the JSON read at once, wherever the blocks end, and takes little memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extract.datasets import json_blocks
from extract.datasets.faults import AnnotationError
from extract.datasets.json_files import JsonFile

TEXTS = st.text(max_size=6) | st.sampled_from(["},", "}, {", "]", "\\", '"', "[{", "}]"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-999, 2**65) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
SEPARATORS = st.sampled_from([(",", ":"), (", ", ": "), (",\n", " : "), (" ,", ":\t")])
ITEM = {"id": 7, "sentences": [{"sent": "a}, {b"}, {"sent": "c"}], "box": {"a": {}, "b": [1, 2]}}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blocks") / "refs.json"


@pytest.fixture(scope="module", params=[1, 5, 40, 1 << 18])
def block_bytes(request: pytest.FixtureRequest) -> Iterator[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_blocks, "_BLOCK_BYTES", request.param)
        patch.setattr(json_blocks, "_VALUE_BYTES", request.param)
        yield request.param


@given(st.lists(JSON, max_size=8), st.dictionaries(TEXTS.filter(bool), JSON, max_size=3), SEPARATORS)
@pytest.mark.usefixtures("block_bytes")
def test_items_are_what_json_says_they_are(
    path: Path, items: list[Any], others: dict[str, Any], separators: tuple[str, str]
) -> None:
    whole = {**others, "list": items, "end": None}
    path.write_text(json.dumps(whole, separators=separators))
    file = JsonFile(path)
    assert list(file.items("list")) == items
    assert len(file.items("list")) == len(items)
    for key, value in whole.items():  # a drawn key may be "list" or "end", and is overwritten then
        assert file.has(key)
        if isinstance(value, list):
            assert list(file.items(key)) == value


@given(st.lists(JSON | st.just(ITEM), max_size=8), SEPARATORS)
@pytest.mark.usefixtures("block_bytes")
def test_an_item_is_found_again_at_its_place(path: Path, items: list[Any], separators: tuple[str, str]) -> None:
    path.write_text(" \n" + json.dumps(items, separators=separators) + "\n ")
    found, text = JsonFile(path).items(), path.read_bytes()
    placed = list(found.placed())
    assert [json.loads(text[start:stop]) for start, stop, _ in placed] == items
    assert [found.text(start, stop) for start, stop, _ in placed] == [raw for *_, raw in placed]


@given(
    st.lists(JSON | st.just(ITEM), max_size=5),
    st.data(),
    st.sampled_from([b"", b",", b"}", b"]", b"{", b"[", b'"', b"},", b"1", b" ", b"\\", b":"]),
)
@pytest.mark.usefixtures("block_bytes")
def test_a_file_is_refused_exactly_if_it_is_no_json(
    path: Path, items: list[Any], data: st.DataObject, put: bytes
) -> None:
    """One place of a sound file is overwritten."""
    text = json.dumps(items if data.draw(st.booleans()) else {"list": items, "more": 1}).encode()
    start = data.draw(st.integers(0, len(text)))
    broken = text[:start] + put + text[start + data.draw(st.integers(0, 2)) :]
    path.write_bytes(broken)
    assert is_read(path) == is_json(broken)


def is_read(path: Path) -> bool:
    try:
        JsonFile(path)
    except AnnotationError:
        return False
    return True


def is_json(text: bytes) -> bool:
    """Whether the parser takes all of it at once, as an object or a list."""
    kind = dict[str, msgspec.Raw] if text.lstrip()[:1] == b"{" else list[msgspec.Raw]
    try:
        msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize(
    "text", ["[{},]", "[{}, ]", '{"a": [{},\n]}', "[{} {}]", "[{}},]", "[{}],", '{"a": [], }', '{"a": [{}]]}', "[,{}]"]
)
def test_what_is_wrong_between_two_blocks_is_found(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(AnnotationError, match=r"is not valid JSON: .* at line"):
        JsonFile(path)


def test_an_item_may_be_larger_than_a_block(path: Path) -> None:
    large = {"a": [{"b": n} for n in range(50_000)], "c": "}," * 200_000}
    path.write_text(json.dumps([large, ITEM, large]))
    assert list(JsonFile(path).items()) == [large, ITEM, large]


def test_memory_does_not_grow_with_the_file(path: Path) -> None:
    num_items, item = 2000, json.dumps({**ITEM, "tokens": [{"text": "word " * 20}] * 60})
    path.write_text('{"more": 1, "list": [' + ",\n".join([item] * num_items) + "]}")
    tracemalloc.start()
    try:
        assert sum(item["id"] for item in JsonFile(path).items("list")) == 7 * num_items
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**22 < path.stat().st_size / 2
