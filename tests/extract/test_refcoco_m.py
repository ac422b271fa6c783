"""RefCOCO-m is read from parquet files and by name; its images are unpacked as they are, and to nowhere else."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cache_schema.errors import UsageError
from cache_schema.masks import decode_mask, encode_mask
from cache_schema.samples import open_samples
from extract.datasets import DATASETS, refcoco_m
from extract.datasets.faults import AnnotationError, FaultReport
from extract.datasets.records import SampleRecord, Source
from extract.datasets.refcoco_m import REFCOCO_M_READERS, read_refcoco_m
from extract.prepare import PrepareConfig, prepare
from tests.extract.hostile import encode, exif, png_header, png_of_chunks

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

H, W = 8, 12
LEFT, RIGHT = slice(0, 4), slice(6, 12)
"""Columns of the masks."""

TABLE = pa.schema(
    {
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "image_id": pa.int64(),
        "file_name": pa.string(),
        "samples": pa.list_(
            pa.struct(
                {
                    "id": pa.int64(),
                    "image_id": pa.int64(),
                    "category": pa.string(),
                    "supercategory": pa.string(),
                    "label": pa.string(),
                    "sentences": pa.list_(pa.string()),
                    "bbox": pa.list_(pa.float32()),
                    "mask": pa.struct({"counts": pa.string(), "size": pa.list_(pa.int32())}),
                }
            )
        ),
    }
)


def mask(columns: slice, size: tuple[int, int] = (H, W)) -> NDArray[np.bool_]:
    drawn = np.zeros(size, np.bool_)
    drawn[1:5, columns] = True
    return drawn


def jpeg(colour: int, size: tuple[int, int] = (H, W)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size[::-1], (colour, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def annotated(
    sample_id: int, image_id: int, category: str, drawn: NDArray[np.bool_], *sentences: str
) -> dict[str, Any]:
    return {
        "id": sample_id,
        "image_id": image_id,
        "category": category,
        "supercategory": "animal",
        "label": category,
        "sentences": list(sentences),
        "bbox": [0.0, 1.0, 4.0, 4.0],
        "mask": {"counts": encode_mask(drawn).decode(), "size": list(drawn.shape)},
    }


def row(image_id: int, data: bytes, *samples: dict[str, Any]) -> dict[str, Any]:
    name = f"COCO_train2014_{image_id:012d}.jpg"
    return {"image": {"bytes": data, "path": name}, "image_id": image_id, "file_name": name, "samples": list(samples)}


ROWS: list[dict[str, Any]] = [
    row(30, jpeg(30), annotated(7, 30, "cat", mask(LEFT), "the left cat", "  cat\ton the left ")),
    row(
        9,
        jpeg(9, (W, H)),
        annotated(8, 9, "dog", mask(LEFT, (W, H)), "dog"),
        annotated(5, 9, "cat", mask(RIGHT, (W, H)), "the cat", "not the dog"),
    ),
]
OTHER_ROWS = [row(4, jpeg(4), annotated(2, 4, "cow", mask(RIGHT), "cow"), annotated(3, 4, "cow", mask(LEFT)))]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two files of one split, as `datasets` writes them."""
    write(tmp_path / "published" / "data" / "validation-00000-of-00002.parquet", ROWS)
    write(tmp_path / "published" / "data" / "validation-00001-of-00002.parquet", OTHER_ROWS)
    return tmp_path / "published"


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, TABLE), path)


def one_file(root: Path, rows: list[dict[str, Any]]) -> Path:
    """A folder of its own with one parquet file."""
    write(root / "one" / "validation.parquet", rows)
    return root / "one"


def read(root: Path, unpack: Path | None = None) -> dict[str, SampleRecord]:
    samples, faults = read_with_faults(root, unpack)
    assert faults == []
    return samples


def read_with_faults(root: Path, unpack: Path | None = None) -> tuple[dict[str, SampleRecord], list[str]]:
    source = Source(root, FaultReport(), unpack=unpack)
    samples = {sample.id: sample for sample in read_refcoco_m(source).samples}
    return samples, [f"{Path(fault.source).name}: {fault}" for fault in source.faults.faults]


def mask_of(sample: SampleRecord) -> NDArray[np.bool_]:
    assert sample.target is not None
    return decode_mask(sample.target, sample.image_size)


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_every_sentence_is_a_sample_in_the_order_of_the_files(root: Path) -> None:
    assert list(read(root)) == ["7:0", "7:1", "8:0", "5:0", "5:1", "2:0"]


def test_a_sample_carries_its_image_sentence_split_and_mask(root: Path) -> None:
    samples = read(root)
    sample = samples["7:1"]
    assert sample.prompt == "cat on the left"
    assert (sample.image_id, sample.image_path) == ("30", "COCO_train2014_000000000030.jpg")
    assert (sample.split, sample.ref_id, sample.no_target) == ("validation", "7", False)
    assert (sample.image_size, samples["5:0"].image_size) == ((H, W), (W, H))
    np.testing.assert_array_equal(mask_of(sample), mask(LEFT))
    np.testing.assert_array_equal(mask_of(samples["5:1"]), mask(RIGHT, (W, H)))


def test_tags_name_the_category_and_the_supercategory_where_there_is_one(root: Path) -> None:
    assert read(root)["8:0"].tags == {"category": "dog", "supercategory": "animal"}
    rows = copy.deepcopy(ROWS[:1])
    rows[0]["samples"][0]["supercategory"] = None
    assert read(one_file(root, rows))["7:0"].tags == {"category": "cat"}


def test_the_dataset_names_its_sources_and_the_folder_of_its_images(root: Path) -> None:
    dataset = REFCOCO_M_READERS["refcoco-m"].read(Source(root))
    assert dataset.name == "refcoco-m"
    assert dataset.image_dir == root / "images"
    names = ("validation-00000-of-00002.parquet", "validation-00001-of-00002.parquet")
    assert dataset.sources == tuple(root / "data" / name for name in names)


def test_images_are_unpacked_byte_for_byte_as_their_samples_are_read(root: Path, tmp_path: Path) -> None:
    dataset = read_refcoco_m(Source(root, unpack=tmp_path / "unpacked"))
    assert not (tmp_path / "unpacked").exists()
    next(dataset.samples)
    assert files_below(tmp_path / "unpacked") == ["COCO_train2014_000000000030.jpg"]
    list(dataset.samples)
    for item in (*ROWS, *OTHER_ROWS):
        assert (tmp_path / "unpacked" / item["file_name"]).read_bytes() == item["image"]["bytes"]
    assert not (root / "images").exists()


def test_images_that_are_there_already_are_left_alone(root: Path) -> None:
    read(root)
    paths = sorted((root / "images").iterdir())
    before = [path.stat().st_ino for path in paths]
    assert len(read(root)) == 6
    assert [path.stat().st_ino for path in paths] == before


def test_a_file_of_other_bytes_is_never_replaced(root: Path) -> None:
    (root / "images").mkdir()
    mine = root / "images" / "COCO_train2014_000000000030.jpg"
    mine.write_bytes(jpeg(99))
    samples, faults = read_with_faults(root)
    assert mine.read_bytes() == jpeg(99)
    assert list(samples) == ["8:0", "5:0", "5:1", "2:0"]
    assert len(faults) == 1
    assert "row 0 (image_id 30): " in faults[0]
    assert "is there already and holds something else; name another folder with --unpack" in faults[0]


def test_parquet_files_may_lie_in_the_folder_itself(root: Path) -> None:
    assert list(read(one_file(root, OTHER_ROWS))) == ["2:0"]
    assert read(root / "one")["2:0"].split == "validation"


def test_one_of_several_files_that_is_missing_is_named(root: Path) -> None:
    (root / "data" / "validation-00000-of-00002.parquet").unlink()
    with pytest.raises(UsageError, match=r"validation-00000-of-00002\.parquet is missing beside validation-00001"):
        read_refcoco_m(Source(root))


def test_a_folder_without_parquet_files_and_a_folder_that_is_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no parquet files, and neither does its data/"):
        read_refcoco_m(Source(tmp_path))
    with pytest.raises(UsageError, match=r"no folder at .*nowhere; name one with parquet files, or a dataset at the"):
        read_refcoco_m(Source(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="say with --unpack where to write them"):
        read_refcoco_m(Source(tmp_path, image_dir=tmp_path))


def test_a_file_that_is_no_parquet_or_another_table_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "validation.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(AnnotationError, match=r"validation\.parquet is no parquet file"):
        read_refcoco_m(Source(tmp_path))
    pq.write_table(pa.table({"image": [1], "image_id": [1], "samples": [1]}), tmp_path / "validation.parquet")
    with pytest.raises(AnnotationError, match=r"validation\.parquet holds no column 'file_name'"):
        read_refcoco_m(Source(tmp_path))


def test_a_damaged_file_is_named(root: Path) -> None:
    path = root / "data" / "validation-00000-of-00002.parquet"
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(0).column(2).data_page_offset
    data[start : start + 8] = b"\xff" * 8
    path.write_bytes(data)
    with pytest.raises(AnnotationError, match=r"validation-00000-of-00002\.parquet is damaged"):
        read(root)


def test_files_are_read_a_few_rows_at_a_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(n, jpeg(n), annotated(n, n, "cat", mask(LEFT), "cat")) for n in range(40)]
    sizes, iter_batches = [], pq.ParquetFile.iter_batches

    def watched(self: Any, *args: Any, **keywords: Any) -> Any:
        for batch in iter_batches(self, *args, **keywords):
            sizes.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    dataset = read_refcoco_m(Source(one_file(root, rows)))
    next(dataset.samples)
    assert sizes == [16]
    assert len(list(dataset.samples)) == 39


Change = Callable[[Any], object]


def having(value: Any, *path: Any) -> Change:
    def change(rows: Any) -> None:
        for step in path[:-1]:
            rows = rows[step]
        rows[path[-1]] = value

    return change


HUGE = png_of_chunks(png_header(60000, 60000), (b"IDAT", b""))
"""The beginning of an image that would take gigabytes."""

TURNED = encode(np.zeros((H, W, 3), np.uint8), "JPEG", exif=exif(3))
PLAIN = "must be the plain name of an image file, such as 1.jpg"

ROW_FAULTS: list[tuple[Change, str]] = [
    (having(None, 0, "image_id"), "row 0 (image_id None): 'image_id' must be a whole number, is null"),
    (having(None, 0, "file_name"), "row 0 (image_id 30): 'file_name' must be a text, is null"),
    (having(" ", 0, "file_name"), "row 0 (image_id 30): 'file_name' is empty"),
    (having("../30.jpg", 0, "file_name"), "row 0 (image_id 30): file_name '../30.jpg' does not lie inside the image"),
    (having("a/../../30.jpg", 0, "file_name"), "file_name 'a/../../30.jpg' does not lie inside the image folder"),
    (having("/tmp/30.jpg", 0, "file_name"), "row 0 (image_id 30): file_name '/tmp/30.jpg' does not lie inside"),
    (having("x" * 300 + ".jpg", 0, "file_name"), PLAIN),
    (having("below/30.jpg", 0, "file_name"), PLAIN),
    (having(".30.jpg", 0, "file_name"), PLAIN),
    (having("30.py", 0, "file_name"), PLAIN),
    (having("authorized_keys", 0, "file_name"), PLAIN),
    (having("3\x1b[31m0.jpg", 0, "file_name"), PLAIN),
    (
        having(TURNED, 0, "image", "bytes"),
        "row 0 (image_id 30): its EXIF turns its image, and masks lie as it is stored",
    ),
    (having(None, 0, "image"), "row 0 (image_id 30): 'image' must be an object, is null"),
    (having(None, 0, "image", "bytes"), "row 0 (image_id 30): 'image' must hold the bytes of an image file"),
    (having(b"", 0, "image", "bytes"), "row 0 (image_id 30): its image cannot be used: the file is empty"),
    (having(b"#!/bin/sh", 0, "image", "bytes"), "row 0 (image_id 30): its image cannot be used: not an image file"),
    (having(HUGE, 0, "image", "bytes"), "its image cannot be used: its pixels are more than 150000000"),
    (having(None, 0, "samples"), "row 0 (image_id 30): 'samples' must be a list, is null"),
    (having(None, 0, "samples", 0), "row 0 (image_id 30), samples item 0: must be an object, is null"),
    (having(None, 0, "samples", 0, "id"), "samples item 0 (id null): 'id' must be a whole number, is null"),
    (having(9, 0, "samples", 0, "image_id"), "samples item 0 (id 7): it belongs to image 9, not to image 30"),
    (having(None, 0, "samples", 0, "sentences"), "samples item 0 (id 7): 'sentences' must be a list, is null"),
    (having(None, 0, "samples", 0, "sentences", 1), "samples item 0 (id 7): 'sentences' must list texts"),
    (having(" \n", 0, "samples", 0, "sentences", 1), "samples item 0 (id 7): sentence 1 is empty"),
    (having("", 0, "samples", 0, "category"), "samples item 0 (id 7): 'category' is empty"),
    (having(None, 0, "samples", 0, "mask"), "samples item 0 (id 7): 'mask' must be an object, is null"),
    (having(None, 0, "samples", 0, "mask", "counts"), "its mask is bad: run lengths must hold 'counts' and 'size'"),
    (
        having(encode_mask(np.zeros((H, W), np.bool_)).decode(), 0, "samples", 0, "mask", "counts"),
        "samples item 0 (id 7): its mask has no pixel",
    ),
    (having("12`", 0, "samples", 0, "mask", "counts"), "its mask is bad: compressed run lengths are cut short"),
    (
        having([W, H], 0, "samples", 0, "mask", "size"),
        "its mask is bad: run lengths must hold 'counts' and the image's",
    ),
]


@pytest.mark.parametrize(("change", "message"), ROW_FAULTS, ids=[message for _, message in ROW_FAULTS])
def test_a_faulty_row_is_named_and_the_others_are_read(
    root: Path, tmp_path: Path, change: Change, message: str
) -> None:
    rows = copy.deepcopy(ROWS)
    change(rows)
    folder = one_file(root, rows)
    before = files_below(tmp_path)
    samples, faults = read_with_faults(folder)
    assert len(faults) == 1
    assert faults[0].startswith("validation.parquet: row 0 ")
    assert message in faults[0]
    assert list(samples) == ["8:0", "5:0", "5:1"]
    written = set(files_below(tmp_path)) - set(before)
    of_images = {f"published/one/images/{item['file_name']}" for item in ROWS}
    assert written <= of_images
    if "samples item" not in faults[0] and "'samples'" not in faults[0]:
        assert len(written) == 1


def test_a_link_does_not_lead_out_of_the_image_folder(root: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (root / "one" / "images").mkdir(parents=True)
    (root / "one" / "images" / "link").symlink_to(tmp_path / "outside")
    rows = copy.deepcopy(ROWS)
    rows[0]["file_name"] = "link/30.jpg"
    _, faults = read_with_faults(one_file(root, rows))
    assert "file_name 'link/30.jpg' does not lie inside the image folder" in faults[0]
    assert files_below(tmp_path / "outside") == []


def test_two_rows_of_one_file_name_are_a_fault(root: Path) -> None:
    rows = copy.deepcopy(ROWS)
    rows[1]["file_name"] = rows[0]["file_name"]
    samples, faults = read_with_faults(one_file(root, rows))
    assert faults == [
        "validation.parquet: row 1 (image_id 9): file_name 'COCO_train2014_000000000030.jpg' was there before"
    ]
    assert list(samples) == ["7:0", "7:1"]


def test_two_rows_of_one_image_id_and_two_samples_of_one_id_are_faults(root: Path) -> None:
    rows = copy.deepcopy(ROWS)
    rows[1]["samples"][1]["id"] = 8
    rows.append(row(30, jpeg(1), annotated(1, 30, "cat", mask(LEFT), "cat")))
    rows[2]["file_name"] = "other.jpg"
    samples, faults = read_with_faults(one_file(root, rows))
    assert faults == [
        "validation.parquet: row 1 (image_id 9), samples item 1 (id 8): another sample has this id",
        "validation.parquet: row 2 (image_id 30): another row has this image_id",
    ]
    assert list(samples) == ["7:0", "7:1", "8:0"]


SPOILT: list[Change] = [
    having("../30.jpg", 1, "file_name"),
    having(b"no image", 1, "image", "bytes"),
    having(7, 1, "samples", 0, "id"),
    having("12`", 1, "samples", 1, "mask", "counts"),
    having(30, 1, "image_id"),
]


@pytest.mark.parametrize("change", SPOILT)
def test_what_is_to_be_whole_is_judged_before_anything_is_written(root: Path, change: Change) -> None:
    rows = copy.deepcopy(ROWS)
    change(rows)
    folder = one_file(root, rows)
    before = files_below(root)
    source = Source(folder, FaultReport(), whole=True)
    assert list(read_refcoco_m(source).samples) == []
    assert files_below(root) == before
    assert source.faults.num_faults == len(read_with_faults(folder)[1]) >= 1


def test_what_is_whole_gives_what_it_gives_otherwise(root: Path) -> None:
    source = Source(root, FaultReport(), whole=True)
    assert {sample.id: sample for sample in read_refcoco_m(source).samples} == read(root)
    assert source.faults.num_faults == 0
    assert len(files_below(root / "images")) == 3


def test_a_folder_of_images_that_is_a_link_elsewhere_is_refused_unless_it_is_named(root: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (root / "images").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"images is a link that leads out of its folder; name where it leads with --"):
        read_refcoco_m(Source(root))
    assert files_below(tmp_path / "elsewhere") == []
    read(root, root / "images")
    assert len(files_below(tmp_path / "elsewhere")) == 3


def test_a_dangling_link_is_not_replaced(root: Path) -> None:
    (root / "images").mkdir()
    link = root / "images" / "COCO_train2014_000000000030.jpg"
    link.symlink_to(root / "images" / "nothing.jpg")
    _, faults = read_with_faults(root)
    assert "is there already and holds something else" in faults[0]
    assert link.is_symlink()
    assert not link.exists()


def test_a_file_that_would_take_too_much_memory_is_refused_by_its_footer(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = copy.deepcopy(ROWS)
    rows[0]["image"]["bytes"] = bytes(2**20)
    folder = one_file(root, rows)
    assert (folder / "validation.parquet").stat().st_size < 2**17
    monkeypatch.setattr(refcoco_m, "MAX_GROUP_BYTES", 2**20)
    with pytest.raises(
        AnnotationError, match=r"validation\.parquet has rows that take 10\d{5} bytes when they are unp"
    ):
        read_refcoco_m(Source(folder))


def test_rows_that_may_share_a_large_value_are_read_one_by_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(n, bytes(2**18), annotated(n, n, "cat", mask(LEFT), "cat")) for n in range(4)]
    sizes, iter_batches = [], pq.ParquetFile.iter_batches

    def watched(self: Any, *args: Any, **keywords: Any) -> Any:
        for batch in iter_batches(self, *args, **keywords):
            sizes.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    monkeypatch.setattr(refcoco_m, "MAX_GROUP_BYTES", 2**19)
    _, faults = read_with_faults(one_file(root, rows))
    assert len(faults) == 4
    assert sizes == [1] * 4


def test_a_value_that_python_has_none_for_is_a_fault_of_its_row(root: Path) -> None:
    folder = one_file(root, ROWS)
    path = folder / "validation.parquet"
    table = pq.read_table(path)
    days = pa.array([2**62, 0], pa.int64()).view(pa.date64())
    pq.write_table(table.set_column(table.schema.get_field_index("file_name"), "file_name", days), path)
    _, faults = read_with_faults(folder)
    assert faults[0] == "validation.parquet: row 0: it holds what cannot be read (OverflowError)"
    assert faults[1] == "validation.parquet: row 1 (image_id 9): 'file_name' must be a text, is a date"


def test_bytes_that_are_no_text_are_a_fault_of_their_row(root: Path) -> None:
    folder = one_file(root, ROWS)
    path = folder / "validation.parquet"
    table = pq.read_table(path)
    names = pa.array([b"\xff\xfe.jpg", b"9.jpg"], pa.binary()).view(pa.string())
    pq.write_table(table.set_column(table.schema.get_field_index("file_name"), "file_name", names), path)
    samples, faults = read_with_faults(folder)
    assert faults == ["validation.parquet: row 0: it holds a text that is not valid UTF-8"]
    assert list(samples) == ["8:0", "5:0", "5:1"]


def test_a_store_is_prepared_and_its_masks_are_counted(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DATASETS, "refcoco-m", REFCOCO_M_READERS["refcoco-m"])
    prepared = prepare(PrepareConfig("refcoco-m", root, tmp_path / "stores"))
    store = open_samples(prepared.path)
    assert store.samples.images.ids == ["30", "9", "4"]
    assert store.image_dir is not None
    assert store.image_dir.resolve() == (root / "images").resolve()
    assert prepared.counts.num_counted_of_split == {"validation": 4}
    assert prepared.counts.differences == ["split validation has 4 refs, published are 2080"]


@pytest.fixture
def hub(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder stands for a dataset at the hub: `datasets` is sent there instead of to the network."""
    datasets = pytest.importorskip("datasets")
    fetch = datasets.load_dataset
    cache = str(tmp_path / "cache of datasets")
    folders = {"moondream/refcoco-m": str(root)}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: fetch(folders.get(name, name), cache_dir=cache))
    return root


def test_a_dataset_is_read_by_its_name_as_from_its_files(hub: Path, tmp_path: Path) -> None:
    by_name = read(Path("moondream/refcoco-m"), tmp_path / "unpacked")
    assert by_name == read(hub)
    assert files_below(tmp_path / "unpacked") == files_below(hub / "images")
    dataset = read_refcoco_m(Source(Path("moondream/refcoco-m"), unpack=tmp_path / "unpacked"))
    assert dataset.image_dir == tmp_path / "unpacked"
    assert dataset.sources == ()


def test_each_split_of_a_dataset_by_name_keeps_its_rows(hub: Path, tmp_path: Path) -> None:
    for name in ("validation-00000-of-00002", "validation-00001-of-00002"):
        (hub / "data" / f"{name}.parquet").unlink()
    write(hub / "data" / "validation-00000-of-00001.parquet", ROWS)
    write(hub / "data" / "test-00000-of-00001.parquet", OTHER_ROWS)
    samples = read(Path("moondream/refcoco-m"), tmp_path / "unpacked")
    assert {sample.id: sample.split for sample in samples.values()} == {
        **dict.fromkeys(("7:0", "7:1", "8:0", "5:0", "5:1"), "validation"),
        "2:0": "test",
    }


def test_images_that_datasets_would_decode_are_taken_as_the_bytes_they_are(hub: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features.from_arrow_schema(TABLE)
    features["image"] = datasets.Image()
    for path in (hub / "data").iterdir():
        pq.write_table(pq.read_table(path).replace_schema_metadata(features.arrow_schema.metadata), path)
    assert len(read(Path("moondream/refcoco-m"), tmp_path / "unpacked")) == 6
    for item in (*ROWS, *OTHER_ROWS):
        assert (tmp_path / "unpacked" / item["file_name"]).read_bytes() == item["image"]["bytes"]


def test_no_file_that_a_table_names_is_opened(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "secret.png").write_bytes(encode(np.zeros((H, W, 3), np.uint8), "PNG"))
    rows = copy.deepcopy(ROWS)
    for item in rows:
        item["image"] = {"bytes": None, "path": str(tmp_path / "secret.png")}
        for sample in item["samples"]:
            sample["mask"] = {"bytes": None, "path": str(tmp_path / "secret.png")}
    kind = datasets.Image().pa_type
    within = pa.struct(
        [pa.field("mask", kind) if field.name == "mask" else field for field in TABLE[3].type.value_type]
    )
    schema = TABLE.set(0, pa.field("image", kind)).set(3, pa.field("samples", pa.list_(within)))
    features = datasets.Features.from_arrow_schema(schema)
    features["image"] = datasets.Image()
    features["samples"].feature["mask"] = datasets.Image()
    for path in (hub / "data").iterdir():
        table = pa.Table.from_pylist(rows, schema).replace_schema_metadata(features.arrow_schema.metadata)
        pq.write_table(table, path)
    opened = []
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *args, **keywords: opened.append(args))
    _, faults = read_with_faults(Path("moondream/refcoco-m"), tmp_path / "unpacked")
    assert "'image' must hold the bytes of an image file" in faults[0]
    assert opened == []


def test_a_name_needs_a_folder_for_the_images() -> None:
    with pytest.raises(UsageError, match=r"name a folder for the images of moondream/refcoco-m with --unpack"):
        read_refcoco_m(Source(Path("moondream/refcoco-m")))


def test_a_name_that_cannot_be_fetched_is_said_in_one_sentence(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nobody/nothing cannot be fetched .*Look at its name and at the network"):
        read_refcoco_m(Source(Path("nobody/nothing"), unpack=tmp_path))


def test_libraries_that_may_run_what_comes_with_a_dataset_are_refused(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["datasets"], "__version__", "3.6.0")
    with pytest.raises(UsageError, match=r"datasets 3\.6\.0 may run code.*headstart\[datasets\]"):
        read_refcoco_m(Source(Path("moondream/refcoco-m"), unpack=tmp_path))


def test_a_library_that_is_missing_is_named_with_the_extra_that_has_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=r"is read by pyarrow, which is not installed.*headstart\[datasets\]"):
        read_refcoco_m(Source(root))
    with pytest.raises(UsageError, match=r"is fetched by datasets, which is not installed.*headstart\[datasets\]"):
        read_refcoco_m(Source(Path("moondream/refcoco-m"), unpack=tmp_path))
