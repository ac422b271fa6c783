"""Encoders that learn together with a head. They are handed in: what they are made of, heads do not know.

What stays frozen comes from the cache, as ever; a side that is live is encoded anew from what it is given: pixels or
hidden states of images, token ids of prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, Shaped
from numpy.typing import NDArray
from torch import Tensor, nn

from cache_schema.features import FeatureCache
from heads.data import Batch
from heads.inputs import HeadInputs, HeadOutputs, StoredInputs

ADAPTERS = {"image": "adapter", "text": "text_adapter"}
"""The folders of a run in which the adapters of either side are kept, as PEFT writes them."""


@runtime_checkable
class Seen(Protocol):
    """What a live image encoder gives: see `HeadInputs`."""

    @property
    def features(self) -> Mapping[str, Tensor]: ...

    @property
    def cls(self) -> Mapping[str, Tensor]: ...

    @property
    def attention(self) -> Mapping[str, Tensor]: ...


@runtime_checkable
class Read(Protocol):
    """What a live text encoder gives of u prompts: (u, l, e) tokens, (u, l) mask, (u, p) pooled."""

    @property
    def tokens(self) -> Tensor: ...

    @property
    def mask(self) -> Tensor: ...

    @property
    def pooled(self) -> Tensor: ...


@runtime_checkable
class ImageSource(Protocol):
    """Where that comes from which a live image encoder is given."""

    def load(self, rows: NDArray[np.int64]) -> Tensor:
        """What rows of the cache's image-feature store look at: pixels or hidden states."""
        ...


@dataclass(frozen=True)
class LiveInputs:
    """Inputs of a batch of b prompts about i images, of which a part is still to be encoded.

    Args:
        cached: what stays frozen. Of a live side it says nothing but `image_index`.
        given: what a live image encoder is called with; None where images stay frozen.
        token_ids: of u prompts; None where prompts stay frozen.
        prompt_index: which of the u each of the b is.
    """

    cached: StoredInputs | HeadInputs
    given: Shaped[Tensor, "i ..."] | None = None
    token_ids: Sequence[Sequence[int]] | None = None
    prompt_index: Int[Tensor, " b"] | None = None

    def to(self, device: torch.device | str) -> LiveInputs:
        """The same on a device, what is cached in float32."""
        given = None if self.given is None else self.given.to(device, non_blocking=True)
        index = None if self.prompt_index is None else self.prompt_index.to(device)
        return LiveInputs(self.cached.to(device), given, self.token_ids, index)

    def part(self, start: int, stop: int) -> tuple[LiveInputs, Tensor]:
        """Images `start` to `stop` with the prompts about them, and which of the b prompts those are."""
        cached = self.cached
        places = ((cached.image_index >= start) & (cached.image_index < stop)).nonzero()[:, 0]
        fields: dict[str, Any] = {
            name: {key: value[start:stop] for key, value in getattr(cached, name).items()}
            for name in ("features", "cls", "attention", "scale")
            if hasattr(cached, name)
        }
        fields |= {name: getattr(cached, name)[places] for name in ("prompt_tokens", "prompt_mask", "pooled")}
        kept = type(cached)(**fields, image_index=cached.image_index[places] - start)
        token_ids, prompt_index = self.token_ids, self.prompt_index
        if token_ids is not None and prompt_index is not None:
            used, prompt_index = torch.unique(prompt_index[places], return_inverse=True)
            token_ids = [token_ids[prompt] for prompt in used.tolist()]
        given = None if self.given is None else self.given[start:stop]
        return LiveInputs(kept, given, token_ids, prompt_index), places


@dataclass(frozen=True)
class LiveBatch(Batch):
    """A batch with what live encoders are to be given."""

    live: LiveInputs


class EndToEnd(nn.Module):
    """Live encoders before whatever learns from what they say: a head, or a head asked for its embeddings."""

    def __init__(self, learner: nn.Module, image: nn.Module | None, text: nn.Module | None) -> None:
        super().__init__()
        self.learner = learner
        self.image = image
        self.text = text

    def forward(self, inputs: LiveInputs) -> HeadOutputs:
        """Encode what is to be encoded, then ask the head."""
        encoded = inputs.cached
        assert isinstance(encoded, HeadInputs), "inputs are moved to a device first"
        if self.image is not None:
            seen: Seen = self.image(inputs.given)
            encoded = replace(
                encoded, features=_float(seen.features), cls=_float(seen.cls), attention=_float(seen.attention)
            )
        if self.text is not None:
            read: Read = self.text(inputs.token_ids)
            index = inputs.prompt_index
            assert index is not None
            tokens = read.tokens.float() * read.mask[..., None]
            encoded = replace(
                encoded,
                prompt_tokens=tokens[index],
                prompt_mask=read.mask[index],
                pooled=read.pooled.float()[index],
            )
        outputs: HeadOutputs = self.learner(encoded)
        return outputs


@dataclass(frozen=True)
class LiveEncoders:
    """The encoders of a cache, of which one or both are live. Where their adapters are frozen, the head learns alone.

    Args:
        image, text: live encoders; None for a side that stays frozen and is read from the cache. Each has the
            `identity` of what it was loaded from, `adapted_modules`, whose parameters alone require gradients, and
            `save_adapter(folder)`, which writes them in PEFT's format.
        images: where that comes from which `image` is given.
        rate: the learning rate of the adapters, as a share of the head's.
        images_at_once: where the loss only compares, encode so many images of a batch at once, which takes less memory
            and more time and gives the same gradients; None for all of them. See `heads.gradient_cache`.
        identity: what else decides what is learned: adapters' settings, where the forward pass starts.
    """

    cache: FeatureCache
    image: nn.Module | None
    text: nn.Module | None
    images: ImageSource | None
    rate: float = 1.0
    images_at_once: int | None = None
    identity: Mapping[str, Any] | None = None

    @property
    def sides(self) -> dict[str, nn.Module]:
        """The live ones by side."""
        return {side: live for side, live in (("image", self.image), ("text", self.text)) if live is not None}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of the adapters."""
        return [value for live in self.sides.values() for value in live.parameters() if value.requires_grad]

    @property
    def adapted_modules(self) -> dict[str, list[str]]:
        """By side, the names of the modules with an adapter."""
        encoders: Any = self.sides
        return {side: list(live.adapted_modules) for side, live in encoders.items()}

    def around(self, learner: nn.Module) -> EndToEnd:
        """The whole way from what is given to the learner's outputs."""
        return EndToEnd(learner, self.image, self.text)

    def fill(self, batch: Batch) -> LiveBatch:
        """A batch of the cache with what live encoders are to be given."""
        token_ids = prompt_index = None
        if self.text is not None:
            prompts, index = np.unique(batch.prompt_rows, return_inverse=True)
            store, offsets = self.cache.prompts.token_ids, self.cache.prompts.offsets
            token_ids = [store[offsets[prompt] : offsets[prompt + 1]].tolist() for prompt in prompts.tolist()]
            prompt_index = torch.from_numpy(index)
        given = None if self.images is None else self.images.load(batch.image_rows)
        return LiveBatch(**vars(batch), live=LiveInputs(batch.inputs, given, token_ids, prompt_index))

    def to(self, device: torch.device | str) -> None:
        """Move the live encoders."""
        for live in self.sides.values():
            live.to(device)

    def state(self) -> dict[str, Tensor]:
        """The weights of the adapters, by side and name."""
        return {
            f"{side}.{name}": value.detach().clone()
            for side, live in self.sides.items()
            for name, value in live.named_parameters()
            if value.requires_grad
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Give the adapters the weights that `state()` gave."""
        for side, live in self.sides.items():
            for name, value in live.named_parameters():
                if value.requires_grad:
                    value.copy_(state[f"{side}.{name}"])

    def save(self, folder: Path) -> None:
        """Write the adapters, each to its folder of `ADAPTERS`."""
        for side, live in self.sides.items():
            live.save_adapter(folder / ADAPTERS[side])  # type: ignore[operator]


def _float(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in tensors.items()}
