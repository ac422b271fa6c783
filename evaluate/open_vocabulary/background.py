"""Background cleaning (Talk2DINO): what the image encoder's own attention takes for things pulls masks up there."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

CLEANING = 0.2
"""The published strength."""


def clean_background(
    masks: Float[Tensor, "w c gh gw"],
    attention: Float[Tensor, "w heads gh gw"],
    patches: Float[Tensor, "w gh gw d"],
    classes: Float[Tensor, "c d"],
    strength: float = CLEANING,
) -> Float[Tensor, "w c gh gw"]:
    """(masks + strength * a) / (1 + strength), where `a` is where the heads that look at a class look.

    With A_h the attention logits of head h over the n patches p_n of a window, and t_c the class in their space:
    e_h = normalise(mean_n A_hn p_n); w_c = softmax_h <t_c, e_h>; a_c = softmax_n(sum_h w_ch A_h), shifted and scaled so
    that all classes of the window together span what the masks of that window span. Each window is worked out by
    itself, so it does not matter which others are in the batch.

    Args:
        masks: from 0 to 1, on the grid of the patches.
        classes: of length 1 each.

    Source: Talk2DINO.
    """
    logits, tokens = attention.flatten(2), patches.flatten(1, 2)
    looked_at = F.normalize(logits @ tokens / tokens.shape[1], dim=-1)
    of_head = torch.einsum("cd,whd->wch", classes, looked_at).softmax(-1)
    attended = (of_head @ logits).softmax(-1)
    low, high = _range(masks.flatten(2))
    least, most = _range(attended)
    # Where every patch is attended to alike, there is nothing to scale: all of it is then the masks' lowest value.
    scaled = (attended - least) / (most - least).clamp(min=torch.finfo(attended.dtype).tiny) * (high - low) + low
    return (masks + strength * scaled.reshape(masks.shape)) / (1 + strength)


def default_background(width: int) -> float:
    """The published level of the background channel for cosines: ViT-L's for image tokens of 1024 and wider."""
    return 0.54 if width >= 1024 else 0.55


def _range(values: Float[Tensor, "w c n"]) -> tuple[Float[Tensor, "w 1 1"], Float[Tensor, "w 1 1"]]:
    low, high = values.flatten(1).aminmax(dim=1)
    return low[:, None, None], high[:, None, None]
