"""Annotation files are judged whole: every fault is collected with its place, and whoever reads decides what follows.

Knows JSON's types and nothing about any dataset.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from cache_schema.errors import UsageError

NUM_SHOWN = 10
"""How many faults a message spells out; the rest are only counted."""

NUM_KEPT = 100_000
"""How many faults are remembered; a file with more is not the file it is taken for."""

_NUM_LETTERS = 40

_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""What in a text out of a file would steer a terminal, or make two lines of one."""

Value = TypeVar("Value", int, str, bool, list[Any], dict[str, Any])

TYPE_NAMES: dict[type, str] = {
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


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong at one place of a file, such as `item 17 (ref_id 203)` or `line 4`; "" is the file as a whole."""

    source: str
    where: str
    what: str

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)

    def to_dict(self) -> dict[str, str]:
        return {"source": self.source, "where": self.where, "what": self.what}


class FaultReport:
    """Collects the faults of a dataset, so that they are mended in one go and not one run at a time.

    An item with a fault gives no sample; whether the others are used is not decided here.
    """

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.num_faults = 0

    def of(self, source: Path) -> FileFaults:
        """Where the faults of one file are reported."""
        return FileFaults(self, str(source))

    def add(self, fault: Fault) -> None:
        """Note one fault; from `NUM_KEPT` on they are only counted."""
        self.num_faults += 1
        if len(self.faults) < NUM_KEPT:
            self.faults.append(fault)

    def summary(self, num_shown: int = NUM_SHOWN) -> str:
        """The number of faults by file, and the first of them."""
        parts, left = [], num_shown
        for source in dict.fromkeys(fault.source for fault in self.faults):
            of_source = [fault for fault in self.faults if fault.source == source]
            shown = "; ".join(map(str, of_source[:left])) if left else ""
            hidden = len(of_source) - min(left, len(of_source))
            left -= len(of_source) - hidden
            rest = f"; and {hidden} more" if shown and hidden else ""
            noun = "fault" if len(of_source) == 1 else "faults"
            parts.append(f"{source} has {len(of_source)} {noun}" + (f": {shown}{rest}" if shown else ""))
        return ". ".join(parts)

    def raise_if_any(self) -> None:
        """Raise one AnnotationError, if there are faults: it names the files, their number and the first of them."""
        if self.num_faults:
            raise AnnotationError(
                f"{self.summary()}. Mend these items, fetch the files again, or leave the items out with --skip-bad; "
                "--check names every fault."
            )


@dataclass(frozen=True)
class FileFaults:
    """The faults of one file."""

    report: FaultReport
    source: str

    def add(self, where: str, what: str) -> None:
        """Note the fault `what` at the place `where`."""
        self.report.add(Fault(self.source, where, what))


class Fields:
    """One JSON object, read key by key.

    A key that is missing or of another type goes to the report and reads as an empty value, so that the reader goes on
    to the next key. `sound` is False from the first fault on: what was read is then not to be used.
    """

    def __init__(self, item: Any, where: str, faults: FileFaults) -> None:
        self.where = where
        self.sound = True
        self._faults = faults
        self._item: dict[str, Any] | None = item if isinstance(item, dict) else None
        if self._item is None:
            self.fault(f"must be an object, is {type_name(item)}")

    def holds(self, key: str, kind: type[Any] | None = None) -> bool:
        """Whether `key` is there, with a value of exactly the type `kind` if one is named."""
        return self._item is not None and key in self._item and (kind is None or type(self._item[key]) is kind)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that are there."""
        return tuple(self._item or ())

    def _value(self, key: str) -> Any:
        return self._item[key] if self._item is not None else None

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
            self.fault(f"{key!r} must be {TYPE_NAMES[kind]}, is {type_name(value)}")
            return kind()
        if isinstance(value, str) and not is_text(value):
            self.fault(f"{key!r} is not valid UTF-8")
            return kind()
        return value

    def take_text(self, key: str) -> str:
        """A text with its blanks evened out, which must not be empty."""
        text = self.take(key, str)
        if self.holds(key, str) and is_text(self._value(key)) and not text.split():
            self.fault(f"{key!r} is empty")
        return " ".join(text.split())

    def take_numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of so many finite numbers."""
        values = self.take(key, list)
        finite = all(type(value) in (int, float) and abs(value) < float("inf") for value in values)
        if len(values) == count and finite:
            return tuple(values)
        if self.holds(key, list):
            self.fault(f"{key!r} must be a list of {count} numbers")
        return (0.0,) * count

    def each(self, key: str, id_key: str) -> Iterator[Fields]:
        """The objects in the list `key`, each placed by its position and its id."""
        prefix = f"{self.where}, {key} " if self.where else f"{key} "
        return each_item(self.take(key, list), id_key, self._faults, prefix)


def each_item(items: Iterable[Any], id_key: str, faults: FileFaults, prefix: str = "") -> Iterator[Fields]:
    """The objects of a list, placed as `item 17 (ref_id 203)`: position from 0, and id where the object has one."""
    num = len(items) if isinstance(items, Sized) else 0
    shown = tqdm(items, desc=f"checking by {id_key}", total=num, unit="item", delay=1, disable=num < 1000)
    for position, item in enumerate(shown):
        ident = f" ({id_key} {_shown(item[id_key])})" if isinstance(item, dict) and id_key in item else ""
        yield Fields(item, f"{prefix}item {position}{ident}", faults)


def _shown(value: Any) -> str:
    """An id in a message: short and printable, whatever it is; one that is nested could be of any depth."""
    if type(value) not in (int, str):
        return type_name(value)
    return str(value)[:_NUM_LETTERS].encode("utf-8", "backslashreplace").decode()


def is_text(value: str) -> bool:
    """Whether a text can be written as UTF-8: it holds no half of a surrogate pair, and no byte that was none."""
    return not any("\ud800" <= letter <= "\udfff" for letter in value)


def type_name(value: Any) -> str:
    """What a value is called in a message."""
    return TYPE_NAMES.get(type(value), f"a {type(value).__name__}")
