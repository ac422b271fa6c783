"""Floating-point operations of a head's forward pass, counted as it runs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.backends import mha, mkldnn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from heads.inputs import HeadInputs


def count_flops(head: nn.Module, inputs: HeadInputs) -> int:
    """Operations of a forward pass, the same wherever the head is; additions and multiplications count as two.

    Matrix products and convolutions count, nothing else does. torch does not count what is done in one fused kernel
    (attention, LSTM), so the pass is made with plain ones.
    """
    on_cpu = copy.deepcopy(head).cpu()
    with torch.no_grad(), _unfused(), FlopCounterMode(display=False) as counter:
        on_cpu(inputs.to("cpu"))
    return int(counter.get_total_flops())


@contextmanager
def _unfused() -> Iterator[None]:
    """Attention and LSTMs in plain matrix products."""
    fast_path = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")  # torch warns of accelerators that are not here
            with mkldnn.flags(enabled=False):
                yield
    finally:
        mha.set_fastpath_enabled(fast_path)
