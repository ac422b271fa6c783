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
from headstart.extract_commands import Encoders, Extract, Plan
from headstart.finetune_commands import FINETUNE_COMMANDS
from headstart.prepare_commands import PREPARE_COMMANDS
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
    """Walk on: adapt the encoders by LoRA in two stages, extract with them anew, and train a head on the new cache."""
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


@dataclass(frozen=True)
class Predict:
    """Segment what prompts name in one picture: a mask and an overlay, as PNG files at the picture's own size.

    Example: headstart predict runs/cross_attention-0123456789ab photo.jpg "the red circle" "all squares"
    """

    run_dir: Positional[Path]
    """Run folder of the head."""
    image: Positional[Path]
    """Picture to look at."""
    prompts: Positional[tuple[str, ...]]
    """What to segment; each prompt gives a mask of its own."""
    out: Path = Path("predictions")
    """Folder the PNG files are written to."""
    device: str = "auto"
    """Where encoders and head run."""
    json: Json = False

    def run(self) -> Any:
        from headstart.predictions import predict_image

        predictions = predict_image(self.run_dir, self.image, self.prompts, self.out, self.device)
        for prediction in predictions:
            print(f"{prediction['prompt']}: {prediction['mask_share']:.1%} of the picture -> {prediction['overlay']}")
        return {"image": str(self.image), "predictions": predictions}


@dataclass(frozen=True)
class Publish:
    """Write a run's head with a model card (protocol, scores, fingerprints) to a folder, or push it to the Hub.

    Example: headstart publish runs/film-0123456789ab --out film --push owner/film-scenes
    """

    run_dir: Positional[Path]
    """Run folder of the head."""
    out: Path | None = None
    """Folder to write: config.json, model.safetensors, facts.json, README.md."""
    push: str | None = None
    """Name at the Hugging Face Hub, owner/name; needs a token (`hf auth login`)."""
    private: bool = False
    """Make the repository at the Hub private, if it is made now."""
    json: Json = False

    def run(self) -> Any:
        from heads.hub import HubHead

        if self.out is None and self.push is None:
            raise UsageError("name a folder with --out, a repository with --push owner/name, or both.")
        head = HubHead.of_run(self.run_dir)
        if self.out is not None:
            head.save_pretrained(self.out)
            print(f"wrote {self.out}")
        url = None if self.push is None else str(head.push_to_hub(self.push, private=self.private))
        if url is not None:
            print(f"pushed to {url}")
        return {"out": None if self.out is None else str(self.out), "url": url}


COMMANDS: dict[str, type[Command]] = {
    "demo": Demo,
    **PREPARE_COMMANDS,
    "encoders": Encoders,
    "plan": Plan,
    "extract": Extract,
    "train": Train,
    "sweep": Sweep,
    **FINETUNE_COMMANDS,
    "evaluate": Evaluate,
    "predict": Predict,
    "publish": Publish,
}
