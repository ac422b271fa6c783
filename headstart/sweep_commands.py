"""The command that sweeps over the settings of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from headstart.command import Json, Place, Wanting


@dataclass(frozen=True)
class Sweep:
    """Train a recipe with many settings, in several processes, and tell which are best.

    Every combination and seed is an ordinary run, in the folder `headstart train` would give it: nothing is trained
    twice, and a sweep that was killed goes on where it was. A run that fails ends no other; the exit code is 1 then.

    Values of a setting stand between commas (depth=1,2) or in one JSON list (target_size=[[48,48],[96,96]]). Each is
    JSON where it can be (null, true, {"bce": 1}), else text (schedule=cosine,linear). With --random, a range may stand
    for them: learning_rate=log:1e-5:1e-2, dropout=uniform:0:0.5, depth=int:1:4.

    Example: headstart sweep film --over learning_rate=1e-4,1e-3 'loss={"bce":1},{"bce":1,"dice":1}' --set epochs=3

    Example: headstart sweep juras --over learning_rate=log:1e-5:1e-2 depth=int:1:4 --random 20 --seeds 2
    """

    recipe: Annotated[Positional[str], arg(metavar="RECIPE", help="Which recipe; `headstart train --help` lists them.")]
    over: tuple[str, ...]
    """Settings to try, as key=value,value,...: fields of the recipe or arguments of its head."""
    set: tuple[str, ...] = ()
    """Settings to replace in every run, as key=value."""
    random: Annotated[int | None, arg(metavar="N")] = None
    """Draw so many combinations instead of trying all; a larger number later adds to them."""
    seed: int = 0
    """Decides which combinations are drawn."""
    seeds: int = 1
    """Runs of each combination, with seeds that count up from the recipe's; scores are averaged over them."""
    processes: int = 2
    """How many runs are trained at once."""
    stores: Place = "stores"
    """Folder with one store of each kind; s3://bucket/folder and the like work too."""
    samples: Place | None = None
    """The samples store, where the folder holds several."""
    images: Place | None = None
    """The image-feature store, where the folder holds several."""
    prompts: Place | None = None
    """The prompt-feature store, where the folder holds several."""
    runs: Path = Path("runs")
    """Folder the runs' own folders are made in."""
    out: Path = Path("sweep")
    """Folder for sweep.json, sweep.csv and sweep.md."""
    residency: Literal["auto", "device", "ram", "disk"] = "auto"
    """Where each process keeps features; auto means on the disk, which processes share, if there are several."""
    dry_run: bool = False
    """Only try a few steps of each combination: say what the sweep takes. Nothing is written."""
    json: Json = False

    def run(self) -> Any:
        from headstart import api, sweep
        from headstart.recipes import parse_overrides
        from headstart.sweep_space import SweepConfig, parse_space

        config = SweepConfig(
            self.recipe, parse_space(self.over), parse_overrides(self.set), self.random, self.seed, self.seeds
        )
        stores = {"stores": self.stores, "samples": self.samples, "images": self.images, "prompts": self.prompts}
        cache = api.open_cache(self.stores, samples=self.samples, images=self.images, prompts=self.prompts)
        if self.dry_run:
            found = sweep.try_out(sweep.plan_sweep(config, cache), cache, self.runs, self.processes)
            print("\n".join(sweep.shown_tryout(found)))
            return found
        result = sweep.sweep(
            config, stores, cache, self.runs, self.out, num_processes=self.processes, residency=self.residency
        )
        print("\n".join(result.lines()))
        print(f"table: {self.out / 'sweep.md'}")
        return Wanting(result.to_dict()) if result.num_failed else result.to_dict()
