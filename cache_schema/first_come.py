"""Which keys came before, and with what: a dict on the disk, for more keys than memory should hold."""

from __future__ import annotations

import sqlite3
from types import TracebackType

from cache_schema.spilled import no_room

_CACHE_KIB = 2048
"""What SQLite may keep of it in memory."""

_NUM_RECENT = 1024
"""Numbers that are remembered, for samples that share an image or a prompt lie near each other."""


class FirstCome:
    """For each (kind, key) the value it came with first. It is a temporary file without a name, gone when closed.

    Keys may hold anything that a Python text can, halves of surrogate pairs too.
    """

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)  # no name: a temporary file
        self._database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("PRAGMA temp_store = FILE")
        self._database.execute("CREATE TABLE came (kind TEXT, key BLOB, value, PRIMARY KEY (kind, key)) WITHOUT ROWID")
        self._database.execute("BEGIN")
        self._recent: dict[tuple[str, str], int] = {}

    def __enter__(self) -> FirstCome:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the disk its room back."""
        self._database.close()

    def number(self, kind: str, key: str, new: int) -> int:
        """The whole number a key came with first; `new` if it comes now.

        Raises:
            NoRoomError: the disk is full, or the user's quota is.
        """
        if (kind, key) in self._recent:
            return self._recent[kind, key]
        number = new if self.add(kind, key, new) else self.get(kind, key)
        assert isinstance(number, int)
        if len(self._recent) == _NUM_RECENT:
            self._recent.clear()
        self._recent[kind, key] = number
        return number

    def add(self, kind: str, key: str, value: int | bytes = 0) -> bool:
        """Note a key and its value; False, and nothing changes, if the key came before.

        Raises:
            NoRoomError: the disk is full, or the user's quota is.
        """
        added = self._run("INSERT OR IGNORE INTO came VALUES (?, ?, ?)", kind, _bytes(key), value)
        return added.rowcount == 1

    def get(self, kind: str, key: str) -> int | bytes | None:
        """The value a key came with first, None if it never came."""
        found = self._run("SELECT value FROM came WHERE kind = ? AND key = ?", kind, _bytes(key))
        value: int | bytes | None = next(found, (None,))[0]
        return value

    def _run(self, statement: str, *values: str | int | bytes) -> sqlite3.Cursor:
        try:
            return self._database.execute(statement, values)
        except sqlite3.OperationalError as error:
            raise no_room() if error.sqlite_errorcode == sqlite3.SQLITE_FULL else error from error


def _bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogatepass")
