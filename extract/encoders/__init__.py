"""Frozen encoders behind two small protocols. A name is short for a hub id; any hub id or folder works too."""

from __future__ import annotations

from pathlib import Path

from cache_schema.errors import unknown_name

TINY = "tiny"
"""The embedded, untrained pair; see tiny.py."""

IMAGE_ENCODERS = {
    "dinov2-small": "facebook/dinov2-small",
    "dinov2-base": "facebook/dinov2-base",
    "dinov2-base-reg": "facebook/dinov2-with-registers-base",
    "dinov3-vits16": "facebook/dinov3-vits16-pretrain-lvd1689m",
    "dinov3-vits16plus": "facebook/dinov3-vits16plus-pretrain-lvd1689m",
    "dinov3-vitb16": "facebook/dinov3-vitb16-pretrain-lvd1689m",
}
TEXT_ENCODERS = {
    "clip-base-16": "openai/clip-vit-base-patch16",
    "clip-base-32": "openai/clip-vit-base-patch32",
    "clip-large-14": "openai/clip-vit-large-patch14",
}


def resolve_encoder(name: str, known: dict[str, str]) -> str:
    """The folder or hub id that `name` stands for.

    Raises:
        UsageError: it is neither a known name, nor a folder, nor of the form owner/model.
    """
    if name in known:
        return known[name]
    if Path(name).is_dir() or "/" in name:
        return name
    raise unknown_name("encoder", name, [TINY, *known])
