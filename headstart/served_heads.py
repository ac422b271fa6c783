"""Trained heads that answer at once: encoders shared where they are equal, pictures encoded once per encoder.

Knows nothing of pages and servers.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cache_schema.errors import UsageError
from cache_schema.fingerprint import fingerprint
from cache_schema.views import View
from evaluate.predictor import Prediction, Predictor
from extract.encoders.protocols import ImageEncoder, ImageEncoding, TextEncoder
from extract.images import UndecodableImageError, UnreadableFileError, decode_image, read_bytes
from extract.job import pick_device
from heads.checkpoint import load_head
from heads.runs import read_run_config
from headstart.encoders import load_recorded_encoders

NUM_ENCODED = 4
"""How many pictures an encoder remembers."""

_MAX_MASKS_PIXELS = 100_000_000
"""How many pixels the masks of one batch of prompts have together, but for a batch of one."""


class UnusablePictureError(UsageError):
    """A file that no head can look at, in a sentence that names the file and not its folder."""


class RememberingEncoder:
    """An image encoder that encodes a picture once while it remembers it: the last `NUM_ENCODED` of them.

    Otherwise the encoder it is given, with the same identity.
    """

    def __init__(self, encoder: ImageEncoder) -> None:
        self._encoder = encoder
        self._encoded: OrderedDict[str, ImageEncoding] = OrderedDict()
        self.num_encoded = 0
        self.name, self.device, self.adapter = encoder.name, encoder.device, encoder.adapter

    @property
    def identity(self) -> Mapping[str, Any]:
        return self._encoder.identity

    @property
    def grids(self) -> Mapping[str, tuple[int, int, int]]:
        return self._encoder.grids

    @property
    def cls_widths(self) -> Mapping[str, int]:
        return self._encoder.cls_widths

    @property
    def attention_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._encoder.attention_shapes

    def fit(self, view: View) -> View:
        return self._encoder.fit(view)

    def preprocess(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return self._encoder.preprocess(image)

    def encode(self, pixels: Tensor) -> ImageEncoding:
        """Features of a batch (i, h, w, 3), the batch being what is remembered."""
        content = pixels.cpu().contiguous().numpy()
        key = f"{content.shape} {hashlib.sha256(content.data).hexdigest()}"
        if key not in self._encoded:
            self._encoded[key] = self._encoder.encode(pixels)
            self.num_encoded += 1
        self._encoded.move_to_end(key)
        while len(self._encoded) > NUM_ENCODED:
            self._encoded.popitem(last=False)
        return self._encoded[key]


@dataclass(frozen=True)
class Asked:
    """A picture, (H, W, 3) uint8, and what one head says of it, prompt by prompt.

    `predictions` are made as they are taken, so that large masks need not be held all at once.
    """

    image: NDArray[np.uint8]
    predictions: Iterator[Prediction]


class ServedHeads:
    """Several heads over shared encoders, one question at a time.

    Args:
        predictors: by the name under which each head is asked for, in the order to show.
        encoders: the image encoders they share.
    """

    def __init__(self, predictors: Mapping[str, Predictor], encoders: Sequence[RememberingEncoder]) -> None:
        self._predictors = dict(predictors)
        self._lock = threading.Lock()
        self._opened: tuple[Path, NDArray[np.uint8]] | None = None
        self.encoders = tuple(encoders)

    @property
    def names(self) -> list[str]:
        return list(self._predictors)

    def has_attention(self, name: str) -> bool:
        """Whether that head says how much each word of a prompt is looked at."""
        return self._predictors[name].has_attention

    def describe(self) -> list[dict[str, Any]]:
        """The heads as plain JSON."""
        return [{"name": name, "has_attention": self.has_attention(name)} for name in self.names]

    def ask(self, name: str, picture: Path, prompts: Sequence[str]) -> Asked:
        """What a head says of a picture. The last picture stays open: more prompts, or another head, find it decoded.

        Raises:
            UnusablePictureError: the file is gone, no picture, too large, or too long and thin.
            UsageError: the head is none of these.
        """
        if name not in self._predictors:
            raise UsageError(f"no head is named {name!r}; there are {', '.join(self.names)}.")
        with self._lock:
            if self._opened is None or self._opened[0] != picture:
                self._opened = None  # two large pictures are not held at once
                self._opened = (picture, _open(picture))
            image = self._opened[1]
            try:
                self._predictors[name].prepare(image)
            except UsageError as error:
                raise UnusablePictureError(str(error)) from error
        return Asked(image, self._predict(self._predictors[name], image, prompts))

    def _predict(self, predictor: Predictor, image: NDArray[np.uint8], prompts: Sequence[str]) -> Iterator[Prediction]:
        at_once = max(1, _MAX_MASKS_PIXELS // (image.shape[0] * image.shape[1]))
        for start in range(0, len(prompts), at_once):
            with self._lock:
                predictions = predictor.set_image(image).predict(prompts[start : start + at_once])
            yield from predictions


def load_served_heads(run_dirs: Sequence[Path], device: str = "auto") -> ServedHeads:
    """The best heads of runs. Encoders of one fingerprint, asked for the same outputs, are held once.

    Raises:
        UsageError: there is no run, one is named twice, or a run or its encoders cannot be loaded.
        StoreMismatchError: encoders are not those a run was trained on.
    """
    configs = {name: (path, read_run_config(path, "encoders")) for name, path in _names(run_dirs).items()}
    image_encoders: dict[str, RememberingEncoder] = {}
    text_encoders: dict[str, TextEncoder] = {}
    predictors: dict[str, Predictor] = {}
    for name, (run_dir, config) in configs.items():
        image, text = config["encoders"]["image"], config["encoders"]["text"]
        prints = config["encoder_fingerprints"]
        image_key = fingerprint({"encoder": prints["image"], "outputs": [image["layers"], image["attention"]]})
        if image_key not in image_encoders or prints["text"] not in text_encoders:
            image_encoder, text_encoder = load_recorded_encoders(run_dir, config, device)
            image_encoders.setdefault(image_key, RememberingEncoder(image_encoder))
            text_encoders.setdefault(prints["text"], text_encoder)
        _, head = load_head(run_dir / "best")
        predictors[name] = Predictor(
            head.to(pick_device(device)),
            image_encoders[image_key],
            text_encoders[prints["text"]],
            image_dtype=image["dtype"],
            text_dtype=text["dtype"],
        )
    return ServedHeads(predictors, list(image_encoders.values()))


def _open(picture: Path) -> NDArray[np.uint8]:
    try:
        return decode_image(read_bytes(picture)[0])
    except UndecodableImageError as error:
        raise UnusablePictureError(
            f"{picture.name} cannot be used: {error}. Drop a JPEG, a PNG or the like."
        ) from error
    except UnreadableFileError as error:
        raise UnusablePictureError(f"{picture.name} is no longer there: drop it again.") from error


def _names(run_dirs: Sequence[Path]) -> dict[str, Path]:
    """What to call each run: its folder's name, or as much of its path as tells it from the others."""
    if not run_dirs:
        raise UsageError("there is no run to serve; name the run folders that `headstart train` printed.")
    paths = [path.resolve() for path in run_dirs]
    for place, path in enumerate(paths):
        if path in paths[:place]:
            raise UsageError(f"{run_dirs[place]} is named twice; name each run once.")
    for num_parts in range(1, 1 + max(len(path.parts) for path in paths)):
        names = [Path(*path.parts[-num_parts:]).as_posix() for path in paths]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, run_dirs, strict=True))
