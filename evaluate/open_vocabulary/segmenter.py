"""What was said of windows to label maps: a score for every class, put together, and the best class of each pixel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from cache_schema.errors import UsageError
from evaluate.open_vocabulary.live_windows import SeenImage, part_of
from evaluate.open_vocabulary.pamr import Pamr
from evaluate.open_vocabulary.scores import ClassScorer
from evaluate.open_vocabulary.templates import TemplateSet
from evaluate.open_vocabulary.windows import SlidingWindow

_WINDOWS_AT_ONCE = 8
"""How many windows of an image are scored at once."""


@dataclass(frozen=True)
class SegmentationProtocol:
    """How label maps are made. It is written beside every number.

    Args:
        templates: what the names of classes are put into.
        aliases: whether classes are prompted for by their other names too.
        windows: how images are cut into windows.
        background: the level of a constant channel; a pixel where no class reaches it is background. None for none.
        cleaning: the strength of background cleaning, 0 for none.
        pamr: how scores are refined, once for each image, after its windows were put together; None for not at all.
    """

    name: str = "sliding-windows"
    version: int = 1
    templates: TemplateSet = "7"
    aliases: bool = False
    windows: SlidingWindow = field(default_factory=SlidingWindow)
    background: float | None = None
    cleaning: float = 0.0
    pamr: Pamr | None = None

    def __post_init__(self) -> None:
        if self.background is not None and not 0 < self.background < 1:
            raise UsageError(f"the background level is {self.background}: scores lie between 0 and 1; name one there.")
        if self.cleaning < 0:
            raise UsageError(f"the strength of background cleaning is {self.cleaning}: name 0 (none) or more.")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON, with what cannot be chosen. What hangs on the scorer, `ClassScorer.describe` says."""
        return {
            "name": self.name,
            "version": self.version,
            "templates": self.templates,
            "aliases": self.aliases,
            **self.windows.to_dict(),
            "overlaps": "averaged",
            "background": self.background,
            "cleaning": self.cleaning,
            "pamr": None
            if self.pamr is None
            else {"iterations": self.pamr.iterations, "dilations": list(self.pamr.dilations), "applied": "per image"},
            "to_original": "bilinear",
            "equal_scores": "the first class",
        }


@dataclass(frozen=True)
class Segmenter:
    """Label maps of images for a fixed list of classes.

    Classes are numbered from 0 on in the order in which the scorer has them; with a background channel that is 0, and
    the classes are numbered from 1 on.

    Args:
        scorer: knows the classes.
    """

    scorer: ClassScorer
    protocol: SegmentationProtocol

    @torch.inference_mode()
    def label(self, image: SeenImage) -> Int64[np.ndarray, "h w"]:
        """The number of each pixel's class, at the image's own size."""
        merged = image.windows.merge(self._score(image), align_corners=self.scorer.align_corners)
        if self.protocol.pamr is not None:
            assert image.resized is not None
            pixels = torch.from_numpy(image.resized).to(merged.device).permute(2, 0, 1) / 255
            merged = self.protocol.pamr.affinity(pixels).refine(merged)
        if self.protocol.background is not None:
            merged = torch.cat([torch.full_like(merged[:1], self.protocol.background), merged])
        labels: Int64[np.ndarray, "h w"] = image.windows.labels(merged).cpu().numpy()
        return labels

    def _score(self, image: SeenImage) -> list[Tensor]:
        """The scores of all windows on the scorer's own grid, in batches."""
        starts = range(0, len(image.windows), _WINDOWS_AT_ONCE)
        return [self.scorer.score(part_of(image.encoding, start, start + _WINDOWS_AT_ONCE)) for start in starts]
