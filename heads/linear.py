"""The floor: one projection of the pooled prompt, and its dot product with every image token."""

from __future__ import annotations

import math

import torch
from torch import nn

from heads.inputs import FeatureShapes, Head, HeadInputs, HeadOutputs


class LinearHead(Head):
    """logits[b, y, x] = (W pooled[b] + c) . token[b, y, x] / sqrt(d) + bias.

    Args:
        image_width: d, the width of the image tokens.
        pooled_width: the width of the pooled prompt features.
        layer: the cached layer it reads.
    """

    reads_tokens = False

    def __init__(self, *, image_width: int, pooled_width: int, layer: str) -> None:
        super().__init__()
        self.layers = (layer,)
        self.projection = nn.Linear(pooled_width, image_width)
        self.bias = nn.Parameter(torch.zeros(()))
        self.scale = 1 / math.sqrt(image_width)

    def forward(self, inputs: HeadInputs) -> HeadOutputs:
        """(b, gh, gw) mask logits."""
        tokens = inputs.features[self.layers[0]].index_select(0, inputs.image_index)
        direction = self.projection(inputs.pooled) * self.scale
        return HeadOutputs(torch.einsum("bhwd,bd->bhw", tokens, direction) + self.bias)


def build_linear(shapes: FeatureShapes, *, layer: str | None = None) -> LinearHead:
    """A linear head on one cached layer, by default the last that was cached."""
    (layer,) = shapes.layers([layer] if layer else None)
    return LinearHead(image_width=shapes.grids[layer][2], pooled_width=shapes.pooled_width, layer=layer)
