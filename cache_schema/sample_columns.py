"""A stream of samples as the arrays of a samples store. They grow on the disk; memory holds a bounded part of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType

import numpy as np

from cache_schema.masks import Size
from cache_schema.samples import SampleArrays, ragged_arrays
from cache_schema.spilled import Spill, SpilledArray, SpilledBytes, SpilledNames
from cache_schema.store import StaticArray


class SampleColumns:
    """Images, prompts and samples, each in the order in which they are added. samples.py says what the arrays mean.

    The arrays can be read until the `with` block is left.
    """

    def __init__(self) -> None:
        spill = self._spill = Spill()
        self._image_ids, self._image_paths = SpilledBytes(spill), SpilledBytes(spill)
        self._image_sizes = SpilledArray(spill, np.int32, (2,))
        self._image_sha256 = SpilledArray(spill, np.uint8, (32,))
        self._prompts = SpilledBytes(spill)
        self._ids = SpilledBytes(spill)
        self._image_rows, self._prompt_rows = SpilledArray(spill, np.int32), SpilledArray(spill, np.int32)
        self._targets, self._ignored = SpilledBytes(spill), SpilledBytes(spill)
        self._no_target = SpilledArray(spill, np.bool_)
        self._splits = SpilledNames(spill)
        self._tags: dict[str, SpilledNames] = {}

    def __enter__(self) -> SampleColumns:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._spill.close()

    @property
    def num_images(self) -> int:
        return len(self._image_sizes)

    @property
    def num_prompts(self) -> int:
        return len(self._prompts.offsets) - 1

    def __len__(self) -> int:
        return len(self._no_target)

    def add_image(self, image_id: str, path: str, size: Size, sha256: str) -> None:
        """One more image: its path in the image folder, (H, W), and the file's digest in hexadecimal."""
        self._image_ids.append(image_id.encode())
        self._image_paths.append(path.encode())
        self._image_sizes.extend(np.array(size, "<i4").tobytes())
        self._image_sha256.extend(bytes.fromhex(sha256))

    def add_prompt(self, prompt: str) -> None:
        """One more prompt, which is none of those before it."""
        self._prompts.append(prompt.encode())

    def add(
        self,
        sample_id: str,
        image_row: int,
        prompt_row: int,
        *,
        target: bytes,
        ignored: bytes,
        no_target: bool,
        split: str,
        tags: Mapping[str, str],
    ) -> None:
        """One more sample, in the terms of `Samples`."""
        for name, value in tags.items():
            if name not in self._tags:
                self._tags[name] = SpilledNames(self._spill)
            self._tags[name].pad(len(self))
            self._tags[name].append(value)
        self._ids.append(sample_id.encode())
        self._image_rows.append(image_row)
        self._prompt_rows.append(prompt_row)
        self._targets.append(target)
        self._ignored.append(ignored)
        self._no_target.append(no_target)
        self._splits.append(split)

    def arrays(self, classes: Iterable[str] = ()) -> SampleArrays:
        """All of them; nothing may be added any more."""
        splits, split_codes = self._splits.encoded()
        arrays = [
            *_ragged("image/id", self._image_ids, "image"),
            *_ragged("image/path", self._image_paths, "image"),
            StaticArray("image/size", self._image_sizes, ("image", "hw")),
            StaticArray("image/sha256", self._image_sha256, ("image", "byte")),
            *_ragged("prompt/text", self._prompts, "prompt"),
            *_ragged("sample/id", self._ids, "sample"),
            StaticArray("sample/image", self._image_rows, ("sample",)),
            StaticArray("sample/prompt", self._prompt_rows, ("sample",)),
            *_ragged("sample/target", self._targets, "sample"),
            StaticArray("sample/no_target", self._no_target, ("sample",)),
            StaticArray("sample/split", split_codes, ("sample",)),
        ]
        if len(self._ignored.values):
            arrays += _ragged("sample/ignored", self._ignored, "sample")
        tags: dict[str, list[str]] = {}
        for name, column in sorted(self._tags.items()):
            column.pad(len(self))
            tags[name], codes = column.encoded()
            arrays.append(StaticArray(f"sample/tag/{name}", codes, ("sample",)))
        return SampleArrays(arrays, splits, tags, tuple(classes))


def _ragged(name: str, column: SpilledBytes, axis: str) -> list[StaticArray]:
    return ragged_arrays(name, (column.values, column.offsets), axis)
