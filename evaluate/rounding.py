"""Live features as a cache would give them back."""

from __future__ import annotations

import torch
from torch import Tensor

from cache_schema.quantize import dequantize, quantize


def as_cached(values: Tensor, dtype: str) -> Tensor:
    """Features rounded to the data type of a cache; int8 has a scale for each token, which is the last axis."""
    if dtype != "int8":
        return values.to(getattr(torch, dtype))
    tokens, scale = quantize(values.float().cpu().numpy())
    return torch.from_numpy(dequantize(tokens, scale)).to(values.device)
