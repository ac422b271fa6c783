"""Protocols: how masks are made and compared, by name and version. One is written beside every number.

Two scores may be compared where their protocols are equal. A protocol whose numbers would change gets a new version.
Knows nothing about heads, datasets or files.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from cache_schema.errors import unknown_name
from cache_schema.masks import Size

ORIGINAL = "original"
"""The resolution at which masks have the size of their image."""

HEADLINE = ("mean_iou", "overall_iou", "p_at_0.5", "p_at_0.7", "p_at_0.9", "dice")
GREF_HEADLINE = ("giou", "ciou", "n_acc", "t_acc", "target_p_at_0.7", "target_p_at_0.8", "target_p_at_0.9")

COMPARISONS: dict[str, Callable[[Any, float], Any]] = {">": operator.gt, ">=": operator.ge}
"""How a probability is compared with the threshold."""

_RESOLUTION = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Protocol:
    """How masks are made and compared. It is written beside every number, so that nobody asks which IoU it is.

    Args:
        resolution: "original", or "HxW" in pixels for a grid that every image is laid on, whatever its shape.
        threshold: from 0 to 1, what the probability of a marked pixel is compared with, by `comparison`.
        no_target_px: a head without a no-target output is taken to say "no target" where it marks fewer pixels, counted
            at the resolution.
        headline: the metrics to be shown first. All of them are computed under every protocol.
    """

    name: str = "original-size"
    version: int = 1
    resolution: str = ORIGINAL
    threshold: float = 0.5
    comparison: Literal[">", ">="] = ">"
    prediction_resize: str = "logits, bilinear, align_corners=False"
    truth_resize: str = "none"
    empty_union: str = "an empty prediction of an empty truth counts as IoU 1"
    sentence_policy: str = "every sentence is a sample"
    no_target_px: int = 50
    headline: tuple[str, ...] = HEADLINE

    def __post_init__(self) -> None:
        least_marked, most_marked = (COMPARISONS[self.comparison](share, self.threshold) for share in (0.0, 1.0))
        if least_marked or not most_marked:
            raise ValueError(f"{self.comparison} {self.threshold} marks all or nothing: give a threshold from 0 to 1")
        if self.resolution != ORIGINAL and not _RESOLUTION.fullmatch(self.resolution):
            raise ValueError(f"a resolution is {ORIGINAL!r} or like '480x480', not {self.resolution!r}")

    @property
    def grid(self) -> Size | None:
        """(H, W) at which masks are compared; None for the original size of each image."""
        if self.resolution == ORIGINAL:
            return None
        height, width = self.resolution.split("x")
        return int(height), int(width)

    def binarize(self, probability: Float[np.ndarray, "*axes"]) -> Bool[np.ndarray, "*axes"]:
        """Turn probabilities in [0, 1] into a mask of the same shape."""
        return COMPARISONS[self.comparison](probability, self.threshold)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "headline": list(self.headline)}


def _resized(side_px: int) -> Protocol:
    return Protocol(
        name=f"resized-{side_px}",
        resolution=f"{side_px}x{side_px}",
        truth_resize="nearest: each cell takes the pixel that holds its centre",
    )


ORIGINAL_SIZE = Protocol()

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        ORIGINAL_SIZE,
        Protocol(name="original-size-inclusive", comparison=">="),
        _resized(224),
        _resized(480),
        _resized(512),
        Protocol(name="gref", headline=GREF_HEADLINE),
    )
}
"""By name: masks at original size (the default; "inclusive" marks a pixel at the threshold too), on a square grid, and
at original size with the metrics of gRefCOCO first."""


def find_protocol(name: str | Protocol) -> Protocol:
    """The protocol of that name; one that is given is given back.

    Raises:
        UsageError: there is none.
    """
    if isinstance(name, Protocol):
        return name
    if name not in PROTOCOLS:
        raise unknown_name("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]
