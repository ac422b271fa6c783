"""JSON annotation files, which may be larger than memory should be: mapped, checked as a whole, parsed item by item."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from extract.datasets.faults import TYPE_NAMES, AnnotationError, type_name
from extract.datasets.mapped import map_file

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
    """A JSON file whose outermost value is an object or a list. Nothing of it is parsed before it is asked for.

    Raises:
        AnnotationError: the file is not JSON (the message says at which line and column), or is neither.

    Of a key that an object holds twice the last value counts. A byte order mark is passed over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        top, data = _open(path)
        try:
            self._lists = {"": msgspec.json.decode(data, type=list[msgspec.Raw])} if top == b"[" else {}
            self._values = msgspec.json.decode(data, type=dict[str, msgspec.Raw]) if top == b"{" else {}
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as fault:
            _explain(path, fault)
        if top not in (b"[", b"{"):
            _explain(path, None)
        self.is_list = top == b"["

    def has(self, key: str) -> bool:
        """Whether the outermost object has this key."""
        return key in self._values

    def items(self, key: str = "") -> JsonItems:
        """The items of the list under `key` of the outermost object, or of the outermost list.

        Raises:
            AnnotationError: there is no such list.
        """
        if not key and not self.is_list:
            raise AnnotationError(_other_type(self.path, list, {}))
        if key and self.is_list:
            raise AnnotationError(_other_type(self.path, dict, []))
        if key not in self._lists:
            if key not in self._values:
                raise AnnotationError(f"{self.path} has 1 fault: {key!r} is missing. Mend it, or fetch it again.")
            try:
                self._lists[key] = msgspec.json.decode(self._values[key], type=list[msgspec.Raw])
            except (msgspec.DecodeError, RecursionError) as fault:
                value = parse(self._values[key])
                found = type_name(Unreadable() if isinstance(value, list) else value)
                raise AnnotationError(
                    f"{self.path} has 1 fault: {key!r} must be a list, is {found}. Mend it, or fetch it again."
                ) from fault
        return JsonItems(self._lists[key])


class JsonItems:
    """The items of a JSON list, parsed anew each time they are gone through."""

    def __init__(self, raw: list[msgspec.Raw]) -> None:
        self.raw = raw

    def __len__(self) -> int:
        return len(self.raw)

    def __iter__(self) -> Iterator[Any]:
        return map(parse, self.raw)


def parse(raw: msgspec.Raw | bytes) -> Any:
    """One JSON value, or `Unreadable`. Bytes that are no UTF-8 become halves of surrogate pairs.

    `Fields` reports both.
    """
    try:
        return json.loads(str(memoryview(raw), "utf-8", "surrogateescape"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # ValueError: also numbers of thousands of digits
        return Unreadable()


def _open(path: Path) -> tuple[bytes, memoryview]:
    """The first character of a JSON file, and the file from there on."""
    data = map_file(path)
    for magic, what in _OTHERS.items():
        if data[: len(magic)] == magic:
            raise AnnotationError(f"{path} is {what}.")
    start = _START.match(data)
    assert start is not None
    return start[1], memoryview(data)[start.start(1) :]


def _explain(path: Path, fault: Exception | None) -> NoReturn:
    """Say in which line and column a file is no JSON; the fast parser knows the byte only."""
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
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


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"the number {name} is not JSON")
