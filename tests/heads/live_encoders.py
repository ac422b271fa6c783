"""Live encoders of no model: the cached features themselves, and an adapter that adds a low-rank change to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cache_schema.features import FeatureCache
from heads.live import ADAPTERS, LiveEncoders
from heads.parity import identities


class Adapter(nn.Module):
    """x + B A x, with B = 0 at the start."""

    def __init__(self, width: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.ones(width), requires_grad=False)
        self.down = nn.Linear(width, 2, bias=False)
        self.up = nn.Linear(2, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.frozen + self.up(self.down(self.dropout(x)))


@dataclass(frozen=True)
class Seen:
    features: Mapping[str, Tensor]
    cls: Mapping[str, Tensor]
    attention: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Read:
    tokens: Tensor
    mask: Tensor
    pooled: Tensor


class FakeEncoder(nn.Module):
    """What both sides have in common."""

    def __init__(self, width: int, identity: Mapping[str, Any], dropout: float) -> None:
        super().__init__()
        self.adapter = Adapter(width, dropout=dropout)
        self.identity = identity
        self.adapted_modules = ("adapter",)

    def save_adapter(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().clone() for name, value in self.adapter.named_parameters()}
        save_file(weights, folder / "adapter_model.safetensors")

    def load_adapter(self, folder: Path) -> None:
        self.adapter.load_state_dict(load_file(folder / "adapter_model.safetensors"))


class FakeImages(FakeEncoder):
    """Given (i, 1 + gh gw, d): a CLS token and patches of layer last."""

    def __init__(self, cache: FeatureCache, dropout: float = 0.0) -> None:
        _, *grid = cache.images.features("last").shape
        super().__init__(grid[2], identities(cache)["image"], dropout)
        self.grid = grid

    def forward(self, given: Tensor) -> Seen:
        adapted = self.adapter(given)
        return Seen({"last": adapted[:, 1:].reshape(len(given), *self.grid)}, {"last": adapted[:, 0]})


class FakeTexts(FakeEncoder):
    """The cached tokens of the prompt with the same ids, its pooled feature with a change of their mean."""

    def __init__(self, cache: FeatureCache, dropout: float = 0.0) -> None:
        self_tokens = torch.from_numpy(cache.prompts.tokens()).float()
        super().__init__(self_tokens.shape[1], identities(cache)["text"], dropout)
        offsets, ids = cache.prompts.offsets.tolist(), cache.prompts.token_ids
        pooled = torch.from_numpy(cache.prompts.pooled()).float()
        self.known = {
            tuple(ids[start:stop].tolist()): (self_tokens[start:stop], pooled[prompt])
            for prompt, (start, stop) in enumerate(pairwise(offsets))
        }

    def forward(self, token_ids: Sequence[Sequence[int]]) -> Read:
        found = [self.known[tuple(ids)] for ids in token_ids]
        tokens = nn.utils.rnn.pad_sequence([tokens for tokens, _ in found], batch_first=True)
        lengths = torch.tensor([len(tokens) for tokens, _ in found])
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        adapted = self.adapter(tokens)
        pooled = torch.stack([pooled for _, pooled in found])
        return Read(adapted, mask, pooled + (adapted - tokens).mean((1, 2))[:, None])


class FakeSource:
    """Rows of the cache itself."""

    def __init__(self, cache: FeatureCache) -> None:
        self.features, self.cls = (
            torch.from_numpy(reader.read(np.arange(len(reader)))).float() for reader in _readers(cache)
        )

    def load(self, rows: NDArray[np.int64]) -> Tensor:
        chosen = torch.from_numpy(rows)
        return torch.cat([self.cls[chosen][:, None], self.features[chosen].flatten(1, 2)], 1)


def _readers(cache: FeatureCache) -> list[Any]:
    return [cache.images.features("last"), cache.images.cls("last")]


@dataclass(frozen=True)
class FakeFactory:
    """Makes them; `changed` is added to all that the live image encoder is given."""

    cache: FeatureCache
    sides: tuple[str, ...] = ("image",)
    dropout: float = 0.0
    images_at_once: int | None = None

    def frozen(self) -> LiveEncoders:
        return self._make(None, learn=False)

    def adapted(self, adapters: Path | None, *, learn: bool) -> LiveEncoders:
        return self._make(adapters, learn=learn)

    def _make(self, adapters: Path | None, *, learn: bool) -> LiveEncoders:
        torch.manual_seed(5)
        kinds = {"image": FakeImages, "text": FakeTexts}
        sides: dict[str, Any] = {side: kinds[side](self.cache, self.dropout) for side in self.sides}
        for side, live in sides.items():
            if adapters is not None:
                live.load_adapter(adapters / ADAPTERS[side])
            if not learn:
                live.requires_grad_(False)
        source = FakeSource(self.cache) if "image" in sides else None
        return LiveEncoders(
            self.cache, sides.get("image"), sides.get("text"), source, images_at_once=self.images_at_once
        )
