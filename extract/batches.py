"""How many items go through an encoder at once, and what is done when they do not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from tqdm import tqdm

from cache_schema.errors import UsageError

T = TypeVar("T")

_CPU_OUT_OF_MEMORY = "DefaultCPUAllocator"


class BatchSize:
    """A batch size that is halved, for good, whenever memory runs out.

    Which items share a batch changes features in their last bits at most, so a job goes on with smaller ones.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def run(self, encode: Callable[[slice], T], num_items: int) -> Iterator[tuple[slice, T]]:
        """`encode` called on slices of so many items, in order; each slice with what came of it.

        Raises:
            UsageError: a single item does not fit.
        """
        start = 0
        while start < num_items:
            batch = slice(start, min(start + self.size, num_items))
            try:
                result = encode(batch)
            except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                self._halve(batch.stop - batch.start, error)
                continue
            yield batch, result
            start = batch.stop

    def _halve(self, num_items: int, error: Exception) -> None:
        if num_items == 1:
            raise UsageError(
                "there is not enough memory on the device for a single item; take a smaller --input-size or encoder, "
                f"or a device with more ({_first_line(error)})."
            ) from error
        self.size = (num_items + 1) // 2
        tqdm.write(f"memory ran out with batches of {num_items}; going on with batches of {self.size}.")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    is_cpu = isinstance(error, RuntimeError) and _CPU_OUT_OF_MEMORY in str(error)
    return is_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
