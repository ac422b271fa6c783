"""The prepare stage: a dataset reader's samples, checked against the image files, to a samples store."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cache_schema.atomic import StorePath
from cache_schema.errors import UsageError, unknown_name
from cache_schema.fingerprint import digest_file
from cache_schema.first_come import FirstCome
from cache_schema.masks import Size, is_empty
from cache_schema.reader import num_cores
from cache_schema.sample_columns import SampleColumns
from cache_schema.samples import write_samples
from extract.datasets import DATASETS
from extract.datasets.faults import FaultReport, FileFaults
from extract.datasets.places import Folder
from extract.datasets.records import Dataset, DatasetReader, SampleRecord, Source
from extract.images import UndecodableImageError, UnreadableFileError, read_bytes, read_image_header

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
        return Source(self.root, faults, self.image_dir, self.unpack, whole=not self.skip_bad)


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
        found = self.num_counted_of_split
        return [
            f"split {split} has {found.get(split, 0)} {self.counted}, published are {self.published.get(split, 0)}"
            for split in {**self.published, **found}
            if found.get(split, 0) != self.published.get(split, 0)
        ]

    def __str__(self) -> str:
        splits = ", ".join(f"{split} {count}" for split, count in self.num_samples_of_split.items())
        nouns = {"image": self.num_images, "prompt": self.num_prompts, "sample": self.num_samples}
        counts = ", ".join(f"{number} {noun}{'' if number == 1 else 's'}" for noun, number in nouns.items())
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
            lines.append(f"LEFT OUT: {self.faults.summary()}")
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
    """Read a dataset and write its samples store. What memory holds of it is bounded but for the readers' indices.

    Until the store is written its columns lie in the system's folder for temporary files, and take as much room there.

    Args:
        faults: where its faults go, for whoever wants them even if they stop everything.

    Raises:
        UsageError: the dataset is unknown, its folder is missing, or its files are malformed.
        NoRoomError: a disk is full.
    """
    faults = FaultReport() if faults is None else faults
    with SampleColumns() as columns:
        dataset, counts = _read(config, columns, faults)
        if not config.skip_bad:
            faults.raise_if_any()
        if not len(columns):
            rest = f"nothing is left: {faults.summary()}" if faults.num_faults else "its annotation files are empty"
            raise UsageError(f"{dataset.name} at {config.root} holds no sample: {rest}.")
        path, reused = write_samples(
            config.out,
            columns.arrays(dataset.classes),
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
    with tempfile.TemporaryDirectory(prefix="headstart-check-") as unpack, SampleColumns() as columns:
        _, counts = _read(replace(config, unpack=Path(unpack), skip_bad=True), columns, faults)
    return counts, faults


def _read(config: PrepareConfig, columns: SampleColumns, faults: FaultReport) -> tuple[Dataset, Counts]:
    """Add all sound samples to the columns. Images and prompts come in the order of their first sample."""
    reader = config.reader
    if not config.root.is_dir() and not reader.by_name:
        raise UsageError(f"no folder at {config.root}; name the one that holds {reader.layout}.")
    dataset = reader.read(config.source(faults))
    num_of_split: Counter[str] = Counter()
    num_units_of_split: dict[str, int] = {}
    shown = tqdm(dataset.samples, desc=f"reading {dataset.name}", unit="sample", mininterval=0.5)
    with FirstCome() as came:
        for record, image in _with_images(shown, dataset, came, faults, as_shown=reader.as_shown):
            _add(record, image, columns, came)
            num_of_split[record.split] += 1
            unit = {"refs": record.ref_id, "images": record.image_id, "samples": record.id}[reader.counted]
            num_units = num_units_of_split.setdefault(record.split, 0)
            is_new = came.number(f"unit of {record.split}", unit, num_units) == num_units
            num_units_of_split[record.split] += is_new
    return dataset, Counts(
        num_images=columns.num_images,
        num_prompts=columns.num_prompts,
        num_samples=len(columns),
        num_samples_of_split=dict(sorted(num_of_split.items())),
        counted=reader.counted,
        num_counted_of_split=dict(sorted(num_units_of_split.items())),
        published=dict(reader.published) or None,
    )


def _add(record: SampleRecord, image: _Image, columns: SampleColumns, came: FirstCome) -> None:
    """One more sample, and its image and its prompt where these are new."""
    image_row = came.number("image", record.image_id, columns.num_images)
    if image_row == columns.num_images:
        columns.add_image(record.image_id, image.path, image.size, image.sha256)
    prompt_row = came.number("prompt", record.prompt, columns.num_prompts)
    if prompt_row == columns.num_prompts:
        columns.add_prompt(record.prompt)
    columns.add(
        record.id,
        image_row,
        prompt_row,
        target=b"" if record.target is None else record.target,
        ignored=record.ignored,
        no_target=record.no_target,
        split=record.split,
        tags=record.tags,
    )


@dataclass(frozen=True)
class _Image:
    """What was found at an image's path: the digest of the file, "" if it cannot be used."""

    path: str
    size: Size
    sha256: str

    def to_bytes(self) -> bytes:
        return " ".join([*map(str, self.size), self.sha256, self.path]).encode("utf-8", "surrogatepass")

    @classmethod
    def parse(cls, data: bytes) -> _Image:
        height, width, sha256, path = data.decode("utf-8", "surrogatepass").split(" ", 3)
        return cls(path, (int(height), int(width)), sha256)


def _with_images(
    records: Iterable[SampleRecord], dataset: Dataset, came: FirstCome, faults: FaultReport, *, as_shown: bool
) -> Iterator[tuple[SampleRecord, _Image]]:
    """Sound samples with their images. Each image is looked at once; one that is not as annotated is one fault."""
    of_folder, folder = faults.of(dataset.image_dir), Folder(dataset.image_dir)
    of_source = faults.of(dataset.sources[0]) if dataset.sources else of_folder
    stream = iter(records)
    with ThreadPoolExecutor(num_cores(), thread_name_prefix="headstart-images") as pool:
        while block := list(islice(stream, _BLOCK)):
            firsts = {record.image_id: record for record in reversed(block)}
            known = {image_id: came.get("image file", image_id) for image_id in firsts}
            images = {image_id: _Image.parse(found) for image_id, found in known.items() if isinstance(found, bytes)}
            new = [record for record in block if record.image_id not in images and firsts[record.image_id] is record]
            for first, found in zip(new, pool.map(lambda one: _look_at(folder, one, as_shown), new), strict=True):
                if isinstance(found, str):
                    of_folder.add(f"image {first.image_id}", found)
                digest = "" if isinstance(found, str) else found.hex()
                images[first.image_id] = _Image(first.image_path, first.image_size, digest)
                came.add("image file", first.image_id, images[first.image_id].to_bytes())
            for record in block:
                image = images[record.image_id]
                if image.sha256 and _is_sound(record, image, came, of_source):
                    yield record, image


def _look_at(folder: Folder, record: SampleRecord, as_shown: bool) -> bytes | str:
    """The digest of an image, or what is wrong with it."""
    if record.image_path not in folder:
        return f"{record.image_path!r} does not lie inside the image folder"
    try:
        data, digest = read_bytes(folder.path / record.image_path)
        header = read_image_header(data)
        if not as_shown and header.is_turned:
            return (
                f"{record.image_path} is turned by its EXIF, and its annotations are of the pixels as they are stored"
            )
    except UnreadableFileError as error:
        missing = not os.path.exists(folder.path / record.image_path)  # noqa: PTH110  also for names too long to be any
        return f"{record.image_path} is missing" if missing else f"{record.image_path}: {error}"
    except UndecodableImageError as error:
        return f"{record.image_path}: {error}"
    if header.size != record.image_size:
        said, found = (f"{height} x {width}" for height, width in (record.image_size, header.size))
        return f"{record.image_path} has {found} pixels (height x width), its annotations say {said}"
    return bytes.fromhex(digest)


def _is_sound(record: SampleRecord, image: _Image, came: FirstCome, faults: FileFaults) -> bool:
    """Whether a sample agrees with those before it and with itself; each way in which it does not is a fault."""
    flaws = []
    if not came.add("sample", record.id):
        flaws.append("another sample has this id")
    if (record.image_path, record.image_size) != (image.path, image.size):
        flaws.append(f"its image {record.image_id} had another path or size before")
    if record.target is not None and not record.no_target and is_empty(record.target, record.image_size):
        flaws.append("its mask has no pixel")
    for flaw in flaws:
        faults.add(f"sample {record.id}", flaw)
    return not flaws
