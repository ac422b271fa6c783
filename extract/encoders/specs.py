"""Encoders as plain values: what to load and how to run it, small enough to send to a worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from cache_schema.errors import UsageError, unknown_name
from cache_schema.masks import Size
from cache_schema.views import ASPECTS, Aspect

Precision = Literal["float32", "bfloat16", "float16"]
"""What an encoder computes in: float32, or the autocast of one of the half types."""

AttentionOutput = Literal["logits", "head_tokens", "mean_token"]
"""What Talk2DINO takes from the last block: see `extract.encoders.attention`."""

FINAL_LAYER = "last"
"""`last_hidden_state` exactly as transformers returns it: after the final norm, where the model applies one to it."""

NORMED = "+norm"
"""Behind a block's number: that block's output after the model's final norm."""


@dataclass(frozen=True)
class ImageEncoderSpec:
    """An image encoder.

    Args:
        source: hub id, or a folder that `save_pretrained` wrote.
        layers: `"last"`, block numbers (`"9"` is `hidden_states[9]`, not normed; `"0"` the embeddings), and block
            numbers with `"+norm"` or `"+tokens"`. Of a pyramid: stage numbers.
        attention: which attention outputs of the last block to give, in the DINO family.
        input_size: (H, W) in pixels; None for the size the checkpoint was trained at.
        aspect: how an image of another shape than the input's gets into it, see `cache_schema.views.fit_view`.
        adapter: folder of a PEFT adapter to lay on.
    """

    source: str
    layers: tuple[str, ...] = (FINAL_LAYER,)
    attention: tuple[AttentionOutput, ...] = ()
    input_size: Size | None = None
    aspect: Aspect = "squash"
    precision: Precision = "float32"
    adapter: str | None = None

    def __post_init__(self) -> None:
        _check(self.precision, "precision", get_args(Precision))
        _check(self.aspect, "aspect", ASPECTS)
        for output in self.attention:
            _check(output, "attention output", get_args(AttentionOutput))
        if not self.layers and not self.attention:
            raise UsageError("no layer is asked for; name at least one, such as last.")


@dataclass(frozen=True)
class TextEncoderSpec:
    """A text encoder; the fields are those of `ImageEncoderSpec`."""

    source: str
    precision: Precision = "float32"
    adapter: str | None = None

    def __post_init__(self) -> None:
        _check(self.precision, "precision", get_args(Precision))


def _check(value: str, kind: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise unknown_name(kind, value, known)
