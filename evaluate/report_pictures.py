"""The pictures of a report: examples of each head, and images with several prompts each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from evaluate.pages import Panel, cut, fit_panels, number
from evaluate.pictures import triptych
from evaluate.report_inputs import Example, Group, RunReport, SeveralPrompts

_GROUPS: tuple[Group, ...] = ("best", "median", "worst")
_TAG_LETTERS = 120


@dataclass(frozen=True, slots=True)
class ShownExample:
    """One sample: what was asked, what came of it, and its pictures."""

    prompt: str
    iou: str
    tags: list[tuple[str, str]]
    panels: list[Panel]


@dataclass(frozen=True, slots=True)
class ShownImage:
    """One image, and what is marked in it for each prompt."""

    image: Panel
    prompts: list[ShownExample]


@dataclass(frozen=True, slots=True)
class ShownRun:
    """The pictures of one head: examples by group, and images with several prompts."""

    head: str
    groups: list[tuple[Group, list[ShownExample]]]
    several: list[ShownImage]

    @property
    def panels(self) -> Iterator[Panel]:
        for _, examples in self.groups:
            for example in examples:
                yield from example.panels
        for shown in self.several:
            yield shown.image
            for prompt in shown.prompts:
                yield from prompt.panels


def show_pictures(runs: Sequence[RunReport]) -> list[ShownRun]:
    """The pictures of each head, as small as it takes to keep the page light.

    Raises:
        UsageError: there are too many.
    """
    return fit_panels(
        lambda side_px: [_show_run(run, side_px) for run in runs],
        lambda shown: [panel for run in shown for panel in run.panels],
    )


def _show_run(run: RunReport, side_px: int) -> ShownRun:
    groups = [
        (group, [_show_example(example, side_px) for example in run.examples if example.group == group])
        for group in _GROUPS
    ]
    return ShownRun(run.head, groups, [_show_image(several, side_px) for several in run.several if several.prompts])


def _show_example(example: Example, side_px: int) -> ShownExample:
    pictures = triptych(example.image, example.truth, example.predicted, side_px)
    return ShownExample(
        prompt=example.prompt,
        iou=number(example.iou, 2),
        tags=[
            (cut(tag, _TAG_LETTERS), cut(value, _TAG_LETTERS))
            for tag, value in example.tags.items()
            if value is not None
        ],
        panels=[
            Panel.of_image(pictures.image, example.truth.shape),
            Panel.of_mask(pictures.truth, "Truth", example.truth),
            Panel.of_mask(pictures.predicted, "Prediction", example.predicted),
        ],
    )


def _show_image(several: SeveralPrompts, side_px: int) -> ShownImage:
    """`several` has a prompt at least."""
    prompts = []
    for asked in several.prompts:
        pictures = triptych(several.image, asked.truth, asked.predicted, side_px)
        panels = [
            Panel.of_mask(pictures.truth, "Truth", asked.truth),
            Panel.of_mask(pictures.predicted, "Prediction", asked.predicted),
        ]
        prompts.append(ShownExample(asked.prompt, number(asked.iou, 2), [], panels))
    return ShownImage(Panel.of_image(pictures.image, several.image.shape[:2]), prompts)
