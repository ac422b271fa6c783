"""Windows that are encoded live: in full batches, a few images ahead, each image as if it were alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cache_schema.errors import UsageError
from cache_schema.reader import num_cores
from evaluate.open_vocabulary import segmenter
from evaluate.open_vocabulary.classes import OpenClass, encode_classes
from evaluate.open_vocabulary.live_windows import LiveWindows
from evaluate.open_vocabulary.scores import make_scorer
from evaluate.open_vocabulary.segmenter import SegmentationProtocol, Segmenter
from evaluate.open_vocabulary.windows import SlidingWindow
from tests.extract.toys import ToyImageEncoder, noise_png

if TYPE_CHECKING:
    from extract.encoders.protocols import ImageEncoder, TextEncoder
    from heads.talk2dino import Talk2DinoHead

PLAN = SlidingWindow(short_side_px=16, window_px=16, stride_px=8)


def noise(*sizes: tuple[int, int]) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def test_windows_of_several_images_share_batches_and_each_image_gets_its_own() -> None:
    images, encoder = noise((16, 16), (16, 40), (20, 20), (50, 16), (16, 24)), ToyImageEncoder()
    seen = list(LiveWindows(encoder, PLAN, 4).look_at(images))
    assert [len(one.windows) for one in seen] == [1, 4, 1, 6, 2]
    assert encoder.encoded == [4, 1, 4, 3, 2]  # images one after the other, until there is enough for a batch
    for image, together in zip(images, seen, strict=True):
        (alone,) = LiveWindows(ToyImageEncoder(), PLAN, 1).look_at([image])
        assert torch.equal(together.encoding.features["fine"], alone.encoding.features["fine"])
        assert torch.equal(together.encoding.cls["coarse"], alone.encoding.cls["coarse"])
        assert together.windows == alone.windows == PLAN.plan((image.shape[0], image.shape[1]))
        assert together.resized is not None
        assert np.array_equal(together.resized, together.windows.resize(image))


def test_only_a_few_images_are_read_ahead() -> None:
    (image,), opened = noise((16, 16)), 0

    def endless() -> Iterator[NDArray[np.uint8]]:
        nonlocal opened
        while True:
            opened += 1
            yield image

    windows = LiveWindows(ToyImageEncoder(), PLAN, 2).look_at(endless())
    for _ in range(6):
        next(windows)
    assert opened <= 6 + 2 * num_cores() + 1
    windows.close()


def test_a_file_is_read_and_a_missing_or_broken_one_is_named(tmp_path: Path) -> None:
    path, broken = tmp_path / "image.png", tmp_path / "broken.png"
    path.write_bytes(noise_png(3, 20, 30))
    broken.write_bytes(noise_png(3, 20, 30)[:100])
    live = LiveWindows(ToyImageEncoder(), PLAN)
    (seen,) = live.look_at([path])
    assert seen.windows.original_size == (20, 30)
    with pytest.raises(UsageError, match=r"broken\.png cannot be used"):
        list(live.look_at([path, broken]))
    with pytest.raises(UsageError, match=r"missing\.png cannot be used"):
        list(live.look_at([tmp_path / "missing.png"]))


@pytest.mark.parametrize("aspect", ["crop", "letterbox"])
def test_an_encoder_that_does_not_see_a_square_whole_is_refused(aspect: str) -> None:
    with pytest.raises(UsageError, match="does not see a square window whole"):
        LiveWindows(ToyImageEncoder(aspect=aspect), PLAN)
    LiveWindows(ToyImageEncoder(aspect=aspect, shape=(8, 8)), PLAN)


def test_an_image_of_many_windows_is_scored_in_parts_that_change_nothing(
    head: Talk2DinoHead, encoder: ImageEncoder, text_encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (image,) = noise((16, 120))
    prompts = encode_classes([OpenClass(name, (name,)) for name in ("cat", "dog", "sky")], "7", text_encoder, "float32")
    made = Segmenter(make_scorer(head, prompts, cleaning=0.2), SegmentationProtocol(windows=PLAN, cleaning=0.2))
    (seen,) = LiveWindows(encoder, PLAN).look_at([image])
    assert len(seen.windows) == 14
    labels = {}
    for at_once in (1, 5, 100):
        monkeypatch.setattr(segmenter, "_WINDOWS_AT_ONCE", at_once)
        labels[at_once] = made.label(seen)
    assert labels[1].shape == (16, 120)
    assert (labels[1] != labels[100]).mean() < 0.002
    assert (labels[5] != labels[100]).mean() < 0.002
    assert len(np.unique(labels[1])) > 1


def test_background_is_number_0_where_no_class_reaches_its_level(
    head: Talk2DinoHead, encoder: ImageEncoder, text_encoder: TextEncoder
) -> None:
    (image,) = noise((16, 40))
    prompts = encode_classes([OpenClass(name, (name,)) for name in ("cat", "dog")], "1", text_encoder, "float32")
    scorer = make_scorer(head, prompts)
    (seen,) = LiveWindows(encoder, PLAN).look_at([image])
    plain = Segmenter(scorer, SegmentationProtocol(windows=PLAN)).label(seen)
    nowhere, everywhere = (
        Segmenter(scorer, SegmentationProtocol(windows=PLAN, background=level)).label(seen) for level in (0.001, 0.999)
    )
    assert np.array_equal(nowhere, plain + 1)
    assert (everywhere == 0).all()
