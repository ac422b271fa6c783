"""A JSON file is refused in a sentence that says where it is wrong; a bad item of a good file is its own fault."""

from __future__ import annotations

import gzip
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_schema.errors import UsageError
from extract.datasets.faults import AnnotationError, FaultReport, each_item
from extract.datasets.json_files import JsonFile, Unreadable, parse
from extract.datasets.records import Source
from extract.datasets.refer import REFER_READERS

DEEP = 100_000
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=15,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("json") / "refs.json"


def open_file(path: Path, content: str | bytes) -> JsonFile:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return JsonFile(path)


def items_of(path: Path, content: str | bytes, key: str = "") -> list[Any]:
    return list(open_file(path, content).items(key))


def faults_of(path: Path, content: str | bytes) -> list[str]:
    """What is said of the items of a list, of which each should have an id and a text."""
    report = FaultReport()
    for item in each_item(open_file(path, content).items(), "id", report.of(path)):
        item.take("id", int)
        item.take("text", str)
    return [str(fault) for fault in report.faults]


@given(st.lists(JSON, max_size=5), st.booleans(), st.booleans())
def test_items_are_what_json_says_they_are(path: Path, items: list[Any], ascii_only: bool, indented: bool) -> None:
    text = json.dumps(items, ensure_ascii=ascii_only, indent=2 if indented else None)
    assert items_of(path, text) == items
    assert items_of(path, f'{{"a": 1, "list": {text}, "b": {{}}}}', "list") == items


def test_items_are_parsed_anew_each_time_and_counted(path: Path) -> None:
    items = open_file(path, '[{"id": 1}, {"id": 2}]').items()
    assert len(items) == 2
    assert list(items) == list(items) == [{"id": 1}, {"id": 2}]


def test_an_object_tells_its_keys(path: Path) -> None:
    file = open_file(path, ' {"images": [], "n": 1}')
    assert not file.is_list
    assert file.has("images")
    assert not file.has("annotations")
    assert not open_file(path, "[]").has("images")


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ('[\n {"ref_id": 1,,}\n]', "line 2, column 15"),
        ('{"a": [1, 2}', "line 1, column 12"),
        ("[1, 2", "line 1, column 6"),
        ("[]\n]", "line 2, column 1"),
        ("[1] [2]", "line 1, column 5"),
        ('["a\n]', "line 1, column 4"),
        ("[01]", "line 1, column 3"),
        ("['a']", "line 1, column 2"),
        ("// a list\n[]", "line 1, column 1"),
        (" \n \n", "line 3, column 1"),
        ("refs", "line 1, column 1"),
        ('[\n"é", \n "' + "é" * 20 + '", x]', "line 3, column 26"),
        ("\ufeff[\n1,\n,]", "line 3, column 1"),
        (b"[1, \xff]", "line 1, column 5"),
        (b"\xed\xa0\x80", "line 1, column 1"),
        (b"[\x00]", "line 1, column 2"),
    ],
)
def test_what_is_not_json_is_located_by_line_and_column(path: Path, content: str | bytes, place: str) -> None:
    with pytest.raises(AnnotationError, match=rf"refs\.json is not valid JSON: .* at {place}\. It may be cut short"):
        open_file(path, content)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("content", ["[{}]", '[{{"id": {}}}]', '{{"images": [1, {}]}}', '{{"a": {}}}'])
def test_numbers_that_json_does_not_know_are_refused(path: Path, number: str, content: str) -> None:
    with pytest.raises(AnnotationError, match=f"is not valid JSON: the number {number} is not JSON"):
        open_file(path, content.format(number))


def test_an_empty_file_and_other_kinds_of_files_are_called_what_they_are(path: Path, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"is empty\. Mend it"):
        open_file(path, "")
    with pytest.raises(AnnotationError, match=r"is a gzip file, not JSON\. Unpack it first\."):
        open_file(path, gzip.compress(b"[]"))
    with zipfile.ZipFile(tmp_path / "refs.json", "w") as archive:
        archive.writestr("refs.json", "[" * DEEP)
    with pytest.raises(AnnotationError, match=r"is a zip archive, not JSON\. Unpack it first\."):
        JsonFile(tmp_path / "refs.json")
    for encoding in ("utf-16-le", "utf-16-be"):
        with pytest.raises(AnnotationError, match=r"is UTF-16 text, and JSON is UTF-8\. Save it as UTF-8\."):
            open_file(path, "\ufeff[]".encode(encoding))


def test_a_folder_a_pipe_and_nothing_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("folder.json", "pipe.json"):
        with pytest.raises(UsageError, match=f"{name} is no regular file"):
            JsonFile(tmp_path / name)
    with pytest.raises(UsageError, match=r"nothing\.json cannot be read \(No such file or directory\)"):
        JsonFile(tmp_path / "nothing.json")


@pytest.mark.parametrize("name", ["refs(unc).p", "instances.json"])
def test_a_pipe_in_a_dataset_is_not_waited_for(tmp_path: Path, name: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "refs(unc).p").write_bytes(b"].")
    (tmp_path / "instances.json").write_text('{"images": [], "annotations": [], "categories": []}')
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(UsageError, match="is missing: it should hold"):
        REFER_READERS["refcoco"].read(Source(tmp_path))


def test_a_byte_order_mark_is_passed_over(path: Path) -> None:
    assert items_of(path, "\ufeff[1]") == [1]
    assert items_of(path, '\ufeff \n{"a": [1]}', "a") == [1]


def test_more_blanks_than_anyone_writes_are_passed_over(path: Path) -> None:
    assert items_of(path, " \n\t\r" * 10_000 + "[1]" + " \n" * 10_000) == [1]


@pytest.mark.parametrize(
    ("content", "found"),
    [('"refs"', "a text"), ("7", "a whole number"), ("null", "null"), ("true", "true or false"), ("1.5", "a number")],
)
def test_a_value_that_is_neither_object_nor_list_is_refused(path: Path, content: str, found: str) -> None:
    with pytest.raises(AnnotationError, match=f"must hold an object, holds {found}. Is it another dataset's file"):
        open_file(path, content)


def test_a_list_where_an_object_should_be_and_the_reverse_are_refused(path: Path) -> None:
    with pytest.raises(AnnotationError, match="must hold an object, holds a list"):
        items_of(path, "[]", "images")
    with pytest.raises(AnnotationError, match="must hold a list, holds an object"):
        items_of(path, "{}")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{}", "'images' is missing"),
        ('{"images": {}}', "'images' must be a list, is an object"),
        ('{"images": null}', "'images' must be a list, is null"),
        ('{"images": 1.0}', "'images' must be a list, is a number"),
    ],
)
def test_a_list_that_is_not_there_is_named(path: Path, content: str, complaint: str) -> None:
    with pytest.raises(AnnotationError, match=f"has 1 fault: {complaint}. Mend it, or fetch it again"):
        items_of(path, content, "images")


@pytest.mark.parametrize(
    "content",
    [
        "[" * DEEP,
        "[" * DEEP + "]" * DEEP,
        '{"a":' * DEEP,
        '{"a":' * DEEP + "1" + "}" * DEEP,
        '[{"id": 1}, ' + "[" * DEEP + "]" * DEEP + "]",
        '{"images": ' + "[" * DEEP + "]" * DEEP + "}",
        '[{"id": ' + "[" * DEEP + "]" * DEEP + "}]",
        '[{"id": 1, "text": ' + '{"a":' * DEEP + "1" + "}" * DEEP + "}]",
    ],
    ids=["open lists", "lists", "open objects", "objects", "an item", "a value", "an id", "a field"],
)
def test_deep_nesting_is_a_refusal_or_a_fault_of_its_item(path: Path, content: str) -> None:
    try:
        key = "" if content.startswith("[") else "images"
        assert any(isinstance(item, Unreadable) for item in items_of(path, content, key))
    except AnnotationError as refusal:
        assert len(str(refusal)) < 500  # noqa: PT017  one of the two


@pytest.mark.parametrize("depth", [50, 200, *range(300, 1100, 20), 2000, 5000])
def test_no_depth_of_nesting_slips_through_between_the_two_parsers(path: Path, depth: int) -> None:
    content = '[{"id": 1, "text": "a"}, {"id": %s, "text": "b"}]' % ("[" * depth + "]" * depth)
    try:
        faults = faults_of(path, content)
    except AnnotationError as refusal:
        assert "nest" in str(refusal) or "recursion" in str(refusal)  # noqa: PT017
        return
    assert len(faults) in (1, 2, 3)
    assert all(fault.startswith("item 1") and len(fault) < 300 for fault in faults)


def test_bad_utf8_is_a_fault_of_its_item_alone(path: Path) -> None:
    content = b'[{"id": 1, "text": "caf\xe9"}, {"id": 2, "text": "caf\xc3\xa9"}, {"id": 3, "text": "\xed\xa0\x80"}]'
    assert faults_of(path, content) == [
        "item 0 (id 1): 'text' is not valid UTF-8",
        "item 2 (id 3): 'text' is not valid UTF-8",
    ]


def test_half_a_surrogate_pair_in_an_escape_is_refused_at_its_place_and_a_whole_one_is_a_letter(path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"is not valid JSON: .* hex escape at line 2, column 2\d\. Mend it"):
        open_file(path, '[{"id": 1},\n {"id": 2, "text": "' + r'\ud83d and more"}, {"id": 3}]')
    with pytest.raises(AnnotationError, match="is not valid JSON"):
        open_file(path, r'["\ud83d"]')
    assert items_of(path, r'["\ud83d\ude00"]') == ["😀"]


def test_numbers_of_any_length_do_no_harm(path: Path) -> None:
    content = '[{"id": 18446744073709551617, "text": "a"}, {"id": %s, "text": "b"}, {"id": 1e400, "text": "c"}]'
    faults = faults_of(path, content % ("9" * 5000))
    assert faults[0] == "item 1: must be an object, is no valid JSON, or nested too deeply"
    assert all(fault.startswith("item 2") for fault in faults[1:])
    assert items_of(path, content % 2)[0]["id"] == 2**64 + 1


def test_of_a_key_that_is_there_twice_the_last_value_counts(path: Path) -> None:
    assert items_of(path, '[{"id": 1, "id": 2}]') == [{"id": 2}]
    assert items_of(path, '{"images": [1], "images": [2]}', "images") == [2]


@pytest.mark.parametrize("item", [b'"a\tb"', b'{"a" 1}', b"[1 2]", b"NaN", b"9" * 5000, b"[" * DEEP, b"", b'"\\x"'])
def test_what_only_the_second_parser_finds_is_an_item_that_cannot_be_read(item: bytes) -> None:
    assert isinstance(parse(item), Unreadable)


@given(st.binary(max_size=40))
def test_whatever_the_bytes_each_item_is_read_or_the_file_is_refused(path: Path, data: bytes) -> None:
    for content in (data, b"[" + data + b"]", b'[{"id": "' + data + b'"}, 2]', b'{"images": [' + data + b"]}"):
        try:
            items_of(path, content, "images" if content[:1] == b"{" else "")
        except AnnotationError:
            continue
