"""What can be said of a scene: prompts that mean exactly one set of objects, or certainly none.

Every prompt is unambiguous by construction: a comparison counts only where it holds with a margin, and is not made at
all where any object comes near the border of it. Knows nothing about drawing or files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from itertools import product

import numpy as np

from extract.datasets.scene_objects import Scene, SceneObject

KINDS = {"attribute": 0.35, "superlative": 0.15, "relation": 0.2, "multi": 0.2, "none": 0.1}
"""The kinds of prompt, and the share of each where the scene allows it."""

MIN_OFFSET = 0.12
"""How far apart two centres must be along an axis for "left of" or "leftmost", as a share of the image's short side."""

MIN_RATIO = 1.2
"""How many times larger than the next an object must be for "largest"; "smallest" likewise."""

_DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
_EXTREMES = {"leftmost": (-1, 0), "rightmost": (1, 0), "topmost": (0, -1), "bottommost": (0, 1)}
_BOTH_FORMS_SHARE = 0.15
_SECOND_FORM_SHARE = 0.25
_ATTRIBUTES = ("size", "texture", "colour", "shape")


@dataclass(frozen=True, slots=True)
class Description:
    """Some attributes of an object, in the order in which they are said. None means that the attribute is left open."""

    size: str | None = None
    texture: str | None = None
    colour: str | None = None
    shape: str | None = None

    @property
    def count(self) -> int:
        """How many attributes are said."""
        return sum(value is not None for value in astuple(self))

    def words(self, plural: bool = False) -> str:
        """The noun phrase without article.

        >>> Description(size="small", shape="cross").words(plural=True)
        'small crosses'
        """
        noun = self.shape or "shape"
        if plural:
            noun += "es" if noun.endswith("s") else "s"
        return " ".join(word for word in (self.size, self.texture, self.colour, noun) if word)

    def without_each(self) -> list[Description]:
        """The descriptions that say one attribute less."""
        return [replace(self, **{name: None}) for name in _ATTRIBUTES if getattr(self, name) is not None]


@dataclass(frozen=True, slots=True)
class Expression:
    """One meaning: its kind, its surface forms, and the indices of the objects it means (none: it is absent)."""

    kind: str
    forms: tuple[str, ...]
    members: tuple[int, ...]


Groups = dict[Description, tuple[int, ...]]
"""Every description that fits something in the scene, with the indices of all objects it fits."""

Weighted = tuple[float, Expression]


def express(scene: Scene, num_prompts: int, rng: np.random.Generator) -> list[Expression]:
    """Up to `num_prompts` different prompts (fewer where there is no more to say), as expressions with 1 or 2 forms.

    Kinds are drawn by their shares among those of which something is left.
    """
    groups = _group(scene.objects)
    speakers = {
        "attribute": _attributes(groups),
        "superlative": _superlatives(scene, groups),
        "relation": _relations(scene, groups),
        "multi": _multis(groups),
        "none": _nones(groups),
    }
    pools = {kind: _shuffle(list(speaker), rng) for kind, speaker in speakers.items()}
    chosen: list[Expression] = []
    said: set[str] = set()
    while len(said) < num_prompts and any(pools.values()):
        kinds = [kind for kind in KINDS if pools[kind]]
        shares = np.array([KINDS[kind] for kind in kinds])
        expression = pools[kinds[rng.choice(len(kinds), p=shares / shares.sum())]].pop()
        forms = _choose_forms(expression.forms, rng)[: num_prompts - len(said)]
        if said.isdisjoint(forms):
            said.update(forms)
            chosen.append(replace(expression, forms=forms))
    return chosen


def _choose_forms(forms: tuple[str, ...], rng: np.random.Generator) -> tuple[str, ...]:
    draw = rng.random()
    if draw < _BOTH_FORMS_SHARE:
        return forms
    return forms[-1:] if draw < _BOTH_FORMS_SHARE + _SECOND_FORM_SHARE else forms[:1]


def _shuffle(weighted: list[Weighted], rng: np.random.Generator) -> list[Expression]:
    """A random order in which the heavier tend to be last, where they are popped first: exponential clocks race."""
    clocks = rng.exponential(size=len(weighted)) / np.array([weight for weight, _ in weighted])
    return [weighted[index][1] for index in np.argsort(-clocks)]


def _group(objects: tuple[SceneObject, ...]) -> Groups:
    groups: dict[Description, list[int]] = {}
    for index, item in enumerate(objects):
        for said in product((False, True), repeat=len(_ATTRIBUTES)):
            values = [getattr(item, name) if use else None for name, use in zip(_ATTRIBUTES, said, strict=True)]
            groups.setdefault(Description(*values), []).append(index)
    return {description: tuple(members) for description, members in groups.items()}


def _attributes(groups: Groups) -> Iterator[Weighted]:
    """ "the small red circle": exactly one object fits. Two or three attributes are what people mostly say."""
    weights = {0: 0.5, 1: 0.5, 2: 1.0, 3: 1.0, 4: 0.3}
    for description, members in groups.items():
        if len(members) == 1:
            yield weights[description.count], Expression("attribute", _definite(description.words()), members)


def _says_no_more_than_it_must(description: Description, groups: Groups) -> bool:
    """Whether a description that fits one object would fit more with any attribute less."""
    return all(len(groups[shorter]) > 1 for shorter in description.without_each())


def _multis(groups: Groups) -> Iterator[Weighted]:
    """ "all green shapes": at least two objects."""
    for description, members in groups.items():
        if len(members) > 1 and 1 <= description.count <= 3:
            words = description.words(plural=True)
            forms = (f"all {words}", f"the {words}")
            yield (0.3 if description.count == 3 else 1.0), Expression("multi", forms, members)


def _nones(groups: Groups) -> Iterator[Weighted]:
    """An object that is not there, though with any one attribute less it would be."""
    present = [sorted({value for d in groups if (value := getattr(d, name)) is not None}) for name in _ATTRIBUTES]
    for values in product(*([None, *names] for names in present)):
        description = Description(*values)
        absent = description not in groups and all(shorter in groups for shorter in description.without_each())
        if absent and description.count <= 3:
            weight = 1.0 if description.shape else 0.4
            yield weight, Expression("none", _definite(description.words()), ())


def _superlatives(scene: Scene, groups: Groups) -> Iterator[Weighted]:
    """ "the leftmost square": first of at least two, with a margin by centre or extent, and by what is visible too."""
    objects, margin = scene.objects, MIN_OFFSET * min(scene.size)
    for description, members in groups.items():
        if len(members) < 2 or description.count > 2:
            continue
        weight = {0: 2.0, 1: 1.0, 2: 0.7}[description.count]
        ranked = {
            word: _clear_first(
                {i: _project(objects[i].centre, axis) for i in members},
                {i: _far_edge(objects[i], axis) for i in members},
                margin,
            )
            for word, axis in _EXTREMES.items()
        }
        if description.size is None:
            sizes = {i: float(np.log(objects[i].half_extent)) for i in members}
            areas = {i: float(objects[i].visible_area) for i in members}
            ranked["largest"] = _clear_first(sizes, areas, float(np.log(MIN_RATIO)))
            ranked["smallest"] = _clear_first(_negated(sizes), _negated(areas), float(np.log(MIN_RATIO)))
        for word, first in ranked.items():
            if first is not None:
                yield weight, Expression("superlative", _definite(f"{word} {description.words()}"), (first,))


def _clear_first(values: dict[int, float], second_opinion: dict[int, float], margin: float) -> int | None:
    """The key whose value leads by `margin` at least, if the second opinion ranks it first too."""
    *_, runner_up, first = sorted(values, key=values.__getitem__)
    leads = values[first] - values[runner_up] >= margin
    agreed = all(second_opinion[first] > value for key, value in second_opinion.items() if key != first)
    return first if leads and agreed else None


def _negated(values: dict[int, float]) -> dict[int, float]:
    return {key: -value for key, value in values.items()}


def _project(point: tuple[float, float], axis: tuple[int, int]) -> float:
    return point[0] * axis[0] + point[1] * axis[1]


def _far_edge(item: SceneObject, axis: tuple[int, int]) -> float:
    """How far the visible part reaches along an axis, in pixels."""
    x0, y0, x1, y1 = item.box
    return max(_project((x0, y0), axis), _project((x1, y1), axis))


def _relations(scene: Scene, groups: Groups) -> Iterator[Weighted]:
    """ "the circle left of the blue square": one of the class is there, and every other clearly on the other side.

    The anchor itself does not count. Where the class has but one member, the words say nothing new and weigh little.
    """
    margin = MIN_OFFSET * min(scene.size)
    classes = [(d, set(members)) for d, members in groups.items() if d.count <= 1 or (d.count == 2 and d.shape)]
    anchors = [
        (d, *members) for d, members in groups.items() if len(members) == 1 and _says_no_more_than_it_must(d, groups)
    ]
    for (anchor_said, anchor), (word, axis) in product(anchors, _DIRECTIONS.items()):
        origin = _project(scene.objects[anchor].centre, axis)
        offsets = {i: _project(item.centre, axis) - origin for i, item in enumerate(scene.objects) if i != anchor}
        for said, members in classes:
            others = members - {anchor}
            there = [i for i in others if offsets[i] >= margin]
            if len(there) != 1 or any(abs(offsets[i]) < margin for i in others):
                continue
            weight = (2.0 if len(others) > 1 else 0.005) * (1.0 if said.shape or not said.count else 0.4)
            phrase = f"the {said.words()} {word} the {anchor_said.words()}"
            forms = (phrase, phrase.replace(f" {word} ", f" to the {word} ")) if word.endswith(" of") else (phrase,)
            yield weight, Expression("relation", forms, (there[0],))


def _definite(words: str) -> tuple[str, ...]:
    return f"the {words}", words
