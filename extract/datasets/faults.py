"""Annotation files are read whole and judged whole: every fault is collected, then one error tells them all.

Knows JSON's types and nothing about any dataset.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

from cache_schema.errors import UsageError

NUM_SHOWN = 10
"""How many faults a message spells out; the rest are only counted."""

Value = TypeVar("Value", int, str, bool, list[Any], dict[str, Any])

_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


class AnnotationError(UsageError):
    """An annotation file is malformed or contradicts itself. The message lists what is wrong, and where."""


class FaultReport:
    """Collects the faults of one file, so that they are mended in one go and not one run at a time."""

    def __init__(self) -> None:
        self._faults: list[str] = []

    def add(self, where: str, what: str) -> None:
        """Note the fault `what` at the place `where`, such as `item 17 (ref_id 203)`; "" is the file as a whole."""
        self._faults.append(f"{where}: {what}" if where else what)

    def raise_if_any(self, source: Path) -> None:
        """Raise one AnnotationError, if there are faults: it names `source`, their number and the first of them."""
        if not self._faults:
            return
        count = len(self._faults)
        shown = "; ".join(self._faults[:NUM_SHOWN])
        rest = f"; and {count - NUM_SHOWN} more" if count > NUM_SHOWN else ""
        raise AnnotationError(
            f"{source} has {count} {'fault' if count == 1 else 'faults'}: {shown}{rest}. "
            "Mend or drop these items, or fetch the file again."
        )


class Fields:
    """One JSON object, read key by key.

    A key that is missing or of another type goes to the report and reads as an empty value, so that the reader goes on
    to the next key. `sound` is False from the first fault on: what was read is then not to be used.
    """

    def __init__(self, item: Any, where: str, faults: FaultReport) -> None:
        self.where = where
        self.sound = True
        self._faults = faults
        self._item: dict[str, Any] | None = item if isinstance(item, dict) else None
        if self._item is None:
            self.fault(f"must be an object, is {_type_name(item)}")

    def holds(self, key: str, kind: type[Any] | None = None) -> bool:
        """Whether `key` is there, with a value of exactly the type `kind` if one is named."""
        return self._item is not None and key in self._item and (kind is None or type(self._item[key]) is kind)

    def fault(self, what: str) -> None:
        """Report `what` as a fault of this object."""
        self._faults.add(self.where, what)
        self.sound = False

    def take(self, key: str, kind: type[Value]) -> Value:
        """The value of `key`, which must be of exactly JSON's type `kind` (true is not a whole number)."""
        if self._item is None:
            return kind()
        if key not in self._item:
            self.fault(f"{key!r} is missing")
            return kind()
        value = self._item[key]
        if type(value) is not kind:
            self.fault(f"{key!r} must be {_TYPE_NAMES[kind]}, is {_type_name(value)}")
            return kind()
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            self.fault(f"{key!r} holds half a surrogate pair, which is no text")
            return kind()
        return value

    def each(self, key: str, id_key: str) -> Iterator[Fields]:
        """The objects in the list `key`, each placed by its position and its id."""
        prefix = f"{self.where}, {key} " if self.where else f"{key} "
        return each_item(self.take(key, list), id_key, self._faults, prefix)


def each_item(items: list[Any], id_key: str, faults: FaultReport, prefix: str = "") -> Iterator[Fields]:
    """The objects of a list, placed as `item 17 (ref_id 203)`: position from 0, and id where the object has one."""
    shown = tqdm(items, desc=f"checking by {id_key}", unit="item", delay=1, disable=len(items) < 1000)
    for position, item in enumerate(shown):
        ident = f" ({id_key} {item[id_key]})" if isinstance(item, dict) and id_key in item else ""
        yield Fields(item, f"{prefix}item {position}{ident}", faults)


def read_json(path: Path, kind: type[Value]) -> Value:
    """The content of a JSON file whose outermost value must be of type `kind`.

    Raises:
        AnnotationError: the file is not JSON (the message says at which line and column), or is of another type.
    """
    try:
        content = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except json.JSONDecodeError as fault:
        raise AnnotationError(
            f"{path} is not valid JSON: {fault.msg} at line {fault.lineno}, column {fault.colno}. "
            "It may be cut short: fetch the file again."
        ) from fault
    except (ValueError, RecursionError) as fault:
        raise AnnotationError(f"{path} is not valid JSON: {fault}. Fetch the file again.") from fault
    if type(content) is not kind:
        raise AnnotationError(
            f"{path} must hold {_TYPE_NAMES[kind]}, holds {_type_name(content)}. Is it another dataset's file?"
        )
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"the number {name} is not JSON")


def _type_name(value: Any) -> str:
    return _TYPE_NAMES[type(value)]
