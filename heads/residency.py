"""Where the features of a split are kept: on the device, in memory or on disk, with the same values in each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_schema.features import FeatureCache
from cache_schema.reader import RowReader

Residency = Literal["device", "ram", "disk", "auto"]

_LARGE_ROW_BYTES = 1 << 16
_MOST_LENT = 4
"""Batches of one shape whose memory is lent out again."""
_ONLY_HERE = 3
"""References to an array that nobody else holds: its list, the name of a loop, and the argument of the counting."""


class ResidentArrays:
    """The arrays of some rows of an image-feature store, wherever they are kept."""

    def __init__(
        self,
        cache: FeatureCache,
        layers: Sequence[str],
        grids: Sequence[str],
        attention: Sequence[str],
        rows: NDArray[np.int64],
        residency: Residency,
        device: torch.device,
    ) -> None:
        images = cache.images
        scales = {layer: images.scale(layer) for layer in grids}
        self._readers: dict[str, dict[str, RowReader]] = {
            "features": {layer: images.features(layer) for layer in grids},
            "scale": {layer: reader for layer, reader in scales.items() if reader is not None},
            "cls": {layer: images.cls(layer) for layer in layers if layer in images.cls_layers},
            "attention": {name: images.attention(name) for name in attention},
        }
        readers = [reader for kind in self._readers.values() for reader in kind.values()]
        needed_bytes = sum(len(rows) * reader.layout.row_bytes for reader in readers)
        self.residency = _choose_residency(needed_bytes, device) if residency == "auto" else residency
        self._pinned = device.type == "cuda" and self.residency != "device"
        self._lent = _Lent()
        self._resident: dict[str, dict[str, Tensor]] = {}
        if self.residency != "disk":
            self._place_of_row = np.full(len(images.ids), -1, np.int64)
            self._place_of_row[rows] = np.arange(len(rows))
            home = device if self.residency == "device" else torch.device("cpu")
            for kind, of_layer in self._readers.items():
                kept = {layer: _read(reader, rows).to(home) for layer, reader in of_layer.items()}
                small = kind in ("cls", "attention")
                self._resident[kind] = {layer: ready_for(one, device) if small else one for layer, one in kept.items()}
            for reader in readers:
                reader.close()

    def load(self, kind: str, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        """Rows of every array of one kind (features, scale or cls by layer, attention by name)."""
        if self.residency == "disk":
            return {layer: _read(reader, rows, self._pinned) for layer, reader in self._readers[kind].items()}
        places = torch.from_numpy(self._place_of_row[rows])
        return {layer: self._gather(tensor, places) for layer, tensor in self._resident[kind].items()}

    def _gather(self, tensor: Tensor, places: Tensor) -> Tensor:
        shape = (len(places), *tensor.shape[1:])
        if self._pinned:
            return torch.index_select(tensor, 0, places, out=_empty(shape, tensor.dtype, pinned=True))
        if tensor.device.type != "cpu":
            return tensor.index_select(0, places.to(tensor.device))
        if tensor.dtype != torch.float16 or tensor[0].nbytes < _LARGE_ROW_BYTES:
            return torch.index_select(tensor, 0, places, out=self._lent.take(shape, tensor.dtype))
        out = self._lent.take(shape, torch.float32)  # what they are used in on a CPU; one pass instead of two
        for row, place in zip(out, places.tolist(), strict=True):
            row.copy_(tensor[place])
        return out


def ready_for(tensor: Tensor, device: torch.device) -> Tensor:
    """What is small is kept as it is used on a CPU, so that no batch has to turn it into float32 again."""
    return tensor.float() if device.type == "cpu" else tensor


class _Lent:
    """Memory of batches that nobody holds any more, lent out again: fresh pages cost more than filling them."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[tuple[int, ...], torch.dtype], list[NDArray[Any]]] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor to be filled. Its memory is lent again when the last tensor that shares it is gone."""
        num, of_row = shape[0], shape[1:]
        arrays = self._arrays.setdefault((of_row, dtype), [])
        arrays[:] = [array for array in arrays if len(array) >= num]
        for array in arrays:
            if sys.getrefcount(array) == _ONLY_HERE:
                return torch.from_numpy(array[:num])
        array = _empty_array(shape, dtype)
        if len(arrays) < _MOST_LENT:
            arrays.append(array)
        return torch.from_numpy(array[:num])


def _read(reader: RowReader, rows: NDArray[np.int64], pinned: bool = False) -> Tensor:
    """Rows of an array, read straight into a tensor."""
    tensor = _empty((len(rows), *reader.shape[1:]), torch.from_numpy(np.empty(0, reader.dtype)).dtype, pinned)
    reader.read(rows, out=tensor.numpy())
    return tensor


def _empty(shape: tuple[int, ...], dtype: torch.dtype, pinned: bool) -> Tensor:
    """A tensor to be filled. numpy asks for huge pages, which torch does not, so that its memory is ready sooner."""
    if pinned:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    return torch.from_numpy(_empty_array(shape, dtype))


def _empty_array(shape: tuple[int, ...], dtype: torch.dtype) -> NDArray[Any]:
    return np.empty(shape, torch.empty(0, dtype=dtype).numpy().dtype)


def _choose_residency(needed_bytes: int, device: torch.device) -> Residency:
    """The fastest place that features fit into with as much to spare."""
    if device.type == "cuda" and needed_bytes <= torch.cuda.mem_get_info(device)[0] // 2:
        return "device"
    return "ram" if needed_bytes <= psutil.virtual_memory().available // 2 else "disk"
