"""What the CLS token attends to in the last block: all that Talk2DINO takes of attention.

Only the CLS row is ever computed, beside a forward pass that goes its usual way; no image's N x N attention is built.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class LastAttention:
    """Listens to the last block's attention and gives the CLS row of its logits after each forward pass.

    It hears what the projections put out, whatever an adapter made of them.

    Args:
        attention: a module with `q_proj` and `k_proj`.
        num_prefix_tokens: how many tokens come before the patches: the CLS token, and registers.
        rotates: keys of patches are rotated by the `position_embeddings` the module is given. The CLS token's query
            never is: it has no place.
    """

    def __init__(self, attention: nn.Module, num_heads: int, num_prefix_tokens: int, *, rotates: bool) -> None:
        self._num_heads = num_heads
        self._num_prefix_tokens = num_prefix_tokens
        self._heard: dict[str, Any] = {}
        attention.get_submodule("q_proj").register_forward_hook(self._hear_query)
        attention.get_submodule("k_proj").register_forward_hook(self._hear_keys)
        if rotates:
            attention.register_forward_pre_hook(self._hear_rotation, with_kwargs=True)

    def _hear_query(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self._heard["query"] = output[:, 0]

    def _hear_keys(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self._heard["keys"] = output[:, self._num_prefix_tokens :]

    def _hear_rotation(self, module: nn.Module, inputs: object, named: dict[str, Any]) -> None:
        self._heard["rotation"] = named["position_embeddings"]

    def logits(self) -> Float[Tensor, "i heads n"]:
        """q_cls . k_patch / sqrt(d_h) of the last forward pass, in float32: by head, over the n patches only."""
        query = self._heard.pop("query").float().unflatten(-1, (self._num_heads, -1))
        keys = self._heard.pop("keys").float().unflatten(-1, (self._num_heads, -1)).transpose(1, 2)
        with torch.autocast(keys.device.type, enabled=False):
            if "rotation" in self._heard:
                keys = rotate(keys, *(part.float() for part in self._heard.pop("rotation")))
            return (keys @ query[..., None])[..., 0] * query.shape[-1] ** -0.5


def rotate(
    keys: Float[Tensor, "i heads n d"], cos: Float[Tensor, "n d"], sin: Float[Tensor, "n d"]
) -> Float[Tensor, "i heads n d"]:
    """Rotary position embedding: channel c and channel c + d/2 turn together by the angle of their place."""
    first, second = keys.chunk(2, -1)
    return keys * cos + torch.cat((-second, first), -1) * sin


def pool_by_attention(
    logits: Float[Tensor, "i heads n"], patches: Float[Tensor, "i n d"]
) -> Float[Tensor, "i heads d"]:
    """(1/n) sum_n softmax_n(logits)_n patches_n, for each row of logits; in float32.

    Source: Talk2DINO, which divides a weighted mean by the number of patches once more.
    """
    with torch.autocast(patches.device.type, enabled=False):
        return logits.float().softmax(-1) @ patches.float() / patches.shape[1]
