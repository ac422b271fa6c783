"""Scenes make the same data every time, say only what is unambiguous, and never pass half a dataset for a whole one."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cache_schema.errors import UsageError
from cache_schema.masks import decode_mask
from extract.datasets import DATASETS, scenes
from extract.datasets.grefcoco import read_grefcoco
from extract.datasets.records import Source
from extract.datasets.scene_language import KINDS
from extract.datasets.scene_objects import COLOURS, HALF_EXTENTS, SHAPES, TEXTURES, Scene, SceneObject, make_scene
from extract.datasets.scenes import ScenesConfig, make_scenes, open_scenes

NUM_IMAGES = 60
MARGIN = 0.12  # of the short side, between centres, for every word about places
RATIO = 1.2  # between half-extents, for every word about sizes


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(ScenesConfig(tmp_path_factory.mktemp("scenes"), num_images=NUM_IMAGES))


@cache
def scene_of(index: int) -> Scene:
    return make_scene(np.random.default_rng([0, index]))


def load(root: Path, name: str) -> Any:
    return json.loads((root / name).read_text())


def files_of(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# What a sentence means, worked out from its words and the objects alone.


def fitting(words: list[str], scene: Scene) -> set[int]:
    noun = re.sub(r"(?<=cross)es$|s$(?<!cross)", "", words[-1])
    assert noun == "shape" or noun in SHAPES, noun
    found = set(range(len(scene.objects)))
    if noun != "shape":
        found = {i for i in found if scene.objects[i].shape == noun}
    for word in words[:-1]:
        assert word in HALF_EXTENTS or word in TEXTURES or word in COLOURS, word
        found = {i for i in found if word in (scene.objects[i].size, scene.objects[i].texture, scene.objects[i].colour)}
    return found


def along(item: SceneObject, word: str) -> float:
    x, y = item.centre
    return {"left": -x, "right": x, "top": -y, "above": -y, "bottom": y, "below": y}[word]


def meaning(sentence: str, scene: Scene) -> set[int]:
    """The indices of the objects meant; fails where a reader could be in doubt."""
    margin_px = MARGIN * min(scene.size)
    words = sentence.split()
    words = words[1:] if words[0] in ("the", "all") else words
    place = next((word for word in words[1:] if word in ("left", "right", "above", "below")), None)
    if place:
        head, tail = words[: words.index(place)], words[words.index(place) + 1 :]
        if place in ("left", "right"):
            head = head[:-2] if head[-2:] == ["to", "the"] else head
            assert tail.pop(0) == "of"
        assert tail.pop(0) == "the"
        (anchor,) = fitting(tail, scene)
        offsets = {
            i: along(scene.objects[i], place) - along(scene.objects[anchor], place) for i in fitting(head, scene)
        }
        offsets.pop(anchor, None)
        assert all(abs(offset) >= margin_px for offset in offsets.values()), "somewhere in between"
        return {i for i, offset in offsets.items() if offset > 0}
    if words[0].endswith("most"):
        members = fitting(words[1:], scene)
        assert len(members) >= 2
        ranked = sorted(members, key=lambda i: along(scene.objects[i], words[0].removesuffix("most")))
        axis, sign = {"l": (1, -1), "r": (1, 1), "t": (0, -1), "b": (0, 1)}[words[0][0]]
        reach = {i: (sign * np.argwhere(scene.objects[i].visible)[:, axis]).max() for i in members}
        assert max(reach, key=reach.__getitem__) == ranked[-1], "its outline disagrees"
        lead = [along(scene.objects[i], words[0].removesuffix("most")) for i in ranked[-2:]]
        assert lead[1] - lead[0] >= margin_px, "too close"
        return {ranked[-1]}
    if words[0] in ("largest", "smallest"):
        members = fitting(words[1:], scene)
        assert len(members) >= 2
        ranked = sorted(members, key=lambda i: scene.objects[i].half_extent, reverse=words[0] == "smallest")
        second, first = (scene.objects[i].half_extent for i in ranked[-2:])
        assert max(first / second, second / first) >= RATIO, "too alike"
        return {ranked[-1]}
    members = fitting(words, scene)
    is_plural = words[-1].endswith("s") and words[-1] != "cross"
    assert len(members) >= 2 if is_plural else len(members) <= 1
    return members


def test_every_prompt_means_exactly_the_objects_it_is_annotated_with(root: Path) -> None:
    annotations = load(root, "instances.json")["annotations"]
    first_id: dict[int, int] = {}
    for annotation in annotations:
        first_id.setdefault(annotation["image_id"], annotation["id"])
    checked = 0
    for ref in load(root, "grefs(unc).json"):
        scene = scene_of(ref["image_id"] - 1)
        for sentence in ref["sentences"]:
            meant = {first_id[ref["image_id"]] + index for index in meaning(sentence["sent"], scene)}
            assert meant == set(ref["ann_id"]) - {-1}, (ref["image_id"], sentence["sent"])
            checked += 1
    assert checked == NUM_IMAGES * 8


def test_kinds_are_mixed_and_agree_with_the_number_of_targets(root: Path) -> None:
    samples = list(open_scenes(Source(root)).samples)
    counts = Counter(sample.tags["kind"] for sample in samples)
    assert counts.keys() == KINDS.keys()
    for kind, share in KINDS.items():
        assert counts[kind] / len(samples) == pytest.approx(share, abs=0.07)
    expected = {"multi": "many", "none": "none"}
    assert all(sample.tags["targets"] == expected.get(sample.tags["kind"], "one") for sample in samples)


def test_absent_things_are_hard_negatives_whose_parts_are_all_there(root: Path) -> None:
    for ref in load(root, "grefs(unc).json"):
        if ref["no_target"]:
            scene = scene_of(ref["image_id"] - 1)
            words = ref["sentences"][0]["tokens"]
            *attributes, noun = words[1:] if words[0] == "the" else words
            shorter = [[*attributes[:i], *attributes[i + 1 :], noun] for i in range(len(attributes))]
            shorter += [[*attributes, "shape"]] if noun != "shape" else []
            assert not fitting([*attributes, noun], scene)
            assert all(fitting(fewer, scene) for fewer in shorter), words


def test_most_relations_would_be_ambiguous_without_the_relation(root: Path) -> None:
    needed = []
    for ref in load(root, "grefs(unc).json"):
        if ref["tags"]["kind"] == "relation":
            words = ref["sentences"][0]["tokens"]
            head = words[1 : next(i for i, w in enumerate(words) if w in ("to", "left", "right", "above", "below"))]
            needed.append(len(fitting(head, scene_of(ref["image_id"] - 1))) > 1)
    assert np.mean(needed) > 0.8


def test_no_prompt_is_said_twice_of_one_image_and_the_vocabulary_is_small(root: Path) -> None:
    samples = list(open_scenes(Source(root)).samples)
    assert len({(sample.image_id, sample.prompt) for sample in samples}) == len(samples)
    assert len({word for sample in samples for word in sample.prompt.split()}) < 60


def test_objects_lie_inside_the_image_and_stay_mostly_visible() -> None:
    covered = 0
    for index in range(NUM_IMAGES):
        scene = scene_of(index)
        H, W = scene.size
        assert 160 <= H <= 240
        assert 160 <= W <= 240
        assert H != W
        assert 3 <= len(scene.objects) <= 7
        assert np.sum([item.visible for item in scene.objects], axis=0).max() == 1
        for item in scene.objects:
            assert item.full_area >= item.visible_area >= 0.6 * item.full_area
            x0, y0, x1, y1 = item.box
            assert x0 > 0
            assert y0 > 0
            assert x1 < W
            assert y1 < H
            covered += item.visible_area < item.full_area
    assert covered > NUM_IMAGES / 2


def test_what_is_drawn_is_what_the_object_says() -> None:
    names = list(COLOURS)
    for index in range(NUM_IMAGES):
        scene = scene_of(index)
        for item in scene.objects:
            if item.texture == "plain":
                seen = np.median(scene.image[item.visible], axis=0)
                distances = np.linalg.norm(np.array([COLOURS[name] for name in names]) - seen, axis=1)
                assert names[distances.argmin()] == item.colour
            low, high = HALF_EXTENTS[item.size]
            assert low <= item.half_extent / min(scene.size) <= high


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_covers_the_area_its_geometry_gives_it(shape: str) -> None:
    area = {
        "circle": np.pi,
        "square": (2 * 0.88) ** 2,
        "triangle": 1.06 * (1.06 + 0.8),
        "cross": 4 * 2 * 0.42 * 1.05 - 4 * 0.42**2,
    }[shape]
    found = [item for index in range(NUM_IMAGES) for item in scene_of(index).objects if item.shape == shape]
    assert len(found) > 10
    for item in found:
        assert item.full_area == pytest.approx(area * item.half_extent**2, rel=0.06)


def test_the_files_read_back_as_the_masks_that_were_drawn(root: Path) -> None:
    refs = {str(ref["ref_id"]): ref for ref in load(root, "grefs(unc).json")}
    annotations = load(root, "instances.json")["annotations"]
    image_of = {annotation["id"]: annotation["image_id"] for annotation in annotations}
    first_id = {image_id: ann_id for ann_id, image_id in reversed(image_of.items())}
    for sample in read_grefcoco(Source(root)).samples:
        scene = scene_of(int(sample.image_id) - 1)
        expected = np.zeros(scene.size, np.bool_)
        ref = refs[sample.id.split(":")[0]]
        for ann_id in ref["ann_id"]:
            if ann_id != -1:
                expected |= scene.objects[ann_id - first_id[ref["image_id"]]].visible
        assert sample.image_size == scene.size
        np.testing.assert_array_equal(decode_mask(sample.target, sample.image_size), expected)
        assert sample.no_target == (not expected.any())


def test_images_are_the_scenes_and_annotations_measure_the_visible_parts(root: Path) -> None:
    instances = load(root, "instances.json")
    for index in (0, 7, 31):
        scene, row = scene_of(index), instances["images"][index]
        with Image.open(root / "images" / row["file_name"]) as image:
            difference = np.abs(np.asarray(image).astype(int) - scene.image)
        assert scene.size == (row["height"], row["width"])
        assert difference.mean() < 3
        rows = [annotation for annotation in instances["annotations"] if annotation["image_id"] == row["id"]]
        for annotation, item in zip(rows, scene.objects, strict=True):
            x, y, width, height = annotation["bbox"]
            assert item.visible[y : y + height, x : x + width].sum() == annotation["area"] == item.visible.sum()
            assert annotation["iscrowd"] == 0
            assert isinstance(annotation["segmentation"]["counts"], str)


def test_splits_divide_the_images_about_75_15_10(root: Path) -> None:
    split_of: dict[str, set[str]] = {}
    for sample in DATASETS["scenes"].read(Source(root)).samples:
        split_of.setdefault(sample.image_id, set()).add(sample.split)
    assert all(len(splits) == 1 for splits in split_of.values())
    assert Counter(min(splits) for splits in split_of.values()) == {"train": 45, "val": 9, "test": 6}


def test_the_same_config_gives_the_same_bytes_and_another_seed_gives_others(tmp_path: Path) -> None:
    first = files_of(make_scenes(ScenesConfig(tmp_path / "a", num_images=3)))
    assert files_of(make_scenes(ScenesConfig(tmp_path / "b", num_images=3))) == first
    other = files_of(make_scenes(ScenesConfig(tmp_path / "c", num_images=3, seed=1)))
    assert other.keys() == first.keys()
    assert all(other[name] != first[name] for name in first)


def test_a_larger_dataset_begins_with_the_smaller(tmp_path: Path) -> None:
    small = make_scenes(ScenesConfig(tmp_path / "small", num_images=3))
    large = make_scenes(ScenesConfig(tmp_path / "large", num_images=8))
    images = {name: data for name, data in files_of(small).items() if name.endswith(".jpg")}
    assert images.items() <= files_of(large).items()
    refs, more_refs = load(small, "grefs(unc).json"), load(large, "grefs(unc).json")
    assert more_refs[: len(refs)] == refs
    for key in ("images", "annotations"):
        rows, more_rows = load(small, "instances.json")[key], load(large, "instances.json")[key]
        assert more_rows[: len(rows)] == rows
    assert {ref["split"] for ref in more_refs} == {"train", "val", "test"}


@pytest.mark.parametrize("count", [1, 3, 20])
def test_each_image_has_as_many_prompts_as_asked_for(tmp_path: Path, count: int) -> None:
    root = make_scenes(ScenesConfig(tmp_path, num_images=4, prompts_per_image=count))
    assert set(Counter(sample.image_id for sample in open_scenes(Source(root)).samples).values()) == {count}


def test_a_complete_dataset_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ScenesConfig(tmp_path, num_images=3)
    make_scenes(config)
    monkeypatch.setattr(scenes, "make_scene", lambda rng: pytest.fail("made anew"))
    assert make_scenes(config) == tmp_path


@pytest.mark.parametrize("name", ["scenes.json", "instances.json", "grefs(unc).json", "images/scene_000001.jpg"])
@pytest.mark.parametrize("harm", ["removed", "cut short"])
def test_a_harmed_dataset_is_made_anew(tmp_path: Path, name: str, harm: str) -> None:
    config = ScenesConfig(tmp_path, num_images=3)
    whole = files_of(make_scenes(config))
    (tmp_path / name).unlink() if harm == "removed" else (tmp_path / name).write_bytes(whole[name][:60])
    assert files_of(make_scenes(config)) == whole


def test_a_killed_run_starts_again_and_leaves_nothing_that_passes_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_scenes(ScenesConfig(tmp_path / "killed", num_images=5, seed=3))
    config = ScenesConfig(tmp_path / "killed", num_images=4)
    calls = iter(range(10))
    with monkeypatch.context() as patch:
        patch.setattr(scenes, "make_scene", lambda rng: make_scene(rng) if next(calls) < 2 else stop())
        with pytest.raises(KeyboardInterrupt):
            make_scenes(config)
    assert not (tmp_path / "killed" / "scenes.json").exists()
    with pytest.raises(UsageError, match="is missing"):
        open_scenes(Source(tmp_path / "killed"))
    whole = files_of(make_scenes(ScenesConfig(tmp_path / "whole", num_images=4)))
    assert files_of(make_scenes(config)) == whole


def stop() -> Scene:
    raise KeyboardInterrupt


def test_a_run_killed_just_before_its_marker_starts_again(tmp_path: Path) -> None:
    config = ScenesConfig(tmp_path, num_images=2)
    whole = files_of(make_scenes(config))
    (tmp_path / "scenes.json").unlink()
    assert files_of(make_scenes(config)) == whole


def test_another_datasets_files_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "grefs(unc).json").write_text("[]")
    (tmp_path / "instances.json").write_text('{"info": {"description": "COCO 2014"}}')
    with pytest.raises(UsageError, match=r"is another dataset's\. Name another folder"):
        make_scenes(ScenesConfig(tmp_path, num_images=1))
    assert (tmp_path / "grefs(unc).json").read_text() == "[]"


@pytest.mark.parametrize("setting", [{"num_images": 0}, {"seed": -1}, {"prompts_per_image": 0}])
def test_a_config_that_asks_for_nothing_is_refused(tmp_path: Path, setting: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(setting))} is .*: give a whole number of at least"):
        ScenesConfig(tmp_path, **setting)
