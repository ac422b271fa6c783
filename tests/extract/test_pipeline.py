"""The pipeline keeps its stages at work at the same time, in bounded memory, and gives way where memory runs out."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from cache_schema.errors import NoRoomError, UsageError
from cache_schema.shards import ShardBuffer
from cache_schema.store import open_store
from extract.batches import BatchSize
from extract.encoders.protocols import ImageEncoding, TextEncoding
from extract.image_job import ImageJob, ImageJobConfig, extract_images
from extract.job import units_of
from extract.prompt_job import PromptJobConfig, extract_prompts
from extract.stages import STAGES, StageClock
from tests.extract.toys import NUM_IMAGES, ToyImageEncoder, ToyTextEncoder, digest_of, prompts_of, write_task


@dataclass
class CrampedEncoder(ToyImageEncoder):
    """Has memory for so many images at a time."""

    room: int = 1

    def encode(self, pixels: Tensor) -> ImageEncoding:
        if len(pixels) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return super().encode(pixels)


@pytest.mark.parametrize(("room", "batches"), [(4, [4, 4, 2]), (3, [2, 2, 2, 2, 2]), (1, [1] * NUM_IMAGES)])
def test_batches_are_halved_until_they_fit_and_nothing_is_lost(
    config: ImageJobConfig, room: int, batches: list[int]
) -> None:
    config = replace(config, batch_size=4)
    encoder = CrampedEncoder(room=room)
    cramped = extract_images(config, encoder)
    assert encoder.encoded == batches
    spacious = extract_images(replace(config, out=config.out / "other"), ToyImageEncoder())
    assert digest_of(cramped) == digest_of(spacious)
    receipts = open_store(cramped.path).receipts()
    assert {receipt.rates["batch_size"] for receipt in receipts if receipt.unit != "static"} == {max(batches)} | {
        batches[-1]
    }


def test_an_encoder_without_memory_for_one_image_is_the_users_to_mend(config: ImageJobConfig) -> None:
    complaint = r"not enough memory on the device for a single item; take .* \(CUDA out of memory"
    with pytest.raises(UsageError, match=complaint):
        extract_images(config, CrampedEncoder(room=0))


def test_batches_of_prompts_are_halved_too(tmp_path: Path) -> None:
    @dataclass
    class Cramped(ToyTextEncoder):
        def encode(self, token_ids: list[list[int]]) -> TextEncoding:
            if len(token_ids) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().encode(token_ids)

    samples = write_task(tmp_path, prompts=prompts_of([3, 1, 4, 1, 5, 9, 2, 6, 5]))
    cramped = extract_prompts(PromptJobConfig(samples, tmp_path / "cramped", batch_size=8), Cramped())
    spacious = extract_prompts(PromptJobConfig(samples, tmp_path / "spacious", batch_size=8), ToyTextEncoder())
    assert digest_of(cramped) == digest_of(spacious)


@given(num_items=st.integers(0, 40), size=st.integers(1, 16), room=st.integers(1, 16))
def test_every_item_goes_through_once_and_in_order(num_items: int, size: int, room: int) -> None:
    def encode(batch: slice) -> list[int]:
        if batch.stop - batch.start > room:
            raise torch.OutOfMemoryError("out of memory")
        return list(range(batch.start, batch.stop))

    seen = [item for _, items in BatchSize(size).run(encode, num_items) for item in items]
    assert seen == list(range(num_items))


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def encode(batch: slice) -> None:
        raise RuntimeError("the accelerator is on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        list(BatchSize(4).run(encode, 8))


def rows_of(values: NDArray[Any] | ShardBuffer) -> NDArray[Any]:
    return values.rows if isinstance(values, ShardBuffer) else values


@dataclass
class WatchedEncoder(ToyImageEncoder):
    """Knows how many images were preprocessed before each forward pass, and whether two of these ever overlap."""

    preprocessed: int = 0
    ahead: list[int] = field(default_factory=list)
    busy: int = 0
    most_busy: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def preprocess(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        with self.lock:
            self.preprocessed += 1
        return super().preprocess(image)

    def encode(self, pixels: Tensor) -> ImageEncoding:
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        time.sleep(0.005)
        self.ahead.append(self.preprocessed - sum(self.encoded))
        encoding = super().encode(pixels)
        self.busy -= 1
        return encoding


def test_images_are_decoded_ahead_of_the_encoder_but_not_far(tmp_path: Path) -> None:
    num, batch_size, threads = 200, 5, 3
    samples = write_task(tmp_path, sizes=[(9, 11)] * num)
    encoder = WatchedEncoder()
    config = ImageJobConfig(samples, tmp_path / "stores", batch_size=batch_size, shard_rows=50, decode_threads=threads)
    extract_images(config, encoder)
    most = 3 * batch_size + threads  # two batches ahead, and the one that is just encoded
    assert batch_size < max(encoder.ahead) <= most
    assert sum(encoder.encoded) == num


def test_units_may_be_encoded_in_several_threads_that_share_the_encoder(tmp_path: Path) -> None:
    samples = write_task(tmp_path, sizes=[(9, 11)] * 40)
    encoder = WatchedEncoder()
    job = ImageJob(ImageJobConfig(samples, tmp_path / "stores", batch_size=4, shard_rows=10), encoder)
    alone = {unit.name: next(iter(job.encode([unit]))).shards for unit in units_of(job)}
    together = {}

    def work(number: int) -> None:
        unit = units_of(job)[number]
        together[unit.name] = next(iter(job.encode([unit]))).shards

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert encoder.most_busy == 1
    for name, shards in alone.items():
        for key, values in shards.items():
            np.testing.assert_array_equal(rows_of(together[name][key]), rows_of(values))


def test_a_stream_that_is_closed_early_leaves_no_thread_behind(config: ImageJobConfig) -> None:
    job = ImageJob(config, ToyImageEncoder())
    before = threading.active_count()
    stream = job.encode(units_of(job))
    next(stream)
    assert threading.active_count() > before
    stream.close()
    assert threading.active_count() == before


def test_a_stage_rate_is_what_its_workers_would_do_together() -> None:
    clock = StageClock({"decode": 4})
    clock.add("decode", 8.0, 40)
    clock.add("forward", 5.0, 60)
    rates = clock.rates()
    assert rates.rates == {"decode": 20.0, "forward": 12.0}
    assert rates.binds == "forward"
    assert str(rates) == "decode 20/s, forward 12/s (binds)"


def test_decoding_and_preprocessing_share_their_threads() -> None:
    clock = StageClock({"decode": 2, "preprocess": 2})
    for stage, seconds in (("decode", 5.0), ("preprocess", 4.0), ("forward", 3.0)):
        clock.add(stage, seconds, 1000)
    assert clock.rates().rates == {"decode": 400.0, "preprocess": 500.0, "forward": 1000 / 3}
    assert clock.rates().binds == "decode"  # both do 222 a second together
    clock.add("forward", 3.0)
    assert clock.rates().binds == "forward"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 65520.0])
def test_one_value_that_is_none_makes_its_row_invalid(config: ImageJobConfig, value: float) -> None:
    @dataclass
    class Stained(ToyImageEncoder):
        def encode(self, pixels: Tensor) -> ImageEncoding:
            encoding = super().encode(pixels)
            encoding.features["fine"][0, 3, 5, 2] = value
            return encoding

    store = open_store(extract_images(replace(config, batch_size=2), Stained()).path)
    assert store.read("valid").tolist() == [False, True] * (NUM_IMAGES // 2)
    assert {failure.reason for failure in store.failures()} == {"its features are not finite in float16"}


def test_the_copying_thread_leaves_torchs_threads_as_they_were(config: ImageJobConfig) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        extract_images(config, ToyImageEncoder())
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)


def test_the_batch_size_is_that_of_the_device_unless_it_is_given(config: ImageJobConfig) -> None:
    encoder = ToyImageEncoder()
    extract_images(replace(config, batch_size=None, shard_rows=NUM_IMAGES), encoder)
    assert encoder.encoded == [8, 2]


def test_a_lap_tells_of_the_time_since_the_last_and_of_all_where_a_stage_rested() -> None:
    clock = StageClock()
    clock.add("decode", 1.0, 10)
    clock.add("forward", 1.0, 50)
    assert clock.lap().rates == {"decode": 10.0, "forward": 50.0}
    clock.add("forward", 1.0, 5)
    lap = clock.lap()
    assert lap.rates == {"decode": 10.0, "forward": 5.0}
    assert lap.binds == "forward"
    assert clock.rates().rates == {"decode": 10.0, "forward": 27.5}


def test_the_stages_are_named_in_the_order_of_the_work(config: ImageJobConfig) -> None:
    assert tuple(extract_images(config, ToyImageEncoder()).stages.rates) == STAGES


def test_a_store_that_does_not_fit_on_the_disk_is_refused_before_anything_is_written(
    config: ImageJobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        f_bavail, f_frsize = 0, 4096

    monkeypatch.setattr("extract.job.os.statvfs", lambda folder: Full)
    with pytest.raises(NoRoomError, match=r"image_features-.* needs .* kB and .* has 0 B; make room, .*--overcommit"):
        extract_images(config, ToyImageEncoder())
    assert not config.out.exists()
    assert extract_images(config, ToyImageEncoder(), overcommit=True).num_encoded == NUM_IMAGES
    assert extract_images(config, ToyImageEncoder()).num_encoded == 0  # it is there: it needs no room
