"""JSON annotation files, which may be larger than memory should be: mapped, checked as a whole, parsed item by item."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from extract.datasets.faults import TYPE_NAMES, AnnotationError, type_name
from extract.datasets.json_blocks import Placed, end_of_value, list_blocks, skip_blanks
from extract.datasets.mapped import map_file, take

_OTHERS = {
    b"PK\x03\x04": "a zip archive, not JSON. Unpack it first",
    b"\x1f\x8b": "a gzip file, not JSON. Unpack it first",
    b"\xff\xfe": "UTF-16 text, and JSON is UTF-8. Save it as UTF-8",
    b"\xfe\xff": "UTF-16 text, and JSON is UTF-8. Save it as UTF-8",
}
"""Files that are taken for JSON, by their first bytes."""

_START = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\n\r]*(.?)", re.DOTALL)
"""A byte order mark, which says nothing of UTF-8, blanks, and the first character."""


_BYTE = re.compile(r" \(byte (\d+)\)")


class Unreadable:
    """What stands for an item that is no JSON in itself or nested too deeply, and is a fault wherever it is read."""


TYPE_NAMES[Unreadable] = "no valid JSON, or nested too deeply"


class JsonFile:
    """A JSON file whose outermost value is an object or a list. It is checked as a whole, and parsed when asked for.

    Raises:
        AnnotationError: the file is not JSON (the message says at which line and column), or is neither.

    Of a key that an object holds twice the last value counts. A byte order mark is passed over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data, start = _open(path)
        top = self._data[start : start + 1]
        if top not in (b"[", b"{"):
            _explain(path, None)
        self.is_list = top == b"["
        try:
            if self.is_list:
                self._values = {"": _find_value(self._data, start)}
                stop = self._values[""].stop
            else:
                self._values, stop = _find_values(self._data, start)
            if skip_blanks(self._data, stop) < len(self._data):
                raise msgspec.DecodeError("trailing characters")
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as fault:
            _explain(path, _fault_of_whole(self._data, start, self.is_list) or fault)

    def has(self, key: str) -> bool:
        """Whether the outermost object has this key."""
        return not self.is_list and key in self._values

    def items(self, key: str = "") -> JsonItems:
        """The items of the list under `key` of the outermost object, or of the outermost list.

        Raises:
            AnnotationError: there is no such list.
        """
        if not key and not self.is_list:
            raise AnnotationError(_other_type(self.path, list, {}))
        if key and self.is_list:
            raise AnnotationError(_other_type(self.path, dict, []))
        if key not in self._values:
            raise AnnotationError(f"{self.path} has 1 fault: {key!r} is missing. Mend it, or fetch it again.")
        value = self._values[key]
        if value.num_items is None:
            found = type_name(parse(take(self._data, value.start, value.stop)))
            raise AnnotationError(
                f"{self.path} has 1 fault: {key!r} must be a list, is {found}. Mend it, or fetch it again."
            )
        return JsonItems(self._data, value.start, value.num_items)


class JsonItems:
    """The items of a JSON list, parsed anew each time they are gone through."""

    def __init__(self, data: mmap.mmap, start: int, num_items: int) -> None:
        self._data = data
        self._start = start
        self._num_items = num_items

    def __len__(self) -> int:
        return self._num_items

    def __iter__(self) -> Iterator[Any]:
        return map(parse, self.raw)

    @property
    def raw(self) -> Iterator[msgspec.Raw]:
        """Their text."""
        return (msgspec.Raw(text) for _, _, text in self.placed())

    def placed(self) -> Iterator[Placed]:
        """Where in the file each begins and ends, and its text."""
        for block in list_blocks(self._data, self._start):
            yield from block.items

    def text(self, start: int, stop: int) -> bytes:
        """The text of an item that `placed` named."""
        return take(self._data, start, stop)


def parse(raw: msgspec.Raw | bytes) -> Any:
    """One JSON value, or `Unreadable`. Bytes that are no UTF-8 become halves of surrogate pairs.

    `Fields` reports both.
    """
    try:
        return json.loads(str(memoryview(raw), "utf-8", "surrogateescape"), parse_constant=refuse_constant)
    except (ValueError, RecursionError):  # ValueError: also numbers of thousands of digits
        return Unreadable()


@dataclass(frozen=True)
class _Value:
    """Where a value begins and ends, and if it is a list how many items it has."""

    start: int
    stop: int
    num_items: int | None


def _find_value(data: mmap.mmap, start: int) -> _Value:
    if data[start : start + 1] != b"[":
        return _Value(start, end_of_value(data, start), None)
    num_items, stop = 0, start
    for block in list_blocks(data, start):
        num_items += len(block.items)
        stop = block.stop
    return _Value(start, stop, num_items)


def _find_values(data: mmap.mmap, start: int) -> tuple[dict[str, _Value], int]:
    """The values of the object that begins at `start`, and where it ends."""
    values: dict[str, _Value] = {}
    at = skip_blanks(data, start + 1)
    if data[at : at + 1] == b"}":
        return values, at + 1
    while True:
        stop = end_of_value(data, at)
        key = msgspec.json.decode(take(data, at, stop), type=str)
        at = _pass(data, stop, b":")
        values[key] = _find_value(data, at)
        at = skip_blanks(data, values[key].stop)
        if data[at : at + 1] == b"}":
            return values, at + 1
        at = _pass(data, at, b",")


def _pass(data: mmap.mmap, at: int, sign: bytes) -> int:
    """Where what follows a sign begins."""
    at = skip_blanks(data, at)
    if data[at : at + 1] != sign:
        raise msgspec.DecodeError(f"expected {sign.decode()!r}")
    return skip_blanks(data, at + 1)


def _fault_of_whole(data: mmap.mmap, start: int, is_list: bool) -> Exception | None:
    """What is wrong with a file by the parser's own account, with the byte at which it is."""
    try:
        msgspec.json.decode(memoryview(data)[start:], type=list[msgspec.Raw] if is_list else dict[str, msgspec.Raw])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as fault:
        return fault
    return None


def _open(path: Path) -> tuple[mmap.mmap, int]:
    """A JSON file, and where its first character is."""
    data = map_file(path)
    for magic, what in _OTHERS.items():
        if data[: len(magic)] == magic:
            raise AnnotationError(f"{path} is {what}.")
    start = _START.match(data)
    assert start is not None
    return data, start.start(1)


def _explain(path: Path, fault: Exception | None) -> NoReturn:
    """Say in which line and column a file is no JSON; the fast parser knows the byte only."""
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    try:
        content = json.loads(text, parse_constant=refuse_constant)
    except json.JSONDecodeError as found:
        raise AnnotationError(
            f"{path} is not valid JSON: {found.msg} at line {found.lineno}, column {found.colno}. "
            "It may be cut short: fetch the file again."
        ) from found
    except RecursionError as found:
        raise AnnotationError(
            f"{path} is nested too deeply for an annotation file. Mend it, or fetch it again."
        ) from found
    except ValueError as found:
        raise AnnotationError(f"{path} is not valid JSON: {found}. Mend it, or fetch it again.") from found
    if isinstance(content, dict | list):
        raise AnnotationError(f"{path} is not valid JSON: {_located(path, fault)}. Mend it, or fetch it again.")
    raise AnnotationError(_other_type(path, dict, content))


def _located(path: Path, fault: Exception | None) -> str:
    """What the fast parser refuses and the slow one does not, such as half a surrogate pair, with line and column."""
    said = str(fault)
    if not (byte := _BYTE.search(said)):
        return said
    before = path.read_bytes()[: int(byte[1])].decode("utf-8-sig", "surrogateescape")
    line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
    return f"{_BYTE.sub('', said)} at line {line}, column {column}"


def _other_type(path: Path, wanted: type, found: Any) -> str:
    return f"{path} must hold {TYPE_NAMES[wanted]}, holds {type_name(found)}. Is it another dataset's file?"


def refuse_constant(name: str) -> NoReturn:
    """For `json.loads`, which by itself takes NaN and Infinity."""
    raise ValueError(f"the number {name} is not JSON")
