"""Open vocabulary end to end: each of the eight benchmarks in small, from files to scores, against a slow oracle."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from cache_schema.errors import UsageError
from cache_schema.samples import SamplesStore, open_samples
from evaluate.open_vocabulary.benchmarks import IGNORED, TITLES, Benchmark, list_images, make_benchmark, read_truth
from evaluate.open_vocabulary.classes import OpenClass, encode_classes
from evaluate.open_vocabulary.evaluation import (
    BenchmarkRun,
    image_paths,
    make_results,
    run_benchmark,
    write_results,
)
from evaluate.open_vocabulary.live_windows import LiveWindows
from evaluate.open_vocabulary.pamr import Pamr
from evaluate.open_vocabulary.scores import make_scorer
from evaluate.open_vocabulary.segmenter import SegmentationProtocol, Segmenter
from evaluate.open_vocabulary.templates import fill
from evaluate.open_vocabulary.windows import SlidingWindow
from extract.prepare import PrepareConfig, prepare
from heads.talk2dino import Talk2DinoHead
from tests.evaluate.open_vocabulary.layouts import LAYOUTS, NUM_CLASSES, MadeImage, make_benchmark_folder
from tests.evaluate.open_vocabulary.oracle import SlowTalk2Dino, slow_scores

if TYPE_CHECKING:
    from extract.encoders.protocols import ImageEncoder, TextEncoder

SHORT, WINDOW, STRIDE = 36, 32, 16


@dataclass(frozen=True)
class Small:
    """A benchmark in small: its samples store, and the images of val."""

    name: str
    store: SamplesStore
    images: Sequence[MadeImage]


def make_small(name: str, folder: Path, seed: int = 0) -> Small:
    splits = make_benchmark_folder(folder / "data", name, seed)
    store = prepare(PrepareConfig(name, folder / "data", folder / "stores"))
    assert not store.faults.faults
    return Small(name, open_samples(store.path), splits["val"])


@pytest.fixture(params=LAYOUTS, scope="module")
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Small:
    return make_small(request.param, tmp_path_factory.mktemp(request.param))


def protocol_for(name: str, *, pamr: bool = False) -> SegmentationProtocol:
    has_background = make_benchmark(name).has_background
    return SegmentationProtocol(
        templates="7" if name.startswith("voc") else "1",
        aliases=name in ("voc21", "cityscapes"),
        windows=SlidingWindow(short_side_px=SHORT, window_px=WINDOW, stride_px=STRIDE),
        background=0.53 if has_background else None,
        cleaning=0.2 if has_background else 0.0,
        pamr=Pamr(iterations=2, dilations=(1, 3)) if pamr else None,
    )


@dataclass(frozen=True)
class Setup:
    """A segmenter, and what looks at windows for it."""

    segmenter: Segmenter
    live: LiveWindows

    def label(self, images: Iterable[Path]) -> list[NDArray[np.int64]]:
        return [self.segmenter.label(seen) for seen in self.live.look_at(images)]

    def run(self, benchmark: Benchmark, small: Small) -> BenchmarkRun:
        images = list_images(small.store, benchmark, "val")
        seen = self.live.look_at(image_paths(small.store, images))
        return run_benchmark(self.segmenter, benchmark, small.store, images, seen)


def set_up(
    classes: Sequence[OpenClass],
    protocol: SegmentationProtocol,
    head: Talk2DinoHead,
    encoder: ImageEncoder,
    text_encoder: TextEncoder,
    batch_size: int = 4,
) -> Setup:
    prompts = encode_classes(classes, protocol.templates, text_encoder, "float32")
    scorer = make_scorer(head, prompts, cleaning=protocol.cleaning)
    return Setup(Segmenter(scorer, protocol), LiveWindows(encoder, protocol.windows, batch_size))


def test_a_benchmark_is_scored_as_a_slow_computation_from_its_files_scores_it(
    small: Small, head: Talk2DinoHead, encoder: ImageEncoder, text_encoder: TextEncoder
) -> None:
    protocol = protocol_for(small.name)
    benchmark = make_benchmark(small.name, aliases=protocol.aliases)
    oracle = SlowTalk2Dino(
        head,
        encoder,
        text_encoder,
        [[prompt for name in one.spellings for prompt in fill(protocol.templates, name)] for one in benchmark.classes],
        SHORT,
        WINDOW,
        STRIDE,
        protocol.cleaning,
    )
    expected = [oracle.scores(np.asarray(Image.open(image.path).convert("RGB"))) for image in small.images]
    if benchmark.has_background:  # at a level that about half of the pixels are above
        level = round(float(np.median(np.concatenate([scores.max(0).ravel() for scores in expected]))), 5)
        protocol = replace(protocol, background=level)
        expected = [np.concatenate([np.full_like(scores[:1], level), scores]) for scores in expected]
    setup = set_up(benchmark.classes, protocol, head, encoder, text_encoder)
    labels = setup.label(image.path for image in small.images)
    for scores, found in zip(expected, labels, strict=True):
        assert len(scores) == NUM_CLASSES[small.name]
        assert found.shape == scores.shape[1:]
        # Where two classes score alike to the sixth digit, float32 may name the other one.
        assert (scores.max(0) - np.take_along_axis(scores, found[None], 0)[0]).max() < 1e-6
        assert (scores.argmax(0) == found).mean() > 0.98
    counts = np.bincount(np.concatenate([found.ravel() for found in labels]))
    assert np.count_nonzero(counts) > 3  # or nothing of the above would tell classes apart
    assert counts[0] < 0.6 * counts.sum()
    run = setup.run(benchmark, small)
    truths = [image.truth for image in small.images]
    scores_of_all = slow_scores(labels, truths, NUM_CLASSES[small.name])
    metrics = run.matrix.metrics()
    assert {name: metrics[name] for name in scores_of_all} == pytest.approx(scores_of_all, rel=1e-12)
    assert run.num_images == len(small.images)
    assert metrics["num_pixels"] == sum(int((truth != -1).sum()) for truth in truths)


def test_a_head_that_learned_mask_logits_is_stretched_as_it_learned(
    tmp_path: Path, head: Talk2DinoHead, encoder: ImageEncoder, text_encoder: TextEncoder
) -> None:
    small, protocol = make_small("voc20", tmp_path), protocol_for("voc20")
    learned = Talk2DinoHead(
        image_width=96,
        pooled_width=96,
        layer="last",
        alignment="mean_patch",
        logit_scale=5.0,
        learned_logits=True,
    ).eval()
    learned.load_state_dict({**learned.state_dict(), **head.state_dict(), "log_gain": torch.tensor(0.3)})
    classes = make_benchmark("voc20").classes
    prompts = [one.prompts(protocol.templates) for one in classes]
    oracle = SlowTalk2Dino(learned, encoder, text_encoder, prompts, SHORT, WINDOW, STRIDE)
    setup = set_up(classes, protocol, learned, encoder, text_encoder)
    for found, image in zip(setup.label(image.path for image in small.images), small.images, strict=True):
        scores = oracle.scores(np.asarray(Image.open(image.path).convert("RGB")))
        assert (scores.max(0) - np.take_along_axis(scores, found[None], 0)[0]).max() < 1e-5
        assert (scores.argmax(0) == found).mean() > 0.98
    assert setup.segmenter.scorer.describe()["inside_window"] == "bilinear, align_corners=False"


def test_truth_is_read_pixel_by_pixel(small: Small) -> None:
    images = list_images(small.store, make_benchmark(small.name), "val")
    assert len(images) == len(small.images)
    for image, made in zip(images, small.images, strict=True):
        assert small.store.samples.images.paths[image.row].endswith(made.path.name)
        truth = read_truth(small.store.samples, image.samples)
        assert np.array_equal(truth, np.where(made.truth == -1, IGNORED, made.truth))


def test_every_benchmark_has_its_classes_and_its_background() -> None:
    assert set(TITLES) == set(NUM_CLASSES)
    for name, num_classes in NUM_CLASSES.items():
        benchmark = make_benchmark(name)
        assert len(benchmark.names) == num_classes
        assert benchmark.has_background == (name in ("voc21", "context60", "coco-object"))
        named = tuple(one.name for one in benchmark.classes)
        assert benchmark.names == (("background", *named) if benchmark.has_background else named)
        assert all(one.spellings == (one.name,) for one in benchmark.classes)
    monitor = make_benchmark("voc20", aliases=True).classes[-1]
    assert monitor.spellings[:2] == ("tvmonitor", "tv monitor")
    with pytest.raises(UsageError, match="did you mean 'voc21'"):
        make_benchmark("voc-21")


def test_masks_are_refined_once_for_each_image_after_its_windows_were_merged(
    tmp_path: Path, head: Talk2DinoHead, encoder: ImageEncoder, text_encoder: TextEncoder
) -> None:
    small = make_small("voc20", tmp_path)
    protocol = protocol_for("voc20", pamr=True)
    classes = make_benchmark("voc20").classes
    prompts = encode_classes(classes, "7", text_encoder, "float32")
    scorer = make_scorer(head, prompts)
    image = np.asarray(Image.open(small.images[0].path).convert("RGB"))
    windows = protocol.windows.plan((image.shape[0], image.shape[1]))
    resized = windows.resize(image)
    crops = np.concatenate(list(windows.crops(resized, 1)))
    seen = torch.from_numpy(np.stack([encoder.preprocess(crop) for crop in crops]))
    merged = windows.merge(
        (scorer.score(encoder.encode(seen[place : place + 1])) for place in range(len(seen))), align_corners=True
    )
    assert protocol.pamr is not None
    refined = protocol.pamr.affinity(torch.from_numpy(resized).permute(2, 0, 1) / 255).refine(merged)
    expected = windows.to_original(refined).argmax(0).numpy()
    (found,) = set_up(classes, protocol, head, encoder, text_encoder).label([small.images[0].path])
    assert (found != expected).mean() < 0.002
    (plain,) = set_up(classes, protocol_for("voc20"), head, encoder, text_encoder).label([small.images[0].path])
    assert (plain != expected).mean() > 0.02


def test_batches_and_the_order_of_images_do_not_change_label_maps(
    tmp_path: Path, head: Talk2DinoHead, encoder: ImageEncoder, text_encoder: TextEncoder
) -> None:
    small = make_small("ade20k", tmp_path)
    classes = make_benchmark("ade20k").classes
    paths = [image.path for image in small.images]
    one, many = (
        set_up(classes, protocol_for("ade20k"), head, encoder, text_encoder, batch_size) for batch_size in (1, 64)
    )
    alone = [one.label([path])[0] for path in paths]
    for found, expected in zip(many.label(reversed(paths)), reversed(alone), strict=True):
        assert (found != expected).mean() < 0.005  # the encoder's last bits differ from batch to batch


def test_results_name_every_choice_and_stand_beside_a_table(
    tmp_path: Path, head: Talk2DinoHead, encoder: ImageEncoder, text_encoder: TextEncoder
) -> None:
    small = make_small("voc21", tmp_path)
    benchmark = make_benchmark("voc21", aliases=True)
    setup = set_up(benchmark.classes, protocol_for("voc21", pamr=True), head, encoder, text_encoder)
    run, protocol = setup.run(benchmark, small), setup.segmenter.protocol
    described = {**protocol.to_dict(), **setup.segmenter.scorer.describe()}
    results = make_results(run, benchmark, "val", described, {"samples": small.store.fingerprint})
    write_results(tmp_path / "out", results)
    assert results["protocol"] == {
        "name": "sliding-windows",
        "version": 1,
        "templates": "7",
        "aliases": True,
        "short_side_px": SHORT,
        "long_side_px": 2048,
        "window_px": WINDOW,
        "stride_px": STRIDE,
        "resize": "pillow bilinear",
        "scores": "sigmoid of cosines",
        "prompts_of_class": "averaged before the projection",
        "inside_window": "bilinear, align_corners=True",
        "overlaps": "averaged",
        "background": 0.53,
        "cleaning": 0.2,
        "pamr": {"iterations": 2, "dilations": [1, 3], "applied": "per image"},
        "to_original": "bilinear",
        "equal_scores": "the first class",
        "dataset": "voc21",
        "split": "val",
        "ignored": "pixels of no class",
    }
    lines = (tmp_path / "out/classes.csv").read_text().splitlines()
    assert lines[0] == "name,iou,accuracy,truth_px,predicted_px"
    assert [line.partition(",")[0] for line in lines[1:]] == list(benchmark.names)
    unseen = results["classes"][3]
    assert (unseen["name"], unseen["accuracy"], unseen["truth_px"]) == ("bird", None, 0)


def test_a_store_of_another_dataset_is_refused(tmp_path: Path) -> None:
    store = make_small("voc20", tmp_path).store
    with pytest.raises(UsageError, match="holds voc20, not voc21; make its store with `headstart prepare voc21`"):
        list_images(store, make_benchmark("voc21"), "val")
    with pytest.raises(UsageError, match="unknown split 'test'"):
        list_images(store, make_benchmark("voc20"), "test")


def test_a_background_that_is_named_for_none_or_not_named_is_refused(
    tmp_path: Path, head: Talk2DinoHead, encoder: ImageEncoder, text_encoder: TextEncoder
) -> None:
    small = make_small("voc20", tmp_path)
    benchmark = make_benchmark("voc20")
    protocol = SegmentationProtocol(templates="1", background=0.5)
    with pytest.raises(UsageError, match="voc20 has no background"):
        set_up(benchmark.classes, protocol, head, encoder, text_encoder).run(benchmark, small)


def test_an_image_that_was_changed_since_is_refused(
    tmp_path: Path, head: Talk2DinoHead, encoder: ImageEncoder, text_encoder: TextEncoder
) -> None:
    small = make_small("voc20", tmp_path)
    Image.new("RGB", (50, 50)).save(small.images[0].path)
    benchmark = make_benchmark("voc20")
    setup = set_up(benchmark.classes, protocol_for("voc20"), head, encoder, text_encoder)
    with pytest.raises(UsageError, match=r"has 50 x 50 pixels .* its label map 40 x 57: .* prepare the dataset again"):
        setup.run(benchmark, small)
