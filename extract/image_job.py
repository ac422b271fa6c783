"""The image extraction job: one encoder over the images of a samples store, shard by shard."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cache_schema.errors import UsageError, require_at_least
from cache_schema.fingerprint import digest_strings
from cache_schema.layout import ArrayLayout
from cache_schema.receipts import Failure
from cache_schema.samples import ImageTable, SamplesStore, digest_array, open_samples, string_arrays
from cache_schema.store import StaticArray, StoreHeader, StoreWriter, is_complete
from extract.encoders.protocols import ImageEncoder
from extract.images import UndecodableImageError, UnreadableFileError, decode_image, read_bytes
from extract.job import EncodedUnit, Extraction, Unit, recorded_provenance, run_job


@dataclass(frozen=True)
class ImageJobConfig:
    """Which samples store's images to encode, where the feature store goes, and how it is cut.

    Args:
        image_dir: where the images lie, if not where they lay when the samples store was written.
        dtype: how features are stored, float16 or float32.
        batch_size: images in one forward pass. Batches never cross a shard.
        shard_rows: images in one shard, the unit of work that a killed job loses at most.
        decode_threads: how many images are decoded at the same time, ahead of the encoder.
    """

    samples: Path
    out: Path
    image_dir: Path | None = None
    dtype: str = "float16"
    batch_size: int = 32
    shard_rows: int = 64
    decode_threads: int = 2

    def __post_init__(self) -> None:
        require_at_least(self, 1, "batch_size", "shard_rows", "decode_threads")


def extract_images(config: ImageJobConfig, encoder: ImageEncoder) -> Extraction:
    """Encode every image of a samples store that has no features yet. Safe to kill, repeat, and run twice at once.

    Raises:
        UsageError: the samples store or the image folder is missing.
    """
    samples = open_samples(config.samples, config.image_dir)
    table = samples.samples.images
    writer = _make_writer(config, table, encoder)
    if not samples.image_dir.is_dir() and not is_complete(writer.path):
        raise UsageError(f"no images at {samples.image_dir}: the folder is missing. Name it with --image-dir.")

    def encode(pending: Sequence[Unit]) -> Iterator[EncodedUnit]:
        for unit, images in _decoded_units(config, samples, encoder, pending):
            _require_readable(samples, unit, images)
            arrays, failures = _encode_unit(config, encoder, table, unit.rows, images)
            yield EncodedUnit(unit, {(name, unit.number): values for name, values in arrays.items()}, failures)

    label = f"encoding images with {Path(encoder.name).name}"
    return run_job(writer, len(table), config.shard_rows, encode, label=label, noun="image")


def _make_writer(config: ImageJobConfig, table: ImageTable, encoder: ImageEncoder) -> StoreWriter:
    num, rows, dtype = len(table), config.shard_rows, np.dtype(config.dtype)
    layouts = [ArrayLayout("valid", (num,), np.dtype(np.bool_), rows, rows, ("view",))]
    for layer, (height, width, channels) in encoder.grids.items():
        grid_axes = ("view", "grid_h", "grid_w", f"channel_{layer}")
        layouts += [
            ArrayLayout(f"features/{layer}", (num, height, width, channels), dtype, 1, rows, grid_axes),
            ArrayLayout(f"cls/{layer}", (num, channels), dtype, rows, rows, ("view", f"channel_{layer}")),
        ]
    heights, widths = table.sizes.T
    zeros = np.zeros_like(heights)
    static = [
        *string_arrays("image/id", table.ids, "view"),
        StaticArray("image/sha256", digest_array(table.sha256), ("view", "byte")),
        StaticArray("original_size", table.sizes.astype(np.int32), ("view", "hw")),
        StaticArray(
            "view", np.stack([zeros, zeros, widths, heights, zeros], 1).astype(np.int32), ("view", "box_and_flip")
        ),
    ]
    identity = {
        "encoder": encoder.identity,
        "outputs": {"layers": list(encoder.grids), "cls": True},
        "dtype": dtype.name,
        "shard_rows": rows,
        "views": "whole",
        "images": digest_strings(
            f"{image_id} {height}x{width} {digest}"
            for image_id, (height, width), digest in zip(table.ids, table.sizes.tolist(), table.sha256, strict=True)
        ),
    }
    header = StoreHeader("image_features", identity, {})
    recorded = recorded_provenance(encoder.name, num, config.out / header.folder_name)
    return StoreWriter(config.out, replace(header, recorded=recorded), layouts, static)


Decoded = NDArray[np.float32] | UndecodableImageError | UnreadableFileError


def _decoded_units(
    config: ImageJobConfig, samples: SamplesStore, encoder: ImageEncoder, pending: Sequence[Unit]
) -> Iterator[tuple[Unit, list[Decoded]]]:
    """Decode and preprocess unit after unit, one unit ahead of whoever consumes them."""
    table = samples.samples.images

    def load(row: int) -> Decoded:
        try:
            return encoder.preprocess(_load_image(samples.image_dir / table.paths[row], table, row))
        except (UndecodableImageError, UnreadableFileError) as error:
            return error

    with ThreadPoolExecutor(config.decode_threads, thread_name_prefix="decode") as pool:
        ahead: deque[list[Future[Decoded]]] = deque()
        to_submit = iter(pending)
        for unit in pending:
            for later in islice(to_submit, 2 - len(ahead)):
                ahead.append([pool.submit(load, row) for row in later.rows])
            yield unit, [future.result() for future in ahead.popleft()]


def _require_readable(samples: SamplesStore, unit: Unit, images: Sequence[Decoded]) -> None:
    """Stop at files that are missing, unreadable or changed: the store is for ever, and they may be back tomorrow."""
    missing = [
        (row, image) for row, image in zip(unit.rows, images, strict=True) if isinstance(image, UnreadableFileError)
    ]
    if missing:
        row, reason = missing[0]
        raise UsageError(
            f"{len(missing)} images of {samples.image_dir} cannot be had, {samples.samples.images.paths[row]!r} first: "
            f"{reason}. Put them back or name their folder with --image-dir, and run the same command again to go on."
        )


def _load_image(path: Path, table: ImageTable, row: int) -> NDArray[np.uint8]:
    data, digest = read_bytes(path)
    if digest != table.sha256[row]:
        raise UnreadableFileError("the file changed after the samples store was written")
    image = decode_image(data)
    if image.shape[:2] != tuple(table.sizes[row]):
        height, width = table.sizes[row].tolist()
        found = f"{image.shape[0]} x {image.shape[1]}"
        raise UndecodableImageError(f"it is {found} pixels where its annotations say {height} x {width}")
    return image


def _encode_unit(
    config: ImageJobConfig, encoder: ImageEncoder, table: ImageTable, rows: range, images: Sequence[Decoded]
) -> tuple[dict[str, NDArray[np.generic]], list[Failure]]:
    """All arrays of one shard. A row that failed holds zeros, is not `valid`, and stands in the ledger."""
    dtype = np.dtype(config.dtype)
    reasons: dict[int, str] = {}
    arrays: dict[str, NDArray[np.generic]] = {"valid": np.zeros(len(rows), np.bool_)}
    for layer, (height, width, channels) in encoder.grids.items():
        arrays[f"features/{layer}"] = np.zeros((len(rows), height, width, channels), dtype)
        arrays[f"cls/{layer}"] = np.zeros((len(rows), channels), dtype)
    good: list[tuple[int, NDArray[np.float32]]] = []
    for place, image in enumerate(images):
        if isinstance(image, Exception):
            reasons[place] = str(image)
        else:
            good.append((place, image))
    for start in range(0, len(good), config.batch_size):
        places, batch = zip(*good[start : start + config.batch_size], strict=True)
        encoding = encoder.encode(torch.from_numpy(np.stack(batch)))
        finite = np.ones(len(places), np.bool_)
        for name, tensors in (("features", encoding.features), ("cls", encoding.cls)):
            for layer, tensor in tensors.items():
                with np.errstate(over="ignore"):
                    values = tensor.float().cpu().numpy().astype(dtype)
                arrays[f"{name}/{layer}"][list(places)] = values
                finite &= np.isfinite(values).reshape(len(values), -1).all(1)
        arrays["valid"][list(places)] = finite
        overflow = f"its features are not finite in {dtype.name}"
        reasons.update({place: overflow for place, fine in zip(places, finite, strict=True) if not fine})
    for place in reasons:
        for name in arrays:
            arrays[name][place] = 0
    failures = [Failure(rows[place], table.ids[rows[place]], reason) for place, reason in sorted(reasons.items())]
    return arrays, failures
