"""An encoder's tokenizer as a `tokenizer.json` that says the same on its own: no other file or setting is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer

from cache_schema.errors import UsageError

PROMPTS = (
    "the red circle",
    "A",
    "all of the LARGE green shapes to the left of the blue ones",
    'an ultramarine zeppelin, né 1900 🎈; "left"-most  of 3\tdogs\' [SEP] </s>',
    "two of the smallest yellow triangles that are not next to a square, " * 40,
)
"""What a tokenizer is tried on: words, capitals, signs, what looks like special tokens, and more than fits."""


def make_tokenizer_json(
    source: str, settings: Mapping[str, Any], tokenize: Callable[[Sequence[str]], list[list[int]]]
) -> str:
    """The tokenizer of a checkpoint with its lower-casing and its limit inside, and without padding.

    Args:
        source: hub id or folder.
        settings: `max_length`, and where prompts are made lower case `lower_case`, as the identity of a text encoder
            has them.
        tokenize: what the encoder itself makes of prompts.

    Raises:
        UsageError: the tokenizer cannot be written so, or would say something else.
    """
    remedy = "export the head alone with --what head."
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise UsageError(
            f"the tokenizer of {source} is a {type(tokenizer).__name__}, which has no tokenizer.json; {remedy}"
        )
    backend = tokenizer.backend_tokenizer
    if settings.get("lower_case", False):
        others = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *others])
    backend.no_padding()
    backend.enable_truncation(int(settings["max_length"]), direction=tokenizer.truncation_side)
    text: str = backend.to_str()
    found = [encoded.ids for encoded in Tokenizer.from_str(text).encode_batch(list(PROMPTS))]
    if found != tokenize(PROMPTS):
        raise UsageError(f"the tokenizer of {source} says other things from a tokenizer.json of its own; {remedy}")
    return text
