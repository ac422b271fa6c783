"""What a report is made of: trained heads with their scores, and pictures of what they mark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, UInt8

from evaluate.metrics import SampleScores

Group = Literal["best", "median", "worst"]


@dataclass(frozen=True, slots=True)
class Example:
    """One sample to look at. `image` is (H, W, 3) uint8; both masks are (H, W) at the same size."""

    image: UInt8[np.ndarray, "h w 3"]
    truth: Bool[np.ndarray, "h w"]
    predicted: Bool[np.ndarray, "h w"]
    prompt: str
    iou: float
    group: Group
    tags: Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class PromptMasks:
    """One prompt of an image: both masks (H, W) at the image's size, and their IoU as it counts in the scores."""

    prompt: str
    truth: Bool[np.ndarray, "h w"]
    predicted: Bool[np.ndarray, "h w"]
    iou: float


@dataclass(frozen=True, slots=True)
class SeveralPrompts:
    """One image, (H, W, 3) uint8, and what a head marks in it for each of several prompts."""

    image: UInt8[np.ndarray, "h w 3"]
    prompts: Sequence[PromptMasks]


@dataclass(frozen=True, slots=True)
class RunReport:
    """What the report shows of one trained head.

    `history` holds the lines of metrics.jsonl, one for each validation. `prompts`, every value of `tags` and
    `predicted_iou` are parallel to `scores`; `predicted_iou` is what the head expected each IoU to be, None for a head
    that expects nothing. `several` are images with several prompts each.
    """

    head: str
    history: Sequence[Mapping[str, Any]]
    scores: SampleScores
    prompts: Sequence[str]
    tags: Mapping[str, Sequence[str | None]]
    examples: Sequence[Example]
    num_parameters: int
    predicted_iou: Sequence[float] | None = None
    several: Sequence[SeveralPrompts] = ()
