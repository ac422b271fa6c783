"""Toys for the tests of stores: random arrays, and a small store whose every value is known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from cache_schema.atomic import StorePath
from cache_schema.layout import ArrayLayout
from cache_schema.receipts import Failure, Receipt
from cache_schema.shards import encode_shard
from cache_schema.store import StaticArray, StoreHeader, StoreWriter

DTYPES = ("float16", "float32", "uint8", "int8", "int32", "int64", "bool")
AXES = ("row", "a", "b", "c")


PLAIN = st.none()
PLAIN_OR_ZSTD = st.sampled_from([None, -3, 1, 9])
"""Levels of zstd to draw from; None is no compression."""


def layout_of(
    shape: tuple[int, ...],
    dtype: str = "float32",
    *,
    chunk_rows: int = 1,
    chunks_per_shard: int = 1,
    zstd_level: int | None = None,
) -> ArrayLayout:
    axes = AXES[: len(shape)]
    return ArrayLayout("values", shape, np.dtype(dtype), chunk_rows, chunk_rows * chunks_per_shard, axes, zstd_level)


def values_of(layout: ArrayLayout, seed: int = 0) -> NDArray[Any]:
    """Random bits as the layout's numbers: infinities, NaNs and negative zeros among them."""
    rng = np.random.default_rng(seed)
    if layout.dtype == np.bool_:
        return rng.random(layout.shape) < 0.5
    bits = rng.integers(0, 256, math.prod(layout.shape) * layout.dtype.itemsize, np.uint8)
    return bits.view(layout.dtype).reshape(layout.shape)


def declare_array(store: Path, layout: ArrayLayout) -> None:
    """A zarr group with one array that has no shard yet."""
    (store / layout.name).mkdir(parents=True)
    (store / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}))
    (store / layout.name / "zarr.json").write_text(json.dumps(layout.to_metadata()))


def write_array(store: Path, layout: ArrayLayout, values: NDArray[Any]) -> None:
    """A zarr group with one array, its shards written by us."""
    declare_array(store, layout)
    for shard in range(layout.num_shards):
        rows = layout.rows_of_shard(shard)
        data = encode_shard(values[rows.start : rows.stop], layout)
        (store / layout.shard_key(shard)).write_bytes(data)


def assert_same_bits(read: Any, written: NDArray[Any]) -> None:
    read = np.ascontiguousarray(read)
    assert read.dtype == written.dtype
    assert read.shape == written.shape
    assert read.tobytes() == written.tobytes()


@st.composite
def layouts(draw: st.DrawFn, *, least: int = 0, zstd_levels: st.SearchStrategy[int | None] = PLAIN) -> ArrayLayout:
    """Layouts of at least `least` rows with as many values along every axis; plain ones unless levels are given."""
    row_shape = draw(st.lists(st.integers(least, 3) | st.just(5), max_size=3))
    return layout_of(
        (draw(st.integers(least, 14)), *row_shape),
        draw(st.sampled_from(DTYPES)),
        chunk_rows=draw(st.integers(1, 4)),
        chunks_per_shard=draw(st.integers(1, 4)),
        zstd_level=draw(zstd_levels),
    )


HEADER = StoreHeader("image_features", {"encoder": "one", "images": [1, 2, 3]}, {"libraries": {"numpy": "2"}})
LAYOUTS = (
    ArrayLayout("features/last", (6, 2, 3), np.dtype(np.float16), 1, 4, ("view", "grid", "channel")),
    ArrayLayout("valid", (6,), np.dtype(np.bool_), 4, 4, ("view",)),
)
STATIC = (
    StaticArray("image/size", np.arange(12, dtype=np.int32).reshape(6, 2), ("view", "hw")),
    StaticArray("image/none", np.zeros(0, np.uint8), ("byte",)),
)
FEATURES = np.arange(36, dtype=np.float16).reshape(6, 2, 3)
VALID = np.array([True, True, False, True, True, True])
UNITS = {"000000": (0, 4), "000001": (4, 6)}
FAILURE = Failure(2, "image 3", "the file is empty")
ARRAYS = {"features/last": FEATURES, "valid": VALID, **{array.name: array.values for array in STATIC}}
SHARDS = {"features/last/c.0.0.0", "features/last/c.1.0.0", "valid/c.0", "valid/c.1", "image/size/c.0.0"}


def make_writer(parent: StorePath, header: StoreHeader = HEADER) -> StoreWriter:
    return StoreWriter(parent, header, LAYOUTS, STATIC)


def commit(writer: StoreWriter, unit: str, rates: dict[str, float] | None = None) -> Receipt:
    start, stop = UNITS[unit]
    shards: dict[tuple[str, int], NDArray[Any]] = {
        ("features/last", int(unit)): FEATURES[start:stop],
        ("valid", int(unit)): VALID[start:stop],
    }
    return writer.commit(unit, (start, stop), shards, [FAILURE] if start == 0 else [], rates)


def write_store(parent: Any, header: StoreHeader = HEADER, **options: Any) -> Any:
    """A complete store of six rows, the third of which failed."""
    writer = make_writer(parent, header)
    writer.begin()
    for unit in UNITS:
        commit(writer, unit, **options)
    writer.finish(UNITS)
    return writer.path


def flip_byte(path: StorePath, offset: int = 5) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))


def edit_json(path: StorePath, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_bytes())
    change(value)
    path.write_bytes(json.dumps(value).encode())


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
