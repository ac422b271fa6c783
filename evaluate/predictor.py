"""A trained head with live encoders: an image once, then as many prompts as one likes, or pairs of both in batches."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from cache_schema.errors import UsageError
from cache_schema.masks import Size
from cache_schema.quantize import float_dtype
from cache_schema.views import WHOLE, View, make_view
from evaluate.encode_once import EncodeOnce
from evaluate.prompt_words import TokenWords, attention_of_words, find_words
from evaluate.protocols import ORIGINAL_SIZE, Protocol
from evaluate.rounding import as_cached
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


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a head says to one prompt.

    Args:
        mask: (H, W) at the image's original size.
        logits: (h, w) at the head's own resolution, float32; above 0 where a pixel is rather in the mask than not.
        view: what of the image `logits` and `attention` lie over, corner to corner; None is the whole image.
        predicted_iou: the IoU that the head expects of its mask, nominally from 0 to 1; None where it expects none.
        no_target: whether the head says that the prompt names nothing in the image; None where it does not say. The
            mask is what the logits give, whatever is said here.
        words: the prompt's words that have tokens of their own, in their order.
        attention: (words, gh, gw), how much each word looks at each cell of a grid, or each cell at it; the
            tokens of a word are added up. None where the head sees only a pooled prompt.
    """

    prompt: str
    mask: Bool[np.ndarray, "original_h original_w"]
    logits: Float[np.ndarray, "logits_h logits_w"]
    view: View | None = None
    predicted_iou: float | None = None
    no_target: bool | None = None
    words: Sequence[str] = ()
    attention: Float[np.ndarray, "num_words gh gw"] | None = None

    @property
    def probability(self) -> Float[np.ndarray, "original_h original_w"]:
        """Each pixel's probability of belonging to the mask, worked out anew from the logits each time it is asked."""
        size = (self.mask.shape[0], self.mask.shape[1])
        view = make_view(WHOLE, 0, size, "") if self.view is None else self.view
        return probabilities_in_image(torch.from_numpy(self.logits)[None], view, size)[0]

    @property
    def score(self) -> float:
        """How far to trust the mask: `predicted_iou`, or the mean probability of the marked pixels where the head
        expects no IoU; 0.0 where none is marked. The two are not to be compared with each other.
        """
        if self.predicted_iou is not None:
            return self.predicted_iou
        return float(self.probability[self.mask].mean(dtype=np.float64)) if self.mask.any() else 0.0


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image at an encoder's input size.

    Args:
        pixels: (h, w, 3) uint8.
        view: what of the image they show.
        size: (H, W) of the image.
    """

    pixels: UInt8[np.ndarray, "h w 3"]
    view: View
    size: Size


@typing.runtime_checkable
class ShowsAttention(typing.Protocol):
    """A head that says how much prompt tokens and cells look at each other if it is asked to."""

    shows_attention: bool


ImageLike = UInt8[np.ndarray, "_ _ 3"] | str | Path | PreparedImage
"""An (H, W, 3) uint8 RGB array, an image file, or what `Predictor.prepare` made of either."""


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
    """One image's features as a cache keeps them, each (1, ...), what of the image they are of, and its size."""

    features: ImageEncoding
    view: View
    size: Size


@dataclass(frozen=True)
class _ReadPrompt:
    """One prompt's features as a cache keeps them, (l, d) and (p), and the words that its tokens spell."""

    prompt: str
    tokens: Float[Tensor, "l d"]
    pooled: Float[Tensor, " p"]
    words: TokenWords


class Predictor:
    """Segments what prompts name in images.

    Args:
        head: a trained head. If it can say how much prompt tokens and cells look at each other, it does from now on.
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
        if isinstance(head, ShowsAttention):
            head.shows_attention = True

    @property
    def has_attention(self) -> bool:
        """Whether predictions come with attention per word. Heads that see only a pooled prompt have none."""
        return isinstance(self._head, ShowsAttention) and self._head.reads_tokens

    def prepare(self, image: ImageLike) -> PreparedImage:
        """What the encoder will look at, decoded and resized but not encoded: whatever can be wrong with it shows here.

        Raises:
            UsageError: the file is missing or no image, or too long and thin for the encoder to look at.
        """
        if isinstance(image, PreparedImage):
            return image
        if isinstance(image, str | Path):
            image = open_image(Path(image))
        encoder, size = self._image_encoder, (image.shape[0], image.shape[1])
        view = encoder.fit(make_view(WHOLE, 0, size, ""))
        if math.prod(view.size) > max(MAX_IMAGE_PIXELS, math.prod(size)):
            raise UsageError(
                f"an image of {size[0]} x {size[1]} pixels (height x width) is too long and thin for {encoder.name}, "
                "which looks at images in their own shape: cut it first."
            )
        return PreparedImage(encoder.preprocess(view.apply_to_image(image)), view, size)

    def set_image(self, image: ImageLike) -> Predictor:
        """Encode an image, for every prompt that follows.

        Raises:
            UsageError: see `prepare`.
        """
        (self._seen,) = self._look([image])
        return self

    def predict(self, prompts: str | Sequence[str]) -> list[Prediction]:
        """What each prompt names in the image that was set, in one batch; the mask is at the image's original size.

        Raises:
            UsageError: no image was set, or there is no prompt.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if self._seen is None:
            raise UsageError("no image is set: call set_image(image) before predict(prompts).")
        _require_prompts(prompts)
        return list(self._decide([self._seen] * len(prompts), self._read(prompts)))

    def predict_pairs(
        self, images: Sequence[ImageLike], prompts: Sequence[str], *, batch_size: int = 16
    ) -> Iterator[Prediction]:
        """What each prompt names in the image at the same place, in that order, one after the other.

        An image, which is a path or one and the same object, and a prompt are encoded once however often they come,
        `batch_size` of them at a time, and their features are kept from the first pair to the last that they belong
        to: where images follow one another, memory holds those of `batch_size`, and where they come in turns, all. The
        image that was set stays set.

        Each pair gets what it would get by itself, but for rounding: an encoder adds up in another order in a batch of
        another size, and the last bit of a float16 feature may then round the other way. No probability was seen to
        move by more than 0.0002 (docs/predict.md).

        Raises:
            UsageError: there are not as many images as prompts, or a prompt is empty; and, when their turn comes, that
                an image cannot be used, see `prepare`.
        """
        images, prompts = list(images), list(prompts)
        if len(images) != len(prompts):
            raise UsageError(f"{len(images)} images and {len(prompts)} prompts make no pairs: give a prompt to each.")
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}: give a whole number of at least 1.")
        _require_prompts(prompts)
        return self._pairs(images, prompts, batch_size)

    def _pairs(self, images: Sequence[ImageLike], prompts: Sequence[str], batch_size: int) -> Iterator[Prediction]:
        keys = [str(image) if isinstance(image, str | Path) else id(image) for image in images]
        seen = EncodeOnce(keys, images, self._look, batch_size)
        read = EncodeOnce(prompts, prompts, self._read, batch_size)
        for start in range(0, len(prompts), batch_size):
            stop = min(start + batch_size, len(prompts))
            yield from self._decide(seen.take(start, stop), read.take(start, stop))

    @torch.inference_mode()
    def _look(self, images: Sequence[ImageLike]) -> list[_SeenImage]:
        """Encode images in one batch."""
        encoder = self._image_encoder
        prepared = [self.prepare(image) for image in images]
        pixels = torch.from_numpy(np.stack([one.pixels for one in prepared]))
        encoding, cls_dtype = encoder.encode(pixels.to(encoder.device)), float_dtype(self._image_dtype)
        kept = ImageEncoding(
            {layer: as_cached(grid, self._image_dtype) for layer, grid in encoding.features.items()},
            {layer: as_cached(token, cls_dtype) for layer, token in encoding.cls.items()},
            {name: as_cached(said, cls_dtype) for name, said in encoding.attention.items()},
        )
        return [_SeenImage(_image_of(kept, row), one.view, one.size) for row, one in enumerate(prepared)]

    @torch.inference_mode()
    def _read(self, prompts: Sequence[str]) -> list[_ReadPrompt]:
        """Encode prompts in one batch."""
        encoder = self._text_encoder
        token_ids = encoder.tokenize(prompts)
        text = encoder.encode(token_ids)
        tokens = as_cached(text.tokens.masked_fill(~text.mask[..., None], 0), self._text_dtype)
        pooled = as_cached(text.pooled, self._text_dtype)
        return [
            _ReadPrompt(prompt, tokens[row, : len(ids)], pooled[row], find_words(prompt, ids, encoder.tokenize))
            for row, (prompt, ids) in enumerate(zip(prompts, token_ids, strict=True))
        ]

    def _decide(self, images: Sequence[_SeenImage], prompts: Sequence[_ReadPrompt]) -> Iterator[Prediction]:
        """What b prompts name in b images. An image that comes several times in a row goes into the head once."""
        unique = list({id(image): image for image in images}.values())
        row_of = {id(image): row for row, image in enumerate(unique)}
        lengths = torch.tensor([len(prompt.tokens) for prompt in prompts])
        inputs = HeadInputs(
            features=_stack([image.features.features for image in unique]),
            cls=_stack([image.features.cls for image in unique]),
            prompt_tokens=torch.nn.utils.rnn.pad_sequence([prompt.tokens for prompt in prompts], batch_first=True),
            prompt_mask=torch.arange(int(lengths.max())) < lengths[:, None],
            pooled=torch.stack([prompt.pooled for prompt in prompts]),
            image_index=torch.tensor([row_of[id(image)] for image in images]),
            attention=_stack([image.features.attention for image in unique]),
        )
        with torch.inference_mode():
            outputs = self._head(inputs.to(next(self._head.parameters()).device))
        all_logits = outputs.mask_logits.float().cpu()
        ious, absent, attention = map(_as_array, (outputs.iou, outputs.no_target_logits, outputs.word_attention))
        for row, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            logits = all_logits[row].clone()  # whoever keeps one prediction does not keep the batch
            yield Prediction(
                prompt.prompt,
                self._protocol.binarize(probabilities_in_image(logits[None], image.view, image.size)[0]),
                logits.numpy(),
                image.view,
                predicted_iou=None if ious is None else float(ious[row]),
                no_target=None if absent is None else bool(absent[row] > 0),
                words=prompt.words.words,
                attention=None if attention is None else attention_of_words(attention[row], prompt.words),
            )


def _as_array(said: Tensor | None) -> Float[np.ndarray, "b ..."] | None:
    return None if said is None else said.float().cpu().numpy()


def _require_prompts(prompts: Sequence[str]) -> None:
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise UsageError("there is no prompt, or an empty one: say what to segment.")


def _image_of(encoding: ImageEncoding, row: int) -> ImageEncoding:
    """One image of a batch, in memory of its own, so that it does not keep the others."""
    parts = (encoding.features, encoding.cls, encoding.attention)
    features, cls, attention = ({name: said[row : row + 1].clone() for name, said in part.items()} for part in parts)
    return ImageEncoding(features, cls, attention)


def _stack(images: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([image[name] for image in images]) for name in images[0]}
