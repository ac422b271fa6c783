"""Encoders and a head as one function of plain tensors: pixels and token ids in, logits out.

What a `Predictor` does in steps, with pictures and sentences at either end, is here one module that torch can trace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor, nn

from extract.encoders.protocols import ImageEncoding, TextEncoding
from extract.preprocessing import Preprocessing
from heads.export import FlatHead
from heads.inputs import Head


class ImageGraph(nn.Module):
    """An image encoder from uint8 pixels on.

    Args:
        tower: normalised pixels (i, 3, h, w) to an `ImageEncoding`; in float32.
        preprocessing: says how pixels are normalised.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, tower: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self._tower = tower
        self.input_size = preprocessing.input_size
        self.register_buffer("mean", torch.tensor(preprocessing.mean), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std), persistent=False)

    def forward(self, pixels: UInt8[Tensor, "i h w 3"]) -> ImageEncoding:
        """Features of i RGB images at the input size."""
        encoding: ImageEncoding = self._tower(((pixels.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2))
        return encoding


@dataclass(frozen=True)
class PaddingToLimit:
    """How prompts are padded for a model that was trained to read the padding: to `limit` tokens, on one side."""

    limit: int
    token: int
    is_left: bool


class PromptGraph(nn.Module):
    """A text encoder from padded token ids on; says what `extract.encoders.text.TextTower` says of the unpadded ones.

    Args:
        model: of transformers, in float32.
        pooled: which output of the model is the pooled feature.
        padding: None for a model that masks its padding.
    """

    def __init__(self, model: nn.Module, pooled: str, padding: PaddingToLimit | None) -> None:
        super().__init__()
        self._model = model
        self._pooled = pooled
        self._padding = padding

    def forward(self, token_ids: Int[Tensor, "b l"], token_mask: Bool[Tensor, "b l"]) -> TextEncoding:
        """Features of b prompts whose tokens stand in front, where the mask is True; other ids count for nothing."""
        lengths = token_mask.sum(1, keepdim=True)
        if self._padding is None:
            # A repeated last token is never taken for the token at which CLIP pools, whatever ids stand there.
            given = torch.where(token_mask, token_ids, token_ids.gather(1, lengths - 1))
            output = self._model(input_ids=given, attention_mask=token_mask.long())
            return TextEncoding(output.last_hidden_state, token_mask, getattr(output, self._pooled))
        limit = self._padding.limit
        start = limit - lengths if self._padding.is_left else torch.zeros_like(lengths)
        places = torch.arange(limit, device=token_ids.device) - start
        own = (places >= 0) & (places < lengths)
        kept = token_ids.gather(1, torch.where(own, places, 0))
        output = self._model(input_ids=torch.where(own, kept, self._padding.token))
        columns = torch.arange(token_ids.shape[1], device=token_ids.device) + start
        states, columns = output.last_hidden_state, columns.expand_as(token_ids).clamp(max=limit - 1)
        tokens = states.gather(1, columns[..., None].expand(-1, -1, states.shape[2]))
        return TextEncoding(tokens, token_mask, getattr(output, self._pooled))


class Pipeline(nn.Module):
    """Images and tokenized prompts to what a head says of them. Features stay in float32: nothing is rounded as in a
    cache.
    """

    def __init__(self, images: ImageGraph, prompts: PromptGraph, head: Head) -> None:
        super().__init__()
        self.images = images
        self.prompts = prompts
        self._head = FlatHead(head)

    def forward(
        self,
        pixels: UInt8[Tensor, "i h w 3"],
        token_ids: Int[Tensor, "b l"],
        token_mask: Bool[Tensor, "b l"],
        image_index: Int[Tensor, " b"],
    ) -> dict[str, Tensor]:
        """What `HeadOutputs` has, by name, of b prompts about i images.

        Args:
            pixels: RGB at the encoder's input size.
            token_ids, token_mask: tokens in front, padding behind them, where the mask is False.
            image_index: which of the images each prompt is about.
        """
        seen, said = self.images(pixels), self.prompts(token_ids, token_mask)
        tokens = said.tokens.masked_fill(~token_mask[..., None], 0)
        return self._head(
            dict(seen.features), dict(seen.cls), dict(seen.attention), tokens, token_mask, said.pooled, image_index
        )


PIPELINE_SIZES = {
    "pixels": ("images",),
    "token_ids": ("prompts", "tokens"),
    "token_mask": ("prompts", "tokens"),
    "image_index": ("prompts",),
}
"""The inputs of a pipeline, in order, and what their free sizes are called."""


def export_pipeline(pipeline: Pipeline, inputs: Mapping[str, Tensor], max_tokens: int) -> torch.export.ExportedProgram:
    """The program of a pipeline for any number of images and prompts of up to `max_tokens` tokens.

    Args:
        inputs: by name, to trace it on: at least two images, two prompts of each and three tokens.
    """
    images, prompts = (torch.export.Dim(name, min=1) for name in ("images", "prompts"))
    free = {"images": images, "prompts": prompts, "tokens": torch.export.Dim("tokens", min=1, max=max_tokens)}
    shapes = {name: {axis: free[size] for axis, size in enumerate(sizes)} for name, sizes in PIPELINE_SIZES.items()}
    arguments = tuple(inputs[name] for name in PIPELINE_SIZES)
    with torch.no_grad():
        return torch.export.export(pipeline.eval(), arguments, dynamic_shapes=shapes, strict=False)


def pad_prompts(token_ids: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "b l"], Bool[Tensor, "b l"]]:
    """Token ids of prompts with zeros behind them, and a mask that is True on tokens."""
    lengths = torch.tensor([len(ids) for ids in token_ids])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return torch.tensor([[*ids, *[0] * (mask.shape[1] - len(ids))] for ids in token_ids]), mask
