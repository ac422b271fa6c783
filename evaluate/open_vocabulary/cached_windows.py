"""Images whose windows were encoded before: `headstart extract --views whole windows-1-0.5`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_schema.errors import StoreMismatchError, UsageError
from cache_schema.features import ImageFeatures
from cache_schema.reader import RowReader
from cache_schema.samples import ImageTable
from cache_schema.views import View, is_windows
from evaluate.open_vocabulary.live_windows import SeenImage
from evaluate.open_vocabulary.windows import SlidingWindow, Windows
from evaluate.predictor import open_image
from extract.encoders.protocols import ImageEncoding


@dataclass(frozen=True)
class CachedWindows:
    """Reads what an image-feature store holds of windows.

    These were cut from the image at its own size, not from the resized one, and each was brought to the encoder's input
    at once; where they lie differs by less than a pixel. That is finer than the published way, and the numbers are not
    the same to the last digit.

    Args:
        plan: what the windows must be, in shares of the short side.
        layers, attention: what to read.
        with_images: look at the image files, too, for what needs the pixels.

    Raises:
        UsageError: the store holds no windows, others than the plan's, or not what is to be read.
    """

    images: ImageFeatures
    plan: SlidingWindow
    layers: tuple[str, ...]
    attention: tuple[str, ...] = ()
    image_dir: Path | None = None
    with_images: bool = False

    def __post_init__(self) -> None:
        side, step = (length / self.plan.short_side_px for length in (self.plan.window_px, self.plan.stride_px))
        wanted, path = f"windows-{side:g}-{step:g}", self.images.store.path
        found = [spec for spec in self.images.view_specs if is_windows(spec)]
        if found != [wanted]:
            raise UsageError(
                f"{path} holds {found[0] if found else 'no windows'}, and {wanted} is asked for; extract with "
                f"--views whole {wanted}, or leave --images out."
            )
        for noun, names, known in (
            ("layer", self.layers, self.images.layers),
            ("attention output", self.attention, self.images.attention_outputs),
        ):
            if missing := [name for name in names if name not in known]:
                raise UsageError(f"{path} lacks {noun} {missing[0]}; extract with it, or leave --images out.")

    def look_at(self, table: ImageTable, rows: Iterable[int]) -> Iterator[SeenImage]:
        """What the store says of images, by their rows in a samples store.

        Raises:
            StoreMismatchError: an image is not in the store, or has other bytes there.
            UsageError: an image could not be encoded.
        """
        for row in rows:
            key = table.ids[row], table.sha256[row]
            if key not in self._number_of:
                raise StoreMismatchError(
                    f"{self.images.store.path} holds no features of image {key[0]} as it is now; extract features for "
                    "this samples store, or leave --images out."
                )
            of_image = self.images.rows_of_image(self._number_of[key])[len(self.images.fixed_specs) :]
            if not self.images.valid[of_image].all():
                raise UsageError(f"image {key[0]} could not be encoded (see ledger.jsonl); mend it and extract again.")
            height, width = table.sizes[row].tolist()
            planned = self.plan.plan((height, width))
            boxes = tuple(_scale(self.images.views[number], planned) for number in of_image)
            windows = Windows(planned.original_size, planned.size, boxes)
            resized = None
            if self.with_images:
                assert self.image_dir is not None
                resized = windows.resize(open_image(self.image_dir / table.paths[row]))
            yield SeenImage(windows, self._read(np.array(of_image, np.int64)), resized)

    @cached_property
    def _number_of(self) -> Mapping[tuple[str, str], int]:
        ids, sha256 = self.images.ids, self.images.sha256
        return {(ids[row], sha256[row]): number for number, row in enumerate(self.images.starts[:-1].tolist())}

    def _read(self, rows: Any) -> ImageEncoding:
        def read(reader: RowReader) -> Tensor:
            return torch.from_numpy(reader.read(rows)).float()

        features = {}
        for layer in self.layers:
            scale = self.images.scale(layer)
            values = read(self.images.features(layer))
            features[layer] = values if scale is None else values * read(scale)[..., None]
        return ImageEncoding(
            features,
            {layer: read(self.images.cls(layer)) for layer in self.layers if layer in self.images.cls_layers},
            {name: read(self.images.attention(name)) for name in self.attention},
        )


def _scale(view: View, planned: Windows) -> tuple[int, int, int, int]:
    """Where a view lies in the resized image: its edges to the nearest pixel, so that the image stays covered."""
    (height, width), (original_height, original_width) = planned.size, planned.original_size
    left, top, right, bottom = view.box
    across, down = (
        [round(edge * resized / original) for edge in edges]
        for edges, resized, original in (
            ((left, right), width, original_width),
            ((top, bottom), height, original_height),
        )
    )
    return across[0], down[0], across[1], down[1]
