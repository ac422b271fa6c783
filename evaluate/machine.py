"""The machine that figures were measured on. Light to import: what it says must not change what is measured."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name() -> str:
    """The processor's name as its maker gives it; where the system does not tell, what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
