"""Lists out of pickles, item by item, without Python's own unpickler.

A pickle is a program for a machine with a stack, and Python's machine calls whatever function the program names. The
one here knows the instructions that build lists, tuples, dicts, sets, texts, bytes, numbers, booleans and None, and no
others: it calls nothing, looks nothing up by name, and makes nothing larger than the file. The instructions are those
that `pickletools` of the standard library describes, protocols 0 to 5.
"""

from __future__ import annotations

import mmap
import pickletools
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from extract.datasets.faults import TYPE_NAMES, AnnotationError, type_name
from extract.datasets.mapped import forget, map_file

_NEWEST_PROTOCOL = 5
_MAX_DIGITS = 40
_MAX_NUMBER_BYTES = 16
_MAX_NAME = 60
_SEEN_BYTES = 1 << 18
"""How much of a file is gone through before memory lets go of it."""

Instruction = tuple[int, int, int]
"""Its code, and where its argument begins and ends."""


class PickledList:
    """The items of the list that a pickle holds, built anew each time they are gone through.

    Texts of Python 2 are taken as UTF-8; bytes that are none become halves of surrogate pairs, which `Fields` reports.

    Raises:
        AnnotationError: it is no pickle, or asks for anything but data, which is refused before any of it is built.
            While it is gone through: it holds no list, or its instructions contradict each other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = map_file(path)
        try:
            self._shared = _find_shared(self._data)
        except ValueError as fault:
            raise self._refusal(fault) from fault

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from _build_items(self._data, self._shared)
        except _NotAListError as fault:
            raise AnnotationError(
                f"{self.path} must hold {TYPE_NAMES[list]}, holds {fault}. Is it another dataset's file?"
            ) from fault
        except (ValueError, IndexError, KeyError) as fault:
            raise self._refusal(fault if isinstance(fault, ValueError) else None) from fault

    def _refusal(self, fault: ValueError | None) -> AnnotationError:
        reason = fault or "its instructions do not fit together"
        return AnnotationError(f"{self.path} is refused: {reason}. Fetch the file again from its authors.")


class _NotAListError(Exception):
    """What a pickle holds instead of a list, in words."""


def _code(instruction: bytes) -> int:
    return instruction[0]


_MARK, _STOP, _PROTO, _FRAME, _GLOBAL, _INST, _REDUCE = map(_code, (b"(", b".", b"\x80", b"\x95", b"c", b"i", b"R"))
_APPEND, _APPENDS, _LIST = map(_code, (b"a", b"e", b"l"))
_SETITEM, _SETITEMS, _DICT = map(_code, (b"s", b"u", b"d"))
_TUPLE, _ADDITEMS, _FROZENSET = map(_code, (b"t", b"\x90", b"\x91"))
_SHORT_TUPLES = {_code(b"\x85"): 1, _code(b"\x86"): 2, _code(b"\x87"): 3}
_PUTS, _GETS, _MEMOIZE = frozenset(b"pqr"), frozenset(b"ghj"), _code(b"\x94")

_FIXED = {
    **dict.fromkeys(b"(.N)]}ltdaesuR\x85\x86\x87\x88\x89\x8f\x90\x91\x94", 0),
    **dict.fromkeys(b"Kqh\x80", 1),
    **dict.fromkeys(b"M", 2),
    **dict.fromkeys(b"Jrj", 4),
    **dict.fromkeys(b"G\x95", 8),
}
"""How long the arguments are, by instruction."""

_COUNTED = {
    **dict.fromkeys(b"UC\x8c\x8a", 1),
    **dict.fromkeys(b"TXB\x8b", 4),
    **dict.fromkeys(b"\x8d\x8e\x96", 8),
}
"""How long the number is that says how long the argument is."""

_NAMES = {ord(known.code): known.name for known in pickletools.opcodes}

_LINES = frozenset(b"IFLSVpg")
"""Instructions whose argument is the rest of a line."""

_CONTAINERS: dict[tuple[str, str], type[Any]] = {
    (module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (set, frozenset)
}
"""What older protocols ask for by name. Other data has instructions of its own."""


def _find_shared(data: mmap.mmap) -> frozenset[bytes]:
    """The places of the memo that are ever asked for, as they are written; every other can be forgotten.

    Raises:
        ValueError: the file holds anything but data.
    """
    return frozenset(data[start:stop] for code, start, stop in _instructions(data) if code in _GETS)


def _instructions(data: mmap.mmap) -> Iterator[Instruction]:
    """The instructions up to the last.

    Raises:
        ValueError: one is none of data's, or the file ends before the last.
    """
    at, end, code, seen = 0, len(data), -1, 0
    while code != _STOP:
        if at - seen > _SEEN_BYTES:
            forget(data, seen, at)
            seen = at
        if at >= end:
            raise ValueError("it is cut short")
        code, start = data[at], at + 1
        if code in _FIXED:
            at = start + _FIXED[code]
        elif code in _COUNTED:
            start += _COUNTED[code]
            at = start + int.from_bytes(data[at + 1 : start], "little")
        elif code in _LINES:
            at = data.find(b"\n", start) + 1 or end + 1
        else:
            at = _read_names(data, code, start)
        if at > end:
            raise ValueError("it is cut short")
        yield code, start, at


def _read_names(data: mmap.mmap, code: int, start: int) -> int:
    """Where the two lines end that name a set; nothing else may be named."""
    if code not in (_GLOBAL, _INST):
        what = f"instruction {_NAMES[code]}" if code in _NAMES else f"byte {code:#04x}"
        raise ValueError(f"it holds the {what}, and only plain data is read from a pickle")
    middle = data.find(b"\n", start)
    stop = data.find(b"\n", middle + 1) if middle >= 0 else -1
    if stop < 0:
        raise ValueError("it is cut short")
    names = (data[start:middle], data[middle + 1 : stop])
    module, name = (text[:_MAX_NAME].decode("ascii", "backslashreplace") for text in names)
    if code == _INST or (module, name) not in _CONTAINERS:
        raise ValueError(f"it asks for {module}.{name}, and only plain data is read from a pickle")
    return stop + 1


def _build_items(data: mmap.mmap, shared: frozenset[bytes]) -> Iterator[Any]:
    """The items of the outermost list, each as soon as it is there; the list itself never holds them."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[bytes, Any] = {}
    num_memoized = 0

    def above_mark() -> list[Any]:
        mark = marks.pop()
        values = stack[mark:]
        del stack[mark:]
        return values

    for code, start, stop in _instructions(data):
        if code in _VALUES:
            stack.append(_VALUES[code](data[start:stop]))
        elif code in _PUTS:
            if (place := data[start:stop]) in shared:
                memo[place] = stack[-1]
        elif code == _MEMOIZE:
            if (place := _place(num_memoized)) in shared:
                memo[place] = stack[-1]
            num_memoized += 1
        elif code in _GETS:
            stack.append(memo[data[start:stop]])
        elif code == _MARK:
            marks.append(len(stack))
        elif code == _SETITEM:
            value, key = stack.pop(), stack.pop()
            _of(dict, stack[-1])[_key(key)] = value
        elif code == _SETITEMS:
            values = above_mark()
            _of(dict, stack[-1]).update(_pairs(values))
        elif code in (_APPEND, _APPENDS):
            values = [stack.pop()] if code == _APPEND else above_mark()
            target = _of(list, stack[-1])
            if len(stack) == 1:
                yield from values
            else:
                target.extend(values)
        elif code in _SHORT_TUPLES:
            values = [stack.pop() for _ in range(_SHORT_TUPLES[code])]
            stack.append(tuple(reversed(values)))
        elif code in (_TUPLE, _LIST, _FROZENSET, _DICT):
            stack.append(_CLOSED[code](above_mark()))
        elif code == _ADDITEMS:
            values = above_mark()
            _of(set, stack[-1]).update(map(_key, values))
        elif code == _GLOBAL:
            module, name, _ = data[start:stop].decode("ascii").split("\n")
            stack.append(_CONTAINERS[module, name])
        elif code == _REDUCE:
            arguments, kind = _of(tuple, stack.pop()), stack.pop()
            if (kind is not set and kind is not frozenset) or len(arguments) > 1:
                raise ValueError("it calls something, and only plain data is read from a pickle")
            stack.append(kind(map(_key, _of(list, arguments[0])) if arguments else ()))
        elif code == _PROTO and data[start] > _NEWEST_PROTOCOL:
            raise ValueError(f"it is of protocol {data[start]}, and none after {_NEWEST_PROTOCOL} is known")
    if len(stack) != 1 or marks:
        raise ValueError("it does not end with one value")
    if type(stack[0]) is not list:
        raise _NotAListError(type_name(stack[0]))
    yield from stack[0]


def _of(kind: type[Any], value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"it adds to {type_name(value)} as to {type_name(kind())}")
    return value


def _key(value: Any) -> Any:
    """A key of a dict or member of a set. Python would work out the hash of nested ones until its stack overflows."""
    if type(value) not in (str, int, float, bool, bytes, type(None)):
        raise ValueError(f"a key is {type_name(value)}")
    return value


def _pairs(values: list[Any]) -> Iterator[tuple[Any, Any]]:
    if len(values) % 2:
        raise ValueError("a key has no value")
    return zip(map(_key, values[::2]), values[1::2], strict=True)


def _place(number: int) -> bytes:
    """A place of the memo as it is written where it is asked for."""
    return number.to_bytes(1 if number < 256 else 4, "little")


def _digits(argument: bytes) -> int:
    if len(argument) > _MAX_DIGITS:
        raise ValueError("it holds a number that no annotation needs")
    return int(argument)


def _number(argument: bytes) -> int:
    if len(argument) > _MAX_NUMBER_BYTES:
        raise ValueError("it holds a number that no annotation needs")
    return int.from_bytes(argument, "little", signed=True)


def _text(argument: bytes) -> str:
    return argument.decode("utf-8", "surrogateescape")


_ESCAPE = re.compile(rb"\\(x[0-9a-f]{2}|.?)", re.DOTALL)
_ESCAPED = {b"\\": b"\\", b"'": b"'", b'"': b'"', b"n": b"\n", b"r": b"\r", b"t": b"\t"}


def _quoted_text(argument: bytes) -> str:
    """A text as Python 2 would write it in a program, between quotes."""
    line = argument.strip()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise ValueError("it holds a text without its quotes")
    return _text(_ESCAPE.sub(_unescape, line[1:-1]))


def _unescape(found: re.Match[bytes]) -> bytes:
    escaped = found[1]
    return bytes([int(escaped[1:], 16)]) if len(escaped) == 3 else _ESCAPED[escaped]


_TRUTH = {b"00\n": False, b"01\n": True}

_VALUES: dict[int, Callable[[bytes], Any]] = {
    _code(instruction): make
    for instruction, make in {
        b"U": _text,
        b"X": _text,
        b"\x8c": _text,
        b"T": _text,
        b"\x8d": _text,
        b"S": _quoted_text,
        b"V": lambda argument: argument[:-1].decode("raw-unicode-escape"),
        b"K": lambda argument: argument[0],
        b"M": lambda argument: int.from_bytes(argument, "little"),
        b"J": lambda argument: int.from_bytes(argument, "little", signed=True),
        b"I": lambda argument: _TRUTH[argument] if argument in _TRUTH else _digits(argument),
        b"L": lambda argument: _digits(argument.rstrip(b"L\n")),
        b"\x8a": _number,
        b"\x8b": _number,
        b"G": lambda argument: struct.unpack(">d", argument)[0],
        b"F": lambda argument: float(argument[:_MAX_DIGITS]),
        b"N": lambda argument: None,
        b"\x88": lambda argument: True,
        b"\x89": lambda argument: False,
        b"C": bytes,
        b"B": bytes,
        b"\x8e": bytes,
        b"\x96": bytes,
        b"]": lambda argument: [],
        b"}": lambda argument: {},
        b")": lambda argument: (),
        b"\x8f": lambda argument: set(),
    }.items()
}
"""Instructions that put a value on the stack, and how it is made of their argument."""

_CLOSED: dict[int, Callable[[list[Any]], Any]] = {
    _TUPLE: tuple,
    _LIST: list,
    _DICT: lambda values: dict(_pairs(values)),
    _FROZENSET: lambda values: frozenset(map(_key, values)),
}
"""Instructions that make a container of everything above the last mark."""
