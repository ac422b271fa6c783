"""The samples store: the task itself. Images, unique prompts, and samples that join the two to a target mask.

Arrays (N images, M prompts, S samples; each `*/values`, `*/offsets` pair is a ragged list of bytes, see ragged.py):

    image/id, image/path      UTF-8 strings; paths are relative to the image folder, with "/"
    image/size                (N, 2) int32, (H, W)
    image/sha256              (N, 32) uint8, digest of the image file
    prompt/text               UTF-8 strings, each once
    sample/id                 UTF-8 strings
    sample/image, /prompt     (S,) int32 rows of the above
    sample/target             COCO run-length counts at the image's size; no byte where a sample has no mask
    sample/ignored            counts of the pixels that nobody labelled; only where a dataset has such pixels
    sample/no_target          (S,) bool
    sample/split              (S,) int32 into the identity's "splits"
    sample/tag/<name>         (S,) int32 into the identity's "tags"[name]; -1 where a sample lacks the tag
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache_schema.atomic import StorePath
from cache_schema.errors import UsageError, unknown_name
from cache_schema.masks import Size, decode_mask
from cache_schema.ragged import pack_bytes, pack_strings, unpack_bytes, unpack_strings
from cache_schema.spilled import SpilledArray
from cache_schema.store import (
    StaticArray,
    Store,
    StoreHeader,
    StoreWriter,
    is_complete,
    open_store,
    recorded_path,
    relative_paths,
)


@dataclass(frozen=True)
class ImageTable:
    """N images: ids, paths relative to the image folder, (N, 2) sizes (H, W), and SHA-256 digests of the files."""

    ids: Sequence[str]
    paths: Sequence[str]
    sizes: NDArray[np.int32]
    sha256: Sequence[str]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: NDArray[np.int64]) -> ImageTable:
        """Some of these images, in that order."""
        ids, paths, sha256 = ([values[row] for row in rows] for values in (self.ids, self.paths, self.sha256))
        return ImageTable(ids, paths, self.sizes[rows], sha256)


@dataclass(frozen=True)
class Samples:
    """S samples over `images` and `prompts`.

    `tags` maps a tag's name to one value or None for each sample. `targets` holds b"" for a sample without a mask, for
    which a mask without a pixel is not the same. `ignored` is empty, or holds counts for each sample, b"" where every
    pixel is labelled. `classes` are the names of a fixed vocabulary in the order of their ids, where there is one.
    """

    images: ImageTable
    prompts: Sequence[str]
    ids: Sequence[str]
    image_rows: NDArray[np.int32]
    prompt_rows: NDArray[np.int32]
    targets: Sequence[bytes]
    no_target: NDArray[np.bool_]
    splits: Sequence[str]
    tags: Mapping[str, Sequence[str | None]]
    ignored: Sequence[bytes] = ()
    classes: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def size_of(self, sample: int) -> Size:
        """Original (H, W) of a sample's image."""
        height, width = self.images.sizes[self.image_rows[sample]].tolist()
        return height, width

    def target(self, sample: int) -> NDArray[np.bool_]:
        """A sample's truth, (H, W) at original size.

        Raises:
            UsageError: it has none.
        """
        self.require_masks([sample])
        return decode_mask(self.targets[sample], self.size_of(sample))

    def ignored_pixels(self, sample: int) -> NDArray[np.bool_] | None:
        """(H, W) the pixels of a sample's image that nobody labelled; None if there are none."""
        counts = self.ignored[sample] if self.ignored else b""
        return decode_mask(counts, self.size_of(sample)) if counts else None

    def require_masks(self, rows: Iterable[int]) -> None:
        """Make sure that samples have masks.

        Raises:
            UsageError: one has none, as the samples of image-caption datasets.
        """
        for row in rows:
            if not self.targets[row]:
                raise UsageError(
                    f"sample {self.ids[row]} has no mask; captions align encoders, but masks cannot be learned or "
                    "scored from them. Name the samples store of a dataset with masks."
                )

    def rows_of_split(self, split: str) -> NDArray[np.int64]:
        """The samples of one split, in order.

        Raises:
            UsageError: no sample has that split.
        """
        rows = np.flatnonzero(np.array(self.splits) == split)
        if not len(rows):
            raise unknown_name("split", split, set(self.splits))
        return rows


@dataclass(frozen=True)
class SamplesStore:
    """A samples store that was opened: what it holds, and where its images lie, if a local store says so."""

    path: StorePath
    fingerprint: str
    dataset: str
    samples: Samples
    image_dir: Path | None


@dataclass(frozen=True)
class SampleArrays:
    """The arrays of a samples store, in memory or on the disk, and the words that their codes stand for.

    `splits` are sorted, and `tags` holds for each tag's name its sorted values.
    """

    arrays: Sequence[StaticArray]
    splits: Sequence[str]
    tags: Mapping[str, Sequence[str]]
    classes: Sequence[str] = ()


def write_samples(
    parent: StorePath,
    samples: Samples | SampleArrays,
    *,
    dataset: str,
    sources: Mapping[str, str],
    image_dir: Path,
    libraries: Mapping[str, str],
    num_faults: int = 0,
) -> tuple[StorePath, bool]:
    """Write `samples` under `parent`; return the store's path and whether it was there already.

    Args:
        dataset: name of the reader the samples came from.
        sources: SHA-256 of every annotation file, by file name.
        image_dir: where the images lie now; recorded relative to the store, outside its identity.
        libraries: versions of the libraries that took part, recorded beside the identity.
        num_faults: faults of the dataset for which items were left out, recorded beside the identity.
    """
    packed = _pack(samples) if isinstance(samples, Samples) else samples
    identity = {
        "dataset": dataset,
        "sources": dict(sources),
        "splits": list(packed.splits),
        "tags": {name: list(values) for name, values in packed.tags.items()},
        **({"classes": list(packed.classes)} if packed.classes else {}),
        "arrays": {array.name: _digest(array) for array in packed.arrays},
    }
    header = StoreHeader("samples", identity, {})
    recorded = {
        "paths": relative_paths({"image_dir": image_dir}, parent / header.folder_name),
        "libraries": dict(libraries),
        "num_faults": num_faults,
    }
    writer = StoreWriter(parent, dataclasses.replace(header, recorded=recorded), (), packed.arrays)
    if is_complete(writer.path):
        return writer.path, True
    writer.begin()
    writer.finish(())
    return writer.path, False


def _pack(samples: Samples) -> SampleArrays:
    split_names, splits = _encode(samples.splits)
    tag_names: dict[str, list[str]] = {}
    arrays = [
        *string_arrays("image/id", samples.images.ids, "image"),
        *string_arrays("image/path", samples.images.paths, "image"),
        StaticArray("image/size", samples.images.sizes.astype(np.int32), ("image", "hw")),
        StaticArray("image/sha256", digest_array(samples.images.sha256), ("image", "byte")),
        *string_arrays("prompt/text", samples.prompts, "prompt"),
        *string_arrays("sample/id", samples.ids, "sample"),
        StaticArray("sample/image", samples.image_rows.astype(np.int32), ("sample",)),
        StaticArray("sample/prompt", samples.prompt_rows.astype(np.int32), ("sample",)),
        *ragged_arrays("sample/target", pack_bytes(samples.targets), "sample"),
        StaticArray("sample/no_target", samples.no_target.astype(np.bool_), ("sample",)),
        StaticArray("sample/split", splits, ("sample",)),
    ]
    if any(samples.ignored):
        arrays += ragged_arrays("sample/ignored", pack_bytes(samples.ignored), "sample")
    for name in sorted(samples.tags):
        tag_names[name], codes = _encode(samples.tags[name])
        arrays.append(StaticArray(f"sample/tag/{name}", codes, ("sample",)))
    return SampleArrays(arrays, split_names, tag_names, samples.classes)


def _digest(array: StaticArray) -> str:
    """SHA-256 of an array's bytes."""
    values, running = array.values, hashlib.sha256()
    for piece in values.pieces() if isinstance(values, SpilledArray) else [np.ascontiguousarray(values).data]:
        running.update(piece)
    return running.hexdigest()


def open_samples(path: StorePath, image_dir: Path | None = None) -> SamplesStore:
    """Open a samples store.

    Args:
        image_dir: where the images lie, if not where they lay when the store was written.

    Raises:
        UsageError: no complete samples store is there.
    """
    store = open_store(path, "samples")
    identity = store.header.identity
    images = ImageTable(
        ids=read_strings(store, "image/id"),
        paths=read_strings(store, "image/path"),
        sizes=store.read("image/size"),
        sha256=[bytes(row).hex() for row in store.read("image/sha256")],
    )
    samples = Samples(
        images=images,
        prompts=read_strings(store, "prompt/text"),
        ids=read_strings(store, "sample/id"),
        image_rows=store.read("sample/image"),
        prompt_rows=store.read("sample/prompt"),
        targets=unpack_bytes(store.read("sample/target/values"), store.read("sample/target/offsets")),
        no_target=store.read("sample/no_target"),
        splits=[value or "" for value in _decode(identity["splits"], store.read("sample/split"))],
        tags={name: _decode(values, store.read(f"sample/tag/{name}")) for name, values in identity["tags"].items()},
        ignored=_read_ignored(store),
        classes=tuple(identity.get("classes", ())),
    )
    store.close()
    image_dir = image_dir or recorded_path(store.header, path, "image_dir")
    return SamplesStore(path, store.header.fingerprint, identity["dataset"], samples, image_dir)


def _read_ignored(store: Store) -> Sequence[bytes]:
    if "sample/ignored/values" not in store.layouts:
        return ()
    return unpack_bytes(store.read("sample/ignored/values"), store.read("sample/ignored/offsets"))


def string_arrays(name: str, items: Sequence[str], axis: str) -> list[StaticArray]:
    """The two arrays of a ragged list of strings; `read_strings` reads them back."""
    return ragged_arrays(name, pack_strings(items), axis)


def read_strings(store: Store, name: str) -> list[str]:
    """A ragged list of UTF-8 strings of a store."""
    return unpack_strings(store.read(f"{name}/values"), store.read(f"{name}/offsets"))


def digest_array(hex_digests: Sequence[str]) -> NDArray[np.uint8]:
    """(N, 32) uint8 of N SHA-256 digests in hexadecimal."""
    return np.frombuffer(bytes.fromhex("".join(hex_digests)), np.uint8).reshape(-1, 32)


def ragged_arrays(
    name: str, packed: tuple[NDArray[np.uint8] | SpilledArray, NDArray[np.int64] | SpilledArray], axis: str
) -> list[StaticArray]:
    """The two arrays of a ragged list of bytes: its values and its offsets."""
    values, offsets = packed
    return [
        StaticArray(f"{name}/values", values, (f"{axis}_byte",)),
        StaticArray(f"{name}/offsets", offsets, (f"{axis}_start",)),
    ]


def _encode(values: Sequence[str | None]) -> tuple[list[str], NDArray[np.int32]]:
    """The sorted vocabulary of `values` and the place of each in it, -1 for None."""
    vocabulary = sorted({value for value in values if value is not None})
    place = {value: index for index, value in enumerate(vocabulary)}
    return vocabulary, np.array([-1 if value is None else place[value] for value in values], np.int32)


def _decode(vocabulary: Sequence[str], codes: NDArray[np.int32]) -> list[str | None]:
    return [vocabulary[code] if code >= 0 else None for code in codes.tolist()]
