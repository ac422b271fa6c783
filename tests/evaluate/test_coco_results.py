"""COCO results: pycocotools scores them as it should."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cache_schema.errors import UsageError
from evaluate.coco_results import CocoFiles, Detection, write_coco_results
from tests.evaluate.sample_stores import Made, make_samples, pixels


def score(files: CocoFiles) -> COCOeval:
    truth = COCO(str(files.truth))
    evaluation = COCOeval(truth, truth.loadRes(str(files.results)), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def category(name: str) -> dict[str, str]:
    return {"category": name}


def test_the_average_precision_is_the_one_worked_out_by_hand(tmp_path: Path) -> None:
    """Cats: a false one is trusted most, then one marked exactly, then one with IoU 39/50. Dogs: one, exactly.

    Up to a threshold of 0.75 (6 of 10) the precision is 2/3 at every recall. Above it, 1/2 up to a recall of 1/2, which
    51 of 101 places reach, and 0 beyond. Dogs have 1 throughout.
    """
    samples = make_samples(
        [
            Made("17", "cat", (0, 50), category("cat")),
            Made("18", "cat", (50, 100), category("cat")),
            Made("19", "cat", (0, 0), category("cat")),
            Made("17", "dog", (50, 90), category("dog")),
        ],
        classes=("cat", "dog"),
    )
    detections = [
        Detection(0, pixels(0, 50), 0.9),
        Detection(1, pixels(61, 100), 0.8),
        Detection(2, pixels(30, 60), 0.95),
        Detection(3, pixels(50, 90), 0.3),
    ]
    files = write_coco_results(tmp_path / "found.json", detections, samples, range(4))
    found = score(files)
    cats = (6 * 2 / 3 + 4 * 51 / 101 / 2) / 10
    assert found.stats[0] == pytest.approx((cats + 1) / 2)
    assert found.stats[1] == pytest.approx((2 / 3 + 1) / 2)
    assert (files.num_results, files.num_truths) == (4, 3)
    assert found.cocoGt.getImgIds() == [17, 18, 19], "numbers that images have already are kept"
    assert [entry["name"] for entry in found.cocoGt.loadCats([1, 2])] == ["cat", "dog"]


@pytest.mark.parametrize(("exchanged", "expected"), [(False, 1.0), (True, 0.0)])
def test_two_prompts_of_one_image_do_not_match_each_others_targets(
    tmp_path: Path, exchanged: bool, expected: float
) -> None:
    samples = make_samples([Made("a", "the left dog", (0, 40)), Made("a", "the right dog", (60, 100))])
    masks = [pixels(0, 40), pixels(60, 100)]
    detections = [Detection(row, masks[1 - row if exchanged else row], 0.5) for row in (0, 1)]
    files = write_coco_results(tmp_path / "found.json", detections, samples, [0, 1])
    found = score(files)
    assert found.stats[0] == pytest.approx(expected)
    images = json.loads(files.truth.read_text())["images"]
    assert [(image["sample_id"], image["prompt"]) for image in images] == [
        ("sample 0", "the left dog"),
        ("sample 1", "the right dog"),
    ]


def test_a_mask_without_a_pixel_is_no_result_and_a_sample_without_a_target_no_truth(tmp_path: Path) -> None:
    samples = make_samples([Made("a", "dog", (0, 40)), Made("b", "zebra")])
    detections = [Detection(0, pixels(0, 0), 0.9), Detection(1, pixels(0, 5), 0.9)]
    files = write_coco_results(tmp_path / "found.json", detections, samples, [0, 1])
    results, truth = json.loads(files.results.read_text()), json.loads(files.truth.read_text())
    assert [result["image_id"] for result in results] == [2]
    assert [annotation["image_id"] for annotation in truth["annotations"]] == [1]
    assert [annotation["id"] for annotation in truth["annotations"]] == [1]
    assert len(truth["images"]) == 2


def test_pixels_that_nobody_labelled_are_in_neither_mask(tmp_path: Path) -> None:
    made = [Made("a", "cat", (0, 50), category("cat"), ignored=(40, 70)), Made("b", "cat", (0, 50), category("cat"))]
    samples = make_samples(made, classes=("cat",))
    detections = [Detection(0, pixels(20, 60), 0.5), Detection(1, pixels(20, 60), 0.5)]
    files = write_coco_results(tmp_path / "found.json", detections, samples, [0, 1])
    masks = [
        [coco_mask.decode(entry["segmentation"]).astype(np.bool_) for entry in entries]
        for entries in (json.loads(files.results.read_text()), json.loads(files.truth.read_text())["annotations"])
    ]
    assert np.array_equal(masks[0], [pixels(20, 40), pixels(20, 60)])
    assert np.array_equal(masks[1], [pixels(0, 40), pixels(0, 50)])
    assert [entry["area"] for entry in json.loads(files.truth.read_text())["annotations"]] == [40, 50]


def test_images_whose_names_are_no_numbers_are_counted(tmp_path: Path) -> None:
    samples = make_samples([Made(name, "cat", (0, 9), category("cat")) for name in ("x", "007", "7")], classes=("cat",))
    files = write_coco_results(tmp_path / "found.json", [], samples, [0, 1, 2])
    assert [image["id"] for image in json.loads(files.truth.read_text())["images"]] == [1, 2, 3]
    assert files.num_results == 0


def test_a_file_that_is_not_named_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"let it end in \.json"):
        write_coco_results(tmp_path / "found", [], make_samples([Made("a", "cat", (0, 9))]), [0])
