"""The refer family's published layout is read as it is, whichever Python wrote the pickle; faults are told at once."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cache_schema.errors import UsageError
from cache_schema.fingerprint import digest_file
from cache_schema.masks import decode_mask
from cache_schema.samples import open_samples
from cache_schema.store import open_store
from extract.datasets import DATASETS
from extract.datasets.faults import AnnotationError
from extract.datasets.records import SampleRecord, Source
from extract.prepare import PrepareConfig, check, prepare
from tests.extract import python2_pickles
from tests.extract.coco_files import (
    CAT,
    COMPRESSED,
    CROWD,
    FAR,
    FAR_BOX,
    INSTANCES,
    LEFT,
    LEFT_BOX,
    SHIFTED,
    SHIFTED_BOX,
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

SPLIT_BY = {"refcoco": "unc", "refcoco+": "unc", "refcocog-umd": "umd", "refcocog-google": "google"}
SPLITS = {
    "refcoco": ["train", "val", "testA", "testB"],
    "refcoco+": ["train", "val", "testA", "testB"],
    "refcocog-umd": ["train", "val", "test"],
    "refcocog-google": ["train", "val"],
}


def ref(ref_id: int, ann_id: Any, *sents: str, image_id: int = 581857, split: str = "train") -> dict[str, Any]:
    """A reference as all four publish them: one annotation, whose id ends the file's name in RefCOCOg."""
    sent_ids = [ref_id * 10 + number for number in range(len(sents))]
    return {
        "sent_ids": sent_ids,
        "file_name": f"COCO_train2014_{image_id:012d}_{ann_id}.jpg",
        "ann_id": ann_id,
        "ref_id": ref_id,
        "image_id": image_id,
        "split": split,
        "sentences": [
            {"tokens": sent.split(), "raw": sent.upper(), "sent_id": sent_id, "sent": sent}
            for sent_id, sent in zip(sent_ids, sents, strict=True)
        ],
        "category_id": CAT,
    }


REFS: list[dict[str, Any]] = [
    ref(0, 1, "the left cat", "  cat\ton   the left "),
    ref(1, 2, "another cat", split="val"),
    ref(2, 3, "the dog in three pieces"),
    ref(3, 4, "the crowd"),
    ref(4, 5, "the corner"),
    ref(5, 6, "the dog 'that is' alone", image_id=909),
    ref(6, 6, image_id=909),
]


def to_python2(value: Any, text: Callable[[str], Any]) -> Any:
    """The same with Python 2's texts: keys are `str`, other texts what `text` makes of them."""
    keys: dict[str, bytes] = {}

    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {keys.setdefault(key, key.encode()): convert(item) for key, item in value.items()}
        if isinstance(value, list):
            return [convert(item) for item in value]
        return text(value) if isinstance(value, str) else value

    return convert(value)


def python2(protocol: int, text: Callable[[str], Any]) -> Callable[[Any], bytes]:
    return lambda refs: python2_pickles.dump(to_python2(refs, text), protocol)


def python3(protocol: int) -> Callable[[Any], bytes]:
    return lambda refs: pickle.dumps(refs, protocol)


def as_str(text: str) -> bytes:
    return text.encode()


def as_unicode(text: str) -> str:
    return text


PUBLISHED = python2(0, as_str)

WRITERS: dict[str, Callable[[Any], bytes]] = {
    "Python 2, protocol 0, str": python2(0, as_str),
    "Python 2, protocol 0, unicode": python2(0, as_unicode),
    "Python 2, protocol 2, str": python2(2, as_str),
    "Python 2, protocol 2, unicode": python2(2, as_unicode),
    **{f"Python 3, protocol {protocol}": python3(protocol) for protocol in range(6)},
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One folder with the images, in which each test puts the annotations that it needs."""
    root = tmp_path / "dataset"
    write_images(root / "images")
    write_instances(root)
    write(root, REFS)
    return root


def write(root: Path, refs: Any, name: str = "refcoco", dump: Callable[[Any], bytes] = PUBLISHED) -> Path:
    path = root / f"refs({SPLIT_BY[name]}).p"
    path.write_bytes(dump(refs))
    return path


def read(root: Path, name: str = "refcoco") -> dict[str, SampleRecord]:
    """The samples of a dataset without a fault, by id."""
    source = Source(root)
    samples = {sample.id: sample for sample in DATASETS[name].read(source).samples}
    source.faults.raise_if_any()
    return samples


def faults_of(root: Path, name: str = "refcoco") -> list[str]:
    source = Source(root)
    for _ in DATASETS[name].read(source).samples:
        pass
    return [str(fault) for fault in source.faults.faults]


def mask_of(sample: SampleRecord) -> NDArray[np.bool_]:
    assert sample.target is not None
    return decode_mask(sample.target, sample.image_size)


@pytest.mark.parametrize("writer", WRITERS)
def test_whoever_wrote_the_pickle_the_samples_are_the_same(root: Path, writer: str) -> None:
    expected = read(root)
    assert len(expected) == 7
    write(root, REFS, dump=WRITERS[writer])
    assert read(root) == expected


@pytest.mark.parametrize("name", SPLIT_BY)
def test_each_of_the_family_is_read_by_its_name_with_its_splits(root: Path, name: str) -> None:
    (root / "refs(unc).p").unlink()
    splits = SPLITS[name]
    write(root, [ref(place, 1, "a cat", split=split) for place, split in enumerate(splits)], name)
    dataset = DATASETS[name].read(Source(root))
    assert dataset.name == name
    assert dataset.image_dir == root / "images"
    assert dataset.sources == (root / f"refs({SPLIT_BY[name]}).p", root / "instances.json")
    assert [sample.split for sample in dataset.samples] == splits
    assert set(DATASETS[name].published) == set(splits)


def test_published_counts_are_those_of_the_papers() -> None:
    assert {name: list(DATASETS[name].published.values()) for name in SPLIT_BY} == {
        "refcoco": [42404, 3811, 1975, 1810],
        "refcoco+": [42278, 3805, 1975, 1798],
        "refcocog-umd": [42226, 2573, 5023],
        "refcocog-google": [44822, 5000],
    }
    assert all(DATASETS[name].counted == "refs" for name in SPLIT_BY)


def test_every_sentence_is_a_sample_with_all_its_fields(root: Path) -> None:
    samples = list(DATASETS["refcoco"].read(Source(root)).samples)
    assert [sample.id for sample in samples] == ["0:0", "0:1", "1:10", "2:20", "3:30", "4:40", "5:50"]
    first, second, third, *_, last = samples
    assert (first.prompt, second.prompt) == ("the left cat", "cat on the left"), "blanks are evened out"
    assert second == replace(first, id="0:1", prompt="cat on the left")
    assert (first.image_id, first.image_size, first.ref_id) == ("581857", (H, W), "0")
    assert (first.split, third.split) == ("train", "val")
    assert not any(sample.no_target for sample in samples)
    assert first.tags == {"targets": "one", "category": "cat"}
    assert (last.image_id, last.image_size, last.prompt) == ("909", (W, H), "the dog 'that is' alone")
    assert last.tags == {"targets": "one", "category": "dog"}


def test_images_are_found_by_id_because_file_names_of_refs_carry_an_annotation(root: Path) -> None:
    assert REFS[0]["file_name"] == "COCO_train2014_000000581857_1.jpg"
    dataset = DATASETS["refcoco"].read(Source(root))
    paths = {sample.image_path for sample in dataset.samples}
    assert paths == {"COCO_train2014_000000581857.jpg", "COCO_train2014_000000000909.jpg"}
    assert all((dataset.image_dir / path).is_file() for path in paths)


def test_masks_of_polygons_of_several_and_of_both_kinds_of_run_lengths(root: Path) -> None:
    samples = read(root)
    np.testing.assert_array_equal(mask_of(samples["0:0"]), box_mask(LEFT))
    np.testing.assert_array_equal(mask_of(samples["1:10"]), box_mask(SHIFTED))
    np.testing.assert_array_equal(mask_of(samples["2:20"]), box_mask(LEFT, SHIFTED, FAR))
    np.testing.assert_array_equal(mask_of(samples["3:30"]), box_mask(CROWD))
    np.testing.assert_array_equal(mask_of(samples["4:40"]), box_mask(COMPRESSED))


def test_polygons_that_overlap_count_a_pixel_once_and_do_not_cancel_out(root: Path) -> None:
    instances = copy.deepcopy(INSTANCES)
    instances["annotations"][0]["segmentation"] = [LEFT_BOX, LEFT_BOX, SHIFTED_BOX, FAR_BOX]
    write_instances(root, instances)
    np.testing.assert_array_equal(mask_of(read(root)["0:0"]), box_mask(LEFT, SHIFTED, FAR))


def test_a_ref_that_lists_its_annotation_is_read_too(root: Path) -> None:
    write(root, [{**REFS[0], "ann_id": [1]}])
    np.testing.assert_array_equal(mask_of(read(root)["0:0"]), box_mask(LEFT))


def test_sentences_beyond_ascii_are_read_from_str_and_from_unicode(root: Path) -> None:
    sentences = ("café à gauche", "左边的猫", 'it\'s "the" cat\\dog', "a 🐈")
    for text in (as_str, as_unicode):
        for protocol in (0, 2):
            write(root, [ref(0, 1, *sentences)], dump=python2(protocol, text))
            assert [sample.prompt for sample in read(root).values()] == list(sentences)


def test_long_texts_and_numbers_are_read_from_every_protocol(root: Path) -> None:
    sentence = " ".join(["cat"] * 200)
    for dump in WRITERS.values():
        write(root, [{**ref(2**40, 1, sentence), "area": 1.5, "extra": [None, True, -1, 70000, 300]}], dump=dump)
        (sample,) = read(root).values()
        assert (sample.ref_id, sample.prompt) == (str(2**40), sentence)


def test_more_refs_than_a_pickle_puts_behind_one_mark_come_in_order(root: Path) -> None:
    refs = [ref(number, 1 + number % 2, f"cat {number}") for number in range(2 * python2_pickles.BATCH + 7)]
    for dump in (python2(2, as_str), python3(2), python3(4)):
        write(root, refs, dump=dump)
        assert [sample.ref_id for sample in read(root).values()] == [str(number) for number in range(len(refs))]


def test_lists_that_several_refs_share_are_read_in_each(root: Path) -> None:
    shared = ref(0, 1, "a cat")["sentences"]
    refs = [{**ref(number, 1), "sentences": shared} for number in range(3)]
    for dump in (python2(0, as_str), python2(2, as_str), python3(4)):
        write(root, refs, dump=dump)
        assert list(read(root)) == ["0:0", "1:0", "2:0"]


@pytest.mark.parametrize(("file", "holds"), [("refs(unc).p", "the list of refs"), ("instances.json", "COCO's images")])
def test_a_missing_file_is_named_with_what_it_should_hold(root: Path, file: str, holds: str) -> None:
    (root / file).unlink()
    with pytest.raises(UsageError, match=f"is missing: it should hold {holds}") as caught:
        DATASETS["refcoco"].read(Source(root))
    assert str(root / file) in str(caught.value)


@pytest.mark.parametrize("folder", ["images", "train2014", "images/train2014", "../images/mscoco/images/train2014"])
def test_images_lie_where_people_put_them(root: Path, folder: str) -> None:
    (root / "images").rename(root / "away")
    (root / folder).parent.mkdir(parents=True, exist_ok=True)
    (root / "away").rename(root / folder)
    if folder == "images/train2014":
        dataset = DATASETS["refcoco"].read(Source(root, image_dir=root / folder))
    else:
        dataset = DATASETS["refcoco"].read(Source(root))
    assert dataset.image_dir.resolve() == (root / folder).resolve()
    assert len(list(dataset.samples)) == 7


@pytest.mark.parametrize("held", [{"refs": []}, ("a", "b"), None, 7, "refs", b"refs", {1, 2}])
def test_a_pickle_of_anything_but_a_list_is_refused(root: Path, held: Any) -> None:
    write(root, held, dump=python3(4))
    with pytest.raises(AnnotationError, match=r"refs\(unc\)\.p must hold a list, holds "):
        read(root)


REF_FAULTS: list[tuple[Change, str]] = [
    (without(0, "ann_id"), "item 0 (ref_id 0): 'ann_id' is missing"),
    (without(0, "ref_id"), "item 0: 'ref_id' is missing"),
    (without(0, "image_id"), "item 0 (ref_id 0): 'image_id' is missing"),
    (without(0, "split"), "item 0 (ref_id 0): 'split' is missing"),
    (without(0, "sentences"), "item 0 (ref_id 0): 'sentences' is missing"),
    (without(0, "sentences", 1, "sent"), "item 0 (ref_id 0), sentences item 1 (sent_id 1): 'sent' is missing"),
    (without(0, "sentences", 1, "sent_id"), "item 0 (ref_id 0), sentences item 1: 'sent_id' is missing"),
    (having(" \t", 0, "sentences", 0, "sent"), "sentences item 0 (sent_id 0): 'sent' is empty"),
    (having(b"cat", 0, "sentences", 0, "sent"), "sentences item 0 (sent_id 0): 'sent' must be a text, is a bytes"),
    (having((1,), 0, "ann_id"), "item 0 (ref_id 0): 'ann_id' must be a list, is a tuple"),
    (having([[1]], 0, "ann_id"), "item 0 (ref_id 0): 'ann_id' must list whole numbers, or be [-1] for no target"),
    (having([{}], 0, "ann_id"), "item 0 (ref_id 0): 'ann_id' must list whole numbers, or be [-1] for no target"),
    (having(99, 0, "ann_id"), "item 0 (ref_id 0): ann_id 99 is not among the annotations"),
    (having(6, 0, "ann_id"), "item 0 (ref_id 0): ann_id 6 belongs to image 909, not to image 581857"),
    (having(4, 0, "image_id"), "item 0 (ref_id 0): image_id 4 is not among the images"),
    (having(1.0, 0, "image_id"), "item 0 (ref_id 0): 'image_id' must be a whole number, is a number"),
    (having(None, 0), "item 0: must be an object, is null"),
    (having([[[]]], 0), "item 0: must be an object, is a list"),
    (having({1: "one", "b": "two"}, 0, "tags"), "item 0 (ref_id 0): 'tags' must map texts to texts"),
    (having({"kind": [1]}, 0, "tags"), "item 0 (ref_id 0): 'tags' must map texts to texts"),
    (having({"a kind": "b"}, 0, "tags"), "item 0 (ref_id 0): 'a kind' is no name for a tag"),
]


@pytest.mark.parametrize(("change", "message"), REF_FAULTS, ids=[message for _, message in REF_FAULTS])
def test_a_faulty_ref_is_named_and_gives_no_sample(root: Path, change: Change, message: str) -> None:
    refs = copy.deepcopy(REFS)
    change(refs)
    write(root, refs, dump=python3(4))
    source = Source(root)
    ids = [sample.id for sample in DATASETS["refcoco"].read(source).samples]
    faults = [str(fault) for fault in source.faults.faults]
    assert any(message in fault for fault in faults), faults
    assert {fault.source for fault in source.faults.faults} == {str(root / "refs(unc).p")}
    assert ids[-4:] == ["2:20", "3:30", "4:40", "5:50"], "the others are read"
    assert len(ids) == len(set(ids))
    with pytest.raises(AnnotationError):
        read(root)


@pytest.mark.parametrize(
    "dump",
    [lambda refs: python2_pickles.dump(refs, 0), lambda refs: python2_pickles.dump(refs, 2)],
    ids=["protocol 0", "protocol 2"],
)
def test_text_that_is_no_utf8_is_a_fault_of_its_ref_and_raw_ones_do_no_harm(
    root: Path, dump: Callable[[Any], bytes]
) -> None:
    refs = to_python2(REFS, as_str)
    refs[0][b"sentences"][1][b"sent"] = b"caf\xe9 on the left"
    refs[1][b"sentences"][0][b"raw"] = b"ANOTHER \xe9"
    write(root, refs, dump=dump)
    assert faults_of(root) == ["item 0 (ref_id 0), sentences item 1 (sent_id 1): 'sent' is not valid UTF-8"]


def test_a_bad_segmentation_is_a_fault_of_every_ref_that_names_it(root: Path) -> None:
    instances = copy.deepcopy(INSTANCES)
    instances["annotations"][0]["segmentation"] = [[1.0, 2.0]]
    write_instances(root, instances)
    write(root, [*REFS, ref(9, 1, "again")])
    first, second = faults_of(root)
    assert first.startswith("item 0 (ref_id 0): the segmentation of ann_id 1 is bad: ")
    assert second == "item 7 (ref_id 9): the segmentation of ann_id 1 is bad, as said before"


def test_a_store_is_prepared_with_every_sample_and_the_hashes_of_its_sources(root: Path, tmp_path: Path) -> None:
    prepared = prepare(PrepareConfig("refcoco", root, tmp_path / "stores"))
    samples = open_samples(prepared.path).samples
    assert list(samples.ids) == list(read(root))
    assert samples.images.ids == ["581857", "909"]
    np.testing.assert_array_equal(samples.target(3), box_mask(LEFT, SHIFTED, FAR))
    identity = open_store(prepared.path).header.identity
    assert identity["dataset"] == "refcoco"
    assert identity["sources"] == {name: digest_file(root / name) for name in ("refs(unc).p", "instances.json")}


def test_counts_of_refs_are_held_against_the_published_ones_and_said_loudly(root: Path, tmp_path: Path) -> None:
    prepared = prepare(PrepareConfig("refcoco", root, tmp_path / "stores"))
    assert prepared.counts.num_samples_of_split == {"train": 6, "val": 1}
    assert prepared.counts.num_counted_of_split == {"train": 5, "val": 1}, "refs, not sentences"
    assert prepared.counts.differences == [
        "split train has 5 refs, published are 42404",
        "split val has 1 refs, published are 3811",
        "split testA has 0 refs, published are 1975",
        "split testB has 0 refs, published are 1810",
    ]
    assert "NOT AS PUBLISHED: split train has 5 refs, published are 42404; " in prepared.summary()
    assert prepared.to_dict()["differences"] == prepared.counts.differences


def test_nothing_is_said_of_counts_that_are_the_published_ones(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = replace(DATASETS["refcoco"], published={"train": 5, "val": 1})
    monkeypatch.setitem(DATASETS, "refcoco", reader)
    prepared = prepare(PrepareConfig("refcoco", root, tmp_path / "stores"))
    assert prepared.counts.differences == []
    assert "PUBLISHED" not in prepared.summary()


def spoil(root: Path) -> None:
    """Three faults, each of another item."""
    refs = copy.deepcopy(REFS)
    refs[1]["split"] = 3
    refs[4]["image_id"] = 4
    write(root, refs)
    instances = copy.deepcopy(INSTANCES)
    instances["annotations"].append(annotation(7, 909, 5, [LEFT_BOX]))
    write_instances(root, instances)


def test_a_strict_prepare_names_every_fault_and_writes_nothing(root: Path, tmp_path: Path) -> None:
    spoil(root)
    with pytest.raises(AnnotationError) as caught:
        prepare(PrepareConfig("refcoco", root, tmp_path / "stores"))
    message = str(caught.value)
    assert f"{root / 'instances.json'} has 1 fault: annotations item 6 (id 7): category_id 5 is not among" in message
    assert f"{root / 'refs(unc).p'} has 2 faults: item 1 (ref_id 1): 'split' must be a text" in message
    assert "item 4 (ref_id 4): image_id 4 is not among the images" in message
    assert "--skip-bad" in message
    assert not (tmp_path / "stores").exists()


def test_skip_bad_leaves_out_what_is_faulty_and_says_so(root: Path, tmp_path: Path) -> None:
    spoil(root)
    prepared = prepare(PrepareConfig("refcoco", root, tmp_path / "stores", skip_bad=True))
    assert list(open_samples(prepared.path).samples.ids) == ["0:0", "0:1", "2:20", "3:30", "5:50"]
    assert prepared.faults.num_faults == 3
    assert "LEFT OUT: " in prepared.summary()
    assert "item 4 (ref_id 4): image_id 4" in prepared.summary()


def test_check_tells_the_same_faults_and_writes_nothing(root: Path, tmp_path: Path) -> None:
    spoil(root)
    counts, faults = check(PrepareConfig("refcoco", root, tmp_path / "stores"))
    assert (counts.num_samples, faults.num_faults) == (5, 3)
    assert not (tmp_path / "stores").exists()


def test_missing_images_and_images_of_another_size_are_faults(root: Path, tmp_path: Path) -> None:
    (root / "images" / "COCO_train2014_000000000909.jpg").unlink()
    prepared = prepare(PrepareConfig("refcoco", root, tmp_path / "stores", skip_bad=True))
    assert [str(fault) for fault in prepared.faults.faults] == ["image 909: COCO_train2014_000000000909.jpg is missing"]
    instances = copy.deepcopy(INSTANCES)
    instances["images"][0]["width"] = W + 1
    write_instances(root, instances)
    with pytest.raises(AnnotationError, match=r"has 40 x 60 pixels \(height x width\), its annotations say 40 x 61"):
        prepare(PrepareConfig("refcoco", root, tmp_path / "stores"))


@pytest.mark.parametrize("file_name", ["../secret.jpg", "/etc/passwd", "a/../../secret.jpg", "x" * 5000 + ".jpg"])
def test_a_file_name_that_leads_out_of_the_image_folder_or_that_no_file_has_is_a_fault(
    root: Path, tmp_path: Path, file_name: str
) -> None:
    (root / "secret.jpg").write_bytes(b"not to be looked at")
    instances = copy.deepcopy(INSTANCES)
    instances["images"][0]["file_name"] = file_name
    write_instances(root, instances)
    prepared = prepare(PrepareConfig("refcoco", root, tmp_path / "stores", skip_bad=True))
    assert list(open_samples(prepared.path).samples.ids) == ["5:50"]
    assert prepared.faults.num_faults
