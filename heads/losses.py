"""Losses: each the mean over the prompts of a batch, taken at the size of the targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cache_schema.errors import UsageError
from heads.contrastive import clip_contrastive, info_nce, sigmoid_contrastive
from heads.inputs import HeadOutputs


@dataclass(frozen=True)
class Targets:
    """What b prompts should have been answered with.

    Args:
        masks: 1 where a pixel belongs to the target, else 0.
        no_target: the prompt names nothing in its image.
        labelled: 1 where somebody said which of the two a pixel is, else 0; None where they all are.
        image_index: which of i images each prompt is about, for losses that compare prompts with images.
        image_ids: equal numbers for those of the i images that are one and the same, such as two views of it.
    """

    masks: Float[Tensor, "b h w"]
    no_target: Bool[Tensor, " b"]
    labelled: Float[Tensor, "b h w"] | None = None
    image_index: Int[Tensor, " b"] | None = None
    image_ids: Int[Tensor, " i"] | None = None

    def to(self, device: torch.device | str) -> Targets:
        """The same targets on a device."""
        moved: dict[str, Any] = {
            name: value if value is None else value.to(device) for name, value in vars(self).items()
        }
        return replace(self, **moved)


def bce(
    logits: Float[Tensor, "b h w"],
    targets: Float[Tensor, "b h w"],
    labelled: Float[Tensor, "b h w"] | None = None,
) -> Float[Tensor, ""]:
    """Binary cross-entropy, mean over labelled pixels."""
    if labelled is None:
        return F.binary_cross_entropy_with_logits(logits, targets)
    return _mean(F.binary_cross_entropy_with_logits(logits, targets, reduction="none"), labelled)


def dice(
    logits: Float[Tensor, "b h w"],
    targets: Float[Tensor, "b h w"],
    labelled: Float[Tensor, "b h w"] | None = None,
    smooth: float = 1.0,
) -> Float[Tensor, ""]:
    """1 - (2 |P T| + s) / (|P| + |T| + s) on probabilities (Milletari et al. 2016, with |P| not squared).

    The smoothing s keeps the loss defined, and near 0 for a near-empty prediction, where the target is empty.
    """
    probabilities = logits.sigmoid()
    if labelled is not None:
        probabilities, targets = probabilities * labelled, targets * labelled
    probabilities, targets = probabilities.flatten(1), targets.flatten(1)
    overlap = (probabilities * targets).sum(1)
    return (1 - (2 * overlap + smooth) / (probabilities.sum(1) + targets.sum(1) + smooth)).mean()


def focal(
    logits: Float[Tensor, "b h w"],
    targets: Float[Tensor, "b h w"],
    labelled: Float[Tensor, "b h w"] | None = None,
    gamma: float = 2.0,
    alpha: float = 0.25,
) -> Float[Tensor, ""]:
    """Focal loss (Lin et al. 2017), mean over labelled pixels; `alpha` weighs positives, 1 - alpha negatives."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    probabilities = logits.sigmoid()
    miss = probabilities + targets - 2 * probabilities * targets
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    values = weight * miss**gamma * cross_entropy
    return values.mean() if labelled is None else _mean(values, labelled)


def iou_regression(
    logits: Float[Tensor, "b h w"],
    targets: Float[Tensor, "b h w"],
    predicted: Float[Tensor, " b"],
    labelled: Float[Tensor, "b h w"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared error of a predicted IoU (Kirillov et al. 2023). Of an empty mask for an empty target it is 1."""
    return F.mse_loss(predicted, mask_iou(logits.detach() > 0, targets > 0.5, labelled))


def mask_iou(
    predicted: Bool[Tensor, "b h w"],
    truth: Bool[Tensor, "b h w"],
    labelled: Float[Tensor, "b h w"] | None = None,
) -> Float[Tensor, " b"]:
    """IoU of each pair of masks over labelled pixels; 1 where both are empty."""
    intersection, union = overlap(predicted, truth, labelled)
    return torch.where(union > 0, intersection / union.clamp(min=1), torch.ones_like(union))


def overlap(
    predicted: Bool[Tensor, "b h w"],
    truth: Bool[Tensor, "b h w"],
    labelled: Float[Tensor, "b h w"] | None = None,
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Labelled pixels in both masks and in either, for each of b pairs."""
    if labelled is not None:
        predicted, truth = predicted & (labelled > 0.5), truth & (labelled > 0.5)
    both, either = (predicted & truth).flatten(1).sum(1), (predicted | truth).flatten(1).sum(1)
    return both.float(), either.float()


MASK_TERMS: dict[str, Callable[..., Float[Tensor, ""]]] = {"bce": bce, "dice": dice, "focal": focal}
"""Terms on (logits, masks, labelled)."""

CONTRASTIVE_TERMS: dict[str, Callable[..., Float[Tensor, ""]]] = {
    "info_nce": info_nce,
    "clip_contrastive": clip_contrastive,
    "sigmoid_contrastive": sigmoid_contrastive,
}
"""Terms on (embeddings, image_index, image_ids)."""

TERMS = (*MASK_TERMS, "iou", "no_target", *CONTRASTIVE_TERMS)
"""The names of all terms."""


def needs_masks(weights: Mapping[str, float]) -> bool:
    """Whether a loss looks at masks."""
    return any(name in MASK_TERMS or name == "iou" for name in weights)


def compares_only(weights: Mapping[str, float]) -> bool:
    """Whether a loss looks at embeddings and nothing else, so that a head need not say where anything is."""
    return all(name in CONTRASTIVE_TERMS for name in weights)


def loss_terms(
    outputs: HeadOutputs,
    targets: Targets,
    weights: Mapping[str, float],
    arguments: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Each of the `TERMS` that has a weight, times its weight. Logits are resized (bilinear) to the targets.

    Args:
        arguments: of a term by its name, such as `{"focal": {"gamma": 1.0}}`.

    Raises:
        UsageError: a term needs something that the head does not say.
    """
    found: dict[str, Tensor] = {}
    resized = outputs.mask_logits.float()
    if needs_masks(weights):
        resized = resize_logits(resized, (targets.masks.shape[1], targets.masks.shape[2]))
    for name, weight in weights.items():
        more = (arguments or {}).get(name, {})
        if name in MASK_TERMS:
            found[name] = weight * MASK_TERMS[name](resized, targets.masks, targets.labelled, **more)
        elif name == "iou":
            predicted = _said(outputs.iou, name, "predict its IoU")
            found[name] = weight * iou_regression(resized, targets.masks, predicted.float(), targets.labelled)
        elif name == "no_target":
            logits = _said(outputs.no_target_logits, name, "say when there is no target")
            found[name] = weight * F.binary_cross_entropy_with_logits(logits.float(), targets.no_target.float())
        else:
            if outputs.embeddings is None or targets.image_index is None:
                raise _missing(name, "give embeddings to compare")
            value = CONTRASTIVE_TERMS[name](outputs.embeddings, targets.image_index, targets.image_ids, **more)
            found[name] = weight * value
    return found


def total_loss(
    outputs: HeadOutputs,
    targets: Targets,
    weights: Mapping[str, float],
    arguments: Mapping[str, Mapping[str, Any]] | None = None,
) -> Float[Tensor, ""]:
    """Weighted sum of `TERMS`; see `loss_terms`."""
    return torch.stack(list(loss_terms(outputs, targets, weights, arguments).values())).sum()


def resize_logits(logits: Float[Tensor, "b h w"], size: tuple[int, int]) -> Float[Tensor, "b sh sw"]:
    """Bilinear resize to (H, W), pixel centres aligned with the image's (align_corners=False)."""
    return F.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def _mean(values: Tensor, labelled: Tensor) -> Tensor:
    return (values * labelled).sum() / labelled.sum().clamp(min=1)


def _said(said: Tensor | None, term: str, what: str) -> Tensor:
    if said is None:
        raise _missing(term, what)
    return said


def _missing(term: str, what: str) -> UsageError:
    return UsageError(f"this head does not {what}, which the loss {term!r} needs; leave it out, or take another head.")
