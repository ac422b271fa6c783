"""A bidirectional LSTM over sequences of different lengths that never sees their padding."""

from __future__ import annotations

import warnings
from typing import no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class BiLSTM(nn.Module):
    """Layers of an LSTM that reads forwards and one that reads backwards from the last token of each sequence.

    Says what `nn.LSTM(bidirectional=True)` says of packed sequences of the same weights. Packing needs lengths on the
    CPU and cannot be exported; here each sequence is reversed within its own length instead, so that padding stands on
    the right in both directions, where no token of a causal reader sees it.

    Args:
        width: of the tokens.
        hidden_dim: of each direction; 2 * hidden_dim channels come out.
        num_layers: each reads both directions of the one before.
        dropout: between layers.
    """

    def __init__(self, *, width: int, hidden_dim: int, num_layers: int, dropout: float = 0.0) -> None:
        super().__init__()
        widths = [width, *[2 * hidden_dim] * (num_layers - 1)]
        self.forwards = nn.ModuleList(nn.LSTM(given, hidden_dim, batch_first=True) for given in widths)
        self.backwards = nn.ModuleList(nn.LSTM(given, hidden_dim, batch_first=True) for given in widths)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b l e"]:
        """(b, l, 2 * hidden_dim), forwards first; 0 for padding, which stands on the right where `mask` is False."""
        order = reversing_order(mask)
        padding = ~mask[..., None]
        states = tokens.masked_fill(padding, 0)
        for layer, (forwards, backwards) in enumerate(zip(self.forwards, self.backwards, strict=True)):
            if layer:
                states = self.dropout(states)
            reversed_states = reorder(read(backwards, reorder(states, order)), order)
            states = torch.cat([read(forwards, states), reversed_states], dim=-1).masked_fill(padding, 0)
        return states


def reversing_order(mask: Bool[Tensor, "b l"]) -> Int[Tensor, "b l"]:
    """Where each token of a reversed sequence comes from: the tokens change places, the padding stays."""
    places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    return torch.where(mask, mask.sum(1, keepdim=True) - 1 - places, places)


def reorder(states: Float[Tensor, "b l d"], order: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
    """Tokens of each sequence in another order."""
    return states.gather(1, order[..., None].expand(-1, -1, states.shape[2]))


def read(lstm: nn.Module, states: Float[Tensor, "b l d"]) -> Float[Tensor, "b l e"]:
    """The states of a one-layer LSTM after each token."""
    # torch.export unrolls nn.LSTM for the very number of tokens it is traced with.
    if torch.compiler.is_exporting():
        return _scan(lstm, states)
    outputs: Tensor = lstm(states)[0]
    return outputs


def _scan(lstm: nn.Module, states: Float[Tensor, "b l d"]) -> Float[Tensor, "b l e"]:
    """The same as a loop that torch.export keeps: cell by cell, as in the documentation of `nn.LSTM`."""
    from torch._higher_order_ops.scan import scan

    recurrent = lstm.get_parameter("weight_hh_l0")
    bias = lstm.get_parameter("bias_ih_l0") + lstm.get_parameter("bias_hh_l0")
    gates = F.linear(states, lstm.get_parameter("weight_ih_l0"), bias).transpose(0, 1)

    @no_type_check  # what checks shapes under test cannot be traced into the loop
    def step(carry: tuple[Tensor, Tensor], gate: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        hidden, cell = carry
        write, keep, value, show = (gate + F.linear(hidden, recurrent)).chunk(4, dim=-1)
        cell = keep.sigmoid() * cell + write.sigmoid() * value.tanh()
        hidden = show.sigmoid() * cell.tanh()
        return (hidden, cell), hidden.clone()

    start = states.new_zeros(states.shape[0], recurrent.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # while it traces, torch warns of its own code
        outputs: Tensor = scan(step, (start, start.clone()), gates, dim=0)[1]
    return outputs.transpose(0, 1)
