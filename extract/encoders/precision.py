"""What an encoder computes in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from extract.encoders.specs import Precision

HALVES: dict[Precision, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""The half types that autocast computes in."""


@contextmanager
def computing_in(precision: Precision, device: str) -> Iterator[None]:
    """Compute in float32 to its last bit, or under the autocast of a half type.

    Left alone, torch rounds what cuDNN convolves in float32 to TF32, which keeps 10 bits of 23: a patch embedding would
    be off by a thousandth. Matrix products are not rounded so unless somebody asks for it.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(torch.device(device).type, dtype=HALVES.get(precision), enabled=precision in HALVES):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def halve_weights(blocks: nn.Module, precision: Precision) -> None:
    """Round now the weights that autocast would round in each forward pass: half the memory, and the very same values.

    Norms, scales and embeddings stay in float32; autocast leaves them there too.
    """
    if precision in HALVES:
        for module in blocks.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(HALVES[precision])
