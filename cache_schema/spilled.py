"""Columns that grow row by row on the disk: what is kept in memory of them does not depend on how long they get."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from types import TracebackType

import numpy as np
from numpy.typing import DTypeLike

from cache_schema.errors import NoRoomError

_PENDING_BYTES = 1 << 16


class Spill:
    """One unnamed file in the system's folder for temporary files, which any number of columns share.

    It is gone when the `with` block is left, and with the process, however that ends.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="headstart-", buffering=0)  # noqa: SIM115  closed by `close`

    def __enter__(self) -> Spill:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the disk its room back; the columns are gone."""
        self._file.close()

    def write(self, data: bytearray) -> tuple[int, int]:
        """Add `data` at the end; where it begins and ends.

        Raises:
            NoRoomError: the disk is full, or the user's quota is.
        """
        start = self._file.seek(0, 2)
        view = memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            raise no_room() if error.errno in (errno.ENOSPC, errno.EDQUOT) else error from error
        return start, start + len(data)

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to before `stop`."""
        self._file.seek(start)
        parts = []
        while start < stop:
            parts.append(self._file.read(stop - start))
            start += len(parts[-1])
        return b"".join(parts)


class SpilledArray:
    """A (rows, *row_shape) little-endian array that grows at its end and is read from its start, piece by piece."""

    def __init__(self, spill: Spill, dtype: DTypeLike, row_shape: tuple[int, ...] = ()) -> None:
        self.dtype = np.dtype(dtype)
        self._row_shape = row_shape
        self._row_bytes = self.dtype.itemsize * int(np.prod(row_shape))
        self._spill = spill
        self._extents: list[tuple[int, int]] = []
        self._pending = bytearray()
        self._num_bytes = 0

    def append(self, value: int) -> None:
        """Add a row that is one whole number."""
        self.extend(value.to_bytes(self._row_bytes, "little", signed=True))

    def extend(self, rows: bytes) -> None:
        """Add rows, any number of them."""
        self._pending += rows
        self._num_bytes += len(rows)
        if len(self._pending) >= _PENDING_BYTES:
            self._extents.append(self._spill.write(self._pending))
            self._pending = bytearray()

    def __len__(self) -> int:
        return self._num_bytes // self._row_bytes

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self._row_shape)

    def pieces(self) -> Iterator[bytes]:
        """All its bytes in order, in whole rows."""
        for start, stop in self._extents:
            yield self._spill.read(start, stop)
        yield bytes(self._pending)


class SpilledBytes:
    """Byte strings that lie end to end, as ragged.py lays them: their bytes, and where each starts."""

    def __init__(self, spill: Spill) -> None:
        self.values = SpilledArray(spill, np.uint8)
        self.offsets = SpilledArray(spill, np.int64)
        self.offsets.append(0)

    def append(self, item: bytes) -> None:
        """Add one at the end."""
        self.values.extend(item)
        self.offsets.append(len(self.values))


class SpilledNames:
    """One name, or none, for each row, out of a vocabulary that memory holds."""

    def __init__(self, spill: Spill) -> None:
        self._spill = spill
        self._codes = SpilledArray(spill, np.int32)
        self._vocabulary: dict[str, int] = {}

    def append(self, name: str) -> None:
        """Add a row at the end."""
        self._codes.append(self._vocabulary.setdefault(name, len(self._vocabulary)))

    def pad(self, num_rows: int) -> None:
        """Add rows without a name until there are so many."""
        missing = num_rows - len(self._codes)
        if missing > 0:
            self._codes.extend(np.full(missing, -1, "<i4").tobytes())

    def encoded(self) -> tuple[list[str], SpilledArray]:
        """The sorted vocabulary, and (rows,) int32 the place of each row's name in it, -1 for none."""
        names = sorted(self._vocabulary)
        places = np.full(len(names) + 1, -1, "<i4")  # the last is where code -1 points
        places[[self._vocabulary[name] for name in names]] = np.arange(len(names))
        rows = SpilledArray(self._spill, np.int32)
        for piece in self._codes.pieces():
            rows.extend(places[np.frombuffer(piece, "<i4")].tobytes())
        return names, rows


def no_room() -> NoRoomError:
    """What is said where temporary files fill a disk."""
    return NoRoomError(
        f"there is no room for temporary files in {tempfile.gettempdir()}; make room, or set TMPDIR to a folder on "
        "another disk, and run the same command again."
    )
