"""CLIP's text tower behind the `TextEncoder` protocol, loaded by hub id or folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import AutoTokenizer, CLIPTextModelWithProjection, PreTrainedModel, PreTrainedTokenizerBase

from cache_schema.errors import UsageError
from cache_schema.fingerprint import fingerprint
from extract.encoders.loading import digest_weights, from_hub, load_checkpoint, read_config
from extract.encoders.protocols import TextEncoding

TEXT_MODELS: dict[str, type[PreTrainedModel]] = {
    "clip": CLIPTextModelWithProjection,
    "clip_text_model": CLIPTextModelWithProjection,
}
"""By the `model_type` of a checkpoint's config.json; a whole CLIP model gives its text tower."""


class ClipTextEncoder:
    """Token features (final norm applied) and the projected end-of-text feature of CLIP's text tower.

    Padding stands to the right of a causal tower, so it changes no token's feature and none is kept.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        device: str = "cpu",
    ) -> None:
        self.name = name
        self._model = model.to(device)
        self._config = config
        self._tokenizer = tokenizer
        self._device = device

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        tokenizer = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for of_last_call in ("truncation", "padding"):
            tokenizer.pop(of_last_call, None)
        return {
            "class": type(self._model).__name__,
            "config": self._config,
            "weights": digest_weights(self._model),
            "adapter": None,
            "tokenizer": {
                "sha256": fingerprint(tokenizer),
                "max_length": self.max_length,
            },
            "compute_dtype": "float32",
        }

    @property
    def token_width(self) -> int:
        return int(self._model.config.hidden_size)

    @property
    def pooled_width(self) -> int:
        return int(self._model.config.projection_dim)

    @property
    def max_length(self) -> int:
        """The most tokens a prompt may have; longer ones are cut before the end-of-text token."""
        return int(self._model.config.max_position_embeddings)

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt, start-of-text and end-of-text included, never padded."""
        token_ids: list[list[int]] = self._tokenizer(list(prompts), truncation=True, max_length=self.max_length)[
            "input_ids"
        ]
        return token_ids

    @torch.inference_mode()
    def encode(self, token_ids: Sequence[Sequence[int]]) -> TextEncoding:
        """Features of b tokenized prompts, in float32, on the encoder's device."""
        lengths = torch.tensor([len(ids) for ids in token_ids])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        padded = torch.full(mask.shape, self._tokenizer.pad_token_id)
        padded[mask] = torch.tensor([token for ids in token_ids for token in ids])
        mask = mask.to(self._device)
        output = self._model(input_ids=padded.to(self._device), attention_mask=mask.long())
        return TextEncoding(output.last_hidden_state, mask, output.text_embeds)


def load_text_encoder(source: str, *, device: str = "cpu") -> ClipTextEncoder:
    """Load a text encoder with its tokenizer by hub id or folder.

    Raises:
        UsageError: the checkpoint cannot be had, is of another family, or lacks weights.
    """
    config = read_config(source)
    family = config.get("model_type")
    if family not in TEXT_MODELS:
        raise UsageError(f"{source} has model type {family!r}; text encoders are {', '.join(TEXT_MODELS)}.")
    tokenizer = from_hub(source, lambda: AutoTokenizer.from_pretrained(source, trust_remote_code=False))
    return ClipTextEncoder(load_checkpoint(TEXT_MODELS[family], source), config, tokenizer, source, device)
