"""A benchmark's module in a new process, asked and answering in JSON: memory and threads are its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def ask_apart(module: str, request: Mapping[str, Any], what: str) -> dict[str, Any]:
    """What a module prints last, given a request as its only argument.

    Args:
        what: is done there, for the message.

    Raises:
        RuntimeError: it failed; the message ends with what it said.
    """
    command = [sys.executable, "-m", module, json.dumps(request)]
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)  # noqa: S603  our own
    if done.returncode:
        raise RuntimeError(f"{what} failed:\n{done.stderr[-4000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
