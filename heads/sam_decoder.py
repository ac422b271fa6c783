"""SAM's mask decoder: a few tokens and an image look at each other, then one token draws the mask.

Source: Kirillov et al. 2023, "Segment Anything", with the numbers of `SamMaskDecoder` in transformers. It differs from
that in four things. Prompts name their images by index, so several prompts of one image and prompts of many images
stand in one batch, and what depends on the image alone is computed once for each image. Only the single mask is drawn:
the hyper-MLPs and IoU scores of SAM's three other masks are left out. Prompts may be padded. And there may be a token
for "there is no such thing".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class FourierPositions(nn.Module):
    """Random Fourier features of the cells of a grid (Tancik et al. 2020), as SAM encodes positions.

    `frequencies` (2, dim / 2) is drawn once from a normal distribution and kept with the weights, untrained.
    """

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(2, dim // 2))

    def forward(self, height: int, width: int) -> Float[Tensor, "n d"]:
        """(height * width, dim): sines, then cosines, of the centre (x, y) of each cell in [-1, 1] x [-1, 1]."""
        across, down = self.frequencies.float()  # no matrix product: autocast would round the angles
        y, x = (2 * (torch.arange(size, device=down.device) + 0.5) / size - 1 for size in (height, width))
        angles = 2 * torch.pi * (y[:, None, None] * down + x[None, :, None] * across)
        return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(0, 1)


class ProjectedAttention(nn.Module):
    """Multi-head attention with biases, whose inner width may be smaller than the width `dim` it reads and writes.

    Queries, keys and values are projected by whoever calls `forward`, who may know that several prompts share them.
    """

    def __init__(self, *, dim: int, inner_dim: int, num_heads: int) -> None:
        super().__init__()
        if inner_dim % num_heads:
            raise ValueError(f"an inner width of {inner_dim} cannot be shared by {num_heads} heads")
        self.num_heads = num_heads
        self.to_query = nn.Linear(dim, inner_dim)
        self.to_key = nn.Linear(dim, inner_dim)
        self.to_value = nn.Linear(dim, inner_dim)
        self.to_output = nn.Linear(inner_dim, dim)

    def forward(
        self,
        query: Float[Tensor, "b n c"],
        key: Float[Tensor, "b m c"],
        value: Float[Tensor, "b m c"],
        mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """What projected queries take from where `mask` is True, from everywhere without one."""
        query, key, value = (self._split(projected) for projected in (query, key, value))
        bias = None if mask is None else mask[:, None, None, :]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.to_output(attended.transpose(1, 2).flatten(-2))

    def with_weights(
        self, query: Float[Tensor, "b n c"], key: Float[Tensor, "b m c"], value: Float[Tensor, "b m c"]
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n m"]]:
        """The same without a mask, and how much each query looks where: a mean over heads, which sums to 1."""
        query, key, value = (self._split(projected) for projected in (query, key, value))
        weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
        return self.to_output((weights @ value).transpose(1, 2).flatten(-2)), weights.mean(1)

    def _split(self, projected: Float[Tensor, "b n c"]) -> Float[Tensor, "b k n e"]:
        return projected.reshape(*projected.shape[:2], self.num_heads, -1).transpose(1, 2)


@dataclass(frozen=True)
class ImageTokens:
    """The image side of a batch: tokens of i images, which `index` deals out to b prompts, or of b prompts already.

    `positions` are added wherever tokens are looked for, never to what is taken from them.
    """

    tokens: Float[Tensor, "_ n d"]
    positions: Float[Tensor, "n d"]
    index: Int[Tensor, " b"] | None

    def deal(self, of_images: Float[Tensor, "_ n c"]) -> Float[Tensor, "b n c"]:
        """Something of each image, for each prompt."""
        return of_images if self.index is None else of_images.index_select(0, self.index)


class ImageAttention(ProjectedAttention):
    """Tokens look at an image; keys and values are projected once for each image."""

    def look(
        self, tokens: Float[Tensor, "b t d"], image: ImageTokens, *, weigh: bool
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b t n"] | None]:
        """What the tokens take from the image, and with `weigh` how much each looks at each cell."""
        query = self.to_query(tokens)
        key = image.deal(self.to_key(image.tokens + image.positions))
        value = image.deal(self.to_value(image.tokens))
        return self.with_weights(query, key, value) if weigh else (self(query, key, value), None)


class TwoWayBlock(nn.Module):
    """Tokens look at each other, then at the image; an MLP; the image looks at the tokens. A norm after each.

    Args:
        is_first: the self-attention has no positions and replaces the tokens instead of being added to them.
    """

    def __init__(self, *, dim: int, num_heads: int, mlp_dim: int, norm_eps: float, is_first: bool) -> None:
        super().__init__()
        self.is_first = is_first
        self.self_attention = ProjectedAttention(dim=dim, inner_dim=dim, num_heads=num_heads)
        self.self_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.to_image = ImageAttention(dim=dim, inner_dim=dim // 2, num_heads=num_heads)
        self.to_image_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.ReLU(), nn.Linear(mlp_dim, dim))
        self.mlp_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.from_image = ProjectedAttention(dim=dim, inner_dim=dim // 2, num_heads=num_heads)
        self.from_image_norm = nn.LayerNorm(dim, eps=norm_eps)

    def forward(
        self,
        tokens: Float[Tensor, "b t d"],
        positions: Float[Tensor, "b t d"],
        image: ImageTokens,
        mask: Bool[Tensor, "b t"] | None,
        *,
        weigh: bool,
    ) -> tuple[Float[Tensor, "b t d"], ImageTokens, Float[Tensor, "b t n"] | None]:
        """Tokens and image that have seen each other, and with `weigh` how much each token looked at each cell.

        `positions` of tokens are the tokens that entered the first block.
        """
        attention = self.self_attention
        asking = tokens if self.is_first else tokens + positions
        attended = attention(attention.to_query(asking), attention.to_key(asking), attention.to_value(tokens), mask)
        tokens = self.self_norm(attended if self.is_first else tokens + attended)

        attended, weights = self.to_image.look(tokens + positions, image, weigh=weigh)
        tokens = self.to_image_norm(tokens + attended)
        tokens = self.mlp_norm(tokens + self.mlp(tokens))

        attention = self.from_image
        query = image.deal(attention.to_query(image.tokens + image.positions))
        attended = attention(query, attention.to_key(tokens + positions), attention.to_value(tokens), mask)
        seen = self.from_image_norm(image.deal(image.tokens) + attended)
        return tokens, ImageTokens(seen, image.positions, None), weights


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (b, c, h, w)."""

    def forward(self, grid: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return super().forward(grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Decoded:
    """What a decoder says of b prompts; `attention` is how much each prompt token looks at each cell, if asked for."""

    mask_logits: Float[Tensor, "b _ _"]
    iou: Float[Tensor, " b"]
    no_target_logits: Float[Tensor, " b"] | None
    attention: Float[Tensor, "b t h w"] | None


class SamDecoder(nn.Module):
    """SAM's mask decoder for one mask.

    Args:
        dim: width of tokens and image, a multiple of 8 and of `num_heads`.
        depth: number of two-way blocks: 2 in SAM, 3 in PromptSeg.
        mlp_dim: inner width of the MLP of a block.
        num_mask_tokens: learned tokens of which the first draws the mask. SAM has 4; the other three draw its
            alternatives, and here they only take part in attention. 1 in PromptSeg.
        no_target: a token of its own says whether the prompt names nothing in the image.
        norm_eps: epsilon of the norms of the blocks: 1e-6 in transformers, 1e-5 in the original code of SAM. The final
            norm has 1e-5 and the norm of the upscaling 1e-6 in both.
    """

    def __init__(
        self,
        *,
        dim: int = 256,
        depth: int = 2,
        num_heads: int = 8,
        mlp_dim: int = 2048,
        num_mask_tokens: int = 4,
        no_target: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.iou_token = nn.Parameter(torch.randn(1, dim))
        self.mask_tokens = nn.Parameter(torch.randn(num_mask_tokens, dim))
        self.no_target_token = nn.Parameter(torch.randn(1, dim)) if no_target else None
        self.blocks = nn.ModuleList(
            TwoWayBlock(dim=dim, num_heads=num_heads, mlp_dim=mlp_dim, norm_eps=norm_eps, is_first=block == 0)
            for block in range(depth)
        )
        self.final_attention = ImageAttention(dim=dim, inner_dim=dim // 2, num_heads=num_heads)
        self.final_norm = nn.LayerNorm(dim)
        self.upscale = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 4, 2, stride=2),
            LayerNorm2d(dim // 4, eps=1e-6),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 4, dim // 8, 2, stride=2),
            nn.GELU(),
        )
        self.hyper = _mlp(dim, dim // 8)
        self.iou_head = _mlp(dim, 1)
        self.no_target_head = _mlp(dim, 1) if no_target else None

    def forward(
        self,
        image: Float[Tensor, "i d h w"],
        positions: Float[Tensor, "n d"],
        prompt: Float[Tensor, "b t d"],
        mask: Bool[Tensor, "b t"] | None,
        image_index: Int[Tensor, " b"],
        *,
        weigh: bool = False,
    ) -> Decoded:
        """Masks of (b, 4h, 4w) for the prompts' tokens, padded ones where `mask` is False.

        With `weigh`, also the attention of the prompts' tokens to the image: a mean over heads, blocks and the final
        attention.
        """
        height, width = image.shape[2:]
        own: list[Tensor] = [self.iou_token, self.mask_tokens]
        if self.no_target_token is not None:
            own.append(self.no_target_token)
        learned = torch.cat(own)
        entered = torch.cat([learned.expand(prompt.shape[0], -1, -1).to(prompt), prompt], dim=1)
        if mask is not None:
            mask = F.pad(mask, (len(learned), 0), value=True)

        tokens, cells = entered, ImageTokens(image.flatten(2).transpose(1, 2), positions.to(image), image_index)
        seen = []
        for block in self.blocks:
            tokens, cells, weights = block(tokens, entered, cells, mask, weigh=weigh)
            seen.append(weights)
        attended, weights = self.final_attention.look(tokens + entered, cells, weigh=weigh)
        seen.append(weights)
        tokens = self.final_norm(tokens + attended)

        upscaled = self.upscale(cells.tokens.transpose(1, 2).reshape(prompt.shape[0], -1, height, width))
        drawn = torch.einsum("bc,bchw->bhw", self.hyper(tokens[:, 1]), upscaled)
        absent = None
        if self.no_target_head is not None:
            absent = self.no_target_head(tokens[:, len(learned) - 1]).squeeze(-1)
        attention = None
        if weigh:
            mean = torch.stack([weights[:, len(learned) :] for weights in seen if weights is not None]).mean(0)
            attention = mean.reshape(*mean.shape[:2], height, width)
        return Decoded(drawn, self.iou_head(tokens[:, 0]).squeeze(-1), absent, attention)


def _mlp(dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, out_dim))
