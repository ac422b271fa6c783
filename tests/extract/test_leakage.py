"""Leakage: an image that two splits share is found by its id, by its bytes, and named where COCO's train2014 has it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_schema.errors import UsageError
from cache_schema.samples import ImageTable, Samples, SamplesStore
from extract.leakage import Leakage, Overlap, check_leakage

Row = tuple[str, str, str, str, str]
"""Split, image id, path, content, prompt."""


def store_of(rows: Sequence[Row], dataset: str = "one") -> SamplesStore:
    images = {image_id: (path, content) for _, image_id, path, content, _ in rows}
    prompts = list(dict.fromkeys(prompt for *_, prompt in rows))
    order = list(images)
    samples = Samples(
        images=ImageTable(
            ids=order,
            paths=[path for path, _ in images.values()],
            sizes=np.full((len(images), 2), 5, np.int32),
            sha256=[hashlib.sha256(content.encode()).hexdigest() for _, content in images.values()],
        ),
        prompts=prompts,
        ids=[str(row) for row in range(len(rows))],
        image_rows=np.array([order.index(image_id) for _, image_id, *_ in rows], np.int32),
        prompt_rows=np.array([prompts.index(prompt) for *_, prompt in rows], np.int32),
        targets=[b""] * len(rows),
        no_target=np.zeros(len(rows), np.bool_),
        splits=[split for split, *_ in rows],
        tags={},
    )
    fingerprint = hashlib.sha256(repr((rows, dataset)).encode()).hexdigest()
    return SamplesStore(Path(f"stores/{dataset}.zarr"), fingerprint, dataset, samples, None)


def between(leakage: Leakage, first: str, second: str) -> Overlap:
    (found,) = [overlap for overlap in leakage.overlaps if (overlap.first, overlap.second) == (first, second)]
    return found


def test_splits_that_share_nothing_leak_nothing() -> None:
    store = store_of([("train", "1", "1.jpg", "a", "cat"), ("val", "2", "2.jpg", "b", "dog")])
    leakage = check_leakage([store])
    assert not leakage.leaks
    assert "No image and no prompt is shared." in leakage.table()
    assert "No image is in two different splits." in leakage.table()


def test_an_image_in_two_splits_of_a_store_is_found_by_its_id() -> None:
    store = store_of([("train", "1", "1.jpg", "a", "cat"), ("val", "1", "1.jpg", "a", "dog")])
    leakage = check_leakage([store])
    (leak,) = leakage.leaks
    assert (leak.num_images, leak.num_by_id, leak.num_by_content) == (1, 1, 1)
    assert leak.images == ("'1' ('1.jpg')",)
    assert "LEAKAGE: different splits share images: one/train and one/val (1)" in leakage.table()


def test_a_copy_under_another_name_is_found_by_its_bytes() -> None:
    store = store_of([("train", "1", "1.jpg", "same", "cat"), ("val", "2", "2.jpg", "same", "dog")])
    (leak,) = check_leakage([store]).leaks
    assert (leak.num_images, leak.num_by_id, leak.num_by_content) == (1, 0, 1)


def test_an_image_that_was_encoded_anew_is_found_between_stores_by_id_and_name() -> None:
    one = store_of([("train", "1", "a/1.jpg", "first", "cat")])
    two = store_of([("val", "1", "b/1.jpg", "second", "dog")], "two")
    (leak,) = check_leakage([one, two]).leaks
    assert (leak.first, leak.second) == ("one/train", "two/val")
    assert (leak.num_images, leak.num_by_id, leak.num_by_content) == (1, 1, 0)


def test_an_id_alone_says_nothing_between_stores() -> None:
    one = store_of([("train", "1", "cat.jpg", "a", "cat")])
    two = store_of([("val", "1", "dog.jpg", "b", "dog")], "two")
    leakage = check_leakage([one, two])
    assert not leakage.leaks
    assert leakage.overlaps[0].num_other_images == 1
    assert "1 ids stand for files that agree neither in name nor in bytes" in leakage.table()


def test_the_same_split_of_two_stores_may_share_images() -> None:
    one = store_of([("train", "1", "1.jpg", "a", "cat")])
    two = store_of([("train", "1", "1.jpg", "a", "dog")], "two")
    leakage = check_leakage([one, two])
    assert leakage.overlaps[0].num_images == 1
    assert not leakage.leaks


def test_prompts_are_compared_to_the_letter_and_without_case_and_blanks() -> None:
    store = store_of(
        [
            ("train", "1", "1.jpg", "a", "the Cat"),
            ("train", "1", "1.jpg", "a", "a dog"),
            ("val", "2", "2.jpg", "b", "THE  cat"),
            ("val", "2", "2.jpg", "b", "a dog"),
            ("val", "2", "2.jpg", "b", "stra\u00dfe"),
            ("test", "3", "3.jpg", "c", "STRASSE"),
        ]
    )
    leakage = check_leakage([store])
    shared = between(leakage, "one/train", "one/val")
    assert (shared.num_prompts, shared.num_prompts_alike) == (1, 2)
    assert set(shared.prompts) == {"the Cat", "a dog"}
    assert between(leakage, "one/val", "one/test").num_prompts_alike == 1
    assert not leakage.leaks, "shared prompts alone are told, and are no leak"


COCO = "COCO_train2014_000000000042.jpg"


def test_images_of_coco_train2014_are_named_as_such() -> None:
    store = store_of([("val", "42", COCO, "a", "cat"), ("val", "43", "COCO_val2014_000000000043.jpg", "b", "dog")])
    leakage = check_leakage([store])
    assert leakage.parts[0].num_in_train2014 == 1
    assert "In COCO train2014: images of one/val (1 of 2)." in leakage.table()
    assert "has seen these images" in leakage.table()


@pytest.mark.parametrize("name", ["000000000042.jpg", "COCO_train2014_000000000042_7.jpg", f"deep/{COCO}"])
def test_an_image_of_train2014_is_known_again_under_the_names_of_other_releases(name: str) -> None:
    one = store_of([("train", "42", COCO, "a", "cat")])
    two = store_of([("val", "forty-two", name, "b", "dog")], "two")
    leakage = check_leakage([one, two])
    assert [part.num_in_train2014 for part in leakage.parts] == [1, 1]
    assert [leak.num_by_id for leak in leakage.leaks] == [1]


@pytest.mark.parametrize("name", ["42.jpg", "00000000042.jpg", "COCO_val2014_000000000043.jpg"])
def test_other_images_are_not_taken_for_those_of_train2014(name: str) -> None:
    one = store_of([("train", "42", COCO, "a", "cat")])
    leakage = check_leakage([one, store_of([("val", "42", name, "b", "dog")], "two")])
    assert [part.num_in_train2014 for part in leakage.parts] == [1, 0]
    assert not leakage.leaks


TWELVE = "000000000042.jpg"


def test_twelve_digits_alone_may_be_anybodys_and_say_nothing_between_stores() -> None:
    one = store_of([("train", "42", TWELVE, "a", "cat")])
    two = store_of([("val", "42", f"mine/{TWELVE}", "b", "dog")], "two")
    leakage = check_leakage([one, two])
    assert not leakage.leaks
    assert leakage.overlaps[0].num_other_images == 1
    assert "twelve digits alone are no name" in leakage.table()


@pytest.mark.parametrize("name", ["COCO_val2014_000000000042.jpg", COCO])
@pytest.mark.parametrize("prefix_first", [True, False])
def test_twelve_digits_are_cocos_where_the_other_name_says_so(name: str, prefix_first: bool) -> None:
    names = [name, TWELVE] if prefix_first else [TWELVE, name]
    one = store_of([("train", "a", names[0], "first", "cat")])
    two = store_of([("val", "b", names[1], "second", "dog")], "two")
    (leak,) = check_leakage([one, two]).leaks
    assert (leak.num_images, leak.num_by_id, leak.num_by_content) == (1, 1, 0)


def test_twelve_digits_and_the_same_content_are_one_image() -> None:
    one, two = store_of([("train", "42", TWELVE, "a", "cat")]), store_of([("val", "x", TWELVE, "a", "dog")], "two")
    (leak,) = check_leakage([one, two]).leaks
    assert (leak.num_images, leak.num_by_id, leak.num_by_content) == (1, 1, 1)


def test_names_out_of_a_store_do_not_reach_the_terminal_as_they_are() -> None:
    rows = [(split, "1", "1.jpg", "a", "cat") for split in ("tr\x1b[31m\nain", "val\x9b\u202e")]
    leakage = check_leakage([store_of(rows, "o\x1b]0;ne"), store_of(rows, "t\nwo")])
    table = leakage.table()
    assert not {"\x1b", "\x9b", "\u202e"} & set(table)
    assert "LEAKAGE" in table
    assert not [line for line in table.splitlines() if line.startswith(("ain", "wo"))]


def test_stores_of_one_dataset_are_numbered() -> None:
    rows = [("train", "1", "1.jpg", "a", "cat")]
    leakage = check_leakage([store_of(rows), store_of([*rows, *rows]), store_of(rows, "two")])
    assert [part.name for part in leakage.parts] == ["one#1/train", "one#2/train", "two/train"]


def test_a_store_that_is_named_twice_is_refused() -> None:
    store = store_of([("train", "1", "1.jpg", "a", "cat")])
    with pytest.raises(UsageError, match="named twice; name another, or it alone"):
        check_leakage([store, store])


def test_the_result_is_plain_json() -> None:
    store = store_of([("train", "1", COCO, "a", "cat"), ("val", "1", COCO, "a", "cat")])
    found = json.loads(json.dumps(check_leakage([store]).to_dict()))
    assert found["num_leaks"] == 1
    assert found["stores"] == {"one": "stores/one.zarr"}
    assert found["overlaps"][0]["is_leak"]
    assert [part["num_in_train2014"] for part in found["parts"]] == [1, 1]


def test_control_characters_of_a_prompt_do_not_reach_the_terminal() -> None:
    rows = [(split, "1", "1.jpg", "a", "\x1b[31mred\nnext") for split in ("train", "val")]
    table = check_leakage([store_of(rows)]).table()
    assert "\x1b" not in table
    assert r"'\x1b[31mred\nnext'" in table


LETTERS = st.sampled_from("abcde")
ROWS = st.lists(st.tuples(st.sampled_from(["train", "val", "test"]), LETTERS, LETTERS), min_size=1, max_size=12)


@given(rows=ROWS, others=ROWS)
def test_counts_are_those_of_plain_sets(rows: list[tuple[str, str, str]], others: list[tuple[str, str, str]]) -> None:
    def build(triples: list[tuple[str, str, str]], dataset: str) -> SamplesStore:
        return store_of(
            [(split, content, f"{content}.jpg", content, prompt) for split, content, prompt in triples], dataset
        )

    leakage = check_leakage([build(rows, "one"), build(others, "two")])
    images: dict[str, set[str]] = {}
    prompts: dict[str, set[str]] = {}
    for dataset, triples in (("one", rows), ("two", others)):
        for split, content, prompt in triples:
            images.setdefault(f"{dataset}/{split}", set()).add(content)
            prompts.setdefault(f"{dataset}/{split}", set()).add(prompt)
    assert {part.name: (part.num_images, part.num_prompts) for part in leakage.parts} == {
        name: (len(images[name]), len(prompts[name])) for name in images
    }
    assert len(leakage.overlaps) == len(images) * (len(images) - 1) // 2
    for overlap in leakage.overlaps:
        shared = len(images[overlap.first] & images[overlap.second])
        assert (overlap.num_images, overlap.num_by_id, overlap.num_by_content) == (shared, shared, shared)
        assert overlap.num_prompts == overlap.num_prompts_alike == len(prompts[overlap.first] & prompts[overlap.second])
        different = overlap.first.split("/")[1] != overlap.second.split("/")[1]
        assert overlap.is_leak == (shared > 0 and different)
