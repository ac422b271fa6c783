"""The metadata, the shards and the checksums of arrays are those of docs/cache-format.md."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from awscrt.checksums import crc32c

from cache_schema.layout import ArrayLayout
from cache_schema.shards import encode_shard
from tests.cache_schema.document import name_of, parse_hexdump
from tests.cache_schema.format.rules import PAGE, reader_of_the_document, spell
from tests.cache_schema.format.stores import Stores, ZarrStore


def metadata_by_rule(example: Mapping[str, Any], places: Sequence[str], layout: Mapping[str, Any]) -> dict[str, Any]:
    """The document's example of an array's metadata with another array's values in the places that are listed."""
    metadata = copy.deepcopy(dict(example))
    for place in places:
        *path, last = place.split(".")
        node: Any = metadata
        for step in path:
            node = node[int(step) if isinstance(node, list) else step]
        assert last in node, f"the document lists {place}, which its own example lacks"
        node[last] = layout[place]
    return metadata


def layout_of(name: str, store: ZarrStore) -> dict[str, Any]:
    """What stands in the places that differ from array to array, from the array as zarr-python sees it."""
    array = zarr.open_array(store.path / name, mode="r")
    fill_values = {name_of(row): json.loads(row["fill value"].strip("`")) for row in PAGE.tables["Data types"]}
    row_shape = [max(1, length) for length in array.shape[1:]]
    assert array.shards is not None
    return {
        "shape": list(array.shape),
        "data_type": array.dtype.name,
        "chunk_grid.configuration.chunk_shape": [array.shards[0], *row_shape],
        "fill_value": fill_values[array.dtype.name],
        "codecs.0.configuration.chunk_shape": [array.chunks[0], *row_shape],
        "dimension_names": list(store.arrays[name]["dimension_names"]),
    }


def test_array_metadata_is_the_documents_example_with_other_values_in_the_places_it_lists(stores: Stores) -> None:
    example, zstd = (json.loads(text) for _, text in PAGE.blocks["Array metadata"])
    places = [name_of(row) for row in PAGE.tables["Array metadata"]]
    differing = set()
    for store in stores.zarr:
        template = copy.deepcopy(example)
        if store in stores.compressed:
            template["codecs"][0]["configuration"]["codecs"].insert(1, zstd)
        for name, metadata in store.arrays.items():
            layout = layout_of(name, store)
            expected = metadata_by_rule(template, places, layout)
            assert spell(metadata) == spell(expected), f"{store.path.name}: {name}"
            assert spell(store.json(f"{name}/zarr.json")) == spell(expected)
            for place in places:
                rest = [other for other in places if other != place]
                if spell(metadata_by_rule(template, rest, layout)) != spell(expected):
                    differing.add(place)
    assert differing == set(places)


def test_data_types_are_those_that_the_document_lists(stores: Stores) -> None:
    used = {metadata["data_type"] for store in stores.zarr for metadata in store.arrays.values()}
    assert [int(row["bytes"]) for row in PAGE.tables["Data types"]] == [
        np.dtype(name_of(row)).itemsize for row in PAGE.tables["Data types"]
    ]
    assert {name_of(row) for row in PAGE.tables["Data types"]} == used


def test_the_worked_example_of_a_shard_is_what_the_code_writes(tmp_path: Path) -> None:
    example = json.loads(PAGE.blocks["Array metadata"][0][1])
    layout = ArrayLayout("example", (3, 2), np.dtype(np.uint8), chunk_rows=1, shard_rows=4, axes=("row", "column"))
    assert layout.to_metadata() == example
    values = np.array([[0, 1], [10, 11], [20, 21]], np.uint8)
    dump = parse_hexdump(PAGE.block("Shards", "hexdump"))
    assert bytes(encode_shard(values, layout)) == dump
    (tmp_path / "example").mkdir()
    (tmp_path / "example" / "c.0.0").write_bytes(dump)
    (tmp_path / "example" / "zarr.json").write_text(json.dumps(example))
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "example", mode="r")[:], values)
    (tmp_path / "zarr.json").write_text(json.dumps({"consolidated_metadata": {"metadata": {"example": example}}}))
    np.testing.assert_array_equal(reader_of_the_document()(tmp_path, "example"), values)


def test_a_chunk_that_is_cut_short_is_filled_and_what_lies_past_the_end_is_marked(stores: Stores) -> None:
    images = next(store for store in stores.plain if store.identity.get("dtype") == "int8")
    data = (images.path / "cls/last" / "c.4.0").read_bytes()  # rows 64 to 71, in a chunk of 16
    assert len(data) == 16 * 96 * 2 + 4 + 16 + 4
    assert not any(data[8 * 96 * 2 : 16 * 96 * 2])
    index = struct.unpack("<32Q", (images.path / "features/last" / "c.4.0.0.0").read_bytes()[-260:-4])
    assert index[14:18] == (7 * 2308, 2308, 2**64 - 1, 2**64 - 1)
    assert set(index[16:]) == {2**64 - 1}


def test_crc32c_is_the_one_that_the_document_names() -> None:
    assert f"`{crc32c(b'123456789'):08x}`" in PAGE.text
