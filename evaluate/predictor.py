"""A trained head with live encoders: an image once, then as many prompts as one likes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from cache_schema.errors import UsageError
from cache_schema.quantize import dequantize, float_dtype, quantize
from evaluate.metrics import ORIGINAL_SIZE, Protocol
from extract.encoders.protocols import ImageEncoder, ImageEncoding, TextEncoder
from extract.images import UndecodableImageError, UnreadableFileError, decode_image, read_bytes
from heads.inputs import Head, HeadInputs
from heads.losses import resize_logits


@dataclass(frozen=True)
class Prediction:
    """What a head says to one prompt.

    Args:
        mask: (H, W) at the image's original size.
        probability: (H, W), each pixel's probability of belonging to the mask.
    """

    prompt: str
    mask: Bool[np.ndarray, "h w"]
    probability: Float[np.ndarray, "h w"]


def open_image(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """(H, W, 3) uint8 RGB of an image file, turned upright.

    Raises:
        UsageError: the file is missing or no image.
    """
    try:
        return decode_image(read_bytes(path)[0])
    except (UndecodableImageError, UnreadableFileError) as error:
        raise UsageError(f"{path} cannot be used: {error}. Name an image file such as a JPEG or a PNG.") from error


class Predictor:
    """Segments what prompts name in an image.

    Args:
        head: a trained head.
        image_encoder, text_encoder: the encoders whose features it was trained on.
        image_dtype, text_dtype: the data types in which those features were cached; live features are rounded to
            them, so that a prediction from pixels is the prediction from the cache.
    """

    def __init__(
        self,
        head: Head,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder,
        *,
        image_dtype: str = "float16",
        text_dtype: str = "float16",
        protocol: Protocol = ORIGINAL_SIZE,
    ) -> None:
        self._head = head.eval()
        self._image_encoder = image_encoder
        self._text_encoder = text_encoder
        self._image_dtype = image_dtype
        self._text_dtype = text_dtype
        self._protocol = protocol
        self._encoding: ImageEncoding | None = None
        self._size = (0, 0)

    def set_image(self, image: UInt8[np.ndarray, "h w 3"] | str | Path) -> Predictor:
        """Encode an image, a file or an (H, W, 3) uint8 RGB array, for every prompt that follows.

        Raises:
            UsageError: the file is missing or no image.
        """
        if isinstance(image, str | Path):
            image = open_image(Path(image))
        self._encoding = self._image_encoder.encode(torch.from_numpy(self._image_encoder.preprocess(image))[None])
        self._size = (image.shape[0], image.shape[1])
        return self

    @torch.inference_mode()
    def predict(self, prompts: str | Sequence[str]) -> list[Prediction]:
        """The mask of every prompt, at the image's original size.

        Raises:
            UsageError: no image was set, or there is no prompt.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if self._encoding is None:
            raise UsageError("no image is set: call set_image(image) before predict(prompts).")
        if not prompts or not all(prompt.strip() for prompt in prompts):
            raise UsageError("there is no prompt, or an empty one: say what to segment.")
        text = self._text_encoder.encode(self._text_encoder.tokenize(prompts))
        cls_dtype = float_dtype(self._image_dtype)
        inputs = HeadInputs(
            features={layer: _as_cached(grid, self._image_dtype) for layer, grid in self._encoding.features.items()},
            cls={layer: _as_cached(token, cls_dtype) for layer, token in self._encoding.cls.items()},
            prompt_tokens=_as_cached(text.tokens * text.mask[..., None], self._text_dtype),
            prompt_mask=text.mask,
            pooled=_as_cached(text.pooled, self._text_dtype),
            image_index=torch.zeros(len(prompts), dtype=torch.long),
        )
        logits = self._head(inputs.to(next(self._head.parameters()).device)).mask_logits
        probabilities = resize_logits(logits.float(), self._size).sigmoid().cpu().numpy()
        return [
            Prediction(prompt, self._protocol.binarize(probability), probability)
            for prompt, probability in zip(prompts, probabilities, strict=True)
        ]


def _as_cached(values: Tensor, dtype: str) -> Tensor:
    """Features as they come back from a cache of that data type."""
    if dtype != "int8":
        return values.to(getattr(torch, dtype))
    tokens, scale = quantize(values.float().cpu().numpy())
    return torch.from_numpy(dequantize(tokens, scale)).to(values.device)
