"""A feature pyramid: levels made of cached layers, from fine to coarse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heads.conv_blocks import conv_norm_relu, make_norm
from heads.inputs import FeatureShapes

MADE_STRIDES = (0.25, 0.5, 1.0, 2.0)
"""Cells of the levels that are made of one token grid, in its own cells."""


@dataclass(frozen=True)
class Level:
    """A level of a pyramid: cells of `stride` cells of a cached layer of `width` channels."""

    layer: str
    width: int
    stride: float = 1.0


def make_levels(shapes: FeatureShapes, layers: Sequence[str] | None = None) -> tuple[Level, ...]:
    """Levels from fine to coarse: layers of different grids as they are; of layers of one grid, four levels.

    One layer gives all four of them (ViTDet), of four layers each gives one, the first the finest.

    Raises:
        ValueError: the layers make no pyramid.
    """
    different = len({grid[:2] for grid in shapes.grids.values()}) > 1
    names = shapes.layers(tuple(shapes.grids) if different and not layers else layers)
    grids = {name: shapes.grids[name] for name in names}
    sizes = {grid[:2] for grid in grids.values()}
    if len(sizes) == 1 and len(names) in (1, len(MADE_STRIDES)):
        each = names * len(MADE_STRIDES) if len(names) == 1 else names
        return tuple(Level(name, grids[name][2], stride) for name, stride in zip(each, MADE_STRIDES, strict=True))
    ordered = sorted(names, key=lambda name: grids[name][:2], reverse=True)
    shrinks = [grids[fine][axis] >= grids[coarse][axis] for fine, coarse in pairwise(ordered) for axis in (0, 1)]
    if len(sizes) != len(names) or not all(shrinks):
        said = ", ".join(f"{name} ({grids[name][0]} x {grids[name][1]})" for name in names)
        raise ValueError(
            f"layers {said} are no pyramid: name layers whose grids grow coarser, such as the stages 1 to 4 of a "
            "ResNet, or of one grid a single layer, or four"
        )
    return tuple(Level(name, grids[name][2]) for name in ordered)


class FeaturePyramid(nn.Module):
    """A feature pyramid network (Lin et al. 2017): what coarse levels know is added to the finer ones.

    Every level is projected to `dim`, takes up the one above it (nearest neighbour), and passes a 3 x 3 convolution
    and then two more with norm and ReLU. Levels of one size, as a vision transformer's layers are, are first brought to
    their strides as ViTDet does (Li et al. 2022): by transposed convolutions up and by max pooling down.

    Args:
        widths: channels of each level, from fine to coarse.
        strides: cells of each level in cells of its layer: 1 leaves it as it is; see `MADE_STRIDES`.
        dim: channels of all levels that come out.
        num_outputs: how many levels come out, the finest first; the others are there to be taken up.
    """

    def __init__(
        self, *, widths: Sequence[int], strides: Sequence[float], dim: int, num_outputs: int, norm: str = "batch"
    ) -> None:
        super().__init__()
        resampled = [_resample(width, stride, norm) for width, stride in zip(widths, strides, strict=True)]
        self.resample = nn.ModuleList(module for module, _ in resampled)
        self.lateral = nn.ModuleList(nn.Conv2d(width, dim, 1) for _, width in resampled)
        self.output = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(num_outputs))
        self.refine = nn.ModuleList(
            nn.Sequential(*conv_norm_relu(dim, dim, norm), *conv_norm_relu(dim, dim, norm)) for _ in range(num_outputs)
        )

    def forward(self, grids: Sequence[Float[Tensor, "i _ _ _"]]) -> list[Float[Tensor, "i d _ _"]]:
        """(i, dim, gh, gw) of the finest levels, given (i, gh, gw, width) of every level."""
        levels = [
            lateral(resample(grid.permute(0, 3, 1, 2)))
            for grid, resample, lateral in zip(grids, self.resample, self.lateral, strict=True)
        ]
        for finer in range(len(levels) - 2, -1, -1):
            size = levels[finer].shape[-2:]
            levels[finer] = levels[finer] + F.interpolate(levels[finer + 1], size=size, mode="nearest")
        # The levels that only lend themselves to finer ones have neither.
        return [refine(output(level)) for level, output, refine in zip(levels, self.output, self.refine, strict=False)]


def _resample(width: int, stride: float, norm: str) -> tuple[nn.Module, int]:
    """What brings a layer of `width` channels to cells of `stride` of its own, and the channels that come out."""
    if stride == 1:
        return nn.Identity(), width
    if stride > 1:
        return nn.MaxPool2d(int(stride), ceil_mode=True), width
    half = max(width // 2, 1)
    up = nn.ConvTranspose2d(width, half, 2, stride=2)
    if stride == 0.5:
        return up, half
    quarter = max(width // 4, 1)
    again = nn.ConvTranspose2d(half, quarter, 2, stride=2)
    return nn.Sequential(up, make_norm(norm, half), nn.GELU(), again), quarter
