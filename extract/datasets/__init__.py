"""Readers of datasets: whatever the layout on disk, a reader hands over one `Dataset` of sample records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from extract.datasets.grefcoco import read_grefcoco
from extract.datasets.records import Dataset
from extract.datasets.scenes import open_scenes

DATASETS: dict[str, Callable[[Path], Dataset]] = {"scenes": open_scenes, "grefcoco": read_grefcoco}
"""Every dataset that can be opened by name, as a function of its folder."""
