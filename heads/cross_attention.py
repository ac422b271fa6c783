"""Cross-attention fusion: image tokens ask the prompt's tokens, then an MLP gives each its logit.

With its default arguments this is the fusion and head of JurasSigLIP: one block of width 768 with 4 heads, no attention
between image tokens, an MLP of width 512, one logit for each token. Depth, width, self-attention and a learned
upsampler are what that design lacks: without them no token knows where it is or what its neighbours are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heads.inputs import FeatureShapes, Head, HeadInputs, HeadOutputs


class Attention(nn.Module):
    """Multi-head attention of queries (b, n, `dim`) over a context (b, m, `context_dim`), without biases.

    Args:
        inner_dim: total width of the heads; the output is projected back to `dim`.
    """

    def __init__(self, *, dim: int, context_dim: int, inner_dim: int, num_heads: int) -> None:
        super().__init__()
        if inner_dim % num_heads:
            raise ValueError(f"an inner width of {inner_dim} cannot be shared by {num_heads} heads")
        self.num_heads = num_heads
        self.to_query = nn.Linear(dim, inner_dim, bias=False)
        self.to_key = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_value = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_output = nn.Linear(inner_dim, dim, bias=False)

    def forward(
        self,
        queries: Float[Tensor, "b n d"],
        context: Float[Tensor, "b m e"],
        mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Attend to the context where `mask` is True, everywhere without one."""
        query, key, value = self._project(queries, context)
        bias = None if mask is None else mask[:, None, None, :]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.to_output(attended.transpose(1, 2).flatten(-2))

    def with_weights(
        self, queries: Float[Tensor, "b n d"], context: Float[Tensor, "b m e"], mask: Bool[Tensor, "b m"]
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n m"]]:
        """The same, slower, and how much each query looks at what: a mean over heads, which sums to 1."""
        query, key, value = self._project(queries, context)
        logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        weights = logits.masked_fill(~mask[:, None, None, :], float("-inf")).softmax(-1)
        attended = weights.to(value.dtype) @ value
        return self.to_output(attended.transpose(1, 2).flatten(-2)), weights.mean(1)

    def _project(
        self, queries: Float[Tensor, "b n d"], context: Float[Tensor, "b m e"]
    ) -> tuple[Float[Tensor, "b k n c"], Float[Tensor, "b k m c"], Float[Tensor, "b k m c"]]:
        """Queries, keys and values of each of k heads."""
        query, key, value = (
            projection(source).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, source in ((self.to_query, queries), (self.to_key, context), (self.to_value, context))
        )
        return query, key, value


class FusionBlock(nn.Module):
    """Pre-norm cross-attention of image tokens to prompt tokens, with a residual."""

    def __init__(self, *, dim: int, inner_dim: int, num_heads: int) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim)
        self.context_norm = nn.LayerNorm(dim)
        self.attention = Attention(dim=dim, context_dim=dim, inner_dim=inner_dim, num_heads=num_heads)

    def forward(
        self, tokens: Float[Tensor, "b n d"], prompt: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"], *, weigh: bool
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n l"] | None]:
        """Image tokens that have taken up the prompt, and with `weigh` how much each looked at each prompt token."""
        queries, context = self.query_norm(tokens), self.context_norm(prompt)
        if weigh:
            taken, weights = self.attention.with_weights(queries, context, mask)
            return tokens + taken, weights
        return tokens + self.attention(queries, context, mask), None


class SelfAttentionBlock(nn.Module):
    """Pre-norm self-attention between image tokens and a GELU MLP of four times the width, each with a residual."""

    def __init__(self, *, dim: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = Attention(dim=dim, context_dim=dim, inner_dim=dim, num_heads=num_heads)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Image tokens that have looked at each other."""
        normed = self.attention_norm(tokens)
        tokens = tokens + self.attention(normed, normed)
        return tokens + self.mlp(tokens)


class CrossAttentionHead(Head):
    """Fusion of image and prompt tokens by cross-attention.

    Args:
        image_width: summed width of the cached layers it reads.
        token_width: width of the prompt tokens, projected to the fusion's width without bias.
        layers: cached layers it reads, concatenated along the channels; their grids must be equal.
        dim: width of the residual stream; by default `image_width`, and then without an input projection.
        inner_dim: width of the cross-attention; `num_heads` heads share it.
        hidden_dim: width of the MLP that gives the logits.
        image_depth: number of self-attention blocks between the image tokens before they meet the prompt. They run
            once for each image, however many prompts it has, and see 2D sine positions.
        depth: number of fusion blocks.
        self_attention: put a self-attention block between the image tokens after every fusion block.
        upsample: side of the square of logits that each token gives.
    """

    shows_attention: bool = False
    """Say how much each image token looks at each prompt token, for whoever looks at it; training has no use for it."""

    def __init__(
        self,
        *,
        image_width: int,
        token_width: int,
        layers: Sequence[str],
        dim: int | None = None,
        inner_dim: int = 768,
        num_heads: int = 4,
        hidden_dim: int = 512,
        image_depth: int = 0,
        depth: int = 1,
        self_attention: bool = False,
        upsample: int = 1,
    ) -> None:
        super().__init__()
        width = image_width if dim is None else dim
        self.layers = tuple(layers)
        self.upsample = upsample
        self.sees_positions = self_attention or image_depth > 0
        self.image_projection = nn.Identity() if dim is None else nn.Linear(image_width, dim)
        self.prompt_projection = nn.Linear(token_width, width, bias=False)
        self.fusion = nn.ModuleList(
            FusionBlock(dim=width, inner_dim=inner_dim, num_heads=num_heads) for _ in range(depth)
        )
        self.image_mixing = nn.ModuleList(
            SelfAttentionBlock(dim=width, num_heads=num_heads) for _ in range(image_depth)
        )
        self.prompt_mixing = nn.ModuleList(
            SelfAttentionBlock(dim=width, num_heads=num_heads) if self_attention else nn.Identity()
            for _ in range(depth)
        )
        self.to_logits = nn.Sequential(
            nn.Linear(width, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, upsample * upsample)
        )

    def forward(self, inputs: HeadInputs) -> HeadOutputs:
        """(b, gh * upsample, gw * upsample) mask logits, and if it is to be shown (b, l, gh, gw) word attention."""
        grids = torch.cat([inputs.features[layer] for layer in self.layers], dim=-1)
        height, width = grids.shape[1:3]
        tokens = self.image_projection(grids.flatten(1, 2))
        prompt = self.prompt_projection(inputs.prompt_tokens)
        if self.sees_positions:
            tokens = tokens + sine_positions(height, width, tokens.shape[-1]).to(tokens)
        for mix in self.image_mixing:
            tokens = mix(tokens)
        tokens = tokens.index_select(0, inputs.image_index)
        looks = []
        for fuse, mix in zip(self.fusion, self.prompt_mixing, strict=True):
            tokens, weights = fuse(tokens, prompt, inputs.prompt_mask, weigh=self.shows_attention)
            tokens = mix(tokens)
            looks.append(weights)
        logits = self.to_logits(tokens).transpose(1, 2).unflatten(2, (height, width))
        attention = None
        if self.shows_attention:
            mean = torch.stack(looks).mean(0)
            attention = mean.transpose(1, 2).reshape(*mean.shape[::2], height, width)
        return HeadOutputs(F.pixel_shuffle(logits, self.upsample).squeeze(1), word_attention=attention)


def sine_positions(height: int, width: int, dim: int) -> Float[Tensor, "n d"]:
    """(height * width, dim) fixed sines and cosines of the row (first half of the channels) and the column (second).

    Positions run from 0 to 1 whatever the grid, in frequencies from half a period to one per two cells of a 32-grid.
    """
    if dim % 4:
        raise ValueError(f"2D sine positions need a width that is a multiple of 4; got {dim}")
    frequencies = torch.pi * torch.logspace(0, 5, dim // 4, base=2)
    rows, columns = ((torch.arange(size) + 0.5)[:, None] / size * frequencies for size in (height, width))
    row_waves, column_waves = (torch.cat([angle.sin(), angle.cos()], dim=1) for angle in (rows, columns))
    grid = torch.cat([row_waves[:, None].expand(-1, width, -1), column_waves[None].expand(height, -1, -1)], dim=-1)
    return grid.flatten(0, 1)


def build_cross_attention(
    shapes: FeatureShapes,
    *,
    layers: Sequence[str] | None = None,
    dim: int | None = None,
    inner_dim: int = 768,
    num_heads: int = 4,
    hidden_dim: int = 512,
    image_depth: int = 0,
    depth: int = 1,
    self_attention: bool = False,
    upsample: int = 1,
) -> CrossAttentionHead:
    """A cross-attention head for cached features, by default on the last layer that was cached."""
    for name, count in (("num_heads", num_heads), ("hidden_dim", hidden_dim), ("depth", depth), ("upsample", upsample)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1")
    layers = shapes.layers_of_one_grid([layers] if isinstance(layers, str) else layers)
    return CrossAttentionHead(
        image_width=sum(shapes.grids[layer][2] for layer in layers),
        token_width=shapes.token_width,
        layers=layers,
        dim=dim,
        inner_dim=inner_dim,
        num_heads=num_heads,
        hidden_dim=hidden_dim,
        image_depth=image_depth,
        depth=depth,
        self_attention=self_attention,
        upsample=upsample,
    )
