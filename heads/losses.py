"""Losses on mask logits, each the mean over the prompts of a batch, taken at the size of the targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

MaskLoss = Callable[[Float[Tensor, "b h w"], Float[Tensor, "b h w"]], Float[Tensor, ""]]


def bce(logits: Float[Tensor, "b h w"], targets: Float[Tensor, "b h w"]) -> Float[Tensor, ""]:
    """Binary cross-entropy, mean over pixels."""
    return F.binary_cross_entropy_with_logits(logits, targets)


def dice(logits: Float[Tensor, "b h w"], targets: Float[Tensor, "b h w"], smooth: float = 1.0) -> Float[Tensor, ""]:
    """1 - (2 |P T| + s) / (|P| + |T| + s) on probabilities (Milletari et al. 2016, with |P| not squared).

    The smoothing s keeps the loss defined, and near 0 for a near-empty prediction, where the target is empty.
    """
    probabilities = logits.sigmoid().flatten(1)
    targets = targets.flatten(1)
    overlap = (probabilities * targets).sum(1)
    return (1 - (2 * overlap + smooth) / (probabilities.sum(1) + targets.sum(1) + smooth)).mean()


def focal(
    logits: Float[Tensor, "b h w"], targets: Float[Tensor, "b h w"], gamma: float = 2.0, alpha: float = 0.25
) -> Float[Tensor, ""]:
    """Focal loss (Lin et al. 2017), mean over pixels; `alpha` weighs the positives, 1 - alpha the negatives."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    probabilities = logits.sigmoid()
    miss = probabilities + targets - 2 * probabilities * targets
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return (weight * miss**gamma * cross_entropy).mean()


TERMS: dict[str, MaskLoss] = {"bce": bce, "dice": dice, "focal": focal}


def mask_loss(
    logits: Float[Tensor, "b h w"], targets: Float[Tensor, "b th tw"], weights: Mapping[str, float]
) -> Float[Tensor, ""]:
    """Weighted sum of `TERMS`, with the logits resized (bilinear) to the targets."""
    resized = resize_logits(logits.float(), (targets.shape[1], targets.shape[2]))
    terms = [weight * TERMS[name](resized, targets) for name, weight in weights.items()]
    return torch.stack(terms).sum()


def resize_logits(logits: Float[Tensor, "b h w"], size: tuple[int, int]) -> Float[Tensor, "b sh sw"]:
    """Bilinear resize to (H, W), pixel centres aligned with the image's (align_corners=False)."""
    return F.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
