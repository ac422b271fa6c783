"""The tables of docs/cache-format.md and the stores that the code writes name the same things, both ways."""

from __future__ import annotations

import copy
import json
import re
from typing import Any, get_args

import pytest

from cache_schema import SCHEMA_VERSION
from cache_schema.store import StoreKind
from tests.cache_schema.document import OPTIONAL, FoundArrays, Row, array_faults, codes, fits, name_of, object_faults
from tests.cache_schema.format.rules import KINDS, PAGE
from tests.cache_schema.format.stores import Stores

OBJECTS = (
    "Root metadata",
    "Group metadata",
    "Attributes",
    *(f"Identity of {name}" for name in KINDS.values()),
    "Image encoder",
    "Text encoder",
    "Recorded of samples",
    "Recorded of features",
    "Receipts",
    "Stored files",
    "Failures",
    "The manifest",
)
ARRAYS = tuple(f"Arrays of {name}" for name in KINDS.values())
OTHERS = (
    *("Data types", "Field types", "Kinds of store", "Files of a store", "Views", "What the encoder sees"),
    "Array metadata",
    *("Canonical JSON", "Units", "Datasets", "Versions"),
)


def objects_of(stores: Stores, heading: str) -> list[tuple[str, Any]]:
    """Every object that a table describes, with the place where it was found."""
    found: list[tuple[str, Any]] = []
    for store in stores.zarr:
        name, attributes = store.path.name, store.attributes
        if heading == "Root metadata":
            found.append((name, store.root))
        elif heading == "Group metadata":
            groups = [key for key, node in store.nodes.items() if node["node_type"] == "group"]
            found += [(f"{name}/{key}", store.json(f"{key}/zarr.json")) for key in groups]
        elif heading == "Attributes":
            found.append((name, attributes))
        elif heading == f"Identity of {KINDS[store.kind]}":
            found.append((name, store.identity))
        elif heading == {"image_features": "Image encoder", "prompt_features": "Text encoder"}.get(store.kind):
            found.append((name, store.identity["encoder"]))
        elif heading == ("Recorded of samples" if store.kind == "samples" else "Recorded of features"):
            found.append((name, attributes["recorded"]))
        elif heading == "The manifest":
            found.append((name, store.json("manifest.json")))
        elif heading == "Failures":
            found += [(f"the ledger of {name}", line) for line in store.ledger]
        for unit, receipt in store.receipts.items():
            where = f"receipt {unit} of {name}"
            if heading == "Receipts":
                found.append((where, receipt))
            elif heading == "Stored files":
                found += [(f"{where}, {key}", stored) for key, stored in receipt["files"].items()]
            elif heading == "Failures":
                found += [(where, failure) for failure in receipt["failures"]]
    return found


def arrays_of(stores: Stores, heading: str) -> list[FoundArrays]:
    """The arrays of every store that a table describes."""
    return [
        FoundArrays(store.path.name, store.identity, store.arrays)
        for store in stores.zarr
        if heading == f"Arrays of {KINDS[store.kind]}"
    ]


def test_every_table_of_the_document_is_compared_with_something() -> None:
    assert PAGE.tables.keys() == {*OBJECTS, *ARRAYS, *OTHERS}


@pytest.mark.parametrize("heading", OBJECTS)
def test_json_objects_have_the_fields_that_the_document_lists_and_no_others(stores: Stores, heading: str) -> None:
    objects = objects_of(stores, heading)
    assert objects
    assert object_faults(PAGE.tables[heading], objects, heading) == []


@pytest.mark.parametrize("heading", ARRAYS)
def test_arrays_are_those_that_the_document_lists_with_their_types_axes_shapes_and_chunks(
    stores: Stores, heading: str
) -> None:
    found = arrays_of(stores, heading)
    assert found
    assert array_faults(PAGE.tables[heading], found, heading) == []


@pytest.mark.parametrize("heading", OBJECTS)
def test_a_field_that_is_in_the_code_alone_or_in_the_document_alone_is_named(stores: Stores, heading: str) -> None:
    rows, objects = list(PAGE.tables[heading]), objects_of(stores, heading)
    for row in rows:
        without = [other for other in rows if other != row]
        assert any(f"holds `{name_of(row)}`" in fault for fault in object_faults(without, objects, heading)), row
    for kind in ("string", f"string{OPTIONAL}"):
        surplus = [*rows, {"field": "`surplus`", "type": f"`{kind}`"}]
        assert any("`surplus`, which" in fault for fault in object_faults(surplus, objects, heading))
    where, value = copy.deepcopy(objects[0])
    value["surplus"] = "?"
    assert f"{where} ({heading}) holds `surplus`, which the document does not list" in object_faults(
        rows, [(where, value), *objects], heading
    )


@pytest.mark.parametrize("heading", ARRAYS)
def test_an_array_that_is_in_the_code_alone_or_in_the_document_alone_is_named(stores: Stores, heading: str) -> None:
    rows, found = list(PAGE.tables[heading]), arrays_of(stores, heading)
    for row in rows:
        without = [other for other in rows if other != row]
        assert any("does not list" in fault for fault in array_faults(without, found, heading)), row
        for column, value in (("type", "`complex64`"), ("axes", "`axis`"), ("chunk", "7"), ("shape", "`(3)`")):
            changed = [{**other, column: value} if other == row else other for other in rows]
            assert array_faults(changed, found, heading), f"{column} of {name_of(row)}"
    surplus: Row = {**rows[-1], "array": "`surplus`", "when": "always"}
    assert any("lacks the array `surplus`" in fault for fault in array_faults([*rows, surplus], found, heading))


def test_array_names_are_spelled_as_the_document_says(stores: Stores) -> None:
    assert "are made of ASCII letters, digits, `_`, `-`, `+` and `.`." in PAGE.text
    names = {name for store in stores.zarr for name in store.arrays}
    assert "features/2+norm" in names
    assert all(re.fullmatch(r"[A-Za-z0-9_.+-]+(/[A-Za-z0-9_.+-]+)*", name) for name in names)


def test_field_types_are_those_that_the_document_explains() -> None:
    explained = {kind for row in PAGE.tables["Field types"] for cell in codes(row["type"]) for kind in cell.split(", ")}
    assert OPTIONAL.removeprefix(", ") in explained
    for heading in OBJECTS:
        for row in PAGE.tables[heading]:
            kind = row["type"].strip("`").removesuffix(OPTIONAL)
            while " of " in kind:
                container, _, kind = kind.partition(" of ")
                assert f"{container} of T" in explained
            assert "T or U" in explained
            for either in kind.split(" or "):
                assert either in explained or fits(either, json.loads(either)), kind


def test_stores_are_of_the_kinds_that_the_document_lists(stores: Stores) -> None:
    listed = {name_of(row) for row in PAGE.tables["Kinds of store"]}
    assert listed == set(get_args(StoreKind)) == {store.kind for store in stores.zarr} == set(KINDS)


def test_a_store_is_named_after_its_kind_and_fingerprint(stores: Stores) -> None:
    (digits,) = re.findall(r"are the first (\d+) digits", PAGE.text)
    for store in stores.zarr:
        assert store.path.name == f"{store.kind}-{store.attributes['fingerprint'][: int(digits)]}.zarr"
    stems = {store.path.stem for store in stores.zarr}
    assert {path.suffix for path in stores.hdf5} == {".h5"}
    assert {path.stem for path in stores.hdf5} <= stems


def test_links_inside_the_document_lead_to_a_heading() -> None:
    headings = re.findall(r"^#+ (.*)$", PAGE.text, re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    links = set(re.findall(r"\]\(#([^)]*)\)", PAGE.text))
    assert links
    assert links <= slugs


def test_the_document_describes_the_version_that_the_code_writes() -> None:
    assert f"This page describes schema version `{SCHEMA_VERSION}`." in PAGE.text
