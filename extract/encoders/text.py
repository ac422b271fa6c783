"""Text towers behind the `TextEncoder` protocol, loaded by hub id or folder, each by the rules it was trained by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from tokenizers import normalizers
from torch import Tensor
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
        pooled: which output of the model is the pooled feature.
        pooled_width: which setting of the model is its width.
        padded_to_limit: trained on lower-cased prompts that were padded to the limit, without an attention mask, so
            that padding is part of what the tower reads. The other families mask it, and it changes nothing.
    """

    model_class: type[PreTrainedModel]
    pooled: str = "pooler_output"
    pooled_width: str = "hidden_size"
    padded_to_limit: bool = False


_CLIP = TextFamily(CLIPTextModelWithProjection, pooled="text_embeds", pooled_width="projection_dim")
_SIGLIP = TextFamily(SiglipTextModel, pooled_width="projection_size", padded_to_limit=True)
_SIGLIP2 = TextFamily(Siglip2TextModel, pooled_width="projection_size", padded_to_limit=True)

TEXT_FAMILIES = {
    "clip": _CLIP,
    "clip_text_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_text_model": _SIGLIP,
    "siglip2": _SIGLIP2,
    "siglip2_text_model": _SIGLIP2,
    "bert": TextFamily(BertModel),
}
"""By the `model_type` of a checkpoint's config.json; a whole image-and-text model gives its text tower.

The tokenizer is the checkpoint's own: SigLIP 2 of fixed resolution is of type `siglip`, with Gemma's tokenizer.
"""


class HubTextEncoder:
    """Token features (final norm applied) and a pooled feature: CLIP's projected end-of-text token, the last position
    of SigLIP's padded prompt through its head, or BERT's pooler output.

    Args:
        tokenizer: lower-cases where the family asks for it, see `load_text_encoder`.
        config: the checkpoint's config.json, part of its identity.
        digests: of the weights without the spec's adapter, which is merged into them by now, and of the adapter.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        family: TextFamily,
        config: Mapping[str, Any],
        spec: TextEncoderSpec,
        *,
        digests: tuple[str, str] | None = None,
        device: str = "cpu",
    ) -> None:
        self.name = spec.source
        self.adapter = spec.adapter
        self._model = model.to(device)
        self._tokenizer = tokenizer
        self._family = family
        self._config = config
        self._precision = spec.precision
        self._digests = digests
        self._device = device

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        weights, adapter = self._digests or (digest_weights(self._model), None)
        tokenizer: dict[str, Any] = {"sha256": _digest_tokenizer(self._tokenizer), "max_length": self.max_length}
        if self._family.padded_to_limit:
            padding = {"token": self._tokenizer.pad_token_id, "side": self._tokenizer.padding_side}
            tokenizer |= {"lower_case": True, "padding": padding}
        return {
            "class": type(self._model).__name__,
            "config": self._config,
            "weights": weights,
            "adapter": adapter,
            "tokenizer": tokenizer,
            "compute_dtype": self._precision,
        }

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

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt, never padded. A long one is cut among its words: special tokens at its end stay."""
        tokenized = self._tokenizer(list(prompts), truncation=True, max_length=self.max_length)
        token_ids: list[list[int]] = tokenized["input_ids"]
        return token_ids

    @torch.inference_mode()
    def encode(self, token_ids: Sequence[Sequence[int]]) -> TextEncoding:
        """Features of b tokenized prompts, on the encoder's device; the tokens of each prompt stand in front."""
        lengths = torch.tensor([len(ids) for ids in token_ids], device=self._device)
        mask = torch.arange(max(map(len, token_ids)), device=self._device) < lengths[:, None]
        length = self.max_length if self._family.padded_to_limit else mask.shape[1]
        padded = torch.tensor([self._pad(ids, length) for ids in token_ids], device=self._device)
        with computing_in(self._precision, self._device):
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
        places = torch.arange(longest, device=self._device) + states.shape[1] - lengths[:, None]
        return states[torch.arange(len(states), device=self._device)[:, None], places.clamp(max=last)]

    @property
    def _pads_left(self) -> bool:
        return self._family.padded_to_limit and self._tokenizer.padding_side == "left"


def load_text_encoder(spec: TextEncoderSpec, *, device: str = "cpu") -> HubTextEncoder:
    """Load a text encoder with its tokenizer, which for SigLIP is made to lower-case.

    Raises:
        UsageError: the checkpoint, its tokenizer or the adapter cannot be had, is of another family or another model,
            or lacks weights.
    """
    config = read_config(spec.source)
    model_type = config.get("model_type")
    if model_type not in TEXT_FAMILIES:
        raise UsageError(f"{spec.source} has model type {model_type!r}; text encoders are {', '.join(TEXT_FAMILIES)}.")
    family = TEXT_FAMILIES[model_type]
    tokenizer = _load_tokenizer(spec.source, family)
    model = load_checkpoint(family.model_class, spec.source, **_left_to_the_whole(config))
    highest, num_embeddings = max(tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    if highest >= num_embeddings:
        raise UsageError(
            f"the tokenizer of {spec.source} has token ids up to {highest}, and the model has {num_embeddings} token "
            "embeddings; the two belong to different models."
        )
    digests = None
    if spec.adapter is not None:
        weights = digest_weights(model)
        model, adapter = lay_adapter(model, spec.adapter)
        digests = weights, adapter
    return HubTextEncoder(model, tokenizer, family, config, spec, digests=digests, device=device)


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
