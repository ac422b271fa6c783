"""The commands that score trained heads, and compare two of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from cache_schema.errors import UsageError
from headstart.command import Command, Json, Place

PROTOCOL_NAMES = tuple("original-size original-size-inclusive resized-224 resized-480 resized-512 gref".split())
"""The names in evaluate.protocols.PROTOCOLS, which is slow to import where only --help is asked for."""


@dataclass(frozen=True)
class Evaluate:
    """Score trained heads, and leave results.json, samples.csv (a line for each sample) and report.html.

    Several processes share the work: accelerate launch -m headstart.cli evaluate ...

    Example: headstart evaluate runs/* --split test --protocol gref --out report
    """

    runs: Positional[tuple[Path, ...]]
    """Run folders, as `headstart train` printed them."""
    split: str = "val"
    """Which split to score."""
    protocol: str = PROTOCOL_NAMES[0]
    """How masks are made and compared: original-size (the default), original-size-inclusive (a probability of exactly
    0.5 is marked), resized-224, resized-480, resized-512 (on a square grid), gref (the metrics of gRefCOCO first)."""
    out: Path | None = None
    """Folder for what is written; by default the run's, or report where there are several runs or other stores than
    those it was trained on."""
    coco_results: Path | None = None
    """Also write the masks of the only run as COCO results to this .json file, and the truths beside it."""
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
        from headstart.stores import stores_of_run

        if not self.runs:
            raise UsageError("there is no run to evaluate; name the run folders that `headstart train` printed.")
        named = {"samples": self.samples, "images": self.images, "prompts": self.prompts}
        if self.stores is None and any(named.values()):
            raise UsageError(
                "--samples, --images and --prompts choose among the stores of a folder; name it with --stores."
            )
        cache = stores_of_run(self.runs[0]).open() if self.stores is None else api.open_cache(self.stores, **named)
        out = self.out or api.default_out(self.runs, cache)
        results = api.evaluate(
            list(self.runs),
            cache,
            split=self.split,
            protocol=self.protocol,
            out=out,
            coco_results=self.coco_results,
        )
        print(tables.results_table(results))
        if self.coco_results is not None:
            files = results["coco_results"]
            print(f"COCO results: {files['results']}, to be scored against {files['truth']}")
        print(f"samples: {out / 'samples.csv'}")
        print(f"report: {out / 'report.html'}")
        return results


@dataclass(frozen=True)
class Compare:
    """Compare two trained heads on the same samples: differences with intervals, and the samples that changed.

    Leaves comparison.html with pictures, comparison.json and samples.csv. Each head is scored on the stores it was
    trained on, so their encoders may differ; the samples may not.

    Example: headstart compare runs/linear-0123456789ab runs/cross_attention-0123456789ab --out comparison
    """

    first: Positional[Path]
    """Run folder of the first head."""
    second: Positional[Path]
    """Run folder of the second; differences are second minus first."""
    split: str = "val"
    """Which split to score."""
    protocol: str = PROTOCOL_NAMES[0]
    """How masks are made and compared; see `headstart evaluate --help`."""
    out: Path = Path("comparison")
    """Folder for what is written."""
    stores: Place | None = None
    """Folder with one store of each kind to score both on, if not the stores each was trained on."""
    json: Json = False

    def run(self) -> Any:
        from evaluate.comparison import PAGE
        from headstart import api, tables

        cache = None if self.stores is None else api.open_cache(self.stores)
        results = api.compare(self.first, self.second, cache, split=self.split, protocol=self.protocol, out=self.out)
        print(tables.comparison_table(results))
        print(f"page: {self.out / PAGE}")
        return results


EVALUATE_COMMANDS: dict[str, type[Command]] = {"evaluate": Evaluate, "compare": Compare}
