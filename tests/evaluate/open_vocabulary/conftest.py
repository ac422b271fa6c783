"""What tests of open vocabulary share: an encoder that shows its attention, and a projection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from extract.encoders.protocols import ImageEncoder
    from extract.encoders.tiny import TinyEncoders
    from heads.talk2dino import Talk2DinoHead


@pytest.fixture(scope="session")
def encoder(tiny_encoders: TinyEncoders) -> ImageEncoder:
    """The tiny image encoder with what background cleaning reads, at 5 x 4 patches."""
    from extract.encoders.image import load_image_encoder
    from extract.encoders.specs import ImageEncoderSpec

    spec = ImageEncoderSpec(str(tiny_encoders.image), attention=("logits",), input_size=(80, 64))
    return load_image_encoder(spec)


@pytest.fixture(scope="session")
def head() -> Talk2DinoHead:
    """A projection of random weights whose cosines are far apart."""
    import torch

    from heads.talk2dino import Talk2DinoHead

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = Talk2DinoHead(image_width=96, pooled_width=96, layer="last").eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(4)
    return head
