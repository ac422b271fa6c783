"""Prompts made from a seed, and ways to get their features: ours, and the bare text tower that limits it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModelWithProjection

from benchmarks.measuring import Ready, Request, finish
from cache_schema.samples import open_samples
from extract.encoders.specs import TextEncoderSpec
from extract.encoders.text import load_text_encoder
from extract.prompt_job import PromptJobConfig, extract_prompts

FEWEST_WORDS, MOST_WORDS = 2, 20
_WORDS = """
a the and that is with on in of at left right top bottom below above between near red green blue yellow white black
grey dark light small large striped person man woman child dog cat horse bird car bus truck bicycle boat chair table
sofa bed tree grass sky road house cup bottle plate bowl food book phone ball wearing holding standing sitting
""".split()


def make_prompts(num_prompts: int, seed: int = 0) -> list[str]:
    """Unique prompts of 2 to 20 everyday words, all lengths equally often."""
    rng = np.random.default_rng(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < num_prompts:
        num_words = int(rng.integers(FEWEST_WORDS, MOST_WORDS + 1))
        prompts[" ".join(_WORDS[word] for word in rng.integers(len(_WORDS), size=num_words))] = None
    return list(prompts)


def make_ours(request: Request) -> Ready:
    """The whole job, from opening the samples store and tokenizing to the manifest of the finished feature store."""
    spec = TextEncoderSpec(request.checkpoint, precision=request.precision)
    encoder = load_text_encoder(spec, device=request.device)
    config = PromptJobConfig(Path(request.samples), Path(request.out), batch_size=request.batch_size)
    prompts = open_samples(Path(request.samples)).samples.prompts

    def encode(num: int) -> None:
        encoder.encode(encoder.tokenize(prompts[:num]))
        finish(request.device)

    def run() -> Mapping[str, Any]:
        stages = extract_prompts(config, encoder).stages
        return {"stages": stages.to_dict(), "binds": stages.binds}

    encode(1)
    return Ready(len(prompts), partial(encode, request.batch_size), run)


def make_bare(request: Request) -> Ready:
    """The limit: the tower on token ids that are tensors already, in batches of like lengths."""
    ids, _ = _tokenize(request)
    ids.sort(key=len)
    return _make_forward(request, ids, lambda batch: len(batch[-1]))


def make_padded(request: Request) -> Ready:
    """The tower on prompts in the order in which they come, all padded to its limit."""
    ids, limit = _tokenize(request)
    return _make_forward(request, ids, lambda batch: limit)


def _tokenize(request: Request) -> tuple[list[list[int]], int]:
    tokenizer = AutoTokenizer.from_pretrained(request.checkpoint)
    prompts = open_samples(Path(request.samples)).samples.prompts[: request.limit]
    return tokenizer(list(prompts), truncation=True)["input_ids"], int(tokenizer.model_max_length)


def _make_forward(request: Request, ids: Sequence[list[int]], width: Callable[[Sequence[list[int]]], int]) -> Ready:
    model = CLIPTextModelWithProjection.from_pretrained(request.checkpoint, dtype=torch.float32)
    model = model.eval().to(request.device)
    starts = range(0, len(ids), request.batch_size)
    batches = [_pad(ids[start : start + request.batch_size], width, request.device) for start in starts]

    @torch.inference_mode()
    def forward(some: Sequence[tuple[Tensor, Tensor]]) -> Mapping[str, Any]:
        for tokens, mask in some:
            model(input_ids=tokens, attention_mask=mask)
        finish(request.device)
        return {}

    forward([(tokens[:1], mask[:1]) for tokens, mask in batches[:1]])
    return Ready(len(ids), partial(forward, batches[-1:]), partial(forward, batches))


def _pad(batch: Sequence[list[int]], width: Callable[[Sequence[list[int]]], int], device: str) -> tuple[Tensor, Tensor]:
    length = width(batch)
    tokens = torch.tensor([[*ids, *[ids[-1]] * (length - len(ids))] for ids in batch], device=device)
    lengths = torch.tensor([len(ids) for ids in batch], device=device)
    return tokens, (torch.arange(length, device=device) < lengths[:, None]).long()
