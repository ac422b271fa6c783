"""Image cells and words ask each other, then a decoder grows the cells to pixels.

With its default arguments, on the stages of ResNet-101 and BERT's tokens, this is the model of Text-Driven Object
Segmentation between its encoders and its mask, as its code has it. That fuses the level of stride 16, of which the
coarser one is a part and the finer ones are not, so stages 3 and 4 are all it reads; no cell knows where it is; and
the sentence feature is computed and read by nothing. Here `skips` lets the decoder take up the finer levels,
`positions` tells cells where they are, and `no_target` gives the sentence feature something to do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from heads.bilstm import BiLSTM
from heads.conv_blocks import conv_norm_relu
from heads.cross_attention import sine_positions
from heads.feature_pyramid import FeaturePyramid, make_levels
from heads.inputs import FeatureShapes, Head, HeadInputs, HeadOutputs
from heads.pyramid_decoder import ProgressiveDecoder


class WordEncoder(nn.Module):
    """A BiLSTM over the tokens of a prompt, projected to `dim` and normed: a feature for each word."""

    def __init__(self, *, lstm: BiLSTM, lstm_width: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.lstm = lstm
        self.projection = nn.Sequential(nn.Linear(lstm_width, dim), nn.LayerNorm(dim), nn.Dropout(dropout))

    def forward(self, tokens: Float[Tensor, "b l e"], mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        """Word features; those of padding mean nothing."""
        words: Tensor = self.projection(self.lstm(tokens, mask))
        return words


class SentenceEncoder(nn.Module):
    """The pooled prompt, projected to `dim` and normed, and a residual MLP on it: one feature for the prompt."""

    def __init__(self, *, pooled_width: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.projection = nn.Sequential(nn.Linear(pooled_width, dim), nn.LayerNorm(dim), nn.Dropout(dropout))
        self.refine = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(dim, dim))

    def forward(self, pooled: Float[Tensor, "b p"]) -> Float[Tensor, "b d"]:
        sentence = self.projection(pooled)
        return sentence + self.refine(sentence)


class Attention(nn.Module):
    """Multi-head attention that shows its weights, in parts, so that a source can be projected before it is repeated.

    What `nn.MultiheadAttention` says, but keys have no bias: it would move all logits of a query alike.
    """

    def __init__(self, *, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"a width of {dim} cannot be shared by {num_heads} heads")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.to_query = nn.Linear(dim, dim)
        self.to_key = nn.Linear(dim, dim, bias=False)
        self.to_value = nn.Linear(dim, dim)
        self.to_output = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        for projection in (self.to_query, self.to_key, self.to_value):
            # As where the three are one matrix of three times the rows.
            nn.init.xavier_uniform_(projection.weight, gain=2**-0.5)
        for biased in (self.to_query, self.to_value, self.to_output):
            nn.init.zeros_(biased.bias)

    def queries(self, source: Float[Tensor, "b n d"]) -> Float[Tensor, "b heads n c"]:
        return self._split(self.to_query(source)) * self.scale

    def keys_and_values(
        self, source: Float[Tensor, "b m d"]
    ) -> tuple[Float[Tensor, "b heads m c"], Float[Tensor, "b heads m c"]]:
        return self._split(self.to_key(source)), self._split(self.to_value(source))

    def forward(
        self,
        query: Float[Tensor, "b heads n c"],
        key: Float[Tensor, "b heads m c"],
        value: Float[Tensor, "b heads m c"],
        mask: Bool[Tensor, "b m"] | None = None,
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b heads n m"]]:
        """What each query gets, and its weights, which are 0 where `mask` is False."""
        logits = query @ key.transpose(-1, -2)
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None, :], float("-inf"))
        weights = logits.softmax(dim=-1)
        attended = self.dropout(weights).to(value.dtype) @ value
        return self.to_output(attended.transpose(1, 2).flatten(-2)), weights

    def _split(self, projected: Float[Tensor, "b n d"]) -> Float[Tensor, "b heads n c"]:
        return projected.view(*projected.shape[:2], self.num_heads, -1).transpose(1, 2)


class FusionLayer(nn.Module):
    """Words look at the image, then the image at the words that have; post-norm, each with a ReLU MLP behind it."""

    def __init__(self, *, dim: int, num_heads: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.words_to_vision = Attention(dim=dim, num_heads=num_heads, dropout=dropout)
        self.vision_to_words = Attention(dim=dim, num_heads=num_heads, dropout=dropout)
        self.words_norm, self.vision_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.words_mlp, self.vision_mlp = (
            nn.Sequential(
                nn.Linear(dim, hidden_dim),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.Linear(hidden_dim, dim),
                nn.Dropout(dropout),
            )
            for _ in range(2)
        )
        self.words_mlp_norm, self.vision_mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(
        self,
        vision: Float[Tensor, "i n d"],
        words: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"],
        image_index: Int[Tensor, " b"] | None = None,
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b l d"], Float[Tensor, "b heads n l"]]:
        """Vision and words that know of each other, and how much each cell looks at each word.

        With an `image_index`, `vision` is one for each image, and whatever depends on it alone is computed so.
        """
        query = self.vision_to_words.queries(vision)
        key, value = self.words_to_vision.keys_and_values(vision)
        if image_index is not None:
            vision, query, key, value = (tensor.index_select(0, image_index) for tensor in (vision, query, key, value))
        seen, _ = self.words_to_vision(self.words_to_vision.queries(words), key, value)
        words = self.words_norm(words + seen)
        words = self.words_mlp_norm(words + self.words_mlp(words))
        told, weights = self.vision_to_words(query, *self.vision_to_words.keys_and_values(words), mask)
        vision = self.vision_norm(vision + told)
        return self.vision_mlp_norm(vision + self.vision_mlp(vision)), words, weights


class NoTarget(nn.Module):
    """A logit that the prompt names nothing in the image, from the sentence and the mean of the fused cells."""

    def __init__(self, *, sentence: SentenceEncoder, dim: int) -> None:
        super().__init__()
        self.sentence = sentence
        self.to_logit = nn.Sequential(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, 1))

    def forward(self, pooled: Float[Tensor, "b p"], vision: Float[Tensor, "b n d"]) -> Float[Tensor, " b"]:
        logit: Tensor = self.to_logit(torch.cat([self.sentence(pooled), vision.mean(1)], dim=-1))
        return logit[:, 0]


class BidirectionalHead(Head):
    """Fusion of a pyramid's level with the words of a prompt, and a decoder that goes up from there.

    Args:
        level_layers: the cached layer that each level of the pyramid is made of, from fine to coarse.
        pyramid: gives the levels that are decoded, the last of which is fused.
        words: gives a feature for each word.
        fusion: layers in which cells and words ask each other.
        decoder: from the fused level and the finer ones to logits.
        dim: width of all of them.
        norm: of the projection between pyramid and fusion, as in the pyramid itself.
        positions: add 2D sine positions to the cells.
        no_target: gives a logit that there is nothing to mark.
    """

    shows_attention: bool = False
    """Say how much each cell looks at each word, for whoever looks at it; training has no use for it."""

    def __init__(
        self,
        *,
        level_layers: Sequence[str],
        pyramid: FeaturePyramid,
        words: WordEncoder,
        fusion: Sequence[FusionLayer],
        decoder: ProgressiveDecoder,
        dim: int,
        norm: str = "batch",
        positions: bool = False,
        no_target: NoTarget | None = None,
    ) -> None:
        super().__init__()
        self.level_layers = tuple(level_layers)
        self.layers = tuple(dict.fromkeys(level_layers))
        self.positions = positions
        self.pyramid = pyramid
        self.to_cells = nn.Sequential(*conv_norm_relu(dim, dim, norm, kernel=1))
        self.words = words
        self.fusion = nn.ModuleList(fusion)
        self.decoder = decoder
        self.no_target = no_target

    def forward(self, inputs: HeadInputs) -> HeadOutputs:
        """(b, gh * 2 ** stages, gw * 2 ** stages) mask logits of a (gh, gw) level, and if it is to be shown its word
        attention, (b, l, gh, gw).
        """
        *finer, level = self.pyramid([inputs.features[layer] for layer in self.level_layers])
        height, width = level.shape[-2:]
        cells = self.to_cells(level).flatten(2).transpose(1, 2)
        if self.positions:
            cells = cells + sine_positions(height, width, cells.shape[-1]).to(cells)
        words = self.words(inputs.prompt_tokens, inputs.prompt_mask)
        looks = []
        for number, layer in enumerate(self.fusion):
            repeat = inputs.image_index if number == 0 else None
            cells, words, weights = layer(cells, words, inputs.prompt_mask, repeat)
            if self.shows_attention:
                looks.append(weights.mean(1))
        attention = None
        if self.shows_attention:
            mean = torch.stack(looks).mean(0)
            attention = mean.transpose(1, 2).reshape(*mean.shape[::2], height, width)
        fused = cells.transpose(1, 2).reshape(*cells.shape[::2], height, width)
        return HeadOutputs(
            self.decoder(fused, finer[::-1], inputs.image_index),
            no_target_logits=None if self.no_target is None else self.no_target(inputs.pooled, cells),
            word_attention=attention,
        )


def build_bidirectional(
    shapes: FeatureShapes,
    *,
    layers: Sequence[str] | None = None,
    fused: int = -2,
    skips: bool = False,
    positions: bool = False,
    no_target: bool = False,
    dim: int = 256,
    num_heads: int = 8,
    num_layers: int = 3,
    hidden_dim: int = 1024,
    lstm_dim: int = 192,
    lstm_layers: int = 2,
    stages: Sequence[int] = (128, 64, 32, 16),
    dropout: float = 0.1,
    norm: str = "batch",
) -> BidirectionalHead:
    """A bidirectional head for cached features.

    Args:
        layers: see `make_levels`; by default all that were cached if their grids differ, else the last. Layers that
            only make levels which are neither fused, nor coarser, nor taken up by skips, are not read.
        fused: the level that is fused, counted as in a list of them from fine to coarse. By default the one but
            coarsest: that of stride 16 of a ResNet, the layer's own grid where levels are made of one grid.
        skips: add the levels finer than the fused one to the stages of the decoder.
        positions: tell cells where they are.
        no_target: say whether the prompt names anything.
        hidden_dim: width of the fusion layers' MLPs.
        lstm_dim: width of each direction of the BiLSTM.
        stages: channels of the decoder's stages, each of which doubles the sides.
        dropout: of words, of attention weights and in MLPs.
        norm: of feature maps: batch norm, or group norm for small batches.
    """
    counts = {"dim": dim, "num_heads": num_heads, "num_layers": num_layers, "hidden_dim": hidden_dim}
    counts |= {"lstm_dim": lstm_dim, "lstm_layers": lstm_layers, "the number of stages": len(stages)}
    for name, count in (*counts.items(), *(("a stage's channels", channels) for channels in stages)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1")
    if positions and dim % 4:
        raise ValueError(f"positions need a width that is a multiple of 4; got a dim of {dim}")
    levels = make_levels(shapes, [layers] if isinstance(layers, str) else layers)
    if not -len(levels) <= fused < len(levels):
        raise ValueError(f"there are {len(levels)} levels; fused is {fused}: count from 0, or from -1 backwards")
    fused %= len(levels)
    num_skips = min(len(stages), fused) if skips else 0
    if skips and not num_skips:
        raise ValueError("skips take up levels finer than the fused one, which is the finest; fuse another one")
    read = levels[fused - num_skips :]
    lstm = BiLSTM(width=shapes.token_width, hidden_dim=lstm_dim, num_layers=lstm_layers, dropout=dropout)
    sentence = SentenceEncoder(pooled_width=shapes.pooled_width, dim=dim, dropout=dropout) if no_target else None
    return BidirectionalHead(
        level_layers=[level.layer for level in read],
        pyramid=FeaturePyramid(
            widths=[level.width for level in read],
            strides=[level.stride for level in read],
            dim=dim,
            num_outputs=num_skips + 1,
            norm=norm,
        ),
        words=WordEncoder(lstm=lstm, lstm_width=2 * lstm_dim, dim=dim, dropout=dropout),
        fusion=[
            FusionLayer(dim=dim, num_heads=num_heads, hidden_dim=hidden_dim, dropout=dropout) for _ in range(num_layers)
        ],
        decoder=ProgressiveDecoder(dim=dim, channels=stages, num_skips=num_skips, norm=norm),
        dim=dim,
        norm=norm,
        positions=positions,
        no_target=None if sentence is None else NoTarget(sentence=sentence, dim=dim),
    )
