"""A COCO file whose annotations carry texts is a dataset of one's own; faults in it are named by item and id."""

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
from extract.datasets.custom import read_custom
from extract.datasets.faults import AnnotationError, FaultReport
from extract.datasets.records import SampleRecord, Source
from extract.prepare import PrepareConfig, check, prepare

H, W = 40, 60
LEFT, SHIFTED = (2, 4, 12, 14), (7, 9, 17, 19)


def box_mask(*boxes: tuple[int, int, int, int]) -> NDArray[np.bool_]:
    mask = np.zeros((H, W), np.bool_)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = True
    return mask


def polygon(x0: int, y0: int, x1: int, y1: int) -> list[int]:
    return [x0, y0, x1, y0, x1, y1, x0, y1]


CONTENT: dict[str, Any] = {
    "info": {"description": "my own"},
    "images": [
        {"id": 1, "file_name": "a.png", "height": H, "width": W},
        {"id": 2, "file_name": "more/b.png", "height": W, "width": H, "split": "val"},
    ],
    "categories": [{"id": 7, "name": "cat"}, {"id": 8, "name": "dog"}],
    "annotations": [
        {"id": 10, "image_id": 1, "category_id": 7, "segmentation": [polygon(*LEFT)], "caption": " the\tleft cat "},
        {"id": 11, "image_id": 1, "category_id": 7, "segmentation": [polygon(*LEFT)], "expressions": ["a cat", "pets"]},
        {
            "id": 12,
            "image_id": 1,
            "category_id": 8,
            "segmentation": {"size": [H, W], "counts": encode_mask(box_mask(SHIFTED)).decode()},
            "expressions": ["pets"],
            "iscrowd": 1,
        },
        {"id": 13, "image_id": 2, "category_id": 8, "segmentation": [[0, 0, 9, 0, 9, 9]]},
        {"id": 14, "image_id": 2, "segmentation": [polygon(0, 0, 5, 5)], "caption": "pets", "bbox": [0, 0, 5, 5]},
    ],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "mydata"
    (folder / "images" / "more").mkdir(parents=True)
    Image.new("RGB", (W, H)).save(folder / "images" / "a.png")
    Image.new("RGB", (H, W)).save(folder / "images" / "more" / "b.png")
    write(folder, CONTENT)
    return folder


def write(root: Path, content: Any, name: str = "annotations.json") -> None:
    (root / name).write_text(json.dumps(content))


def read(root: Path) -> tuple[list[SampleRecord], list[str]]:
    report = FaultReport()
    samples = list(read_custom(Source(root, report)).samples)
    return samples, [str(fault) for fault in report.faults]


def sound(root: Path) -> dict[str, SampleRecord]:
    samples, faults = read(root)
    assert faults == []
    return {sample.id: sample for sample in samples}


def mask_of(sample: SampleRecord) -> NDArray[np.bool_]:
    assert sample.target is not None
    return decode_mask(sample.target, sample.image_size)


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    content = copy.deepcopy(CONTENT)
    change(content)
    return content


def test_every_text_is_a_sample_named_after_its_annotation(root: Path) -> None:
    samples = sound(root)
    assert {name: sample.prompt for name, sample in samples.items()} == {
        "10:0": "the left cat",
        "11:0": "a cat",
        "11:1": "pets",
        "14:0": "pets",
    }
    assert {sample.image_path for sample in samples.values()} == {"a.png", "more/b.png"}
    assert samples["14:0"].image_size == (W, H)
    assert samples["14:0"].image_id == "more/b.png"
    np.testing.assert_array_equal(mask_of(samples["10:0"]), box_mask(LEFT))


def test_annotations_of_an_image_that_share_a_text_are_one_target_clamped(root: Path) -> None:
    pets = sound(root)["11:1"]
    np.testing.assert_array_equal(mask_of(pets), box_mask(LEFT, SHIFTED))


def test_tags_count_the_targets_and_name_the_category_they_share(root: Path) -> None:
    samples = sound(root)
    assert samples["11:0"].tags == {"targets": "one", "category": "cat"}
    assert samples["11:1"].tags == {"targets": "many"}
    assert samples["14:0"].tags == {"targets": "one"}


def test_the_split_is_the_images_own_or_train(root: Path) -> None:
    samples = sound(root)
    assert (samples["10:0"].split, samples["14:0"].split) == ("train", "val")


def test_an_annotation_without_a_text_gives_no_sample(root: Path) -> None:
    assert not any(name.startswith("13:") for name in sound(root))


def test_several_files_are_splits_named_after_them_even_where_their_ids_are_the_same(root: Path) -> None:
    (root / "annotations.json").unlink()
    for split, image in (
        ("train", CONTENT["images"][0]),
        ("test", {**CONTENT["images"][0], "file_name": "more/b.png"}),
    ):
        image = image if split == "train" else {**image, "height": W, "width": H}
        segmentation = [polygon(0, 0, 5, 5)]
        annotation = {"id": 1, "image_id": 1, "segmentation": segmentation, "caption": "pets"}
        write(root, {"images": [image], "annotations": [annotation]}, f"{split}.json")
    samples = sound(root)
    assert {name: (sample.split, sample.image_path) for name, sample in samples.items()} == {
        "test:1:0": ("test", "more/b.png"),
        "train:1:0": ("train", "a.png"),
    }


def test_a_single_file_may_be_named_after_its_split_and_images_lie_beside_it_without_a_folder_for_them(
    root: Path,
) -> None:
    (root / "annotations.json").rename(root / "val.json")
    (root / "images").rename(root / "pictures")
    for path in ("a.png", "more"):
        (root / "pictures" / path).rename(root / path)
    dataset = read_custom(Source(root))
    assert dataset.image_dir.resolve() == root.resolve()
    assert dataset.sources == (root / "val.json",)
    assert {sample.split for sample in dataset.samples} == {"val"}


def test_hidden_files_are_passed_over(root: Path) -> None:
    (root / "._annotations.json").write_bytes(b"\0\5\x16\7")
    assert len(sound(root)) == 4


def test_what_is_written_is_what_the_store_holds(root: Path, tmp_path: Path) -> None:
    prepared = prepare(PrepareConfig("custom", root, tmp_path / "stores"))
    assert prepared.counts.num_samples_of_split == {"train": 3, "val": 1}
    samples = open_samples(prepared.path).samples
    np.testing.assert_array_equal(samples.target(list(samples.ids).index("11:1")), box_mask(LEFT, SHIFTED))


def test_a_mask_is_held_only_until_the_last_of_its_target_has_come(root: Path) -> None:
    report = FaultReport()
    ids = [sample.id for sample in read_custom(Source(root, report)).samples]
    assert ids == ["10:0", "11:0", "11:1", "14:0"]


def annotation(position: int, **change: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["annotations"][position].update(change)


def image(position: int, **change: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["images"][position].update(change)


def dropped(key: str, position: int, name: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content[key][position].pop(name)


FAULTS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (annotation(0, caption=""), "annotations item 0 (id 10): 'caption' is empty"),
    (annotation(0, caption=3), "annotations item 0 (id 10): 'caption' must be a text, is a whole number"),
    (annotation(0, expressions=["x"]), "annotations item 0 (id 10): it has 'caption' and 'expressions'; give one of"),
    (annotation(1, expressions="a cat"), "annotations item 1 (id 11): 'expressions' must be a list, is a text"),
    (annotation(1, expressions=[]), "annotations item 1 (id 11): 'expressions' is empty"),
    (annotation(1, expressions=["a", " "]), "annotations item 1 (id 11): 'expressions' item 1 is empty"),
    (annotation(3, captions="x"), "annotations item 3 (id 13): unknown key 'captions': did you mean 'caption'?"),
    (annotation(3, Expression=["x"]), "annotations item 3 (id 13): unknown key 'Expression': did you mean 'express"),
    (annotation(1, id=10), "annotations item 1 (id 10): another annotation has this id"),
    (dropped("annotations", 0, "id"), "annotations item 0: 'id' is missing"),
    (annotation(0, image_id=9), "annotations item 0 (id 10): image_id 9 is not among the images that can be used"),
    (annotation(0, image_id="1"), "annotations item 0 (id 10): 'image_id' must be a whole number, is a text"),
    (annotation(0, category_id=5), "annotations item 0 (id 10): category_id 5 is not among the categories"),
    (dropped("annotations", 0, "segmentation"), "annotations item 0 (id 10): 'segmentation' is missing"),
    (annotation(0, segmentation="x"), "annotations item 0 (id 10): 'segmentation' must be a list, is a text"),
    (annotation(0, segmentation=[]), "annotations item 0 (id 10): its segmentation is bad: a segmentation is a list"),
    (annotation(0, segmentation=[[99, 0, 99, 9, 80, 9]]), "(id 10): its segmentation is bad: a polygon lies outside"),
    (annotation(0, segmentation=[[1, 1, 1, 1, 1, 1]]), "annotations item 0 (id 10): its segmentation marks no pixel"),
    (image(1, split=""), "images item 1 (id 2): 'split' is empty"),
    (image(1, split=3), "images item 1 (id 2): 'split' must be a text, is a whole number"),
    (image(1, id=1), "images item 1 (id 1): another image has this id"),
    (image(1, file_name="a.png"), "images item 1 (id 2): another image has this file_name, 'a.png'"),
    (image(1, file_name="../a.png"), "images item 1 (id 2): file_name '../a.png' does not lie inside the image fold"),
    (image(1, height=0), "images item 1 (id 2): a size of 0 x 40 pixels (height x width) is not an image's"),
    (dropped("categories", 0, "name"), "categories item 0 (id 7): 'name' is missing"),
    (lambda content: content["categories"].append({"id": 8, "name": "x"}), "(id 8): another category has this id"),
    (lambda content: content["annotations"].append(4), "annotations item 5: must be an object, is a whole number"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS, ids=[message for _, message in FAULTS])
def test_a_fault_is_named_by_item_and_id(root: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    write(root, changed(change))
    _, faults = read(root)
    assert [message in fault for fault in faults].count(True) == 1, faults


def test_faults_stand_in_the_order_of_the_file(root: Path) -> None:
    def spoil(content: dict[str, Any]) -> None:
        content["annotations"][0]["segmentation"] = []
        content["annotations"][1]["id"] = "x"
        content["annotations"][4]["segmentation"] = [[1]]
        content["images"].append({"id": 3})

    write(root, changed(spoil))
    _, faults = read(root)
    places = [fault.partition(" (")[0].partition(":")[0] for fault in faults]
    assert list(dict.fromkeys(places)) == [
        "images item 2",
        "annotations item 0",
        "annotations item 1",
        "annotations item 4",
    ]


def test_a_target_of_several_annotations_is_left_out_whole_if_one_of_them_has_a_fault(root: Path) -> None:
    write(root, changed(annotation(2, segmentation=[])))
    samples, faults = read(root)
    assert len(faults) == 1
    assert [sample.id for sample in samples] == ["10:0", "11:0", "14:0"]


@pytest.mark.parametrize(
    ("position", "spoilt"),
    [
        (2, '"expressions": ["pets", 3]'),
        (2, '"expressions": ["pets"], "caption": null'),
        (2, '"caption": "pets", "expressions": null'),
        (2, '"caption": " pets", "expressions": {}'),
        (2, '"caption": 3, "expressions": null'),
        (2, '"expressions": ["pets", "\udcff"]'),
        (2, '"expressions": ["pets\udcff"]'),
        (2, '"expressions": "pets"'),
        (2, '"caption": ["pets"]'),
        (1, '"expressions": ["pets", 3]'),
    ],
)
def test_a_target_is_left_out_whole_if_the_texts_of_one_of_its_annotations_cannot_be_read(
    root: Path, position: int, spoilt: str
) -> None:
    text = json.dumps(changed(annotation(position, expressions="SPOILT")))
    assert '"expressions": "SPOILT"' in text
    text = text.replace('"expressions": "SPOILT"', spoilt)
    (root / "annotations.json").write_text(text, "utf-8", "surrogateescape")
    samples, faults = read(root)
    assert faults
    assert "pets" not in {sample.prompt for sample in samples if sample.image_id == "a.png"}
    assert "pets" in {sample.prompt for sample in samples if sample.image_id == "more/b.png"}


@pytest.mark.parametrize(("far", "is_fault"), [(1.0, False), (1.5, True)])
def test_a_polygon_reaches_no_further_out_of_its_image_than_a_box(root: Path, far: float, is_fault: bool) -> None:
    write(root, changed(annotation(0, segmentation=[[30, 5, W + far, 5, W + far, 15]])))
    _, faults = read(root)
    reaches = "its segmentation is bad: it reaches out of the image of 40 x 60 pixels (height x width)"
    assert faults == ([f"annotations item 0 (id 10): {reaches}"] if is_fault else [])


def test_a_file_without_any_text_says_what_is_missing(root: Path) -> None:
    content = copy.deepcopy(CONTENT)
    for item in content["annotations"]:
        item.pop("caption", None), item.pop("expressions", None)
    write(root, content)
    assert read(root) == ([], ["no annotation has a 'caption' or 'expressions'; add the texts that name it"])


def test_an_image_of_another_split_than_its_file_is_a_fault(root: Path) -> None:
    (root / "annotations.json").rename(root / "train.json")
    _, faults = read(root)
    assert (
        faults[0]
        == "images item 1 (id 2): 'split' is 'val', in the file of the split 'train'; leave it out, or move it"
    )


@pytest.mark.parametrize("key", ["images", "annotations"])
def test_a_file_without_its_lists_is_refused(root: Path, key: str) -> None:
    write(root, changed(lambda content: content.pop(key)))
    with pytest.raises(AnnotationError, match=rf"annotations\.json has 1 fault: '{key}' is missing"):
        read_custom(Source(root))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04", "is a zip archive, not JSON"),
        (b"{" * 100_000, "."),
        (b'{"images": [], "annotations": [' + b"[" * 100_000 + b"]" * 100_000 + b"]}", "nested too deeply"),
        (b'{"images": [], "annotations": [{,}]}', "is not valid JSON: .* at line 1, column "),
    ],
)
def test_a_file_that_is_no_json_is_refused(root: Path, content: bytes, message: str) -> None:
    (root / "annotations.json").write_bytes(content)
    with pytest.raises(AnnotationError, match=message):
        list(read_custom(Source(root)).samples)


def test_a_link_that_leads_out_of_the_image_folder_is_a_fault(root: Path) -> None:
    (root / "images" / "a.png").rename(root.parent / "outside.png")
    (root / "images" / "a.png").symlink_to(root.parent / "outside.png")
    _, faults = read(root)
    assert faults[0] == "images item 0 (id 1): file_name 'a.png' does not lie inside the image folder"


def test_nothing_is_written_where_anything_is_wrong(root: Path, tmp_path: Path) -> None:
    write(root, changed(image(0, file_name="/etc/hostname")))
    with pytest.raises(UsageError, match="does not lie inside the image folder"):
        prepare(PrepareConfig("custom", root, tmp_path / "stores"))
    assert not (tmp_path / "stores").exists()


def test_a_check_finds_images_that_are_missing_or_of_another_size(root: Path, tmp_path: Path) -> None:
    (root / "images" / "a.png").unlink()
    Image.new("RGB", (W, H)).save(root / "images" / "more" / "b.png")
    counts, report = check(PrepareConfig("custom", root, tmp_path / "stores"))
    assert counts.num_samples == 0
    assert [str(fault) for fault in report.faults] == [
        "image a.png: a.png is missing",
        "image more/b.png: more/b.png has 40 x 60 pixels (height x width), its annotations say 60 x 40",
    ]
