"""Things encoded once: against a plain loop, and with the batches counted."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluate.encode_once import EncodeOnce


class Counting:
    """Squares numbers, and remembers which it was given."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.batches.append(list(numbers))
        return [number**2 for number in numbers]


@given(numbers=st.lists(st.integers(0, 6), max_size=30), batch_size=st.integers(1, 5), step=st.integers(1, 7))
def test_each_is_encoded_once_in_full_batches_in_the_order_in_which_they_come(
    numbers: list[int], batch_size: int, step: int
) -> None:
    encode, taken = Counting(), list[int]()
    once = EncodeOnce(numbers, numbers, encode, batch_size)
    for start in range(0, len(numbers), step):
        taken += once.take(start, min(start + step, len(numbers)))
    assert taken == [number**2 for number in numbers]
    assert [number for batch in encode.batches for number in batch] == list(dict.fromkeys(numbers))
    assert all(len(batch) == batch_size for batch in encode.batches[:-1])


@pytest.mark.parametrize(("order", "most"), [([0, 0, 1, 1, 2, 2, 3, 3], 2), ([0, 1, 2, 3, 0, 1, 2, 3], 4)])
def test_nothing_is_kept_longer_than_it_is_needed(order: list[int], most: int) -> None:
    once, kept = EncodeOnce(order, order, Counting(), 2), []
    for place in range(len(order)):
        once.take(place, place + 1)
        kept.append(len(once._kept))
    assert max(kept) <= most
    assert kept[-1] == 0


def test_nothing_is_encoded_before_it_is_asked_for() -> None:
    encode = Counting()
    once = EncodeOnce([1, 2, 3], [1, 2, 3], encode, 2)
    assert not encode.batches
    once.take(0, 1)
    assert encode.batches == [[1, 2]]
