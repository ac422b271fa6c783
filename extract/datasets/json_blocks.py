"""JSON lists read block by block and item by item; msgspec by itself wants all of a list in memory."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from extract.datasets.mapped import take

_BLOCK_BYTES = 1 << 18
_VALUE_BYTES = 1 << 10
_GROWTH = 4

_BLANK = b" \t\n\r"
_BLANKS = re.compile(rb"[ \t\n\r]*")
_TRAILING = re.compile(r"trailing characters \(byte (\d+)\)")
"""How the parser says that a value is whole and something follows it, which is the one way to ask where it ends."""

Placed = tuple[int, int, bytes]
"""Where in the file an item begins and ends, and its text."""


@dataclass(frozen=True)
class Block:
    """Some items of a list in the order of the file, and where in the file what follows them begins."""

    items: list[Placed]
    stop: int
    is_last: bool


def list_blocks(data: mmap.mmap, start: int) -> Iterator[Block]:
    """The list that begins at `start`; the last block stops where the list ends.

    Raises:
        msgspec.DecodeError: it is no list. The byte that is named counts from somewhere else than the file's start.
        RecursionError: it is nested too deeply.
    """
    at = skip_blanks(data, start + 1)
    if data[at : at + 1] == b"]":
        yield Block([], at + 1, is_last=True)
        return
    block = _read_block(data, at)
    yield block
    while not block.is_last:
        block = _read_block(data, block.stop)
        yield block


def end_of_value(data: mmap.mmap, start: int) -> int:
    """Where the value ends that begins at `start`, if something follows it as it does in an object.

    Raises:
        msgspec.DecodeError: there is none. The byte that is named counts from somewhere else than the file's start.
        RecursionError: it is nested too deeply.
    """
    size = _VALUE_BYTES
    while True:
        text, is_all = take(data, start, start + size), start + size >= len(data)
        follows = _find_next(text, 0, must=is_all)
        if follows is not None:
            return start + len(text[:follows].rstrip(_BLANK))
        size *= _GROWTH


def _read_block(data: mmap.mmap, start: int) -> Block:
    """The items from the one on that begins at `start`: at least one, and else those that lie in a block."""
    size = _BLOCK_BYTES
    while True:
        text, is_all = take(data, start, start + size), start + size >= len(data)
        items: list[Placed] = []
        at = 0
        while (follows := _find_next(text, at, must=is_all)) is not None:
            item = text[at:follows].rstrip(_BLANK)
            items.append((start + at, start + at + len(item), item))
            if text[follows : follows + 1] == b"]":
                return Block(items, start + follows + 1, is_last=True)
            if text[follows : follows + 1] != b",":
                raise msgspec.DecodeError("expected ',' or ']'")
            at = _skip(text, follows + 1)
        if items:
            return Block(items, start + at, is_last=False)
        size *= _GROWTH


def _find_next(text: bytes, start: int, must: bool) -> int | None:
    """Where something follows the value that begins at `start`; None if the value may go on behind the text.

    Args:
        must: nothing is behind the text.
    """
    try:
        msgspec.json.decode(memoryview(text)[start:], type=msgspec.Raw)
    except msgspec.DecodeError as fault:
        if trailing := _TRAILING.search(str(fault)):
            return start + int(trailing[1]) - 1  # the parser names the byte after it
        if must:
            raise
    if must:
        raise msgspec.DecodeError("Input data was truncated")
    return None


def skip_blanks(data: mmap.mmap, start: int) -> int:
    """The first place from `start` on where no blank is."""
    return _skip(data, start)


def _skip(text: mmap.mmap | bytes, start: int) -> int:
    found = _BLANKS.match(text, start)
    assert found is not None
    return found.end()
