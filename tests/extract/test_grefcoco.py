"""gRefCOCO's published layout is read as it is; whatever is wrong with a copy of it is said all at once."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cache_schema.errors import UsageError
from cache_schema.masks import decode_mask, encode_mask
from cache_schema.samples import open_samples
from extract.datasets import DATASETS
from extract.datasets.faults import AnnotationError
from extract.datasets.grefcoco import read_grefcoco
from extract.datasets.records import SampleRecord, Source
from extract.prepare import PrepareConfig, prepare
from tests.extract.coco_files import (
    CAT,
    COMPRESSED,
    CROWD,
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
    without,
    write_images,
    write_instances,
)


def ref(ref_id: int, ann_id: list[int], *sents: str, image_id: int = 581857, split: str = "train") -> dict[str, Any]:
    sent_ids = [ref_id * 10 + number for number in range(len(sents))]
    return {
        "ref_id": ref_id,
        "ann_id": ann_id,
        "image_id": image_id,
        "category_id": [CAT if ann > 0 else -1 for ann in ann_id],
        "split": split,
        "file_name": f"COCO_train2014_{image_id:012d}_{ref_id}.jpg",
        "sentences": [
            {"sent_id": sent_id, "sent": sent, "raw": sent.upper(), "tokens": sent.split()}
            for sent_id, sent in zip(sent_ids, sents, strict=True)
        ],
        "sent_ids": sent_ids,
        "no_target": ann_id == [-1],
    }


REFS: list[dict[str, Any]] = [
    ref(203, [1], "the left cat", "  cat\ton   the left "),
    ref(204, [1, 2], "both cats", split="val"),
    ref(205, [3], "the dog in three pieces"),
    ref(206, [4], "the crowd"),
    ref(207, [5], "the corner"),
    ref(208, [2, 5], "a cat and a dog", split="testA"),
    ref(209, [-1], "a zebra", image_id=909),
    ref(210, [6], image_id=909),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_images(tmp_path / "images")
    write(tmp_path, REFS, INSTANCES)
    return tmp_path


def write(root: Path, refs: Any, instances: Any) -> None:
    (root / "grefs(unc).json").write_text(json.dumps(refs))
    write_instances(root, instances)


def read(root: Path, **options: Any) -> dict[str, SampleRecord]:
    """The samples of a dataset by id; its faults are raised together."""
    source = Source(root, **options)
    samples = {sample.id: sample for sample in read_grefcoco(source).samples}
    source.faults.raise_if_any()
    return samples


def mask_of(sample: SampleRecord) -> NDArray[np.bool_]:
    assert sample.target is not None
    return decode_mask(sample.target, sample.image_size)


def test_every_sentence_is_a_sample_in_the_order_of_the_file(root: Path) -> None:
    ids = [sample.id for sample in read_grefcoco(Source(root)).samples]
    assert ids == ["203:2030", "203:2031", "204:2040", "205:2050", "206:2060", "207:2070", "208:2080", "209:2090"]


def test_a_sample_carries_its_image_prompt_split_and_size(root: Path) -> None:
    samples = read(root)
    assert samples["203:2031"].prompt == "cat on the left"
    assert samples["203:2031"].image_size == (H, W)
    assert samples["203:2031"].image_id == "581857"
    assert samples["209:2090"].image_size == (W, H)
    assert [samples[i].split for i in ("203:2030", "204:2040", "208:2080")] == ["train", "val", "testA"]


def test_images_are_found_by_id_because_file_names_of_refs_carry_a_suffix(root: Path) -> None:
    assert REFS[0]["file_name"] == "COCO_train2014_000000581857_203.jpg"
    dataset = read_grefcoco(Source(root))
    sample = next(dataset.samples)
    assert sample.image_path == "COCO_train2014_000000581857.jpg"
    assert (dataset.image_dir / sample.image_path).is_file()


def test_polygons_of_one_or_several_annotations_become_their_clamped_union(root: Path) -> None:
    samples = read(root)
    np.testing.assert_array_equal(mask_of(samples["203:2030"]), box_mask(LEFT))
    np.testing.assert_array_equal(mask_of(samples["204:2040"]), box_mask(LEFT, SHIFTED))
    np.testing.assert_array_equal(mask_of(samples["205:2050"]), box_mask(LEFT, SHIFTED, FAR))


def test_run_lengths_are_read_compressed_and_uncompressed(root: Path) -> None:
    samples = read(root)
    np.testing.assert_array_equal(mask_of(samples["206:2060"]), box_mask(CROWD))
    np.testing.assert_array_equal(mask_of(samples["207:2070"]), box_mask(COMPRESSED))
    np.testing.assert_array_equal(mask_of(samples["208:2080"]), box_mask(SHIFTED, COMPRESSED))


def test_compressed_run_lengths_of_any_mask_survive(root: Path) -> None:
    rng = np.random.default_rng(0)
    for share in (0.02, 0.5, 1.0):
        mask = rng.random((H, W)) < share
        instances = copy.deepcopy(INSTANCES)
        instances["annotations"][4]["segmentation"]["counts"] = encode_mask(mask).decode()
        write(root, REFS, instances)
        np.testing.assert_array_equal(mask_of(read(root)["207:2070"]), mask)


def test_no_target_is_the_empty_mask_at_the_images_size(root: Path) -> None:
    sample = read(root)["209:2090"]
    assert sample.no_target
    assert mask_of(sample).shape == (W, H)
    assert not mask_of(sample).any()
    assert not read(root)["203:2030"].no_target


def test_tags_count_the_targets_and_name_the_category_they_share(root: Path) -> None:
    samples = read(root)
    assert samples["203:2030"].tags == {"targets": "one", "category": "cat"}
    assert samples["204:2040"].tags == {"targets": "many", "category": "cat"}
    assert samples["208:2080"].tags == {"targets": "many"}
    assert samples["209:2090"].tags == {"targets": "none"}


def test_tags_of_a_ref_are_added(root: Path) -> None:
    write(root, [{**REFS[0], "tags": {"kind": "relation"}}], INSTANCES)
    assert read(root)["203:2030"].tags == {"targets": "one", "category": "cat", "kind": "relation"}


def test_a_ref_without_sentences_gives_no_sample_as_in_the_published_file(root: Path) -> None:
    assert not any(sample_id.startswith("210:") for sample_id in read(root))


def test_an_annotation_id_without_its_list_and_a_repeated_one_count_once(root: Path) -> None:
    write(root, [{**REFS[0], "ann_id": 1}, {**REFS[1], "ann_id": [2, 2]}], INSTANCES)
    assert read(root)["203:2030"].tags["targets"] == "one"
    assert read(root)["204:2040"].tags["targets"] == "one"


def test_the_dataset_names_its_sources_and_its_image_folder(root: Path) -> None:
    dataset = DATASETS["grefcoco"].read(Source(root))
    assert dataset.name == "grefcoco"
    assert dataset.image_dir == root / "images"
    assert dataset.sources == (root / "grefs(unc).json", root / "instances.json")


def test_the_image_folder_is_train2014_or_whichever_is_named(root: Path) -> None:
    (root / "images").rename(root / "train2014")
    assert read_grefcoco(Source(root)).image_dir == root / "train2014"
    (root / "coco").mkdir()
    (root / "train2014").rename(root / "coco" / "photos")
    assert read_grefcoco(Source(root, image_dir=root / "coco" / "photos")).image_dir == root / "coco" / "photos"


@pytest.mark.parametrize("name", ["grefs(unc).json", "instances.json"])
def test_a_missing_file_is_named(root: Path, name: str) -> None:
    (root / name).unlink()
    with pytest.raises(UsageError, match=r"is missing: it should hold .*Give the folder") as caught:
        read(root)
    assert str(root / name) in str(caught.value)


def test_a_missing_image_folder_is_named_with_what_was_looked_for(root: Path) -> None:
    (root / "images").rename(root / "pictures")
    with pytest.raises(UsageError, match=r"no image folder: looked for 'images' and 'train2014' and .*--image-dir"):
        read(root)
    with pytest.raises(UsageError, match=r"no folder at .*photos; name the one that holds the images with --image"):
        read(root, image_dir=root / "photos")


def test_a_folder_without_any_of_the_images_is_refused(root: Path) -> None:
    (root / "elsewhere").mkdir()
    complaint = r"elsewhere holds none of the images, not even 'COCO_train2014_000000581857\.jpg'\. .*--image-dir"
    with pytest.raises(UsageError, match=complaint):
        read(root, image_dir=root / "elsewhere")


def test_malformed_json_is_located_by_line_and_column(root: Path) -> None:
    (root / "grefs(unc).json").write_text('[\n {"ref_id": 1,,}\n]')
    with pytest.raises(AnnotationError, match=r"grefs\(unc\)\.json is not valid JSON: .* at line 2, column 15"):
        read(root)


@pytest.mark.parametrize("text", ["[NaN]", "[" * 100_000, "\ud800"])
def test_what_only_looks_like_json_is_refused(root: Path, text: str) -> None:
    (root / "grefs(unc).json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(AnnotationError, match=r"is not valid JSON|is nested too deeply"):
        read(root)


def test_the_wrong_outermost_type_is_refused(root: Path) -> None:
    write(root, {"refs": REFS}, INSTANCES)
    with pytest.raises(AnnotationError, match=r"grefs\(unc\)\.json must hold a list, holds an object"):
        read(root)
    write(root, REFS, [])
    with pytest.raises(AnnotationError, match=r"instances\.json must hold an object, holds a list"):
        read(root)


REF_FAULTS: list[tuple[Change, str]] = [
    (without(0, "ann_id"), "item 0 (ref_id 203): 'ann_id' is missing"),
    (without(1, "ref_id"), "item 1: 'ref_id' is missing"),
    (without(0, "image_id"), "item 0 (ref_id 203): 'image_id' is missing"),
    (without(0, "split"), "item 0 (ref_id 203): 'split' is missing"),
    (without(0, "sentences"), "item 0 (ref_id 203): 'sentences' is missing"),
    (without(0, "sentences", 1, "sent"), "item 0 (ref_id 203), sentences item 1 (sent_id 2031): 'sent' is missing"),
    (without(0, "sentences", 1, "sent_id"), "item 0 (ref_id 203), sentences item 1: 'sent_id' is missing"),
    (having("3", 0, "ref_id"), "item 0 (ref_id 3): 'ref_id' must be a whole number, is a text"),
    (having(True, 0, "image_id"), "item 0 (ref_id 203): 'image_id' must be a whole number, is true or false"),
    (having(None, 0, "split"), "item 0 (ref_id 203): 'split' must be a text, is null"),
    (having("1", 0, "ann_id"), "item 0 (ref_id 203): 'ann_id' must be a list, is a text"),
    (having([1.5], 0, "ann_id"), "item 0 (ref_id 203): 'ann_id' must list whole numbers, or be [-1] for no target"),
    (having([], 0, "ann_id"), "item 0 (ref_id 203): 'ann_id' must list whole numbers, or be [-1] for no target"),
    (having("a ref", 2), "item 2: must be an object, is a text"),
    (having({}, 2), "item 2: 'ref_id' is missing"),
    (having(7, 0, "sentences", 0), "item 0 (ref_id 203), sentences item 0: must be an object, is a whole number"),
    (having(4, 0, "image_id"), "item 0 (ref_id 203): image_id 4 is not among the images"),
    (having([1, 99], 0, "ann_id"), "item 0 (ref_id 203): ann_id 99 is not among the annotations"),
    (having([6], 0, "ann_id"), "item 0 (ref_id 203): ann_id 6 belongs to image 909, not to image 581857"),
    (having([1, -1], 0, "ann_id"), "item 0 (ref_id 203): ann_id -1 is not among the annotations"),
    (having(True, 0, "no_target"), "item 0 (ref_id 203): 'no_target' contradicts 'ann_id', which is [1]"),
    (having(False, 6, "no_target"), "item 6 (ref_id 209): 'no_target' contradicts 'ann_id', which is [-1]"),
    (having(" \n", 0, "sentences", 0, "sent"), "sentences item 0 (sent_id 2030): 'sent' is empty"),
    (having({"kind": 1}, 0, "tags"), "item 0 (ref_id 203): 'tags' must map texts to texts"),
    (having({"targets": "all"}, 0, "tags"), "item 0 (ref_id 203): 'tags' must not set targets"),
]


@pytest.mark.parametrize(("change", "message"), REF_FAULTS, ids=[message for _, message in REF_FAULTS])
def test_a_faulty_ref_is_named_by_position_and_id(root: Path, change: Change, message: str) -> None:
    refs = copy.deepcopy(REFS)
    change(refs)
    write(root, refs, INSTANCES)
    with pytest.raises(AnnotationError) as caught:
        read(root)
    assert message in str(caught.value)
    assert str(root / "grefs(unc).json") in str(caught.value)


@pytest.mark.parametrize(("change", "message"), REF_FAULTS, ids=[message for _, message in REF_FAULTS])
def test_only_what_is_sound_gives_samples(root: Path, change: Change, message: str) -> None:
    sound = read(root)
    refs = copy.deepcopy(REFS)
    change(refs)
    write(root, refs, INSTANCES)
    found = {sample.id: sample for sample in read_grefcoco(Source(root)).samples}
    assert set(found) < set(sound)
    assert all(found[sample_id] == sound[sample_id] for sample_id in found)


def test_a_faulty_list_of_instances_is_named(root: Path) -> None:
    for name in ("images", "annotations", "categories"):
        write(root, REFS, {key: value for key, value in INSTANCES.items() if key != name})
        with pytest.raises(AnnotationError, match=rf"instances\.json has 1 fault: '{name}' is missing"):
            read(root)


BAD_SEGMENTATIONS: list[tuple[Any, str]] = [
    ([], "a segmentation is a list of polygons or run lengths"),
    ([[1.0, 2.0, 3.0, 4.0]], "at least three x, y pairs"),
    ([LEFT_BOX[:-1]], "at least three x, y pairs"),
    ([["1", "2", "3", "4", "5", "6"]], "a polygon must be a list of numbers"),
    ([7], "a polygon must be a list of numbers"),
    ([[0, 0, 1e9, 0, 1e9, 1e9]], "a polygon lies far outside the image of 40 x 60 pixels"),
    ({"size": [H, W]}, "run lengths must hold 'counts' and 'size'"),
    ({"size": 7, "counts": [H * W]}, "run lengths must hold 'counts' and 'size'"),
    ({"size": [H, W], "counts": 7}, "run lengths must hold 'counts' and 'size'"),
    ({"size": [W, H], "counts": [H * W]}, "the image's size [40, 60]"),
    ({"size": [H, W], "counts": [H * W - 1]}, "add up to the image's pixels"),
    ({"size": [H, W], "counts": [H * W + 1, -1]}, "add up to the image's pixels"),
    ({"size": [H, W], "counts": ""}, "add up to the image's pixels"),
    ({"size": [H, W], "counts": "d00"}, "add up to the image's pixels"),
    ({"size": [H, W], "counts": "12`"}, "compressed run lengths are cut short"),
    ({"size": [H, W], "counts": "é"}, "compressed run lengths hold the character 'é'"),
]


@pytest.mark.parametrize(("segmentation", "message"), BAD_SEGMENTATIONS)
def test_a_bad_segmentation_is_a_fault_of_every_ref_that_names_it(root: Path, segmentation: Any, message: str) -> None:
    instances = copy.deepcopy(INSTANCES)
    instances["annotations"][0]["segmentation"] = segmentation
    write(root, REFS, instances)
    with pytest.raises(AnnotationError) as caught:
        read(root)
    assert "has 2 faults: item 0 (ref_id 203): the segmentation of ann_id 1 is bad: " in str(caught.value)
    assert message in str(caught.value)
    assert "; item 1 (ref_id 204): the segmentation of ann_id 1 is bad, as said before." in str(caught.value)


def test_a_bad_segmentation_that_no_ref_names_does_no_harm(root: Path) -> None:
    instances = copy.deepcopy(INSTANCES)
    instances["annotations"].append(annotation(7, 909, CAT, [[1.0, 2.0]]))
    write(root, REFS, instances)
    assert len(read(root)) == 8


def test_all_faults_are_counted_and_the_first_ten_are_shown(root: Path) -> None:
    refs = [{**ref(number, [1], "a cat"), "image_id": 5, "split": None} for number in range(6)]
    write(root, refs, INSTANCES)
    with pytest.raises(AnnotationError) as caught:
        read(root)
    assert str(caught.value).count("'split' must be a text") == 6
    refs = [{**ref(number, [1], "a cat"), "image_id": 5} for number in range(13)]
    write(root, refs, INSTANCES)
    with pytest.raises(AnnotationError, match=r"has 13 faults: .*; and 3 more\. Mend these items") as caught:
        read(root)
    assert str(caught.value).count("image_id 5 is not among the images") == 10


def test_several_faults_of_one_ref_are_all_told(root: Path) -> None:
    write(root, [{"ref_id": 1}], INSTANCES)
    with pytest.raises(AnnotationError, match=r"has 4 faults: .*'image_id'.*'split'.*'ann_id'.*'sentences'"):
        read(root)


def test_faults_of_refs_are_noted_while_the_samples_are_gone_through(root: Path) -> None:
    write(root, [*REFS, ref(300, [99], "nothing")], INSTANCES)
    source = Source(root)
    samples = read_grefcoco(source).samples
    assert next(samples).id == "203:2030"
    assert not source.faults.num_faults
    assert len(list(samples)) == 7
    assert source.faults.num_faults == 1


def test_prepare_raises_the_faults_or_leaves_their_items_out(root: Path, tmp_path: Path) -> None:
    write(root, [*REFS, ref(300, [99], "nothing")], INSTANCES)
    config = PrepareConfig("grefcoco", root, tmp_path / "stores")
    with pytest.raises(AnnotationError, match=r"has 1 fault: item 8 \(ref_id 300\): ann_id 99 is not .*--skip-bad"):
        prepare(config)
    assert not (tmp_path / "stores").exists()
    prepared = prepare(PrepareConfig("grefcoco", root, tmp_path / "stores", skip_bad=True))
    samples = open_samples(prepared.path).samples
    assert len(samples) == 8
    assert samples.no_target.sum() == 1


@pytest.mark.parametrize(
    "file_name", ["/etc/passwd", "../secret.jpg", "a/../../secret.jpg", "a/../b.jpg", "a\\b.jpg", "a\0.jpg", "", "."]
)
def test_a_file_name_that_leads_out_of_the_image_folder_is_refused(root: Path, file_name: str) -> None:
    instances = copy.deepcopy(INSTANCES)
    instances["images"][0]["file_name"] = file_name
    write(root, REFS, instances)
    with pytest.raises(AnnotationError, match=r"images item 0 \(id 581857\): .* does not lie inside the image folder"):
        read(root)


def test_a_link_that_leads_out_of_the_image_folder_is_refused(root: Path) -> None:
    (root / "secret.jpg").write_bytes(b"")
    (root / "images" / "link.jpg").symlink_to(root / "secret.jpg")
    instances = copy.deepcopy(INSTANCES)
    instances["images"][0]["file_name"] = "link.jpg"
    write(root, REFS, instances)
    with pytest.raises(AnnotationError, match="does not lie inside the image folder"):
        read(root)


def test_the_image_folder_itself_may_be_a_link_and_images_may_lie_in_folders_below(root: Path) -> None:
    (root / "images").rename(root / "store")
    (root / "images").symlink_to(root / "store")
    (root / "store" / "a").mkdir()
    (root / "store" / "COCO_train2014_000000581857.jpg").rename(root / "store" / "a" / "1.jpg")
    instances = copy.deepcopy(INSTANCES)
    instances["images"][0]["file_name"] = "a/1.jpg"
    write(root, REFS, instances)
    assert read(root)["203:2030"].image_path == "a/1.jpg"
