"""Encode every image and prompt once; train text-prompted segmentation heads on the cached features in minutes.

cache = headstart.open_cache("demo/stores")
run = headstart.train("cross_attention", cache, "demo/runs")
results = headstart.evaluate(run, cache)["runs"][0]["metrics"]
mask = headstart.load(run).set_image("photo.jpg").predict("the red circle")[0].mask
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headstart.api import compare, evaluate, finetune, load, open_cache, train, train_heads

__all__ = ["compare", "evaluate", "finetune", "load", "open_cache", "train", "train_heads"]


def __getattr__(name: str) -> Any:
    """Import the API when it is first used, so that the command line answers `--help` at once."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from headstart import api

    return getattr(api, name)
