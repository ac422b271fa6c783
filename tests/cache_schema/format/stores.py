"""What lies in a store, read without the code under test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ZarrStore:
    """A store in a folder as a stranger finds it: JSON files and names, nothing parsed by the code under test."""

    path: Path

    def json(self, key: str) -> Any:
        return json.loads((self.path / key).read_bytes())

    @cached_property
    def root(self) -> dict[str, Any]:
        return self.json("zarr.json")

    @cached_property
    def attributes(self) -> dict[str, Any]:
        return self.root["attributes"]["headstart"]

    @property
    def kind(self) -> str:
        return self.attributes["kind"]

    @property
    def identity(self) -> dict[str, Any]:
        return self.attributes["identity"]

    @cached_property
    def nodes(self) -> dict[str, Any]:
        return self.root["consolidated_metadata"]["metadata"]

    @cached_property
    def arrays(self) -> dict[str, Any]:
        return {name: node for name, node in self.nodes.items() if node["node_type"] == "array"}

    @cached_property
    def receipts(self) -> dict[str, Any]:
        return {path.stem: json.loads(path.read_bytes()) for path in sorted((self.path / "receipts").iterdir())}

    @cached_property
    def ledger(self) -> list[Any]:
        return [json.loads(line) for line in (self.path / "ledger.jsonl").read_text().splitlines()]

    @cached_property
    def files(self) -> dict[str, Any]:
        return {key: stored for receipt in self.receipts.values() for key, stored in receipt["files"].items()}

    @cached_property
    def keys(self) -> list[str]:
        return [path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file()]


@dataclass(frozen=True)
class Stores:
    """Stores of every kind, plain, compressed and in HDF5."""

    plain: Sequence[ZarrStore]
    compressed: Sequence[ZarrStore]
    hdf5: Sequence[Path]

    @property
    def zarr(self) -> list[ZarrStore]:
        return [*self.plain, *self.compressed]

    def of_kind(self, kind: str) -> list[ZarrStore]:
        return [store for store in self.zarr if store.kind == kind]
