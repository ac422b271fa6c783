"""Losses that compare prompts with images, as functions of `Embeddings` and of which image each prompt is about.

All work on the b x b pairs of a batch of b prompts: row i is prompt i, column j the image of prompt j. An image with
several prompts in the batch has several columns, as if it had been loaded once for each of them. `image_ids`, a number
for each of the i images, are equal for those that are one and the same, such as two views of it; by default none are.
Vectors are normalised along their channels here, and everything is computed in float32, under autocast too.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cache_schema.errors import UsageError
from heads.inputs import Embeddings

SCALE = 1 / 0.07
"""What cosines are multiplied by where the embeddings bring no scale: the initial value of CLIP's, a temperature of
0.07."""

LARGEST_SCALE = 100.0
"""Where CLIP (Radford et al. 2021) stops its scale."""

SameImage = Literal["negatives", "masked", "positives"]
"""What a prompt and the columns of other prompts of its own image are to each other: negatives like any other image's,
nothing (left out of the softmax), or positives as good as its own column (Khosla et al. 2020, their outer sum)."""

Select = Literal["own", "pair"]
"""Who picks one of an image's k candidates: the prompt that is about the image, for all rows of its column (Talk2DINO),
or each pair's own prompt, also where the image is another's."""


def info_nce(
    embeddings: Embeddings,
    image_index: Int[Tensor, " b"],
    image_ids: Int[Tensor, " i"] | None = None,
    *,
    select: Select = "own",
    same_image: SameImage = "negatives",
    over_batch_squared: bool = True,
) -> Float[Tensor, ""]:
    """Symmetric cross-entropy of prompts and images, by default as Talk2DINO has it (Barsellotti et al. 2024).

    With t_i the prompt, v_j the candidate of prompt j's image that is most similar to it, all of length 1, and the
    logits l_ij = s t_i . v_j: half the mean over i of -log softmax_j(l_ij)_i, and half the mean over j of
    -log softmax_i(l_ij)_j. The scale s is that of the embeddings, or 1/0.07; it stops at 100. No gradient goes through
    the choice of a candidate.

    Args:
        select: see `Select`.
        same_image: see `SameImage`. By default prompts of one image are negatives of each other, as they were there.
        over_batch_squared: divide the means by b^2, as its code does by accident. Adam does not see the factor, but for
            its epsilon, which grows by as much against the gradients; beside other losses this one all but vanishes.
    """
    loss = _symmetric_cross_entropy(embeddings, image_index, image_ids, select, same_image)
    return loss / image_index.shape[0] ** 2 if over_batch_squared else loss


def clip_contrastive(
    embeddings: Embeddings,
    image_index: Int[Tensor, " b"],
    image_ids: Int[Tensor, " i"] | None = None,
    *,
    same_image: SameImage = "masked",
) -> Float[Tensor, ""]:
    """CLIP's loss (Radford et al. 2021): `info_nce` without its b^2; with one candidate, say a CLS token, no choosing.

    Args:
        same_image: see `SameImage`. By default prompts of one image are left out of each other's softmax; CLIP, whose
            batches hold no image twice, has no word on it, and JurasSigLIP's first stage takes `"negatives"`.
    """
    return _symmetric_cross_entropy(embeddings, image_index, image_ids, "own", same_image)


def sigmoid_contrastive(
    embeddings: Embeddings,
    image_index: Int[Tensor, " b"],
    image_ids: Int[Tensor, " i"] | None = None,
    *,
    select: Select = "own",
) -> Float[Tensor, ""]:
    """SigLIP's loss (Zhai et al. 2023): -1/b sum_ij log sigmoid(z_ij (s t_i . v_j + c)).

    z_ij is 1 where prompts i and j are about one image, else -1; s and c are the embeddings' scale and bias, learned
    from 10 and -10 in the paper.

    Raises:
        UsageError: the embeddings have no scale or no bias.
    """
    if embeddings.scale is None or embeddings.bias is None:
        raise UsageError(
            "the loss sigmoid_contrastive needs a learned scale and bias: "
            "build the head with contrastive_scale=10.0 and contrastive_bias=-10.0."
        )
    with _float32(embeddings):
        logits = embeddings.scale.float() * _similarities(embeddings, image_index, select) + embeddings.bias.float()
        signs = torch.where(_of_one_image(image_index, image_ids), 1.0, -1.0)
        return -F.logsigmoid(signs * logits).sum() / image_index.shape[0]


def _symmetric_cross_entropy(
    embeddings: Embeddings,
    image_index: Int[Tensor, " b"],
    image_ids: Int[Tensor, " i"] | None,
    select: Select,
    same_image: SameImage,
) -> Float[Tensor, ""]:
    with _float32(embeddings):
        logits = _scale(embeddings) * _similarities(embeddings, image_index, select)
        own = torch.eye(image_index.shape[0], dtype=torch.bool, device=logits.device)
        siblings = _of_one_image(image_index, image_ids)
        if same_image == "masked":
            logits = logits.masked_fill(siblings & ~own, -torch.inf)
        positives = siblings if same_image == "positives" else own
        return (_cross_entropy(logits, positives) + _cross_entropy(logits.T, positives)) / 2


def _cross_entropy(logits: Float[Tensor, "b b"], positives: Bool[Tensor, "b b"]) -> Float[Tensor, ""]:
    """Mean over rows, and in each over its positives, of -log softmax."""
    told = logits.log_softmax(1).masked_fill(~positives, 0.0).sum(1)
    return -(told / positives.sum(1)).mean()


def _similarities(embeddings: Embeddings, image_index: Int[Tensor, " b"], select: Select) -> Float[Tensor, "b b"]:
    """Cosines of b prompts with one candidate of each prompt's image."""
    text = F.normalize(embeddings.text.float(), dim=-1)
    image = F.normalize(embeddings.image.float(), dim=-1)
    if select == "pair":
        return torch.einsum("bd,ikd->bik", text, image).amax(-1).index_select(1, image_index)
    candidates = image.index_select(0, image_index)
    chosen = torch.einsum("bd,bkd->bk", text, candidates).argmax(-1)
    return text @ candidates[torch.arange(len(chosen), device=chosen.device), chosen].T


def _scale(embeddings: Embeddings) -> Float[Tensor, ""] | float:
    """The scale, at most `LARGEST_SCALE`.

    Where it is above, only gradients that lower it pass: it neither runs off nor is caught there.
    """
    if embeddings.scale is None:
        return SCALE
    scale = embeddings.scale.float()
    capped = scale + (scale.clamp(max=LARGEST_SCALE) - scale).detach()
    if capped.requires_grad:
        capped.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: torch.where(scale > LARGEST_SCALE, gradient.clamp(min=0), gradient)
        )
    return capped


def _of_one_image(image_index: Int[Tensor, " b"], image_ids: Int[Tensor, " i"] | None) -> Bool[Tensor, "b b"]:
    ids = image_index if image_ids is None else image_ids[image_index]
    return ids[:, None] == ids[None, :]


def _float32(embeddings: Embeddings) -> torch.autocast:
    """Cosines in half precision, times a scale of 14 to 100, would be off by more than a loss can bear."""
    return torch.autocast(embeddings.text.device.type, enabled=False)
