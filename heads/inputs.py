"""What every head takes and returns."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from cache_schema.errors import UsageError, unknown_name


@dataclass(frozen=True)
class FeatureShapes:
    """The shapes a head is built for.

    Args:
        grids: (gh, gw, d) of each cached layer.
        token_width, pooled_width: widths of prompt features.
        cls_widths: width of the CLS token of each layer that has one.
        attention: shape of one image's attention outputs, by name: logits (heads, ah, aw), head_tokens (heads, d) and
            mean_token (d), as far as they were cached.
    """

    grids: Mapping[str, tuple[int, int, int]]
    token_width: int
    pooled_width: int
    cls_widths: Mapping[str, int] = field(default_factory=dict)
    attention: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

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

    def layers_of_one_grid(self, names: Sequence[str] | None) -> tuple[str, ...]:
        """`layers`, which must have equal grids.

        Raises:
            UsageError: a layer was not cached.
            ValueError: their grids differ.
        """
        layers = self.layers(names)
        grids = {self.grids[layer][:2] for layer in layers}
        if len(grids) != 1:
            raise ValueError(
                f"layers {', '.join(layers)} have different grids ({sorted(grids)}); name layers of one grid"
            )
        return layers

    def require_cls(self, *layers: str) -> None:
        """Make sure that layers were cached with their CLS tokens.

        Raises:
            UsageError: one was not.
        """
        for layer in layers:
            if layer not in self.cls_widths:
                raise UsageError(f"layer {layer} was cached without CLS tokens, which this head reads; name others.")

    def require_attention(self, *names: str) -> None:
        """Make sure that attention outputs were cached.

        Raises:
            UsageError: one was not.
        """
        for name in names:
            if name not in self.attention:
                raise UsageError(
                    f"this head reads the attention output {name}, which was not cached; extract with "
                    "--attention logits head_tokens mean_token and an encoder of the DINO family."
                )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> FeatureShapes:
        grids = {layer: (int(gh), int(gw), int(d)) for layer, (gh, gw, d) in value["grids"].items()}
        return cls(
            grids,
            int(value["token_width"]),
            int(value["pooled_width"]),
            {layer: int(width) for layer, width in value.get("cls_widths", {}).items()},
            {name: tuple(map(int, shape)) for name, shape in value.get("attention", {}).items()},
        )


@dataclass(frozen=True)
class HeadInputs:
    """b prompts over i unique images.

    Args:
        features: token grids by layer; grids may differ from layer to layer.
        cls: CLS tokens by layer.
        attention: what the encoder's last attention layer says of each image, by name; see `FeatureShapes`.
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
    attention: Mapping[str, Float[Tensor, "i ..."]] = field(default_factory=dict)

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
    attention: Mapping[str, Float[Tensor, "i ..."]] = field(default_factory=dict)

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
            attention={name: move(tensor) for name, tensor in self.attention.items()},
        )


@dataclass(frozen=True)
class Embeddings:
    """What contrastive losses compare: k candidates for each of i images, and each prompt, in one space of d channels.

    Nothing is normalised yet. `scale` is what cosines are multiplied by, `bias` what is added then (sigmoid losses).
    """

    image: Float[Tensor, "i k d"]
    text: Float[Tensor, "b d"]
    scale: Float[Tensor, ""] | None = None
    bias: Float[Tensor, ""] | None = None


@dataclass(frozen=True)
class HeadOutputs:
    """What a head says of b prompts.

    Args:
        mask_logits: at the head's own resolution; a pixel belongs to the mask where they are above 0. They are 0 x 0
            where only embeddings were asked for.
        iou: the IoU that the head expects its mask to have, nominally from 0 to 1.
        no_target_logits: above 0 where the head says that the prompt names nothing in the image.
        word_attention: how much each prompt token looks at each cell of a grid, or each cell at it; averaged over heads
            and blocks, 0 for padding.
        embeddings: what contrastive losses compare.
    """

    mask_logits: Float[Tensor, "b h w"]
    iou: Float[Tensor, " b"] | None = None
    no_target_logits: Float[Tensor, " b"] | None = None
    word_attention: Float[Tensor, "b l gh gw"] | None = None
    embeddings: Embeddings | None = None


class Head(nn.Module, ABC):
    """What every head is: a module that names what it reads of a cache and maps inputs to outputs.

    `layers` are the cached layers, whose CLS tokens come with them where they have some; `attention` are the attention
    outputs. `embedded_layers` are those of the layers whose token grids `embed` reads. `reads_tokens` says whether it
    looks at `prompt_tokens`; one that does not may be given none (b, 0, e).
    """

    layers: tuple[str, ...]
    attention: tuple[str, ...] = ()
    embedded_layers: tuple[str, ...] = ()
    reads_tokens: bool = True

    @abstractmethod
    def forward(self, inputs: HeadInputs) -> HeadOutputs: ...

    def embed(self, inputs: HeadInputs) -> Embeddings:
        """What contrastive losses compare, without masks.

        Raises:
            UsageError: this head compares nothing.
        """
        raise UsageError("this head gives no embeddings, which contrastive losses compare; take talk2dino.")
