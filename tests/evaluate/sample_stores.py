"""Samples of a few small images, made from masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cache_schema.masks import encode_mask
from cache_schema.samples import ImageTable, Samples

SIZE = (10, 10)


@dataclass(frozen=True)
class Made:
    """One sample: the image it is of, its prompt, the rows of pixels from first to last that are its target."""

    image: str
    prompt: str
    target: tuple[int, int] = (0, 0)
    tags: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[int, int] | None = None


def pixels(first: int, last: int) -> NDArray[np.bool_]:
    """A mask of SIZE whose pixels from first to last, counted row by row, are marked."""
    mask = np.zeros(SIZE, np.bool_)
    mask.flat[first:last] = True
    return mask


def make_samples(made: Sequence[Made], classes: Sequence[str] = ()) -> Samples:
    """Samples in that order; one whose target has no pixel has no target."""
    images = list(dict.fromkeys(one.image for one in made))
    prompts = list(dict.fromkeys(one.prompt for one in made))
    table = ImageTable(
        images, [f"{name}.png" for name in images], np.full((len(images), 2), SIZE, np.int32), ["0" * 64] * len(images)
    )
    names = sorted({name for one in made for name in one.tags})
    return Samples(
        images=table,
        prompts=prompts,
        ids=[f"sample {place}" for place in range(len(made))],
        image_rows=np.array([images.index(one.image) for one in made], np.int32),
        prompt_rows=np.array([prompts.index(one.prompt) for one in made], np.int32),
        targets=[encode_mask(pixels(*one.target)) for one in made],
        no_target=np.array([one.target[0] == one.target[1] for one in made]),
        splits=["val"] * len(made),
        tags={name: [one.tags.get(name) for one in made] for name in names},
        ignored=[b"" if one.ignored is None else encode_mask(pixels(*one.ignored)) for one in made]
        if any(one.ignored for one in made)
        else (),
        classes=classes,
    )
