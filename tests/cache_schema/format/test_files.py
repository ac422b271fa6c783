"""The files, units, receipts and ledgers of a store are those of docs/cache-format.md."""

from __future__ import annotations

import re
from pathlib import Path

import xxhash

from tests.cache_schema.document import codes, name_faults, name_of
from tests.cache_schema.format.rules import PAGE, groups_of, sha256_of, shards_of, spell, units_of
from tests.cache_schema.format.stores import Stores, ZarrStore


def test_a_unit_owns_the_shards_that_the_document_gives_it(stores: Stores) -> None:
    listed = {(codes(row["unit"])[0], row["of"]) for row in PAGE.tables["Units"]}
    assert listed == {("static", "every store"), ("<number>", "image features"), ("<number>", "prompt features")}
    for store in stores.zarr:
        assert {unit: set(receipt["files"]) for unit, receipt in store.receipts.items()} == units_of(store)
        assert all(receipt["unit"] == unit for unit, receipt in store.receipts.items())
        each = store.identity.get("shard_rows", store.identity.get("unit_prompts"))
        num_rows = store.arrays["valid" if store.kind == "image_features" else "pooled"]["shape"][0] if each else 0
        for unit, receipt in store.receipts.items():
            first = 0 if unit == "static" else int(unit) * each
            assert receipt["rows"] == ([0, 0] if unit == "static" else [first, min(first + each, num_rows)])


def files_by_rule(store: ZarrStore, pattern: str) -> set[str]:
    """The keys of a store that a row of the table of files stands for."""
    names = {"<array>": store.arrays, "<group>": groups_of(store), "<unit>": units_of(store)}
    if pattern == "<array>/c.<place>":
        return {f"{name}/{key}" for name, metadata in store.arrays.items() for key in shards_of(metadata)}
    (placeholder,) = re.findall("<.*>", pattern) or [""]
    return {pattern.replace(placeholder, name) for name in names[placeholder]} if placeholder else {pattern}


def test_a_folder_holds_the_files_that_the_document_lists_and_no_others(stores: Stores) -> None:
    patterns = [name_of(row) for row in PAGE.tables["Files of a store"]]
    for store in stores.zarr:
        assert (
            name_faults(store.keys, set().union(*(files_by_rule(store, each) for each in patterns)), str(store)) == []
        )
        for pattern in patterns:
            rest = set().union(*(files_by_rule(store, each) for each in patterns if each != pattern))
            assert name_faults(store.keys, rest, str(store)), f"{pattern} could go unseen"


def test_receipts_and_manifest_say_what_lies_there(stores: Stores) -> None:
    for store in stores.zarr:
        for key, stored in store.files.items():
            data = (store.path / key).read_bytes()
            assert stored == {"num_bytes": len(data), "xxh3_128": xxhash.xxh3_128(data, seed=0).hexdigest()}
        digests = {key: stored["xxh3_128"] for key, stored in store.files.items()}
        assert store.json("manifest.json") == {
            "fingerprint": store.attributes["fingerprint"],
            "num_units": len(store.receipts),
            "num_files": len(store.files),
            "num_bytes": sum(stored["num_bytes"] for stored in store.files.values()),
            "num_failures": len(store.ledger),
            "digest": sha256_of(digests),
        }


def test_the_ledger_repeats_the_failures_of_the_receipts_in_order(stores: Stores, int8_images: Path) -> None:
    for store in stores.zarr:
        failures = [failure for receipt in store.receipts.values() for failure in receipt["failures"]]
        assert store.ledger == sorted(failures, key=lambda failure: failure["row"])
        lines = b"".join(spell(failure) + b"\n" for failure in store.ledger)
        assert (store.path / "ledger.jsonl").read_bytes() == lines
    assert [failure["row"] for failure in ZarrStore(int8_images).ledger] == [9, 10, 11]
