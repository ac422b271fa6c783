"""What a trained head costs to use: parameters, operations, latency, throughput and memory, on features in memory."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cache_schema.features import FeatureCache
from cache_schema.reader import num_cores
from evaluate.machine import processor_name
from heads.data import CachedSplit, Draw
from heads.flops import count_flops
from heads.inputs import Head, HeadInputs

BATCH_SIZE = 64
"""Prompts of a batch, each about an image of its own."""

_RUNS_OF_ONE, _RUNS_OF_BATCH, _FEWEST_RUNS = 50, 15, 3
_LONGEST_S = 20.0
"""After this long no further run is begun, once there are the fewest."""


@dataclass(frozen=True)
class HeadCost:
    """What one head costs, in float32, without its encoders and without reading from a disk.

    Args:
        flops_per_prompt: floating-point operations of a forward pass of one image and one prompt of median length;
            additions and multiplications count as two. Matrix products and convolutions count, nothing else does.
        latency_ms: of that forward pass, median.
        prompts_per_s: of forward passes of `batch_size` prompts, each about an image of its own.
        peak_bytes: what is allocated at once in such a pass, without weights and inputs.
        peak_measured: how.
    """

    num_parameters: int
    flops_per_prompt: int
    latency_ms: float
    prompts_per_s: float
    batch_size: int
    peak_bytes: int
    peak_measured: str

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def measure_cost(head: Head, cache: FeatureCache, split: str, batch_size: int = BATCH_SIZE) -> HeadCost:
    """Measure a head in evaluation mode where it is, on samples of a split."""
    device = next(head.parameters()).device
    one, many = cost_inputs(head, cache, split, batch_size)
    one, many = one.to(device), many.to(device)
    peak_bytes, peak_measured = _peak(head, many, device)
    return HeadCost(
        num_parameters=sum(parameter.numel() for parameter in head.parameters()),
        flops_per_prompt=count_flops(head, one),
        latency_ms=1000 * _median_s(head, one, device, _RUNS_OF_ONE),
        prompts_per_s=batch_size / _median_s(head, many, device, _RUNS_OF_BATCH),
        batch_size=batch_size,
        peak_bytes=peak_bytes,
        peak_measured=peak_measured,
    )


def cost_inputs(head: Head, cache: FeatureCache, split: str, batch_size: int) -> tuple[HeadInputs, HeadInputs]:
    """One image with one prompt of median length, and as many images as prompts; they repeat in a smaller split."""
    rows = cache.usable_samples(split)
    _, first = np.unique(cache.samples.samples.image_rows[rows], return_index=True)
    chosen = rows[np.sort(first)[:batch_size]]
    data = CachedSplit(cache, split, None, head.layers, "disk", attention=head.attention)
    loaded = data.load(Draw.whole(chosen)).inputs.to("cpu")
    lengths = loaded.prompt_mask.sum(1)
    middle = lengths.argsort(stable=True)[(len(lengths) - 1) // 2 : (len(lengths) - 1) // 2 + 1]
    one = _take(loaded, middle)
    length = int(lengths[middle])
    one = replace(one, prompt_tokens=one.prompt_tokens[:, :length], prompt_mask=one.prompt_mask[:, :length])
    return one, _take(loaded, torch.arange(batch_size) % len(chosen))


def count_peak_bytes(head: nn.Module, inputs: HeadInputs) -> int:
    """The most bytes of tensors that live at once in a forward pass, each memory block once.

    Weights and inputs are not counted, nor what an operation needs for itself.
    """
    with torch.no_grad(), _LiveBytes([*head.parameters(), *head.buffers(), *_tensors(inputs)]) as counter:
        head(inputs)
    return counter.peak


def describe_machine() -> dict[str, Any]:
    """What a timing depends on besides the head."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cpu": processor_name(),
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _take(inputs: HeadInputs, prompts: Tensor) -> HeadInputs:
    """Some prompts, each with a copy of its image."""
    images = inputs.image_index[prompts]

    def of_images(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor[images] for name, tensor in tensors.items()}

    return HeadInputs(
        features=of_images(inputs.features),
        cls=of_images(inputs.cls),
        prompt_tokens=inputs.prompt_tokens[prompts],
        prompt_mask=inputs.prompt_mask[prompts],
        pooled=inputs.pooled[prompts],
        image_index=torch.arange(len(prompts)),
        attention=of_images(inputs.attention),
    )


@torch.inference_mode()
def _median_s(head: Head, inputs: HeadInputs, device: torch.device, num_runs: int) -> float:
    """Median seconds of a forward pass, after two that do not count."""
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else _nothing
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < num_runs + 2:
        if len(seconds) >= _FEWEST_RUNS + 2 and time.perf_counter() - began > _LONGEST_S:
            break
        wait()
        started = time.perf_counter()
        head(inputs)
        wait()
        seconds.append(time.perf_counter() - started)
    return median(seconds[2:])


def _nothing() -> None:
    """On a CPU a forward pass is over when it returns."""


def _peak(head: Head, inputs: HeadInputs, device: torch.device) -> tuple[int, str]:
    if device.type != "cuda":
        return count_peak_bytes(head, inputs), "tensors counted"
    with torch.inference_mode():
        head(inputs)  # what libraries allocate once and keep is not the head's
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        head(inputs)
        torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before, "torch.cuda.max_memory_allocated"


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations make, as long as they live."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self._known:
                reference = StorageWeakRef(leaf.untyped_storage())  # type: ignore[no-untyped-call]
                self._live[reference.cdata] = (reference, leaf.untyped_storage().nbytes())
        gone = [key for key, (reference, _) in self._live.items() if reference.expired()]  # type: ignore[no-untyped-call]
        for key in gone:
            del self._live[key]
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def _tensors(inputs: HeadInputs) -> list[Tensor]:
    values = vars(inputs).values()
    return [tensor for value in values for tensor in (value.values() if isinstance(value, Mapping) else (value,))]
