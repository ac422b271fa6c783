"""What it takes to keep an accelerator busy: pinned double buffers on the way in, a stream of its own on the way out.

On a CPU all of it is plain memory and plain clocks. Other accelerators than CUDA's are used without overlap.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor


def host_memory(num_bytes: int, device: torch.device) -> NDArray[np.uint8]:
    """Memory for what comes from a device: pinned for CUDA, else as numpy allocates it.

    numpy asks the kernel for huge pages and torch does not: fresh memory is filled three times as fast.
    """
    if device.type == "cuda":
        pinned: NDArray[np.uint8] = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
        return pinned
    return np.empty(num_bytes, np.uint8)


def single_threaded_worker(name: str) -> ThreadPoolExecutor:
    """A thread whose torch operations take one core, beside an encoder that takes all of them.

    Copying is bound by memory. In several threads it would wait for cores that the encoder has: 5 ms became 0.2 ms.
    """
    num_threads = torch.get_num_threads()
    worker = ThreadPoolExecutor(1, thread_name_prefix=name)
    worker.submit(_take_one_core).result()
    torch.set_num_threads(num_threads)  # the number is also a default, for threads that are yet to come
    return worker


def _take_one_core() -> None:
    torch.get_num_threads()  # a thread takes the default when it first asks, and would undo what comes next
    torch.set_num_threads(1)


class Timer(Protocol):
    """Takes the time of what happens in its `with` block, on the device."""

    def __enter__(self) -> Timer: ...

    def __exit__(self, *exception: object) -> None: ...

    def seconds(self) -> float:
        """How long it took; waits for the device where it has to."""
        ...


class _HostTimer:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> _HostTimer:
        self._started = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        self._stopped = time.perf_counter()

    def seconds(self) -> float:
        return self._stopped - self._started


class _CudaTimer:
    """Two events on the current stream: work is queued at once, and done later."""

    def __enter__(self) -> _CudaTimer:
        self._started = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._stopped = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._started.record()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.record()

    def seconds(self) -> float:
        self._stopped.synchronize()
        return self._started.elapsed_time(self._stopped) / 1000


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a CUDA device the current one of this thread; events and streams are those of the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def make_timer(device: torch.device) -> Timer:
    """A timer for work on a device."""
    return _CudaTimer() if device.type == "cuda" else _HostTimer(device)


class InputBuffers:
    """Stacks images into batches and brings these to the device.

    For CUDA there are two pinned buffers by turns: one is filled while the other is still being copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned: list[Tensor] = []
        self._copied: list[Any] = []
        self._turn = 0

    @contextmanager
    def stacked(self, images: Sequence[NDArray[np.uint8]]) -> Iterator[UInt8[Tensor, "i h w 3"]]:
        """(i, h, w, 3) uint8 on the device, of i images of one size."""
        if self._device.type != "cuda":
            yield torch.from_numpy(np.stack(images)).to(self._device)
            return
        host = self._next_buffer(len(images), images[0].shape)
        np.stack(images, out=host.numpy())
        batch = host.to(self._device, non_blocking=True)
        self._copied[self._turn].record()
        yield batch

    def _next_buffer(self, num_images: int, shape: tuple[int, ...]) -> Tensor:
        self._turn = 1 - self._turn
        if not self._pinned or len(self._pinned[0]) < num_images:
            self._pinned = [torch.empty((num_images, *shape), dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            self._copied = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._copied[self._turn].synchronize()  # of an event that was never recorded it returns at once
        return self._pinned[self._turn][:num_images]


class CopyStream:
    """Where features come back from a CUDA device while the next batch is computed on its main stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def mark(self) -> Any:
        """A mark behind all that was queued on the current stream so far."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    @contextmanager
    def after(self, mark: Any) -> Iterator[None]:
        """Queue what happens inside behind a mark, and leave once it is done."""
        if self._stream is None:
            yield
            return
        try:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(mark)
                yield
        finally:
            self._stream.synchronize()  # also where something went wrong: memory may be freed only after its copies
