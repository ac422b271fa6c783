"""A head as a function of plain tensors, which is what torch.export and ONNX take."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from heads.inputs import FeatureShapes, Head, HeadInputs


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
_SIZES = {
    "features": ("images",),
    "cls": ("images",),
    "attention": ("images",),
    "prompt_tokens": ("prompts", "tokens"),
    "prompt_mask": ("prompts", "tokens"),
    "pooled": ("prompts",),
    "image_index": ("prompts",),
}
"""The sizes of each field of `HeadInputs` that are free: its first ones."""


def flat_inputs(inputs: HeadInputs) -> dict[str, Tensor]:
    """What a `FlatHead` takes, in its order, each tensor by a name of its own: those of a mapping are called
    `features/LAYER`, `cls/LAYER` and `attention/OUTPUT`, as in a store.
    """
    mappings = {"features": inputs.features, "cls": inputs.cls, "attention": inputs.attention}
    named = {f"{field}/{name}": tensor for field, tensors in mappings.items() for name, tensor in tensors.items()}
    return {
        **named,
        "prompt_tokens": inputs.prompt_tokens,
        "prompt_mask": inputs.prompt_mask,
        "pooled": inputs.pooled,
        "image_index": inputs.image_index,
    }


def free_sizes(inputs: HeadInputs) -> dict[str, tuple[str, ...]]:
    """The free sizes of what `flat_inputs` gives, by the same names: `("prompts", "tokens")` and the like."""
    return {name: _SIZES[name.partition("/")[0]] for name in flat_inputs(inputs)}


def make_example(
    head: Head, shapes: FeatureShapes, num_images: int, num_prompts: int, num_tokens: int, seed: int = 0
) -> HeadInputs:
    """Noise in place of the layers and attention outputs that a head reads, to trace or to compare it on.

    Prompts go round the images; the first has `num_tokens` tokens, the next one less, and so on, none less than one.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    lengths = num_tokens - torch.arange(num_prompts) % num_tokens
    mask = torch.arange(num_tokens) < lengths[:, None]
    return HeadInputs(
        features={layer: noise(num_images, *shapes.grids[layer]) for layer in head.layers},
        cls={layer: noise(num_images, shapes.cls_widths[layer]) for layer in head.layers if layer in shapes.cls_widths},
        prompt_tokens=noise(num_prompts, num_tokens, shapes.token_width) * mask[..., None],
        prompt_mask=mask,
        pooled=noise(num_prompts, shapes.pooled_width),
        image_index=torch.arange(num_prompts) % num_images,
        attention={output: noise(num_images, *shapes.attention[output]) for output in head.attention},
    )


def export_head(head: Head, inputs: HeadInputs) -> torch.export.ExportedProgram:
    """The program of a head for any number of images and prompts and any length of prompts, traced on some inputs.

    Give at least two images, two prompts of each and three tokens: torch takes sizes of 0 and 1 for constants.
    """
    free = {name: torch.export.Dim(name, min=1) for name in ("images", "prompts", "tokens")}
    axes = {field: {axis: free[size] for axis, size in enumerate(sizes)} for field, sizes in _SIZES.items()}
    by_name = {"features": inputs.features, "cls": inputs.cls, "attention": inputs.attention}
    mappings = {field: dict.fromkeys(tensors, axes[field]) for field, tensors in by_name.items()}
    shapes = {**axes, **mappings}
    arguments = (*(dict(tensors) for tensors in by_name.values()), inputs.prompt_tokens, inputs.prompt_mask)
    return torch.export.export(
        FlatHead(head.eval()), (*arguments, inputs.pooled, inputs.image_index), dynamic_shapes=shapes, strict=False
    )
