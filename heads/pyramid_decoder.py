"""A decoder that goes from a level of a pyramid up to pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from heads.conv_blocks import conv_norm_relu, make_norm


class ProgressiveDecoder(nn.Module):
    """Stages that each double the sides and change the channels, then one logit for each pixel.

    A stage is a transposed convolution of stride 2 and two 3 x 3 convolutions, each with norm and ReLU. At the end
    stand a convolution to one logit and a small correction that has only the logits to look at.

    Args:
        dim: channels of what is decoded, and of the levels of a pyramid that stages may take up.
        channels: of each stage.
        num_skips: after how many of the first stages a finer level is added, projected by a 1 x 1 convolution.
    """

    def __init__(self, *, dim: int, channels: Sequence[int], num_skips: int = 0, norm: str = "batch") -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose2d(given, wanted, 2, stride=2, bias=False),
                make_norm(norm, wanted),
                nn.ReLU(),
                *conv_norm_relu(wanted, wanted, norm),
                *conv_norm_relu(wanted, wanted, norm),
            )
            for given, wanted in zip([dim, *channels], channels, strict=False)
        )
        self.skips = nn.ModuleList(nn.Conv2d(dim, wanted, 1) for wanted in channels[:num_skips])
        self.to_logits = nn.Sequential(*conv_norm_relu(channels[-1], channels[-1], norm), nn.Conv2d(channels[-1], 1, 1))
        self.correct = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 1))

    def forward(
        self,
        fused: Float[Tensor, "b d gh gw"],
        levels: Sequence[Float[Tensor, "i d _ _"]],
        image_index: Int[Tensor, " b"],
    ) -> Float[Tensor, "b h w"]:
        """Mask logits of sides 2 ** stages times as long, given as many levels as there are skips, coarsest first."""
        skips = [project(level) for project, level in zip(self.skips, levels, strict=True)]
        for number, stage in enumerate(self.stages):
            fused = stage(fused)
            if number < len(skips):
                skip = _resize(skips[number], (fused.shape[2], fused.shape[3]))
                fused = fused + skip.index_select(0, image_index)
        logits = self.to_logits(fused)
        return (logits + self.correct(logits))[:, 0]


def _resize(level: Float[Tensor, "i d _ _"], size: tuple[int, int]) -> Float[Tensor, "i d h w"]:
    if tuple(level.shape[2:]) == size:
        return level
    return F.interpolate(level, size=size, mode="bilinear", align_corners=False)
