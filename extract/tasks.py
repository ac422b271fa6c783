"""Extraction jobs as plain values: what to encode and with what, small enough to send to a worker.

Nothing is loaded before `open`, and nothing of what it loads ever travels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from extract.encoders.image import load_image_encoder
from extract.encoders.specs import ImageEncoderSpec, TextEncoderSpec
from extract.encoders.text import load_text_encoder
from extract.image_job import ImageJob, ImageJobConfig
from extract.job import Job, pick_device
from extract.prompt_job import PromptJob, PromptJobConfig


class Task(Protocol):
    """Something that can be made a job of."""

    def open(self, device: str = "auto") -> Job: ...


@dataclass(frozen=True)
class ImageTask:
    """An image extraction job. With `compiled`, the encoder goes through torch.compile first."""

    config: ImageJobConfig
    encoder: ImageEncoderSpec
    compiled: bool = False

    def open(self, device: str = "auto") -> Job:
        """Load the encoder and open the samples store.

        Raises:
            UsageError: one of them cannot be had.
        """
        encoder = load_image_encoder(self.encoder, device=pick_device(device), compiled=self.compiled)
        return ImageJob(self.config, encoder)


@dataclass(frozen=True)
class TextTask:
    """A prompt extraction job."""

    config: PromptJobConfig
    encoder: TextEncoderSpec

    def open(self, device: str = "auto") -> Job:
        """Load the encoder and open the samples store. Raises as `ImageTask.open` does."""
        return PromptJob(self.config, load_text_encoder(self.encoder, device=pick_device(device)))
