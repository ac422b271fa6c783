"""COCO's captions are read as they are published: pairs of an image and a text, without a mask."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cache_schema.errors import UsageError
from cache_schema.samples import open_samples
from extract.datasets import DATASETS
from extract.datasets.coco_captions import read_coco_captions
from extract.datasets.coco_readers import COCO_READERS
from extract.datasets.faults import AnnotationError, FaultReport
from extract.datasets.records import SampleRecord, Source
from extract.prepare import PrepareConfig, prepare

H, W = 8, 12


def image(image_id: int, file_name: str, height: int = H, width: int = W) -> dict[str, Any]:
    return {
        "id": image_id,
        "file_name": file_name,
        "height": height,
        "width": width,
        "license": 5,
        "coco_url": f"http://images.example/{file_name}",
        "date_captured": "2013-11-14 16:28:13",
        "flickr_url": f"http://farm.example/{file_name}",
    }


def captions(*images: dict[str, Any], of: dict[int, tuple[int, str]]) -> dict[str, Any]:
    return {
        "info": {"description": "COCO", "year": 2017},
        "images": list(images),
        "licenses": [{"id": 5, "name": "Attribution"}],
        "annotations": [
            {"image_id": image_id, "id": caption_id, "caption": text} for caption_id, (image_id, text) in of.items()
        ],
    }


CONTENT: dict[str, dict[str, Any]] = {
    "train2017": captions(
        image(30, "000000000030.jpg"),
        image(9, "000000000009.jpg", W, H),
        of={71: (9, "A plate."), 70: (30, "  A vase\nof flowers. "), 72: (9, "Food in boxes.")},
    ),
    "val2017": captions(image(139, "000000000139.jpg"), of={90: (139, "A plate.")}),
    "train2014": captions(image(7, "COCO_train2014_000000000007.jpg"), of={1: (7, "A door.")}),
    "val2014": captions(image(42, "COCO_val2014_000000000042.jpg"), of={2: (42, "A shoe rack.")}),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for part, content in CONTENT.items():
        write(tmp_path, part, content)
        for item in content["images"]:
            path = tmp_path / part / item["file_name"]
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (item["width"], item["height"])).save(path)
    return tmp_path


def write(root: Path, part: str, content: Any) -> None:
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"captions_{part}.json").write_text(json.dumps(content))


def read(root: Path, year: int = 2017) -> dict[str, SampleRecord]:
    samples, faults = read_with_faults(root, year)
    assert faults == []
    return samples


def read_with_faults(root: Path, year: int = 2017) -> tuple[dict[str, SampleRecord], list[str]]:
    source = Source(root, FaultReport())
    samples = {sample.id: sample for sample in read_coco_captions(source, year).samples}
    return samples, [f"{Path(fault.source).name}: {fault}" for fault in source.faults.faults]


def test_every_caption_is_a_sample_in_the_order_of_the_files(root: Path) -> None:
    assert list(read(root)) == ["71", "70", "72", "90"]


def test_a_caption_carries_its_image_its_text_and_no_mask(root: Path) -> None:
    sample = read(root)["70"]
    assert sample.prompt == "A vase of flowers."
    assert (sample.image_id, sample.image_path, sample.image_size) == ("30", "train2017/000000000030.jpg", (H, W))
    assert sample.target is None
    assert not sample.no_target
    assert sample.tags == {}
    assert read(root)["71"].image_size == (W, H)


def test_the_split_is_that_of_the_file(root: Path) -> None:
    assert [sample.split for sample in read(root).values()] == ["train", "train", "train", "val"]


def test_each_year_is_its_own_dataset(root: Path) -> None:
    samples = read(root, 2014)
    assert list(samples) == ["1", "2"]
    assert samples["2"].image_path == "val2014/COCO_val2014_000000000042.jpg"
    for year in (2014, 2017):
        dataset = COCO_READERS[f"coco-captions-{year}"].read(Source(root))
        assert dataset.name == f"coco-captions-{year}"
        assert dataset.classes == ()
        assert dataset.sources == tuple(
            root / "annotations" / f"captions_{split}{year}.json" for split in ("train", "val")
        )


def test_images_lie_beside_the_annotations_or_in_a_folder_of_their_own(root: Path) -> None:
    assert read_coco_captions(Source(root), 2017).image_dir == root
    (root / "images").mkdir()
    for part in CONTENT:
        (root / part).rename(root / "images" / part)
    assert read_coco_captions(Source(root), 2017).image_dir == root / "images"
    (root / "images").rename(root / "coco")
    with pytest.raises(UsageError, match=r"images of train2017/ and val2017/ are not in .*images.*--image-dir"):
        read_coco_captions(Source(root), 2017)
    assert read_coco_captions(Source(root, image_dir=root / "coco"), 2017).image_dir == root / "coco"
    assert len(read_with_image_dir(root, root / "coco")) == 4
    with pytest.raises(UsageError, match=r"no folder at .*nowhere"):
        read_coco_captions(Source(root, image_dir=root / "nowhere"), 2017)


def read_with_image_dir(root: Path, image_dir: Path) -> list[SampleRecord]:
    return list(read_coco_captions(Source(root, FaultReport(), image_dir), 2017).samples)


def test_links_to_image_folders_are_followed_to_the_folder_that_holds_them_all(root: Path) -> None:
    (root / "disk").mkdir()
    for part in ("train2017", "val2017"):
        (root / part).rename(root / "disk" / part)
        (root / part).symlink_to(root / "disk" / part)
    assert read_coco_captions(Source(root), 2017).image_dir == (root / "disk").resolve()
    assert len(read(root)) == 4


def test_links_that_lead_to_several_places_are_refused(root: Path) -> None:
    (root / "elsewhere").mkdir()
    (root / "val2017").rename(root / "elsewhere" / "val2017")
    (root / "val2017").symlink_to(root / "elsewhere" / "val2017")
    with pytest.raises(UsageError, match=r"holds links that lead out of it .*elsewhere/val2017.*--image-dir"):
        read_coco_captions(Source(root), 2017)


def test_links_to_folders_of_other_names_are_refused(root: Path) -> None:
    (root / "disk").mkdir()
    for part, name in (("train2017", "a"), ("val2017", "b")):
        (root / part).rename(root / "disk" / name)
        (root / part).symlink_to(root / "disk" / name)
    with pytest.raises(UsageError, match=r"holds links that lead out of it \(train2017 to .*disk/a and val2017 to"):
        read_coco_captions(Source(root), 2017)


def test_a_split_whose_file_is_not_there_is_left_out(root: Path) -> None:
    (root / "annotations" / "captions_train2017.json").unlink()
    (root / "train2017").rename(root / "not needed")
    assert list(read(root)) == ["90"]
    (root / "annotations" / "captions_val2017.json").unlink()
    with pytest.raises(UsageError, match=r"none of annotations/captions_train2017\.json and .*Give the folder"):
        read_coco_captions(Source(root), 2017)


@pytest.mark.parametrize("text", ["{", "[]", '{"images": []}', '{"annotations": []}', '{"images": 1}'])
def test_another_file_is_refused_at_once(root: Path, text: str) -> None:
    (root / "annotations" / "captions_val2017.json").write_text(text)
    with pytest.raises(AnnotationError, match=r"captions_val2017\.json"):
        read_coco_captions(Source(root), 2017)


Change = Callable[[Any], object]


def without(*path: Any) -> Change:
    return lambda content: follow(content, path[:-1]).pop(path[-1])


def having(value: Any, *path: Any) -> Change:
    return lambda content: follow(content, path[:-1]).__setitem__(path[-1], value)


def follow(content: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        content = content[step]
    return content


FAULTS: list[tuple[Change, str]] = [
    (without("annotations", 1, "id"), "annotations item 1: 'id' is missing"),
    (without("annotations", 1, "image_id"), "annotations item 1 (id 70): 'image_id' is missing"),
    (without("annotations", 1, "caption"), "annotations item 1 (id 70): 'caption' is missing"),
    (having(" \n", "annotations", 1, "caption"), "annotations item 1 (id 70): 'caption' is empty"),
    (having(None, "annotations", 1, "caption"), "annotations item 1 (id 70): 'caption' must be a text, is null"),
    (having(139, "annotations", 1, "image_id"), "annotations item 1 (id 70): image_id 139 is not among the images"),
    (having("70", "annotations", 1, "id"), "annotations item 1 (id 70): 'id' must be a whole number, is a text"),
    (having([], "annotations", 1), "annotations item 1: must be an object, is a list"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS, ids=[message for _, message in FAULTS])
def test_a_faulty_caption_is_named_and_the_others_are_read(root: Path, change: Change, message: str) -> None:
    content = copy.deepcopy(CONTENT["train2017"])
    change(content)
    write(root, "train2017", content)
    samples, faults = read_with_faults(root)
    assert faults == [f"captions_train2017.json: {message}"]
    assert list(samples) == ["71", "72", "90"]


IMAGE_FAULTS: list[tuple[Change, str]] = [
    (without("images", 0, "file_name"), "images item 0 (id 30): 'file_name' is missing"),
    (having("../30.jpg", "images", 0, "file_name"), "images item 0 (id 30): file_name '../30.jpg' does not lie inside"),
    (having("/etc/hosts", "images", 0, "file_name"), "images item 0 (id 30): file_name '/etc/hosts' does not lie"),
    (having(0, "images", 0, "height"), "images item 0 (id 30): a size of 0 x 12 pixels"),
    (having(10**9, "images", 0, "height"), "images item 0 (id 30): a size of 1000000000 x 12 pixels"),
]


@pytest.mark.parametrize(("change", "message"), IMAGE_FAULTS, ids=[message for _, message in IMAGE_FAULTS])
def test_a_faulty_image_is_named_and_gives_no_sample(root: Path, change: Change, message: str) -> None:
    content = copy.deepcopy(CONTENT["train2017"])
    change(content)
    write(root, "train2017", content)
    samples, faults = read_with_faults(root)
    assert faults[0].startswith(f"captions_train2017.json: {message}")
    assert faults[1:] == ["captions_train2017.json: annotations item 1 (id 70): image_id 30 is not among the images"]
    assert list(samples) == ["71", "72", "90"]


def test_bytes_that_are_no_text_are_a_fault_of_their_caption(root: Path) -> None:
    path = root / "annotations" / "captions_val2017.json"
    path.write_bytes(path.read_bytes().replace(b"A plate.", b"A pl\xe2te."))
    samples, faults = read_with_faults(root)
    assert faults == ["captions_val2017.json: annotations item 0 (id 90): 'caption' is not valid UTF-8"]
    assert list(samples) == ["71", "70", "72"]


def test_two_images_of_one_id_are_a_fault(root: Path) -> None:
    content = copy.deepcopy(CONTENT["train2017"])
    content["images"].append(content["images"][0])
    write(root, "train2017", content)
    _, faults = read_with_faults(root)
    assert faults == ["captions_train2017.json: images item 2 (id 30): another image has this id"]


def test_a_store_of_captions_has_no_masks_and_its_counts_are_compared(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DATASETS, "coco-captions-2017", COCO_READERS["coco-captions-2017"])
    prepared = prepare(PrepareConfig("coco-captions-2017", root, tmp_path / "stores"))
    samples = open_samples(prepared.path).samples
    assert list(samples.ids) == ["71", "70", "72", "90"]
    assert set(samples.targets) == {b""}
    assert samples.prompts == ["A plate.", "A vase of flowers.", "Food in boxes."]
    assert prepared.counts.differences == [
        "split train has 3 samples, published are 591753",
        "split val has 1 samples, published are 25014",
    ]
    with pytest.raises(UsageError, match="sample 71 has no mask"):
        samples.target(0)
