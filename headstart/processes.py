"""Several processes that torchrun or `accelerate launch` started for one command."""

from __future__ import annotations

import os

_SET_BY_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")


def is_first_process() -> bool:
    """Whether this is the only process of a command, or the first of several: the one that speaks, and writes what is
    written once.
    """
    launched = all(name in os.environ for name in _SET_BY_LAUNCHERS)
    return not launched or os.environ["RANK"] == "0"
