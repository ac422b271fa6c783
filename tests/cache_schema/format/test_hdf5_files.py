"""An HDF5 file holds what docs/cache-format.md lists, and nothing else."""

from __future__ import annotations

import json
import re
from typing import Any

import h5py
import numpy as np
from awscrt.checksums import crc32c

from tests.cache_schema.document import codes, name_faults, name_of
from tests.cache_schema.format.rules import PAGE
from tests.cache_schema.format.stores import Stores, ZarrStore


def datasets_by_rule(store: ZarrStore, pattern: str) -> set[str]:
    """The datasets that a row of the table stands for, for a store that is the same in a folder."""
    receipts = {f"receipts/{unit}.json" for unit in store.receipts}
    keys = {"zarr.json", "ledger.jsonl", "manifest.json", *receipts}
    names = {"<array>": set(store.arrays), "<key>": keys}
    (placeholder,) = re.findall("<.*>", pattern)
    return {pattern.replace(placeholder, name) for name in names[placeholder]}


def test_an_hdf5_file_holds_the_datasets_that_the_document_lists_and_no_others(stores: Stores) -> None:
    rows = {name_of(row): row for row in PAGE.tables["Datasets"]}
    plain = {store.path.stem: store for store in stores.plain}
    for path in stores.hdf5:
        same = plain[path.stem]
        rule_of = {name: rule for rule in rows for name in datasets_by_rule(same, rule)}
        with h5py.File(path) as file:
            nodes = nodes_of(file)
            found = {name: node for name, node in nodes.items() if isinstance(node, h5py.Dataset)}
            assert name_faults(found, rule_of, path.name) == []
            assert not any(node.attrs for node in [file, *nodes.values()] if isinstance(node, h5py.Group))
            for name, dataset in found.items():
                row = rows[rule_of[name]]
                metadata = same.arrays.get(name, {})
                kind = metadata["data_type"] if row["type"] == "the array's" else codes(row["type"])[0]
                labels = metadata["dimension_names"] if row["labels"] == "its axes" else [""] * dataset.ndim
                given = [] if row["attributes"] == "none" else codes(row["attributes"])
                assert dataset.dtype.name == kind, name
                assert [axis.label for axis in dataset.dims] == labels, name
                assert sorted(set(dataset.attrs) - {"DIMENSION_LABELS"}) == given, name
                assert dataset.chunks is None, name
                assert dataset.id.get_offset() is not None or not dataset.size, name


def test_the_checksums_of_an_hdf5_file_are_those_the_document_says(stores: Stores) -> None:
    for path in stores.hdf5:
        with h5py.File(path) as file:
            root = json.loads(file["headstart/files/zarr.json"][()].tobytes())
            for name, metadata in root["consolidated_metadata"]["metadata"].items():
                if metadata["node_type"] == "array":
                    values, chunk_rows = file[name][()], metadata["codecs"][0]["configuration"]["chunk_shape"][0]
                    chunks = [values[start : start + chunk_rows] for start in range(0, len(values), chunk_rows)]
                    assert file[f"headstart/crc32c/{name}"][()].tolist() == [crc32c(part.tobytes()) for part in chunks]
            for name, node in nodes_of(file["headstart/files"]).items():
                if isinstance(node, h5py.Dataset):
                    assert node.attrs["crc32c"].dtype == np.uint32
                    assert node.attrs["crc32c"] == crc32c(node[()].tobytes()), name


def test_an_hdf5_file_has_the_receipts_and_the_manifest_of_the_plain_store(stores: Stores) -> None:
    plain = {store.path.stem: store for store in stores.plain}
    for path in stores.hdf5:
        same = plain[path.stem]
        with h5py.File(path) as file:
            files = file["headstart/files"]
            assert json.loads(files["manifest.json"][()].tobytes()) == same.json("manifest.json")
            for unit, receipt in same.receipts.items():
                assert json.loads(files[f"receipts/{unit}.json"][()].tobytes()) == receipt


def nodes_of(group: Any) -> dict[str, Any]:
    nodes: dict[str, Any] = {}
    group.visititems(lambda name, node: nodes.update({name: node}))
    return nodes
