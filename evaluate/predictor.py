"""A trained head with live encoders: an image once, then as many prompts as one likes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from cache_schema.errors import UsageError
from cache_schema.masks import Size
from cache_schema.quantize import dequantize, float_dtype, quantize
from cache_schema.views import WHOLE, View, make_view
from evaluate.metrics import ORIGINAL_SIZE, Protocol
from extract.encoders.protocols import ImageEncoder, ImageEncoding, TextEncoder
from extract.images import (
    MAX_IMAGE_PIXELS,
    UndecodableImageError,
    UnreadableFileError,
    decode_image,
    read_bytes,
)
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


def probabilities_in_image(
    logits: Float[Tensor, "b h w"], view: View, size: Size
) -> Float[np.ndarray, "b original_h original_w"]:
    """Each pixel's probability of belonging to b masks, from logits that cover one view of an image of that size.

    What the view does not show has probability 0: it is never marked.
    """
    return view.place(resize_logits(logits.float(), view.size).sigmoid().cpu().numpy(), size, 0)


@dataclass(frozen=True)
class _SeenImage:
    """What an encoder said of an image, what it looked at, and the image's size."""

    encoding: ImageEncoding
    view: View
    size: Size


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
        self._seen: _SeenImage | None = None

    def set_image(self, image: UInt8[np.ndarray, "h w 3"] | str | Path) -> Predictor:
        """Encode an image, a file or an (H, W, 3) uint8 RGB array, for every prompt that follows.

        Raises:
            UsageError: the file is missing or no image, or too long and thin for the encoder to look at.
        """
        if isinstance(image, str | Path):
            image = open_image(Path(image))
        encoder, size = self._image_encoder, (image.shape[0], image.shape[1])
        view = encoder.fit(make_view(WHOLE, 0, size, ""))
        if math.prod(view.size) > max(MAX_IMAGE_PIXELS, math.prod(size)):
            raise UsageError(
                f"an image of {size[0]} x {size[1]} pixels (height x width) is too long and thin for {encoder.name}, "
                "which looks at images in their own shape: cut it first."
            )
        pixels = np.stack([encoder.preprocess(view.apply_to_image(image))])
        self._seen = _SeenImage(encoder.encode(torch.from_numpy(pixels).to(encoder.device)), view, size)
        return self

    @torch.inference_mode()
    def predict(self, prompts: str | Sequence[str]) -> list[Prediction]:
        """The mask of every prompt, at the image's original size.

        Raises:
            UsageError: no image was set, or there is no prompt.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if self._seen is None:
            raise UsageError("no image is set: call set_image(image) before predict(prompts).")
        if not prompts or not all(prompt.strip() for prompt in prompts):
            raise UsageError("there is no prompt, or an empty one: say what to segment.")
        text = self._text_encoder.encode(self._text_encoder.tokenize(prompts))
        encoding, cls_dtype = self._seen.encoding, float_dtype(self._image_dtype)
        inputs = HeadInputs(
            features={layer: _as_cached(grid, self._image_dtype) for layer, grid in encoding.features.items()},
            cls={layer: _as_cached(token, cls_dtype) for layer, token in encoding.cls.items()},
            prompt_tokens=_as_cached(text.tokens.masked_fill(~text.mask[..., None], 0), self._text_dtype),
            prompt_mask=text.mask,
            pooled=_as_cached(text.pooled, self._text_dtype),
            image_index=torch.zeros(len(prompts), dtype=torch.long),
            attention={name: _as_cached(said, cls_dtype) for name, said in encoding.attention.items()},
        )
        logits = self._head(inputs.to(next(self._head.parameters()).device)).mask_logits
        probabilities = probabilities_in_image(logits, self._seen.view, self._seen.size)
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
