"""Text towers behind the `TextEncoder` protocol, loaded by hub id or folder, each by the rules it was trained by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from tokenizers import normalizers
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertModel,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Siglip2TextModel,
    SiglipTextModel,
)

from cache_schema.errors import UsageError
from cache_schema.fingerprint import fingerprint
from extract.encoders.loading import digest_weights, lay_adapter, load_checkpoint, read_config
from extract.encoders.precision import computing_in
from extract.encoders.protocols import TextEncoding
from extract.encoders.specs import TextEncoderSpec


@dataclass(frozen=True)
class TextFamily:
    """What the text towers of a family have in common.

    Args:
        blocks: where the list of blocks is in the model.
        pooled: which output of the model is the pooled feature.
        pooled_width: which setting of the model is its width.
        padded_to_limit: trained on lower-cased prompts that were padded to the limit, without an attention mask, so
            that padding is part of what the tower reads. The other families mask it, and it changes nothing.
    """

    model_class: type[PreTrainedModel]
    blocks: str
    pooled: str = "pooler_output"
    pooled_width: str = "hidden_size"
    padded_to_limit: bool = False


_CLIP = TextFamily(
    CLIPTextModelWithProjection, "text_model.encoder.layers", pooled="text_embeds", pooled_width="projection_dim"
)
_SIGLIP = TextFamily(SiglipTextModel, "encoder.layers", pooled_width="projection_size", padded_to_limit=True)
_SIGLIP2 = TextFamily(Siglip2TextModel, "encoder.layers", pooled_width="projection_size", padded_to_limit=True)

TEXT_FAMILIES = {
    "clip": _CLIP,
    "clip_text_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_text_model": _SIGLIP,
    "siglip2": _SIGLIP2,
    "siglip2_text_model": _SIGLIP2,
    "bert": TextFamily(BertModel, "encoder.layer"),
}
"""By the `model_type` of a checkpoint's config.json; a whole image-and-text model gives its text tower.

The tokenizer is the checkpoint's own: SigLIP 2 of fixed resolution is of type `siglip`, with Gemma's tokenizer.
"""


TextAdapt = Callable[[PreTrainedModel, TextFamily], tuple[PreTrainedModel, str | None]]
"""Lays an adapter on a model of a family, or does not; returns the model and the digest of the adapter."""


class TextTower(nn.Module):
    """Token features (final norm applied) and a pooled feature: CLIP's projected end-of-text token, the last position
    of SigLIP's padded prompt through its head, or BERT's pooler output.

    Args:
        tokenizer: lower-cases where the family asks for it, see `load_text_encoder`.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, family: TextFamily) -> None:
        super().__init__()
        self._model = model
        self._tokenizer = tokenizer
        self._family = family

    @property
    def blocks(self) -> nn.ModuleList:
        """The model's blocks."""
        blocks = self._model.get_submodule(self._family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @property
    def token_width(self) -> int:
        return int(self._model.config.hidden_size)

    @property
    def pooled_width(self) -> int:
        return int(getattr(self._model.config, self._family.pooled_width))

    @property
    def max_length(self) -> int:
        """The most tokens a prompt may have: the model's limit, or its tokenizer's where that is lower."""
        return int(min(self._model.config.max_position_embeddings, self._tokenizer.model_max_length))

    def describe_tokenizer(self) -> dict[str, Any]:
        """What of the tokenizer belongs to an encoder's identity."""
        tokenizer: dict[str, Any] = {"sha256": _digest_tokenizer(self._tokenizer), "max_length": self.max_length}
        if self._family.padded_to_limit:
            padding = {"token": self._tokenizer.pad_token_id, "side": self._tokenizer.padding_side}
            tokenizer |= {"lower_case": True, "padding": padding}
        return tokenizer

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt, never padded. A long one is cut among its words: special tokens at its end stay."""
        tokenized = self._tokenizer(list(prompts), truncation=True, max_length=self.max_length)
        token_ids: list[list[int]] = tokenized["input_ids"]
        return token_ids

    def forward(self, token_ids: Sequence[Sequence[int]]) -> TextEncoding:
        """Features of b tokenized prompts, where the model is; the tokens of each prompt stand in front."""
        device = self._model.device
        lengths = torch.tensor([len(ids) for ids in token_ids], device=device)
        mask = torch.arange(max(map(len, token_ids)), device=device) < lengths[:, None]
        length = self.max_length if self._family.padded_to_limit else mask.shape[1]
        padded = torch.tensor([self._pad(ids, length) for ids in token_ids], device=device)
        if self._family.padded_to_limit:
            output = self._model(input_ids=padded)
        else:
            output = self._model(input_ids=padded, attention_mask=mask.long())
        tokens = self._without_padding(output.last_hidden_state, lengths, mask.shape[1])
        return TextEncoding(tokens, mask, getattr(output, self._family.pooled))

    def _pad(self, ids: Sequence[int], length: int) -> list[int]:
        if not self._family.padded_to_limit:
            # CLIP pools where the end token stands first, or in older checkpoints the largest id: a repeated token
            # is neither, whatever the tokenizer pads with.
            return [*ids, *[ids[-1]] * (length - len(ids))]
        padding = [self._tokenizer.pad_token_id] * (length - len(ids))
        return [*padding, *ids] if self._pads_left else [*ids, *padding]

    def _without_padding(
        self, states: Float[Tensor, "b padded d"], lengths: Int[Tensor, " b"], longest: int
    ) -> Float[Tensor, "b l d"]:
        """Each prompt's own tokens from the first column on, as many columns as the longest has tokens."""
        if not self._pads_left:
            return states[:, :longest]
        last = states.shape[1] - 1
        places = torch.arange(longest, device=states.device) + states.shape[1] - lengths[:, None]
        return states[torch.arange(len(states), device=states.device)[:, None], places.clamp(max=last)]

    @property
    def _pads_left(self) -> bool:
        return self._family.padded_to_limit and self._tokenizer.padding_side == "left"


class HubTextEncoder:
    """A tower with what makes it known.

    Args:
        tower: on the CPU.
        identity: all that decides the features.
    """

    def __init__(
        self, tower: TextTower, identity: Mapping[str, Any], spec: TextEncoderSpec, *, device: str = "cpu"
    ) -> None:
        self.name = spec.source
        self.adapter = spec.adapter
        self._tower = tower.to(device).eval()
        self._identity = identity
        self._precision = spec.precision
        self._device = device

    @property
    def identity(self) -> Mapping[str, Any]:
        return self._identity

    @property
    def token_width(self) -> int:
        return self._tower.token_width

    @property
    def pooled_width(self) -> int:
        return self._tower.pooled_width

    @property
    def max_length(self) -> int:
        """The most tokens a prompt may have."""
        return self._tower.max_length

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt, never padded. A long one is cut among its words: special tokens at its end stay."""
        return self._tower.tokenize(prompts)

    @torch.inference_mode()
    def encode(self, token_ids: Sequence[Sequence[int]]) -> TextEncoding:
        """Features of b tokenized prompts, on the encoder's device; the tokens of each prompt stand in front."""
        with computing_in(self._precision, self._device):
            encoding: TextEncoding = self._tower(token_ids)
        return encoding


def load_text_encoder(spec: TextEncoderSpec, *, device: str = "cpu") -> HubTextEncoder:
    """Load a text encoder with its tokenizer, which for SigLIP is made to lower-case.

    Raises:
        UsageError: the checkpoint, its tokenizer or the adapter cannot be had, is of another family or another model,
            or lacks weights.
    """

    def adapt(model: PreTrainedModel, family: TextFamily) -> tuple[PreTrainedModel, str | None]:
        return (model, None) if spec.adapter is None else lay_adapter(model, spec.adapter)

    tower, identity = load_text_parts(spec, adapt)
    return HubTextEncoder(tower, identity, spec, device=device)


def load_text_parts(spec: TextEncoderSpec, adapt: TextAdapt) -> tuple[TextTower, dict[str, Any]]:
    """Load a tower, and as plain JSON all that decides its features.

    Args:
        adapt: what is to be done to the model. `spec.adapter` is left to it.

    Raises:
        UsageError: as `load_text_encoder` does.
    """
    config = read_config(spec.source)
    family = _family_of(config, spec.source)
    tokenizer = _load_tokenizer(spec.source, family)
    model = load_text_model(spec.source)
    highest, num_embeddings = max(tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    if highest >= num_embeddings:
        raise UsageError(
            f"the tokenizer of {spec.source} has token ids up to {highest}, and the model has {num_embeddings} token "
            "embeddings; the two belong to different models."
        )
    weights = digest_weights(model)
    model, adapter = adapt(model, family)
    tower = TextTower(model, tokenizer, family)
    identity = {
        "class": family.model_class.__name__,
        "config": config,
        "weights": weights,
        "adapter": adapter,
        "tokenizer": tower.describe_tokenizer(),
        "compute_dtype": spec.precision,
    }
    return tower, identity


def load_text_model(source: str) -> PreTrainedModel:
    """The text model of a checkpoint, in float32, frozen and in evaluation mode.

    Raises:
        UsageError: the checkpoint cannot be had, is of another family, or lacks weights.
    """
    config = read_config(source)
    return load_checkpoint(_family_of(config, source).model_class, source, **_left_to_the_whole(config))


def _family_of(config: Mapping[str, Any], source: str) -> TextFamily:
    model_type = config.get("model_type")
    if model_type not in TEXT_FAMILIES:
        raise UsageError(f"{source} has model type {model_type!r}; text encoders are {', '.join(TEXT_FAMILIES)}.")
    return TEXT_FAMILIES[model_type]


def _left_to_the_whole(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a CLIP text tower's own config leaves to that of the whole model: the width of its projection."""
    width, of_tower = "projection_dim", config.get("text_config", {})
    is_left = config.get("model_type") == "clip" and width in config and width not in of_tower
    return {width: config[width]} if is_left else {}


def _load_tokenizer(source: str, family: TextFamily) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing more specific
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UsageError(f"the tokenizer of {source} cannot be loaded ({reason}).") from error
    # Without its files, transformers makes up a tokenizer that knows its special tokens and nothing else.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise UsageError(f"{source} lacks its tokenizer's vocabulary; fetch the checkpoint again.")
    if not tokenizer.is_fast and type(tokenizer).__name__ != "SiglipTokenizer":
        raise UsageError(
            f"{source} has a {type(tokenizer).__name__}, which cannot be loaded from a tokenizer.json; "
            "name a checkpoint with a tokenizer that can."
        )
    if family.padded_to_limit:
        if tokenizer.pad_token_id is None:
            raise UsageError(f"the tokenizer of {source} has no padding token, and {source} reads padded prompts.")
        _lower_case(tokenizer)
    if not tokenizer("")["input_ids"]:
        raise UsageError(f"the tokenizer of {source} adds no end token; set add_eos_token in tokenizer_config.json.")
    return tokenizer


def _lower_case(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a tokenizer lower-case, as Siglip2Tokenizer and SiglipTokenizer do on their own, and Gemma's does not."""
    if not tokenizer.is_fast:
        tokenizer.do_lower_case = True
        return
    backend = tokenizer.backend_tokenizer
    others = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *others])


def _digest_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over all that decides which ids a prompt becomes, but for the length."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        for of_last_call in ("truncation", "padding"):
            rules.pop(of_last_call, None)
    else:
        added = {str(index): token.__getstate__() for index, token in tokenizer.added_tokens_decoder.items()}
        model = hashlib.sha256(tokenizer.sp_model.serialized_model_proto()).hexdigest()
        rules = {"class": type(tokenizer).__name__, "model": model, "added_tokens": added}
    truncation = {"side": tokenizer.truncation_side, "split_special_tokens": tokenizer.split_special_tokens}
    return fingerprint({"rules": rules, **truncation})
