"""FiLM: the pooled prompt scales and shifts every image token, then one transformer decoder layer and a logit each.

With its default arguments this is the decoder of "CLIPSeg with FiLM". A decoder layer has a memory to attend to, and
such a design has nothing but image features to put there: here the conditioned tokens attend to the tokens as they
were before the prompt conditioned them. So its keys and values are the image's own, computed once for all its prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from heads.inputs import FeatureShapes, Head, HeadInputs, HeadOutputs


class Film(nn.Module):
    """Feature-wise linear modulation (Perez et al. 2018): gamma * x + beta, both linear in a condition.

    Args:
        residual: (1 + gamma) * x + beta instead, which starts near the identity.
    """

    def __init__(self, *, dim: int, condition_dim: int, residual: bool) -> None:
        super().__init__()
        self.gamma = nn.Linear(condition_dim, dim)
        self.beta = nn.Linear(condition_dim, dim)
        self.offset = 1.0 if residual else 0.0

    def forward(self, tokens: Float[Tensor, "b n d"], condition: Float[Tensor, "b p"]) -> Float[Tensor, "b n d"]:
        """Tokens scaled and shifted alike at all places."""
        return (self.offset + self.gamma(condition))[:, None] * tokens + self.beta(condition)[:, None]


class MemoryAttention(nn.Module):
    """Multi-head attention to a memory whose keys and values are projected apart from the queries, for each image once.

    Weights, their initial values and the result are those of `torch.nn.MultiheadAttention`.
    """

    def __init__(self, *, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.to_query = nn.Linear(dim, dim)
        self.to_memory = nn.Linear(dim, 2 * dim)
        self.to_output = nn.Linear(dim, dim)
        bound = math.sqrt(1.5 / dim)  # Xavier's, of the three projections as one matrix (3 dim, dim)
        for projection in (self.to_query, self.to_memory):
            nn.init.uniform_(projection.weight, -bound, bound)
        for projection in (self.to_query, self.to_memory, self.to_output):
            nn.init.zeros_(projection.bias)

    def project(self, memory: Float[Tensor, "i m d"]) -> Float[Tensor, "i m dd"]:
        """Keys and values of a memory, one behind the other along the channels."""
        return self.to_memory(memory)

    def forward(self, queries: Float[Tensor, "b n d"], projected: Float[Tensor, "b m dd"]) -> Float[Tensor, "b n d"]:
        """Attend to a memory that `project` has projected."""
        query, key, value = (
            tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for tokens in (self.to_query(queries), *projected.chunk(2, dim=-1))
        )
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.to_output(attended.transpose(1, 2).flatten(-2))


class DecoderLayer(nn.Module):
    """A post-norm transformer decoder layer (Vaswani et al. 2017) with a ReLU feed-forward of four times the width.

    It is `torch.nn.TransformerDecoderLayer` with its defaults, but takes an image's memory once for several prompts.
    """

    def __init__(self, *, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.self_norm = nn.LayerNorm(dim)
        self.memory_attention = MemoryAttention(dim=dim, num_heads=num_heads, dropout=dropout)
        self.memory_norm = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim)
        )
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, tokens: Float[Tensor, "b n d"], memory: Float[Tensor, "i m d"], image_index: Int[Tensor, " b"]
    ) -> Float[Tensor, "b n d"]:
        """Tokens that have looked at each other and at the memory of their image."""
        projected = self.memory_attention.project(memory).index_select(0, image_index)
        seen, _ = self.self_attention(tokens, tokens, tokens, need_weights=False)
        tokens = self.self_norm(tokens + self.dropout(seen))
        tokens = self.memory_norm(tokens + self.dropout(self.memory_attention(tokens, projected)))
        return self.feed_forward_norm(tokens + self.dropout(self.feed_forward(tokens)))


class FilmHead(Head):
    """Image tokens conditioned by FiLM, a decoder layer, a linear map to logits.

    Args:
        image_width: summed width of the cached layers it reads.
        pooled_width: width of the pooled prompt features.
        layers: cached layers it reads, concatenated along the channels; their grids must be equal.
        dim: width of everything behind; image tokens are projected to it. By default `image_width`, and then without
            a projection.
        num_heads: of both attentions of the decoder layer.
        residual: scale by 1 + gamma rather than by gamma.
        upsample: side of the square of logits that each token gives.
    """

    reads_tokens = False

    def __init__(
        self,
        *,
        image_width: int,
        pooled_width: int,
        layers: Sequence[str],
        dim: int | None = None,
        num_heads: int = 8,
        dropout: float = 0.1,
        residual: bool = False,
        upsample: int = 1,
    ) -> None:
        super().__init__()
        width = image_width if dim is None else dim
        self.layers = tuple(layers)
        self.upsample = upsample
        self.image_projection = nn.Identity() if dim is None else nn.Linear(image_width, dim)
        self.film = Film(dim=width, condition_dim=pooled_width, residual=residual)
        self.decoder = DecoderLayer(dim=width, num_heads=num_heads, dropout=dropout)
        self.to_logits = nn.Linear(width, upsample * upsample)

    def forward(self, inputs: HeadInputs) -> HeadOutputs:
        """(b, gh * upsample, gw * upsample) mask logits."""
        grids = torch.cat([inputs.features[layer] for layer in self.layers], dim=-1)
        height, width = grids.shape[1:3]
        image = self.image_projection(grids.flatten(1, 2))
        tokens = self.film(image.index_select(0, inputs.image_index), inputs.pooled)
        logits = self.to_logits(self.decoder(tokens, image, inputs.image_index))
        squares = logits.transpose(1, 2).unflatten(2, (height, width))
        return HeadOutputs(F.pixel_shuffle(squares, self.upsample).squeeze(1))


def build_film(
    shapes: FeatureShapes,
    *,
    layers: Sequence[str] | None = None,
    dim: int | None = None,
    num_heads: int = 8,
    dropout: float = 0.1,
    residual: bool = False,
    upsample: int = 1,
) -> FilmHead:
    """A FiLM head for cached features, by default on the last layer that was cached and as wide as it.

    Several layers are projected to the width of the last of them unless `dim` names another.
    """
    layers = shapes.layers_of_one_grid([layers] if isinstance(layers, str) else layers)
    if dim is None and len(layers) > 1:
        dim = shapes.grids[layers[-1]][2]
    width = shapes.grids[layers[-1]][2] if dim is None else dim
    for name, count in (("dim", width), ("num_heads", num_heads), ("upsample", upsample)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1")
    if width % num_heads:
        raise ValueError(f"a width of {width} cannot be shared by {num_heads} heads; give another dim or num_heads")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; give a share from 0 to below 1")
    return FilmHead(
        image_width=sum(shapes.grids[layer][2] for layer in layers),
        pooled_width=shapes.pooled_width,
        layers=layers,
        dim=dim,
        num_heads=num_heads,
        dropout=dropout,
        residual=residual,
        upsample=upsample,
    )
