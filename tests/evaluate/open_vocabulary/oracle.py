"""Open-vocabulary segmentation worked out slowly: one window, one class and one pixel axis at a time, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cache_schema.masks import Size
from extract.encoders.protocols import ImageEncoder, TextEncoder
from heads.talk2dino import Talk2DinoHead

Array = NDArray[np.float64]
Box = tuple[int, int, int, int]
"""Top, left, bottom, right."""


@dataclass(frozen=True)
class SlowTalk2Dino:
    """What Talk2DINO's evaluation does, step by step.

    Args:
        prompts: of each class, all its prompts.
    """

    head: Talk2DinoHead
    image_encoder: ImageEncoder
    text_encoder: TextEncoder
    prompts: Sequence[Sequence[str]]
    short_side: int
    window: int
    stride: int
    cleaning: float = 0.0

    @property
    def learned(self) -> bool:
        """Whether the head learned logits from masks; it is then evaluated as other heads are."""
        return self.head.log_gain is not None

    def scores(self, image: NDArray[np.uint8]) -> Array:
        """(c, H, W) of an image."""
        height, width = image.shape[:2]
        scale = self.short_side / min(height, width)
        size = int(height * scale + 0.5), int(width * scale + 0.5)
        resized = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
        crops = {
            (top, left, top + self.window, left + self.window): resized[
                top : top + self.window, left : left + self.window
            ]
            for top in starts(size[0], self.window, self.stride)
            for left in starts(size[1], self.window, self.stride)
        }
        return self.merge(crops, size, (height, width))

    def merge(self, crops: Mapping[Box, NDArray[np.uint8]], size: Size, original_size: Size) -> Array:
        """(c, H, W): what windows show, by where they lie in the resized image, put together."""
        classes = self.classes()
        total, seen = np.zeros((len(classes), *size)), np.zeros(size)
        for (top, left, bottom, right), crop in crops.items():
            place = slice(top, bottom), slice(left, right)
            for number, channel in enumerate(self.window_scores(crop, classes)):
                total[number][place] += resize(channel, (bottom - top, right - left), align_corners=not self.learned)
            seen[place] += 1
        return np.stack([resize(channel / seen, original_size, align_corners=False) for channel in total])

    def classes(self) -> Array:
        """(c, d): the features of a class's prompts averaged, projected, of length 1."""
        projected = []
        for prompts in self.prompts:
            said = [self.text_encoder.encode(self.text_encoder.tokenize([prompt])).pooled[0] for prompt in prompts]
            mean = sum(part.double() for part in said) / len(said)
            with torch.no_grad():
                vector = self.head.projection(mean.float()[None])[0].double().numpy()
            projected.append(vector / np.linalg.norm(vector))
        return np.stack(projected)

    def logit(self, cosine: float) -> float:
        """What the sigmoid is taken of: the cosine, or the mask logit of a head that learned it."""
        head = self.head
        if head.log_gain is None or head.shift is None:
            return cosine
        gain, shift = np.exp(head.log_gain.item()), head.shift.item()
        return float(gain * (head.logit_scale * (cosine - head.threshold) + shift))

    def window_scores(self, crop: NDArray[np.uint8], classes: Array) -> Array:
        """(c, gh, gw) of one window."""
        pixels = torch.from_numpy(self.image_encoder.preprocess(crop))[None]
        encoding = self.image_encoder.encode(pixels)
        patches = encoding.features["last"][0].double().numpy()
        gh, gw, _ = patches.shape
        masks = np.zeros((len(classes), gh, gw))
        for number, one in enumerate(classes):
            for row in range(gh):
                for column in range(gw):
                    patch = patches[row, column]
                    masks[number, row, column] = sigmoid(self.logit(float(patch @ one / np.linalg.norm(patch))))
        if not self.cleaning:
            return masks
        return slow_cleaning(masks, encoding.attention["logits"][0].double().numpy(), patches, classes, self.cleaning)


def slow_cleaning(masks: Array, logits: Array, patches: Array, classes: Array, strength: float) -> Array:
    """Background cleaning of one window, from the words of its definition."""
    num_heads, gh, gw = logits.shape
    embeddings = []
    for head in range(num_heads):
        total = np.zeros(patches.shape[2])
        for row in range(gh):
            for column in range(gw):
                total += logits[head, row, column] * patches[row, column]
        mean = total / (gh * gw)
        embeddings.append(mean / np.linalg.norm(mean))
    attended = []
    for one in classes:
        weights = softmax(np.array([one @ embedding for embedding in embeddings]))
        looked = sum(weight * logits[head] for head, weight in enumerate(weights))
        attended.append(softmax(np.asarray(looked).ravel()).reshape(gh, gw))
    spread = np.stack(attended)
    unit = (spread - spread.min()) / (spread.max() - spread.min())
    return (masks + strength * (masks.min() + unit * (masks.max() - masks.min()))) / (1 + strength)


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin: every stride, and the last one where it ends with the image."""
    found, start = [], 0
    while start + window < length:
        found.append(start)
        start += stride
    return [*found, max(0, length - window)]


def resize(values: Array, size: tuple[int, int], *, align_corners: bool) -> Array:
    """(h, w) values at another size, bilinear."""
    down, across = (_weights(*pair, align_corners) for pair in zip(values.shape, size, strict=True))
    return np.asarray(down @ values @ across.T)


def _weights(num_in: int, num_out: int, align_corners: bool) -> Array:
    """(num_out, num_in): how much of each value every new one takes along one axis."""
    weights = np.zeros((num_out, num_in))
    for place in range(num_out):
        if align_corners:
            source = place * (num_in - 1) / (num_out - 1) if num_out > 1 else 0.0
        else:
            source = max(0.0, (place + 0.5) * num_in / num_out - 0.5)
        first = min(int(source), num_in - 1)
        second = min(first + 1, num_in - 1)
        weights[place, first] += 1 - (source - first)
        weights[place, second] += source - first
    return weights


def sigmoid(value: float) -> float:
    return 1 / (1 + float(np.exp(-value)))


def softmax(values: Array) -> Array:
    powers = np.exp(values - values.max())
    return np.asarray(powers / powers.sum())


def slow_scores(labels: Sequence[NDArray[np.int64]], truths: Sequence[NDArray[np.int64]], num: int) -> dict[str, float]:
    """mIoU, aAcc and mAcc of label maps, class by class; -1 in a truth does not count."""
    ious, accuracies = [], []
    for number in range(num):
        both = union = true = 0
        for found, truth in zip(labels, truths, strict=True):
            counts = truth != -1
            both += int(((found == number) & (truth == number)).sum())
            union += int((((found == number) | (truth == number)) & counts).sum())
            true += int((truth == number).sum())
        if union:
            ious.append(both / union)
        if true:
            accuracies.append(both / true)
    right = sum(int((found == truth).sum()) for found, truth in zip(labels, truths, strict=True))
    counted = sum(int((truth != -1).sum()) for truth in truths)
    return {"miou": sum(ious) / len(ious), "aacc": right / counted, "macc": sum(accuracies) / len(accuracies)}
