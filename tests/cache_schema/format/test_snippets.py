"""The snippets of docs/cache-format.md, run as they stand there, read every store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from cache_schema.features import ImageFeatures
from cache_schema.store import Store, open_store
from tests.cache_schema.format.rules import reader_of_the_document, snippet
from tests.cache_schema.format.stores import Stores, ZarrStore


def assert_snippet_read(read: Mapping[str, Any], store: Store) -> None:
    images = ImageFeatures(store)
    layer = images.layers[-1]
    grid = images.features(layer).read([0])[0]
    if (scale := images.scale(layer)) is not None:
        grid = grid.astype(np.float32) * scale.read([0])[0].astype(np.float32)[..., None]
    np.testing.assert_array_equal(read["grid"], grid)
    assert read["grid"].dtype == grid.dtype
    np.testing.assert_array_equal(read["valid"], images.valid)
    assert read["ids"] == images.ids


def test_the_snippet_for_zarr_python_reads_every_image_store_with_layers_in_a_folder(stores: Stores) -> None:
    with_layers = [store for store in stores.of_kind("image_features") if store.identity["outputs"]["layers"]]
    assert len(with_layers) == len(stores.of_kind("image_features")) - 1
    for store in with_layers:
        assert_snippet_read(snippet("With zarr-python", store=store.path), open_store(store.path))


def test_the_snippet_for_h5py_reads_every_image_store_in_hdf5(stores: Stores) -> None:
    paths = [path for path in stores.hdf5 if path.name.startswith("image_features")]
    assert len(paths) == 2
    for path in paths:
        assert_snippet_read(snippet("With h5py", store=path), open_store(path))


def test_the_reader_of_the_document_reads_every_array_of_every_plain_store(stores: Stores) -> None:
    read_array = reader_of_the_document()
    for store in stores.plain:
        opened = open_store(store.path)
        for name in opened.layouts:
            values = read_array(store.path, name)
            np.testing.assert_array_equal(values, opened.read(name))
            assert values.dtype == opened.layouts[name].dtype
        opened.close()


def test_the_reader_of_the_document_notices_a_flipped_bit(small_store: ZarrStore) -> None:
    shard = small_store.path / "features" / "last" / "c.0.0.0.0"
    data = bytearray(shard.read_bytes())
    for place in (5, len(data) - 9):
        spoilt = data.copy()
        spoilt[place] ^= 1
        shard.write_bytes(spoilt)
        with pytest.raises(ValueError, match="checksum"):
            reader_of_the_document()(small_store.path, "features/last")
