"""From a cache to trained heads. Knows nothing of images, encoders or datasets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from cache_schema.errors import UsageError, unknown_name
from heads.cross_attention import build_cross_attention
from heads.inputs import FeatureShapes, Head
from heads.linear import build_linear

HEADS: dict[str, Callable[..., Head]] = {
    "linear": build_linear,
    "cross_attention": build_cross_attention,
}
"""Every head by name. A builder takes `FeatureShapes` and plain keyword arguments."""


def head_arguments(name: str) -> set[str]:
    """Names of the keyword arguments that a head's builder takes."""
    return set(inspect.signature(HEADS[name]).parameters) - {"shapes"}


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
