"""Which samples a report shows in pictures: the best, the median and the worst, and images with several prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from cache_schema.errors import UsageError
from cache_schema.samples import SamplesStore
from evaluate.metrics import SampleScores
from evaluate.predictor import open_image
from evaluate.report_inputs import Example, Group, PromptMasks, SeveralPrompts

Predict = Callable[[Int64[np.ndarray, " T"]], Mapping[int, Bool[np.ndarray, "h w"]]]
"""Gives the predicted masks of some samples, (H, W) at original size, by their rows in the samples store."""

_EXAMPLES_OF_GROUP = 4
_SEVERAL_IMAGES, _SEVERAL_PROMPTS = 3, 6


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """The scores of S samples, and which rows of a samples store they are."""

    rows: Int64[np.ndarray, " S"]
    scores: SampleScores


def make_examples(store: SamplesStore, scored: Scored, predict: Predict) -> list[Example]:
    """Best, median and worst samples with a target, each of another image; not those whose picture is gone."""
    chosen = list(_choose(store, scored))
    masks = predict(scored.rows[[place for place, _ in chosen]])
    examples, samples = [], store.samples
    for place, group in chosen:
        row = int(scored.rows[place])
        image = open_image_of(store, row)
        if image is not None:
            examples.append(
                Example(
                    image=image,
                    truth=samples.target(row),
                    predicted=masks[row],
                    prompt=samples.prompts[samples.prompt_rows[row]],
                    iou=float(scored.scores.iou[place]),
                    group=group,
                    tags={name: values[row] for name, values in samples.tags.items()},
                )
            )
    return examples


def make_several(store: SamplesStore, scored: Scored, predict: Predict) -> list[SeveralPrompts]:
    """The images with the most prompts, the first of them where they are equal; those with one prompt are no such."""
    images = store.samples.image_rows[scored.rows]
    numbered, counts = np.unique(images, return_counts=True)
    most = numbered[np.argsort(-counts, kind="stable")][: min(_SEVERAL_IMAGES, np.count_nonzero(counts > 1))]
    places = [np.flatnonzero(images == image)[:_SEVERAL_PROMPTS] for image in most]
    masks = predict(scored.rows[np.concatenate([np.empty(0, np.int64), *places])])
    return [found for of_image in places if (found := _several(store, scored, of_image.tolist(), masks)) is not None]


def open_image_of(store: SamplesStore, row: int) -> UInt8[np.ndarray, "h w 3"] | None:
    """The picture of a sample; None if it is no longer there, or can no longer be read."""
    samples = store.samples
    path = None if store.image_dir is None else store.image_dir / samples.images.paths[samples.image_rows[row]]
    try:
        return None if path is None else open_image(path)
    except UsageError:
        return None


def _several(
    store: SamplesStore, scored: Scored, places: Sequence[int], masks: Mapping[int, Bool[np.ndarray, "h w"]]
) -> SeveralPrompts | None:
    samples = store.samples
    image = open_image_of(store, int(scored.rows[places[0]]))
    if image is None:
        return None
    prompts = []
    for place in places:
        row = int(scored.rows[place])
        prompt, iou = samples.prompts[samples.prompt_rows[row]], float(scored.scores.iou[place])
        prompts.append(PromptMasks(prompt, samples.target(row), masks[row], iou))
    return SeveralPrompts(image, prompts)


def _choose(store: SamplesStore, scored: Scored) -> Iterator[tuple[int, Group]]:
    order = np.argsort(scored.scores.iou, kind="stable")
    order = order[~scored.scores.no_target[order]]
    middle = len(order) // 2
    from_median = order[np.argsort(np.abs(np.arange(len(order)) - middle), kind="stable")]
    seen: set[int] = set()
    groups: list[tuple[Group, Int64[np.ndarray, " T"]]] = [
        ("best", order[::-1]),
        ("worst", order),
        ("median", from_median),
    ]
    for group, candidates in groups:
        taken = 0
        for place in candidates.tolist():
            image = int(store.samples.image_rows[scored.rows[place]])
            if image not in seen and taken < _EXAMPLES_OF_GROUP:
                seen.add(image)
                taken += 1
                yield place, group
