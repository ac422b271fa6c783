"""How many items go through an encoder at once, and what is done when they do not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from tqdm import tqdm

from cache_schema.errors import UsageError

T = TypeVar("T")

_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "DefaultCPUAllocator")
"""What torch says where it has no exception of its own for it: other devices, cuBLAS, cuDNN, and the CPU."""


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
            except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
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
        self.size = min(self.size, (num_items + 1) // 2)
        tqdm.write(f"memory ran out with batches of {num_items}; going on with batches of {self.size}.")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    return said or isinstance(error, MemoryError)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
