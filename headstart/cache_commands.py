"""The commands that look after stores: `headstart cache ...`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from cache_schema.atomic import parse_path
from headstart.command import Command, Json, Place, Wanting


@dataclass(frozen=True)
class CacheInfo:
    """What stores hold, where they come from, how large they are, and whether they are complete (exit code 1 if not).

    Example: headstart cache info demo/stores
    """

    path: Positional[Place] = "stores"
    """A store, or a folder of stores."""
    json: Json = False

    def run(self) -> Any:
        from headstart.cache_info import describe_stores, print_description

        described = describe_stores(parse_path(self.path))
        for description in described:
            print_description(description)
        complete = all(description["complete"] for description in described)
        return {"stores": described} if complete else Wanting(stores=described)


@dataclass(frozen=True)
class CacheList:
    """One line for each store of a folder: what it is, how large, and whether it is complete.

    Example: headstart cache list demo/stores
    """

    path: Positional[Place] = "stores"
    """A folder of stores."""
    json: Json = False

    def run(self) -> Any:
        from headstart.cache_info import describe_stores, stores_table

        described = describe_stores(parse_path(self.path))
        print(stores_table(described))
        return {"stores": described}


@dataclass(frozen=True)
class CacheVerify:
    """Check every byte of stores against what was written; exit code 1 if any differs, with every damaged file named.

    Example: headstart cache verify demo/stores --sample 0.1
    """

    path: Positional[Place] = "stores"
    """A store, or a folder of stores."""
    sample: float = 1.0
    """Share of the shards to read, drawn at random; metadata, receipts and sizes are always checked."""
    seed: int = 0
    """Which shards a sample takes."""
    threads: int | None = None
    """How many shards are read at a time; by default one for each core."""
    json: Json = False

    def run(self) -> Any:
        from headstart.cache_care import verify_all

        found = verify_all(parse_path(self.path), sample=self.sample, seed=self.seed, threads=self.threads)
        for verification in found:
            print(verification.summary())
            for damage in verification.damages:
                print(f"  {damage.key}: {damage.reason}")
        result = {"stores": [verification.to_dict() for verification in found]}
        return result if all(verification.is_sound for verification in found) else Wanting(result)


@dataclass(frozen=True)
class CacheRepair:
    """Extract again what is damaged or missing in a feature store, and nothing else.

    Example: headstart cache repair demo/stores/image_features-0123456789ab.zarr
    """

    path: Positional[Path]
    """A feature store that ends in .zarr."""
    samples: Place | None = None
    """The samples store it was made from, if it is no longer where it was."""
    image_dir: Path | None = None
    """Where the images lie, if they were moved."""
    device: str = "auto"
    """Where the encoder runs; the one that ran it first gives the same bits again."""
    json: Json = False

    def run(self) -> Any:
        from headstart.cache_care import repair

        samples = None if self.samples is None else parse_path(self.samples)
        repaired = repair(self.path, samples=samples, image_dir=self.image_dir, device=self.device)
        print(repaired.summary())
        for key in repaired.damaged:
            print(f"  {key}")
        return repaired.to_dict()


@dataclass(frozen=True)
class CacheConvert:
    """Write a store again in another container or with other compression, every value to the bit.

    Example: headstart cache convert demo/stores/image_features-0123456789ab.zarr --to hdf5
    """

    path: Positional[Place]
    """A store."""
    to: Literal["zarr", "hdf5"]
    """The container: a folder (or remote prefix) of shards, or one HDF5 file."""
    out: Place | None = None
    """Folder for the new store; by default the one the store is in. s3://bucket/folder and the like work too."""
    zstd: int | None = None
    """Compress the chunks of a zarr store at this zstd level (1 to 22). Smaller by a little, slower by far."""
    json: Json = False

    def run(self) -> Any:
        from headstart.cache_care import convert

        path = parse_path(self.path)
        out = path.parent if self.out is None else parse_path(self.out)
        written = convert(path, out, self.to, self.zstd)
        print(f"{path} -> {written}")
        return {"path": str(written)}


@dataclass(frozen=True)
class CacheGc:
    """Show what may be cleared away under a folder of stores, and how much it is; with --yes, remove it.

    Stores whose job never finished, files that killed jobs left in the making and, with --runs, stores that no run
    uses. What was changed within the last hour is left alone.

    Example: headstart cache gc stores --runs runs --yes
    """

    path: Positional[Path] = Path("stores")
    """A folder of stores."""
    runs: Path | None = None
    """Folder of run folders: stores that none of them was trained on go too."""
    idle_minutes: float = 60
    """What was changed less than so many minutes ago may belong to a job at work, and stays."""
    yes: bool = False
    """Remove what was found."""
    json: Json = False

    def run(self) -> Any:
        from headstart.cache_care import clear, find_garbage

        garbage = find_garbage(self.path, self.runs, idle_s=60 * self.idle_minutes)
        for item in garbage:
            print(f"{item.num_bytes / 1e6:12.1f} MB  {item.path}: {item.reason}")
        total = sum(item.num_bytes for item in garbage)
        if self.yes:
            clear(garbage)
        did = "removed" if self.yes else "may be removed; add --yes to do it"
        print(f"{total / 1e6:12.1f} MB in {len(garbage)} places {did}" if garbage else "nothing to clear away")
        return {"garbage": [item.to_dict() for item in garbage], "num_bytes": total, "removed": self.yes}


CACHE_COMMANDS: dict[str, type[Command]] = {
    "info": CacheInfo,
    "list": CacheList,
    "verify": CacheVerify,
    "repair": CacheRepair,
    "convert": CacheConvert,
    "gc": CacheGc,
}
