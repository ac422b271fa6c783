"""Unknown fields and other versions are met as docs/cache-format.md says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache_schema import SCHEMA_VERSION
from cache_schema.errors import DamagedStoreError, UsageError
from cache_schema.store import open_store
from tests.cache_schema.document import Row, name_of
from tests.cache_schema.format.rules import PAGE, sha256_of
from tests.cache_schema.format.stores import ZarrStore


def edit(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_bytes())
    change(value)
    path.write_text(json.dumps(value))


def add_unknown_field(store: ZarrStore, where: str) -> None:
    """Give one object of a store, and the digests above it, a field that no document lists."""
    receipt = store.path / "receipts" / "000000.json"
    if where == "receipt":
        edit(receipt, lambda value: value.update(surplus=1))
    elif where == "stored file":
        edit(receipt, lambda value: value["files"]["valid/c.0"].update(surplus=1))
    elif where == "failure":
        edit(receipt, lambda value: value["failures"][0].update(surplus=1))
    elif where == "manifest":
        edit(store.path / "manifest.json", lambda value: value.update(surplus=1))
    else:
        root = store.root
        about, nodes = store.attributes, store.nodes
        target = {"attributes": about, "recorded": about["recorded"], "identity": about["identity"]}
        target.get(where, nodes["valid"])["surplus"] = 1
        about["metadata_sha256"] = sha256_of(nodes)
        about["fingerprint"] = sha256_of({key: about[key] for key in ("schema_version", "kind", "identity")})
        (store.path / "zarr.json").write_text(json.dumps(root))
        edit(store.path / "manifest.json", lambda value: value.update(fingerprint=about["fingerprint"]))


def test_the_document_says_of_every_object_what_becomes_of_an_unknown_field() -> None:
    objects = {"attributes", "identity", "recorded", "receipt", "stored file", "failure", "manifest", "array metadata"}
    assert {name_of(row) for row in PAGE.tables["Versions"]} == objects


@pytest.mark.parametrize("row", PAGE.tables["Versions"], ids=name_of)
def test_a_field_that_the_document_does_not_list_is_read_or_refused_as_it_says(
    small_store: ZarrStore, row: Row
) -> None:
    open_store(small_store.path).close()
    add_unknown_field(small_store, name_of(row))
    if row["with an unknown field"] == "refused":
        with pytest.raises(DamagedStoreError):
            open_store(small_store.path)
    else:
        assert row["with an unknown field"].startswith("read, ")
        assert open_store(small_store.path).read("valid").shape == (72,)


@pytest.mark.parametrize("version", [SCHEMA_VERSION - 1, SCHEMA_VERSION + 1])
def test_a_store_of_another_version_is_refused_by_name(small_store: ZarrStore, version: int) -> None:
    edit(small_store.path / "zarr.json", lambda root: root["attributes"]["headstart"].update(schema_version=version))
    with pytest.raises(UsageError, match=rf"schema version {version}; this one reads {SCHEMA_VERSION}"):
        open_store(small_store.path)
