"""RefCOCO-m as it is published: parquet tables with the images inside, in a folder or by name at Hugging Face's hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cache_schema.atomic import write_file
from cache_schema.errors import UsageError
from cache_schema.masks import Size, union_of_segmentations
from extract.datasets.faults import AnnotationError, FaultReport, Fields, FileFaults, is_text
from extract.datasets.places import Folder
from extract.datasets.records import Dataset, DatasetReader, SampleRecord, Source
from extract.images import UndecodableImageError, image_size

COLUMNS = ("image", "image_id", "file_name", "samples")
"""What a row must hold. Of a sample `bbox` and `label` are not read: the mask and the sentences say more."""

_BATCH_ROWS = 16
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})")
_INSTALL = "Install it with pip install 'headstart[datasets]'."

Row = Callable[[], Any]
"""Gives one row of a table; a UnicodeDecodeError if a text in it is none."""


@dataclass(frozen=True, slots=True)
class _Table:
    """The rows of one split, or of one file of it; nothing is read before it is asked for."""

    source: Path
    split: str
    rows: Iterator[Row]


def read_refcoco_m(source: Source) -> Dataset:
    """Open RefCOCO-m: a sample `"{id}:{n}"` for sentence n of each annotated object, in the order of the tables.

    The root is a folder with parquet files, its own or in `data/`, or the name of a dataset at the hub, `owner/name`;
    pyarrow reads the former a few rows at a time, and `datasets` fetches the latter. A split has the name it has there
    ("validation"). Images are written as they are, byte for byte, under their `file_name` to `source.unpack`, as their
    samples are read; one that is there already is left, and none is ever replaced. Tags: `category`, `supercategory`.

    Raises:
        UsageError: there are no parquet files, one of several is missing, a library is, or the name cannot be fetched.
        AnnotationError: a file is not parquet, or holds other columns.
    """
    if source.image_dir is not None:
        raise UsageError("the images of refcoco-m are inside its files; say with --unpack where to write them.")
    if source.root.is_dir():
        paths = _find_tables(source.root)
        image_dir = source.unpack or source.root / "images"
        tables = [_open_parquet(path) for path in paths]
    elif _HUB_NAME.fullmatch(source.root.as_posix()):
        if source.unpack is None:
            raise UsageError(f"name a folder for the images of {source.root.as_posix()} with --unpack.")
        paths, image_dir = [], source.unpack
        tables = _fetch(source.root.as_posix(), source.root)
    else:
        raise UsageError(
            f"no folder at {source.root}; name one with parquet files, or a dataset at the hub: owner/name."
        )
    return Dataset("refcoco-m", image_dir, tuple(paths), _read_tables(tables, image_dir, source.faults))


def _find_tables(root: Path) -> list[Path]:
    paths = sorted(root.glob("*.parquet")) or sorted((root / "data").glob("*.parquet"))
    if not paths:
        raise UsageError(f"{root} holds no parquet files, and neither does its data/. Fetch moondream/refcoco-m there.")
    names = {path.stem for path in paths}
    for path in paths:
        if shard := _SHARD.fullmatch(path.stem):
            for number in range(int(shard["total"])):
                wanted = f"{shard['split']}-{number:05}-of-{shard['total']}"
                if wanted not in names:
                    raise UsageError(f"{path.with_stem(wanted)} is missing beside {path.name}. Fetch it too.")
    return paths


def _open_parquet(path: Path) -> _Table:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UsageError(f"{path} is read by pyarrow, which is not installed. {_INSTALL}") from error
    try:
        file = ParquetFile(path)
    except (ArrowException, OSError) as fault:
        raise AnnotationError(f"{path} is no parquet file ({fault}). Fetch it again.") from fault
    _check_columns(str(path), file.schema_arrow.names)

    def rows() -> Iterator[Row]:
        try:
            for batch in file.iter_batches(_BATCH_ROWS, columns=list(COLUMNS)):
                for number in range(batch.num_rows):
                    yield partial(_row_of_batch, batch, number)
        except (ArrowException, OSError) as fault:
            raise AnnotationError(f"{path} is damaged ({fault}). Fetch it again.") from fault

    shard = _SHARD.fullmatch(path.stem)
    return _Table(path, shard["split"] if shard else path.stem, rows())


def _row_of_batch(batch: Any, number: int) -> Any:
    return batch.slice(number, 1).to_pylist()[0]


def _fetch(name: str, source: Path) -> list[_Table]:
    """The splits of a dataset at the hub; fetched once, and read from where `datasets` keeps it."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"{name} is fetched by datasets, which is not installed. {_INSTALL}") from error
    if int(datasets.__version__.partition(".")[0]) < 4:
        raise UsageError(f"datasets {datasets.__version__} may run code that comes with a dataset. {_INSTALL}")
    try:
        splits = datasets.load_dataset(name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UsageError(f"{name} cannot be fetched ({error}). Look at its name and at the network.") from error
    tables = []
    for split, rows in splits.items():
        _check_columns(name, rows.column_names)
        kept = rows.select_columns(list(COLUMNS))
        if isinstance(rows.features["image"], datasets.Image):
            kept = kept.cast_column("image", datasets.Image(decode=False))
        tables.append(_Table(source, str(split), _rows_of_split(kept)))
    return tables


def _rows_of_split(rows: Any) -> Iterator[Row]:
    for number in range(len(rows)):
        yield partial(rows.__getitem__, number)


def _check_columns(name: str, columns: Sequence[str]) -> None:
    if missing := [column for column in COLUMNS if column not in columns]:
        raise AnnotationError(f"{name} holds no column {missing[0]!r}. Is it another dataset's?")


def _read_tables(tables: Sequence[_Table], image_dir: Path, faults: FaultReport) -> Iterator[SampleRecord]:
    images = _Images(image_dir)
    for table in tables:
        of_table = faults.of(table.source)
        for item in _read_rows(table, of_table):
            image_id, file_name = item.take("image_id", int), item.take_text("file_name")
            data = _take_bytes(item)
            size = images.keep(item, file_name, data) if item.sound else (0, 0)
            if not item.sound:
                continue
            for sample in item.each("samples", "id"):
                yield from _read_sample(sample, image_id, file_name, size, table.split)


def _read_rows(table: _Table, faults: FileFaults) -> Iterator[Fields]:
    for number, row in enumerate(table.rows):
        try:
            content = row()
        except UnicodeDecodeError:
            faults.add(f"row {number}", "it holds a text that is not valid UTF-8")
            continue
        yield Fields(content, f"row {number} (image_id {content['image_id']})", faults)


def _take_bytes(item: Fields) -> bytes:
    data = item.take("image", dict).get("bytes")
    if item.sound and not isinstance(data, bytes):
        item.fault("'image' must hold the bytes of an image file")
    return data if isinstance(data, bytes) else b""


class _Images:
    """The folder to which the images are written, each under its own name and only if it is one."""

    def __init__(self, path: Path) -> None:
        self._folder = Folder(path)
        self._seen: set[str] = set()

    def keep(self, item: Fields, name: str, data: bytes) -> Size:
        """Write an image; its (H, W), or a fault."""
        path = self._folder.path / name
        if name not in self._folder:
            item.fault(f"file_name {name!r} does not lie inside the image folder")
            return (0, 0)
        if name in self._seen:
            item.fault(f"file_name {name!r} was there before")
            return (0, 0)
        self._seen.add(name)
        try:
            size = image_size(data)
            if not path.exists():
                write_file(path, data)
            elif not path.is_file() or path.stat().st_size != len(data) or path.read_bytes() != data:
                item.fault(f"{path} is there already and holds something else; name another folder with --unpack")
            return size
        except UndecodableImageError as error:
            item.fault(f"its image cannot be used: {error}")
        except OSError as error:
            item.fault(f"{name!r} cannot be written ({error.strerror})")
        return (0, 0)


def _read_sample(item: Fields, image_id: int, file_name: str, size: Size, split: str) -> Iterator[SampleRecord]:
    sample_id, of_image, mask = item.take("id", int), item.take("image_id", int), item.take("mask", dict)
    sentences, tags = _read_sentences(item), _read_tags(item)
    if item.sound and of_image != image_id:
        item.fault(f"it belongs to image {of_image}, not to image {image_id}")
    if not item.sound:
        return
    try:
        target = union_of_segmentations([mask], size)
    except ValueError as fault:
        item.fault(f"its mask is bad: {fault}")
        return
    for number, sentence in enumerate(sentences):
        yield SampleRecord(
            id=f"{sample_id}:{number}",
            image_id=str(image_id),
            image_path=file_name,
            image_size=size,
            prompt=sentence,
            target=target,
            no_target=False,
            split=split,
            tags=tags,
            ref_id=str(sample_id),
        )


def _read_sentences(item: Fields) -> list[str]:
    sentences = item.take("sentences", list)
    if any(type(sentence) is not str or not is_text(sentence) for sentence in sentences):
        item.fault("'sentences' must list texts")
        return []
    evened = [" ".join(sentence.split()) for sentence in sentences]
    if not all(evened):
        item.fault(f"sentence {evened.index('')} is empty")
    return evened


def _read_tags(item: Fields) -> dict[str, str]:
    """The names that are there: the table has null where there is none."""
    names = ("category", "supercategory")
    return {name: item.take_text(name) for name in names if not item.holds(name, type(None))}


REFCOCO_M_READERS: dict[str, DatasetReader] = {
    "refcoco-m": DatasetReader(
        read_refcoco_m,
        "the parquet files of moondream/refcoco-m, by themselves or in data/; or give that name for the folder",
        {"validation": 2080},
        by_name=True,
    ),
}
