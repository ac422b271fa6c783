"""The COCO datasets that are read by name."""

from __future__ import annotations

from functools import partial

from extract.datasets.coco_captions import read_coco_captions
from extract.datasets.coco_instances import read_coco_instances
from extract.datasets.records import DatasetReader

_LAYOUT = "annotations/{kind}_{{train,val}}{year}.json, and train{year}/ and val{year}/ beside it or in images/"

_NUM_CAPTIONS = {2014: {"train": 414113, "val": 202654}, 2017: {"train": 591753, "val": 25014}}
_NUM_IMAGES_WITH_INSTANCES = {2014: {"train": 82081, "val": 40137}, 2017: {"train": 117266, "val": 4952}}
"""Of 82,783 and 40,504, and of 118,287 and 5,000 images: the others have no annotation, and so no sample."""

COCO_READERS: dict[str, DatasetReader] = {
    **{
        f"coco-captions-{year}": DatasetReader(
            partial(read_coco_captions, year=year),
            _LAYOUT.format(kind="captions", year=year),
            published,
            counted="samples",
        )
        for year, published in _NUM_CAPTIONS.items()
    },
    **{
        f"coco-instances-{year}": DatasetReader(
            partial(read_coco_instances, year=year),
            _LAYOUT.format(kind="instances", year=year),
            published,
            counted="images",
        )
        for year, published in _NUM_IMAGES_WITH_INSTANCES.items()
    },
}
