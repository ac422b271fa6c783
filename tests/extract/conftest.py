"""What the tests of jobs share: a task of noise images, and a job on it in shards of four."""

from __future__ import annotations

from pathlib import Path

import pytest

from extract.image_job import ImageJobConfig
from tests.extract.toys import SHARD_ROWS, write_task


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return write_task(tmp_path)


@pytest.fixture
def config(task: Path, tmp_path: Path) -> ImageJobConfig:
    return ImageJobConfig(task, tmp_path / "stores", batch_size=3, shard_rows=SHARD_ROWS)
