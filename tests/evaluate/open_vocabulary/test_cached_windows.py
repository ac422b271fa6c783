"""Windows out of a cache: what was encoded once gives the label maps of the same crops encoded now."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from cache_schema.errors import StoreMismatchError, UsageError
from cache_schema.features import ImageFeatures
from cache_schema.samples import SamplesStore, open_samples
from cache_schema.store import open_store
from evaluate.open_vocabulary.benchmarks import list_images, make_benchmark
from evaluate.open_vocabulary.cached_windows import CachedWindows
from evaluate.open_vocabulary.classes import encode_classes
from evaluate.open_vocabulary.pamr import Pamr
from evaluate.open_vocabulary.scores import make_scorer
from evaluate.open_vocabulary.segmenter import SegmentationProtocol, Segmenter
from evaluate.open_vocabulary.windows import SlidingWindow
from extract.image_job import ImageJobConfig, extract_images
from extract.prepare import PrepareConfig, prepare
from tests.evaluate.open_vocabulary.layouts import make_benchmark_folder
from tests.evaluate.open_vocabulary.oracle import SlowTalk2Dino

if TYPE_CHECKING:
    from extract.encoders.protocols import ImageEncoder, TextEncoder
    from heads.talk2dino import Talk2DinoHead

PLAN = SlidingWindow(short_side_px=32, window_px=32, stride_px=16)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SamplesStore:
    folder = tmp_path_factory.mktemp("voc20")
    make_benchmark_folder(folder / "data", "voc20")
    return open_samples(prepare(PrepareConfig("voc20", folder / "data", folder / "stores")).path)


def extract(
    store: SamplesStore, out: Path, encoder: ImageEncoder, *views: str, dtype: str = "float32"
) -> ImageFeatures:
    config = ImageJobConfig(store.path, out, dtype=dtype, batch_size=1, shard_rows=8, views=views)
    return ImageFeatures(open_store(extract_images(config, encoder).path))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("cleaning", [0.0, 0.2])
def test_label_maps_are_those_of_the_same_crops_encoded_now(
    dtype: str,
    cleaning: float,
    store: SamplesStore,
    head: Talk2DinoHead,
    encoder: ImageEncoder,
    text_encoder: TextEncoder,
    tmp_path: Path,
) -> None:
    features = extract(store, tmp_path, encoder, "whole", "flip", "windows-1-0.5", dtype=dtype)
    benchmark = make_benchmark("voc20")
    windows = CachedWindows(features, PLAN, ("last",), ("logits",) if cleaning else ())
    prompts = encode_classes(benchmark.classes, "1", text_encoder, "float32")
    segmenter = Segmenter(
        make_scorer(head, prompts, cleaning=cleaning), SegmentationProtocol(templates="1", windows=PLAN)
    )
    oracle = SlowTalk2Dino(
        head, encoder, text_encoder, [one.prompts("1") for one in benchmark.classes], 32, 32, 16, cleaning
    )
    images = list_images(store, benchmark, "val")
    seen = windows.look_at(store.samples.images, (image.row for image in images))
    tolerance, num_windows = {"float32": 1e-6, "float16": 1e-4, "int8": 1e-2}[dtype], []
    for image, looked_at in zip(images, seen, strict=True):
        assert store.image_dir is not None
        pixels = np.asarray(Image.open(store.image_dir / store.samples.images.paths[image.row]).convert("RGB"))
        height, width = pixels.shape[:2]
        short = min(height, width)
        crops = {}
        for top in [*range(0, height - short, round(short / 2)), height - short]:
            for left in [*range(0, width - short, round(short / 2)), width - short]:
                edges = (top, left, top + short, left + short)
                lengths = zip((height, width) * 2, looked_at.windows.size * 2, strict=True)
                top_, left_, bottom_, right_ = (
                    round(edge * size / length) for edge, (length, size) in zip(edges, lengths, strict=True)
                )
                crops[top_, left_, bottom_, right_] = pixels[top : top + short, left : left + short]
        expected = oracle.merge(crops, looked_at.windows.size, (height, width))
        labels = segmenter.label(looked_at)
        assert (expected.max(0) - np.take_along_axis(expected, labels[None], 0)[0]).max() < tolerance
        assert len(looked_at.windows) == len(crops)
        num_windows.append(len(crops))
        assert len(np.unique(labels)) > 2
    assert max(num_windows) > 2 > min(num_windows)


def test_int8_features_come_back_at_their_own_scale(store: SamplesStore, encoder: ImageEncoder, tmp_path: Path) -> None:
    exact, rounded = (
        CachedWindows(extract(store, tmp_path / dtype, encoder, "whole", "windows-1-0.5", dtype=dtype), PLAN, ("last",))
        for dtype in ("float32", "int8")
    )
    rows = range(len(store.samples.images))
    for one, other in zip(
        exact.look_at(store.samples.images, rows), rounded.look_at(store.samples.images, rows), strict=True
    ):
        values, found = (seen.encoding.features["last"] for seen in (one, other))
        assert ((found - values).abs() <= values.abs().amax(-1, keepdim=True) / 127).all()
        assert (one.encoding.cls["last"] - other.encoding.cls["last"]).abs().max() < 0.01


def test_the_image_files_are_read_where_masks_are_refined_and_nowhere_else(
    store: SamplesStore, head: Talk2DinoHead, encoder: ImageEncoder, text_encoder: TextEncoder, tmp_path: Path
) -> None:
    features, benchmark = extract(store, tmp_path, encoder, "whole", "windows-1-0.5"), make_benchmark("voc20")
    without = CachedWindows(features, PLAN, ("last",))
    with_images = CachedWindows(features, PLAN, ("last",), image_dir=store.image_dir, with_images=True)
    (row,) = {image.row for image in list_images(store, benchmark, "val")[:1]}
    (blind,), (seeing,) = (source.look_at(store.samples.images, [row]) for source in (without, with_images))
    assert blind.resized is None
    assert seeing.resized is not None
    assert seeing.resized.shape[:2] == seeing.windows.size
    scorer = make_scorer(head, encode_classes(benchmark.classes, "1", text_encoder, "float32"))
    plain, refined = (
        Segmenter(scorer, SegmentationProtocol(windows=PLAN, pamr=pamr)).label(seeing)
        for pamr in (None, Pamr(iterations=2, dilations=(1, 2)))
    )
    assert (plain != refined).any()


def test_windows_of_a_thin_image_lie_inside_it_and_cover_it(
    store: SamplesStore, encoder: ImageEncoder, tmp_path: Path
) -> None:
    plan = SlidingWindow(short_side_px=32, long_side_px=40, window_px=32, stride_px=16)
    windows = CachedWindows(extract(store, tmp_path, encoder, "whole", "windows-1-0.5"), plan, ("last",))
    for seen in windows.look_at(store.samples.images, range(len(store.samples.images))):
        assert max(seen.windows.size) <= 40
        covered = np.zeros(seen.windows.size, int)
        for left, top, right, bottom in seen.windows.boxes:
            assert 0 <= left < right <= seen.windows.size[1]
            assert 0 <= top < bottom <= seen.windows.size[0]
            covered[top:bottom, left:right] += 1
        assert covered.min() == 1


def test_a_store_without_the_windows_or_outputs_that_are_wanted_is_refused(
    store: SamplesStore, encoder: ImageEncoder, image_encoder: ImageEncoder, tmp_path: Path
) -> None:
    whole = extract(store, tmp_path, encoder, "whole")
    with pytest.raises(
        UsageError, match=r"holds no windows, and windows-1-0.5 is asked for; extract with --views whole"
    ):
        CachedWindows(whole, PLAN, ("last",))
    windows = extract(store, tmp_path, image_encoder, "whole", "windows-1-0.5")
    with pytest.raises(UsageError, match=r"holds windows-1-0.5, and windows-0.5-0.25 is asked for"):
        CachedWindows(windows, SlidingWindow(64, 2048, 32, 16), ("last",))
    with pytest.raises(UsageError, match="lacks attention output logits"):
        CachedWindows(windows, PLAN, ("last",), ("logits",))
    with pytest.raises(UsageError, match="lacks layer 7"):
        CachedWindows(windows, PLAN, ("7",))


def test_features_of_other_images_are_refused(store: SamplesStore, encoder: ImageEncoder, tmp_path: Path) -> None:
    make_benchmark_folder(tmp_path / "data", "voc20", seed=1)
    other = open_samples(prepare(PrepareConfig("voc20", tmp_path / "data", tmp_path / "stores")).path)
    windows = CachedWindows(extract(other, tmp_path, encoder, "whole", "windows-1-0.5"), PLAN, ("last",))
    with pytest.raises(StoreMismatchError, match="holds no features of image val_000101 as it is now"):
        list(windows.look_at(store.samples.images, [store.samples.images.ids.index("val_000101")]))
