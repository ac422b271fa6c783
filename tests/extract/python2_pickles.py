"""Pickles as `cPickle` of Python 2 writes them, which is how the refer family is published."""

from __future__ import annotations

import struct
from typing import Any

BATCH = 1000
"""Items that `cPickle` puts behind one mark."""


def dump(value: Any, protocol: int) -> bytes:
    """`cPickle.dumps(value, protocol)`, protocol 0 or 2, of lists, dicts and scalars.

    `bytes` are Python 2's `str`, `str` is its `unicode`; an `int` beyond 32 bits is its `long`.
    """
    writer = _Writer(protocol)
    writer.save(value)
    return (b"\x80\x02" if protocol else b"") + bytes(writer.out) + b"."


class _Writer:
    def __init__(self, protocol: int) -> None:
        self.out = bytearray()
        self._text_mode = protocol == 0
        self._memo: dict[int, tuple[int, Any]] = {}

    def save(self, value: Any) -> None:
        if id(value) in self._memo and isinstance(value, bytes | str | list | dict):
            self.out += self._memo_instruction(b"g", b"h", b"j", self._memo[id(value)][0])
            return
        save = {list: self._list, dict: self._dict, bytes: self._str, str: self._unicode}.get(type(value))
        if save is not None:
            save(value)
        else:
            self.out += self._text_scalar(value) if self._text_mode else self._binary_scalar(value)

    def _memo_instruction(self, line: bytes, short: bytes, long: bytes, place: int) -> bytes:
        if self._text_mode:
            return b"%s%d\n" % (line, place)
        return short + bytes([place]) if place < 256 else long + struct.pack("<I", place)

    def _remember(self, value: Any) -> None:
        self._memo[id(value)] = len(self._memo) + 1, value
        self.out += self._memo_instruction(b"p", b"q", b"r", len(self._memo))

    def _list(self, value: list[Any]) -> None:
        self.out += b"(l" if self._text_mode else b"]"
        self._remember(value)
        self._batches([[item] for item in value], b"a", b"e")

    def _dict(self, value: dict[Any, Any]) -> None:
        self.out += b"(d" if self._text_mode else b"}"
        self._remember(value)
        self._batches([[key, item] for key, item in value.items()], b"s", b"u")

    def _batches(self, groups: list[list[Any]], one: bytes, many: bytes) -> None:
        size = 1 if self._text_mode else BATCH
        for start in range(0, len(groups), size):
            batch = groups[start : start + size]
            self.out += b"(" if len(batch) > 1 else b""
            for value in (value for group in batch for value in group):
                self.save(value)
            self.out += many if len(batch) > 1 else one

    def _str(self, value: bytes) -> None:
        if self._text_mode:
            self.out += b"S" + _repr(value) + b"\n"
        else:
            short = len(value) < 256
            self.out += (b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<i", len(value))) + value
        self._remember(value)

    def _unicode(self, value: str) -> None:
        if self._text_mode:
            escaped = value.replace("\\", "\\u005c").replace("\n", "\\u000a")
            self.out += b"V" + escaped.encode("raw-unicode-escape") + b"\n"
        else:
            encoded = value.encode()
            self.out += b"X" + struct.pack("<i", len(encoded)) + encoded
        self._remember(value)

    def _text_scalar(self, value: Any) -> bytes:
        if value is None:
            return b"N"
        if isinstance(value, bool):
            return b"I01\n" if value else b"I00\n"
        if isinstance(value, int):
            return b"I%d\n" % value if _is_short(value) else b"L%dL\n" % value
        return b"F%s\n" % repr(value).encode()

    def _binary_scalar(self, value: Any) -> bytes:
        if value is None:
            return b"N"
        if isinstance(value, bool):
            return b"\x88" if value else b"\x89"
        if isinstance(value, float):
            return b"G" + struct.pack(">d", value)
        if not _is_short(value):
            num = value.bit_length() // 8 + 1
            return b"\x8a" + bytes([num]) + value.to_bytes(num, "little", signed=True)
        if 0 <= value < 256:
            return b"K" + bytes([value])
        return b"M" + struct.pack("<H", value) if 0 <= value < 65536 else b"J" + struct.pack("<i", value)


def _is_short(value: int) -> bool:
    return -(2**31) <= value < 2**31


def _repr(value: bytes) -> bytes:
    """Python 2's `repr` of a `str`."""
    return repr(value)[1:].encode()
