"""The embedded encoders: tiny models of real classes, made once from a seed and saved as any checkpoint is.

They are untrained. A random vision transformer is a fixed random map of patches and their surroundings, enough for a
head to learn colours, shapes and places from; it knows nothing of the world.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from cache_schema import atomic

IMAGE_SIDE_PX = 192
PATCH_PX = 16
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORDS = """
a all and the that is are with without on in of to at one two three no not
red green blue yellow purple orange white black grey brown pink dark light
circle square triangle star ring cross shape shapes object objects circles squares triangles stars rings crosses
small large big tiny little largest smallest biggest plain striped dotted checkered
left right top bottom leftmost rightmost topmost bottommost lowest highest above below under over near between middle
person man woman child dog cat horse bird car bus truck bicycle boat chair table sofa bed tree grass sky road house
cup bottle plate bowl food book phone ball wearing holding standing sitting
""".split()


@dataclass(frozen=True)
class TinyEncoders:
    """Folders of the two checkpoints."""

    image: Path
    text: Path


def make_tiny_encoders(folder: Path, seed: int = 0) -> TinyEncoders:
    """Make both checkpoints under `folder`, or leave those that are there; return their folders."""
    encoders = TinyEncoders(folder / "tiny-dinov2-reg", folder / "tiny-clip-text")
    for path, save in ((encoders.image, _save_image_encoder), (encoders.text, _save_text_encoder)):
        if path.is_dir():
            continue
        try:
            with atomic.staged(path) as temporary:
                save(temporary, seed)
        except OSError:
            if not path.is_dir():  # else another process made the very same folder first
                raise
    return encoders


def _save_image_encoder(folder: Path, seed: int) -> None:
    config = Dinov2WithRegistersConfig(
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIDE_PX,
        patch_size=PATCH_PX,
        num_register_tokens=4,
        untrained=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Dinov2WithRegistersModel(config).save_pretrained(folder)
    processor = BitImageProcessorPil(
        size={"height": IMAGE_SIDE_PX, "width": IMAGE_SIDE_PX},
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    processor.save_pretrained(folder)


def _save_text_encoder(folder: Path, seed: int) -> None:
    tokenizer = _make_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=384,
        projection_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        untrained=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPTextModelWithProjection(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _make_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level tokenizer with merges for a few everyday words; any other word falls into its letters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _learn_merges(_WORDS)
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), _START, _END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def _learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges until every word is one token. Ties go to the smaller pair, so the outcome never varies.

    The trainer of `tokenizers` breaks ties in the order of a hash table, which differs from run to run.
    """
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in dict.fromkeys(words)]
    merges = []
    while any(len(symbols) > 1 for symbols in spelled):
        counts = Counter(pair for symbols in spelled for pair in pairwise(symbols))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        spelled = [_merge(symbols, best) for symbols in spelled]
    return merges


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged
