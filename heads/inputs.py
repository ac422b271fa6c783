"""What every head takes and returns."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from cache_schema.errors import unknown_name


@dataclass(frozen=True)
class FeatureShapes:
    """The shapes a head is built for: (gh, gw, d) of each cached layer, and the widths of prompt features."""

    grids: Mapping[str, tuple[int, int, int]]
    token_width: int
    pooled_width: int

    def layers(self, names: Sequence[str] | None) -> tuple[str, ...]:
        """The named layers, or by default the last that was cached.

        Raises:
            UsageError: a layer was not cached.
        """
        names = tuple(names) if names else (list(self.grids)[-1],)
        for name in names:
            if name not in self.grids:
                raise unknown_name("layer", name, self.grids)
        return names

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> FeatureShapes:
        grids = {layer: (int(gh), int(gw), int(d)) for layer, (gh, gw, d) in value["grids"].items()}
        return cls(grids, int(value["token_width"]), int(value["pooled_width"]))


@dataclass(frozen=True)
class HeadInputs:
    """b prompts over i unique images.

    Args:
        features: token grids by layer; grids may differ from layer to layer.
        cls: CLS tokens by layer.
        prompt_tokens, prompt_mask: token features of each prompt, padded on the right; the mask is True on tokens.
        pooled: pooled prompt features.
        image_index: which of the i images each prompt is about.
    """

    features: Mapping[str, Float[Tensor, "i _ _ _"]]
    cls: Mapping[str, Float[Tensor, "i _"]]
    prompt_tokens: Float[Tensor, "b l e"]
    prompt_mask: Bool[Tensor, "b l"]
    pooled: Float[Tensor, "b p"]
    image_index: Int[Tensor, " b"]

    def to(self, device: torch.device | str) -> HeadInputs:
        """The same inputs in float32 on a device."""
        stored = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return StoredInputs(scale={}, **stored).to(device)


@dataclass(frozen=True)
class StoredInputs:
    """`HeadInputs` as a cache keeps them: in the stored data type, int8 token grids with a scale for each token."""

    features: Mapping[str, Shaped[Tensor, "i _ _ _"]]
    scale: Mapping[str, Float[Tensor, "i _ _"]]
    cls: Mapping[str, Float[Tensor, "i _"]]
    prompt_tokens: Float[Tensor, "b l e"]
    prompt_mask: Bool[Tensor, "b l"]
    pooled: Float[Tensor, "b p"]
    image_index: Int[Tensor, " b"]

    def to(self, device: torch.device | str) -> HeadInputs:
        """What a head takes: float32 on a device. Fewer bytes travel: the data type changes after the move."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True).float()

        features = {layer: move(tensor) for layer, tensor in self.features.items()}
        return HeadInputs(
            features=features
            | {layer: features[layer] * move(scale)[..., None] for layer, scale in self.scale.items()},
            cls={layer: move(tensor) for layer, tensor in self.cls.items()},
            prompt_tokens=move(self.prompt_tokens),
            prompt_mask=self.prompt_mask.to(device, non_blocking=True),
            pooled=move(self.pooled),
            image_index=self.image_index.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class HeadOutputs:
    """Mask logits of b prompts at the head's own resolution; a pixel belongs to the mask where they are above 0."""

    mask_logits: Float[Tensor, "b h w"]


class Head(nn.Module, ABC):
    """What every head is: a module that names the cached `layers` it reads and maps inputs to outputs."""

    layers: tuple[str, ...]

    @abstractmethod
    def forward(self, inputs: HeadInputs) -> HeadOutputs: ...
