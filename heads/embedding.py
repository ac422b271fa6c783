"""Heads under losses that only compare: their embeddings, without masks, and with those of other processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed
import torch.distributed.nn.functional
import torch.nn.functional as F
from torch import Tensor, nn

from heads.inputs import Head, HeadInputs, HeadOutputs
from heads.losses import Targets


class Embedder(nn.Module):
    """A head that is asked for its embeddings alone, and reads no more of a cache than they take."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, inputs: HeadInputs) -> HeadOutputs:
        """Embeddings, and masks of 0 x 0."""
        return HeadOutputs(inputs.pooled.new_empty(len(inputs.pooled), 0, 0), embeddings=self.head.embed(inputs))


def gather_pairs(outputs: HeadOutputs, targets: Targets) -> tuple[HeadOutputs, Targets]:
    """With the embeddings of all processes, rank by rank, so that each compares every prompt with every image.

    Gradients flow to the process that an embedding comes from. Where each process then takes the loss over all pairs
    and gradients are averaged over processes, they are those of one process with all of the batches.

    Args:
        targets: all but `image_index` and `image_ids` stays this process's own.
    """
    embeddings, index, ids = outputs.embeddings, targets.image_index, targets.image_ids
    if embeddings is None or index is None or not torch.distributed.is_initialized():
        return outputs, targets
    own = torch.tensor([len(embeddings.image), len(embeddings.text)], device=index.device)
    sizes = torch.stack(_all_gather(own)).tolist()
    num_images, num_prompts = ([size[side] for size in sizes] for side in (0, 1))
    starts = torch.tensor([0, *num_images]).cumsum(0)[torch.distributed.get_rank()]
    image, text = _gather(embeddings.image, num_images), _gather(embeddings.text, num_prompts)
    ids = None if ids is None else _gather(ids, num_images)
    everyones = replace(embeddings, image=image, text=text)
    return replace(outputs, embeddings=everyones), replace(
        targets, image_index=_gather(index + starts.to(index), num_prompts), image_ids=ids
    )


def _gather(mine: Tensor, lengths: Sequence[int]) -> Tensor:
    """The rows of all processes, of which each has another number; shorter ones travel padded."""
    padding = [0, 0] * (mine.ndim - 1) + [0, max(lengths) - len(mine)]
    parts = _all_gather(F.pad(mine, padding))
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def _all_gather(tensor: Tensor) -> list[Tensor]:
    if tensor.requires_grad:
        return list(torch.distributed.nn.functional.all_gather(tensor))  # type: ignore[no-untyped-call]
    parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return parts
