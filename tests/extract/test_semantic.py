"""The semantic-segmentation sets are read in the layouts in which they are published; label maps keep every pixel."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from cache_schema.errors import UsageError
from cache_schema.masks import decode_mask, encode_mask
from cache_schema.samples import open_samples
from extract.datasets.faults import AnnotationError, FaultReport
from extract.datasets.label_maps import IGNORED, masks_of, read_label_map
from extract.datasets.records import Dataset, SampleRecord, Source
from extract.datasets.semantic import SEMANTIC_READERS
from extract.datasets.semantic_sets import SEMANTIC_SETS, open_classes
from extract.images import UndecodableImageError
from extract.prepare import PrepareConfig, check, prepare
from tests.extract.hostile import exif

H, W = 3, 5
Labels = NDArray[Any]


def rows(*lines: str) -> Labels:
    return np.array([[int(value) for value in line.split()] for line in lines])


def save_image(path: Path, size: tuple[int, int] = (H, W)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], (90, 60, 30)).save(path)


def save_labels(path: Path, labels: Labels, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels.astype(np.uint8))
    if palette:  # colours that have nothing to do with the numbers, as in VOC
        image.putpalette([(37 * value) % 256 for value in range(768)])
        assert image.mode == "P"
    image.save(path)


def save_list(path: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def make_voc(root: Path) -> Path:
    home = root / "VOCdevkit" / "VOC2012"
    save_image(home / "JPEGImages/2007_000032.jpg")
    save_image(home / "JPEGImages/2007_000033.jpg")
    train, val = rows("0 0 1 1 255", "0 15 15 1 255", "0 0 0 0 20"), rows("8 8 8 8 8", "0 0 0 0 0", "8 8 255 8 8")
    save_labels(home / "SegmentationClass/2007_000032.png", train, palette=True)
    save_labels(home / "SegmentationClass/2007_000033.png", val, palette=True)
    save_labels(home / "SegmentationClassAug/2007_000099.png", val)
    save_list(home / "ImageSets/Segmentation/train.txt", "2007_000032")
    save_list(home / "ImageSets/Segmentation/val.txt", "2007_000033")
    save_list(home / "ImageSets/Segmentation/trainval.txt", "2007_000032", "2007_000033")
    return home


def make_context(root: Path) -> Path:
    home = root / "VOCdevkit" / "VOC2010"
    save_image(home / "JPEGImages/2008_000002.jpg")
    save_image(home / "JPEGImages/2008_000003.jpg")
    save_labels(home / "SegmentationClassContext/2008_000002.png", rows("0 2 2 59 59") * np.ones((H, 1), int))
    save_labels(home / "SegmentationClassContext/2008_000003.png", rows("1 1 1 1 1", "0 0 0 0 0", "36 36 36 36 255"))
    save_list(home / "ImageSets/SegmentationContext/train.txt", "2008_000002")
    save_list(home / "ImageSets/SegmentationContext/val.txt", "2008_000003")
    return home


def make_ade(root: Path) -> Path:
    home = root / "ADEChallengeData2016"
    save_image(home / "images/training/ADE_train_00000001.jpg")
    save_image(home / "images/validation/ADE_val_00000001.jpg")
    train, val = rows("0 0 1 1 1", "0 150 150 1 1", "2 2 2 2 2"), rows("9 9 9 9 9", "0 0 0 0 0", "90 90 90 90 90")
    save_labels(home / "annotations/training/ADE_train_00000001.png", train)
    save_labels(home / "annotations/validation/ADE_val_00000001.png", val)
    return home


STUFF_PUBLISHED = rows("0 0 16 16 255", "0 91 91 16 255", "181 181 95 95 95")
STUFF_TRAIN_IDS = rows("0 0 15 15 255", "0 80 80 15 255", "170 170 84 84 84")
OBJECT_TRAIN_IDS = rows("1 1 16 16 0", "1 0 0 16 0", "0 0 0 0 0")


def make_coco(root: Path) -> Path:
    for split, name in (("train2017", "000000000009"), ("val2017", "000000000139")):
        save_image(root / f"images/{split}/{name}.jpg")
        save_labels(root / f"annotations/{split}/{name}.png", STUFF_PUBLISHED)
    return root


def make_cityscapes(root: Path) -> Path:
    for split, frame in (("train", "aachen/aachen_000000_000019"), ("val", "frankfurt/frankfurt_000000_000294")):
        save_image(root / f"leftImg8bit/{split}/{frame}_leftImg8bit.png")
        labels = root / f"gtFine/{split}/{frame}_gtFine"
        published = rows("0 1 2 3 4", "7 7 8 33 33", "26 24 25 29 30")
        train_ids = rows("255 255 255 255 255", "0 0 1 18 18", "13 11 12 255 255")
        save_labels(Path(f"{labels}_labelIds.png"), published)
        save_labels(Path(f"{labels}_labelTrainIds.png"), train_ids)
        save_labels(Path(f"{labels}_instanceIds.png"), published)
        save_image(Path(f"{labels}_color.png"))
    return root


MAKERS: dict[str, Callable[[Path], Path]] = {
    "voc20": make_voc,
    "voc21": make_voc,
    "context59": make_context,
    "context60": make_context,
    "ade20k": make_ade,
    "coco-stuff": make_coco,
    "coco-object": make_coco,
    "cityscapes": make_cityscapes,
}


def open_set(name: str, root: Path) -> tuple[Dataset, FaultReport]:
    faults = FaultReport()
    return SEMANTIC_READERS[name].read(Source(root, faults)), faults


def read(name: str, root: Path) -> list[SampleRecord]:
    """All samples of a set that has no fault."""
    dataset, faults = open_set(name, root)
    samples = list(dataset.samples)
    assert not faults.faults
    return samples


def faults_of(name: str, root: Path) -> list[tuple[str, str, str]]:
    dataset, faults = open_set(name, root)
    list(dataset.samples)
    return [(Path(fault.source).name, fault.where, fault.what) for fault in faults.faults]


def rebuild(samples: list[SampleRecord], image_id: str) -> Labels:
    """The label map of an image, out of its samples: class ids, and -1 where a pixel is ignored."""
    of_image = [sample for sample in samples if sample.image_id == image_id]
    labels = np.full(of_image[0].image_size, -2)
    for sample in of_image:
        assert sample.target is not None
        mask = decode_mask(sample.target, sample.image_size)
        assert (labels[mask] == -2).all()
        labels[mask] = int(sample.id.removeprefix(f"{image_id}:"))
    if of_image[0].ignored:
        ignored = decode_mask(of_image[0].ignored, of_image[0].image_size)
        assert (labels[ignored] == -2).all()
        labels[ignored] = IGNORED
    return labels


@pytest.mark.parametrize("name", SEMANTIC_READERS)
def test_a_set_is_read_in_its_published_layout_with_both_splits(name: str, tmp_path: Path) -> None:
    samples = read(name, MAKERS[name](tmp_path))
    assert list(dict.fromkeys(sample.split for sample in samples)) == ["train", "val"]
    assert len({sample.id for sample in samples}) == len(samples)


@pytest.mark.parametrize("name", SEMANTIC_READERS)
def test_a_set_becomes_a_samples_store_with_its_classes(name: str, tmp_path: Path) -> None:
    root = MAKERS[name](tmp_path)
    expected = read(name, root)
    store = open_samples(_prepare(name, root, tmp_path / "stores"))
    assert list(store.samples.ids) == [sample.id for sample in expected]
    assert store.samples.classes == SEMANTIC_SETS[name].class_names
    for row, sample in enumerate(expected):
        assert store.samples.targets[row] == sample.target
        assert (store.samples.ignored[row] if store.samples.ignored else b"") == sample.ignored


def _prepare(name: str, root: Path, out: Path, skip_bad: bool = False) -> Path:
    path = prepare(PrepareConfig(name, root, out, skip_bad=skip_bad)).path
    assert isinstance(path, Path)
    return path


@pytest.mark.parametrize("name", ["voc20", "context59", "ade20k", "coco-stuff", "coco-object", "cityscapes"])
def test_the_folder_above_may_be_named_too(name: str, tmp_path: Path) -> None:
    below = {"coco-stuff": "coco_stuff164k", "coco-object": "coco_stuff164k", "cityscapes": "cityscapes"}
    home = MAKERS[name](tmp_path / below.get(name, ""))
    assert [sample.id for sample in read(name, home.parent)] == [sample.id for sample in read(name, home)]
    assert read(name, home.parent)


def test_the_devkit_itself_may_lie_below_the_folder_that_is_named(tmp_path: Path) -> None:
    make_voc(tmp_path)
    make_context(tmp_path)
    assert {sample.image_id for sample in read("voc21", tmp_path)} == {"2007_000032", "2007_000033"}
    assert {sample.image_id for sample in read("context60", tmp_path)} == {"2008_000002", "2008_000003"}


def test_a_sample_is_a_class_of_an_image(tmp_path: Path) -> None:
    samples = {sample.id: sample for sample in read("voc21", make_voc(tmp_path))}
    assert list(samples)[:4] == ["2007_000032:0", "2007_000032:1", "2007_000032:15", "2007_000032:20"]
    person = samples["2007_000032:15"]
    assert (person.prompt, person.tags, person.split) == ("person", {"category": "person"}, "train")
    assert (person.image_id, person.image_path, person.image_size) == ("2007_000032", "2007_000032.jpg", (H, W))
    assert person.target == encode_mask(rows("0 0 0 0 0", "0 1 1 0 0", "0 0 0 0 0") > 0)
    assert person.ignored == encode_mask(rows("0 0 0 0 1", "0 0 0 0 1", "0 0 0 0 0") > 0)
    assert not person.no_target


def test_with_background_it_is_the_first_class(tmp_path: Path) -> None:
    dataset, _ = open_set("voc21", make_voc(tmp_path))
    assert dataset.classes[:2] == ("background", "aeroplane")
    assert len(dataset.classes) == 21
    expected = rows("0 0 1 1 -1", "0 15 15 1 -1", "0 0 0 0 20")
    assert np.array_equal(rebuild(list(dataset.samples), "2007_000032"), expected)


def test_without_background_its_pixels_are_ignored_and_ids_begin_at_the_first_class(tmp_path: Path) -> None:
    dataset, _ = open_set("voc20", make_voc(tmp_path))
    assert dataset.classes[0] == "aeroplane"
    assert len(dataset.classes) == 20
    samples = list(dataset.samples)
    expected = rows("-1 -1 0 0 -1", "-1 14 14 0 -1", "-1 -1 -1 -1 19")
    assert np.array_equal(rebuild(samples, "2007_000032"), expected)
    assert np.array_equal(rebuild(samples, "2007_000033"), rows("7 7 7 7 7", "-1 -1 -1 -1 -1", "7 7 -1 7 7"))


def test_context_has_its_classes_in_the_order_of_its_converted_maps(tmp_path: Path) -> None:
    home = make_context(tmp_path)
    assert np.array_equal(rebuild(read("context59", home), "2008_000002"), rows("-1 1 1 58 58") * np.ones((3, 1), int))
    assert np.array_equal(rebuild(read("context60", home), "2008_000003")[2], [36, 36, 36, 36, -1])
    prompts = {sample.id: sample.prompt for sample in read("context59", home)}
    assert prompts["2008_000002:1"] == "bag"
    assert prompts["2008_000002:58"] == "wood"
    assert prompts["2008_000003:35"] == "mouse"


def test_ade20k_ignores_what_is_labelled_as_other(tmp_path: Path) -> None:
    samples = read("ade20k", make_ade(tmp_path))
    assert np.array_equal(rebuild(samples, "ADE_train_00000001"), rows("-1 -1 0 0 0", "-1 149 149 0 0", "1 1 1 1 1"))
    assert samples[0].image_path == "training/ADE_train_00000001.jpg"
    assert {sample.prompt for sample in samples if sample.split == "val"} == {"windowpane", "television receiver"}


def test_coco_stuff_is_read_as_published_and_as_converted_with_the_same_result(tmp_path: Path) -> None:
    root = make_coco(tmp_path)
    published = read("coco-stuff", root)
    expected = np.where(STUFF_TRAIN_IDS == 255, IGNORED, STUFF_TRAIN_IDS)
    assert np.array_equal(rebuild(published, "139"), expected)
    assert {sample.prompt for sample in published} == {"person", "cat", "banner", "wood", "building-other"}
    for path in root.glob("annotations/*/*.png"):
        save_labels(path.with_name(f"{path.stem}_labelTrainIds.png"), STUFF_TRAIN_IDS)
        path.unlink()
    assert read("coco-stuff", root) == published


def test_a_converter_that_was_stopped_leaves_the_published_maps_of_the_others(tmp_path: Path) -> None:
    root = make_coco(tmp_path)
    published = read("coco-stuff", root)
    save_labels(root / "annotations/val2017/000000000139_labelTrainIds.png", STUFF_TRAIN_IDS)
    assert read("coco-stuff", root) == published


def test_coco_object_is_what_the_usual_converter_makes_of_coco_stuff(tmp_path: Path) -> None:
    root = make_coco(tmp_path)
    from_stuff = read("coco-object", root)
    assert np.array_equal(rebuild(from_stuff, "9"), OBJECT_TRAIN_IDS)
    assert {sample.prompt for sample in from_stuff} == {"background", "person", "cat"}
    for path in list(root.glob("annotations/*/*.png")):
        save_labels(path.with_name(f"{path.stem}_instanceTrainIds.png"), OBJECT_TRAIN_IDS)
        save_labels(path.with_name(f"{path.stem}_labelTrainIds.png"), STUFF_TRAIN_IDS)
    assert read("coco-object", root) == from_stuff
    for path in root.glob("annotations/*/????????????.png"):
        path.unlink()
    assert read("coco-object", root) == from_stuff


def test_cityscapes_numbers_are_mapped_by_the_published_table(tmp_path: Path) -> None:
    root = make_cityscapes(tmp_path)
    train_ids = read("cityscapes", root)
    expected = rows("-1 -1 -1 -1 -1", "0 0 1 18 18", "13 11 12 -1 -1")
    assert np.array_equal(rebuild(train_ids, "frankfurt_000000_000294"), expected)
    assert train_ids[0].image_path == "train/aachen/aachen_000000_000019_leftImg8bit.png"
    for path in root.rglob("*_labelTrainIds.png"):
        path.unlink()
    assert read("cityscapes", root) == train_ids


def test_every_class_of_every_set_keeps_its_number(tmp_path: Path) -> None:
    sizes = {name: len(chosen.class_names) for name, chosen in SEMANTIC_SETS.items()}
    assert sizes == {
        "voc20": 20,
        "voc21": 21,
        "context59": 59,
        "context60": 60,
        "ade20k": 150,
        "coco-stuff": 171,
        "coco-object": 81,
        "cityscapes": 19,
    }
    for chosen in SEMANTIC_SETS.values():
        assert len(set(chosen.class_names)) == len(chosen.class_names)
        for files in chosen.label_files:
            class_of = chosen.class_of(files)
            assert set(class_of.values()) - {IGNORED} == set(range(len(chosen.class_names)))
            assert class_of[255] == (0 if files.suffix == ".png" and chosen.classes == "coco_object" else IGNORED)


def test_class_lists_agree_where_sets_share_them() -> None:
    stuff, objects = open_classes("coco_stuff"), open_classes("coco_object")
    assert stuff.names[:80] == objects.names
    assert stuff.values[:80] == objects.values
    assert set(objects.background) == {*stuff.values[80:], 255}
    assert list(stuff.values) == sorted(set(stuff.values))
    cityscapes = open_classes("cityscapes")
    assert {*cityscapes.values, *cityscapes.ignored} == {*range(34), 255}
    context = open_classes("context")
    assert list(context.names) == sorted(context.names)


def test_class_lists_carry_other_names() -> None:
    aliases = {
        name: dict(zip(c.names, c.aliases, strict=True)) for name in ("voc", "ade20k") for c in [open_classes(name)]
    }
    assert aliases["voc"]["diningtable"][0] == "dining table"
    assert aliases["voc"]["bicycle"] == ()
    assert aliases["ade20k"]["building"] == ("edifice",)


def test_an_image_without_a_pixel_that_counts_gives_no_sample(tmp_path: Path) -> None:
    home = make_ade(tmp_path)
    save_labels(home / "annotations/validation/ADE_val_00000001.png", np.zeros((H, W), int))
    assert {sample.split for sample in read("ade20k", home)} == {"train"}


def test_published_counts_are_compared_by_image(tmp_path: Path) -> None:
    counts, _ = check(PrepareConfig("cityscapes", make_cityscapes(tmp_path), tmp_path / "stores"))
    assert counts.differences == [
        "split train has 1 images, published are 2975",
        "split val has 1 images, published are 500",
    ]


@pytest.mark.parametrize(("name", "gone"), [("ade20k", "images/training"), ("ade20k", "annotations/training")])
def test_a_split_of_which_a_half_is_missing_is_left_out(name: str, gone: str, tmp_path: Path) -> None:
    home = MAKERS[name](tmp_path)
    shutil.rmtree(home / gone)
    assert {sample.split for sample in read(name, home)} == {"val"}


def test_a_split_without_its_list_is_left_out(tmp_path: Path) -> None:
    home = make_voc(tmp_path)
    (home / "ImageSets/Segmentation/train.txt").unlink()
    dataset, _ = open_set("voc20", home)
    assert dataset.sources == (home / "ImageSets/Segmentation/val.txt",)
    assert {sample.split for sample in dataset.samples} == {"val"}


@pytest.mark.parametrize("name", SEMANTIC_READERS)
def test_a_folder_that_holds_something_else_is_refused_with_the_layout(name: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(UsageError, match="neither train nor val") as refusal:
        open_set(name, tmp_path)
    assert SEMANTIC_READERS[name].layout in str(refusal.value)


def test_label_maps_without_any_image_are_no_split(tmp_path: Path) -> None:
    home = make_ade(tmp_path)
    for path in home.glob("images/*/*.jpg"):
        path.unlink()
    with pytest.raises(UsageError, match="images and labels"):
        open_set("ade20k", home)


def test_images_may_lie_elsewhere(tmp_path: Path) -> None:
    home = make_ade(tmp_path)
    expected = read("ade20k", home)
    (home / "images").rename(tmp_path / "pictures")
    dataset = SEMANTIC_READERS["ade20k"].read(Source(home, image_dir=tmp_path / "pictures"))
    assert list(dataset.samples) == expected
    assert dataset.image_dir == tmp_path / "pictures"


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    home = make_ade(tmp_path)
    dataset, faults = open_set("ade20k", home)
    (home / "annotations/validation/ADE_val_00000001.png").write_bytes(b"")
    stream = iter(dataset.samples)
    assert next(stream).split == "train"
    assert not faults.faults
    list(stream)
    assert [fault.where for fault in faults.faults] == ["ADE_val_00000001.png"]


def test_an_image_without_a_label_map_is_a_fault(tmp_path: Path) -> None:
    home = make_ade(tmp_path)
    save_image(home / "images/training/ADE_train_00000002.jpg")
    assert faults_of("ade20k", home) == [("training", "ADE_train_00000002", "the image has no label map")]


def test_a_label_map_without_its_image_is_a_fault(tmp_path: Path) -> None:
    root = make_cityscapes(tmp_path)
    save_labels(root / "gtFine/val/frankfurt/frankfurt_9_gtFine_labelIds.png", rows("7"))
    what = "there is no image val/frankfurt/frankfurt_9_leftImg8bit.png"
    assert faults_of("cityscapes", root) == [("val", "frankfurt/frankfurt_9_gtFine_labelIds.png", what)]


def test_a_listed_image_lacks_a_file_and_the_line_is_named(tmp_path: Path) -> None:
    home = make_voc(tmp_path)
    save_list(home / "ImageSets/Segmentation/val.txt", "2007_000033", "", "2007_1", "2007_2")
    save_image(home / "JPEGImages/2007_1.jpg")
    save_labels(home / "SegmentationClass/2007_2.png", rows("1"))
    assert faults_of("voc21", home) == [
        ("val.txt", "line 3", "the image 2007_1 has no label map"),
        ("val.txt", "line 4", "there is no image 2007_2.jpg"),
    ]


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a/../../b", "link", "..\\b", "nul\0"])
def test_a_list_does_not_lead_out_of_the_folder(name: str, tmp_path: Path) -> None:
    home = make_voc(tmp_path)
    for folder, suffix in (("JPEGImages", ".jpg"), ("SegmentationClass", ".png")):
        save_image(tmp_path / "VOCdevkit" / f"secret{suffix}")
        (home / folder / f"link{suffix}").symlink_to(tmp_path / "VOCdevkit" / f"secret{suffix}")
    save_list(home / "ImageSets/Segmentation/val.txt", name)
    ((source, where, what),) = faults_of("voc21", home)
    assert (source, where) == ("val.txt", "line 1")
    assert "does not lie inside" in what


def test_a_label_map_that_is_a_link_out_of_the_folder_is_a_fault(tmp_path: Path) -> None:
    home = make_ade(tmp_path / "root")
    path = home / "annotations/validation/ADE_val_00000001.png"
    path.rename(tmp_path / "elsewhere.png")
    path.symlink_to(tmp_path / "elsewhere.png")
    ((_, where, what),) = faults_of("ade20k", home)
    assert (where, what) == (path.name, "it does not lie inside the folder of label maps")


def test_a_list_may_have_been_written_on_windows(tmp_path: Path) -> None:
    home = make_voc(tmp_path)
    expected = read("voc21", home)
    (home / "ImageSets/Segmentation/val.txt").write_bytes(b"\xef\xbb\xbf2007_000033\r\n\r\n")
    assert read("voc21", home) == expected


def test_a_list_that_is_not_utf8_is_a_fault_of_the_line(tmp_path: Path) -> None:
    home = make_voc(tmp_path)
    (home / "ImageSets/Segmentation/val.txt").write_bytes(b"2007_000033\n\xff\xfe\n")
    assert faults_of("voc21", home) == [("val.txt", "line 2", "it is not valid UTF-8")]


def test_a_file_name_that_is_not_utf8_is_a_fault(tmp_path: Path) -> None:
    home = make_ade(tmp_path)
    try:
        save_image(home / "images/training" / b"ADE_\xff.jpg".decode("utf-8", "surrogateescape"))
    except OSError:
        pytest.skip("this file system admits UTF-8 only")
    ((_, where, what),) = faults_of("ade20k", home)
    assert (where, what) == ("'ADE_\\udcff'", "a file's name is not valid UTF-8")


def test_unknown_numbers_are_all_named(tmp_path: Path) -> None:
    home = make_voc(tmp_path)
    save_labels(home / "SegmentationClass/2007_000033.png", rows("21 0 0 0 254", "0 0 100 0 0", "255 20 1 0 21"))
    what = "it holds 21, 100, 254, which stand for no class"
    assert faults_of("voc21", home) == [("SegmentationClass", "2007_000033.png", what)]


@pytest.mark.parametrize("value", [11, 25, 90, 182, 254])
def test_numbers_that_coco_never_used_are_unknown(value: int, tmp_path: Path) -> None:
    root = make_coco(tmp_path)
    labels = STUFF_PUBLISHED.copy()
    labels[0, 0] = value
    save_labels(root / "annotations/val2017/000000000139.png", labels)
    for name in ("coco-stuff", "coco-object"):
        assert faults_of(name, root)[0][2] == f"it holds {value}, which stands for no class"


def test_a_label_map_of_another_size_than_its_image_is_refused(tmp_path: Path) -> None:
    home = make_voc(tmp_path)
    save_image(home / "JPEGImages/2007_000033.jpg", (H, W + 1))
    config = PrepareConfig("voc21", home, tmp_path / "stores")
    with pytest.raises(AnnotationError, match=r"2007_000033.jpg has 3 x 6 pixels .* its annotations say 3 x 5"):
        prepare(config)
    store = open_samples(_prepare("voc21", home, tmp_path / "stores", skip_bad=True))
    assert list(store.samples.images.ids) == ["2007_000032"]


def png_of(header: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, content in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        parts.append(struct.pack(">I", len(content)) + kind + content)
        parts.append(struct.pack(">I", zlib.crc32(kind + content)))
    return b"".join(parts)


def grey_png(labels: Labels, bits: int) -> bytes:
    """A grey PNG of any depth, written by hand."""
    height, width = labels.shape
    packed = []
    for row in labels.tolist():
        digits = "".join(f"{value:0{bits}b}" for value in row)
        digits += "0" * (-len(digits) % 8)
        packed.append(b"\0" + bytes(int(digits[i : i + 8], 2) for i in range(0, len(digits), 8)))
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return png_of(header, (b"IDAT", zlib.compress(b"".join(packed))))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_levels_are_read_as_they_are_in_every_depth(bits: int, tmp_path: Path) -> None:
    labels = np.random.default_rng(bits).integers(0, 2**bits, (4, 7))
    labels[0, :2] = 0, 2**bits - 1
    (tmp_path / "map.png").write_bytes(grey_png(labels, bits))
    found = read_label_map(tmp_path / "map.png")
    assert found.dtype.kind in "iu"
    assert np.array_equal(found, labels)


@pytest.mark.parametrize("num_colours", [2, 4, 16, 256])
def test_palette_indices_are_read_whatever_their_colours(num_colours: int, tmp_path: Path) -> None:
    labels = np.arange(20).reshape(4, 5) % num_colours
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette([9] * 3 * num_colours)
    image.save(tmp_path / "map.png", bits=num_colours.bit_length() - 1, transparency=1)
    assert np.array_equal(read_label_map(tmp_path / "map.png"), labels)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_a_coloured_label_map_is_refused(mode: str, tmp_path: Path) -> None:
    Image.new(mode, (W, H)).save(tmp_path / "map.png")
    with pytest.raises(UndecodableImageError, match="holds colours"):
        read_label_map(tmp_path / "map.png")


@pytest.mark.parametrize("form", ["JPEG", "GIF", "BMP", "TIFF"])
def test_a_label_map_that_is_not_a_png_is_refused_whatever_its_name(form: str, tmp_path: Path) -> None:
    Image.new("L", (W, H)).save(tmp_path / "map.png", form)
    with pytest.raises(UndecodableImageError, match="not a PNG"):
        read_label_map(tmp_path / "map.png")


def _sound() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 9, (40, 40), np.uint8)).save(file, "PNG")
    return file.getvalue()


SOUND = _sound()
DAMAGED = {
    "nothing": b"",
    "text": b"background\n",
    "header alone": SOUND[:33],
    "cut short": SOUND[: len(SOUND) // 2],
    "without its end": SOUND[:-12],
    "a flipped bit": SOUND[:200] + bytes([SOUND[200] ^ 16]) + SOUND[201:],
    "no data": png_of(SOUND[16:29]),
    "data that are not compressed": png_of(SOUND[16:29], (b"IDAT", b"abc")),
    "too few rows": png_of(SOUND[16:29], (b"IDAT", zlib.compress(b"\0" * 100))),
    "too few rows, each of them whole": png_of(SOUND[16:29], (b"IDAT", zlib.compress(bytes(41) * 20))),
    "a billion pixels": png_of(struct.pack(">IIBBBBB", 40000, 25000, 8, 0, 0, 0, 0), (b"IDAT", b"")),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_label_map_is_a_fault_and_the_other_images_are_read(damage: str, tmp_path: Path) -> None:
    home = make_ade(tmp_path)
    (home / "annotations/training/ADE_train_00000001.png").write_bytes(DAMAGED[damage])
    dataset, faults = open_set("ade20k", home)
    assert {sample.split for sample in dataset.samples} == {"val"}
    (fault,) = faults.faults
    assert fault.where == "ADE_train_00000001.png"
    assert "\n" not in fault.what


@pytest.mark.parametrize("num_rows", [1, 20, 39])
def test_a_label_map_whose_sound_data_end_too_early_is_refused(num_rows: int, tmp_path: Path) -> None:
    path = tmp_path / "labels.png"
    path.write_bytes(png_of(SOUND[16:29], (b"IDAT", zlib.compress(bytes(41) * num_rows))))
    with pytest.raises(UndecodableImageError, match="its data end before its last row"):
        read_label_map(path)


@pytest.mark.parametrize("size", [(15001, 10000), (40000, 25000)])
def test_too_many_pixels_are_refused_by_the_header(size: tuple[int, int], tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0)
    (tmp_path / "map.png").write_bytes(png_of(header, (b"IDAT", b"")))
    with pytest.raises(UndecodableImageError, match="more than 150000000"):
        read_label_map(tmp_path / "map.png")


def test_a_folder_in_the_place_of_a_label_map_is_a_fault(tmp_path: Path) -> None:
    home = make_ade(tmp_path)
    path = home / "annotations/training/ADE_train_00000001.png"
    path.unlink()
    path.mkdir()
    ((_, where, what),) = faults_of("ade20k", home)
    assert where == path.name
    assert "cannot be read" in what


@st.composite
def label_maps(draw: st.DrawFn) -> Labels:
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    values = st.lists(st.sampled_from([0, 1, 2, 7, 255, 300]), min_size=height * width, max_size=height * width)
    return np.array(draw(values)).reshape(height, width)


@given(label_maps())
def test_masks_of_a_map_are_those_of_each_class_alone(labels: Labels) -> None:
    class_of = {0: IGNORED, 255: IGNORED, 1: 4, 2: 5, 7: 5, 300: 0}
    expected = np.vectorize(class_of.get)(labels)
    masks = masks_of(labels, class_of)
    assert list(masks) == np.unique(expected).tolist()
    for class_id, counts in masks.items():
        assert counts == encode_mask(expected == class_id)


def test_very_many_unknown_numbers_are_named_up_to_a_limit() -> None:
    with pytest.raises(ValueError, match=r"it holds 0, 1, .*, 255 and 744 more, which stand for no class"):
        masks_of(np.arange(1000).reshape(10, 100), {})


def annotation(ann_id: int, category_id: int, mask: Labels, crowd: bool = False, image_id: int = 139) -> dict[str, Any]:
    flat = mask.ravel(order="F") > 0
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return {
        "id": ann_id,
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": {"size": [H, W], "counts": [0, *runs] if flat[0] else runs},
        "iscrowd": int(crowd),
    }


PERSON, DOG = 1, 18
INSTANCES: dict[str, Any] = {
    "images": [
        {"id": 285, "file_name": "000000000285.jpg", "height": H, "width": W},
        {"id": 139, "file_name": "000000000139.jpg", "height": H, "width": W},
    ],
    "categories": [{"id": PERSON, "name": "person"}, {"id": DOG, "name": "dog"}],
    "annotations": [
        annotation(1, PERSON, rows("1 1 1 0 0", "0 0 0 0 0", "0 0 0 0 0")),
        annotation(2, DOG, rows("0 1 1 1 0", "0 0 0 0 0", "0 0 0 0 0")),
        annotation(3, PERSON, rows("0 0 0 1 1", "0 0 0 1 1", "0 0 0 0 0"), crowd=True),
    ],
}


@pytest.fixture
def instances_root(tmp_path: Path) -> Path:
    for image in INSTANCES["images"]:
        save_image(tmp_path / "val2017" / image["file_name"])
    write_instances(tmp_path, INSTANCES)
    return tmp_path


def write_instances(root: Path, content: Any) -> None:
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations/instances_val2017.json").write_text(json.dumps(content))


def test_coco_object_is_drawn_from_instances_where_there_are_no_maps(instances_root: Path) -> None:
    samples = read("coco-object", instances_root)
    assert np.array_equal(rebuild(samples, "139"), rows("1 17 17 17 1", "0 0 0 1 1", "0 0 0 0 0"))
    assert [sample.id for sample in samples] == ["139:0", "139:1", "139:17", "285:0"]
    assert {sample.image_path for sample in samples} == {"val2017/000000000139.jpg", "val2017/000000000285.jpg"}
    dataset, _ = open_set("coco-object", instances_root)
    assert dataset.sources == (instances_root / "annotations/instances_val2017.json",)


def test_label_maps_go_before_instances(instances_root: Path) -> None:
    for image in INSTANCES["images"]:
        name = f"{Path(image['file_name']).stem}_instanceTrainIds.png"
        save_labels(instances_root / "annotations/val2017" / name, OBJECT_TRAIN_IDS)
    assert np.array_equal(rebuild(read("coco-object", instances_root), "139"), OBJECT_TRAIN_IDS)


def test_maps_of_coco_stuff_alone_are_not_taken_for_objects(instances_root: Path) -> None:
    expected = read("coco-object", instances_root)
    for image in INSTANCES["images"]:
        name = f"{Path(image['file_name']).stem}_labelTrainIds.png"
        save_labels(instances_root / "annotations/val2017" / name, STUFF_TRAIN_IDS)
    assert read("coco-object", instances_root) == expected


@pytest.mark.parametrize("change", [{"segmentation": None}, {"category_id": "dog"}, {"iscrowd": 2}, {"id": "2"}])
def test_an_image_with_an_instance_that_cannot_be_read_is_left_out(
    change: dict[str, Any], instances_root: Path
) -> None:
    content = json.loads(json.dumps(INSTANCES))
    content["annotations"][1].update(change)
    write_instances(instances_root, content)
    dataset, faults = open_set("coco-object", instances_root)
    assert {sample.image_id for sample in dataset.samples} == {"285"}
    assert faults.num_faults == 1


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"segmentation": [[1, 2]]}, "its segmentation is bad: a polygon is a flat list of at least three x, y pairs"),
        ({"category_id": 5}, "its category 'unicorn' is none of the classes"),
    ],
)
def test_an_image_with_an_instance_that_cannot_be_drawn_is_left_out(
    change: dict[str, Any], what: str, instances_root: Path
) -> None:
    content = json.loads(json.dumps(INSTANCES))
    content["categories"].append({"id": 5, "name": "unicorn"})
    content["annotations"][1].update(change)
    write_instances(instances_root, content)
    assert faults_of("coco-object", instances_root) == [("instances_val2017.json", "annotation 2", what)]
    dataset, _ = open_set("coco-object", instances_root)
    assert {sample.image_id for sample in dataset.samples} == {"285"}


def test_an_instance_of_an_image_that_is_not_there_is_a_fault(instances_root: Path) -> None:
    content = json.loads(json.dumps(INSTANCES))
    content["annotations"].append(annotation(4, DOG, rows("1 1 1 1 1", "0 0 0 0 0", "0 0 0 0 0"), image_id=7))
    write_instances(instances_root, content)
    what = "image_id 7 is not among the images"
    assert faults_of("coco-object", instances_root) == [("instances_val2017.json", "annotation 4", what)]


def turned_images(name: str, root: Path, out: Path) -> list[str]:
    """Where the faults are that `check` finds, all of them of images that their EXIF turns."""
    _, faults = check(PrepareConfig(name, root, out))
    assert all("turn" in fault.what for fault in faults.faults)
    return [fault.where for fault in faults.faults]


@pytest.mark.parametrize("orientation", range(2, 9))
def test_an_image_that_its_exif_turns_is_a_fault_also_where_sizes_agree(orientation: int, tmp_path: Path) -> None:
    home = make_ade(tmp_path)
    for name in ("square", "upright"):
        save_labels(home / f"annotations/validation/{name}.png", np.ones((4, 4)))
        made = exif(1 if name == "upright" else orientation)
        Image.new("RGB", (4, 4)).save(home / f"images/validation/{name}.jpg", exif=made)
    assert turned_images("ade20k", home, tmp_path) == ["image square"]


def test_an_image_that_its_exif_turns_is_a_fault_where_label_maps_are_drawn(
    instances_root: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (W, H)).save(instances_root / "val2017/000000000139.jpg", exif=exif(4))
    assert turned_images("coco-object", instances_root, tmp_path) == ["image 139"]


def test_a_line_too_long_to_be_a_file_is_a_fault(tmp_path: Path) -> None:
    home = make_voc(tmp_path)
    save_list(home / "ImageSets/Segmentation/val.txt", "x" * 300, "2007_000033")
    dataset, faults = open_set("voc21", home)
    assert {sample.split for sample in dataset.samples} == {"train", "val"}
    (fault,) = faults.faults
    assert (fault.where, fault.what) == ("line 1", f"the image {'x' * 300} has no label map")


@pytest.mark.parametrize(("folder", "suffix"), [("JPEGImages", ".jpg"), ("SegmentationClass", ".png")])
def test_a_listed_link_out_of_either_folder_is_a_fault_of_its_line(folder: str, suffix: str, tmp_path: Path) -> None:
    home = make_voc(tmp_path)
    linked = home / folder / f"2007_000033{suffix}"
    linked.rename(tmp_path / linked.name)
    linked.symlink_to(tmp_path / linked.name)
    ((source, where, what),) = faults_of("voc21", home)
    assert (source, where) == ("val.txt", "line 1")
    assert "does not lie inside" in what


def test_where_an_image_has_both_maps_the_converted_one_counts(tmp_path: Path) -> None:
    root = make_coco(tmp_path)
    save_labels(root / "annotations/val2017/000000000139_labelTrainIds.png", np.full((H, W), 16))
    assert [sample.prompt for sample in read("coco-stuff", root) if sample.split == "val"] == ["dog"]
