"""The image extraction job: one encoder over the images of a samples store, shard by shard.

A row is a view of an image: the rows of an image are consecutive, each a forward pass of its own.
"""

from __future__ import annotations

from array import array
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_schema.atomic import StorePath
from cache_schema.errors import UsageError, require_at_least, unknown_name
from cache_schema.fingerprint import digest_strings
from cache_schema.layout import ArrayLayout
from cache_schema.quantize import float_dtype
from cache_schema.reader import num_cores
from cache_schema.samples import ImageTable, digest_array, open_samples, string_arrays
from cache_schema.store import COMMIT_THREADS, StaticArray, StoreHeader, StoreWriter
from cache_schema.views import WHOLE, View, check_views, is_windows, make_views
from extract.encoders.protocols import ImageEncoder
from extract.images import (
    MAX_IMAGE_PIXELS,
    UndecodableImageError,
    UnreadableFileError,
    decode_image,
    read_bytes,
)
from extract.job import EncodedUnit, Extraction, Unit, recorded_provenance, run_job
from extract.pipeline import ImagePipeline, Loaded, RowGroup
from extract.stages import StageClock

DTYPES = ("float16", "float32", "int8")

_CPU_BATCH, _DEVICE_BATCH = 8, 64


@dataclass(frozen=True)
class ImageJobConfig:
    """Which samples store's images to encode, where the feature store goes, and how it is cut.

    Args:
        image_dir: where the images lie, if not where they lay when the samples store was written.
        dtype: how token grids are stored: float16, float32, or int8 with one float16 scale for each token.
        batch_size: rows in one forward pass; None for 8 on a CPU, where more take memory alone, and 64 elsewhere.
            Batches never cross a shard.
        shard_rows: rows in one shard, the unit of work; a killed job loses those it has under way.
        views: how each image is looked at, see `cache_schema.views.make_views`; the whole image comes first.
        decode_threads: how many images are decoded at the same time, ahead of the encoder; None for one a core.
    """

    samples: StorePath
    out: StorePath
    image_dir: Path | None = None
    dtype: str = "float16"
    batch_size: int | None = None
    shard_rows: int = 64
    views: Sequence[str] = (WHOLE,)
    decode_threads: int | None = None

    def __post_init__(self) -> None:
        require_at_least(self, 1, "shard_rows")
        require_at_least(
            self, 1, *(name for name in ("batch_size", "decode_threads") if getattr(self, name) is not None)
        )
        check_views(self.views)
        if self.dtype not in DTYPES:
            raise unknown_name("dtype", self.dtype, DTYPES)


class ImageJob:
    """One image-feature store in the making.

    Args:
        table: the images, if not all of the samples store.

    Raises:
        UsageError: the samples store is missing.
    """

    def __init__(self, config: ImageJobConfig, encoder: ImageEncoder, table: ImageTable | None = None) -> None:
        samples = open_samples(config.samples, config.image_dir)
        if config.batch_size is None:
            config = replace(config, batch_size=_CPU_BATCH if encoder.device == "cpu" else _DEVICE_BATCH)
        assert config.batch_size is not None
        self._config = config
        self._batch_size = config.batch_size
        self._encoder = encoder
        self._image_dir = samples.image_dir
        self._table = table = samples.samples.images if table is None else table
        self._views, self._image_of = _place_views(config, encoder, table)
        self._layouts = _make_layouts(config, encoder, len(self._views))
        self.writer = _make_writer(config, encoder, table, self._image_of, self._views, self._layouts)
        self.num_items = len(self._views)
        self.items_per_unit = config.shard_rows
        self.label = f"encoding images with {Path(encoder.name).name}"
        self.noun = "image" if list(config.views) == [WHOLE] else "view"
        decode_threads = config.decode_threads or num_cores()
        workers = {"decode": decode_threads, "preprocess": decode_threads, "write": COMMIT_THREADS}
        self.clock = StageClock(workers)
        self._pipeline = ImagePipeline(
            encoder,
            self._layouts,
            self._groups,
            self._load,
            lambda row: table.ids[self._image_of[row]],
            batch_size=self._batch_size,
            decode_threads=decode_threads,
            clock=self.clock,
        )

    def encode(self, units: Sequence[Unit]) -> Generator[EncodedUnit, None, None]:
        """Each unit encoded, in order.

        Raises:
            UsageError: the image folder, or a file in it, is missing or was changed.
        """
        if units and (self._image_dir is None or not self._image_dir.is_dir()):
            where = "" if self._image_dir is None else f" at {self._image_dir}: the folder is missing"
            raise UsageError(f"no images{where}. Name their folder with --image-dir.")
        return self._pipeline.run(units)

    def probe(self, out: StorePath, num_items: int, unit_items: int, seed: int) -> ImageJob:
        """The same job on rows of images drawn at random; at least `num_items` of them, or all there are."""
        num_images = min(len(self._table), num_items)
        drawn = np.sort(np.random.default_rng(seed).choice(len(self._table), num_images, replace=False))
        batch_size = min(self._batch_size, unit_items)
        config = replace(self._config, out=out, shard_rows=unit_items, batch_size=batch_size)
        return ImageJob(config, self._encoder, self._table.take(drawn))

    def _groups(self, rows: range) -> Iterator[RowGroup]:
        start = rows.start
        while start < rows.stop:
            image = int(self._image_of[start])
            stop = min(rows.stop, int(np.searchsorted(self._image_of, image, "right")))
            yield RowGroup(image, range(start, stop))
            start = stop

    def _load(self, group: RowGroup) -> list[Loaded]:
        """What the rows of a group show of their image.

        Raises:
            UsageError: its file is missing, cannot be read, or was changed. The store is for ever, and the file may be
                back tomorrow, so that is no failure of the image.
        """
        assert self._image_dir is not None
        path = self._table.paths[group.image]
        try:
            with self.clock.at_work("decode", len(group.rows)):
                image = self._decode(self._image_dir / path, group.image)
        except UndecodableImageError as error:
            return [error for _ in group.rows]
        except UnreadableFileError as error:
            raise UsageError(
                f"{path!r} in {self._image_dir} cannot be had: {error}. Put it back or name the folder of the images "
                "with --image-dir, and run the same command again to go on."
            ) from error
        with self.clock.at_work("preprocess", len(group.rows)):
            return [self._preprocess(View.from_row(self._views[row].tolist()), image) for row in group.rows]

    def _preprocess(self, view: View, image: NDArray[np.uint8]) -> Loaded:
        left, top, right, bottom = view.box
        if (bottom - top) * (right - left) > MAX_IMAGE_PIXELS:  # a letterbox around something long and thin
            return UndecodableImageError(f"it takes {bottom - top} x {right - left} pixels to show it so")
        return self._encoder.preprocess(view.apply_to_image(image))

    def _decode(self, path: Path, row: int) -> NDArray[np.uint8]:
        data, digest = read_bytes(path)
        if digest != self._table.sha256[row]:
            raise UnreadableFileError("the file changed after the samples store was written")
        image = decode_image(data)
        if image.shape[:2] != tuple(self._table.sizes[row]):
            height, width = self._table.sizes[row].tolist()
            found = f"{image.shape[0]} x {image.shape[1]}"
            raise UndecodableImageError(f"it is {found} pixels where its annotations say {height} x {width}")
        return image


def extract_images(
    config: ImageJobConfig, encoder: ImageEncoder, *, repair: Path | None = None, overcommit: bool = False
) -> Extraction:
    """Encode every image of a samples store that has no features yet. Safe to kill, repeat, and run twice at once.

    Args:
        repair: a store of which every file is to be checked against its digest, and made again where it differs.
        overcommit: begin even where the disk has less room than the store will need.

    Raises:
        UsageError: the samples store, the image folder or a file in it is missing.
        StoreMismatchError: this job makes another store than the one to repair.
        NoRoomError: the disk has too little room.
    """
    return run_job(ImageJob(config, encoder), repair=repair, overcommit=overcommit)


def _place_views(
    config: ImageJobConfig, encoder: ImageEncoder, table: ImageTable
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """(N, 5) what each row looks at, box and flip, and (N,) the image it looks at."""
    rows, counts = array("i"), []
    for (height, width), sha256 in zip(table.sizes.tolist(), table.sha256, strict=True):
        views = make_views(config.views, (height, width), sha256)
        fitted = [encoder.fit(view) for view in views]
        if is_windows(config.views[-1]) and min(fitted[-1].size) < min(views[-1].size):
            raise UsageError(
                "sliding windows are square; cropped to this input's shape they leave gaps. Give a square "
                "--input-size, or --aspect squash."
            )
        rows.extend(chain.from_iterable(view.to_row() for view in fitted))
        counts.append(len(views))
    return np.array(rows, np.int32).reshape(-1, 5), np.repeat(np.arange(len(table)), counts)


def _make_layouts(config: ImageJobConfig, encoder: ImageEncoder, num: int) -> list[ArrayLayout]:
    """The arrays that are filled row by row."""
    rows, dtype, narrow = config.shard_rows, np.dtype(config.dtype), np.dtype(float_dtype(config.dtype))
    layouts = [ArrayLayout("valid", (num,), np.dtype(np.bool_), rows, rows, ("view",))]
    for layer, (height, width, channels) in encoder.grids.items():
        grid = (num, height, width)
        axes = ("view", f"grid_h_{layer}", f"grid_w_{layer}", f"channel_{layer}")
        layouts.append(ArrayLayout(f"features/{layer}", (*grid, channels), dtype, 1, rows, axes))
        if config.dtype == "int8":
            layouts.append(ArrayLayout(f"scale/{layer}", grid, np.dtype(np.float16), 1, rows, axes[:3]))
    for layer, channels in encoder.cls_widths.items():
        layouts.append(ArrayLayout(f"cls/{layer}", (num, channels), narrow, rows, rows, ("view", f"channel_{layer}")))
    for name, shape in encoder.attention_shapes.items():
        layouts.append(
            ArrayLayout(f"attention/{name}", (num, *shape), narrow, 1, rows, ("view", *_ATTENTION_AXES[name]))
        )
    return layouts


_ATTENTION_AXES = {
    "logits": ("head", "attention_h", "attention_w"),
    "head_tokens": ("head", "attention_channel"),
    "mean_token": ("attention_channel",),
}


def _make_writer(
    config: ImageJobConfig,
    encoder: ImageEncoder,
    table: ImageTable,
    image_of: NDArray[np.int64],
    views: NDArray[np.int32],
    layouts: Sequence[ArrayLayout],
) -> StoreWriter:
    static = [
        *string_arrays("image/id", [table.ids[image] for image in image_of], "view"),
        StaticArray("image/sha256", digest_array(table.sha256)[image_of], ("view", "byte")),
        StaticArray("original_size", table.sizes.astype(np.int32)[image_of], ("view", "hw")),
        StaticArray("view", views, ("view", "box_and_flip")),
    ]
    identity: dict[str, Any] = {
        "encoder": encoder.identity,
        "outputs": {
            "layers": list(encoder.grids),
            "cls": list(encoder.cls_widths),
            "attention": list(encoder.attention_shapes),
        },
        "dtype": config.dtype,
        "shard_rows": config.shard_rows,
        "views": list(config.views),
        "images": digest_strings(
            f"{image_id} {height}x{width} {digest}"
            for image_id, (height, width), digest in zip(table.ids, table.sizes.tolist(), table.sha256, strict=True)
        ),
    }
    header = StoreHeader("image_features", identity, {})
    assert config.batch_size is not None
    recorded = recorded_provenance(
        encoder, config.samples, len(table), config.batch_size, config.out / header.folder_name
    )
    return StoreWriter(config.out, replace(header, recorded=recorded), layouts, static)
