"""Contenders in processes of their own, so that memory and threads are theirs alone.

python -m benchmarks.apart '{"contender": "bare", "checkpoint": ..., "samples": ...}'
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict

from benchmarks import extractors, prompts, scaling
from benchmarks.measuring import Measured, Ready, Request
from benchmarks.memory import PeakMemory
from benchmarks.new_process import ask_apart

CONTENDERS: dict[str, Callable[[Request], Ready]] = {
    "bare": extractors.make_bare,
    "bare, a thread a core": extractors.make_bare_threads,
    "ours": extractors.make_ours,
    "pipeline": extractors.make_pipeline,
    "serial": extractors.make_serial,
    "stand-in": extractors.make_stand_in,
    "bare prompts": prompts.make_bare,
    "padded prompts": prompts.make_padded,
    "our prompts": prompts.make_ours,
    "task": scaling.make_task,
}
"""By the name in a request: each loads what it needs and is ready then."""


def measure_here(request: Request) -> Measured:
    """Measure in this process."""
    ready = CONTENDERS[request.contender](request)
    with closing(ready), PeakMemory() as memory:
        ready.warm_up()
        started = time.perf_counter()
        facts = ready.run()
        seconds = time.perf_counter() - started
    return Measured(ready.num_items, seconds, memory.num_bytes, facts)


def measure_apart(request: Request) -> Measured:
    """Measure in a new process.

    Raises:
        RuntimeError: it failed; the message ends with what it said.
    """
    return Measured(**ask_apart("benchmarks.apart", asdict(request), request.contender))


if __name__ == "__main__":
    print(json.dumps(asdict(measure_here(Request(**json.loads(sys.argv[1]))))))
