"""A head as a function of plain tensors, which is what torch.export and ONNX take."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from heads.inputs import Head, HeadInputs


class FlatHead(nn.Module):
    """A head that takes the fields of `HeadInputs` and gives those of `HeadOutputs` that it has, by name.

    Embeddings, which only losses need, are left out.
    """

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(
        self,
        features: Mapping[str, Tensor],
        cls: Mapping[str, Tensor],
        attention: Mapping[str, Tensor],
        prompt_tokens: Tensor,
        prompt_mask: Tensor,
        pooled: Tensor,
        image_index: Tensor,
    ) -> dict[str, Tensor]:
        """See `HeadInputs` and `HeadOutputs` for shapes."""
        outputs = self.head(HeadInputs(features, cls, prompt_tokens, prompt_mask, pooled, image_index, attention))
        named = {name: getattr(outputs, name) for name in _OUTPUTS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


_OUTPUTS = ("mask_logits", "iou", "no_target_logits", "word_attention")


def export_head(head: Head, inputs: HeadInputs) -> torch.export.ExportedProgram:
    """The program of a head for any number of images and prompts and any length of prompts, traced on some inputs.

    Give at least two images, two prompts of each and three tokens: torch takes sizes of 0 and 1 for constants.
    """
    images, prompts, tokens = (torch.export.Dim(name, min=1) for name in ("images", "prompts", "tokens"))
    by_name = {"features": inputs.features, "cls": inputs.cls, "attention": inputs.attention}
    mappings = {field: {name: {0: images} for name in tensors} for field, tensors in by_name.items()}
    shapes = {
        **mappings,
        "prompt_tokens": {0: prompts, 1: tokens},
        "prompt_mask": {0: prompts, 1: tokens},
        "pooled": {0: prompts},
        "image_index": {0: prompts},
    }
    arguments = (*(dict(tensors) for tensors in by_name.values()), inputs.prompt_tokens, inputs.prompt_mask)
    return torch.export.export(
        FlatHead(head.eval()), (*arguments, inputs.pooled, inputs.image_index), dynamic_shapes=shapes, strict=False
    )
