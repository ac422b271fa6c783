"""How well each class fits each place of a window: from 0 to 1, by a head's mask logits or by Talk2DINO's cosines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cache_schema.errors import UsageError
from cache_schema.quantize import float_dtype
from evaluate.open_vocabulary.background import clean_background, default_background
from evaluate.open_vocabulary.classes import ClassPrompts
from evaluate.rounding import as_cached
from extract.encoders.protocols import ImageEncoding
from extract.encoders.specs import AttentionOutput
from heads.inputs import Head, HeadInputs
from heads.talk2dino import Talk2DinoHead

LOGITS: AttentionOutput = "logits"
"""The attention output that background cleaning reads."""

PAIRS_AT_ONCE = 64
"""Pairs of a window and a prompt that a head is given in one call: what bounds its memory, however many classes."""


@runtime_checkable
class ClassScorer(Protocol):
    """Scores windows for a fixed list of classes."""

    @property
    def background(self) -> float:
        """The level of a background channel that suits these scores, where nobody names another."""
        ...

    @property
    def align_corners(self) -> bool:
        """How scores are stretched over the pixels of their window."""
        ...

    def score(self, encoding: ImageEncoding) -> Float[Tensor, "w c h w_"]:
        """(w, c, h, w_) scores from 0 to 1 of w windows, on the scorer's own grid."""
        ...

    def describe(self) -> dict[str, Any]:
        """As plain JSON, what of it belongs beside a number."""
        ...


def compares_cosines(head: Head) -> bool:
    """Whether a head is scored by cosines: Talk2DINO's projection, unless it learned logits from masks."""
    return isinstance(head, Talk2DinoHead) and head.log_gain is None


def make_scorer(
    head: Head, prompts: ClassPrompts, *, cleaning: float = 0.0, image_dtype: str = "float32"
) -> ClassScorer:
    """The scorer that suits a head.

    Args:
        cleaning: the strength of background cleaning, 0 for none.
        image_dtype: the data type in which the head's training features were cached.

    Raises:
        UsageError: background cleaning is asked for with a head that does not compare cosines.
    """
    if compares_cosines(head):
        assert isinstance(head, Talk2DinoHead)
        return CosineScorer(head, prompts, cleaning=cleaning, image_dtype=image_dtype)
    if cleaning:
        raise UsageError("only Talk2DINO's projection cleans the background: leave --cleaning out with this head.")
    return HeadScorer(head, prompts, image_dtype=image_dtype)


def _describe_resize(align_corners: bool) -> str:
    """How scores are stretched inside a window, as a protocol says it."""
    return f"bilinear, align_corners={align_corners}"


class CosineScorer:
    """The sigmoid of the cosine between each patch and each class that Talk2DINO projects.

    The features of a class's prompts are averaged before they are projected and normalised. Of the head's settings
    `logit_scale` and `background` play no part.
    """

    align_corners = True  # as the published evaluation has it

    def __init__(
        self, head: Talk2DinoHead, prompts: ClassPrompts, *, cleaning: float = 0.0, image_dtype: str = "float32"
    ) -> None:
        self._layer = head.layers[0]
        self._cleaning = cleaning
        self._image_dtype = image_dtype
        weight = head.projection.linear_layer.weight
        prompts = prompts.to(weight.device)
        mean = prompts.mean_tokens() if head.reads_tokens else prompts.mean_pooled()
        with torch.inference_mode():
            self._classes = F.normalize(head.projection(mean), dim=-1)

    @property
    def background(self) -> float:
        return default_background(self._classes.shape[1])

    @torch.inference_mode()
    def score(self, encoding: ImageEncoding) -> Float[Tensor, "w c gh gw"]:
        """(w, c, gh, gw) on the grid of the patches."""
        device = self._classes.device
        patches = as_cached(encoding.features[self._layer], self._image_dtype).to(device).float()
        masks = torch.einsum("whxd,cd->wchx", F.normalize(patches, dim=-1), self._classes).sigmoid()
        if not self._cleaning:
            return masks
        logits = as_cached(encoding.attention[LOGITS], float_dtype(self._image_dtype)).to(device).float()
        return clean_background(masks, logits, patches, self._classes, self._cleaning)

    def describe(self) -> dict[str, Any]:
        return {
            "scores": "sigmoid of cosines",
            "prompts_of_class": "averaged before the projection",
            "inside_window": _describe_resize(self.align_corners),
        }


class HeadScorer:
    """The sigmoid of a head's mask logits.

    A head that reads pooled prompts alone is given the mean of a class's prompts. One that reads tokens is given each
    prompt, as sentences of different lengths have no mean, and its logits are averaged.
    """

    background = 0.5
    align_corners = False  # as logits were resized when the head learned, and are in `headstart evaluate`

    def __init__(self, head: Head, prompts: ClassPrompts, *, image_dtype: str = "float32") -> None:
        self._head = head.eval()
        self._image_dtype = image_dtype
        self._device = next(head.parameters()).device
        if not head.reads_tokens:
            pooled = prompts.mean_pooled()
            num, width = len(pooled), prompts.tokens.shape[2]
            prompts = ClassPrompts(
                pooled, pooled.new_zeros(num, 0, width), torch.zeros(num, 0, dtype=torch.bool), torch.arange(num)
            )
        self._prompts = prompts.to(self._device)

    @torch.inference_mode()
    def score(self, encoding: ImageEncoding) -> Float[Tensor, "w c h w_"]:
        """(w, c, h, w_) at the resolution of the head."""
        prompts, features = self._prompts, self._as_inputs(encoding)
        num_windows = len(next(iter(features["features"].values())))
        total: Tensor | None = None
        for rows in self._in_chunks(num_windows):
            windows = torch.arange(num_windows, device=self._device).repeat_interleave(len(rows))
            of_each = rows.repeat(num_windows)
            inputs = HeadInputs(
                **features,
                prompt_tokens=prompts.tokens[of_each],
                prompt_mask=prompts.mask[of_each],
                pooled=prompts.pooled[of_each],
                image_index=windows,
            )
            logits = self._head(inputs).mask_logits.float().unflatten(0, (num_windows, len(rows)))
            if total is None:
                total = logits.new_zeros(num_windows, prompts.num_classes, *logits.shape[2:])
            total.index_add_(1, prompts.class_index[rows], logits)
        assert total is not None
        counts = torch.bincount(prompts.class_index)
        return (total / counts[:, None, None]).sigmoid()

    def describe(self) -> dict[str, Any]:
        averaged = "logits averaged" if self._head.reads_tokens else "averaged before the head"
        return {
            "scores": "sigmoid of mask logits",
            "prompts_of_class": averaged,
            "inside_window": _describe_resize(self.align_corners),
        }

    def _in_chunks(self, num_windows: int) -> Iterator[Tensor]:
        """Rows of prompts, as many at once as a call may have."""
        rows = torch.arange(len(self._prompts.pooled), device=self._device)
        at_once = max(1, PAIRS_AT_ONCE // num_windows)
        for start in range(0, len(rows), at_once):
            yield rows[start : start + at_once]

    def _as_inputs(self, encoding: ImageEncoding) -> dict[str, Mapping[str, Tensor]]:
        """What the head reads of windows, as the cache would give it."""
        head, dtype = self._head, self._image_dtype
        of_cls = float_dtype(dtype)

        def move(values: Tensor, dtype: str) -> Tensor:
            return as_cached(values, dtype).to(self._device).float()

        return {
            "features": {layer: move(encoding.features[layer], dtype) for layer in head.layers},
            "cls": {layer: move(encoding.cls[layer], of_cls) for layer in head.layers if layer in encoding.cls},
            "attention": {name: move(encoding.attention[name], of_cls) for name in head.attention},
        }
