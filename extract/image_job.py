"""The image extraction job: one encoder over the images of a samples store, shard by shard.

A row is a view of an image. With K views, rows K * i to K * i + K - 1 are the views of image i, each a forward pass of
its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cache_schema.atomic import StorePath
from cache_schema.errors import UsageError, require_at_least, unknown_name
from cache_schema.fingerprint import digest_strings
from cache_schema.layout import ArrayLayout
from cache_schema.quantize import float_dtype, quantize
from cache_schema.receipts import Failure
from cache_schema.samples import ImageTable, digest_array, open_samples, string_arrays
from cache_schema.store import StaticArray, StoreHeader, StoreWriter
from cache_schema.views import WHOLE, View, check_views, make_view
from extract.encoders.protocols import ImageEncoder, ImageEncoding
from extract.images import UndecodableImageError, UnreadableFileError, decode_image, read_bytes
from extract.job import EncodedUnit, Extraction, Unit, recorded_provenance, run_job

DTYPES = ("float16", "float32", "int8")


@dataclass(frozen=True)
class ImageJobConfig:
    """Which samples store's images to encode, where the feature store goes, and how it is cut.

    Args:
        image_dir: where the images lie, if not where they lay when the samples store was written.
        dtype: how token grids are stored: float16, float32, or int8 with one float16 scale for each token.
        batch_size: rows in one forward pass. Batches never cross a shard.
        shard_rows: rows in one shard, the unit of work that a killed job loses at most.
        views: how each image is looked at, see `cache_schema.views.make_view`; the whole image comes first.
        decode_threads: how many images are decoded at the same time, ahead of the encoder.
    """

    samples: StorePath
    out: StorePath
    image_dir: Path | None = None
    dtype: str = "float16"
    batch_size: int = 32
    shard_rows: int = 64
    views: Sequence[str] = (WHOLE,)
    decode_threads: int = 2

    def __post_init__(self) -> None:
        require_at_least(self, 1, "batch_size", "shard_rows", "decode_threads")
        check_views(self.views)
        if self.dtype not in DTYPES:
            raise unknown_name("dtype", self.dtype, DTYPES)

    @property
    def cls_dtype(self) -> np.dtype[Any]:
        """The data type in which CLS tokens are stored."""
        return np.dtype(float_dtype(self.dtype))


def extract_images(config: ImageJobConfig, encoder: ImageEncoder, *, repair: Path | None = None) -> Extraction:
    """Encode every image of a samples store that has no features yet. Safe to kill, repeat, and run twice at once.

    Args:
        repair: a store of which every file is to be checked against its digest, and made again where it differs.

    Raises:
        UsageError: the samples store or the image folder is missing.
        StoreMismatchError: this job makes another store than the one to repair.
    """
    samples = open_samples(config.samples, config.image_dir)
    table = samples.samples.images
    views = _make_views(config, table)
    writer = _make_writer(config, table, views, encoder)

    def encode(pending: Sequence[Unit]) -> Iterator[EncodedUnit]:
        image_dir = samples.image_dir
        if image_dir is None or not image_dir.is_dir():
            if not pending:
                return iter(())
            where = "" if image_dir is None else f" at {image_dir}: the folder is missing"
            raise UsageError(f"no images{where}. Name their folder with --image-dir.")
        return _encoded_units(config, table, image_dir, views, encoder, pending)

    label = f"encoding images with {Path(encoder.name).name}"
    noun = "image" if len(config.views) == 1 else "view"
    return run_job(writer, len(views), config.shard_rows, encode, label=label, noun=noun, repair=repair)


def _encoded_units(
    config: ImageJobConfig,
    table: ImageTable,
    image_dir: Path,
    views: Sequence[View],
    encoder: ImageEncoder,
    pending: Sequence[Unit],
) -> Iterator[EncodedUnit]:
    """Every unit that is left, encoded."""
    for unit, images in _decoded_units(config, table, image_dir, views, encoder, pending):
        _require_readable(config, table, image_dir, unit, images)
        arrays, failures = _encode_unit(config, encoder, table, unit.rows, images)
        yield EncodedUnit(unit, {(name, unit.number): values for name, values in arrays.items()}, failures)


def _make_views(config: ImageJobConfig, table: ImageTable) -> list[View]:
    """The view of every row."""
    return [
        make_view(spec, number, (height, width), sha256)
        for (height, width), sha256 in zip(table.sizes.tolist(), table.sha256, strict=True)
        for number, spec in enumerate(config.views)
    ]


def _make_writer(
    config: ImageJobConfig, table: ImageTable, views: Sequence[View], encoder: ImageEncoder
) -> StoreWriter:
    num, rows, dtype = len(views), config.shard_rows, np.dtype(config.dtype)
    layouts = [ArrayLayout("valid", (num,), np.dtype(np.bool_), rows, rows, ("view",))]
    for layer, (height, width, channels) in encoder.grids.items():
        grid = (num, height, width)
        axes = ("view", "grid_h", "grid_w", f"channel_{layer}")
        layouts.append(ArrayLayout(f"features/{layer}", (*grid, channels), dtype, 1, rows, axes))
        if config.dtype == "int8":
            layouts.append(ArrayLayout(f"scale/{layer}", grid, np.dtype(np.float16), 1, rows, axes[:3]))
        cls_axes = ("view", f"channel_{layer}")
        layouts.append(ArrayLayout(f"cls/{layer}", (num, channels), config.cls_dtype, rows, rows, cls_axes))
    each = len(config.views)
    static = [
        *string_arrays("image/id", [image_id for image_id in table.ids for _ in range(each)], "view"),
        StaticArray("image/sha256", digest_array(table.sha256).repeat(each, 0), ("view", "byte")),
        StaticArray("original_size", table.sizes.astype(np.int32).repeat(each, 0), ("view", "hw")),
        StaticArray("view", np.array([view.to_row() for view in views], np.int32), ("view", "box_and_flip")),
    ]
    identity = {
        "encoder": encoder.identity,
        "outputs": {"layers": list(encoder.grids), "cls": True},
        "dtype": dtype.name,
        "shard_rows": rows,
        "views": list(config.views),
        "images": digest_strings(
            f"{image_id} {height}x{width} {digest}"
            for image_id, (height, width), digest in zip(table.ids, table.sizes.tolist(), table.sha256, strict=True)
        ),
    }
    header = StoreHeader("image_features", identity, {})
    recorded = recorded_provenance(
        encoder.name, config.samples, len(table), config.batch_size, config.out / header.folder_name
    )
    return StoreWriter(config.out, replace(header, recorded=recorded), layouts, static)


Decoded = NDArray[np.float32] | UndecodableImageError | UnreadableFileError


def _decoded_units(
    config: ImageJobConfig,
    table: ImageTable,
    image_dir: Path,
    views: Sequence[View],
    encoder: ImageEncoder,
    pending: Sequence[Unit],
) -> Iterator[tuple[Unit, list[Decoded]]]:
    """Decode each image of a unit once and preprocess its views, one unit ahead of whoever consumes them."""
    each = len(config.views)

    def load(rows: range) -> list[Decoded]:
        image_row = rows.start // each
        try:
            image = _load_image(image_dir / table.paths[image_row], table, image_row)
        except (UndecodableImageError, UnreadableFileError) as error:
            return [error for _ in rows]
        return [encoder.preprocess(views[row].apply_to_image(image)) for row in rows]

    with ThreadPoolExecutor(config.decode_threads, thread_name_prefix="decode") as pool:
        ahead: deque[list[Future[list[Decoded]]]] = deque()
        to_submit = iter(pending)
        for unit in pending:
            for later in islice(to_submit, 2 - len(ahead)):
                ahead.append([pool.submit(load, rows) for rows in _rows_by_image(later.rows, each)])
            yield unit, [image for future in ahead.popleft() for image in future.result()]


def _rows_by_image(rows: range, each: int) -> Iterator[range]:
    """Cut a unit's rows where an image's views end."""
    start = rows.start
    while start < rows.stop:
        stop = min(rows.stop, (start // each + 1) * each)
        yield range(start, stop)
        start = stop


def _require_readable(
    config: ImageJobConfig, table: ImageTable, image_dir: Path, unit: Unit, images: Sequence[Decoded]
) -> None:
    """Stop at files that are missing, unreadable or changed: the store is for ever, and they may be back tomorrow."""
    missing = {
        row // len(config.views): image
        for row, image in zip(unit.rows, images, strict=True)
        if isinstance(image, UnreadableFileError)
    }
    if missing:
        row, reason = next(iter(missing.items()))
        raise UsageError(
            f"{len(missing)} images of {image_dir} cannot be had, {table.paths[row]!r} first: {reason}. Put them back "
            "or name their folder with --image-dir, and run the same command again to go on."
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
) -> tuple[dict[str, NDArray[Any]], list[Failure]]:
    """All arrays of one shard. A row that failed holds zeros, is not `valid`, and stands in the ledger."""
    dtype = np.dtype(config.dtype)
    reasons: dict[int, str] = {}
    arrays: dict[str, NDArray[Any]] = {"valid": np.zeros(len(rows), np.bool_)}
    for layer, (height, width, channels) in encoder.grids.items():
        arrays[f"features/{layer}"] = np.zeros((len(rows), height, width, channels), dtype)
        if config.dtype == "int8":
            arrays[f"scale/{layer}"] = np.zeros((len(rows), height, width), np.float16)
        arrays[f"cls/{layer}"] = np.zeros((len(rows), channels), config.cls_dtype)
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
        for name, values in _stored_arrays(config, encoding):
            arrays[name][list(places)] = values
            finite &= np.isfinite(values).reshape(len(values), -1).all(1)
        arrays["valid"][list(places)] = finite
        overflow = f"its features are not finite in {dtype.name}"
        reasons.update({place: overflow for place, fine in zip(places, finite, strict=True) if not fine})
    for place in reasons:
        for name in arrays:
            arrays[name][place] = 0
    ids = [table.ids[row // len(config.views)] for row in rows]
    return arrays, [Failure(rows[place], ids[place], reason) for place, reason in sorted(reasons.items())]


def _stored_arrays(config: ImageJobConfig, encoding: ImageEncoding) -> Iterator[tuple[str, NDArray[Any]]]:
    """What a batch's features are in the store, by array name."""
    for layer, tensor in encoding.features.items():
        tokens = tensor.float().cpu().numpy()
        if config.dtype == "int8":
            values, scale = quantize(tokens)
            yield f"features/{layer}", values
            yield f"scale/{layer}", scale
        else:
            yield f"features/{layer}", _cast(tokens, np.dtype(config.dtype))
    for layer, tensor in encoding.cls.items():
        yield f"cls/{layer}", _cast(tensor.float().cpu().numpy(), config.cls_dtype)


def _cast(values: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[Any]:
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and its row is refused
        return values.astype(dtype)
