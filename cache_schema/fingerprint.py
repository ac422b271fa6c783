"""Identity: canonical JSON and SHA-256. Equal fingerprints mean equal bytes; anything else is another store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from cache_schema.atomic import StorePath

FOLDER_DIGITS = 12
"""How many hexadecimal digits of a fingerprint a store's folder name carries."""


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys, no spaces and no NaN: the one spelling a value has when it is hashed."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def fingerprint(value: Any) -> str:
    """SHA-256 (64 hexadecimal digits) of the canonical JSON of `value`.

    >>> fingerprint({"b": 1, "a": [2.0, "x"]}) == fingerprint({"a": [2.0, "x"], "b": 1})
    True
    """
    return hashlib.sha256(canonical_json(value)).hexdigest()


def digest_file(path: StorePath) -> str:
    """SHA-256 (64 hexadecimal digits) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # a BinaryIO that reads into


def digest_strings(strings: Iterable[str]) -> str:
    """SHA-256 of a list of strings, of any length, without ever building the list: one canonical JSON line each."""
    running = hashlib.sha256()
    for string in strings:
        running.update(canonical_json(string) + b"\n")
    return running.hexdigest()
