"""Small random checkpoints of every family of text towers, with small tokenizers of the classes that they come with."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    GemmaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Siglip2Config,
    Siglip2Model,
    Siglip2TextConfig,
    Siglip2TextModel,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipTextModel,
    SiglipTokenizer,
)

LIMIT = 16
"""The most tokens each of the towers takes."""

HAS_SENTENCEPIECE = find_spec("sentencepiece") is not None
"""SigLIP's first tokenizer cannot do without."""

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": LIMIT,
}
_VISION: dict[str, Any] = {**_SIZES, "image_size": 32, "patch_size": 16}
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORDS = ("red", "dog", "the", "a", "circle", "left", "of")


def make_clip_tokenizer() -> CLIPTokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>"), ("d", "o"), ("do", "g</w>")]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=77)


def make_siglip_tokenizer(folder: Path) -> SiglipTokenizer:
    """The one of the first SigLIP: unigram pieces in a SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2 as pb2

    proto = pb2.ModelProto()
    proto.trainer_spec.model_type = pb2.TrainerSpec.UNIGRAM
    proto.normalizer_spec.name = "identity"
    proto.pieces.add(piece="<unk>", score=0, type=pb2.ModelProto.SentencePiece.UNKNOWN)
    proto.pieces.add(piece="</s>", score=0, type=pb2.ModelProto.SentencePiece.CONTROL)
    for piece in [f"▁{word}" for word in _WORDS]:
        proto.pieces.add(piece=piece, score=-3, type=pb2.ModelProto.SentencePiece.NORMAL)
    for piece in "▁<>" + _LETTERS:
        proto.pieces.add(piece=piece, score=-8, type=pb2.ModelProto.SentencePiece.NORMAL)
    path = folder / "made.model"
    path.write_bytes(proto.SerializeToString())
    return SiglipTokenizer(str(path), model_input_names=["input_ids"])


def make_gemma_tokenizer(
    kind: type[PreTrainedTokenizerBase] = GemmaTokenizer, padding_side: str = "right", **settings: Any
) -> PreTrainedTokenizerBase:
    """The one of SigLIP 2: pieces with bytes to fall back on, and an end token as the published checkpoints say."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += [*_LETTERS, *_LETTERS.upper()]
    merges = [("r", "e"), ("re", "d"), ("R", "E"), ("d", "o"), ("do", "g"), ("▁", "a")]
    vocabulary = {token: index for index, token in enumerate([*tokens, *map("".join, merges)])}
    settings = {"add_bos_token": False, "add_eos_token": True, "model_input_names": ["input_ids"]} | settings
    return kind(vocab=vocabulary, merges=merges, padding_side=padding_side, **settings)


def make_bert_tokenizer() -> BertTokenizer:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_WORDS, *_LETTERS, *(f"##{letter}" for letter in _LETTERS)]
    return BertTokenizer(vocab={token: index for index, token in enumerate(dict.fromkeys(tokens))})


def _clip(tokenizer: PreTrainedTokenizerBase, whole: bool) -> PreTrainedModel:
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**_SIZES, **special, "vocab_size": len(tokenizer), "projection_dim": 24}
    if whole:
        return CLIPModel(CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=24))
    return CLIPTextModelWithProjection(CLIPTextConfig(**text))


def _siglip(tokenizer: PreTrainedTokenizerBase, whole: bool) -> PreTrainedModel:
    text = {**_SIZES, "vocab_size": len(tokenizer), "projection_size": 24}
    if whole:
        return SiglipModel(SiglipConfig(text_config=text, vision_config=_VISION))
    return SiglipTextModel(SiglipTextConfig(**text))


def _siglip2(tokenizer: PreTrainedTokenizerBase, whole: bool) -> PreTrainedModel:
    text = {**_SIZES, "vocab_size": len(tokenizer), "projection_size": 24}
    if whole:
        return Siglip2Model(Siglip2Config(text_config=text, vision_config={**_VISION, "num_patches": 16}))
    return Siglip2TextModel(Siglip2TextConfig(**text))


def _bert(tokenizer: PreTrainedTokenizerBase, whole: bool) -> PreTrainedModel:
    return BertModel(BertConfig(**_SIZES, vocab_size=len(tokenizer)))


_Model = Callable[[PreTrainedTokenizerBase, bool], PreTrainedModel]
_MADE: dict[str, tuple[Callable[[Path], PreTrainedTokenizerBase], _Model, bool]] = {
    "clip": (lambda folder: make_clip_tokenizer(), _clip, True),
    "clip-tower": (lambda folder: make_clip_tokenizer(), _clip, False),
    "siglip": (make_siglip_tokenizer, _siglip, True),
    "siglip-tower": (make_siglip_tokenizer, _siglip, False),
    # As SigLIP 2 of fixed resolution is published: the first SigLIP's class of model, Gemma's of tokenizer.
    "siglip2-fixed": (lambda folder: make_gemma_tokenizer(), _siglip, True),
    "siglip2-fixed-tower": (lambda folder: make_gemma_tokenizer(), _siglip, False),
    "siglip2": (lambda folder: make_gemma_tokenizer(Siglip2Tokenizer), _siglip2, True),
    "siglip2-tower": (lambda folder: make_gemma_tokenizer(Siglip2Tokenizer), _siglip2, False),
    "siglip2-left": (lambda folder: make_gemma_tokenizer(Siglip2Tokenizer, "left"), _siglip2, True),
    "bert": (lambda folder: make_bert_tokenizer(), _bert, True),
}
NAMES = tuple(name for name in _MADE if HAS_SENTENCEPIECE or name not in ("siglip", "siglip-tower"))
"""Of all checkpoints that can be made here."""


def save_text_checkpoint(name: str, folder: Path) -> None:
    """Save one of `NAMES`, with weights so large and so unlike zeros and ones that each makes a difference."""
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer, make_model, whole = _MADE[name]
    tokenizer = make_tokenizer(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make_model(tokenizer, whole)
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.data = 0.3 * noise if parameter.dim() > 1 else parameter.data + 0.1 * noise
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
