"""Label maps, one class for each pixel: read from PNG files as the numbers they hold, and taken apart into masks.

Knows no dataset: which number stands for which class is told by the caller.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cache_schema.masks import union_of_segmentations
from extract.image_flaws import flaw_of_file, flaw_of_pixels, load_pixels
from extract.images import MAX_IMAGE_PIXELS, UndecodableImageError, image_size, read_bytes

IGNORED = -1
"""Stands in the place of a class id for pixels that nobody labelled, or whose label does not count."""

NUM_NAMED = 256
"""How many unknown values a message names: all there can be in a file of 8 bits."""

_MODES = ("1", "L", "P", "I;16", "I")
_STRETCHED = {"L;2": 85, "L;4": 17}


def read_label_map(path: Path) -> NDArray[Any]:
    """(H, W) whole numbers: what a PNG file holds for each pixel, palette indices or grey levels of up to 16 bits.

    Raises:
        UnreadableFileError: the file cannot be read.
        UndecodableImageError: it is not a PNG, damaged, larger than `MAX_IMAGE_PIXELS`, or holds colours.
    """
    data, _ = read_bytes(path)
    image_size(data)  # looks at the header alone, and refuses what is too large
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.mode not in _MODES:
                raise UndecodableImageError(
                    f"it holds colours ({image.mode}), not the number of a class for each pixel"
                )
            stretch = _STRETCHED.get(str(image.tile[0][3]), 1) if image.tile else 1
            flaw = flaw_of_file(image, data, MAX_IMAGE_PIXELS)
            load_pixels(image)
            flaw = flaw or flaw_of_pixels(image, data)
            labels = np.asarray(image)
    except UnidentifiedImageError as error:
        raise UndecodableImageError("it is not a PNG; other formats change the numbers of the classes") from error
    except (UndecodableImageError, MemoryError, Warning):
        raise
    except Exception as error:
        raise UndecodableImageError(f"it cannot be decoded ({type(error).__name__}: {error})") from error
    if flaw is not None:
        raise UndecodableImageError(flaw)
    labels = labels.astype(np.uint8) if labels.dtype == np.bool_ else labels
    return labels // np.uint8(stretch) if stretch > 1 else labels  # Pillow stretches few grey levels to 0..255


def masks_of(labels: NDArray[Any], class_of: Mapping[int, int]) -> dict[int, bytes]:
    """COCO counts of the pixels of each class that is there, by class id; those of `IGNORED` among them.

    The map is gone through once, whatever the number of classes: its runs down the columns are the runs of the masks.

    Args:
        labels: (H, W) whole numbers.
        class_of: the class id, or `IGNORED`, that each number stands for.

    Raises:
        ValueError: the map holds numbers that are not in `class_of`; the message names them.
    """
    flat = labels.ravel(order="F")
    starts = np.concatenate(([0], np.flatnonzero(flat[1:] != flat[:-1]) + 1))
    values, which = np.unique(flat[starts], return_inverse=True)
    if unknown := [value for value in values.tolist() if value not in class_of]:
        named = ", ".join(map(str, unknown[:NUM_NAMED]))
        more = f" and {len(unknown) - NUM_NAMED} more" if len(unknown) > NUM_NAMED else ""
        raise ValueError(f"it holds {named}{more}, which {'stands' if len(unknown) == 1 else 'stand'} for no class")
    classes = np.array([class_of[value] for value in values.tolist()])[which]
    changes = np.concatenate(([True], classes[1:] != classes[:-1]))
    starts, classes = starts[changes], classes[changes]
    stops = np.append(starts[1:], flat.size)
    order = np.argsort(classes, kind="stable")
    present, firsts = np.unique(classes[order], return_index=True)
    return {
        class_id: _counts(starts[rows], stops[rows], labels.shape)
        for class_id, rows in zip(present.tolist(), np.split(order, firsts[1:]), strict=True)
    }


def _counts(starts: NDArray[Any], stops: NDArray[Any], shape: tuple[int, ...]) -> bytes:
    """COCO counts of the mask that is set from each start up to its stop, down the columns."""
    height, width = shape
    edges = np.stack([starts, stops], axis=1).ravel()
    runs = np.diff(edges, prepend=0).tolist()
    if edges[-1] < height * width:
        runs.append(height * width - int(edges[-1]))
    return union_of_segmentations([{"size": [height, width], "counts": runs}], (height, width))
