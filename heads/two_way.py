"""PromptSeg-Lightweight: a neck over several layers, and SAM's two-way decoder with the prompt's text as its point.

With its default arguments this is PromptSeg's structure: FPN neck, pooled prompt as a point embedding, three two-way
blocks, one mask with its IoU. The system's own list of wants is in the arguments: `text="tokens"` gives the blocks the
whole token sequence, which a pooled prompt has lost.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cache_schema.errors import unknown_name
from heads.fpn_neck import FpnNeck
from heads.inputs import FeatureShapes, Head, HeadInputs, HeadOutputs
from heads.sam_decoder import FourierPositions, SamDecoder
from heads.sam_weights import SamReport, load_sam

TEXTS = ("pooled", "tokens", "both")
"""What may enter of a prompt."""


class TwoWayHead(Head):
    """Neck, text projection and decoder.

    Args:
        layers: cached layers it reads, in the order of the neck's levels.
        neck: layers -> (i, dim, h, w).
        positions: encodes the cells of that grid.
        decoder: draws a mask from image, positions and prompt tokens.
        pooled_width: width of the pooled prompt, which enters as one token; None if it does not.
        token_width: width of the prompt tokens, which enter one by one; None if they do not.
    """

    initial_report: SamReport | None = None
    """What of a SAM checkpoint the head started from."""

    shows_attention: bool = False
    """Say where each prompt token looks, for whoever looks at it; training has no use for it."""

    def __init__(
        self,
        *,
        layers: Sequence[str],
        neck: FpnNeck,
        positions: FourierPositions,
        decoder: SamDecoder,
        dim: int,
        pooled_width: int | None,
        token_width: int | None,
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.reads_tokens = token_width is not None
        self.neck = neck
        self.positions = positions
        self.decoder = decoder
        self.pooled_projection = None if pooled_width is None else nn.Linear(pooled_width, dim)
        self.token_projection = None if token_width is None else nn.Linear(token_width, dim)

    def forward(self, inputs: HeadInputs) -> HeadOutputs:
        """(b, 4h, 4w) mask logits on the neck's grid of h x w, their IoU, and where the head has them no-target logits;
        if prompt tokens enter and attention is to be shown, that of each token to the image.
        """
        image = self.neck([inputs.features[layer] for layer in self.layers])
        positions = self.positions(image.shape[2], image.shape[3])
        prompt, mask = self._prompt(inputs)
        weigh = self.shows_attention and mask is not None
        decoded = self.decoder(image, positions, prompt, mask, inputs.image_index, weigh=weigh)
        attention = decoded.attention
        if attention is not None:
            words = attention if self.pooled_projection is None else attention[:, 1:]
            attention = words * inputs.prompt_mask[:, :, None, None]
        return HeadOutputs(decoded.mask_logits, decoded.iou, decoded.no_target_logits, attention)

    def _prompt(self, inputs: HeadInputs) -> tuple[Float[Tensor, "b t d"], Bool[Tensor, "b t"] | None]:
        """The prompt as the decoder takes it: the pooled vector first, then the tokens; a mask if there is padding."""
        points, mask = [], None
        if self.pooled_projection is not None:
            points.append(self.pooled_projection(F.normalize(inputs.pooled, dim=-1))[:, None])
        if self.token_projection is not None:
            mask = F.pad(inputs.prompt_mask, (len(points), 0), value=True)
            # Nothing of padding goes on, not even a NaN: attention multiplies it by 0.
            known = inputs.prompt_tokens.masked_fill(~inputs.prompt_mask[..., None], 0)
            points.append(self.token_projection(known))
        return torch.cat(points, dim=1), mask


def build_two_way(
    shapes: FeatureShapes,
    *,
    layers: Sequence[str] | None = None,
    text: str = "pooled",
    dim: int = 256,
    depth: int = 3,
    num_heads: int = 8,
    mlp_dim: int = 2048,
    num_mask_tokens: int = 1,
    no_target: bool = False,
    norm_eps: float = 1e-6,
    initial: str | None = None,
) -> TwoWayHead:
    """A two-way head on cached layers, by default all that were cached.

    Args:
        text: what enters of the prompt: its "pooled" vector, L2-normalised and projected, as in PromptSeg; its
            "tokens", each projected; or "both".
        initial: a folder or hub id of a `SamModel` of transformers, such as "facebook/sam-vit-base", from which decoder
            and positions start; see `heads.sam_weights`.

        See `SamDecoder` for the others.
    """
    for name, count in (("depth", depth), ("num_heads", num_heads), ("num_mask_tokens", num_mask_tokens), ("dim", dim)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1")
    if dim % 8:
        raise ValueError(f"dim is divided by 8 on the way to the mask and must be a multiple of it; got {dim}")
    if text not in TEXTS:
        raise unknown_name("text", text, TEXTS)
    layers = shapes.layers([layers] if isinstance(layers, str) else layers or tuple(shapes.grids))
    head = TwoWayHead(
        layers=layers,
        neck=FpnNeck(grids=[shapes.grids[layer] for layer in layers], dim=dim),
        positions=FourierPositions(dim),
        decoder=SamDecoder(
            dim=dim,
            depth=depth,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            num_mask_tokens=num_mask_tokens,
            no_target=no_target,
            norm_eps=norm_eps,
        ),
        dim=dim,
        pooled_width=None if text == "tokens" else shapes.pooled_width,
        token_width=None if text == "pooled" else shapes.token_width,
    )
    if initial is not None:
        head.initial_report = load_sam(head, initial, num_heads=num_heads)
    return head
