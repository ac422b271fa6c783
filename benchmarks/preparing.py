"""One run of the prepare stage in a process of its own, so that its memory is its alone.

python -m benchmarks.preparing '{"dataset": "refcoco", "root": ..., "image_dir": ..., "out": ...}'
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.memory import PeakMemory
from benchmarks.new_process import ask_apart
from cache_schema.reader import num_cores
from extract.images import image_size, read_bytes
from extract.prepare import PrepareConfig, prepare


@dataclass(frozen=True)
class Request:
    """Which dataset is prepared, from where to where."""

    dataset: str
    root: str
    image_dir: str
    out: str


@dataclass(frozen=True)
class Prepared:
    """What came of it: memory at most above what was in use at the start, and the size of the store.

    `images_s` is what it takes to read all its images, hash them and look at their headers, and to do nothing else.
    """

    num_samples: int
    num_images: int
    seconds: float
    images_s: float
    memory_bytes: int
    store_bytes: int

    @property
    def rate(self) -> float:
        """Samples per second."""
        return self.num_samples / self.seconds


def prepare_here(request: Request) -> Prepared:
    """Prepare in this process."""
    image_dir = Path(request.image_dir)
    config = PrepareConfig(request.dataset, Path(request.root), Path(request.out), image_dir)
    with PeakMemory() as memory:
        started = time.perf_counter()
        prepared = prepare(config)
        seconds = time.perf_counter() - started
    counts = prepared.counts
    used = sorted(image_dir.iterdir())[: counts.num_images]
    started = time.perf_counter()
    with ThreadPoolExecutor(num_cores()) as pool:
        list(pool.map(_look_at, used))
    images_s = time.perf_counter() - started
    store_bytes = sum(file.stat().st_size for file in Path(str(prepared.path)).rglob("*") if file.is_file())
    return Prepared(counts.num_samples, counts.num_images, seconds, images_s, memory.num_bytes, store_bytes)


def prepare_apart(request: Request) -> Prepared:
    """Prepare in a new process.

    Raises:
        RuntimeError: it failed; the message ends with what it said.
    """
    return Prepared(**ask_apart("benchmarks.preparing", asdict(request), f"preparing {request.dataset}"))


def _look_at(path: Path) -> None:
    data, _ = read_bytes(path)
    image_size(data)


if __name__ == "__main__":
    print(json.dumps(asdict(prepare_here(Request(**json.loads(sys.argv[1]))))))
