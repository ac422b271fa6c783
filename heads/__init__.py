"""From a cache to trained heads. Knows nothing of images, encoders or datasets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from cache_schema.errors import UsageError, unknown_name
from heads.bidirectional import build_bidirectional
from heads.clipseg import build_clipseg
from heads.cross_attention import build_cross_attention
from heads.film import build_film
from heads.inputs import FeatureShapes, Head
from heads.linear import build_linear
from heads.talk2dino import build_talk2dino
from heads.two_way import build_two_way

HEADS: dict[str, Callable[..., Head]] = {
    "linear": build_linear,
    "cross_attention": build_cross_attention,
    "film": build_film,
    "clipseg": build_clipseg,
    "two_way": build_two_way,
    "bidirectional": build_bidirectional,
    "talk2dino": build_talk2dino,
}
"""Every head by name. A builder takes `FeatureShapes` and plain keyword arguments."""


def head_arguments(name: str) -> set[str]:
    """Names of the keyword arguments that a head's builder takes."""
    return set(inspect.signature(HEADS[name]).parameters) - {"shapes"}


def plain_arguments(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a head with whole numbers as floats where it takes floats: 10 and 10.0 make one and the same run."""
    parameters = inspect.signature(HEADS[name]).parameters
    return {
        key: float(value) if type(value) is int and str(parameters[key].annotation).startswith("float") else value
        for key, value in arguments.items()
    }


def build_head(name: str, shapes: FeatureShapes, arguments: Mapping[str, Any]) -> Head:
    """Build a head by name.

    Raises:
        UsageError: the head is unknown, or does not take these arguments.
    """
    if name not in HEADS:
        raise unknown_name("head", name, HEADS)
    try:
        return HEADS[name](shapes, **arguments)
    except UsageError:
        raise
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise UsageError(f"head {name!r} cannot be built with {dict(arguments)}: {error}.") from error
