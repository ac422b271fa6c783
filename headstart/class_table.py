"""The scores of a benchmark as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HEADLINE = (("mIoU", "miou"), ("aAcc", "aacc"), ("mAcc", "macc"))


def class_table(results: Mapping[str, Any]) -> str:
    """A row for each class, in the benchmark's order, and the scores of all together below."""
    protocol, metrics, classes = results["protocol"], results["metrics"], results["classes"]
    width = max(len("class"), *(len(row["name"]) for row in classes))
    num_pixels = metrics["num_pixels"]
    lines = [
        f"{results['benchmark']}/{protocol['split']}: {metrics['num_images']} images, "
        f"{metrics['num_classes']} of {len(classes)} classes seen or predicted",
        f"{'class':{width}} {'IoU':>7} {'accuracy':>9} {'of truth':>9} {'predicted':>10}",
    ]
    for row in classes:
        share, predicted = (f"{row[key] / num_pixels:.1%}" for key in ("truth_px", "predicted_px"))
        lines.append(
            f"{row['name']:{width}} {_number(row['iou']):>7} {_number(row['accuracy']):>9} {share:>9} {predicted:>10}"
        )
    lines += ["", "  ".join(f"{name} {metrics[key]:.4f}" for name, key in _HEADLINE)]
    return "\n".join([*lines, *results["provenance"]["notes"]])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
