"""The commands, as plain values: their fields are the options, their docstrings the help, `run` does the work.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from cache_schema.errors import UsageError
from headstart.command import Command, Json, Place
from headstart.evaluate_commands import EVALUATE_COMMANDS
from headstart.export_commands import EXPORT_COMMANDS
from headstart.extract_commands import Encoders, Extract, Plan
from headstart.finetune_commands import FINETUNE_COMMANDS
from headstart.predict_commands import PREDICT_COMMANDS
from headstart.prepare_commands import PREPARE_COMMANDS
from headstart.publish_commands import PUBLISH_COMMANDS
from headstart.segment_commands import SEGMENT_COMMANDS
from headstart.serve_commands import SERVE_COMMANDS
from headstart.sweep_commands import Sweep

RECIPE_NAMES = tuple("linear cross_attention juras pseg pseg-tokens clipseg film text-driven talk2dino".split())
"""The names in headstart.recipes.RECIPES, which is slow to import where only --help is asked for."""


@dataclass(frozen=True)
class Demo:
    """Walk the whole road on an embedded dataset: make scenes, cache features, train two heads, evaluate, report.

    Takes about four minutes on two cores. Killed or repeated, it goes on where it was and extracts nothing twice.
    """

    out: Path = Path("demo")
    """Folder for everything it makes: scenes/, encoders/, stores/, runs/, results.json, report.html."""
    num_images: int | None = None
    """How many scenes to make: 2000, with --lora 800. Fewer are faster and worse."""
    lora: bool = False
    """Walk another road: adapt the encoders by LoRA in two stages, extract with them anew, train heads on each cache.
    Takes about nine minutes on two cores."""
    json: Json = False

    def run(self) -> Any:
        if self.lora:
            from headstart.lora_demo import run_lora_demo

            return run_lora_demo(self.out, self.num_images or 800)
        from headstart.demo import run_demo

        return run_demo(self.out, self.num_images or 2000)


@dataclass(frozen=True)
class Train:
    """Train a head on cached features, in a run folder named after everything that decides what it learns.

    A killed run goes on where it was; a finished one is not trained again. Several heads are trained in one pass over
    the features, each with its own optimizer, randomness and run folder, and learn what they would alone.

    Example: headstart train cross_attention --stores stores --set epochs=5 depth=3

    Example: headstart train --heads juras,pseg,film --set epochs=10 batch_size=32 film.dim=128
    """

    recipe: Annotated[
        Positional[str | None], arg(metavar="RECIPE", help=f"Which recipe: {', '.join(RECIPE_NAMES)}.")
    ] = None
    heads: Annotated[str | None, arg(metavar="RECIPE,RECIPE,...")] = None
    """Several recipes, to be trained in one pass."""
    stores: Place = "stores"
    """Folder with one store of each kind; s3://bucket/folder and the like work too."""
    samples: Place | None = None
    """The samples store, where the folder holds several."""
    images: Place | None = None
    """The image-feature store, where the folder holds several."""
    prompts: Place | None = None
    """The prompt-feature store, where the folder holds several."""
    runs: Path = Path("runs")
    """Folder the run's own folder is made in."""
    set: tuple[str, ...] = field(default=())
    """Settings to replace, as key=value: fields of the recipe (epochs, learning_rate, ...) or arguments of its head; of
    several recipes for all that know them, or as recipe.key=value for one."""
    residency: Literal["auto", "device", "ram", "disk"] = "auto"
    """Where features are kept while training; auto takes the first they fit into half of what is free of."""
    dry_run: bool = False
    """Only try a few steps: say what it takes of parameters, operations, memory and time. Nothing is written."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where validations are logged beside metrics.jsonl; wandb must be installed."""
    json: Json = False

    def run(self) -> Any:
        from headstart import api
        from headstart.recipes import make_configs, parse_overrides

        recipes = self._recipes()
        settings = parse_overrides(self.set)
        configs = make_configs(recipes, settings)
        cache = api.open_cache(self.stores, samples=self.samples, images=self.images, prompts=self.prompts)
        if self.dry_run:
            from heads.dry_run import dry_run

            found = [dry_run(config, cache) for config in configs]
            print("\n".join(f"{recipe}: {tried.table()}" for recipe, tried in zip(recipes, found, strict=True)))
            return self._result([tried.to_dict() for tried in found])
        runs = api.train_heads(configs, cache, self.runs, residency=self.residency, trackers=self.trackers)
        for run in runs:
            print(run.summary())
        return self._result([run.to_dict() for run in runs])

    def _recipes(self) -> list[str]:
        several = [] if self.heads is None else [name.strip() for name in self.heads.split(",") if name.strip()]
        if (self.recipe is None) == (not several):
            raise UsageError("name a recipe, or several with --heads; `headstart train --help` lists them.")
        return several if self.recipe is None else [self.recipe]

    def _result(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        return results[0] if self.heads is None else {"runs": results}


COMMANDS: dict[str, type[Command]] = {
    "demo": Demo,
    **PREPARE_COMMANDS,
    "encoders": Encoders,
    "plan": Plan,
    "extract": Extract,
    "train": Train,
    "sweep": Sweep,
    **FINETUNE_COMMANDS,
    **EVALUATE_COMMANDS,
    **SEGMENT_COMMANDS,
    **PREDICT_COMMANDS,
    **SERVE_COMMANDS,
    **EXPORT_COMMANDS,
    **PUBLISH_COMMANDS,
}
