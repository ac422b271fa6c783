"""Label maps drawn from COCO's instances, for images whose label maps nobody has written down."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from cache_schema.masks import decode_mask, union_of_segmentations
from extract.datasets.coco import CocoAnnotation, CocoFile, CocoImage
from extract.datasets.faults import FaultReport, FileFaults


def draw_instances(
    path: Path, image_dir: Path, classes: Sequence[str], faults: FaultReport
) -> Iterator[tuple[CocoImage, NDArray[np.uint8]]]:
    """The images of an `instances.json`, in the order of their paths, each with its (H, W) label map.

    A pixel holds the place in `classes` of the category that covers it, and where none does 0, the background. Crowds
    are drawn first and the other instances over them in the order of the file, so that where instances overlap the
    later one is seen. An image of which an instance cannot be read or drawn is not handed out; the instance is a fault.

    Raises:
        AnnotationError: the file is not in COCO's layout.
    """
    coco, of_file = CocoFile(path, image_dir, faults), faults.of(path)
    spoiled = coco.spoiled
    class_of = {category: classes.index(name) for category, name in coco.categories.items() if name in classes[1:]}
    of_image: dict[int, list[CocoAnnotation]] = defaultdict(list)
    for annotation in coco.annotations.values():
        of_image[annotation.image_id].append(annotation)
    for image_id in of_image.keys() - coco.images.keys():
        for annotation in of_image[image_id]:
            of_file.add(f"annotation {annotation.id}", f"image_id {image_id} is not among the images")
    for image in sorted(coco.images.values(), key=lambda image: image.path):
        if image.id in spoiled:
            continue
        labels = np.zeros(image.size, np.uint8)
        in_order = sorted(of_image[image.id], key=lambda annotation: not annotation.iscrowd)
        drawn = [_draw(labels, annotation, coco, class_of, of_file) for annotation in in_order]
        if all(drawn):
            yield image, labels


def _draw(
    labels: NDArray[np.uint8],
    annotation: CocoAnnotation,
    coco: CocoFile,
    class_of: dict[int, int],
    faults: FileFaults,
) -> bool:
    """Draw one instance into (H, W) labels; False, and a fault, if that cannot be done."""
    where, size = f"annotation {annotation.id}", coco.images[annotation.image_id].size
    if annotation.category_id not in class_of:
        name = coco.categories[annotation.category_id]
        faults.add(where, f"its category {name!r} is none of the classes")
        return False
    try:
        counts = union_of_segmentations([msgspec.json.decode(annotation.segmentation)], size)
    except (ValueError, RecursionError) as fault:
        faults.add(where, f"its segmentation is bad: {fault}")
        return False
    labels[decode_mask(counts, size)] = class_of[annotation.category_id]
    return True
