"""Lists of unequal lengths as two plain arrays: the values end to end, and where each list starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Offsets = NDArray[np.int64]


def offsets_of(lengths: Iterable[int]) -> Offsets:
    """(M + 1,) int64 offsets of M lists: list m is `values[offsets[m]:offsets[m + 1]]`."""
    return np.concatenate([[0], np.cumsum(np.fromiter(lengths, np.int64))]).astype(np.int64)


def pack_bytes(items: Sequence[bytes]) -> tuple[NDArray[np.uint8], Offsets]:
    """Byte strings as (sum of lengths,) uint8 values and (M + 1,) offsets."""
    return np.frombuffer(b"".join(items), np.uint8), offsets_of(map(len, items))


def unpack_bytes(values: NDArray[np.uint8], offsets: Offsets) -> list[bytes]:
    """The byte strings that `pack_bytes` packed."""
    data = values.tobytes()
    return [data[start:stop] for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]


def pack_strings(items: Sequence[str]) -> tuple[NDArray[np.uint8], Offsets]:
    """Strings as UTF-8 values and offsets, which readers without a string data type open too."""
    return pack_bytes([item.encode() for item in items])


def unpack_strings(values: NDArray[np.uint8], offsets: Offsets) -> list[str]:
    """The strings that `pack_strings` packed."""
    return [item.decode() for item in unpack_bytes(values, offsets)]
