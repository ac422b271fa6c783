"""What the pages share: how they are made, and how they write names and numbers.

Names are data: templates escape them. Knows nothing about what a page shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

NO_NUMBER = "\N{EN DASH}"
"""What stands where a number does not apply."""


def render_page(template: str, values: Mapping[str, Any]) -> str:
    """One self-contained HTML page, readable offline. Equal values give the same text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["words"] = words
    return environment.get_template(template).render(values)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, each named by its path; a list is one leaf.

    >>> list(flatten({"store": {"images": "f00", "layers": [3, 9]}}))
    [('store · images', 'f00'), ('store · layers', '3, 9')]
    """
    for key, value in tree.items():
        name = f"{prefix} · {key}" if prefix else str(key)
        if isinstance(value, Mapping):
            yield from flatten(value, name)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield name, ", ".join(map(str, value))
        else:
            yield name, value


def words(name: str) -> str:
    """A name of the code as people read it."""
    return name.replace("_", " ")


def capital(text: str) -> str:
    """The text with a capital at its beginning, where `str.capitalize` would make small letters of the rest."""
    return text[:1].upper() + text[1:]


def short(value: float | int) -> str:
    """A number of any size in a few letters.

    >>> short(0.05), short(769), short(1500), short(1378817), short(2.5e9)
    ('0.05', '769', '1.5 k', '1.38 M', '2.5 G')
    """
    for unit, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"
