"""Frozen encoders behind two small protocols. A name is short for a hub id; any hub id or folder works too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cache_schema.errors import unknown_name
from cache_schema.masks import Size

TINY = "tiny"
"""The embedded, untrained pair; see tiny.py."""


@dataclass(frozen=True)
class ImagePreset:
    """An image encoder by name, with what is known of it before it is downloaded.

    Args:
        input_size: (H, W) in pixels, the checkpoint's own.
        patch: pixels that a cell of `"last"` is wide; for a pyramid, the stride of its last stage.
        width: channels of `"last"`.
    """

    hub_id: str
    input_size: Size
    patch: int
    width: int


@dataclass(frozen=True)
class TextPreset:
    """A text encoder by name: the most tokens a prompt may have, and the channels of a token and of a prompt."""

    hub_id: str
    max_length: int
    token_width: int
    pooled_width: int


def _square(hub_id: str, side: int, patch: int, width: int) -> ImagePreset:
    return ImagePreset(hub_id, (side, side), patch, width)


IMAGE_ENCODERS: dict[str, ImagePreset] = {
    "dinov2-small": _square("facebook/dinov2-small", 518, 14, 384),
    "dinov2-base": _square("facebook/dinov2-base", 518, 14, 768),
    "dinov2-large": _square("facebook/dinov2-large", 518, 14, 1024),
    "dinov2-giant": _square("facebook/dinov2-giant", 518, 14, 1536),
    "dinov2-small-reg": _square("facebook/dinov2-with-registers-small", 518, 14, 384),
    "dinov2-base-reg": _square("facebook/dinov2-with-registers-base", 518, 14, 768),
    "dinov2-large-reg": _square("facebook/dinov2-with-registers-large", 518, 14, 1024),
    "dinov3-vits16": _square("facebook/dinov3-vits16-pretrain-lvd1689m", 224, 16, 384),
    "dinov3-vits16plus": _square("facebook/dinov3-vits16plus-pretrain-lvd1689m", 224, 16, 384),
    "dinov3-vitb16": _square("facebook/dinov3-vitb16-pretrain-lvd1689m", 224, 16, 768),
    "dinov3-vitl16": _square("facebook/dinov3-vitl16-pretrain-lvd1689m", 224, 16, 1024),
    "dinov3-convnext-tiny": _square("facebook/dinov3-convnext-tiny-pretrain-lvd1689m", 224, 32, 768),
    "dinov3-convnext-small": _square("facebook/dinov3-convnext-small-pretrain-lvd1689m", 224, 32, 768),
    "dinov3-convnext-base": _square("facebook/dinov3-convnext-base-pretrain-lvd1689m", 224, 32, 1024),
    "dinov3-convnext-large": _square("facebook/dinov3-convnext-large-pretrain-lvd1689m", 224, 32, 1536),
    "siglip2-base-224": _square("google/siglip2-base-patch16-224", 224, 16, 768),
    "siglip2-base-256": _square("google/siglip2-base-patch16-256", 256, 16, 768),
    "siglip2-base-384": _square("google/siglip2-base-patch16-384", 384, 16, 768),
    "siglip2-base-512": _square("google/siglip2-base-patch16-512", 512, 16, 768),
    "siglip2-large-256": _square("google/siglip2-large-patch16-256", 256, 16, 1024),
    "siglip2-large-384": _square("google/siglip2-large-patch16-384", 384, 16, 1024),
    "siglip2-large-512": _square("google/siglip2-large-patch16-512", 512, 16, 1024),
    "siglip2-so400m-256": _square("google/siglip2-so400m-patch16-256", 256, 16, 1152),
    "siglip2-so400m-384": _square("google/siglip2-so400m-patch16-384", 384, 16, 1152),
    "siglip2-so400m-512": _square("google/siglip2-so400m-patch16-512", 512, 16, 1152),
    "siglip2-base-naflex": _square("google/siglip2-base-patch16-naflex", 256, 16, 768),
    "siglip-base-224": _square("google/siglip-base-patch16-224", 224, 16, 768),
    "siglip-base-256": _square("google/siglip-base-patch16-256", 256, 16, 768),
    "siglip-base-384": _square("google/siglip-base-patch16-384", 384, 16, 768),
    "siglip-base-512": _square("google/siglip-base-patch16-512", 512, 16, 768),
    "siglip-large-256": _square("google/siglip-large-patch16-256", 256, 16, 1024),
    "siglip-large-384": _square("google/siglip-large-patch16-384", 384, 16, 1024),
    "clip-base-16": _square("openai/clip-vit-base-patch16", 224, 16, 768),
    "clip-base-32": _square("openai/clip-vit-base-patch32", 224, 32, 768),
    "clip-large-14": _square("openai/clip-vit-large-patch14", 224, 14, 1024),
    "clip-large-14-336": _square("openai/clip-vit-large-patch14-336", 336, 14, 1024),
    "resnet-18": _square("microsoft/resnet-18", 224, 32, 512),
    "resnet-50": _square("microsoft/resnet-50", 224, 32, 2048),
    "resnet-101": _square("microsoft/resnet-101", 224, 32, 2048),
}
"""Image encoders by name. The hub asks for a licence to be accepted before it hands out DINOv3."""

TEXT_ENCODERS: dict[str, TextPreset] = {
    "clip-base-16": TextPreset("openai/clip-vit-base-patch16", 77, 512, 512),
    "clip-base-32": TextPreset("openai/clip-vit-base-patch32", 77, 512, 512),
    "clip-large-14": TextPreset("openai/clip-vit-large-patch14", 77, 768, 768),
    "clip-large-14-336": TextPreset("openai/clip-vit-large-patch14-336", 77, 768, 768),
    "siglip2-base-224": TextPreset("google/siglip2-base-patch16-224", 64, 768, 768),
    "siglip2-base-256": TextPreset("google/siglip2-base-patch16-256", 64, 768, 768),
    "siglip2-base-384": TextPreset("google/siglip2-base-patch16-384", 64, 768, 768),
    "siglip2-base-512": TextPreset("google/siglip2-base-patch16-512", 64, 768, 768),
    "siglip2-large-256": TextPreset("google/siglip2-large-patch16-256", 64, 1024, 1024),
    "siglip2-large-384": TextPreset("google/siglip2-large-patch16-384", 64, 1024, 1024),
    "siglip2-large-512": TextPreset("google/siglip2-large-patch16-512", 64, 1024, 1024),
    "siglip2-so400m-256": TextPreset("google/siglip2-so400m-patch16-256", 64, 1152, 1152),
    "siglip2-so400m-384": TextPreset("google/siglip2-so400m-patch16-384", 64, 1152, 1152),
    "siglip2-so400m-512": TextPreset("google/siglip2-so400m-patch16-512", 64, 1152, 1152),
    "siglip2-base-naflex": TextPreset("google/siglip2-base-patch16-naflex", 64, 768, 768),
    "siglip-base-224": TextPreset("google/siglip-base-patch16-224", 64, 768, 768),
    "siglip-base-256": TextPreset("google/siglip-base-patch16-256", 64, 768, 768),
    "siglip-base-384": TextPreset("google/siglip-base-patch16-384", 64, 768, 768),
    "siglip-base-512": TextPreset("google/siglip-base-patch16-512", 64, 768, 768),
    "siglip-large-256": TextPreset("google/siglip-large-patch16-256", 64, 1024, 1024),
    "siglip-large-384": TextPreset("google/siglip-large-patch16-384", 64, 1024, 1024),
    "bert-base": TextPreset("google-bert/bert-base-uncased", 512, 768, 768),
    "bert-large": TextPreset("google-bert/bert-large-uncased", 512, 1024, 1024),
}
"""Text encoders by name. A name that is an image encoder's too is that of the tower trained beside it."""


def resolve_encoder(name: str, known: Mapping[str, ImagePreset] | Mapping[str, TextPreset]) -> str:
    """The folder or hub id that `name` stands for.

    Raises:
        UsageError: it is neither a known name, nor a folder, nor of the form owner/model.
    """
    if name in known:
        return known[name].hub_id
    if Path(name).is_dir() or "/" in name:
        return name
    raise unknown_name("encoder", name, [TINY, *known])
