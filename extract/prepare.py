"""The prepare stage: a dataset reader's samples, checked against the image files, to a samples store."""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cache_schema.atomic import StorePath
from cache_schema.errors import UsageError, unknown_name
from cache_schema.fingerprint import digest_file
from cache_schema.masks import is_empty
from cache_schema.ragged import RaggedBytes, RaggedStrings
from cache_schema.reader import num_cores
from cache_schema.samples import ImageTable, Samples, write_samples
from extract.datasets import DATASETS
from extract.datasets.faults import FaultReport, FileFaults
from extract.datasets.places import Folder
from extract.datasets.records import Counted, Dataset, DatasetReader, SampleRecord, Source
from extract.images import UndecodableImageError, UnreadableFileError, image_size, read_bytes

_BLOCK = 512
"""Samples whose images are looked at together, in several threads."""


@dataclass(frozen=True)
class PrepareConfig:
    """Read `dataset` from the folder `root` and write its samples store under `out`.

    Args:
        image_dir: the folder of its images, if not where they are published.
        unpack: a folder for images that are published inside other files; by default beside those.
        skip_bad: leave items with a fault out, where any fault else stops everything.
    """

    dataset: str
    root: Path
    out: StorePath
    image_dir: Path | None = None
    unpack: Path | None = None
    skip_bad: bool = False

    @property
    def reader(self) -> DatasetReader:
        """How this dataset is read.

        Raises:
            UsageError: it is unknown.
        """
        if self.dataset not in DATASETS:
            raise unknown_name("dataset", self.dataset, DATASETS)
        return DATASETS[self.dataset]

    def source(self, faults: FaultReport) -> Source:
        """Where the dataset lies."""
        return Source(self.root, faults, self.image_dir, self.unpack)


@dataclass(frozen=True)
class Counts:
    """How much of a dataset there is, in all and by split; `published` is None where nobody says.

    `num_counted_of_split` counts what its authors count: refs, samples or images.
    """

    num_images: int
    num_prompts: int
    num_samples: int
    num_samples_of_split: dict[str, int]
    counted: str
    num_counted_of_split: dict[str, int]
    published: dict[str, int] | None

    @property
    def differences(self) -> list[str]:
        """Where the counts are not the published ones, in words."""
        if self.published is None:
            return []
        return [
            f"split {split} has {self.num_counted_of_split.get(split, 0)} {self.counted}, published are {number}"
            for split, number in self.published.items()
            if self.num_counted_of_split.get(split, 0) != number
        ]

    def __str__(self) -> str:
        splits = ", ".join(f"{split} {count}" for split, count in self.num_samples_of_split.items())
        counts = f"{self.num_images} images, {self.num_prompts} prompts, {self.num_samples} samples"
        return f"{counts} ({splits})" if splits else counts


@dataclass(frozen=True)
class Prepared:
    """Where the samples store is, what it holds, whether it was there already, and what was left out of it."""

    path: StorePath
    counts: Counts
    reused: bool
    faults: FaultReport = field(default_factory=FaultReport)

    def summary(self) -> str:
        """For people: what was done, and loudly what is not as it should be."""
        verb = "found" if self.reused else "wrote"
        lines = [f"{verb} {self.counts} -> {self.path.name}"]
        if self.faults.num_faults:
            lines.append(f"LEFT OUT, with {self.faults.num_faults} faults: {self.faults.summary()}")
        if self.counts.differences:
            lines.append(f"NOT AS PUBLISHED: {'; '.join(self.counts.differences)}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            **asdict(self.counts),
            "differences": self.counts.differences,
            "reused": self.reused,
            "num_faults": self.faults.num_faults,
            "faults": [fault.to_dict() for fault in self.faults.faults],
        }


def prepare(config: PrepareConfig, faults: FaultReport | None = None) -> Prepared:
    """Read a dataset and write its samples store. What is read at a time is bounded; what is kept is the store's size.

    Args:
        faults: where its faults go, for whoever wants them even if they stop everything.

    Raises:
        UsageError: the dataset is unknown, its folder is missing, or its files are malformed.
    """
    faults = FaultReport() if faults is None else faults
    dataset, samples, counts = _read(config, faults)
    if not config.skip_bad:
        faults.raise_if_any()
    if not len(samples):
        rest = f"nothing is left: {faults.summary()}" if faults.num_faults else "its annotation files are empty"
        raise UsageError(f"{dataset.name} at {config.root} holds no sample: {rest}.")
    path, reused = write_samples(
        config.out,
        samples,
        dataset=dataset.name,
        sources={source.name: digest_file(source) for source in dataset.sources},
        image_dir=dataset.image_dir,
        libraries={name: version(name) for name in ("numpy", "pycocotools")},
        num_faults=faults.num_faults,
    )
    return Prepared(path, counts, reused, faults)


def check(config: PrepareConfig) -> tuple[Counts, FaultReport]:
    """Read a dataset as `prepare` does, write nothing, and say what is there and every fault of it.

    Raises:
        UsageError: the dataset is unknown, its folder is missing, or a file of it cannot be read at all.
    """
    faults = FaultReport()
    with tempfile.TemporaryDirectory(prefix="headstart-check-") as unpack:
        _, _, counts = _read(replace(config, unpack=Path(unpack)), faults)
    return counts, faults


def _read(config: PrepareConfig, faults: FaultReport) -> tuple[Dataset, Samples, Counts]:
    reader = config.reader
    if not config.root.is_dir() and not reader.by_name:
        raise UsageError(f"no folder at {config.root}; name the one that holds {reader.layout}.")
    dataset = reader.read(config.source(faults))
    columns = _Columns(reader.counted)
    shown = tqdm(dataset.samples, desc=f"reading {dataset.name}", unit="sample", mininterval=0.5)
    for record, image in _with_images(shown, dataset.image_dir, faults):
        columns.add(record, image)
    return dataset, columns.samples(dataset.classes), columns.counts(dict(reader.published) or None)


@dataclass(frozen=True)
class _Image:
    """What was found at an image's path: its digest, or nothing if it cannot be used."""

    path: str
    size: tuple[int, int]
    sha256: str | None


def _with_images(
    records: Iterable[SampleRecord], image_dir: Path, faults: FaultReport
) -> Iterator[tuple[SampleRecord, _Image]]:
    """Sound samples with their images. Each image is looked at once; one that is not as annotated is one fault."""
    of_folder, images, ids = faults.of(image_dir), dict[str, _Image](), set[str]()
    folder = Folder(image_dir)
    stream = iter(records)
    with ThreadPoolExecutor(num_cores(), thread_name_prefix="headstart-images") as pool:
        while block := list(islice(stream, _BLOCK)):
            new = {record.image_id: record for record in reversed(block) if record.image_id not in images}
            firsts = [record for record in block if new.get(record.image_id) is record]
            for first, found in zip(firsts, pool.map(lambda one: _look_at(folder, one), firsts), strict=True):
                if isinstance(found, str):
                    of_folder.add(f"image {first.image_id}", found)
                digest = None if isinstance(found, str) else found.hex()
                images[first.image_id] = _Image(first.image_path, first.image_size, digest)
            for record in block:
                image = images[record.image_id]
                if image.sha256 is not None and _is_sound(record, image, ids, of_folder):
                    yield record, image


def _look_at(folder: Folder, record: SampleRecord) -> bytes | str:
    """The digest of an image, or what is wrong with it."""
    if record.image_path not in folder:
        return f"{record.image_path!r} does not lie inside the image folder"
    try:
        data, digest = read_bytes(folder.path / record.image_path)
        size = image_size(data)
    except UnreadableFileError as error:
        missing = not os.path.exists(folder.path / record.image_path)  # noqa: PTH110  also for names too long to be any
        return f"{record.image_path} is missing" if missing else f"{record.image_path}: {error}"
    except UndecodableImageError as error:
        return f"{record.image_path}: {error}"
    if size != record.image_size:
        said, found = (f"{height} x {width}" for height, width in (record.image_size, size))
        return f"{record.image_path} has {found} pixels (height x width), its annotations say {said}"
    return bytes.fromhex(digest)


def _is_sound(record: SampleRecord, image: _Image, ids: set[str], faults: FileFaults) -> bool:
    """Whether a sample agrees with those before it and with itself; each way in which it does not is a fault."""
    before = len(ids)
    ids.add(record.id)
    flaws = []
    if len(ids) == before:
        flaws.append("another sample has this id")
    if (record.image_path, record.image_size) != (image.path, image.size):
        flaws.append(f"its image {record.image_id} had another path or size before")
    if record.target is not None and not record.no_target and is_empty(record.target, record.image_size):
        flaws.append("its mask has no pixel")
    for flaw in flaws:
        faults.add(f"sample {record.id}", flaw)
    return not flaws


class _Columns:
    """A stream of samples as the columns of a store. Images and prompts come in the order of their first sample."""

    def __init__(self, counted: Counted) -> None:
        self._counted: Counted = counted
        self._image_rows: dict[str, int] = {}
        self._images: list[_Image] = []
        self._prompt_rows: dict[str, int] = {}
        self._ids = RaggedStrings()
        self._image_row: list[int] = []
        self._prompt_row: list[int] = []
        self._targets = RaggedBytes()
        self._ignored = RaggedBytes()
        self._no_target: list[bool] = []
        self._splits: list[str] = []
        self._tags: dict[str, list[str | None]] = {}
        self._units: dict[str, set[str]] = {}

    def add(self, record: SampleRecord, image: _Image) -> None:
        """One more sample."""
        if record.image_id not in self._image_rows:
            self._image_rows[record.image_id] = len(self._images)
            self._images.append(image)
        num = len(self._splits)
        self._ids.append(record.id)
        self._image_row.append(self._image_rows[record.image_id])
        self._prompt_row.append(self._prompt_rows.setdefault(record.prompt, len(self._prompt_rows)))
        self._targets.append(b"" if record.target is None else record.target)
        self._ignored.append(record.ignored)
        self._no_target.append(record.no_target)
        self._splits.append(sys.intern(record.split))
        for name, value in record.tags.items():
            column = self._tags.setdefault(name, [])
            column += [None] * (num - len(column))
            column.append(sys.intern(value))
        if self._counted != "samples":
            unit = record.ref_id if self._counted == "refs" else record.image_id
            self._units.setdefault(record.split, set()).add(unit)

    def samples(self, classes: tuple[str, ...]) -> Samples:
        """All of them."""
        num = len(self._splits)
        return Samples(
            images=ImageTable(
                ids=list(self._image_rows),
                paths=[image.path for image in self._images],
                sizes=np.array([image.size for image in self._images], np.int32).reshape(-1, 2),
                sha256=[image.sha256 or "" for image in self._images],
            ),
            prompts=list(self._prompt_rows),
            ids=self._ids,
            image_rows=np.array(self._image_row, np.int32),
            prompt_rows=np.array(self._prompt_row, np.int32),
            targets=self._targets,
            no_target=np.array(self._no_target, np.bool_),
            splits=self._splits,
            tags={name: column + [None] * (num - len(column)) for name, column in sorted(self._tags.items())},
            ignored=self._ignored,
            classes=classes,
        )

    def counts(self, published: dict[str, int] | None) -> Counts:
        """How many there are of everything."""
        num_samples_of_split = dict(sorted(Counter(self._splits).items()))
        num_units_of_split = {split: len(units) for split, units in sorted(self._units.items())}
        return Counts(
            num_images=len(self._images),
            num_prompts=len(self._prompt_rows),
            num_samples=len(self._splits),
            num_samples_of_split=num_samples_of_split,
            counted=self._counted,
            num_counted_of_split=num_samples_of_split if self._counted == "samples" else num_units_of_split,
            published=published,
        )
