"""Each view of an image is a forward pass of its own, in a row of its own, beside the other views of that image.

What a row says it shows is what the encoder saw, whatever was asked for: encoders cut views or extend them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import extract.image_job
from cache_schema.errors import UsageError
from cache_schema.features import FeatureCache, ImageFeatures
from cache_schema.samples import open_samples
from cache_schema.store import open_store
from cache_schema.views import ASPECTS, Aspect, average_views, fit_view, make_views
from extract.image_job import ImageJobConfig, extract_images
from extract.images import decode_image
from extract.job import Extraction
from tests.extract.toys import (
    NUM_IMAGES,
    BlindingEncoder,
    ToyImageEncoder,
    digest_of,
    noise_png,
    sizes_of,
    write_task,
)

if TYPE_CHECKING:
    from extract.encoders.protocols import ImageEncoder

VIEWS = ("whole", "flip", "crop-0.5", "scale-0.5", "scale-2+flip")
MEAN_COLOUR = (124, 116, 104)


@pytest.fixture
def views_config(config: ImageJobConfig) -> ImageJobConfig:
    """Shards of seven rows cut between the views of an image."""
    return replace(config, views=VIEWS, shard_rows=7)


def open_features(extraction: Extraction) -> ImageFeatures:
    return ImageFeatures(open_store(extraction.path, "image_features"))


def image_of(samples: Path, number: int) -> NDArray[np.uint8]:
    store = open_samples(samples)
    assert store.image_dir is not None
    return decode_image((store.image_dir / store.samples.images.paths[number]).read_bytes())


def seen(image: NDArray[np.uint8], row: Sequence[int]) -> NDArray[np.uint8]:
    """What a row of the array `view` shows of an image, worked out by padding it on all sides."""
    left, top, right, bottom, flip = row
    height, width = image.shape[:2]
    most = max(height, width, -left, -top, right, bottom)
    padded = np.full((height + 2 * most, width + 2 * most, 3), MEAN_COLOUR, np.uint8)
    padded[most : most + height, most : most + width] = image
    cut = padded[most + top : most + bottom, most + left : most + right]
    return cut[:, ::-1] if flip else cut


def assert_rows_are_of_their_views(config: ImageJobConfig, extraction: Extraction) -> None:
    """Every row holds what the encoder says of what the row's box shows of the row's image."""
    features, samples = open_features(extraction), open_samples(config.samples).samples.images
    images = {image_id: image_of(config.samples, number) for number, image_id in enumerate(samples.ids)}
    assert features.valid.all()
    for row, view in enumerate(features.store.read("view").tolist()):
        pixels = ToyImageEncoder().preprocess(np.ascontiguousarray(seen(images[features.ids[row]], view)))
        encoding = ToyImageEncoder().encode(torch.from_numpy(pixels)[None])
        for layer in features.layers:
            grid, cls = features.features(layer).read([row])[0], features.cls(layer).read([row])[0]
            np.testing.assert_array_equal(grid, encoding.features[layer][0].numpy().astype(np.float16))
            np.testing.assert_array_equal(cls, encoding.cls[layer][0].numpy().astype(np.float16))


# Rows


@pytest.mark.parametrize(("batch_size", "shard_rows"), [(1, 1), (3, 4), (32, 64), (4, 5), (2, 7)])
def test_every_row_is_what_the_encoder_says_of_its_view(
    config: ImageJobConfig, batch_size: int, shard_rows: int
) -> None:
    config = replace(config, views=VIEWS, batch_size=batch_size, shard_rows=shard_rows)
    encoder = ToyImageEncoder()
    extraction = extract_images(config, encoder)
    assert extraction.num_encoded == sum(encoder.encoded) == NUM_IMAGES * len(VIEWS)
    assert open_features(extraction).ids == [
        image_id for image_id in open_samples(config.samples).samples.images.ids for _ in VIEWS
    ]
    assert_rows_are_of_their_views(config, extraction)


@pytest.mark.parametrize("aspect", ASPECTS)
def test_a_row_says_what_the_encoder_saw_of_its_view(views_config: ImageJobConfig, aspect: Aspect) -> None:
    encoder = ToyImageEncoder(identity={"class": "toy", "aspect": aspect}, aspect=aspect)
    extraction = extract_images(views_config, encoder)
    sizes = open_samples(views_config.samples).samples.images.sizes.tolist()
    digests = open_samples(views_config.samples).samples.images.sha256
    asked = [make_views(VIEWS, (height, width), digest) for (height, width), digest in zip(sizes, digests, strict=True)]
    assert open_features(extraction).views == [fit_view(view, (8, 12), aspect) for views in asked for view in views]
    assert_rows_are_of_their_views(views_config, extraction)


@pytest.mark.parametrize(("batch_size", "shard_rows"), [(1, 1), (3, 4), (32, 64), (2, 7)])
def test_every_window_of_an_image_has_a_row_behind_its_fixed_views(
    config: ImageJobConfig, batch_size: int, shard_rows: int
) -> None:
    views = ("whole", "flip", "windows-0.5-0.4")
    config = replace(config, views=views, batch_size=batch_size, shard_rows=shard_rows)
    images, encoder = open_samples(config.samples).samples.images, ToyImageEncoder()
    extraction = extract_images(config, encoder)
    features = open_features(extraction)
    assert len(features.starts) == NUM_IMAGES + 1
    for number, (height, width) in enumerate(images.sizes.tolist()):
        rows = features.rows_of_image(number)
        of_image = features.views[rows.start : rows.stop]
        assert of_image == make_views(views, (height, width), images.sha256[number])
        assert features.ids[rows.start : rows.stop] == [images.ids[number]] * len(rows)
        assert features.sha256[rows.start : rows.stop] == [images.sha256[number]] * len(rows)
        assert features.store.read("original_size")[rows.start : rows.stop].tolist() == [[height, width]] * len(rows)
        mask = np.random.default_rng(number).random((height, width)) < 0.5
        windows = of_image[2:]
        assert (average_views(windows, (view.apply_to_mask(mask) for view in windows), mask.shape) == mask).all()
    nums = np.diff(features.starts)
    assert len(set(nums.tolist())) > 2, "images differ in how many windows they have"
    assert extraction.num_encoded == sum(encoder.encoded) == len(features.ids) == nums.sum()
    assert_rows_are_of_their_views(config, extraction)


def test_rows_of_an_image_follow_its_whole_view(views_config: ImageJobConfig) -> None:
    features = open_features(extract_images(views_config, ToyImageEncoder()))
    images = open_samples(views_config.samples).samples.images
    assert features.view_specs == VIEWS
    assert features.ids == [image_id for image_id in images.ids for _ in VIEWS]
    assert features.sha256 == [digest for digest in images.sha256 for _ in VIEWS]
    np.testing.assert_array_equal(features.store.read("original_size"), images.sizes.repeat(len(VIEWS), 0))
    rows = features.store.read("view").reshape(NUM_IMAGES, len(VIEWS), 5).tolist()
    for (height, width), (whole, flip, crop, small, large) in zip(images.sizes.tolist(), rows, strict=True):
        assert whole == [0, 0, width, height, 0]
        assert flip == [0, 0, width, height, 1]
        assert (crop[2] - crop[0], crop[3] - crop[1]) == (round(width / 2), round(height / 2))
        assert min(crop) >= 0
        assert crop[2] <= width
        assert crop[3] <= height
        assert (small[2] - small[0], small[3] - small[1], small[4]) == (2 * width, 2 * height, 0)
        assert (large[2] - large[0], large[3] - large[1], large[4]) == (round(width / 2), round(height / 2), 1)
        for box in (small, large):
            assert abs(box[0] + box[2] - width) <= 1
            assert abs(box[1] + box[3] - height) <= 1


def test_a_mirrored_views_features_are_those_of_the_mirrored_image_and_no_mirrored_grid(
    views_cache: FeatureCache, image_encoder: ImageEncoder
) -> None:
    features, samples = views_cache.images, views_cache.samples
    assert features.view_specs[:2] == ("whole", "flip")
    for number in range(0, len(samples.samples.images), 5):
        image = decode_image((samples.image_dir / samples.samples.images.paths[number]).read_bytes())
        mirrored = np.ascontiguousarray(image[:, ::-1])
        pixels = torch.from_numpy(np.array(image_encoder.preprocess(mirrored)))
        encoding = image_encoder.encode(pixels[None])
        row = int(views_cache.image_rows[number])
        for layer in features.layers:
            whole, flip = features.features(layer).read([row, row + 1]).astype(np.float32)
            np.testing.assert_allclose(flip, encoding.features[layer][0].numpy(), rtol=2e-3, atol=2e-3)
            assert np.abs(flip - whole[:, ::-1]).max() > 0.05
            cls = features.cls(layer).read([row + 1])[0]
            np.testing.assert_allclose(cls, encoding.cls[layer][0].numpy(), rtol=2e-3, atol=2e-3)


def test_the_whole_view_has_the_values_of_a_store_of_whole_images(
    config: ImageJobConfig, views_config: ImageJobConfig
) -> None:
    alone = open_features(extract_images(config, ToyImageEncoder()))
    among = open_features(extract_images(views_config, ToyImageEncoder()))
    rows = np.arange(NUM_IMAGES) * len(VIEWS)
    for layer in alone.layers:
        np.testing.assert_array_equal(alone.features(layer).read(), among.features(layer).read(rows))
        np.testing.assert_array_equal(alone.cls(layer).read(), among.cls(layer).read(rows))


# Work


def test_an_image_is_decoded_once_for_all_its_views(
    views_config: ImageJobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []

    def counting(data: bytes) -> NDArray[np.uint8]:
        decoded.append(hashlib.sha256(data).hexdigest())
        return decode_image(data)

    monkeypatch.setattr(extract.image_job, "decode_image", counting)
    whole_shards = replace(views_config, shard_rows=2 * len(VIEWS))
    extract_images(whole_shards, ToyImageEncoder())
    assert sorted(decoded) == sorted(open_samples(views_config.samples).samples.images.sha256)
    decoded.clear()
    extract_images(views_config, ToyImageEncoder())
    cut = [image for image in range(NUM_IMAGES) if image * 5 // 7 != (image * 5 + 4) // 7]
    assert len(decoded) == NUM_IMAGES + len(cut), "once more for each shard that begins inside an image"
    assert max(Counter(decoded).values()) == 2


def test_rows_of_an_image_that_failed_are_in_the_ledger_in_every_view(
    views_config: ImageJobConfig, tmp_path: Path
) -> None:
    files = [noise_png(number, *size) for number, size in enumerate(sizes_of(NUM_IMAGES))]
    files[3], files[8] = b"", b"hello"
    samples = write_task(tmp_path / "failing", files)
    encoder = ToyImageEncoder()
    extraction = extract_images(replace(views_config, samples=samples), encoder)
    store = open_store(extraction.path)
    rows = [*range(15, 20), *range(40, 45)]
    assert {failure.row: (failure.id, failure.reason.partition(":")[0]) for failure in store.failures()} == {
        row: ("image 3", "the file is empty") if row < 20 else ("image 8", "not an image file") for row in rows
    }
    assert extraction.num_failed == store.manifest.num_failures == 10
    assert np.flatnonzero(~store.read("valid")).tolist() == rows
    assert not store.array("features/fine").read(rows).any()
    assert sum(encoder.encoded) == (NUM_IMAGES - 2) * len(VIEWS)
    ledger = [json.loads(line) for line in (store.path / "ledger.jsonl").read_text().splitlines()]
    assert sorted(line["row"] for line in ledger) == rows


def test_a_view_may_fail_where_the_whole_image_does_not(views_config: ImageJobConfig) -> None:
    store = open_store(extract_images(replace(views_config, views=("whole", "flip")), BlindingEncoder()).path)
    valid = store.read("valid").reshape(NUM_IMAGES, 2)
    assert (valid.sum(1) == 1).all(), "each image glares in one of the two"
    assert set(valid[:, 0].tolist()) == {True, False}
    assert sorted(failure.row for failure in store.failures()) == np.flatnonzero(~valid).tolist()


def test_a_file_that_is_gone_is_named_once_for_all_its_views(views_config: ImageJobConfig, tmp_path: Path) -> None:
    (tmp_path / "images" / "0.img").unlink()
    with pytest.raises(UsageError, match=r"^'0.img' in .* cannot be had: the file cannot be read"):
        extract_images(views_config, ToyImageEncoder())


def test_rows_of_an_image_that_failed_are_in_the_ledger_in_every_window(config: ImageJobConfig, tmp_path: Path) -> None:
    files = [noise_png(number, *size) for number, size in enumerate(sizes_of(NUM_IMAGES))]
    files[3] = b""
    config = replace(config, samples=write_task(tmp_path / "failing", files), views=("whole", "windows-0.5-0.5"))
    features = open_features(extract_images(config, ToyImageEncoder()))
    rows = list(features.rows_of_image(3))
    assert len(rows) > 2
    assert [(failure.row, failure.id) for failure in features.store.failures()] == [(row, "image 3") for row in rows]
    assert np.flatnonzero(~features.valid).tolist() == rows


def test_a_view_that_cannot_be_shown_in_its_shape_is_in_the_ledger(config: ImageJobConfig, tmp_path: Path) -> None:
    samples = write_task(tmp_path / "thin", sizes=[(1, 20_000), (40, 30)])
    encoder = ToyImageEncoder(aspect="letterbox")
    store = open_store(extract_images(replace(config, samples=samples), encoder).path)
    assert store.read("valid").tolist() == [False, True]
    (failure,) = store.failures()
    assert (failure.id, failure.reason) == ("image 0", "it takes 13333 x 20000 pixels to show it so")


def test_an_image_of_too_many_windows_stops_a_job_before_anything_is_written(
    config: ImageJobConfig, tmp_path: Path
) -> None:
    samples = write_task(tmp_path / "thin", sizes=[(40, 30), (1, 20_000)])
    with pytest.raises(
        UsageError, match=r"an image of 1 x 20000 pixels .* has 20000 windows of windows-1-1, more than"
    ):
        extract_images(replace(config, samples=samples, views=("whole", "windows-1-1")), ToyImageEncoder())
    assert not list(config.out.glob("*"))


def test_a_job_of_views_counts_views(views_config: ImageJobConfig) -> None:
    first = extract_images(views_config, ToyImageEncoder())
    assert first.num_encoded == NUM_IMAGES * len(VIEWS)
    store = open_store(first.path)
    spans = sorted(receipt.rows for receipt in store.receipts() if receipt.unit != "static")
    assert spans == [(row, min(row + 7, 50)) for row in range(0, 50, 7)]
    idle = ToyImageEncoder(fails_at_batch=0)
    again = extract_images(views_config, idle)
    assert (again.num_encoded, again.num_reused) == (0, NUM_IMAGES * len(VIEWS))
    assert again.summary("views").startswith("nothing to extract: all 50 views are in")


def test_how_the_work_is_cut_up_in_time_makes_no_difference(views_config: ImageJobConfig, tmp_path: Path) -> None:
    once = extract_images(views_config, ToyImageEncoder())
    other = replace(views_config, out=tmp_path / "other", batch_size=32, decode_threads=7)
    assert digest_of(extract_images(other, ToyImageEncoder())) == digest_of(once)


def test_a_killed_job_of_views_goes_on(views_config: ImageJobConfig, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="on fire"):
        extract_images(views_config, ToyImageEncoder(fails_at_batch=8))
    again = extract_images(views_config, ToyImageEncoder())
    assert 0 < again.num_encoded < NUM_IMAGES * len(VIEWS)
    untouched = extract_images(replace(views_config, out=tmp_path / "untouched"), ToyImageEncoder())
    assert digest_of(again) == digest_of(untouched)


# Identity, and what is refused


def test_views_decide_which_store_it_is(config: ImageJobConfig) -> None:
    asked: list[tuple[str, ...]] = [("whole",), ("whole", "flip"), ("whole", "crop-0.5"), ("whole", "crop-0.6")]
    asked += [("whole", "flip", "crop-0.5"), ("whole", "windows-1-1"), ("whole", "windows-1-0.5")]
    paths = {extract_images(replace(config, views=views), ToyImageEncoder()).path for views in asked}
    assert len(paths) == len(asked)


def test_two_crops_of_one_size_fall_elsewhere(config: ImageJobConfig) -> None:
    config = replace(config, views=("whole", "crop-0.5", "crop-0.5"))
    boxes = open_store(extract_images(config, ToyImageEncoder()).path).read("view").reshape(NUM_IMAGES, 3, 5)
    assert (boxes[:, 1] != boxes[:, 2]).any()
    assert len(np.unique(boxes[:, 1, :2], axis=0)) > 1, "and not in the same place of every image"


@pytest.mark.parametrize(
    ("views", "complaint"),
    [
        ((), "views must begin with whole"),
        (("flip",), "views must begin with whole"),
        (("flip", "whole"), "views must begin with whole"),
        (("whole", "flop"), "unknown view 'flop': a view is whole, flip, scale-S or crop-S"),
        (("whole", "crop"), "unknown view 'crop'"),
        (("whole", "crop-"), "unknown view 'crop-'"),
        (("whole", "crop-half"), "unknown view 'crop-half'"),
        (("whole", "crop-0.5+flop"), r"unknown view 'crop-0\.5\+flop'"),
        (("whole", "whole+flip"), r"unknown view 'whole\+flip'"),
        (("whole", "scale-nan"), "unknown view 'scale-nan'"),
        (("whole", "crop-1.5"), r"view 'crop-1\.5' is out of range: scales go from 0\.1 to 10, crops from 0\.1 to 1"),
        (("whole", "scale-0"), "view 'scale-0' is out of range"),
        (("whole", "scale--1"), "view 'scale--1'"),
        (("whole", "flip", "flip"), "flip.? is named twice"),
        (("whole", "whole"), "whole.? is named twice"),
        (("windows-1-0.5",), "views must begin with whole"),
        (("whole", "windows-1-0.5", "flip"), "windows-1-0.5 is not the last"),
        (("whole", "windows-0.5-1"), r"view 'windows-0\.5-1' is out of range: sides go from 0\.1 to 1, steps"),
        (("whole", "windows-1"), "unknown view 'windows-1'"),
    ],
)
def test_views_that_cannot_be_are_refused_before_anything_is_done(
    config: ImageJobConfig, views: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        replace(config, views=views)


def test_windows_that_would_leave_gaps_are_refused(config: ImageJobConfig) -> None:
    config = replace(config, views=("whole", "windows-0.5-0.5"))
    with pytest.raises(UsageError, match=r"cropped to this input's shape they leave gaps. Give a square --input-size"):
        extract_images(config, ToyImageEncoder(aspect="crop"))
    assert not config.out.exists()
    assert extract_images(config, ToyImageEncoder(aspect="letterbox")).num_failed == 0
