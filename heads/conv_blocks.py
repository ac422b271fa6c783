"""A convolution, its norm and its ReLU."""

from __future__ import annotations

import math

from torch import nn

from cache_schema.errors import unknown_name

NORMS = ("batch", "group")
"""Batch norm, or group norm, which does not depend on what else is in a batch."""


def make_norm(norm: str, channels: int) -> nn.Module:
    """A norm over feature maps; groups are 8, or as many of 4, 2 and 1 as the channels can be shared by."""
    if norm not in NORMS:
        raise unknown_name("norm", norm, NORMS)
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(math.gcd(8, channels), channels)


def conv_norm_relu(given: int, wanted: int, norm: str, *, kernel: int = 3) -> list[nn.Module]:
    """A convolution that keeps the size, without the bias that the norm behind it would take out again."""
    convolution = nn.Conv2d(given, wanted, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return [convolution, make_norm(norm, wanted), nn.ReLU()]
