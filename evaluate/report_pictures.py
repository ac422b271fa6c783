"""The pictures of a report: examples of each head, and images with several prompts each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from evaluate.pages import SMALLEST_SIDE_PX, Panel, cut, fit_panels, num_fitting, number
from evaluate.pictures import triptych
from evaluate.report_inputs import Example, Group, RunReport, SeveralPrompts

_GROUPS: tuple[Group, ...] = ("best", "median", "worst")
_FEWER_EXAMPLES = (2, 1)
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


def show_pictures(runs: Sequence[RunReport]) -> tuple[list[ShownRun], list[str]]:
    """The pictures of each head, as small as it takes to keep the page light, and sentences on what had no room.

    Where the smallest are too many there are fewer: of each group of examples, then no images with several prompts,
    then those of the first heads only.
    """
    kept, sentences = _keep_what_fits(runs)
    shown = fit_panels(
        lambda side_px: [_show_run(run, side_px) for run in kept],
        lambda shown: [panel for run in shown for panel in run.panels],
    )
    return shown, sentences


def _keep_what_fits(runs: Sequence[RunReport]) -> tuple[list[RunReport], list[str]]:
    counts = (Counter(example.group for example in run.examples) for run in runs)
    most = max((count for of_run in counts for count in of_run.values()), default=0)
    fewer, left_out = [most, *(num for num in _FEWER_EXAMPLES if num < most)], list[str]()
    choices = [(num, True) for num in fewer]
    if any(run.several for run in runs):
        choices.append((fewer[-1], False))
    for num_examples, with_several in choices:
        kept = [
            replace(run, examples=_first(run.examples, num_examples), several=run.several if with_several else ())
            for run in runs
        ]
        num_heads = num_fitting(_show_run(run, SMALLEST_SIDE_PX).panels for run in kept)
        if num_heads == len(runs):
            break
    if num_examples < most:
        left_out.append(f"more than {num_examples} of the best, median and worst examples of a head")
    if not with_several:
        left_out.append("images with several prompts")
    if num_heads < len(runs):
        left_out.append(f"pictures of heads after the first {num_heads} of {len(runs)}")
    if not left_out:
        return kept, []
    return kept[:num_heads], [f"To stay light, this page leaves out {'; '.join(left_out)}. Fewer runs show more."]


def _first(examples: Sequence[Example], num: int) -> list[Example]:
    """So many of each group."""
    return [example for group in _GROUPS for example in [one for one in examples if one.group == group][:num]]


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
