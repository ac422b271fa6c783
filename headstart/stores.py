"""Where the stores of a job lie: found under a folder, named one by one, or remembered by a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from cache_schema.atomic import StorePath, parse_path
from cache_schema.errors import UsageError
from cache_schema.features import FeatureCache, open_cache
from cache_schema.hdf5 import SUFFIX as HDF5_SUFFIX
from cache_schema.store import ZARR_SUFFIX, StoreKind, absolute_path, relative_paths

STORE_SUFFIXES = (ZARR_SUFFIX, HDF5_SUFFIX)


@dataclass(frozen=True)
class StorePaths:
    """One store of each kind, and where the image files lie if they were moved."""

    samples: StorePath
    images: StorePath
    prompts: StorePath
    image_dir: Path | None = None

    def open(self) -> FeatureCache:
        """Join the three stores.

        Raises:
            UsageError: a store is missing, incomplete or does not match the others.
        """
        return open_cache(self.samples, self.images, self.prompts, self.image_dir)


def find_stores(
    folder: StorePath,
    *,
    samples: StorePath | None = None,
    images: StorePath | None = None,
    prompts: StorePath | None = None,
    image_dir: Path | None = None,
) -> StorePaths:
    """The stores that are named, and for those that are not, the only one of its kind under `folder`.

    Raises:
        UsageError: a store is not named, and the folder holds none or several of its kind.
    """
    named = {"samples": samples, "image_features": images, "prompt_features": prompts}
    options = {"samples": "--samples", "image_features": "--images", "prompt_features": "--prompts"}
    found = {kind: named[kind] or _only_store(folder, kind, options[kind]) for kind in get_args(StoreKind)}
    return StorePaths(found["samples"], found["image_features"], found["prompt_features"], image_dir)


def find_samples(path: StorePath) -> StorePath:
    """The samples store at `path`, or the only one in that folder.

    Raises:
        UsageError: there is none, or more than one.
    """
    is_store = path.suffix in STORE_SUFFIXES
    return path if is_store else _only_store(path, "samples", "its own path instead of the folder's")


def list_stores(folder: StorePath) -> list[StorePath]:
    """Every store under a folder, complete or not.

    Raises:
        UsageError: the folder is missing.
    """
    if not folder.is_dir():
        raise UsageError(
            f"no folder at {folder}; name one with stores, as `headstart prepare` and `headstart extract` write them."
        )
    found = {path.name for kind in get_args(StoreKind) for path in folder.glob(f"{kind}-*")}
    return [folder / name for name in sorted(found) if name.endswith(STORE_SUFFIXES)]


def find_all(path: StorePath) -> list[StorePath]:
    """The store at `path`, or every store in that folder.

    Raises:
        UsageError: there is none.
    """
    paths = [path] if path.suffix in STORE_SUFFIXES else list_stores(path)
    if not paths:
        raise UsageError(f"{path} holds no store; name the folder that `headstart extract` wrote to.")
    return paths


def record_stores(paths: StorePaths, run_dir: Path) -> dict[str, str]:
    """Store paths relative to a run folder, so that both may be moved together."""
    named = {"samples": paths.samples, "images": paths.images, "prompts": paths.prompts}
    local = {name: path for name, path in named.items() if isinstance(path, Path)}
    remote = {name: str(path) for name, path in named.items() if not isinstance(path, Path)}
    return {**relative_paths(local, run_dir), **remote}


def stores_of_run(run_dir: Path) -> StorePaths:
    """The stores a run was trained on.

    Raises:
        UsageError: the folder is no run folder.
    """
    from heads.runs import read_run_config  # slow to import, and most have no run

    recorded = read_run_config(run_dir, "store_paths")["store_paths"]
    samples, images, prompts = (_recorded_store(run_dir, recorded[name]) for name in ("samples", "images", "prompts"))
    return StorePaths(samples, images, prompts)


def _recorded_store(run_dir: Path, recorded: str) -> StorePath:
    path = parse_path(recorded)
    return absolute_path(recorded, run_dir) if isinstance(path, Path) else path


def _only_store(folder: StorePath, kind: str, option: str) -> StorePath:
    of_kind = [path for path in list_stores(folder) if path.name.startswith(kind)]
    found = list({path.stem: path for path in of_kind}.values())  # one store in two containers is one store
    if not found:
        job = "prepare" if kind == "samples" else "extract"
        raise UsageError(f"{folder} holds no store of {kind}; make one with `headstart {job}`, or name another folder.")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UsageError(f"{folder} holds {len(found)} stores of {kind} ({names}); name one by {option}.")
    return found[0]
