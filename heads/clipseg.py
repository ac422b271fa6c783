"""CLIPSeg's decoder (Lüddecke & Ecker 2022): hidden states from the deepest up, each reduced and added, FiLM once.

It was made for CLIP ViT-B/16, whose weights it froze: `openai/clip-vit-base-patch16` gives the features and the pooled
prompts that published decoders were trained on. `initial` takes those over from checkpoints of
`transformers.CLIPSegForImageSegmentation`, and then gives their logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cache_schema.errors import UsageError
from heads.clipseg_weights import CLIPSegReport, load_clipseg_weights
from heads.inputs import FeatureShapes, Head, HeadInputs, HeadOutputs

LAYERS = ("4", "7", "10")
"""The paper and transformers' `extract_layers` count blocks from 0: their 3, 6, 9 are `hidden_states` 4, 7, 10, and so
a cache names them."""


class CLIPSegHead(Head):
    """Post-norm transformer encoder over the hidden states of an image encoder, then a learned upsampling.

    Args:
        image_widths: width of each cached layer it reads.
        pooled_width: width of the pooled prompt features.
        layers: cached layers it reads, the shallowest first; their grids must be equal.
        patch_size: side of the square of logits that each token gives, nominally the encoder's patch size.
        dim: width that every layer is reduced to; `num_heads` heads of the encoder layers share it.
        hidden_dim: width of their feed-forward.
        conditional_layer: before which encoder layer the prompt comes in, 0 for the first, where the deepest features
            are. What lies before it is computed once for each image.
        refined: upsample by a 3x3 convolution and two transposed ones, each of stride `patch_size // 4`, instead of
            one: transformers' `use_complex_transposed_convolution`. A token of a patch of 16 gives a square of 16.
        dropout: in encoder layers, as where CLIPSeg was trained; transformers has none.
        with_cls: read CLS tokens as well; they are mixed with the others and dropped before the upsampling. False is
            for encoders that have none.
    """

    initial_report: CLIPSegReport | None = None
    reads_tokens = False

    def __init__(
        self,
        *,
        image_widths: Sequence[int],
        pooled_width: int,
        layers: Sequence[str],
        patch_size: int = 16,
        dim: int = 64,
        num_heads: int = 4,
        hidden_dim: int = 2048,
        conditional_layer: int = 0,
        refined: bool = False,
        dropout: float = 0.1,
        with_cls: bool = True,
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.conditional_layer = conditional_layer
        self.with_cls = with_cls
        self.film_mul = nn.Linear(pooled_width, dim)
        self.film_add = nn.Linear(pooled_width, dim)
        self.reduces = nn.ModuleList(nn.Linear(width, dim) for width in reversed(image_widths))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, num_heads, hidden_dim, dropout, batch_first=True) for _ in self.layers
        )
        self.transposed_convolution: nn.Module
        if refined:
            side = patch_size // 4
            self.transposed_convolution = nn.Sequential(
                nn.Conv2d(dim, dim, 3, padding=1),
                nn.ReLU(),
                nn.ConvTranspose2d(dim, dim // 2, side, stride=side),
                nn.ReLU(),
                nn.ConvTranspose2d(dim // 2, 1, side, stride=side),
            )
        else:
            self.transposed_convolution = nn.ConvTranspose2d(dim, 1, patch_size, stride=patch_size)

    def forward(self, inputs: HeadInputs) -> HeadOutputs:
        """(b, gh * patch_size, gw * patch_size) mask logits."""
        deepest_first = self.layers[::-1]
        height, width = inputs.features[deepest_first[0]].shape[1:3]
        tokens: Tensor | None = None
        for position, (layer, reduce, block) in enumerate(zip(deepest_first, self.reduces, self.blocks, strict=True)):
            reduced = reduce(self._tokens(inputs, layer))
            if position > self.conditional_layer:
                reduced = reduced.index_select(0, inputs.image_index)
            tokens = reduced if tokens is None else tokens + reduced
            if position == self.conditional_layer:
                scale, shift = self.film_mul(inputs.pooled)[:, None], self.film_add(inputs.pooled)[:, None]
                tokens = scale * tokens.index_select(0, inputs.image_index) + shift
            tokens = block(tokens)
        assert tokens is not None, "there is at least one layer"
        patches = tokens[:, 1:] if self.with_cls else tokens
        grid = torch.unflatten(patches.transpose(1, 2), 2, (height, width))
        return HeadOutputs(self.transposed_convolution(grid).squeeze(1))

    def _tokens(self, inputs: HeadInputs, layer: str) -> Float[Tensor, "i n d"]:
        patches = inputs.features[layer].flatten(1, 2)
        return torch.cat([inputs.cls[layer][:, None], patches], dim=1) if self.with_cls else patches


def build_clipseg(
    shapes: FeatureShapes,
    *,
    layers: Sequence[str] | None = None,
    patch_size: int = 16,
    dim: int = 64,
    num_heads: int = 4,
    hidden_dim: int = 2048,
    conditional_layer: int = 0,
    refined: bool = False,
    dropout: float = 0.1,
    with_cls: bool = True,
    initial: str | None = None,
) -> CLIPSegHead:
    """A CLIPSeg decoder for cached features, by default on the layers that CLIPSeg reads: 4, 7 and 10.

    1,073,153 parameters by default for CLIP ViT-B/16 (width 768, pooled 512), 1,127,009 refined.

    Args:
        initial: a folder or hub id of a `CLIPSegForImageSegmentation` of transformers, such as
            "CIDAS/clipseg-rd64-refined", which the head then is; see `heads.clipseg_weights`.

        See `CLIPSegHead` for the others.
    """
    if layers is None and (absent := [layer for layer in LAYERS if layer not in shapes.grids]):
        raise UsageError(
            f"CLIPSeg reads layers {', '.join(LAYERS)} by default, but this cache lacks {', '.join(absent)}: "
            f"extract with --layers {' '.join(LAYERS)}, or set `layers`, the shallowest first, to some of "
            f"{', '.join(shapes.grids)}."
        )
    layers = shapes.layers_of_one_grid([layers] if isinstance(layers, str) else layers or LAYERS)
    for name, count in (("dim", dim), ("num_heads", num_heads), ("hidden_dim", hidden_dim), ("patch_size", patch_size)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1")
    if dim % num_heads:
        raise ValueError(f"a width of {dim} cannot be shared by {num_heads} heads; give another dim or num_heads")
    if not 0 <= conditional_layer < len(layers):
        raise ValueError(f"conditional_layer is {conditional_layer}; give one from 0 to {len(layers) - 1}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; give a share from 0 to below 1")
    if refined and (patch_size < 4 or dim < 2):
        raise ValueError("refined upsampling needs a patch_size of at least 4 and a dim of at least 2")
    if with_cls and not all(layer in shapes.cls_widths for layer in layers):
        bare = ", ".join(layer for layer in layers if layer not in shapes.cls_widths)
        raise UsageError(
            f"clipseg reads CLS tokens, and layers {bare} were cached without; name others, or set with_cls to false."
        )
    head = CLIPSegHead(
        image_widths=[shapes.grids[layer][2] for layer in layers],
        pooled_width=shapes.pooled_width,
        layers=layers,
        patch_size=patch_size,
        dim=dim,
        num_heads=num_heads,
        hidden_dim=hidden_dim,
        conditional_layer=conditional_layer,
        refined=refined,
        dropout=dropout,
        with_cls=with_cls,
    )
    if initial is not None:
        head.initial_report = load_clipseg_weights(head, initial)
    return head
