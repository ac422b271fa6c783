"""Checkpoints of real architectures with random weights: what a forward pass takes does not depend on their values."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, Dinov2Config, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from cache_schema.errors import UsageError, unknown_name
from extract.encoders.tiny import make_tiny_encoders

PATCH_PX = 14
_NAME = re.compile(r"(?P<architecture>[\w-]+)@(?P<side>[1-9]\d*)", re.ASCII)


@dataclass(frozen=True)
class Transformer:
    """The numbers that tell vision transformers apart."""

    width: int
    num_layers: int
    num_heads: int


ARCHITECTURES = {
    "dinov2-small": Transformer(384, 12, 6),
    "dinov2-base": Transformer(768, 12, 12),
    "dinov2-tiny": Transformer(48, 2, 2),
}
"""The tiny one is no published model; it is there to try the benchmark out."""


@dataclass(frozen=True)
class ImageModel:
    """An architecture at an input size in pixels, written `dinov2-small@224`."""

    architecture: str
    side: int

    @classmethod
    def parse(cls, name: str) -> ImageModel:
        """Raises UsageError for an architecture that is unknown or a size that is not whole patches."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise UsageError(
                f"the model is {name!r}; give an architecture and an input size, such as dinov2-small@224."
            )
        if match["architecture"] not in ARCHITECTURES:
            raise unknown_name("architecture", match["architecture"], ARCHITECTURES)
        side = int(match["side"])
        if side % PATCH_PX:
            raise UsageError(f"the model is {name!r}; give an input size that is a multiple of {PATCH_PX}.")
        return cls(match["architecture"], side)

    def __str__(self) -> str:
        return f"{self.architecture}@{self.side}"

    @property
    def cost(self) -> float:
        """Multiplications of a forward pass of one image, but for those at its ends."""
        numbers = ARCHITECTURES[self.architecture]
        num_tokens = (self.side // PATCH_PX) ** 2 + 1
        of_a_token = 12 * numbers.width**2 + 2 * num_tokens * numbers.width
        return float(numbers.num_layers * num_tokens * of_a_token)

    def save(self, folder: Path) -> Path:
        """Save it in a new folder under `folder`; return that."""
        numbers = ARCHITECTURES[self.architecture]
        config = Dinov2Config(
            hidden_size=numbers.width,
            num_hidden_layers=numbers.num_layers,
            num_attention_heads=numbers.num_heads,
            image_size=self.side,
            patch_size=PATCH_PX,
        )
        path = folder / str(self)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            Dinov2Model(config).save_pretrained(path)
        BitImageProcessorPil(
            size={"height": self.side, "width": self.side},
            do_center_crop=False,
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ).save_pretrained(path)
        return path


def save_clip_text(folder: Path, *, tiny: bool = False) -> Path:
    """Save CLIP's base text tower, or a tiny one, with a tokenizer of everyday words; return its folder."""
    small = make_tiny_encoders(folder).text
    if tiny:
        return small
    tokenizer = CLIPTokenizer.from_pretrained(small)
    config = CLIPTextConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    path = folder / "clip-base-text"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPTextModelWithProjection(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
