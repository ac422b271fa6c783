"""Which settings a sweep tries: lists of values and ranges as they are typed, every combination or a random draw."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from cache_schema.errors import UsageError

RangeKind = Literal["log", "uniform", "int"]
_RANGE_FORMS = "log:LOW:HIGH, uniform:LOW:HIGH or int:LOW:HIGH"
_NOT_JSON = {"True": "true", "False": "false", "None": "null"}
_DIGITS = 4
"""Drawn numbers are rounded to so many significant digits, so that they can be read and typed."""


@dataclass(frozen=True)
class Choice:
    """A list of two or more values."""

    values: tuple[Any, ...]

    def draw(self, rng: random.Random) -> Any:
        return rng.choice(self.values)


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`: log (uniform in their logarithm), uniform, or int (whole, both ends included)."""

    kind: RangeKind
    low: float
    high: float

    def draw(self, rng: random.Random) -> float:
        if self.kind == "int":
            return rng.randint(int(self.low), int(self.high))
        if self.kind == "log":
            drawn = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        else:
            drawn = rng.uniform(self.low, self.high)
        return min(max(float(f"{drawn:.{_DIGITS}g}"), self.low), self.high)


Space = Mapping[str, Choice | Range]
"""What is tried of each setting, by its name."""

Settings = dict[str, Any]
"""One value of each setting."""


@dataclass(frozen=True)
class SweepConfig:
    """What to try.

    Args:
        space: the settings that vary.
        fixed: settings that replace the recipe's in every run.
        num_random: how many combinations to draw; None for all there are.
        random_seed: decides which are drawn.
        num_seeds: runs of each combination; their seeds count up from the recipe's.
    """

    recipe: str
    space: Space
    fixed: Mapping[str, Any] = field(default_factory=dict)
    num_random: int | None = None
    random_seed: int = 0
    num_seeds: int = 1

    def __post_init__(self) -> None:
        if self.num_seeds < 1:
            raise UsageError(f"--seeds is {self.num_seeds}: give a whole number of at least 1.")
        if "seed" in self.space:
            raise UsageError("seed is no setting to choose the best of: give --seeds N, which averages over them.")
        if both := [key for key in self.space if key in self.fixed]:
            raise UsageError(f"{', '.join(both)}: named by --over and by --set; leave it out of one.")

    def combinations(self) -> list[Settings]:
        """Every combination of settings, or as many of them as are to be drawn."""
        return grid(self.space) if self.num_random is None else sample(self.space, self.num_random, self.random_seed)

    def to_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "over": {
                key: dataclasses.asdict(values) if isinstance(values, Range) else list(values.values)
                for key, values in self.space.items()
            },
            "set": dict(self.fixed),
            "random": self.num_random,
            "random_seed": self.random_seed,
            "seeds": self.num_seeds,
        }


def parse_space(texts: Sequence[str]) -> Space:
    """Settings as they are typed: `key=` and values between commas, one JSON list of values, or a range.

    A value is JSON where it can be, else text. Values that hold brackets, braces or quotes must be JSON throughout.

    Raises:
        UsageError: a text can be read in no way, or in more than one.

    >>> parse_space(['loss={"bce": 1},{"bce": 1, "dice": 1}', "target_size=[[48, 48], [96, 96]]"])["target_size"]
    Choice(values=([48, 48], [96, 96]))
    >>> parse_space(["schedule=cosine,linear", "learning_rate=log:1e-5:1e-2"])["learning_rate"]
    Range(kind='log', low=1e-05, high=0.01)
    """
    space: dict[str, Choice | Range] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"{text!r} is nothing to try: write key=value,value,... such as learning_rate=1e-4,1e-3.")
        if key in space:
            raise UsageError(f"{key} is there twice; write all its values in one list.")
        kind, colon, bounds = values.partition(":")
        if colon and kind in ("log", "uniform", "int"):
            space[key] = _parse_range(kind, bounds, text)  # type: ignore[arg-type]
        else:
            space[key] = _parse_choice(values, text)
    if not space:
        raise UsageError("there is nothing to try: name settings with --over, such as --over learning_rate=1e-4,1e-3.")
    return space


def grid(space: Space) -> list[Settings]:
    """Every combination; the last setting changes fastest.

    Raises:
        UsageError: there is a range, which has no end of values.
    """
    choices: list[tuple[Any, ...]] = []
    for key, values in space.items():
        if isinstance(values, Range):
            raise UsageError(f"{key} is a range: give --random N to draw from it, or list its values.")
        choices.append(values.values)
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*choices)]


def sample(space: Space, num: int, seed: int) -> list[Settings]:
    """So many different combinations at random. Those of a smaller `num` are the first ones of a larger.

    Raises:
        UsageError: there are not so many.
    """
    if num < 1:
        raise UsageError(f"--random is {num}: give a whole number of at least 1.")
    rng = random.Random(seed)  # noqa: S311  draws settings, not secrets
    drawn: dict[str, Settings] = {}
    for _ in range(1000 + 100 * num):
        settings = {key: values.draw(rng) for key, values in space.items()}
        drawn.setdefault(show(settings), settings)
        if len(drawn) == num:
            return list(drawn.values())
    raise UsageError(f"{num} different combinations cannot be drawn, only {len(drawn)}: give --random {len(drawn)}.")


def show(settings: Mapping[str, Any]) -> str:
    """Settings as they are typed behind --set, between commas.

    >>> show({"depth": 2, "loss": {"bce": 1}, "schedule": "cosine"})
    'depth=2, loss={"bce": 1}, schedule=cosine'
    """
    return ", ".join(f"{key}={show_value(value)}" for key, value in settings.items())


def show_value(value: Any) -> str:
    """A value as it is typed: JSON, and text without quotes where nothing else can be meant.

    >>> [show_value(value) for value in ("cosine", "3", None, [64, 64])]
    ['cosine', '"3"', 'null', '[64, 64]']
    """
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            return value
    return json.dumps(value, ensure_ascii=False)


def _parse_choice(text: str, whole: str) -> Choice:
    listed = _parse_json(text, whole)
    if not isinstance(listed, list):
        listed = _parse_json(f"[{text}]", whole)
    if listed is None:
        listed = _parse_words(text, whole)
    values = tuple({json.dumps(value, sort_keys=True): value for value in listed}.values())
    if len(values) < 2:
        raise UsageError(f"{whole!r} gives one value to try; write several between commas, or one behind --set.")
    return Choice(values)


def _parse_words(text: str, whole: str) -> list[Any]:
    """Values between commas of which some are no JSON, and are words."""
    if set(text) & set("[]{}\"'"):
        raise UsageError(f"{whole!r} is not JSON: write lists, objects and quoted text as JSON, between commas.")
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not word:
            raise UsageError(f"{whole!r} has a value that is empty; leave the comma out.")
        if word in _NOT_JSON:
            raise UsageError(f"{whole!r} has {word}, which could be text: write {_NOT_JSON[word]}.")
    return [word if (value := _parse_json(f"[{word}]", whole)) is None else value[0] for word in words]


def _parse_json(text: str, whole: str) -> Any:
    """A JSON value; None if it is none, or null."""

    def refuse(constant: str) -> NoReturn:
        raise UsageError(f"{whole!r} has {constant}, which no setting can be; leave it out.")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise UsageError(f"{whole!r} has an object with one key twice; leave one out.")
        return dict(pairs)

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except UsageError:
        raise
    except (ValueError, RecursionError):
        return None


def _parse_range(kind: RangeKind, bounds: str, whole: str) -> Range:
    try:
        low, high = (int(bound) if kind == "int" else float(bound) for bound in bounds.split(":"))
    except ValueError as error:
        raise UsageError(f"{whole!r} is no range: write {_RANGE_FORMS}.") from error
    if not (-math.inf < low < high < math.inf) or (kind == "log" and low <= 0):
        above = " above 0" if kind == "log" else ""
        raise UsageError(f"{whole!r} is no range: LOW must be a number{above} and below HIGH.")
    return Range(kind, low, high)
