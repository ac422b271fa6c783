"""docs/cache-format.md as data: its tables and blocks by heading, and how they differ from what a store holds.

A comparison gives one sentence for each name that stands in the document and not in the store, or the other way round.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parents[2] / "docs" / "cache-format.md"

Row = dict[str, str]
"""One row of a table: its cells by the names of their columns."""

OPTIONAL = ", optional"
_TUPLES = {"pair": 2, "triple": 3}
_DIGESTS = {"sha256": 64, "xxh3": 32}
_OF_A_LAYER = ("gh", "gw", "D")
"""Lengths that differ from layer to layer."""


@dataclass(frozen=True)
class Document:
    """Every heading has at most one table, and any number of blocks, each a language and a text."""

    text: str
    tables: Mapping[str, Sequence[Row]]
    blocks: Mapping[str, Sequence[tuple[str, str]]]

    def block(self, heading: str, language: str) -> str:
        """The only block of a language under a heading."""
        (text,) = [text for found, text in self.blocks[heading] if found == language]
        return text


def parse_document(text: str) -> Document:
    tables: dict[str, list[Row]] = {}
    blocks: dict[str, list[tuple[str, str]]] = {}
    heading, language, block = "", None, ""
    columns: list[str] = []
    for line in text.splitlines():
        if line.startswith("```"):
            if language is not None:
                blocks.setdefault(heading, []).append((language, block))
            language, block = (line[3:], "") if language is None else (None, "")
        elif language is not None:
            block += line + "\n"
        elif line.startswith("#"):
            heading = line.lstrip("#").strip()
            assert heading not in blocks, f"two headings are called {heading!r}"
        elif line.startswith("|"):
            cells = [cell.strip() for cell in line[1:-1].split("|")]
            if not columns:
                assert heading not in tables, f"two tables under {heading!r}"
                columns, tables[heading] = cells, []
            elif set(line) - set("|-"):
                assert len(cells) == len(columns), f"under {heading!r}: {line}"
                tables[heading].append(dict(zip(columns, cells, strict=True)))
            continue
        columns = []
    return Document(text, tables, blocks)


def codes(cell: str) -> list[str]:
    """What stands in backticks in a cell."""
    return re.findall(r"`([^`]+)`", cell)


def name_of(row: Row) -> str:
    """What a row is about: the first cell, without its backticks."""
    return next(iter(row.values())).strip("`")


# JSON objects


def object_faults(rows: Sequence[Row], objects: Iterable[tuple[str, Any]], heading: str) -> list[str]:
    """How the objects, each with the place it was found at, differ from the table of their fields."""
    types = {name_of(row): row["type"].strip("`") for row in rows}
    seen: set[str] = set()
    faults = []
    for where, value in objects:
        faults += _field_faults(types, value, "", f"{where} ({heading})", seen)
    never = [name for name in types if name not in seen]
    return faults + [f"{heading}: the document lists `{name}`, which no store holds" for name in never]


def _field_faults(
    types: Mapping[str, str], value: Mapping[str, Any], prefix: str, where: str, seen: set[str]
) -> list[str]:
    fields = {name.removeprefix(prefix) for name in types if name.startswith(prefix)}
    listed = {name for name in fields if "." not in name}
    faults = [f"{where} holds `{prefix}{name}`, which the document does not list" for name in value.keys() - listed]
    for name in sorted(listed):
        path, kind = prefix + name, types[prefix + name]
        if name not in value:
            if not kind.endswith(OPTIONAL):
                faults.append(f"{where} lacks `{path}`, which the document lists")
            continue
        seen.add(path)
        kind = kind.removesuffix(OPTIONAL)
        if not fits(kind, value[name]):
            faults.append(f"{where}: `{path}` is {value[name]!r}, where the document says {kind}")
        elif kind == "object":
            faults += _field_faults(types, value[name], f"{path}.", where, seen)
    return faults


def fits(kind: str, value: Any) -> bool:
    """Whether a value has one of the document's field types."""
    first, _, second = kind.partition(" or ")
    if second:
        return fits(first, value) or fits(second, value)
    container, _, of = kind.partition(" of ")
    if of:
        if container == "map":
            return isinstance(value, dict) and all(fits(of, item) for item in value.values())
        right_length = container == "list" or len(value) == _TUPLES[container]
        return isinstance(value, list) and right_length and all(fits(of, item) for item in value)
    if kind in _DIGESTS:
        return isinstance(value, str) and bool(re.fullmatch(f"[0-9a-f]{{{_DIGESTS[kind]}}}", value))
    if kind in ("object", "other object", "any object"):
        return isinstance(value, dict)
    if kind == "string":
        return isinstance(value, str)
    if kind in ("integer", "number"):
        return type(value) is int or (kind == "number" and type(value) is float)
    expected = json.loads(kind)
    return bool(value == expected) and type(value) is type(expected)


# Arrays


@dataclass(frozen=True)
class FoundArrays:
    """The arrays of one store: where it is, its identity, and the metadata of each array."""

    where: str
    identity: Mapping[str, Any]
    arrays: Mapping[str, Any]


def array_faults(rows: Sequence[Row], stores: Iterable[FoundArrays], heading: str) -> list[str]:
    """How the arrays of stores of one kind differ from the table of that kind."""
    faults = []
    seen: set[tuple[str, str]] = set()
    for store in stores:
        where = f"{store.where} ({heading})"
        expected = {name: (row, placeholder) for row in rows for name, placeholder in _names(row, store.identity)}
        faults += [
            f"{where} holds the array `{name}`, which the document does not list"
            for name in store.arrays.keys() - expected.keys()
        ]
        lengths: dict[tuple[str, str], int] = {}
        for name, (row, placeholder) in expected.items():
            if name not in store.arrays:
                faults.append(f"{where} lacks the array `{name}`, which the document lists")
                continue
            found, said = _describe(store.arrays[name]), _expect(row, placeholder, store.identity, store.arrays[name])
            faults += [
                f"{where}: {what} of `{name}` is {found[what]}, where the document says {said[what]}"
                for what in found
                if found[what] != said[what]
            ]
            faults += _shape_faults(f"{where}: `{name}`", row, placeholder, store.arrays[name]["shape"], lengths)
            seen.add((name_of(row), found["type"]))
    listed = [(name_of(row), kind) for row in rows for kind in codes(row["type"])]
    return faults + [
        f"{heading}: the document lists `{name}` of {kind}, which no store holds"
        for name, kind in listed
        if (name, kind) not in seen
    ]


def _names(row: Row, identity: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The arrays of a store that a row stands for, each with what its placeholder stands for.

    The placeholder of a row without one is the group of the array, where it lies in one that need not be there.
    """
    name, when = name_of(row), row["when"]
    if when == "always":
        return [(name, "")]
    parsed = re.fullmatch(r"(for each name in `\S+`|where `\S+` names it)(, where `identity.dtype` is (\w+))?", when)
    assert parsed, f"the test does not know when `{name}` is there: {when!r}"
    listed: Any = {"identity": identity}
    for step in codes(when)[0].split("."):
        listed = listed[step]
    if parsed[3] is not None and identity["dtype"] != parsed[3]:
        return []
    if parsed[1].startswith("where"):
        group, _, last = name.rpartition("/")
        return [(name, group)] if last in listed or name in listed else []
    return [(name[: name.index("<")] + value, value) for value in listed]


def _describe(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": metadata["data_type"],
        "axes": metadata["dimension_names"],
        "chunk": metadata["codecs"][0]["configuration"]["chunk_shape"][0],
        "shard": metadata["chunk_grid"]["configuration"]["chunk_shape"][0],
    }


def _expect(row: Row, placeholder: str, identity: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": _expected_type(row, identity),
        "axes": [axis.replace("<layer>", placeholder) for axis in codes(row["axes"])],
        "chunk": _expected_rows(row["chunk"], identity, metadata),
        "shard": _expected_rows(row["shard"], identity, metadata),
    }


def _expected_type(row: Row, identity: Mapping[str, Any]) -> str:
    """The type that the identity asks for where the table allows several."""
    kinds = codes(row["type"])
    if len(kinds) == 1:
        return kinds[0]
    return identity["dtype"] if identity["dtype"] in kinds else "float16"


def _expected_rows(cell: str, identity: Mapping[str, Any], metadata: Mapping[str, Any]) -> int:
    if cell == "whole":
        return max(1, metadata["shape"][0])
    return int(cell) if cell.isdecimal() else identity[cell]


def _shape_faults(
    where: str, row: Row, placeholder: str, shape: Sequence[int], lengths: dict[tuple[str, str], int]
) -> list[str]:
    """Whether a shape is the one the table spells, given what its letters stand for in other arrays of the store."""
    said = row["shape"].strip("`()").split(", ")
    if len(said) != len(shape):
        return [f"{where} has shape {tuple(shape)}, where the document says {row['shape']}"]
    faults = []
    for length, spelled in zip(shape, said, strict=True):
        letter, _, more = spelled.partition(" + ")
        if letter == "B":
            continue
        key = (letter, placeholder if letter in _OF_A_LAYER else "")
        number = int(letter) if letter.isdecimal() else lengths.setdefault(key, length - int(more or 0))
        if length != number + int(more or 0):
            faults.append(f"{where} is {length} long, where the document says {spelled}, which is {number} elsewhere")
    return faults


# Names


def name_faults(found: Iterable[str], said: Iterable[str], where: str) -> list[str]:
    """How names that were found differ from those that the document makes one expect."""
    found, said = set(found), set(said)
    return [f"{where} holds {name}, which the document does not list" for name in sorted(found - said)] + [
        f"{where} lacks {name}, which the document lists" for name in sorted(said - found)
    ]


def parse_hexdump(text: str) -> bytes:
    """The bytes of a dump: on each line their offset, two spaces, the bytes, and perhaps two spaces and a remark."""
    data = b""
    for line in text.splitlines():
        offset, given = line.split("  ")[:2]
        assert int(offset, 16) == len(data), f"the dump has {offset} where {len(data):04x} is due"
        data += bytes.fromhex(given)
    return data
