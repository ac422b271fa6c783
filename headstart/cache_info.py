"""What there is to know about stores, without reading their arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from cache_schema.atomic import StorePath
from cache_schema.errors import UsageError
from cache_schema.store import StoreHeader, open_container, open_store
from headstart.stores import find_all

_ROWS_OF = {"samples": "sample/no_target", "image_features": "valid", "prompt_features": "pooled"}
"""An array with as many rows as the store has samples, views or prompts."""


def describe_stores(path: StorePath) -> list[dict[str, Any]]:
    """One description for the store at `path`, or for every store in the folder.

    Raises:
        UsageError: there is no store.
    """
    return [describe_store(store) for store in find_all(path)]


def describe_store(path: StorePath) -> dict[str, Any]:
    """Kind, fingerprint, origin, arrays, size and completeness of one store."""
    try:
        container = open_container(path)
        header, layouts = StoreHeader.parse(container.read_bytes("zarr.json"), path)
        receipts = [container.receipt(name) for name in container.receipt_names()]
    except UsageError as error:
        return {"path": str(path), "kind": None, "complete": False, "problem": str(error)}
    problem = None
    try:
        open_store(path).close()
    except UsageError as error:
        problem = str(error)
    arrays = {
        name: {"shape": list(layout.shape), "dtype": layout.dtype.name, "shard_rows": layout.shard_rows}
        for name, layout in sorted(layouts.items())
    }
    identity = dict(header.identity)
    identity.pop("arrays", None)
    return {
        "path": str(path),
        "kind": header.kind,
        "fingerprint": header.fingerprint,
        "complete": problem is None,
        "problem": problem,
        "num_bytes": sum(stored.num_bytes for receipt in receipts for stored in receipt.files.values()),
        "num_files": sum(len(receipt.files) for receipt in receipts),
        "failures": [
            {"id": failure.id, "reason": failure.reason} for receipt in receipts for failure in receipt.failures
        ],
        "arrays": arrays,
        "num_rows": layouts[_ROWS_OF[header.kind]].num_rows,
        "identity": identity,
        "recorded": header.recorded,
    }


def print_description(description: dict[str, Any]) -> None:
    """The description of one store, for people."""
    print(f"{description['path']}")
    if description["kind"] is None:
        print(f"  NOT READABLE: {description['problem']}")
        return
    print(f"  {description['kind']}, fingerprint {description['fingerprint']}")
    print(f"  {description['num_bytes'] / 1e6:.1f} MB in {description['num_files']} files")
    print(f"  {'complete' if description['complete'] else 'NOT COMPLETE: ' + description['problem']}")
    for key, text in _origin(description):
        print(f"  {key}: {text}")
    for name, array in description["arrays"].items():
        shape = " x ".join(map(str, array["shape"]))
        print(f"    {name:24} {shape:>22}  {array['dtype']}")
    failures = description["failures"]
    print(f"  {len(failures)} failures" + "".join(f"\n    {f['id']}: {f['reason']}" for f in failures[:10]))


def stores_table(described: Sequence[dict[str, Any]]) -> str:
    """One line for each store, for people."""
    lines = [f"{'store':36} {'rows':>9} {'MB':>10}  {'from':28} state"]
    for store in described:
        name = PurePath(store["path"]).name
        if store["kind"] is None:
            lines.append(f"{name:36} {'-':>9} {'-':>10}  {'-':28} not readable")
            continue
        origin = store["identity"].get("dataset") or store["recorded"]["encoder"]
        failures = f", {len(store['failures'])} failures" if store["failures"] else ""
        state = ("complete" if store["complete"] else "NOT COMPLETE") + failures
        lines.append(f"{name:36} {store['num_rows']:>9} {store['num_bytes'] / 1e6:>10.1f}  {origin:28} {state}")
    return "\n".join(lines)


def _origin(description: dict[str, Any]) -> list[tuple[str, str]]:
    identity, recorded = description["identity"], description["recorded"]
    if description["kind"] == "samples":
        sources = ", ".join(f"{name} ({digest[:12]})" for name, digest in identity["sources"].items())
        return [("dataset", identity["dataset"]), ("sources", sources), ("splits", ", ".join(identity["splits"]))]
    encoder = identity["encoder"]
    origin = [
        ("encoder", f"{encoder['class']} from {recorded['encoder']}"),
        ("weights", encoder["weights"][:12] + (f", adapter {encoder['adapter'][:12]}" if encoder["adapter"] else "")),
        ("computed in", encoder["compute_dtype"]),
    ]
    if "preprocessing" in encoder:
        height, width = encoder["preprocessing"]["input_size"]
        aspect, outputs = encoder["preprocessing"]["aspect"], identity["outputs"]
        origin += [("input size", f"{height} x {width}, {aspect}"), ("layers", ", ".join(outputs["layers"]) or "none")]
        if outputs["attention"]:
            origin.append(("attention", ", ".join(outputs["attention"])))
        origin.append(("views", ", ".join(identity["views"])))
    return [*origin, ("libraries", ", ".join(f"{name} {version}" for name, version in recorded["libraries"].items()))]
