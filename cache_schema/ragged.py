"""Lists of unequal lengths as two plain arrays: the values end to end, and where each list starts."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

Offsets = NDArray[np.int64]


class RaggedBytes(Sequence[bytes]):
    """Byte strings that grow one by one and lie end to end, at eight bytes each beside their own."""

    def __init__(self) -> None:
        self._values = bytearray()
        self._offsets = array("q", [0])

    def append(self, item: bytes) -> None:
        """Add one at the end."""
        self._values += item
        self._offsets.append(len(self._values))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...

    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return bytes(self._values[self._offsets[place] : self._offsets[place + 1]])

    def packed(self) -> tuple[NDArray[np.uint8], Offsets]:
        """What `pack_bytes` gives, without a copy: nothing may be added any more."""
        return np.frombuffer(self._values, np.uint8), np.frombuffer(self._offsets, np.int64)


class RaggedStrings(Sequence[str]):
    """Strings that grow one by one and lie end to end as UTF-8."""

    def __init__(self) -> None:
        self.encoded = RaggedBytes()

    def append(self, item: str) -> None:
        """Add one at the end."""
        self.encoded.append(item.encode())

    def __len__(self) -> int:
        return len(self.encoded)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        found = self.encoded[index]
        return found.decode() if isinstance(found, bytes) else [item.decode() for item in found]


def offsets_of(lengths: Iterable[int]) -> Offsets:
    """(M + 1,) int64 offsets of M lists: list m is `values[offsets[m]:offsets[m + 1]]`."""
    return np.concatenate([[0], np.cumsum(np.fromiter(lengths, np.int64))]).astype(np.int64)


def pack_bytes(items: Sequence[bytes]) -> tuple[NDArray[np.uint8], Offsets]:
    """Byte strings as (sum of lengths,) uint8 values and (M + 1,) offsets."""
    if isinstance(items, RaggedBytes):
        return items.packed()
    return np.frombuffer(b"".join(items), np.uint8), offsets_of(map(len, items))


def unpack_bytes(values: NDArray[np.uint8], offsets: Offsets) -> list[bytes]:
    """The byte strings that `pack_bytes` packed."""
    data = values.tobytes()
    return [data[start:stop] for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]


def pack_strings(items: Sequence[str]) -> tuple[NDArray[np.uint8], Offsets]:
    """Strings as UTF-8 values and offsets, which readers without a string data type open too."""
    if isinstance(items, RaggedStrings):
        return items.encoded.packed()
    return pack_bytes([item.encode() for item in items])


def unpack_strings(values: NDArray[np.uint8], offsets: Offsets) -> list[str]:
    """The strings that `pack_strings` packed."""
    return [item.decode() for item in unpack_bytes(values, offsets)]
