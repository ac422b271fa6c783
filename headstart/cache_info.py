"""What there is to know about stores, without reading their arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache_schema.errors import UsageError
from cache_schema.receipts import Receipt
from cache_schema.store import open_store, read_header
from headstart.stores import list_stores


def describe_stores(path: Path) -> list[dict[str, Any]]:
    """One description for the store at `path`, or for every store in the folder.

    Raises:
        UsageError: there is no store.
    """
    paths = [path] if path.name.endswith(".zarr") else list_stores(path)
    if not paths:
        raise UsageError(f"{path} holds no store; name the folder that `headstart extract` wrote to.")
    return [describe_store(store) for store in paths]


def describe_store(path: Path) -> dict[str, Any]:
    """Kind, fingerprint, origin, arrays, size and completeness of one store."""
    try:
        header, layouts = read_header(path)
        receipts = [Receipt.read(receipt) for receipt in sorted((path / "receipts").glob("*.json"))]
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


def _origin(description: dict[str, Any]) -> list[tuple[str, str]]:
    identity, recorded = description["identity"], description["recorded"]
    if description["kind"] == "samples":
        sources = ", ".join(f"{name} ({digest[:12]})" for name, digest in identity["sources"].items())
        return [("dataset", identity["dataset"]), ("sources", sources), ("splits", ", ".join(identity["splits"]))]
    encoder = identity["encoder"]
    origin = [
        ("encoder", f"{encoder['class']} from {', '.join(recorded['encoder'].values())}"),
        ("weights", encoder["weights"][:12]),
    ]
    if "preprocessing" in encoder:
        height, width = encoder["preprocessing"]["input_size"]
        origin += [("input size", f"{height} x {width}"), ("layers", ", ".join(encoder["layers"]))]
    return [*origin, ("libraries", ", ".join(f"{name} {version}" for name, version in recorded["libraries"].items()))]
