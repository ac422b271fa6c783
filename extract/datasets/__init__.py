"""Readers of datasets: whatever the layout on disk, a reader hands over one `Dataset` of sample records."""

from __future__ import annotations

from extract.datasets.coco_readers import COCO_READERS
from extract.datasets.custom import CUSTOM_READERS
from extract.datasets.grefcoco import read_grefcoco
from extract.datasets.phrasecut import PHRASECUT_READERS
from extract.datasets.records import DatasetReader
from extract.datasets.refcoco_m import REFCOCO_M_READERS
from extract.datasets.refer import REFER_READERS
from extract.datasets.scenes import open_scenes
from extract.datasets.semantic import SEMANTIC_READERS

DATASETS: dict[str, DatasetReader] = {
    "scenes": DatasetReader(
        open_scenes, "what `headstart prepare scenes --make N` wrote", counted="samples", as_shown=True
    ),
    **CUSTOM_READERS,
    **REFER_READERS,
    "grefcoco": DatasetReader(read_grefcoco, "grefs(unc).json, instances.json, and COCO's train2014 images"),
    **REFCOCO_M_READERS,
    **PHRASECUT_READERS,
    **COCO_READERS,
    **SEMANTIC_READERS,
}
"""Every dataset that can be opened by name."""
