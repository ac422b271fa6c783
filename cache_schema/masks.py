"""Masks as COCO run-length counts: the one compressed form in which targets are kept.

Counts are COCO's compressed ASCII bytes (column-major runs), as pycocotools writes them. The size (H, W)
is kept beside them, never inside. Knows nothing about stores or datasets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

Size = tuple[int, int]
"""(H, W) in pixels."""


_MAX_RUN_BITS = 40


def encode_mask(mask: NDArray[np.bool_]) -> bytes:
    """Compress a (H, W) boolean mask into COCO counts."""
    if mask.ndim != 2:
        raise ValueError(f"a mask is (H, W); got {mask.ndim} axes")
    return bytes(coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"])


def decode_mask(counts: bytes, size: Size) -> NDArray[np.bool_]:
    """Expand COCO counts into a (H, W) boolean mask."""
    decoded: NDArray[np.uint8] = coco_mask.decode({"size": list(size), "counts": counts})
    return decoded.astype(np.bool_)


def is_empty(counts: bytes, size: Size) -> bool:
    """Whether COCO counts mark no pixel."""
    return int(coco_mask.area({"size": list(size), "counts": counts})) == 0


def empty_mask(size: Size) -> bytes:
    """Counts of the (H, W) mask without a pixel: the target of a no-target prompt."""
    return encode_mask(np.zeros(size, np.bool_))


def union_of_segmentations(segmentations: Sequence[Any], size: Size) -> bytes:
    """Counts of the clamped union of COCO `segmentation` fields, each of them polygons or run lengths.

    Each field is a list of polygons (flat [x0, y0, x1, y1, ...] lists), or `{"size", "counts"}` with counts as a
    list (uncompressed, iscrowd) or a string (compressed). Pixels covered twice count once.

    Raises:
        ValueError: a field has another form, a polygon has fewer than three points, or run lengths name another size.
    """
    parts: list[Any] = []
    for segmentation in segmentations:
        if isinstance(segmentation, Mapping):
            parts.append(_parse_run_lengths(segmentation, size))
        elif isinstance(segmentation, Sequence) and not isinstance(segmentation, str | bytes) and segmentation:
            parts.extend(coco_mask.frPyObjects(_parse_polygons(segmentation, size), *size))
        else:
            raise ValueError("a segmentation is a list of polygons or run lengths with 'size' and 'counts'")
    return merge_counts([part["counts"] for part in parts], size)


def merge_counts(parts: Sequence[bytes], size: Size) -> bytes:
    """Counts of the union of masks that `encode_mask` or `union_of_segmentations` gave, which need no checking."""
    if not parts:
        return empty_mask(size)
    merged = coco_mask.merge([{"size": list(size), "counts": part} for part in parts], intersect=False)
    return bytes(merged["counts"])


def _parse_polygons(polygons: Sequence[Any], size: Size) -> list[list[float]]:
    """Polygons that pycocotools can draw: it crashes on coordinates that overflow its integers."""
    far_px = 2 * max(size)
    height, width = size
    for polygon in polygons:
        if not isinstance(polygon, list) or any(type(value) not in (int, float) for value in polygon):
            raise ValueError("a polygon must be a list of numbers")
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("a polygon is a flat list of at least three x, y pairs")
        if not all(abs(value) <= far_px for value in polygon):
            raise ValueError(f"a polygon lies far outside the image of {height} x {width} pixels (height x width)")
        columns, rows = polygon[::2], polygon[1::2]
        if max(columns) < 0 or min(columns) > width or max(rows) < 0 or min(rows) > height:
            raise ValueError(f"a polygon lies outside the image of {height} x {width} pixels (height x width)")
    return [[float(value) for value in polygon] for polygon in polygons]


def _parse_run_lengths(segmentation: Mapping[str, Any], size: Size) -> Any:
    """Run lengths that cover the image exactly: pycocotools reads past the end of counts that do not."""
    counts, of_size = segmentation.get("counts"), segmentation.get("size")
    if isinstance(counts, str | bytes):
        counts = _expand_runs(counts if isinstance(counts, str) else counts.decode("ascii"))
    if not isinstance(counts, list) or not isinstance(of_size, list | tuple):
        raise ValueError("run lengths must hold 'counts' and 'size'")
    if tuple(of_size) != size:
        raise ValueError(f"run lengths must hold 'counts' and the image's size {list(size)}")
    if any(type(run) is not int or run < 0 for run in counts) or sum(counts) != size[0] * size[1]:
        raise ValueError("run lengths must be whole numbers that add up to the image's pixels")
    return coco_mask.frPyObjects({"size": list(of_size), "counts": counts}, *size)


def _expand_runs(counts: str) -> list[int]:
    """COCO's compressed counts as a list of runs, which can be added up; pycocotools reads past the end of short ones.

    A character holds five bits, the lowest first, and a sixth that says whether more follow. From the fourth run on,
    what is stored is the difference to the run before the last.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        code = ord(character) - 48
        if not 0 <= code < 64:
            raise ValueError(f"compressed run lengths hold the character {character!r}")
        value |= (code & 0x1F) << shift
        shift += 5
        if shift > _MAX_RUN_BITS:
            raise ValueError("compressed run lengths hold a number that no image is large enough for")
        if code & 0x20:
            continue
        if code & 0x10:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("compressed run lengths are cut short")
    return runs
