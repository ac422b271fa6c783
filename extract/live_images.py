"""What a learning image encoder is given, by rows of the store that it learns beside: pixels from the image files, or
tokens that were cached before the block it starts at.

A row is a view of an image. Pixels are those that the extraction job showed to the encoder for that row.
"""

from __future__ import annotations

import json
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from cache_schema.errors import StoreMismatchError, UsageError
from cache_schema.features import TOKENS, FeatureCache, ImageFeatures
from cache_schema.fingerprint import canonical_json
from cache_schema.quantize import dequantize
from cache_schema.reader import num_cores
from cache_schema.store import Store
from extract.encoders.live import LiveImageEncoder
from extract.images import UndecodableImageError, UnreadableFileError, decode_image, read_bytes


class PixelSource:
    """Preprocessed pixels of rows of a cache's image-feature store, decoded from the files each time.

    Args:
        image_dir: where the images lie, if not where the cache's samples store says.

    Raises:
        UsageError: the folder is missing, or the encoder prepares images in another way than the store's did.
    """

    def __init__(self, cache: FeatureCache, encoder: LiveImageEncoder, image_dir: Path | None = None) -> None:
        folder = cache.samples.image_dir if image_dir is None else image_dir
        if folder is None or not folder.is_dir():
            where = "" if folder is None else f" at {folder}: the folder is missing"
            raise UsageError(f"no images{where}. Name their folder with --image-dir.")
        of_store = cache.images.store.header.identity["encoder"].get("preprocessing")
        of_encoder = json.loads(canonical_json(encoder.identity["preprocessing"]))
        _require_same(of_store, of_encoder, "preprocessing", cache.images.store, "the encoder")
        self._images = cache.images
        self._table = cache.samples.samples.images
        self._image_at = {int(row): image for image, row in enumerate(cache.image_rows)}
        self._views = cache.images.views
        self._encoder = encoder
        self._folder = folder

    def load(self, rows: NDArray[np.int64]) -> UInt8[Tensor, "i h w 3"]:
        """The pixels of i rows, in that order. The views of one image that are asked for are decoded once.

        Raises:
            UsageError: a file is gone, was changed or cannot be decoded, or a row is of no image of the samples store.
        """
        numbers = np.searchsorted(self._images.starts, rows, "right") - 1
        places: defaultdict[int, list[int]] = defaultdict(list)
        for place, first in enumerate(self._images.starts[numbers].tolist()):
            places[first].append(place)
        height, width = self._encoder.input_size
        pixels = np.empty((len(rows), height, width, 3), np.uint8)

        def fill(first: int) -> None:
            image = self._decode(first)
            for place in places[first]:
                seen = self._views[int(rows[place])].apply_to_image(image)
                pixels[place] = self._encoder.preprocess(seen)

        with ThreadPoolExecutor(min(num_cores(), max(1, len(places)))) as pool:
            list(pool.map(fill, places))
        return torch.from_numpy(pixels)

    def _decode(self, first: int) -> NDArray[np.uint8]:
        """(H, W, 3) the image whose rows begin with `first`."""
        number = self._image_at.get(first)
        if number is None:
            raise UsageError(
                f"row {first} shows {self._images.ids[first]}, which the samples store does not have; "
                "load rows of its images only."
            )
        path = self._table.paths[number]
        try:
            data, digest = read_bytes(self._folder / path)
            if digest != self._table.sha256[number]:
                raise UnreadableFileError("the file changed after the samples store was written")
            image = decode_image(data)
            if image.shape[:2] != tuple(self._table.sizes[number]):
                raise UndecodableImageError("it has not the size that its annotations say")
        except UnreadableFileError as error:
            raise UsageError(
                f"{path!r} in {self._folder} cannot be had: {error}. Put it back or name the folder of the images with "
                "--image-dir."
            ) from error
        except UndecodableImageError as error:
            raise UsageError(
                f"{path!r} in {self._folder} cannot be learned from: {error}. Leave out its rows, which are not valid."
            ) from error
        return image


class StateSource:
    """Tokens that go into the block an encoder starts at, of rows of a cache's image-feature store.

    Args:
        states: another store of the same rows by the same encoder, with one layer `"k+tokens"`.

    Attributes:
        start: k.

    Raises:
        StoreMismatchError: it has no such layer or several, or is of other images, views, or another encoder.
    """

    def __init__(self, states: ImageFeatures, cache: FeatureCache) -> None:
        layers = [layer for layer in states.layers if layer.endswith(TOKENS)]
        if len(layers) != 1:
            raise StoreMismatchError(
                f"{states.store.path.name} has {len(layers)} layers with all tokens; extract one, such as "
                f"--layers 6{TOKENS}."
            )
        beside = cache.images
        names = states.store, beside.store.path.name
        ours, theirs = (store.header.identity["encoder"] for store in (beside.store, states.store))
        _require_same(theirs, ours, "encoder", *names)
        _require_same(list(states.view_specs), list(beside.view_specs), "views", *names)
        _require_same(states.ids, beside.ids, "image/id", *names)
        _require_same(states.sha256, beside.sha256, "image/sha256", *names)
        _require_same(states.views, beside.views, "view", *names)
        lacking = np.flatnonzero(beside.valid & ~states.valid)
        if len(lacking):
            row = int(lacking[0])
            _differ("valid", names[0], names[1], f"row {row} ({beside.ids[row]}) has no tokens, but features")
        self.start = int(layers[0].removesuffix(TOKENS))
        self._tokens = states.features(layers[0])
        self._scale = states.scale(layers[0])

    def load(self, rows: Int64[np.ndarray, " i"]) -> Float[Tensor, "i n d"]:
        """All n tokens of i rows in float32, in that order: CLS, registers, patches.

        Raises:
            DamagedStoreError: a shard is missing or fails its checksum.
        """
        tokens = self._tokens.read(rows)
        if self._scale is not None:
            tokens = dequantize(tokens, self._scale.read(rows))
        return torch.from_numpy(tokens[:, 0].astype(np.float32))


def _require_same(found: Any, expected: Any, field: str, store: Store, other: str) -> None:
    """Go down to the first field in which two values differ, and name it.

    Raises:
        StoreMismatchError: there is one.
    """
    if found == expected:
        return
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in sorted(found.keys() | expected.keys()):
            _require_same(found.get(name), expected.get(name), f"{field}.{name}", store, other)
    if isinstance(found, list) and isinstance(expected, list):
        if len(found) != len(expected):
            _differ(field, store, other, f"{len(found)} and {len(expected)} of them")
        row = next(row for row, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
        _differ(field, store, other, f"first at {row}: {found[row]} and {expected[row]}")
    _differ(field, store, other, f"{found} and {expected}")


def _differ(field: str, store: Store, other: str, how: str) -> NoReturn:
    raise StoreMismatchError(
        f"{field} of {store.path.name} and of {other} differ ({how}); name stores of the same images, views and "
        "encoder, or extract them anew."
    )
