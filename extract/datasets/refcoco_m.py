"""RefCOCO-m as it is published: parquet tables with the images inside, in a folder or by name at Hugging Face's hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from cache_schema.atomic import write_file
from cache_schema.errors import UsageError
from cache_schema.masks import Size, is_empty, union_of_segmentations
from extract.datasets.faults import AnnotationError, FaultReport, Fields, FileFaults, is_text, type_name
from extract.datasets.places import Folder
from extract.datasets.records import Dataset, DatasetReader, SampleRecord, Source
from extract.images import UndecodableImageError, read_image_header

COLUMNS = ("image", "image_id", "file_name", "samples")
"""What a row must hold. Of a sample `bbox` and `label` are not read: the mask and the sentences say more."""

MAX_GROUP_BYTES = 2**29
"""What a row group of a file may say that it takes when it is unpacked; all published images take less than half."""

_BATCH_ROWS = 16
_SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_MAX_NAME_LETTERS = 200
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})")
_INSTALL = "Install it with pip install 'headstart[datasets]'."

Row = Callable[[], Any]
"""Gives one row of a table; a ValueError if something in it has no value in Python."""


@dataclass(frozen=True, slots=True)
class _Table:
    """The rows of one split, or of one file of it, read anew each time they are asked for."""

    source: Path
    split: str
    rows: Callable[[], Iterator[Row]]


def read_refcoco_m(source: Source) -> Dataset:
    """Open RefCOCO-m: a sample `"{id}:{n}"` for sentence n of each annotated object, in the order of the tables.

    The root is a folder with parquet files, its own or in `data/`, or the name of a dataset at the hub, `owner/name`;
    pyarrow reads the former a few rows at a time, and `datasets` fetches the latter. A split has the name it has there
    ("validation"). Images are written as they are, byte for byte, under their `file_name` to `source.unpack`, as their
    samples are read; one that is there already is left, and none is ever replaced. Where the source is to be whole, all
    rows are judged before a single image is written, and a fault in one of them is the end. An image that its EXIF
    turns is a fault, for masks lie as it is stored. Tags: `category`, `supercategory`.

    Raises:
        UsageError: there are no parquet files, one of several is missing, a library is, the name cannot be fetched, or
            `images` is a link out of the folder.
        AnnotationError: a file is not parquet, holds other columns, or would take more memory than `MAX_GROUP_BYTES`.
    """
    if source.image_dir is not None:
        raise UsageError("the images of refcoco-m are inside its files; say with --unpack where to write them.")
    if source.root.is_dir():
        paths = _find_tables(source.root)
        image_dir = source.unpack or source.root / "images"
        if source.unpack is None and "images" not in Folder(source.root):
            raise UsageError(f"{image_dir} is a link that leads out of its folder; name where it leads with --unpack.")
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
    return Dataset("refcoco-m", image_dir, tuple(paths), _read_tables(tables, image_dir, source))


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
    num_rows = _num_rows_at_once(path, file.metadata)

    def rows() -> Iterator[Row]:
        try:
            for batch in file.iter_batches(num_rows, columns=list(COLUMNS)):
                for number in range(batch.num_rows):
                    yield partial(_to_python, batch, number)
        except (ArrowException, OSError) as fault:
            raise AnnotationError(f"{path} is damaged ({fault}). Fetch it again.") from fault

    shard = _SHARD.fullmatch(path.stem)
    return _Table(path, shard["split"] if shard else path.stem, rows)


def _num_rows_at_once(path: Path, metadata: Any) -> int:
    """How many rows are read together: fewer where a value that is stored once may stand in each of them."""
    repeatable = 1
    for place in range(metadata.num_row_groups):
        group = metadata.row_group(place)
        columns = [group.column(number) for number in range(group.num_columns)]
        read = [column for column in columns if column.path_in_schema.partition(".")[0] in COLUMNS]
        num_bytes = sum(column.total_uncompressed_size for column in read)
        if num_bytes > MAX_GROUP_BYTES:
            raise AnnotationError(
                f"{path} has rows that take {num_bytes} bytes when they are unpacked, more than {MAX_GROUP_BYTES}. Is "
                "it another dataset's?"
            )
        stored_once = [column.total_uncompressed_size for column in read if column.has_dictionary_page]
        repeatable = max([repeatable, *stored_once])
    return max(1, min(_BATCH_ROWS, MAX_GROUP_BYTES // repeatable))


def _to_python(table: Any, number: int) -> Any:
    """One row of an Arrow table or batch; a ValueError if it holds what has no value in Python."""
    from pyarrow import ArrowException

    try:
        return table.slice(number, 1).to_pylist()[0]
    except UnicodeDecodeError:
        raise
    except (ArrowException, ArithmeticError, ImportError, LookupError, TypeError, ValueError) as fault:
        raise ValueError(f"it holds what cannot be read ({type(fault).__name__})") from fault


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
        raise UsageError(
            f"no folder {name} is here, and at the hub {name} cannot be fetched ({error}). Look at its name and at the "
            "network."
        ) from error
    tables = []
    for split, rows in splits.items():
        _check_columns(name, rows.column_names)
        kept = rows.select_columns(list(COLUMNS)).with_format("arrow")
        tables.append(_Table(source, str(split), partial(_rows_of_split, kept)))
    return tables


def _rows_of_split(rows: Any) -> Iterator[Row]:
    """Rows as they are stored. `datasets` would decode what it takes for images, and open files that these name."""
    for number in range(len(rows)):
        yield partial(_stored_row, rows, number)


def _stored_row(rows: Any, number: int) -> Any:
    return _to_python(rows[number], 0)


def _check_columns(name: str, columns: Sequence[str]) -> None:
    if missing := [column for column in COLUMNS if column not in columns]:
        raise AnnotationError(f"{name} holds no column {missing[0]!r}. Is it another dataset's?")


def _read_tables(tables: Sequence[_Table], image_dir: Path, source: Source) -> Iterator[SampleRecord]:
    if source.whole:
        num_faults = source.faults.num_faults
        for _ in _judge(tables, image_dir, source.faults):
            pass
        if source.faults.num_faults > num_faults:
            return
    for row in _judge(tables, image_dir, source.faults):
        if _write(row, image_dir):
            yield from row.records


@dataclass(frozen=True, slots=True)
class _Row:
    """A row that may be used: its image, and the samples on it, of which there is one at least."""

    item: Fields
    name: str
    data: bytes
    records: Sequence[SampleRecord]


def _judge(tables: Sequence[_Table], image_dir: Path, faults: FaultReport) -> Iterator[_Row]:
    """All rows that may be used, while nothing is written. What they may not share is found here, for it is too late
    once images were written.
    """
    images, ids = _Images(image_dir), set[str]()
    for table in tables:
        for item in _read_rows(table, faults.of(table.source)):
            image_id, name, data = item.take("image_id", int), item.take_text("file_name"), _take_bytes(item)
            size = images.judge(item, image_id, name, data) if item.sound else (0, 0)
            if not item.sound:
                continue
            records = []
            for sample in item.each("samples", "id"):
                for record in _read_sample(sample, image_id, name, size, table.split):
                    if record.id in ids:
                        sample.fault("another sample has this id")
                        break
                    ids.add(record.id)
                    records.append(record)
            if records:
                yield _Row(item, name, data, records)


def _read_rows(table: _Table, faults: FileFaults) -> Iterator[Fields]:
    for number, row in enumerate(table.rows()):
        try:
            content = row()
        except UnicodeDecodeError:
            faults.add(f"row {number}", "it holds a text that is not valid UTF-8")
        except ValueError as fault:
            faults.add(f"row {number}", str(fault))
        else:
            ident = content["image_id"]
            shown = ident if ident is None or type(ident) is int else type_name(ident)
            yield Fields(content, f"row {number} (image_id {shown})", faults)


def _take_bytes(item: Fields) -> bytes:
    data = item.take("image", dict).get("bytes")
    if item.sound and not isinstance(data, bytes):
        item.fault("'image' must hold the bytes of an image file")
    return data if isinstance(data, bytes) else b""


class _Images:
    """The images so far, each under a name of its own that stays in their folder."""

    def __init__(self, path: Path) -> None:
        self._folder = Folder(path)
        self._names: set[str] = set()
        self._ids: set[int] = set()

    def judge(self, item: Fields, image_id: int, name: str, data: bytes) -> Size:
        """(H, W) of an image that may be written, or a fault."""
        shown = repr(name[:_MAX_NAME_LETTERS])
        if name not in self._folder:
            item.fault(f"file_name {shown} does not lie inside the image folder")
        elif not _is_plain(name):
            item.fault(f"file_name {shown} must be the plain name of an image file, such as 1.jpg")
        elif name in self._names:
            item.fault(f"file_name {shown} was there before")
        elif image_id in self._ids:
            item.fault("another row has this image_id")
        else:
            self._names.add(name)
            self._ids.add(image_id)
            try:
                header = read_image_header(data)
                if header.is_turned:
                    item.fault("its EXIF turns its image, and masks lie as it is stored")
                elif not _is_free(self._folder.path / name, data):
                    item.fault(
                        f"{self._folder.path / name} is there already and holds something else; name another folder "
                        "with --unpack"
                    )
                return header.size
            except UndecodableImageError as error:
                item.fault(f"its image cannot be used: {error}")
        return (0, 0)


def _is_plain(name: str) -> bool:
    """Whether a name is an image file's and no more: no folder, not hidden, nothing that another program would run."""
    known = name.lower().endswith(_SUFFIXES) and name.isprintable() and len(os.fsencode(name)) <= _MAX_NAME_LETTERS
    return known and not name.startswith(".") and len(PurePosixPath(name).parts) == 1


def _is_free(path: Path, data: bytes) -> bool:
    """Whether a path holds just these bytes, or nothing at all."""
    if not os.path.lexists(path):
        return True
    try:
        return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data
    except OSError:
        return False


def _write(row: _Row, image_dir: Path) -> bool:
    """Write its image if it is not there already; False, and a fault, if that cannot be done."""
    try:
        if not os.path.lexists(image_dir / row.name):
            write_file(image_dir / row.name, row.data)
        return True
    except OSError as error:
        row.item.fault(f"{row.name!r} cannot be written ({error.strerror})")
        return False


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
    if is_empty(target, size):
        item.fault("its mask has no pixel")
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
