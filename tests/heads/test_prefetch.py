"""Batches are made ahead by a thread that hands on what goes wrong and never outlives whoever consumes them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

import heads.data
from heads.data import prefetch, timed


def prefetching_threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_order_is_kept_and_errors_are_handed_over_where_they_happened() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise OSError("the disk is gone")

    drawn = prefetch(items())
    assert [next(drawn) for _ in range(5)] == list(range(5))
    with pytest.raises(OSError, match="the disk is gone"):
        next(drawn)
    assert not prefetching_threads()


def test_an_error_before_the_first_item_is_handed_over() -> None:
    def items() -> Iterator[int]:
        raise MemoryError("no room for a batch")
        yield 0

    with pytest.raises(MemoryError, match="no room for a batch"):
        list(prefetch(items()))


@pytest.mark.parametrize("items", [[], [None, None], [StopIteration()]])
def test_whatever_the_items_are_they_come_out_as_they_went_in(items: list[object]) -> None:
    assert list(prefetch(items)) == items


@pytest.mark.parametrize("num_taken", [1, 4, 5])
def test_the_thread_ends_when_its_consumer_leaves_early(num_taken: int) -> None:
    for number, _ in enumerate(prefetch(range(1000)), start=1):
        if number == num_taken:
            break
    assert not prefetching_threads()


def test_the_thread_ends_when_its_consumer_fails() -> None:
    def consume() -> None:
        for item in prefetch(range(1000)):
            1 // (3 - item)

    with pytest.raises(ZeroDivisionError):
        consume()
    assert not prefetching_threads()


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_no_more_is_made_ahead_than_was_asked_for(depth: int) -> None:
    made, ahead = [0], []

    def items() -> Iterator[int]:
        for item in range(200):
            made[0] = item + 1
            yield item

    for taken, _ in enumerate(prefetch(items(), depth), start=1):
        ahead.append(made[0] - taken)
    assert made[0] == 200
    assert max(ahead) <= depth + 1  # the queue, and the one that waits for room in it


def test_only_the_time_an_item_takes_to_come_is_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(heads.data, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def items() -> Iterator[str]:
        for name, seconds in (("a", 2.0), ("b", 0.0), ("c", 0.5)):
            clock[0] += seconds
            yield name
        clock[0] += 50

    waits = []
    for item, seconds in timed(items()):
        waits.append((item, seconds))
        clock[0] += 1000  # what the consumer does meanwhile
    assert waits == [("a", 2.0), ("b", 0.0), ("c", 0.5)]


def test_an_error_passes_through_a_timed_stream() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    stream = timed(prefetch(items()))
    assert next(stream)[0] == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
