"""The rules of docs/cache-format.md, applied: what they say of a store, for comparing with what lies there."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import zarr

from cache_schema.features import ImageFeatures
from tests.cache_schema.document import DOCUMENT, name_of, parse_document
from tests.cache_schema.format.stores import ZarrStore

PAGE = parse_document(DOCUMENT.read_text())

KINDS = {"samples": "samples", "image_features": "image features", "prompt_features": "prompt features"}
"""What the headings call the stores of a kind."""


def shards_of(metadata: Mapping[str, Any]) -> list[str]:
    """The files of an array's shards, as the document names them."""
    rows, rank = metadata["shape"][0], len(metadata["shape"])
    shard_rows = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
    return [".".join(["c", str(shard)] + ["0"] * (rank - 1)) for shard in range(-(-rows // shard_rows))]


def groups_of(store: ZarrStore) -> set[str]:
    return {str(parent) for name in store.arrays for parent in PurePosixPath(name).parents} - {"."}


def units_of(store: ZarrStore) -> dict[str, set[str]]:
    """The files of every unit of a store, by the rules of the document's table of units."""
    whole = {name_of(row) for row in PAGE.tables[f"Arrays of {KINDS[store.kind]}"] if row["chunk"] == "whole"}
    whole |= {name for name in store.arrays if name.startswith("sample/tag/")}
    units = {
        "static": {f"{name}/{key}" for name in whole & store.arrays.keys() for key in shards_of(store.arrays[name])}
    }
    if store.kind == "image_features":
        for name in store.arrays.keys() - whole:
            for unit, key in enumerate(shards_of(store.arrays[name])):
                units.setdefault(f"{unit:06d}", set()).add(f"{name}/{key}")
    elif store.kind == "prompt_features":
        each, step = store.identity["unit_prompts"], store.identity["shard_tokens"]
        offsets = zarr.open_array(store.path / "offsets", mode="r")[:]
        for unit, key in enumerate(shards_of(store.arrays["pooled"])):
            first, last = offsets[unit * each], offsets[min((unit + 1) * each, len(offsets) - 1)]
            begun = [
                shard for number, shard in enumerate(shards_of(store.arrays["tokens"])) if first <= number * step < last
            ]
            units[f"{unit:06d}"] = {f"pooled/{key}", *(f"tokens/{shard}" for shard in begun)}
    return units


def spell(value: Any) -> bytes:
    """Canonical JSON, by the line of Python in the document."""
    (line,) = re.findall(r"^In Python: `(.*)`\.$", PAGE.text, re.MULTILINE)
    return eval(line, {"json": json, "value": value})


def sha256_of(value: Any) -> str:
    return hashlib.sha256(spell(value)).hexdigest()


def digest_of_list(strings: Sequence[str]) -> str:
    return hashlib.sha256(b"".join(spell(string) + b"\n" for string in strings)).hexdigest()


def rows_by_image(images: ImageFeatures) -> list[list[int]]:
    """The rows of each image: a new one begins where the id changes."""
    groups: list[list[int]] = []
    for row, image in enumerate(images.ids):
        if row == 0 or image != images.ids[row - 1]:
            groups.append([])
        groups[-1].append(row)
    return groups


def snippet(heading: str, **names: Any) -> dict[str, Any]:
    """The names that a snippet of the document leaves behind."""
    exec(compile(PAGE.block(heading, "python"), heading, "exec"), names)
    return names


def reader_of_the_document() -> Callable[[Path, str], Any]:
    return snippet("With NumPy and a crc32c")["read_array"]
