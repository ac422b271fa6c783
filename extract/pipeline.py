"""The pipeline of an image job: decode | preprocess | forward | copy back, all at work at once.

Threads decode and preprocess a bounded number of images ahead of the encoder. The thread that draws units from `run`
feeds the encoder. One more thread brings features back, narrows them to the data type in which they are stored, and
lays them into the arrays of their shard; whoever draws the units publishes these, on threads of its own.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_schema.layout import ArrayLayout
from cache_schema.quantize import quantize
from cache_schema.receipts import Failure
from cache_schema.shards import ShardBuffer
from extract.batches import BatchSize
from extract.devices import CopyStream, InputBuffers, Timer, host_memory, make_timer, on_device, single_threaded_worker
from extract.encoders.protocols import ImageEncoder, ImageEncoding
from extract.images import UndecodableImageError
from extract.job import EncodedUnit, Unit
from extract.stages import StageClock

Loaded = NDArray[np.uint8] | UndecodableImageError
"""What becomes of a row before the encoder: pixels at the encoder's input size, or the reason why there are none."""

_BATCHES_AHEAD = 2
"""So many batches are decoded while one is in the encoder."""

_COPIES_AHEAD = 2
"""So many batches of a shard may wait to be copied back."""

_SCALES = "scale/"
"""Arrays that come of quantizing the features of the same name."""


@dataclass(frozen=True)
class RowGroup:
    """Consecutive rows that look at one image, which is decoded once for all of them."""

    image: int
    rows: range


@dataclass(frozen=True)
class _Batch:
    """A batch's features on the device as they are to be kept, which of its rows are finite, and when it was done.

    All of it is made where a lack of memory is answered with smaller batches.
    """

    features: Mapping[str, Tensor]
    finite: Tensor
    forward: Timer
    done: Any


@dataclass
class _Shard:
    """The arrays of one unit while they are filled. A row that fails has its reason here and zeros in the arrays."""

    unit: Unit
    buffers: dict[str, NDArray[Any] | ShardBuffer]
    arrays: dict[str, Tensor]
    reasons: dict[int, str] = field(default_factory=dict)
    copies: list[Future[None]] = field(default_factory=list)
    batch_size: int = 0

    def finish(self, id_of_row: Callable[[int], str]) -> EncodedUnit:
        """Wait for the features that are under way."""
        for copy in self.copies:
            copy.result()
        for place in self.reasons:
            for tensor in self.arrays.values():
                tensor[place] = 0
        shards = {(name, self.unit.number): buffer for name, buffer in self.buffers.items()}
        failures = [
            Failure(self.unit.rows[place], id_of_row(self.unit.rows[place]), reason)
            for place, reason in sorted(self.reasons.items())
        ]
        return EncodedUnit(self.unit, shards, failures, self.batch_size)

    @property
    def is_filled(self) -> bool:
        return all(copy.done() for copy in self.copies)


class ImagePipeline:
    """Encodes units of rows. `run` may be called in several threads at once: they share the encoder, one at a time.

    Args:
        layouts: the arrays that are filled, one row for each of the job's.
        groups: cuts a unit's rows into those of one image each.
        load: decodes one image and gives what its rows look at, each at the encoder's input size.
        id_of_row: the name of a row's image, for the ledger.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        layouts: Sequence[ArrayLayout],
        groups: Callable[[range], Iterator[RowGroup]],
        load: Callable[[RowGroup], Sequence[Loaded]],
        id_of_row: Callable[[int], str],
        *,
        batch_size: int,
        decode_threads: int,
        clock: StageClock,
    ) -> None:
        self._encoder = encoder
        self._layouts = layouts
        self._float_dtype = next(layout.dtype.name for layout in layouts if layout.dtype.kind == "f")
        self._groups = groups
        self._load = load
        self._id_of_row = id_of_row
        self._batch_size = BatchSize(batch_size)
        self._decode_threads = decode_threads
        self._clock = clock
        self._device = torch.device(encoder.device)
        self._encoder_lock = threading.Lock()

    def run(self, units: Sequence[Unit]) -> Generator[EncodedUnit, None, None]:
        """Each unit with its arrays, in order. Closing the generator drops what is under way."""
        decoders = ThreadPoolExecutor(self._decode_threads, thread_name_prefix="headstart-decode")
        copier = single_threaded_worker("headstart-copy")
        inputs, copies = InputBuffers(self._device), CopyStream(self._device)
        under_way: deque[_Shard] = deque()
        try:
            loaded = self._load_ahead(decoders, units)
            for unit in units:
                shard = self._make_shard(unit)
                for places, pixels in self._batches(unit, loaded, shard):
                    self._encode(places, pixels, shard, inputs, copies, copier)
                    while under_way and under_way[0].is_filled:
                        yield under_way.popleft().finish(self._id_of_row)
                under_way.append(shard)
                while len(under_way) > 1:
                    yield under_way.popleft().finish(self._id_of_row)
            while under_way:
                yield under_way.popleft().finish(self._id_of_row)
        except Exception:
            while under_way:  # what was encoded before something went wrong is not lost
                yield under_way.popleft().finish(self._id_of_row)
            raise
        finally:
            decoders.shutdown(cancel_futures=True)
            copier.shutdown(cancel_futures=True)

    def _load_ahead(self, decoders: ThreadPoolExecutor, units: Sequence[Unit]) -> Iterator[list[Loaded]]:
        """What each group of rows shows, in order, with a bounded number of them decoded ahead."""
        groups = (group for unit in units for group in self._groups(unit.rows))
        ahead: deque[tuple[int, Future[Sequence[Loaded]]]] = deque()
        num_ahead = 0
        while True:
            while (
                num_ahead < _BATCHES_AHEAD * self._batch_size.size + self._decode_threads
                or len(ahead) < self._decode_threads  # images of many views
            ):
                group = next(groups, None)
                if group is None:
                    break
                ahead.append((len(group.rows), decoders.submit(self._load, group)))
                num_ahead += len(group.rows)
            if not ahead:
                return
            num_rows, future = ahead.popleft()
            yield list(future.result())
            num_ahead -= num_rows

    def _batches(
        self, unit: Unit, loaded: Iterator[list[Loaded]], shard: _Shard
    ) -> Iterator[tuple[list[int], list[NDArray[np.uint8]]]]:
        """The rows of a unit that could be decoded, in batches: their places in the unit, and their pixels."""
        rows = self._rows_of(unit, loaded, shard)
        while batch := list(islice(rows, self._batch_size.size)):
            places, pixels = zip(*batch, strict=True)
            yield list(places), list(pixels)

    def _rows_of(
        self, unit: Unit, loaded: Iterator[list[Loaded]], shard: _Shard
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        place = 0
        for group in self._groups(unit.rows):
            for item in next(loaded):
                if isinstance(item, UndecodableImageError):
                    shard.reasons[place] = str(item)
                else:
                    yield place, item
                place += 1
            assert place == group.rows.stop - unit.rows.start

    def _encode(
        self,
        places: list[int],
        pixels: list[NDArray[np.uint8]],
        shard: _Shard,
        inputs: InputBuffers,
        copies: CopyStream,
        copier: ThreadPoolExecutor,
    ) -> None:
        """Put a batch through the encoder, in smaller ones where memory runs out, and have its features copied back."""

        def forward(batch: slice) -> _Batch:
            with self._encoder_lock, on_device(self._device), inputs.stacked(pixels[batch]) as stacked:
                with make_timer(self._device) as timer:
                    encoding = self._encoder.encode(stacked)
                features = _narrow(encoding, shard.arrays)
                finite = torch.stack([_is_finite(tensor).to(self._device) for tensor in features.values()]).all(0)
                return _Batch(features, finite, timer, copies.mark())

        for batch, encoded in self._batch_size.run(forward, len(pixels)):
            copy = copier.submit(self._copy_back, places[batch], encoded, shard, copies)
            shard.copies.append(copy)
            shard.batch_size = max(shard.batch_size, batch.stop - batch.start)
        if len(shard.copies) > _COPIES_AHEAD:  # they are made in order
            shard.copies[-_COPIES_AHEAD - 1].result()

    def _copy_back(self, places: list[int], encoded: _Batch, shard: _Shard, copies: CopyStream) -> None:
        """Lay the features of a batch into the arrays of its shard."""
        with on_device(self._device), copies.after(encoded.done), make_timer(self._device) as copy:
            _lay(shard.arrays["valid"], places, encoded.finite)
            for name, tensor in encoded.features.items():
                if shard.arrays[name].dtype == torch.int8:
                    values, scale = quantize(tensor.cpu().float().numpy())
                    _lay(shard.arrays[name], places, torch.from_numpy(values))
                    _lay(shard.arrays[_SCALES + name.partition("/")[2]], places, torch.from_numpy(scale))
                else:
                    _lay(shard.arrays[name], places, tensor)
        for name, array in shard.arrays.items():
            if name.startswith(_SCALES):
                shard.arrays["valid"][places] &= _is_finite(array[places])
        self._clock.add("forward", encoded.forward.seconds(), len(places))
        self._clock.add("copy", copy.seconds(), len(places))
        for place in np.flatnonzero(~shard.arrays["valid"].numpy()[places]).tolist():
            shard.reasons[places[place]] = f"its features are not finite in {self._float_dtype}"

    def _make_shard(self, unit: Unit) -> _Shard:
        """Arrays to be filled for the rows of a unit; where that can be, they lie as in the file that comes of them."""
        buffers: dict[str, NDArray[Any] | ShardBuffer] = {}
        for layout in self._layouts:
            num_rows = len(unit.rows)
            if ShardBuffer.suits(layout):
                memory = host_memory(ShardBuffer.size(layout, num_rows), self._device)
                buffers[layout.name] = ShardBuffer(layout, num_rows, memory)
            else:
                buffers[layout.name] = np.empty((num_rows, *layout.shape[1:]), layout.dtype)
        rows = {name: buffer.rows if isinstance(buffer, ShardBuffer) else buffer for name, buffer in buffers.items()}
        return _Shard(unit, buffers, {name: torch.from_numpy(values) for name, values in rows.items()})


def _is_finite(features: Tensor) -> Tensor:
    """(i,) whether all values of each row are. Halves are asked by their bits: torch.isfinite takes 20 times longer."""
    if features.dtype != torch.float16:
        return torch.isfinite(features).flatten(1).all(1)
    bits = features.view(torch.int16)
    if bits.device.type == "cpu":  # row by row, in memory that is still in the cache
        return torch.tensor([int((row & 0x7FFF).max()) < 0x7C00 for row in bits.numpy()])
    return (bits & 0x7FFF).flatten(1).amax(1) < 0x7C00


def _narrow(encoding: ImageEncoding, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch's features by array name, in the data types of their arrays; those kept as int8 as they are."""
    kinds = (("features", encoding.features), ("cls", encoding.cls), ("attention", encoding.attention))
    found = {f"{kind}/{name}": tensor for kind, tensors in kinds for name, tensor in tensors.items()}
    expected = {name for name in arrays if name != "valid" and not name.startswith(_SCALES)}
    assert found.keys() == expected, "the encoder gives other features than it says"
    for name, tensor in found.items():
        assert tensor.shape[1:] == arrays[name].shape[1:], f"{name} has another shape"
        if arrays[name].dtype != torch.int8:
            found[name] = tensor.to(arrays[name].dtype)
    return found


def _lay(array: Tensor, places: list[int], values: Tensor) -> None:
    if values.is_cuda and not array.is_contiguous():  # rows that lie apart reach pinned memory directly one by one only
        for place, row in zip(places, values, strict=True):
            array[place].copy_(row, non_blocking=True)
    elif places[-1] - places[0] + 1 == len(places):
        array[places[0] : places[-1] + 1].copy_(values, non_blocking=values.is_cuda)
    else:
        array[places] = values.to(array.device)
