"""Listening to a model's blocks: the hidden states that are asked for, and no others, are kept."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

from torch import Tensor, nn


class HiddenStates:
    """The outputs of chosen blocks, by number; 0 is what goes into the first. They are transformers' `hidden_states`.

    That of transformers itself listens to each block from within, so that a compiled block falls into pieces.
    """

    def __init__(self, blocks: nn.ModuleList, numbers: Collection[int]) -> None:
        self._heard: dict[int, Tensor] = {}
        for number in set(numbers):
            if number == 0:
                blocks[0].register_forward_pre_hook(self._hear_input)
            else:
                blocks[number - 1].register_forward_hook(partial(self._hear_output, number))

    def _hear_input(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._heard[0] = inputs[0]

    def _hear_output(self, number: int, block: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self._heard[number] = output

    def take(self) -> dict[int, Tensor]:
        """Those of the last forward pass, which are forgotten here."""
        heard, self._heard = self._heard, {}
        return heard
