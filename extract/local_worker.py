"""What a worker of this machine does first; dask calls it by name. Nothing heavy is imported: workers start soon."""

from __future__ import annotations

import signal


def dask_setup(worker: object) -> None:
    """Ignore Ctrl-C, which in a terminal reaches workers too: whoever started them closes them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
