"""The two feature stores, and the cache that joins them to a samples store.

Image features, for N rows. A row is a view of an image (views.py). The rows of an image stand side by side and have
its id: first its fixed views, the whole image at their head, then its windows, of which each image has its own number.

    features/<layer>          (N, gh, gw, D), a chunk holds one row
    scale/<layer>             (N, gh, gw) float16, where features are int8: what a token's channels are multiplied by
    cls/<layer>               (N, D)
    attention/logits          (N, heads, gh, gw), attention/head_tokens (N, heads, D), attention/mean_token (N, D)
    valid                     (N,) bool; False where the image could not be encoded (see the ledger)
    image/id                  ragged UTF-8 strings
    image/sha256              (N, 32) uint8
    original_size             (N, 2) int32, (H, W)
    view                      (N, 5) int32, box XYXY in pixels of the original, and 1 where it is mirrored

Prompt features, for M prompts of L tokens in all:

    tokens                    (L, D), never padded
    token_ids                 (L,) int32
    offsets                   (M + 1,) int64: prompt m owns rows offsets[m] to offsets[m + 1] of the two above
    pooled                    (M, P)
    prompt/text               ragged UTF-8 strings
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_schema.atomic import StorePath
from cache_schema.errors import StoreMismatchError
from cache_schema.fingerprint import fingerprint
from cache_schema.reader import RowReader
from cache_schema.samples import SamplesStore, open_samples, read_strings
from cache_schema.store import Store, open_store
from cache_schema.views import View, is_windows

TOKENS = "+tokens"
"""Behind a block's number: all tokens of that block's output, from which the blocks behind it can go on."""


@dataclass(frozen=True)
class ImageFeatures:
    """An image-feature store, open for reading."""

    store: Store

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers with token grids, in the order in which they were asked for; there may be none."""
        return tuple(self.store.header.identity["outputs"]["layers"])

    @property
    def grid_layers(self) -> tuple[str, ...]:
        """The layers of which a mask can be made: all but those that keep every token in one row."""
        return tuple(layer for layer in self.layers if not layer.endswith(TOKENS))

    @property
    def cls_layers(self) -> tuple[str, ...]:
        """Layers with CLS tokens."""
        return tuple(self.store.header.identity["outputs"]["cls"])

    @property
    def attention_outputs(self) -> tuple[str, ...]:
        """What was kept of the last attention layer: some of logits, head_tokens and mean_token, or nothing."""
        return tuple(self.store.header.identity["outputs"]["attention"])

    @property
    def view_specs(self) -> tuple[str, ...]:
        """How each image is looked at: fixed views in the order of its rows, then perhaps windows."""
        return tuple(self.store.header.identity["views"])

    @property
    def fixed_specs(self) -> tuple[str, ...]:
        """The views that every image has: those that stand for one row each."""
        return tuple(spec for spec in self.view_specs if not is_windows(spec))

    def features(self, layer: str) -> RowReader:
        """(N, gh, gw, D) token grids of one layer."""
        return self.store.array(f"features/{layer}")

    def scale(self, layer: str) -> RowReader | None:
        """(N, gh, gw) scales of the tokens of one layer, if they are stored as int8."""
        name = f"scale/{layer}"
        return self.store.array(name) if name in self.store.layouts else None

    def cls(self, layer: str) -> RowReader:
        """(N, D) CLS tokens of one layer."""
        return self.store.array(f"cls/{layer}")

    def attention(self, name: str) -> RowReader:
        """(N, ...) one of the `attention_outputs`."""
        return self.store.array(f"attention/{name}")

    def rows_of_image(self, image: int) -> range:
        """The rows of an image, by its place in this store: its fixed views, then its windows."""
        return range(int(self.starts[image]), int(self.starts[image + 1]))

    @cached_property
    def ids(self) -> list[str]:
        """The image of each row."""
        return read_strings(self.store, "image/id")

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """(I + 1,) the row of the whole view of each of I images, and the number of rows."""
        firsts = [row for row, image in enumerate(self.ids) if row == 0 or image != self.ids[row - 1]]
        return np.array([*firsts, len(self.ids)], np.int64)

    @cached_property
    def sha256(self) -> list[str]:
        return [bytes(row).hex() for row in self.store.read("image/sha256")]

    @cached_property
    def views(self) -> list[View]:
        """What each row looks at."""
        return [View.from_row(row) for row in self.store.read("view").tolist()]

    @cached_property
    def valid(self) -> NDArray[np.bool_]:
        return self.store.read("valid")


@dataclass(frozen=True)
class PromptFeatures:
    """A prompt-feature store, open for reading."""

    store: Store

    @cached_property
    def prompts(self) -> list[str]:
        return read_strings(self.store, "prompt/text")

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        return self.store.read("offsets")

    def tokens(self) -> NDArray[Any]:
        """(L, D) token features of all prompts, end to end."""
        return self.store.read("tokens")

    @cached_property
    def token_ids(self) -> NDArray[np.int32]:
        """(L,) token ids of all prompts, end to end."""
        return self.store.read("token_ids")

    def pooled(self) -> NDArray[Any]:
        """(M, P) pooled prompt features."""
        return self.store.read("pooled")


@dataclass(frozen=True)
class FeatureCache:
    """A samples store with the features of its images and prompts.

    `image_rows` (I,) and `prompt_rows` (M,) map the rows of the samples store to rows of the feature stores; of an
    image with several views, to the whole image, which the other fixed views and then the windows follow.
    """

    samples: SamplesStore
    images: ImageFeatures
    prompts: PromptFeatures
    image_rows: NDArray[np.int64]
    prompt_rows: NDArray[np.int64]

    @property
    def fingerprints(self) -> dict[str, str]:
        return {
            "samples": self.samples.fingerprint,
            "image_features": self.images.store.header.fingerprint,
            "prompt_features": self.prompts.store.header.fingerprint,
        }

    @property
    def encoder_fingerprints(self) -> dict[str, str]:
        """Fingerprints of the two encoders alone, whatever images and prompts they saw."""
        headers = {"image": self.images.store.header, "text": self.prompts.store.header}
        return {side: fingerprint(header.identity["encoder"]) for side, header in headers.items()}

    def usable_samples(self, split: str) -> NDArray[np.int64]:
        """The samples of a split whose image could be encoded."""
        rows = self.samples.samples.rows_of_split(split)
        usable = self.images.valid[self.image_rows[self.samples.samples.image_rows[rows]]]
        return rows[usable]


def open_cache(
    samples: StorePath, images: StorePath, prompts: StorePath, image_dir: Path | None = None
) -> FeatureCache:
    """Join a samples store with one image-feature store and one prompt-feature store.

    Args:
        image_dir: where the image files lie, if not where they lay when the samples store was written. Training
            and evaluation never look at them; pictures do.

    Raises:
        UsageError: a store is missing, incomplete or of another kind.
        StoreMismatchError: an image or a prompt of the samples has no features, or features of other bytes.
    """
    opened = open_samples(samples, image_dir)
    image_features = ImageFeatures(open_store(images, "image_features"))
    prompt_features = PromptFeatures(open_store(prompts, "prompt_features"))
    table, first_rows = opened.samples.images, image_features.starts[:-1]
    image_numbers = _match(
        list(zip(table.ids, table.sha256, strict=True)),
        [(image_features.ids[row], image_features.sha256[row]) for row in first_rows.tolist()],
        f"images of {samples.name} have no features in {images.name}",
    )
    prompt_rows = _match(
        opened.samples.prompts, prompt_features.prompts, f"prompts of {samples.name} have no features in {prompts.name}"
    )
    return FeatureCache(opened, image_features, prompt_features, first_rows[image_numbers], prompt_rows)


def _match(wanted: Sequence[Any], known: Sequence[Any], complaint: str) -> NDArray[np.int64]:
    row_of = {key: row for row, key in enumerate(known)}
    missing = [key for key in wanted if key not in row_of]
    if missing:
        first = missing[0][0] if isinstance(missing[0], tuple) else missing[0]
        raise StoreMismatchError(
            f"these stores do not match: {len(missing)} of {len(wanted)} {complaint} (first: {first!r}). "
            "Extract features for these samples, or name the stores that were extracted from them."
        )
    return np.array([row_of[key] for key in wanted], np.int64)
