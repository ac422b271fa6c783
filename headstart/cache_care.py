"""Keeping stores well: verify them, repair them, convert them, and clear away what nobody needs."""

from __future__ import annotations

import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cache_schema import atomic
from cache_schema.atomic import TEMPORARY_SUFFIX, StorePath
from cache_schema.convert import ContainerName, Progress, convert_store
from cache_schema.errors import DamagedStoreError, UsageError
from cache_schema.receipts import Manifest
from cache_schema.store import ZARR_SUFFIX, is_complete, read_header, recorded_path
from cache_schema.verify import Damage, Verification, verify_store
from extract.image_job import ImageJobConfig, extract_images
from extract.prompt_job import PromptJobConfig, extract_prompts
from heads.runs import read_run_config
from headstart.encoders import load_image_encoder_of_store, load_text_encoder_of_store
from headstart.stores import find_all, list_stores


@dataclass(frozen=True)
class Repair:
    """What a repair found and did.

    Args:
        damaged: keys of the files that were not what was written.
        num_encoded: rows that were extracted again.
        digest_before, digest_after: the manifest's digest over all files; None if no manifest could be read.
    """

    path: Path
    damaged: tuple[str, ...]
    num_encoded: int
    digest_before: str | None
    digest_after: str

    def summary(self) -> str:
        """One sentence for people."""
        if not self.damaged:
            return f"nothing to repair: every file of {self.path.name} is what was written"
        files = "1 file" if len(self.damaged) == 1 else f"{len(self.damaged)} files"
        did = f"repaired {files} of {self.path.name}, extracting {self.num_encoded} rows again"
        if self.digest_before is None:
            return f"{did}; its manifest was lost, so nothing says whether the digests are what they were"
        if self.digest_before == self.digest_after:
            return f"{did}; every digest is what it was"
        return f"{did}; some digests differ from the former ones: another machine or library gives other last bits"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True)
class Garbage:
    """Something that may be cleared away: how much it holds, and why nobody needs it."""

    path: Path
    num_bytes: int
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return {"path": str(self.path), "num_bytes": self.num_bytes, "reason": self.reason}


def verify(path: StorePath, *, sample: float = 1.0, seed: int = 0, threads: int | None = None) -> Verification:
    """Check a store's metadata, receipts and digests, with a progress bar."""
    with _bar(f"verifying {path.name}", "B", unit_scale=True) as progress:
        return verify_store(path, sample=sample, seed=seed, threads=threads, progress=progress)


def verify_all(
    path: StorePath, *, sample: float = 1.0, seed: int = 0, threads: int | None = None
) -> list[Verification]:
    """Check the store at `path`, or every store in that folder; one that cannot be opened hides no other."""
    paths = find_all(path)
    if paths == [path]:
        return [verify(path, sample=sample, seed=seed, threads=threads)]
    found = []
    for store in paths:
        try:
            read_header(store)
        except UsageError as error:
            found.append(Verification(store, 0, 0, 0, (Damage("zarr.json", str(error)),)))
        else:
            found.append(verify(store, sample=sample, seed=seed, threads=threads))
    return found


def convert(path: StorePath, out: StorePath, container: ContainerName, zstd_level: int | None = None) -> StorePath:
    """Write a store again in another container, with a progress bar."""
    with _bar(f"converting {path.name}", "shard") as progress:
        return convert_store(path, out, container, zstd_level=zstd_level, progress=progress)


def pack_hdf5(path: StorePath) -> StorePath:
    """The store at `path` as an HDF5 file beside it, in its place; a store that is one already stays as it is."""
    folder = path.with_suffix(ZARR_SUFFIX)
    packed = convert(path, path.parent, "hdf5") if path == folder else path
    atomic.remove(folder / "manifest.json")
    atomic.remove(folder)
    return packed


def repair(
    path: Path, *, samples: StorePath | None = None, image_dir: Path | None = None, device: str = "auto"
) -> Repair:
    """Extract again what is damaged or missing in a feature store, and nothing else.

    Encoder and samples are those that the store records; if they are no longer what the store was made with, nothing
    is touched.

    Args:
        samples: the samples store, if it is no longer where it was.
        image_dir: where the images lie, if they were moved.

    Raises:
        UsageError: the store is no feature store in zarr, or its encoder or samples cannot be had.
        StoreMismatchError: what would be extracted is another store.
        DamagedStoreError: the root metadata is damaged, so that nothing says what the store was made with.
    """
    if path.suffix != ZARR_SUFFIX:
        raise UsageError(
            f"{path} is no folder that ends in {ZARR_SUFFIX}; convert the store to zarr, or make it again."
        )
    header, _ = read_header(path)
    if header.kind == "samples":
        raise UsageError(f"{path} holds samples: remove it and run the `headstart prepare` that made it again.")
    found, before = verify(path), _manifest_digest(path)
    damaged = tuple(damage.key for damage in found.damages)
    if not damaged and before is not None:
        return Repair(path, (), 0, before, before)
    samples = samples or recorded_path(header, path, "samples")
    if samples is None:
        raise UsageError(f"{path} does not say where its samples store is; name it with --samples.")
    identity, out, batch_size = header.identity, path.parent, header.recorded["batch_size"]
    if header.kind == "image_features":
        extraction = extract_images(
            ImageJobConfig(
                samples, out, image_dir, identity["dtype"], batch_size, identity["shard_rows"], identity["views"]
            ),
            load_image_encoder_of_store(path, header, device),
            repair=path,
        )
    else:
        extraction = extract_prompts(
            PromptJobConfig(
                samples, out, identity["dtype"], batch_size, identity["unit_prompts"], identity["shard_tokens"]
            ),
            load_text_encoder_of_store(path, header, device),
            repair=path,
        )
    after = _manifest_digest(path)
    assert after is not None
    return Repair(path, damaged, extraction.num_encoded, before, after)


def find_garbage(folder: Path, runs: Path | None = None, *, idle_s: float = 3600) -> list[Garbage]:
    """What may be cleared away under a folder of stores.

    Stores whose job never finished, files that a killed job left in the making and, if `runs` is given, feature stores
    that no run under it was trained on and samples stores that neither a run nor a feature store that stays was made
    from. Whatever was changed less than `idle_s` seconds ago may belong to a job that is at work, and is left alone.

    Raises:
        UsageError: a folder is missing.
    """
    stores = [store for store in list_stores(folder) if isinstance(store, Path)]
    unfinished = [store for store in stores if store.is_dir() and not (store / "manifest.json").is_file()]
    garbage = dict.fromkeys(unfinished, "its job has not finished")
    leftovers = folder.rglob(f".*{TEMPORARY_SUFFIX}")
    outside = [path for path in leftovers if not any(path.is_relative_to(store) for store in unfinished)]
    garbage |= dict.fromkeys(outside, "a killed job left it in the making")
    if runs is not None:
        used = _used_by_runs(runs)
        complete = [store for store in stores if is_complete(store)]  # a damaged one is for repair
        headers = {store: read_header(store)[0] for store in complete}
        features = [store for store in complete if headers[store].kind != "samples"]
        unused = [store for store in features if headers[store].fingerprint not in used]
        garbage |= dict.fromkeys(unused, f"no run under {runs} uses it")
        sources = {recorded_path(headers[store], store, "samples") for store in features if store not in unused}
        garbage |= {
            store: f"no run under {runs} and no other store uses it"
            for store in complete
            if headers[store].kind == "samples"
            and headers[store].fingerprint not in used
            and store.stem not in {source.stem for source in sources if source is not None}
        }
    now = time.time()
    measured = [(path, reason, *_size_and_age(path)) for path, reason in garbage.items()]
    return [
        Garbage(path, num_bytes, reason) for path, reason, num_bytes, changed in measured if now - changed >= idle_s
    ]


def clear(garbage: Sequence[Garbage]) -> None:
    """Remove what was found. A store that is cut off in the middle of it is an incomplete one, and found again."""
    for item in garbage:
        if item.path.is_dir():
            atomic.remove(item.path / "manifest.json")
        atomic.remove(item.path)


def _used_by_runs(runs: Path) -> set[str]:
    """Fingerprints of every store that a run under a folder was trained on."""
    if not runs.is_dir():
        raise UsageError(f"no folder at {runs}; name the one that `headstart train` makes its run folders in.")
    folders = [path.parent for path in (*runs.glob("config.json"), *runs.glob("*/config.json"))]
    if not folders:
        raise UsageError(f"{runs} holds no run; name the folder that `headstart train` makes its run folders in.")
    return {str(used) for folder in folders for used in read_run_config(folder)["stores"].values()}


def _size_and_age(path: Path) -> tuple[int, float]:
    """Bytes that a file or folder holds, and when the last of its files was changed, in seconds since the epoch."""
    stats = [entry.lstat() for entry in (path, *path.rglob("*"))]
    return sum(entry.st_size for entry in stats if not stat.S_ISDIR(entry.st_mode)), max(s.st_mtime for s in stats)


def _manifest_digest(path: Path) -> str | None:
    try:
        return Manifest.parse((path / "manifest.json").read_bytes(), str(path)).digest
    except (FileNotFoundError, DamagedStoreError):
        return None


@contextmanager
def _bar(label: str, unit: str, *, unit_scale: bool = False) -> Iterator[Progress]:
    with tqdm(desc=label, unit=unit, unit_scale=unit_scale, mininterval=0.5) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
