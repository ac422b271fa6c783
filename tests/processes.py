"""Several processes that run one command together, started as torchrun and `accelerate launch` start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence


def run_in_processes(num: int, arguments: Sequence[str], timeout_s: float = 300) -> list[str]:
    """What each of so many processes on CPUs printed to stdout; one that fails fails the test with what it said.

    Args:
        arguments: of the interpreter.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": str(num), "LOCAL_WORLD_SIZE": str(num), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={
                **os.environ,
                **world,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "ACCELERATE_USE_CPU": "1",
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num)
    ]
    told = [process.communicate(timeout=timeout_s) for process in started]
    for process, (_, stderr) in zip(started, told, strict=True):
        assert process.returncode == 0, stderr
    return [stdout for stdout, _ in told]
