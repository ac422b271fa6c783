"""A feature pyramid neck: several cached layers of one image become one grid of one width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class FpnNeck(nn.Module):
    """Layers -> one grid, as PromptSeg's neck does: convolutions, GroupNorm, GELU.

    Each layer has its own 1x1 convolution to `dim` and a 3x3 one; the layers are brought to the finest grid (bilinear),
    concatenated, and joined by a 1x1 and a 3x3 convolution. Nothing follows the last norm, so that what the decoder
    gets has mean 0, as the image embeddings of SAM have. The layers of a ViT have one grid and different depths, those
    of a CNN different grids; for the neck both are a pyramid.

    Args:
        grids: (gh, gw, d) of each layer.
        dim: width of the output, a multiple of 8; norms are over groups of 8 channels (32 groups at 256).
    """

    def __init__(self, *, grids: Sequence[tuple[int, int, int]], dim: int) -> None:
        super().__init__()
        self.size = (max(grid[0] for grid in grids), max(grid[1] for grid in grids))
        self.levels = nn.ModuleList(
            nn.Sequential(_convolution(width, dim, side=1), nn.GELU(), _convolution(dim, dim, side=3), nn.GELU())
            for _, _, width in grids
        )
        self.join = nn.Sequential(
            _convolution(len(grids) * dim, dim, side=1), nn.GELU(), _convolution(dim, dim, side=3)
        )

    def forward(self, features: Sequence[Float[Tensor, "i _ _ _"]]) -> Float[Tensor, "i d h w"]:
        """(i, gh, gw, d) of each layer -> (i, `dim`, h, w) on the finest grid."""
        levels = [
            self._resize(level(grid.permute(0, 3, 1, 2))) for level, grid in zip(self.levels, features, strict=True)
        ]
        return self.join(torch.cat(levels, dim=1))

    def _resize(self, grid: Float[Tensor, "i d gh gw"]) -> Float[Tensor, "i d h w"]:
        if grid.shape[2:] == self.size:
            return grid
        return F.interpolate(grid, size=self.size, mode="bilinear", align_corners=False)


def _convolution(width: int, dim: int, *, side: int) -> nn.Sequential:
    """A convolution that keeps the grid, and its norm, which makes a bias of its own superfluous."""
    return nn.Sequential(nn.Conv2d(width, dim, side, padding=side // 2, bias=False), nn.GroupNorm(dim // 8, dim))
