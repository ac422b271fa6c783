"""PhraseCut's published layout is read as it is; whatever is wrong with a phrase is said, and the others are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cache_schema.errors import UsageError
from cache_schema.masks import decode_mask
from extract.datasets.faults import AnnotationError, FaultReport
from extract.datasets.phrasecut import PHRASECUT_READERS, read_phrasecut
from extract.datasets.records import SampleRecord, Source

H, W = 40, 60
LEFT = [[2.0, 4.0], [12.0, 4.0], [12.0, 14.0], [2.0, 14.0]]
SHIFTED = [[7, 9], [17, 9], [17, 19], [7, 19]]
FAR = [[40.0, 20.0], [50.0, 20.0], [50.0, 30.0], [40.0, 30.0]]


def image(image_id: int, split: str, height: int = H, width: int = W) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "coco_id": None,
        "flickr_id": 3402,
        "width": width,
        "height": height,
        "url": f"https://images.example/VG_100K/{image_id}.jpg",
        "split": split,
    }


def task(image_id: int, ann_id: int, phrase: str, *polygons: list[Any], kind: str = "name") -> dict[str, Any]:
    return {
        "task_id": f"{image_id}__{ann_id}",
        "image_id": image_id,
        "ann_ids": [ann_id],
        "instance_boxes": [[2.0, 4.0, 11.0, 11.0] for _ in polygons],
        "Polygons": list(polygons),
        "phrase": phrase,
        "phrase_structure": {
            "name": phrase.split()[-1],
            "attributes": phrase.split()[:-1],
            "relation_ids": [],
            "relation_descriptions": [],
            "type": kind,
        },
    }


IMAGES = [image(1, "train"), image(2, "val", W, H), image(3, "test"), image(4, "miniv"), image(9, "train")]

TASKS: dict[str, list[dict[str, Any]]] = {
    "train": [
        task(1, 11, "box", [LEFT]),
        task(1, 12, "  red\tboxes ", [LEFT], [SHIFTED], kind="attribute"),
        task(1, 13, "box in three pieces", [LEFT, SHIFTED, FAR], kind="verbose"),
    ],
    "val": [task(2, 21, "box on wall", [LEFT], kind="relation")],
    "test": [task(3, 31, "far box", [FAR])],
    "miniv": [task(4, 41, "left box", [LEFT])],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for item in IMAGES:
        Image.new("RGB", (item["width"], item["height"])).save(tmp_path / "images" / f"{item['image_id']}.jpg")
    write(tmp_path, IMAGES, TASKS)
    return tmp_path


def write(root: Path, images: Any, tasks: dict[str, Any]) -> None:
    (root / "image_data_split.json").write_text(json.dumps(images))
    for split, content in tasks.items():
        (root / f"refer_{split}.json").write_text(json.dumps(content))


def read(root: Path) -> dict[str, SampleRecord]:
    samples, faults = read_with_faults(root)
    assert faults == []
    return samples


def read_with_faults(root: Path) -> tuple[dict[str, SampleRecord], list[str]]:
    source = Source(root, FaultReport())
    samples = {sample.id: sample for sample in read_phrasecut(source).samples}
    return samples, [f"{Path(fault.source).name}: {fault}" for fault in source.faults.faults]


def mask_of(sample: SampleRecord) -> NDArray[np.bool_]:
    assert sample.target is not None
    return decode_mask(sample.target, sample.image_size)


def box_mask(*boxes: list[list[Any]]) -> NDArray[np.bool_]:
    mask = np.zeros((H, W), np.bool_)
    for box in boxes:
        (x0, y0), (x1, y1) = box[0], box[2]
        mask[int(y0) : int(y1), int(x0) : int(x1)] = True
    return mask


def test_every_phrase_is_a_sample_in_the_order_of_the_files(root: Path) -> None:
    ids = [sample.id for sample in read_phrasecut(Source(root)).samples]
    assert ids == ["1__11", "1__12", "1__13", "2__21", "3__31", "4__41"]


def test_a_sample_carries_its_image_phrase_and_size(root: Path) -> None:
    sample = read(root)["1__12"]
    assert (sample.image_id, sample.image_path, sample.image_size) == ("1", "1.jpg", (H, W))
    assert sample.prompt == "red boxes"
    assert not sample.no_target
    assert read(root)["2__21"].image_size == (W, H)


def test_the_split_is_that_of_the_file(root: Path) -> None:
    assert [sample.split for sample in read(root).values()] == ["train", "train", "train", "val", "test", "miniv"]


def test_polygons_of_one_or_several_instances_become_their_clamped_union(root: Path) -> None:
    samples = read(root)
    np.testing.assert_array_equal(mask_of(samples["1__11"]), box_mask(LEFT))
    np.testing.assert_array_equal(mask_of(samples["1__12"]), box_mask(LEFT, SHIFTED))
    np.testing.assert_array_equal(mask_of(samples["1__13"]), box_mask(LEFT, SHIFTED, FAR))


def test_the_masks_of_the_authors_have_at_most_one_more_pixel_at_the_edges(root: Path) -> None:
    ours = mask_of(read(root)["1__13"])
    drawn = Image.new("L", (W, H), 0)
    for polygon in (LEFT, SHIFTED, FAR):
        ImageDraw.Draw(drawn).polygon([(int(x), int(y)) for x, y in polygon], outline=1, fill=1)
    theirs = np.asarray(drawn) > 0
    grown = ours.copy()
    grown[1:] |= ours[:-1]
    grown[:, 1:] |= grown[:, :-1].copy()
    assert not (ours & ~theirs).any()
    np.testing.assert_array_equal(theirs, grown)


def test_a_polygon_without_area_adds_nothing(root: Path) -> None:
    tasks = {**TASKS, "val": [], "train": [task(1, 11, "box", [LEFT, [], [[30, 30]], [[30, 30], [35, 35]]])]}
    write(root, IMAGES, tasks)
    np.testing.assert_array_equal(mask_of(read(root)["1__11"]), box_mask(LEFT))


def test_tags_count_the_instances_and_say_what_tells_the_target(root: Path) -> None:
    samples = read(root)
    assert samples["1__11"].tags == {"targets": "one", "kind": "name"}
    assert samples["1__12"].tags == {"targets": "many", "kind": "attribute"}
    assert samples["1__13"].tags == {"targets": "one", "kind": "verbose"}
    assert samples["2__21"].tags == {"targets": "one", "kind": "relation"}


@pytest.mark.parametrize("structure", [None, {}, "missing"])
def test_a_phrase_without_a_structure_has_no_kind(root: Path, structure: Any) -> None:
    item = {**TASKS["train"][0], "phrase_structure": structure}
    if structure == "missing":
        del item["phrase_structure"]
    write(root, IMAGES, {**TASKS, "train": [item]})
    assert read(root)["1__11"].tags == {"targets": "one"}


def test_the_dataset_names_its_sources_and_its_image_folder(root: Path) -> None:
    dataset = PHRASECUT_READERS["phrasecut"].read(Source(root))
    assert dataset.name == "phrasecut"
    assert dataset.image_dir == root / "images"
    names = ["image_data_split.json", "refer_train.json", "refer_val.json", "refer_test.json", "refer_miniv.json"]
    assert dataset.sources == tuple(root / name for name in names)


def test_the_published_numbers_count_a_phrase_of_miniv_once() -> None:
    reader = PHRASECUT_READERS["phrasecut"]
    assert reader.counted == "samples"
    assert sum(reader.published.values()) == 345486
    assert reader.published["val"] + reader.published["miniv"] == 20316


def test_the_images_may_lie_elsewhere(root: Path) -> None:
    (root / "images").rename(root / "VG_100K")
    assert read_phrasecut(Source(root, image_dir=root / "VG_100K")).image_dir == root / "VG_100K"
    with pytest.raises(UsageError, match=r"no image folder: looked for 'images'.*--image-dir"):
        read_phrasecut(Source(root))


def test_splits_whose_file_is_not_there_are_left_out(root: Path) -> None:
    for split in ("train", "val", "test"):
        (root / f"refer_{split}.json").unlink()
    assert list(read(root)) == ["4__41"]
    (root / "refer_miniv.json").unlink()
    with pytest.raises(UsageError, match=r"none of refer_train\.json, refer_val\.json, .*Give the folder"):
        read_phrasecut(Source(root))


def test_the_list_of_images_may_have_the_name_under_which_it_is_shared(root: Path) -> None:
    (root / "image_data_split.json").rename(root / "image_data_split3000.json")
    assert len(read(root)) == 6
    (root / "image_data_split3000.json").unlink()
    with pytest.raises(UsageError, match=r"image_data_split\.json is missing: it should hold the sizes"):
        read_phrasecut(Source(root))


@pytest.mark.parametrize("name", ["image_data_split.json", "refer_test.json"])
def test_a_file_that_is_not_json_or_not_a_list_is_refused_at_once(root: Path, name: str) -> None:
    (root / name).write_text('[\n {"image_id": 1,,}\n]')
    with pytest.raises(AnnotationError, match=rf"{name} is not valid JSON: .* at line 2"):
        read_phrasecut(Source(root))
    (root / name).write_text("{}")
    with pytest.raises(AnnotationError, match=rf"{name} must hold a list, holds an object"):
        read_phrasecut(Source(root))


Change = Callable[[Any], object]


def without(*path: Any) -> Change:
    return lambda content: follow(content, path[:-1]).pop(path[-1])


def having(value: Any, *path: Any) -> Change:
    return lambda content: follow(content, path[:-1]).__setitem__(path[-1], value)


def follow(content: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        content = content[step]
    return content


TASK_FAULTS: list[tuple[Change, str]] = [
    (without(0, "task_id"), "item 0: 'task_id' is missing"),
    (having(" ", 0, "task_id"), "item 0 (task_id  ): 'task_id' is empty"),
    (having(11, 0, "task_id"), "item 0 (task_id 11): 'task_id' must be a text, is a whole number"),
    (without(0, "image_id"), "item 0 (task_id 1__11): 'image_id' is missing"),
    (having("1", 0, "image_id"), "item 0 (task_id 1__11): 'image_id' must be a whole number, is a text"),
    (having(5, 0, "image_id"), "item 0 (task_id 1__11): image_id 5 is not among the images"),
    (having(2, 0, "image_id"), "item 0 (task_id 1__11): image_id 2 belongs to the split 'val', not to 'train'"),
    (without(0, "phrase"), "item 0 (task_id 1__11): 'phrase' is missing"),
    (having("\n", 0, "phrase"), "item 0 (task_id 1__11): 'phrase' is empty"),
    (without(0, "ann_ids"), "item 0 (task_id 1__11): 'ann_ids' is missing"),
    (having(["11"], 0, "ann_ids"), "item 0 (task_id 1__11): 'ann_ids' must list whole numbers"),
    (without(0, "instance_boxes"), "item 0 (task_id 1__11): 'instance_boxes' is missing"),
    (having([], 0, "instance_boxes"), "item 0 (task_id 1__11): it has 0 'instance_boxes', but 1 lists of 'Polygons'"),
    (without(0, "Polygons"), "item 0 (task_id 1__11): 'Polygons' is missing"),
    (having({}, 0, "Polygons"), "item 0 (task_id 1__11): 'Polygons' must be a list, is an object"),
    (having(LEFT[0], 0, "Polygons", 0), "item 0 (task_id 1__11): 'Polygons' must list, for each instance, polygons"),
    (having([2.0, 4.0, 5.0], 0, "Polygons", 0, 0), "'Polygons' must list, for each instance, polygons as lists of"),
    (having([1, 2, 3], 0, "Polygons", 0, 0, 1), "'Polygons' must list, for each instance, polygons as lists of"),
    (having(["1", 2], 0, "Polygons", 0, 0, 1), "its polygons are bad: a polygon must be a list of numbers"),
    (having([1e9, 2], 0, "Polygons", 0, 0, 1), "its polygons are bad: a polygon lies far outside the image of 40 x 60"),
    (having([[[70, 1], [80, 1], [80, 9]]], 0, "Polygons", 0), "its polygons are bad: a polygon lies outside the image"),
    (having([], 0, "Polygons", 0), "item 0 (task_id 1__11): it has no polygon of three points or more"),
    (having([LEFT[:2]], 0, "Polygons", 0), "item 0 (task_id 1__11): it has no polygon of three points or more"),
    (having(7, 0, "phrase_structure"), "item 0 (task_id 1__11): 'phrase_structure' must be an object"),
    (having(7, 0, "phrase_structure", "type"), "item 0 (task_id 1__11), phrase_structure: 'type' must be a text"),
    (having("box", 0), "item 0: must be an object, is a text"),
]


@pytest.mark.parametrize(("change", "message"), TASK_FAULTS, ids=[message for _, message in TASK_FAULTS])
def test_a_faulty_phrase_is_named_and_the_others_are_read(root: Path, change: Change, message: str) -> None:
    train = json.loads(json.dumps(TASKS["train"]))  # no polygon is shared
    change(train)
    write(root, IMAGES, {**TASKS, "train": train})
    samples, faults = read_with_faults(root)
    assert len(faults) == 1
    assert faults[0].startswith("refer_train.json: ")
    assert message in faults[0]
    assert list(samples) == ["1__12", "1__13", "2__21", "3__31", "4__41"]


def test_bytes_that_are_no_text_are_a_fault_of_their_phrase(root: Path) -> None:
    path = root / "refer_test.json"
    path.write_bytes(path.read_bytes().replace(b"far box", b"far b\xff"))
    samples, faults = read_with_faults(root)
    assert faults == ["refer_test.json: item 0 (task_id 3__31): 'phrase' is not valid UTF-8"]
    assert list(samples) == ["1__11", "1__12", "1__13", "2__21", "4__41"]


IMAGE_FAULTS: list[tuple[Change, str]] = [
    (without(4, "image_id"), "item 4: 'image_id' is missing"),
    (without(4, "split"), "item 4 (image_id 9): 'split' is missing"),
    (without(4, "height"), "item 4 (image_id 9): 'height' is missing"),
    (having("60", 4, "width"), "item 4 (image_id 9): 'width' must be a whole number, is a text"),
    (having(0, 4, "height"), "item 4 (image_id 9): a size of 0 x 60 pixels (height x width) is not an image's"),
    (having(10**9, 4, "width"), "item 4 (image_id 9): a size of 40 x 1000000000 pixels"),
    (having(1, 4, "image_id"), "item 4 (image_id 1): another image has this id"),
]


@pytest.mark.parametrize(("change", "message"), IMAGE_FAULTS, ids=[message for _, message in IMAGE_FAULTS])
def test_a_faulty_image_is_named_and_the_others_are_read(root: Path, change: Change, message: str) -> None:
    images = json.loads(json.dumps(IMAGES))
    change(images)
    write(root, images, TASKS)
    samples, faults = read_with_faults(root)
    assert len(faults) == 1
    assert faults[0].startswith("image_data_split.json: ")
    assert message in faults[0]
    assert len(samples) == 6


def test_nothing_is_parsed_before_the_first_sample_is_asked_for(root: Path) -> None:
    write(root, IMAGES, {**TASKS, "train": [{}]})
    source = Source(root, FaultReport())
    dataset = read_phrasecut(source)
    assert source.faults.num_faults == 0
    list(dataset.samples)
    assert source.faults.num_faults == 6
