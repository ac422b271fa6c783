"""What there is to know about the samples of a store: how many, of what size, about what; and a sheet of pictures."""

from __future__ import annotations

import os.path
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from cache_schema.samples import Samples, SamplesStore
from evaluate.contact_sheet import Card
from evaluate.lettering import can_show
from extract.datasets.places import Folder
from extract.images import UndecodableImageError, UnreadableFileError, decode_image, read_bytes
from headstart.prepare_commands import printable_line

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)

_MAX_WORDS = 15
"""Prompts with more words are counted together."""

_NUM_VALUES = 10
_NUM_SIZES = 5
_BAR = 40


@dataclass(frozen=True)
class Share:
    """How much there is of a split."""

    num_images: int
    num_prompts: int
    num_samples: int


@dataclass(frozen=True)
class SamplesStatistics:
    """Figures about some samples.

    Args:
        splits: by split.
        num_no_target: samples whose prompt names nothing in the image.
        num_without_mask: samples that nobody gave a mask.
        num_with_ignored: samples with pixels that nobody labelled.
        mask_share: share of the image that masks cover, at `QUANTILES`, of samples with a target; None for none.
        words: how many prompts have so many words, by number of words.
        tags: for each tag how many samples have each value, the most frequent first.
        image_sizes: how many images have each size (H, W), the most frequent first.
    """

    num_images: int
    num_prompts: int
    num_samples: int
    splits: dict[str, Share]
    num_no_target: int
    num_without_mask: int
    num_with_ignored: int
    mask_share: tuple[float, ...] | None
    words: dict[int, int]
    tags: dict[str, dict[str, int]]
    image_sizes: dict[tuple[int, int], int]
    num_classes: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON: quantiles by name, the first ten values of each tag, the five most frequent sizes."""
        found = asdict(self)
        quantiles = None if self.mask_share is None else dict(zip(map(str, QUANTILES), self.mask_share, strict=True))
        return found | {
            "no_target_share": self.num_no_target / self.num_samples,
            "mask_share": quantiles,
            "words": {str(number): count for number, count in self.words.items()},
            "tags": {
                name: {"num_values": len(counts), "first": dict(list(counts.items())[:_NUM_VALUES])}
                for name, counts in self.tags.items()
            },
            "image_sizes": {
                "num_sizes": len(self.image_sizes),
                "first": [
                    {"height": height, "width": width, "num_images": count}
                    for (height, width), count in list(self.image_sizes.items())[:_NUM_SIZES]
                ],
                "smallest": [*min(self.image_sizes, key=_area)],
                "largest": [*max(self.image_sizes, key=_area)],
            },
        }


def samples_statistics(samples: Samples, rows: NDArray[np.int64]) -> SamplesStatistics:
    """Figures about the samples in `rows`, of which there is one at least."""
    image_rows, prompt_rows = np.unique(samples.image_rows[rows]), np.unique(samples.prompt_rows[rows])
    listed = rows.tolist()
    sizes = Counter((height, width) for height, width in samples.images.sizes[image_rows].tolist())
    return SamplesStatistics(
        num_images=len(image_rows),
        num_prompts=len(prompt_rows),
        num_samples=len(rows),
        splits=_splits(samples, rows),
        num_no_target=int(samples.no_target[rows].sum()),
        num_without_mask=sum(not samples.targets[row] for row in listed),
        num_with_ignored=sum(bool(samples.ignored[row]) for row in listed) if samples.ignored else 0,
        mask_share=_mask_share(samples, [row for row in listed if samples.targets[row] and not samples.no_target[row]]),
        words=dict(sorted(Counter(len(samples.prompts[row].split()) for row in prompt_rows.tolist()).items())),
        tags={
            name: dict(Counter(value for row in listed if (value := values[row]) is not None).most_common())
            for name, values in samples.tags.items()
        },
        image_sizes=dict(sizes.most_common()),
        num_classes=len(samples.classes),
    )


def _splits(samples: Samples, rows: NDArray[np.int64]) -> dict[str, Share]:
    splits = np.array(samples.splits)[rows]
    shares = {}
    for split in dict.fromkeys(splits.tolist()):
        of_split = rows[splits == split]
        columns = (samples.image_rows, samples.prompt_rows)
        num_images, num_prompts = (len(np.unique(column[of_split])) for column in columns)
        shares[split] = Share(num_images, num_prompts, len(of_split))
    return shares


def _mask_share(samples: Samples, rows: Sequence[int]) -> tuple[float, ...] | None:
    if not rows:
        return None
    sizes = [samples.size_of(row) for row in rows]
    masks = [{"size": size, "counts": samples.targets[row]} for row, size in zip(rows, sizes, strict=True)]
    areas = [coco_mask.area(mask) for mask in masks]  # one by one: pycocotools 2.0.11 fails on more than 255
    shares = np.array(areas, np.float64) / np.prod(np.array(sizes, np.float64), axis=1)
    return tuple(np.quantile(shares, QUANTILES).tolist())


def statistics_text(statistics: SamplesStatistics) -> str:
    """The figures for people."""
    lines = [f"  {'split':14}{'images':>10}{'prompts':>10}{'samples':>10}"]
    lines += [
        f"  {printable_line(split):14}{share.num_images:>10}{share.num_prompts:>10}{share.num_samples:>10}"
        for split, share in statistics.splits.items()
    ]
    if len(statistics.splits) > 1:
        total = (statistics.num_images, statistics.num_prompts, statistics.num_samples)
        lines.append(f"  {'in all':14}" + "".join(f"{number:>10}" for number in total))
    lines += ["", *_mask_lines(statistics), *_size_lines(statistics), "", "words in a prompt", *_histogram(statistics)]
    for name, counts in statistics.tags.items():
        shown_name = printable_line(name)
        lines += ["", f"tag {shown_name}: {len(counts)} values" if len(counts) > 1 else f"tag {shown_name}: 1 value"]
        shown = list(counts.items())[:_NUM_VALUES]
        width = max((len(printable_line(value)) for value, _ in shown), default=0)
        lines += [f"  {printable_line(value):{width}} {count:>10}" for value, count in shown]
        if hidden := len(counts) - len(shown):
            lines.append(f"  and {hidden} more")
    return "\n".join(lines)


def _mask_lines(statistics: SamplesStatistics) -> list[str]:
    num, lines = statistics.num_samples, []
    if statistics.num_without_mask:
        lines.append(f"without a mask: {statistics.num_without_mask} samples")
    lines.append(f"no target: {statistics.num_no_target} samples ({statistics.num_no_target / num:.1%})")
    if statistics.num_with_ignored:
        lines.append(f"with pixels that nobody labelled: {statistics.num_with_ignored} samples")
    if statistics.mask_share is not None:
        named = {0.0: "least", 0.5: "median", 1.0: "most"}
        shares = [
            f"{named.get(quantile, f'p{100 * quantile:.0f}')} {_percent(share)}"
            for quantile, share in zip(QUANTILES, statistics.mask_share, strict=True)
        ]
        lines.append(f"share of the image that a mask covers: {', '.join(shares)}")
    return lines


def _size_lines(statistics: SamplesStatistics) -> list[str]:
    sizes = statistics.image_sizes
    shown = ", ".join(f"{size[0]} x {size[1]} ({count})" for size, count in list(sizes.items())[:_NUM_SIZES])
    hidden = f" and {len(sizes) - _NUM_SIZES} more" if len(sizes) > _NUM_SIZES else ""
    lines = [f"image sizes (height x width): {shown}{hidden}"]
    if len(sizes) > 1:
        smallest, largest = min(sizes, key=_area), max(sizes, key=_area)
        lines.append(f"smallest {smallest[0]} x {smallest[1]}, largest {largest[0]} x {largest[1]}")
    return lines


def _histogram(statistics: SamplesStatistics) -> list[str]:
    """A bar for each number of words; a prompt in a script without blanks is one word."""
    more = sum(count for number, count in statistics.words.items() if number > _MAX_WORDS)
    last = _MAX_WORDS if more else max(statistics.words)
    bars = {str(number): statistics.words.get(number, 0) for number in range(1, last + 1)}
    if more:
        bars[f"{_MAX_WORDS + 1}-{max(statistics.words)}"] = more
    most, width = max(bars.values()), max(map(len, bars))
    return [
        f"  {number:>{width}} {'#' * max(bool(count), round(_BAR * count / most)):{_BAR}} {count}"
        for number, count in bars.items()
    ]


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.01 else f"{100 * share:.2g}%"


def draw_rows(rows: NDArray[np.int64], num: int, seed: int) -> NDArray[np.int64]:
    """`num` of these rows in order, drawn without replacement; all of them where there are not more."""
    if num >= len(rows):
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, num, replace=False))


def make_card(store: SamplesStore, row: int, image_dir: Path | None) -> Card:
    """A sample as a card: with its image and its masks, or in words why there is no picture."""
    samples = store.samples
    tags = [f"{name} {values[row]}" for name, values in samples.tags.items() if values[row] is not None]
    lack = [] if samples.targets[row] else ["no mask"]
    note = ", ".join([*lack, samples.splits[row], *tags])
    prompt = samples.prompts[samples.prompt_rows[row]]
    image = _read_image(samples, row, image_dir)
    if isinstance(image, str):
        return Card(prompt, image, no_target=bool(samples.no_target[row]), note=note)
    return Card(
        prompt=prompt,
        image=image,
        truth=samples.target(row) if samples.targets[row] else None,
        ignored=samples.ignored_pixels(row),
        no_target=bool(samples.no_target[row]),
        note=note,
    ).fitted()


def _read_image(samples: Samples, row: int, image_dir: Path | None) -> NDArray[np.uint8] | str:
    path = samples.images.paths[samples.image_rows[row]]
    if image_dir is None:
        return f"{path}: the store does not say where its images lie"
    if path not in Folder(image_dir):
        return f"{path} does not lie inside the image folder"
    if not os.path.exists(image_dir / path):  # noqa: PTH110  also for names too long to be any
        return f"{path} is missing"
    try:
        image = decode_image(read_bytes(image_dir / path)[0])
    except (UndecodableImageError, UnreadableFileError) as error:
        return f"{path}: {error}"
    if image.shape[:2] != samples.size_of(row):
        return f"{path} has another size than when the store was written"
    return image


def sheet_remarks(cards: Sequence[Card], image_dir: Path | None) -> list[str]:
    """What is not as it should be on a sheet of these cards, each with its remedy."""
    remarks = []
    if lacking := [card.image for card in cards if isinstance(card.image, str)]:
        where = "" if image_dir is None else f" in {image_dir}"
        remarks.append(
            f"{len(lacking)} of {len(cards)} images{where} cannot be shown: {lacking[0]}. If they were moved, name "
            "their folder with --image-dir."
        )
    if boxes := sum(not can_show(card.prompt) for card in cards):
        remarks.append(
            f"{boxes} prompts have letters that no font of this machine can show; they are drawn as empty boxes. "
            "Install a font of their script, such as one of the Noto family."
        )
    return remarks
