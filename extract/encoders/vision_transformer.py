"""Vision transformers as towers: normalised pixels in; token grids, CLS tokens and attention outputs out.

A tower may also start from tokens that another one gave, behind any of its blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from cache_schema.errors import UsageError
from cache_schema.features import TOKENS
from cache_schema.masks import Size
from extract.encoders.attention import LastAttention, pool_by_attention
from extract.encoders.families import TransformerFamily
from extract.encoders.hidden_states import HiddenStates
from extract.encoders.precision import halve_weights
from extract.encoders.protocols import ImageEncoding
from extract.encoders.sizes import pair_of
from extract.encoders.specs import FINAL_LAYER, NORMED, AttentionOutput, Precision

_LAYER = re.compile(rf"(?P<number>0|[1-9]\d*)(?P<kind>{re.escape(NORMED)}|{re.escape(TOKENS)})?", re.ASCII)
_Kind = Literal["plain", "normed", "tokens"]


class VisionTransformer(nn.Module):
    """A vision transformer, cut off behind the deepest block that is asked for. Register tokens are dropped.

    Layer `"last"` is `last_hidden_state` as transformers returns it: normed, but for CLIP, which norms its pooled CLS
    token alone. `"9"` is `hidden_states[9]`, the output of the ninth block, which no family norms; `"9+norm"` is the
    same through the model's final norm. `"0"` is what goes into the first block. `"9+tokens"` is all of `"9"`, CLS and
    register tokens included, as a grid of one row: what a tower that starts at block 9 is given, blocks being counted
    from 0.

    Attention outputs, in float32, are of the last block: `"logits"` (heads, gh, gw) is q_cls . k_patch / sqrt(d_h),
    over the patches only; `"head_tokens"` (heads, d) and `"mean_token"` (d) are the patches of `"last"`, pooled by each
    head's logits and by their mean over the heads, see `pool_by_attention`.

    Args:
        model: of the family, in float32. It is cut and listened to, and of no use to anyone else afterwards.
        layers: in the order in which they are given back. There may be none if attention outputs are asked for; the CLS
            token of `"last"` is then given all the same.
        input_size: (H, W) in pixels. What is left over beside whole patches is not seen.
        precision: that of the autocast under which this will be called.
        start: the block that this begins with, which is given tokens. What comes before it is dropped.

    Raises:
        UsageError: the model has no such layer, or is of a family without attention outputs, or a layer lies before the
            start.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: TransformerFamily,
        layers: Sequence[str],
        attention: Sequence[AttentionOutput],
        input_size: Size,
        precision: Precision = "float32",
        start: int | None = None,
    ) -> None:
        super().__init__()
        config, name = model.config, type(model).__name__
        blocks = model.get_submodule(family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        if attention and family.attention is None:
            raise UsageError(f"{name} has no attention outputs, only DINO's transformers do; ask for layers alone.")
        self._layers = {layer: _parse_layer(layer, len(blocks), name) for layer in layers or (FINAL_LAYER,)}
        numbers = {number for number, _ in self._layers.values() if number is not None}
        if start is not None and not 0 <= start <= len(blocks):
            raise UsageError(f"{name} has {len(blocks)} blocks; start at one of them, counted from 0, not at {start}.")
        if start is not None and (early := [number for number in numbers if number < start]):
            raise UsageError(
                f"layer {min(early)} comes before block {start}, where the encoder starts; ask for layers from {start} "
                "on, or start earlier."
            )

        patch_height, patch_width = self._patch = pair_of(config.patch_size)
        self._grid = input_size[0] // patch_height, input_size[1] // patch_width
        width, heads = int(config.hidden_size), int(config.num_attention_heads)
        self._num_prefix_tokens = int(family.has_cls) + getattr(config, "num_register_tokens", 0)
        self.num_tokens = self._num_prefix_tokens + self._grid[0] * self._grid[1]
        self.grids: Mapping[str, tuple[int, int, int]] = {
            layer: (1, self.num_tokens, width) if self._layers[layer][1] == "tokens" else (*self._grid, width)
            for layer in layers
        }
        with_cls = [layer for layer, (_, kind) in self._layers.items() if family.has_cls and kind != "tokens"]
        self.cls_widths: Mapping[str, int] = dict.fromkeys(with_cls, width)
        shapes = {"logits": (heads, *self._grid), "head_tokens": (heads, width), "mean_token": (width,)}
        self.attention_shapes: Mapping[str, tuple[int, ...]] = {output: shapes[output] for output in attention}
        self._takes_patches = family.takes_patches
        self._interpolates = family.asks_to_interpolate and input_size != pair_of(config.image_size)

        del blocks[max(1, count_blocks(layers, attention, len(blocks))) :]
        self._given: _Given | None = None
        if start is not None:
            self._given = _Given(input_size)
            for place in family.before_blocks:
                model.set_submodule(place, self._given if place == family.before_blocks[0] else nn.Identity())
            for number in range(start):
                blocks[number] = _HandOn()
        if getattr(model, "use_head", False):  # SigLIP's pooling head, whose output nobody asks for
            model.use_head = False
            del model.head
        halve_weights(blocks, precision)
        self._model, self._family = model, family
        self._states = HiddenStates(blocks, numbers)
        self._attention = (
            LastAttention(
                blocks[-1].get_submodule(family.attention), heads, self._num_prefix_tokens, rotates=family.rotates
            )
            if attention and family.attention
            else None
        )

    def compile_blocks(self) -> None:
        """Compile block by block: all are alike, so one is compiled. A block that is listened to is left as it is."""
        for block in self._unheard_blocks():
            block.forward = torch.compile(block.forward)

    def checkpoint_blocks(self, on: bool) -> None:
        """Keep nothing of a block for the backward pass but what went into it, and compute the rest again there."""
        checkpoint_blocks(self._unheard_blocks(), on)

    def _unheard_blocks(self) -> nn.ModuleList:
        blocks = self._model.get_submodule(self._family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks[:-1] if self._attention else blocks

    def forward(self, given: Float[Tensor, "i 3 h w"] | Float[Tensor, "i n d"]) -> ImageEncoding:
        """Features of i normalised images, or of the tokens that go into the block that this starts with."""
        if self._given is None:
            last = self._model(**self._inputs(given)).last_hidden_state
        else:
            last = self._model(**self._inputs(self._given.hold(given))).last_hidden_state
        norm = self._model.get_submodule(self._family.norm)
        heard, states = self._states.take(), {}
        for layer, (number, kind) in self._layers.items():
            state = last if number is None else heard[number]
            states[layer] = norm(state) if kind == "normed" else state
        return ImageEncoding(
            {
                layer: states[layer][:, None] if self._layers[layer][1] == "tokens" else self._as_grid(states[layer])
                for layer in self.grids
            },
            {layer: states[layer][:, 0] for layer in self.cls_widths},
            {} if self._attention is None else self._attend(self._attention.logits(), last),
        )

    def _as_grid(self, state: Float[Tensor, "i n d"]) -> Float[Tensor, "i gh gw d"]:
        return state[:, self._num_prefix_tokens :].reshape(state.shape[0], *self._grid, -1)

    def _attend(
        self, logits: Float[Tensor, "i heads n"], last: Float[Tensor, "i m d"]
    ) -> dict[str, Float[Tensor, "i ..."]]:
        patches = last[:, self._num_prefix_tokens :]
        make: dict[str, Callable[[], Tensor]] = {
            "logits": lambda: logits.reshape(*logits.shape[:2], *self._grid),
            "head_tokens": lambda: pool_by_attention(logits, patches),
            "mean_token": lambda: pool_by_attention(logits.mean(1, keepdim=True), patches)[:, 0],
        }
        return {output: make[output]() for output in self.attention_shapes}

    def _inputs(self, pixels: Float[Tensor, "i 3 h w"]) -> dict[str, Any]:
        if self._takes_patches:
            # Positions are interpolated to each shape that is given, and all images have the same one. It stays on the
            # CPU, where the model reads it.
            shape = torch.tensor([self._grid])
            patches = cut_into_patches(pixels, self._patch)
            return {"pixel_values": patches, "pixel_attention_mask": None, "spatial_shapes": shape}
        positions = {"interpolate_pos_encoding": True} if self._interpolates else {}
        return {"pixel_values": pixels.contiguous(), **positions}  # in channels-last, patches are embedded no faster


def cut_into_patches(pixels: Float[Tensor, "i 3 h w"], patch: Size) -> Float[Tensor, "i n p"]:
    """The n patches of each image, row by row, each as the p = height x width x 3 values that NaFlex embeds."""
    (height, width), (rows, columns) = patch, (pixels.shape[2] // patch[0], pixels.shape[3] // patch[1])
    cells = pixels.reshape(pixels.shape[0], -1, rows, height, columns, width).permute(0, 2, 4, 3, 5, 1)
    return cells.reshape(pixels.shape[0], rows * columns, -1)


def count_blocks(layers: Sequence[str], attention: Sequence[AttentionOutput], num_blocks: int) -> int:
    """How many of a model's blocks have a part in what is asked for."""
    numbers = [int(parsed["number"]) for layer in layers if (parsed := _LAYER.fullmatch(layer))]
    return num_blocks if attention or FINAL_LAYER in layers else min(num_blocks, max(numbers, default=0))


def checkpoint_blocks(blocks: nn.ModuleList, on: bool) -> None:
    """Run blocks by torch's checkpointing, or as they are. Hooks on a block itself are called once all the same.

    That of transformers asks whether a block is in training mode, and a learning encoder's never are.
    """
    for block in blocks:
        block.__dict__.pop("forward", None)
        if on:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


class _Given(nn.Module):
    """Stands where a model embeds its pixels, and says what it was given in their place."""

    def __init__(self, input_size: Size) -> None:
        super().__init__()
        self._input_size = input_size
        self._held: Tensor | None = None
        self.patch_embeddings = nn.Module()  # DINOv3 asks it for the type of its weight
        self.patch_embeddings.register_buffer("weight", torch.empty(0), persistent=False)

    def hold(self, state: Float[Tensor, "i n d"]) -> Float[Tensor, "1 3 h w"]:
        """Keep tokens for the next forward pass; return one black image, of whose shape DINOv3 makes its rotations."""
        self._held = state
        return state.new_zeros((1, 3, *self._input_size), dtype=torch.float32)

    def forward(self, *pixels: Any, **settings: Any) -> Float[Tensor, "i n d"]:
        held, self._held = self._held, None
        assert held is not None
        return held


class _HandOn(nn.Module):
    """Stands where a block was: what goes in comes out."""

    def forward(self, state: Float[Tensor, "i n d"], *others: Any, **named: Any) -> Float[Tensor, "i n d"]:
        return state


def _parse_layer(layer: str, num_blocks: int, name: str) -> tuple[int | None, _Kind]:
    """Which hidden state a layer is, None for the last one, and what becomes of it."""
    if layer == FINAL_LAYER:
        return None, "plain"
    parsed = _LAYER.fullmatch(layer)
    if parsed is None or int(parsed["number"]) > num_blocks:
        raise UsageError(
            f"{name} has no layer {layer!r}: it has {FINAL_LAYER}, 0 to {num_blocks}, 0{NORMED} to "
            f"{num_blocks}{NORMED}, and 0{TOKENS} to {num_blocks}{TOKENS}."
        )
    kinds: dict[str | None, _Kind] = {None: "plain", NORMED: "normed", TOKENS: "tokens"}
    return int(parsed["number"]), kinds[parsed["kind"]]
