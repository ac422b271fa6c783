"""COCO's instances become one sample for each category in each image; whatever is wrong with one is said."""

from __future__ import annotations

import copy
import json
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
from extract.datasets import DATASETS
from extract.datasets.coco_instances import read_coco_instances
from extract.datasets.coco_readers import COCO_READERS
from extract.datasets.faults import AnnotationError, FaultReport
from extract.datasets.records import SampleRecord, Source
from extract.prepare import PrepareConfig, prepare

H, W = 40, 60
PERSON, DOG, CLOCK = 1, 18, 85
LEFT, SHIFTED, FAR = (2, 4, 12, 14), (7, 9, 17, 19), (40, 20, 50, 30)
CROWD, CORNER = (0, 0, 3, H), (55, 35, 60, 40)


def polygon(box: tuple[int, int, int, int]) -> list[float]:
    x0, y0, x1, y1 = map(float, box)
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def box_mask(*boxes: tuple[int, int, int, int]) -> NDArray[np.bool_]:
    mask = np.zeros((H, W), np.bool_)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = True
    return mask


def annotation(ann_id: int, image_id: int, category_id: int, segmentation: Any, iscrowd: int = 0) -> dict[str, Any]:
    return {
        "segmentation": segmentation,
        "area": 100.0,
        "iscrowd": iscrowd,
        "image_id": image_id,
        "bbox": [0.0, 0.0, 1.0, 1.0],
        "category_id": category_id,
        "id": ann_id,
    }


CATEGORIES = [
    {"supercategory": "indoor", "id": CLOCK, "name": "clock"},
    {"supercategory": "person", "id": PERSON, "name": "person"},
    {"supercategory": "animal", "id": DOG, "name": "dog"},
]


def instances(images: dict[int, str], *annotations: dict[str, Any]) -> dict[str, Any]:
    return {
        "info": {"description": "COCO", "year": 2017},
        "licenses": [],
        "images": [{"id": n, "file_name": name, "height": H, "width": W, "license": 3} for n, name in images.items()],
        "annotations": list(annotations),
        "categories": CATEGORIES,
    }


CROWD_RUNS = {"counts": [0, 3 * H, (W - 3) * H], "size": [H, W]}

CONTENT: dict[str, dict[str, Any]] = {
    "train2017": instances(
        {30: "000000000030.jpg", 9: "000000000009.jpg", 5: "000000000005.jpg"},
        annotation(101, 9, DOG, [polygon(LEFT)]),
        annotation(102, 30, DOG, [polygon(LEFT), polygon(FAR)]),
        annotation(103, 9, DOG, [polygon(SHIFTED)]),
        annotation(104, 9, PERSON, [polygon(FAR)]),
        annotation(900100000009, 9, PERSON, CROWD_RUNS, iscrowd=1),
        annotation(900200000030, 30, CLOCK, CROWD_RUNS, iscrowd=1),
        annotation(105, 30, PERSON, {"counts": encode_mask(box_mask(CORNER)).decode(), "size": [H, W]}),
    ),
    "val2017": instances({139: "000000000139.jpg"}, annotation(201, 139, CLOCK, [polygon(LEFT)])),
    "train2014": instances({7: "COCO_train2014_000000000007.jpg"}, annotation(1, 7, CLOCK, [polygon(LEFT)])),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for part, content in CONTENT.items():
        write(tmp_path, part, content)
        for item in content["images"]:
            path = tmp_path / "images" / part / item["file_name"]
            path.parent.mkdir(exist_ok=True, parents=True)
            Image.new("RGB", (W, H)).save(path)
    return tmp_path


def write(root: Path, part: str, content: Any) -> None:
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))


def read(root: Path, year: int = 2017) -> dict[str, SampleRecord]:
    samples, faults = read_with_faults(root, year)
    assert faults == []
    return samples


def read_with_faults(root: Path, year: int = 2017) -> tuple[dict[str, SampleRecord], list[str]]:
    source = Source(root, FaultReport())
    samples = {sample.id: sample for sample in read_coco_instances(source, year).samples}
    return samples, [f"{Path(fault.source).name}: {fault}" for fault in source.faults.faults]


def mask_of(sample: SampleRecord) -> NDArray[np.bool_]:
    assert sample.target is not None
    return decode_mask(sample.target, sample.image_size)


def test_every_category_of_every_image_is_a_sample_by_image_and_category_id(root: Path) -> None:
    assert list(read(root)) == ["30:1", "30:18", "30:85", "9:1", "9:18", "139:85"]


def test_a_sample_carries_its_image_and_the_name_of_its_category(root: Path) -> None:
    sample = read(root)["9:18"]
    assert sample.prompt == "dog"
    assert (sample.image_id, sample.image_path, sample.image_size) == ("9", "train2017/000000000009.jpg", (H, W))
    assert not sample.no_target
    assert [sample.split for sample in read(root).values()] == ["train"] * 5 + ["val"]


def test_the_target_is_the_clamped_union_of_all_annotations_crowds_included(root: Path) -> None:
    samples = read(root)
    np.testing.assert_array_equal(mask_of(samples["9:18"]), box_mask(LEFT, SHIFTED))
    np.testing.assert_array_equal(mask_of(samples["30:18"]), box_mask(LEFT, FAR))
    np.testing.assert_array_equal(mask_of(samples["9:1"]), box_mask(FAR, CROWD))
    np.testing.assert_array_equal(mask_of(samples["30:85"]), box_mask(CROWD))
    np.testing.assert_array_equal(mask_of(samples["30:1"]), box_mask(CORNER))


def test_tags_name_the_category_and_count_a_crowd_as_many(root: Path) -> None:
    samples = read(root)
    assert samples["30:18"].tags == {"category": "dog", "targets": "one"}
    assert samples["9:18"].tags == {"category": "dog", "targets": "many"}
    assert samples["30:85"].tags == {"category": "clock", "targets": "many"}


def test_classes_are_the_names_of_the_categories_in_the_order_of_their_ids(root: Path) -> None:
    assert read_coco_instances(Source(root), 2017).classes == ("person", "dog", "clock")


def test_each_year_is_its_own_dataset(root: Path) -> None:
    assert [sample.image_path for sample in read(root, 2014).values()] == ["train2014/COCO_train2014_000000000007.jpg"]
    dataset = COCO_READERS["coco-instances-2017"].read(Source(root))
    assert dataset.name == "coco-instances-2017"
    assert dataset.image_dir == root / "images"
    names = ("instances_train2017.json", "instances_val2017.json")
    assert dataset.sources == tuple(root / "annotations" / name for name in names)
    assert COCO_READERS["coco-instances-2014"].read(Source(root)).name == "coco-instances-2014"


def test_published_are_the_images_that_have_an_annotation() -> None:
    of_years = {year: COCO_READERS[f"coco-instances-{year}"] for year in (2014, 2017)}
    assert {reader.counted for reader in of_years.values()} == {"images"}
    assert sum(of_years[2014].published.values()) == sum(of_years[2017].published.values()) == 122218


def test_splits_that_name_other_categories_are_refused(root: Path) -> None:
    content = copy.deepcopy(CONTENT["val2017"])
    content["categories"][0]["name"] = "watch"
    write(root, "val2017", content)
    with pytest.raises(UsageError, match=r"instances_train2017\.json and .*instances_val2017\.json name other categ"):
        read_coco_instances(Source(root), 2017)


def test_a_missing_or_broken_file_is_refused_at_once(root: Path) -> None:
    (root / "annotations" / "instances_train2014.json").write_text("{}")
    with pytest.raises(AnnotationError, match=r"instances_train2014\.json has 1 fault: 'categories' is missing"):
        read_coco_instances(Source(root), 2014)
    (root / "annotations" / "instances_train2014.json").unlink()
    with pytest.raises(UsageError, match=r"none of annotations/instances_train2014\.json and"):
        read_coco_instances(Source(root), 2014)


Change = Callable[[dict[str, Any]], object]


def having(value: Any, position: int, key: str) -> Change:
    return lambda content: content["annotations"][position].__setitem__(key, value)


BAD_DOG = "image 30, category dog: the segmentation of ann_id 102 is bad: "

FAULTS: list[tuple[Change, str]] = [
    (having([], 1, "segmentation"), f"{BAD_DOG}a segmentation is a list of polygons or run lengths"),
    (having([[1.0, 2.0, 3.0, 4.0]], 1, "segmentation"), f"{BAD_DOG}a polygon is a flat list of at least three"),
    (having([[90, 0, 99, 0, 99, 9]], 1, "segmentation"), f"{BAD_DOG}a polygon lies outside the image of 40 x 60"),
    (having({"size": [H, W], "counts": [7]}, 1, "segmentation"), f"{BAD_DOG}run lengths must be whole numbers that"),
    (having({"size": [W, H], "counts": [H * W]}, 1, "segmentation"), f"{BAD_DOG}run lengths must hold 'counts' and"),
    (having({"size": [H, W], "counts": "12`"}, 1, "segmentation"), f"{BAD_DOG}compressed run lengths are cut short"),
    (having(7, 1, "segmentation"), "annotations item 1 (id 102): 'segmentation' must be a list"),
    (having(4, 1, "image_id"), "annotations (id 102): image_id 4 is not among the images"),
    (having(3, 1, "category_id"), "annotations item 1 (id 102): category_id 3 is not among the categories"),
    (having(101, 1, "id"), "annotations item 1 (id 101): another annotation has this id"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS, ids=[message for _, message in FAULTS])
def test_a_faulty_annotation_is_named_and_the_others_are_read(root: Path, change: Change, message: str) -> None:
    content = copy.deepcopy(CONTENT["train2017"])
    change(content)
    write(root, "train2017", content)
    samples, faults = read_with_faults(root)
    assert len(faults) == 1
    assert faults[0].startswith(f"instances_train2017.json: {message}")
    of_image = [] if message.startswith("annotations item") else ["30:1", "30:85"]  # it might be of either category
    assert list(samples) == [*of_image, "9:1", "9:18", "139:85"]


def test_a_category_is_left_out_if_one_of_its_annotations_is_bad(root: Path) -> None:
    content = copy.deepcopy(CONTENT["train2017"])
    content["annotations"][2]["segmentation"] = []
    write(root, "train2017", content)
    samples, faults = read_with_faults(root)
    assert len(faults) == 1
    assert "9:18" not in samples


UNREADABLE = [{"segmentation": 7}, {"category_id": 3}, {"category_id": "dog"}, {"iscrowd": 2}, {"id": "101"}]


@pytest.mark.parametrize("change", UNREADABLE)
def test_an_image_is_left_out_if_one_of_its_annotations_cannot_be_read(root: Path, change: dict[str, Any]) -> None:
    everything, _ = read_with_faults(root)
    content = copy.deepcopy(CONTENT["train2017"])
    spoilt = content["annotations"][0]
    spoilt.update(change)
    write(root, "train2017", content)
    samples, faults = read_with_faults(root)
    of_image = f"{spoilt['image_id']}:"
    assert len(faults) == 1
    assert list(samples) == [sample_id for sample_id in everything if not sample_id.startswith(of_image)] != []


def test_a_store_is_prepared_and_its_images_are_counted(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DATASETS, "coco-instances-2017", COCO_READERS["coco-instances-2017"])
    prepared = prepare(PrepareConfig("coco-instances-2017", root, tmp_path / "stores"))
    samples = open_samples(prepared.path).samples
    assert samples.classes == ("person", "dog", "clock")
    assert samples.images.ids == ["30", "9", "139"]
    assert prepared.counts.num_counted_of_split == {"train": 2, "val": 1}
    np.testing.assert_array_equal(samples.target(4), box_mask(LEFT, SHIFTED))
