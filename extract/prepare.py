"""The prepare stage: a dataset reader's samples, checked against the image files, to a samples store."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cache_schema.atomic import StorePath
from cache_schema.errors import UsageError, unknown_name
from cache_schema.fingerprint import digest_file
from cache_schema.samples import ImageTable, Samples, write_samples
from extract.datasets import DATASETS
from extract.datasets.faults import FaultReport
from extract.datasets.records import Dataset, SampleRecord


@dataclass(frozen=True)
class PrepareConfig:
    """Read `dataset` from the folder `root` and write its samples store under `out`."""

    dataset: str
    root: Path
    out: StorePath


@dataclass(frozen=True)
class Prepared:
    """Where the samples store is, what it holds, and whether it was there already."""

    path: StorePath
    num_images: int
    num_prompts: int
    num_samples: int
    num_samples_of_split: dict[str, int]
    reused: bool

    def summary(self) -> str:
        """One sentence for people."""
        splits = ", ".join(f"{split} {count}" for split, count in self.num_samples_of_split.items())
        verb = "found" if self.reused else "wrote"
        counts = f"{self.num_images} images, {self.num_prompts} prompts, {self.num_samples} samples ({splits})"
        return f"{verb} {counts} -> {self.path.name}"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def prepare(config: PrepareConfig) -> Prepared:
    """Read a dataset and write its samples store.

    Raises:
        UsageError: the dataset is unknown, its folder is missing, or its files are malformed.
    """
    if config.dataset not in DATASETS:
        raise unknown_name("dataset", config.dataset, DATASETS)
    dataset = DATASETS[config.dataset](config.root)
    samples = _collect(dataset)
    path, reused = write_samples(
        config.out,
        samples,
        dataset=dataset.name,
        sources={source.name: digest_file(source) for source in dataset.sources},
        image_dir=dataset.image_dir,
        libraries={name: version(name) for name in ("numpy", "pycocotools")},
    )
    splits, counts = np.unique(np.array(samples.splits), return_counts=True)
    return Prepared(
        path=path,
        num_images=len(samples.images),
        num_prompts=len(samples.prompts),
        num_samples=len(samples),
        num_samples_of_split=dict(zip(splits.tolist(), counts.tolist(), strict=True)),
        reused=reused,
    )


def _collect(dataset: Dataset) -> Samples:
    """Drain a reader into columns. Images and prompts come in the order of their first sample."""
    image_rows: dict[str, int] = {}
    first_of_image: list[SampleRecord] = []
    prompt_rows: dict[str, int] = {}
    records: list[SampleRecord] = []
    for record in tqdm(dataset.samples, desc=f"reading {dataset.name}", unit="sample", mininterval=0.5):
        if record.image_id not in image_rows:
            image_rows[record.image_id] = len(first_of_image)
            first_of_image.append(record)
        prompt_rows.setdefault(record.prompt, len(prompt_rows))
        records.append(record)
    if not records:
        raise UsageError(
            f"{dataset.name} at {dataset.image_dir.parent} holds no sample: its annotation files are empty."
        )
    tag_names = sorted({name for record in records for name in record.tags})
    return Samples(
        images=_hash_images(dataset, first_of_image),
        prompts=list(prompt_rows),
        ids=[record.id for record in records],
        image_rows=np.array([image_rows[record.image_id] for record in records], np.int32),
        prompt_rows=np.array([prompt_rows[record.prompt] for record in records], np.int32),
        targets=[record.target for record in records],
        no_target=np.array([record.no_target for record in records], np.bool_),
        splits=[record.split for record in records],
        tags={name: [record.tags.get(name) for record in records] for name in tag_names},
    )


def _hash_images(dataset: Dataset, first_of_image: list[SampleRecord]) -> ImageTable:
    faults = FaultReport()
    digests = []
    for record in tqdm(first_of_image, desc="hashing images", unit="image", mininterval=0.5):
        path = dataset.image_dir / record.image_path
        if path.is_file():
            digests.append(digest_file(path))
        else:
            faults.add(f"image {record.image_id}", f"{record.image_path} is missing")
    faults.raise_if_any(dataset.image_dir)
    return ImageTable(
        ids=[record.image_id for record in first_of_image],
        paths=[record.image_path for record in first_of_image],
        sizes=np.array([record.image_size for record in first_of_image], np.int32),
        sha256=digests,
    )
