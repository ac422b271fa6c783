"""Things that come again and again in a sequence: each encoded once, in full batches, and kept while it is needed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

Thing = TypeVar("Thing")
Encoded = TypeVar("Encoded")


class EncodeOnce(Generic[Thing, Encoded]):
    """What an encoder says of each thing in a sequence.

    Args:
        keys: equal ones for things that are one and the same.
        things: as many as keys.
        encode: called with at most `batch_size` things that it has not seen, in the order in which they first come.
    """

    def __init__(
        self,
        keys: Sequence[Hashable],
        things: Sequence[Thing],
        encode: Callable[[Sequence[Thing]], Sequence[Encoded]],
        batch_size: int,
    ) -> None:
        self._keys = keys
        self._encode = encode
        self._batch_size = batch_size
        self._last = {key: place for place, key in enumerate(keys)}
        self._waiting = dict(reversed(list(zip(keys, things, strict=True))))
        self._order = list(dict.fromkeys(keys))
        self._num_encoded = 0
        self._kept: dict[Hashable, Encoded] = {}

    def take(self, start: int, stop: int) -> list[Encoded]:
        """What is said of the things from `start` to before `stop`; ask from front to back, for each place once."""
        taken = []
        for place in range(start, stop):
            key = self._keys[place]
            while key not in self._kept:
                self._encode_more()
            taken.append(self._kept[key])
            if self._last[key] == place:
                del self._kept[key]
        return taken

    def _encode_more(self) -> None:
        keys = self._order[self._num_encoded : self._num_encoded + self._batch_size]
        self._kept.update(zip(keys, self._encode([self._waiting.pop(key) for key in keys]), strict=True))
        self._num_encoded += len(keys)
