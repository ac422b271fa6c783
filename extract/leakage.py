"""What splits and stores share: images, by id and by content, and prompts. Shared images make scores look better."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_schema.errors import UsageError
from cache_schema.samples import ImageTable, SamplesStore

NUM_EXAMPLES = 3
"""How many shared images and prompts are spelt out for a pair."""

_NUM_NAMED = 6
"""How many pairs the verdict names."""

_COCO_NAME = re.compile(r"(?:COCO_(?P<part>[a-z]+\d{4})_)?(?P<number>\d{12})(?:_\d+)?")
"""The stem of a COCO file name: with its part as in 2014, without as in 2017; `_12` is an annotation's suffix."""

_TRAIN2014 = "train2014"

Codes = NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """One split of one store. `num_in_train2014` counts the images that COCO's train2014 has too."""

    name: str
    split: str
    num_images: int
    num_prompts: int
    num_samples: int
    num_in_train2014: int


@dataclass(frozen=True)
class Overlap:
    """What two parts share.

    Args:
        num_images: images of the first part that the second has too, by id or by content.
        num_by_id: shared ids. Between stores an id counts only with the file name it goes with, for every dataset
            counts its images from 1. COCO's names of 2014 and 2017 are one name; but twelve digits alone may be
            anybody's, and count where the other name says that it is COCO's, or the content is the same.
        num_by_content: different contents (SHA-256 of the file) that both have.
        num_other_images: ids that both have, for files that agree neither in content nor in a name that counts.
        num_prompts: texts that both have, letter for letter.
        num_prompts_alike: texts that both have when case and blanks are put aside.
    """

    first: str
    second: str
    same_split: bool
    num_images: int
    num_by_id: int
    num_by_content: int
    num_other_images: int
    num_prompts: int
    num_prompts_alike: int
    images: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()

    @property
    def is_leak(self) -> bool:
        """Whether one split would be scored on images that another was made of."""
        return self.num_images > 0 and not self.same_split

    @property
    def is_nothing(self) -> bool:
        return not (self.num_images or self.num_other_images or self.num_prompts_alike)


@dataclass(frozen=True)
class Leakage:
    """All parts and all pairs of them."""

    parts: tuple[Part, ...]
    overlaps: tuple[Overlap, ...]
    stores: dict[str, str] = field(default_factory=dict)
    """The path of each store, by the name its parts begin with."""

    @property
    def leaks(self) -> tuple[Overlap, ...]:
        """The pairs of different splits that share images."""
        return tuple(overlap for overlap in self.overlaps if overlap.is_leak)

    def to_dict(self) -> dict[str, Any]:
        return {
            "stores": self.stores,
            "parts": [asdict(part) for part in self.parts],
            "overlaps": [{**asdict(overlap), "is_leak": overlap.is_leak} for overlap in self.overlaps],
            "num_leaks": len(self.leaks),
        }

    def table(self) -> str:
        """For people: the parts, what pairs of them share, and in words what follows."""
        width = max(len(_shown(part.name)) for part in self.parts)
        lines = [f"{_shown(name)}: {_shown(path)}" for name, path in self.stores.items()]
        lines += ["", f"{'split':{width}} {'images':>9} {'prompts':>9} {'samples':>9} {'in COCO train2014':>18}"]
        lines += [
            f"{_shown(part.name):{width}} {part.num_images:>9} {part.num_prompts:>9} {part.num_samples:>9} "
            f"{part.num_in_train2014:>18}"
            for part in self.parts
        ]
        return "\n".join([*lines, "", *self._overlap_lines(width), *self._train2014_lines(), *self._verdict()])

    def _overlap_lines(self, width: int) -> list[str]:
        shown = [overlap for overlap in self.overlaps if not overlap.is_nothing]
        if not shown:
            return ["No image and no prompt is shared."]
        pair = 2 * width + 5
        lines = [f"{'shared between':{pair}} {'images':>8} {'by id':>8} {'by bytes':>9} {'prompts':>8} {'alike':>8}"]
        for overlap in shown:
            between = f"{_shown(overlap.first):{width}} and {_shown(overlap.second):{width}}"
            lines.append(
                f"{between:{pair}} {overlap.num_images:>8} {overlap.num_by_id:>8} {overlap.num_by_content:>9} "
                f"{overlap.num_prompts:>8} {overlap.num_prompts_alike:>8}"
            )
            lines += [f"    image {image}" for image in overlap.images]
            lines += [f"    prompt {prompt!r}" for prompt in overlap.prompts]
        if len(shown) < len(self.overlaps):
            lines.append(f"The other {len(self.overlaps) - len(shown)} pairs share nothing.")
        if others := sum(overlap.num_other_images for overlap in shown):
            lines.append(
                f"{others} ids stand for files that agree neither in name nor in bytes, where twelve digits alone are "
                "no name: other images, most likely, and not counted."
            )
        return lines

    def _train2014_lines(self) -> list[str]:
        found = [part for part in self.parts if part.num_in_train2014]
        if not found:
            return []
        named = ", ".join(f"{_shown(part.name)} ({part.num_in_train2014} of {part.num_images})" for part in found)
        return [
            "",
            f"In COCO train2014: images of {named}. An encoder or a head that was trained on COCO's train2014, or on "
            "train2017, which contains it, has seen these images: what it scores on them is no score on new images.",
        ]

    def _verdict(self) -> list[str]:
        if self.leaks:
            named = [
                f"{_shown(leak.first)} and {_shown(leak.second)} ({leak.num_images})"
                for leak in self.leaks[:_NUM_NAMED]
            ]
            hidden = len(self.leaks) - len(named)
            pairs = "; ".join(named) + (f"; and {hidden} more pairs" if hidden else "")
            return [
                "",
                f"LEAKAGE: different splits share images: {pairs}. Do not score on a split what was trained on the "
                "other.",
            ]
        return ["", "No image is in two different splits."]


def _shown(name: str) -> str:
    """A name out of a file, on one line and without anything that would steer a terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)


def check_leakage(stores: Sequence[SamplesStore]) -> Leakage:
    """Compare every split of these stores with every other, within a store and between stores.

    Raises:
        UsageError: a store is named twice.
    """
    names = _names(stores)
    parts = [part for name, side in zip(names, _sides(stores), strict=True) for part in _parts_of(name, side)]
    return Leakage(
        parts=tuple(part.part for part in parts),
        overlaps=tuple(_compare(first, second) for first, second in combinations(parts, 2)),
        stores={name: str(store.path) for name, store in zip(names, stores, strict=True)},
    )


def _names(stores: Sequence[SamplesStore]) -> list[str]:
    """The dataset of each store, numbered where several are of one."""
    if len({store.fingerprint for store in stores}) < len(stores):
        raise UsageError("the same samples store is named twice; name another, or it alone to compare its splits.")
    datasets = [store.dataset for store in stores]
    return [
        name if datasets.count(name) == 1 else f"{name}#{datasets[: place + 1].count(name)}"
        for place, name in enumerate(datasets)
    ]


@dataclass(frozen=True)
class _Side:
    """A store with a number for whatever may be shared, the same number in every store.

    `ids`, `named_ids`, `is_bare`, `contents` and `in_train2014` are by row of image, `prompts` and `alike` by row of
    prompt. `is_bare` are names of twelve digits that do not say whose they are.
    """

    store: SamplesStore
    ids: Codes
    named_ids: Codes
    is_bare: NDArray[np.bool_]
    contents: Codes
    in_train2014: NDArray[np.bool_]
    prompts: Codes
    alike: Codes


@dataclass(frozen=True)
class _PartRows:
    """One split of one side, as rows of its images and prompts."""

    part: Part
    side: _Side
    images: NDArray[np.int64]
    prompts: NDArray[np.int64]


def _sides(stores: Sequence[SamplesStore]) -> list[_Side]:
    tables = [store.samples.images for store in stores]
    texts = [store.samples.prompts for store in stores]
    ids = _number(table.ids for table in tables)
    coco = [[_coco_name(path) for path in table.paths] for table in tables]
    named = _number(_named_ids(table, names) for table, names in zip(tables, coco, strict=True))
    contents = _number(table.sha256 for table in tables)
    prompts = _number(texts)
    alike = _number([" ".join(text.casefold().split()) for text in of_store] for of_store in texts)
    seen = {number for names in coco for part, number in names if part == _TRAIN2014}
    return [
        _Side(
            store=store,
            ids=ids[place],
            named_ids=named[place],
            is_bare=np.array([part is None and number is not None for part, number in coco[place]], np.bool_),
            contents=contents[place],
            in_train2014=np.array([number in seen for _, number in coco[place]], np.bool_),
            prompts=prompts[place],
            alike=alike[place],
        )
        for place, store in enumerate(stores)
    ]


def _number(columns: Iterable[Iterable[Hashable]]) -> list[Codes]:
    """Each value's number: equal values of all columns have equal numbers."""
    numbers: dict[Hashable, int] = {}
    return [np.array([numbers.setdefault(value, len(numbers)) for value in column], np.int64) for column in columns]


def _coco_name(path: str) -> tuple[str | None, int | None]:
    """The part of COCO and the number that a file name says, each None where it says nothing."""
    found = _COCO_NAME.fullmatch(PurePosixPath(path).stem)
    return (None, None) if found is None else (found["part"], int(found["number"]))


def _named_ids(images: ImageTable, names: Sequence[tuple[str | None, int | None]]) -> list[Hashable]:
    """What two images of different stores must agree in to be taken for one: COCO's number, or id and file name."""
    return [
        (image_id, PurePosixPath(path).name) if number is None else number
        for image_id, path, (_, number) in zip(images.ids, images.paths, names, strict=True)
    ]


def _parts_of(name: str, side: _Side) -> list[_PartRows]:
    samples = side.store.samples
    splits = np.array(samples.splits)
    parts = []
    for split in dict.fromkeys(samples.splits):
        rows = np.flatnonzero(splits == split)
        images, prompts = np.unique(samples.image_rows[rows]), np.unique(samples.prompt_rows[rows])
        part = Part(
            name=f"{name}/{split}",
            split=split,
            num_images=len(images),
            num_prompts=len(prompts),
            num_samples=len(rows),
            num_in_train2014=int(side.in_train2014[images].sum()),
        )
        parts.append(_PartRows(part, side, images.astype(np.int64), prompts.astype(np.int64)))
    return parts


def _compare(first: _PartRows, second: _PartRows) -> Overlap:
    one, other = first.side, second.side
    key, other_key = one.named_ids[first.images], other.named_ids[second.images]
    content, other_content = one.contents[first.images], other.contents[second.images]
    by_content = np.isin(content, other_content)
    certain = np.isin(key, other_key[~other.is_bare[second.images]]) | by_content
    by_id = np.isin(key, other_key) & (certain | ~one.is_bare[first.images])
    shared = by_id | by_content
    same_number = np.isin(one.ids[first.images], other.ids[second.images])
    prompt, other_prompt = one.prompts[first.prompts], other.prompts[second.prompts]
    alike, other_alike = one.alike[first.prompts], other.alike[second.prompts]
    shared_prompts = np.isin(alike, other_alike)
    images, texts = one.store.samples.images, one.store.samples.prompts
    return Overlap(
        first=first.part.name,
        second=second.part.name,
        same_split=first.part.split == second.part.split,
        num_images=int(shared.sum()),
        num_by_id=len(np.unique(key[by_id])),
        num_by_content=len(np.unique(content[by_content])),
        num_other_images=int((same_number & ~shared).sum()),
        num_prompts=len(np.intersect1d(prompt, other_prompt)),
        num_prompts_alike=len(np.unique(alike[shared_prompts])),
        images=tuple(
            f"{images.ids[row]!r} ({images.paths[row]!r})" for row in first.images[shared][:NUM_EXAMPLES].tolist()
        ),
        prompts=tuple(texts[row] for row in first.prompts[shared_prompts][:NUM_EXAMPLES].tolist()),
    )
