"""COCO's `instances.json`: masks are pycocotools' bit for bit, and whatever is malformed is named at its place."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from cache_schema.masks import decode_mask, encode_mask, is_empty, union_of_segmentations
from extract.datasets import coco
from extract.datasets.coco import CocoFile
from extract.datasets.faults import AnnotationError, FaultReport, Fields
from tests.extract.coco_files import (
    CAT,
    COMPRESSED,
    CROWD,
    DOG,
    FAR,
    INSTANCES,
    LEFT,
    LEFT_BOX,
    SHIFTED,
    Change,
    H,
    W,
    annotation,
    box_mask,
    having,
    runs_of,
    without,
    write_images,
    write_instances,
)

COORDINATES = st.floats(-W, 2 * W, allow_nan=False) | st.integers(-W, 2 * W)
POLYGONS = st.lists(COORDINATES, min_size=6, max_size=24).map(lambda values: values[: len(values) // 2 * 2])
MASKS = hnp.arrays(np.bool_, (H, W))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_images(tmp_path / "images")
    return tmp_path


def open_coco(
    root: Path, instances: Any = INSTANCES, faults: FaultReport | None = None, **options: Any
) -> tuple[CocoFile, FaultReport]:
    faults = faults or FaultReport()
    return CocoFile(write_instances(root, instances), root / "images", faults, **options), faults


def told(faults: FaultReport) -> list[str]:
    return [str(fault) for fault in faults.faults]


def item(faults: FaultReport, where: str = "item 0") -> Fields:
    return Fields({}, where, faults.of(Path("refs")))


def is_outside(polygon: list[float]) -> bool:
    columns, rows = polygon[::2], polygon[1::2]
    return max(columns) < 0 or min(columns) > W or max(rows) < 0 or min(rows) > H


def test_images_categories_and_annotations_are_read(root: Path) -> None:
    file, faults = open_coco(root)
    assert file.categories == {CAT: "cat", DOG: "dog"}
    assert {image.id: (image.path, image.size) for image in file.images.values()} == {
        581857: ("COCO_train2014_000000581857.jpg", (H, W)),
        909: ("COCO_train2014_000000000909.jpg", (W, H)),
    }
    assert [(one.id, one.image_id, one.category_id, one.iscrowd) for one in file.annotations.values()] == [
        (1, 581857, CAT, 0),
        (2, 581857, CAT, 0),
        (3, 581857, DOG, 0),
        (4, 581857, CAT, 1),
        (5, 581857, DOG, 0),
        (6, 909, DOG, 0),
    ]
    assert not faults.num_faults


@pytest.mark.parametrize(
    ("ann_id", "boxes"),
    [(1, [LEFT]), (2, [SHIFTED]), (3, [LEFT, SHIFTED, FAR]), (4, [CROWD]), (5, [COMPRESSED])],
    ids=["a polygon", "another", "three that overlap", "uncompressed counts", "compressed counts"],
)
def test_a_mask_is_the_clamped_union_of_its_parts(root: Path, ann_id: int, boxes: list[Any]) -> None:
    file, faults = open_coco(root)
    counts = file.mask(file.annotations[ann_id], item(faults))
    np.testing.assert_array_equal(decode_mask(counts, (H, W)), box_mask(*boxes))
    assert counts == encode_mask(box_mask(*boxes))


def test_only_the_wanted_annotations_are_kept_and_all_are_checked(root: Path) -> None:
    instances = copy.deepcopy(INSTANCES)
    instances["annotations"][5]["category_id"] = 99
    file, faults = open_coco(root, instances, wanted={2, 5, 1000})
    assert list(file.annotations) == [2, 5]
    assert told(faults) == ["annotations item 5 (id 6): category_id 99 is not among the categories"]


def test_fields_that_nobody_reads_may_be_missing_or_anything(root: Path) -> None:
    instances = copy.deepcopy(INSTANCES)
    for one in instances["annotations"]:
        for key in ("area", "bbox", "iscrowd"):
            del one[key]
        one["caption"] = [None]
    file, faults = open_coco(root, instances)
    assert len(file.annotations) == 6
    assert not faults.num_faults


@given(st.lists(POLYGONS, min_size=1, max_size=4))
def test_polygons_are_drawn_as_coco_draws_them_and_clipped_as_coco_clips(polygons: list[list[float]]) -> None:
    if any(map(is_outside, polygons)):
        with pytest.raises(ValueError, match="a polygon lies outside the image of 40 x 60 pixels"):
            union_of_segmentations([polygons], (H, W))
        return
    floats = [[float(value) for value in polygon] for polygon in polygons]
    expected = coco_mask.merge(coco_mask.frPyObjects(floats, H, W))
    assert union_of_segmentations([polygons], (H, W)) == expected["counts"]
    np.testing.assert_array_equal(
        decode_mask(expected["counts"], (H, W)), coco_mask.decode(coco_mask.frPyObjects(floats, H, W)).any(axis=2)
    )


@given(POLYGONS)
def test_a_polygon_that_is_refused_has_no_pixel_in_coco_either(polygon: list[float]) -> None:
    (drawn,) = coco_mask.frPyObjects([[float(value) for value in polygon]], H, W)
    if is_outside(polygon):
        assert coco_mask.area(drawn) == 0
    elif coco_mask.area(drawn):
        assert not is_empty(union_of_segmentations([[polygon]], (H, W)), (H, W))


@pytest.mark.parametrize(
    "polygon",
    [
        [-30, 5, -1, 5, -1, 15, -30, 15],
        [W + 1, 5, W + 20, 5, W + 20, 15, W + 1, 15],
        [5, -30, 15, -30, 15, -1, 5, -1],
        [5, H + 1, 15, H + 1, 15, H + 20, 5, H + 20],
    ],
    ids=["left", "right", "above", "below"],
)
def test_a_polygon_wholly_outside_is_refused_on_every_side(polygon: list[float]) -> None:
    with pytest.raises(ValueError, match=r"a polygon lies outside the image of 40 x 60 pixels \(height x width\)"):
        union_of_segmentations([[polygon]], (H, W))
    with pytest.raises(ValueError, match="outside"):
        union_of_segmentations([[LEFT_BOX, polygon]], (H, W))


@pytest.mark.parametrize(
    ("polygon", "box"),
    [
        ([-10, 5, 8, 5, 8, 15, -10, 15], (0, 5, 8, 15)),
        ([50, 5, W + 20, 5, W + 20, 15, 50, 15], (50, 5, W, 15)),
        ([-10, -10, W + 20, -10, W + 20, H + 20, -10, H + 20], (0, 0, W, H)),
    ],
    ids=["left", "right", "all round"],
)
def test_a_polygon_partly_outside_is_clipped(polygon: list[float], box: tuple[int, int, int, int]) -> None:
    np.testing.assert_array_equal(decode_mask(union_of_segmentations([[polygon]], (H, W)), (H, W)), box_mask(box))


@given(MASKS)
def test_run_lengths_come_back_bit_for_bit(mask: NDArray[np.bool_]) -> None:
    compressed = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    for counts in (compressed["counts"].decode(), runs_of(mask)):
        assert union_of_segmentations([{"size": [H, W], "counts": counts}], (H, W)) == compressed["counts"]


@given(st.lists(MASKS, min_size=1, max_size=3), st.lists(POLYGONS, max_size=2))
def test_the_union_of_annotations_is_that_of_their_pixels(
    masks: list[NDArray[np.bool_]], polygons: list[list[float]]
) -> None:
    fields: list[Any] = [{"size": [H, W], "counts": encode_mask(mask).decode()} for mask in masks]
    inside = [polygon for polygon in polygons if not is_outside(polygon)]
    drawn = [decode_mask(union_of_segmentations([[polygon]], (H, W)), (H, W)) for polygon in inside]
    union = union_of_segmentations([*fields, *([polygon] for polygon in inside)], (H, W))
    np.testing.assert_array_equal(decode_mask(union, (H, W)), np.any([*masks, *drawn], axis=0))


@given(st.lists(POLYGONS.filter(lambda polygon: not is_outside(polygon)), min_size=1, max_size=3))
def test_a_mask_out_of_a_file_is_that_of_pycocotools(
    tmp_path_factory: pytest.TempPathFactory, polygons: list[list[float]]
) -> None:
    root = tmp_path_factory.getbasetemp()
    (root / "images").mkdir(exist_ok=True)
    instances = {**INSTANCES, "annotations": [annotation(1, 581857, CAT, polygons)]}
    file, faults = open_coco(root, instances)
    written = json.loads(file.path.read_text())["annotations"][0]["segmentation"]
    floats = [[float(value) for value in polygon] for polygon in written]
    expected = coco_mask.merge(coco_mask.frPyObjects(floats, H, W))["counts"]
    if is_empty(expected, (H, W)):
        assert file.mask(file.annotations[1], item(faults)) == b""
        assert "it marks no pixel" in str(faults.faults[0])
    else:
        assert file.mask(file.annotations[1], item(faults)) == expected
        assert not faults.num_faults


FAULTS: list[tuple[Change, str]] = [
    (without("images", 1, "height"), "images item 1 (id 909): 'height' is missing"),
    (having(40.5, "images", 1, "height"), "images item 1 (id 909): 'height' must be a whole number, is a number"),
    (having(True, "images", 1, "height"), "images item 1 (id 909): 'height' must be a whole number, is true or false"),
    (having(0, "images", 1, "width"), "images item 1 (id 909): a size of 60 x 0 pixels (height x width)"),
    (having(10**12, "images", 1, "width"), "images item 1 (id 909): a size of 60 x 1000000000000 pixels"),
    (having(-5, "images", 1, "width"), "images item 1 (id 909): a size of 60 x -5 pixels"),
    (having(581857, "images", 1, "id"), "images item 1 (id 581857): another image has this id"),
    (having(None, "images", 1), "images item 1: must be an object, is null"),
    (having("../x.jpg", "images", 1, "file_name"), "images item 1 (id 909): file_name '../x.jpg' does not lie inside"),
    (without("annotations", 0, "image_id"), "annotations item 0 (id 1): 'image_id' is missing"),
    (without("annotations", 0, "id"), "annotations item 0: 'id' is missing"),
    (having("1", "annotations", 0, "id"), "annotations item 0 (id 1): 'id' must be a whole number, is a text"),
    (having(1.5, "annotations", 0, "id"), "annotations item 0: 'id' must be a whole number, is a number"),
    (having([], "annotations", 0, "id"), "annotations item 0: 'id' must be a whole number, is a list"),
    (having(None, "annotations", 0), "annotations item 0: must be an object, is null"),
    (without("annotations", 0, "segmentation"), "annotations item 0 (id 1): 'segmentation' is missing"),
    (having("x", "annotations", 0, "segmentation"), "annotations item 0 (id 1): 'segmentation' must be a list"),
    (having(None, "annotations", 0, "segmentation"), "annotations item 0 (id 1): 'segmentation' must be a list, is nu"),
    (having(2, "annotations", 0, "iscrowd"), "annotations item 0 (id 1): 'iscrowd' must be 0 or 1"),
    (having("no", "annotations", 0, "iscrowd"), "annotations item 0 (id 1): 'iscrowd' must be a whole number, is a t"),
    (having(2, "annotations", 0, "id"), "annotations item 1 (id 2): another annotation has this id"),
    (
        having(5, "annotations", 0, "category_id"),
        "annotations item 0 (id 1): category_id 5 is not among the categories",
    ),
    (having(CAT, "categories", 1, "id"), "categories item 1 (id 17): another category has this id"),
    (without("categories", 0, "name"), "categories item 0 (id 17): 'name' is missing"),
    (having("  ", "categories", 0, "name"), "categories item 0 (id 17): 'name' is empty"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS, ids=[message for _, message in FAULTS])
def test_a_faulty_image_annotation_or_category_is_named_and_the_others_are_read(
    root: Path, change: Change, message: str
) -> None:
    instances = copy.deepcopy(INSTANCES)
    change(instances)
    file, faults = open_coco(root, instances)
    assert any(fault.startswith(message) for fault in told(faults)), told(faults)
    assert {fault.source for fault in faults.faults} == {str(file.path)}
    assert "COCO_train2014_000000581857.jpg" in {image.path for image in file.images.values()}
    assert "categories" in message or {3, 4, 5} <= set(file.annotations)


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_a_missing_list_makes_the_file_unreadable(root: Path, key: str) -> None:
    with pytest.raises(AnnotationError, match=f"instances.json has 1 fault: '{key}' is missing"):
        open_coco(root, {name: value for name, value in INSTANCES.items() if name != key})


BAD_SEGMENTATIONS: list[tuple[Any, str]] = [
    ([], "a segmentation is a list of polygons or run lengths"),
    ([[1.0, 2.0, 3.0, 4.0]], "at least three x, y pairs"),
    ([LEFT_BOX[:-1]], "at least three x, y pairs"),
    ([["1", "2", "3", "4", "5", "6"]], "a polygon must be a list of numbers"),
    ([7], "a polygon must be a list of numbers"),
    ([[0, 0, 1e9, 0, 1e9, 1e9]], "a polygon lies far outside the image of 40 x 60 pixels"),
    ([[70, 5, 80, 5, 80, 9]], "a polygon lies outside the image of 40 x 60 pixels"),
    ({"size": [H, W]}, "run lengths must hold 'counts' and 'size'"),
    ({"size": [W, H], "counts": [H * W]}, "the image's size [40, 60]"),
    ({"size": [H, W], "counts": [H * W - 1]}, "add up to the image's pixels"),
    ({"size": [H, W], "counts": [2**62, -(2**62), H * W]}, "add up to the image's pixels"),
    ({"size": [H, W], "counts": "12`"}, "compressed run lengths are cut short"),
    ({"size": [H, W], "counts": "é"}, "compressed run lengths hold the character 'é'"),
    ({"size": [H, W], "counts": [[H * W]]}, "run lengths must be whole numbers"),
]


@pytest.mark.parametrize(("segmentation", "message"), BAD_SEGMENTATIONS)
def test_a_bad_segmentation_is_a_fault_of_whoever_asks_for_the_mask(
    root: Path, segmentation: Any, message: str
) -> None:
    instances = copy.deepcopy(INSTANCES)
    instances["annotations"][0]["segmentation"] = segmentation
    file, faults = open_coco(root, instances)
    assert not faults.num_faults, "a mask is not made before someone asks for it"
    first, second = item(faults, "item 0"), item(faults, "item 1")
    assert file.mask(file.annotations[1], first) == file.mask(file.annotations[1], second) == b""
    assert not first.sound
    assert not second.sound
    assert told(faults)[0].startswith("item 0: the segmentation of ann_id 1 is bad: ")
    assert message in told(faults)[0]
    assert told(faults)[1:] == ["item 1: the segmentation of ann_id 1 is bad, as said before"]
    assert file.mask(file.annotations[2], item(faults)) == encode_mask(box_mask(SHIFTED))


@pytest.mark.parametrize("text", [b'[[1, 2, 3, 4, 5, "\xff"]]', b"[[1, 2, 3, 4, 5, 1e999]]", b"[[1 2]]", b"[[01]]"])
def test_a_segmentation_that_is_no_json_in_itself_is_a_fault_or_refused(root: Path, text: bytes) -> None:
    path = write_instances(root)
    path.write_bytes(path.read_bytes().replace(json.dumps([LEFT_BOX]).encode(), text, 1))
    faults = FaultReport()
    try:
        file = CocoFile(path, root / "images", faults)
    except AnnotationError:
        return
    assert not file.mask(file.annotations[1], item(faults))
    assert faults.num_faults == 1


def test_bad_utf8_in_an_annotation_is_its_fault_alone(root: Path) -> None:
    path = write_instances(root)
    path.write_bytes(path.read_bytes().replace(b'"name": "dog"', b'"name": "d\xf6g"'))
    path.write_bytes(path.read_bytes().replace(b"COCO_train2014_000000000909", b"COCO_train2014_00000000\xff909"))
    faults = FaultReport()
    file = CocoFile(path, root / "images", faults)
    assert list(file.categories) == [CAT]
    assert list(file.images) == [581857]
    assert told(faults)[:2] == [
        "categories item 1 (id 18): 'name' is not valid UTF-8",
        "images item 1 (id 909): 'file_name' is not valid UTF-8",
    ]


def test_of_many_masks_only_some_are_remembered_and_each_is_right(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco, "_NUM_MASKS_KEPT", 2)
    file, faults = open_coco(root)
    wanted = {1: [LEFT], 2: [SHIFTED], 3: [LEFT, SHIFTED, FAR], 4: [CROWD], 5: [COMPRESSED]}
    for ann_id in (1, 1, 2, 3, 4, 5, 1, 2, 5, 3):
        assert file.mask(file.annotations[ann_id], item(faults)) == encode_mask(box_mask(*wanted[ann_id]))
    assert not faults.num_faults
