"""Errors that are the user's to mend. Everything else that is raised is a fault of ours."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A mistake of the user's. The message is one sentence that ends with the remedy."""


class StoreMismatchError(UsageError):
    """Two stores that do not belong together were joined."""


class DamagedStoreError(UsageError):
    """A store holds bytes that are not the ones that were written, or lacks some."""


class NoRoomError(UsageError):
    """The disk is full. What was published before stays, and the same command goes on from there."""


def require_at_least(config: object, least: int, *names: str) -> None:
    """Raise a UsageError for the first of a config's whole-number fields that is below `least`."""
    for name in names:
        if getattr(config, name) < least:
            raise UsageError(f"{name} is {getattr(config, name)}: give a whole number of at least {least}.")


def unknown_name(noun: str, name: str, known: Iterable[str]) -> UsageError:
    """Say that `name` is not one of `known`, with the nearest known name where there is one.

    >>> unknown_name("head", "liner", ["linear", "film"]).args[0]
    "unknown head 'liner': did you mean 'linear'? Known: film, linear."
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f": did you mean {near[0]!r}?" if near else "."
    return UsageError(f"unknown {noun} {name!r}{hint} Known: {', '.join(names)}.")
