"""Whether live encoders say what a cache says: asked before anything is learned from both."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cache_schema.errors import StoreMismatchError, UsageError
from cache_schema.features import FeatureCache
from cache_schema.fingerprint import canonical_json
from heads.data import Batch, CachedSplit, Draw
from heads.live import LiveEncoders

LEAST_MEAN_COSINE, LEAST_COSINE = 0.999, 0.99
"""Below, the features are others. Rounding to float16, bfloat16 or int8 stays well above."""


@dataclass(frozen=True)
class Parity:
    """How near live features are to cached ones.

    Args:
        name: which features.
        num: how many vectors were compared, each a token or an image's or prompt's one vector.
        mean_cosine, least_cosine: of a live vector and the cached one.
        max_error: the greatest difference of any channel.
    """

    name: str
    num: int
    mean_cosine: float
    least_cosine: float
    max_error: float

    @property
    def holds(self) -> bool:
        """Whether they are the same features."""
        return self.mean_cosine >= LEAST_MEAN_COSINE and self.least_cosine >= LEAST_COSINE

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def summary(self) -> str:
        """One line for people."""
        return (
            f"{self.name}: cosine {self.mean_cosine:.6f} (least {self.least_cosine:.6f}), "
            f"greatest error {self.max_error:.3g}, {self.num} vectors"
        )


@torch.inference_mode()
def check_parity(encoders: LiveEncoders, split: str, *, num: int = 8) -> list[Parity]:
    """Compare live encoders whose adapters have learned nothing yet with the cache, on `num` samples of a split.

    Raises:
        StoreMismatchError: they say something else; it names the fields in which their identities differ.
    """
    cache = encoders.cache
    batch = _first_samples(cache, split, num)
    cached = batch.inputs.to("cpu")
    live = encoders.fill(batch).live
    found: list[Parity] = []
    if encoders.image is not None:
        seen = encoders.image.eval()(live.given)
        for kind in ("features", "cls", "attention"):
            now = getattr(seen, kind)
            for name, before in getattr(cached, kind).items():
                if name in now:
                    found.append(compare(f"image {kind} {name}", before, now[name].cpu().float()))
    if encoders.text is not None:
        read, index = encoders.text.eval()(live.token_ids), live.prompt_index
        assert index is not None
        mask = cached.prompt_mask
        found.append(compare("prompt tokens", cached.prompt_tokens[mask], read.tokens[index].cpu().float()[mask]))
        found.append(compare("prompt pooled", cached.pooled, read.pooled[index].cpu().float()))
    if not all(parity.holds for parity in found):
        raise StoreMismatchError(_complaint(encoders, found))
    return found


def compare(name: str, cached: Tensor, live: Tensor) -> Parity:
    """Vectors along the last axis."""
    if cached.shape != live.shape:
        raise StoreMismatchError(
            f"{name} are of shape {tuple(live.shape)} where the cache has {tuple(cached.shape)}: "
            "take the encoder and the input size that the cache was extracted with."
        )
    cosine = F.cosine_similarity(cached.float(), live.float(), dim=-1)
    return Parity(
        name, cosine.numel(), float(cosine.mean()), float(cosine.min()), float((cached.float() - live).abs().max())
    )


def differing_fields(cached: Any, live: Any, name: str = "") -> list[str]:
    """Where two identities, plain JSON, differ: each as a path with both values, long ones cut short."""
    if isinstance(cached, Mapping) and isinstance(live, Mapping):
        keys = sorted({*cached, *live})
        return [
            field
            for key in keys
            for field in differing_fields(cached.get(key), live.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if cached == live else [f"{name} ({_short(cached)} in the cache, {_short(live)} now)"]


def identities(cache: FeatureCache) -> dict[str, Mapping[str, Any]]:
    """What the encoders of a cache are, by side."""
    return {
        "image": cache.images.store.header.identity["encoder"],
        "text": cache.prompts.store.header.identity["encoder"],
    }


def _first_samples(cache: FeatureCache, split: str, num: int) -> Batch:
    loaded = CachedSplit(cache, split, None, residency="disk", attention=cache.images.attention_outputs)
    if num < 1:
        raise UsageError(f"parity is checked on at least one sample, not on {num}.")
    return loaded.load(Draw.whole(loaded.samples[:num]))


def _complaint(encoders: LiveEncoders, found: list[Parity]) -> str:
    lines = "".join(f"\n  {'' if parity.holds else 'DIFFERS '}{parity.summary()}" for parity in found)
    cached = identities(encoders.cache)
    live: Mapping[str, Any] = encoders.sides
    fields = [
        field
        for side, encoder in live.items()
        for field in differing_fields(cached[side], json.loads(canonical_json(encoder.identity)), side)
    ]
    why = (
        f"They differ in {'; '.join(fields)}."
        if fields
        else "Their fingerprints are the same: the image files, or the machine's arithmetic, have changed."
    )
    return (
        f"the live encoders do not say what the cache says.{lines}\n{why} "
        "Take the encoders of the cache, or extract anew."
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
