"""The commands that score trained heads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from cache_schema.errors import UsageError
from headstart.command import Command, Json, Place


@dataclass(frozen=True)
class Evaluate:
    """Score trained heads at the images' original sizes, and leave results.json and report.html.

    Example: headstart evaluate runs/* --split test --out report
    """

    runs: Positional[tuple[Path, ...]]
    """Run folders, as `headstart train` printed them."""
    split: str = "val"
    """Which split to score."""
    out: Path | None = None
    """Folder for results.json and report.html; by default the first run's."""
    stores: Place | None = None
    """Folder with one store of each kind, if not the stores the first run was trained on."""
    samples: Place | None = None
    """The samples store, where that folder holds several."""
    images: Place | None = None
    """The image-feature store, where that folder holds several."""
    prompts: Place | None = None
    """The prompt-feature store, where that folder holds several."""
    json: Json = False

    def run(self) -> Any:
        from headstart import api, tables

        if not self.runs:
            raise UsageError("there is no run to evaluate; name the run folders that `headstart train` printed.")
        named = {"samples": self.samples, "images": self.images, "prompts": self.prompts}
        if self.stores is None and any(named.values()):
            raise UsageError(
                "--samples, --images and --prompts choose among the stores of a folder; name it with --stores."
            )
        cache = api.open_cache(self.stores, **named) if self.stores else None
        results = api.evaluate(list(self.runs), cache, split=self.split, out=self.out)
        print(tables.results_table(results))
        print(f"report: {(self.out or self.runs[0]) / 'report.html'}")
        return results


EVALUATE_COMMANDS: dict[str, type[Command]] = {"evaluate": Evaluate}
