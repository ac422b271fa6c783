"""The command that adapts encoders by LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from headstart.command import Command, Json, Place

FINETUNE_RECIPE_NAMES = ("juras", "pseg", "scenes")
"""The names in headstart.finetune_recipes.FINETUNE_RECIPES, which is slow to import where only --help is asked for."""


@dataclass(frozen=True)
class Finetune:
    """Adapt the encoders of a cache by LoRA, end to end: first to match images and prompts, then with a head on masks.

    Before the first step, live features are compared with the cached ones. A killed run goes on where it was. It leaves
    adapter/ and text_adapter/ in PEFT's format: extract with them, and heads train on the new cache as ever.

    Example: headstart finetune juras --stores stores --set contrastive.epochs=5

    Example: headstart finetune pseg --head runs/two_way-0123456789ab --set rank=16 first_block=6

    Example: headstart extract stores --out adapted --image-encoder dinov2-base --text-encoder clip-base-16
    --image-adapter runs/lora-image-0123456789ab/adapter
    """

    recipe: Annotated[Positional[str], arg(metavar="RECIPE", help=f"Which recipe: {', '.join(FINETUNE_RECIPE_NAMES)}.")]
    stores: Place = "stores"
    """Folder with one store of each kind."""
    samples: Place | None = None
    """The samples store, where the folder holds several."""
    images: Place | None = None
    """The image-feature store, where the folder holds several."""
    prompts: Place | None = None
    """The prompt-feature store, where the folder holds several."""
    image_dir: Path | None = None
    """Where the images lie, if they were moved since the samples store was written."""
    runs: Path = Path("runs")
    """Folder the run's own folder is made in."""
    head: Path | None = None
    """A run of `headstart train` on these stores, whose head the segmentation stage goes on from."""
    states: Place | None = None
    """An image-feature store with layer K+tokens, K being first_block; the forward pass starts there, with
    --set from_states=true."""
    set: tuple[str, ...] = field(default=())
    """Settings to replace, as key=value: rank, alpha, sides, first_block, dora, gradient_checkpointing, images_at_once
    and so on; of a stage contrastive.epochs, segmentation.learning_rate; contrastive=null leaves a stage out."""
    merge: bool = False
    """Also write the adapted encoders as whole models of transformers: merged_image/, merged_text/."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where validations are logged beside metrics.jsonl; wandb must be installed."""
    json: Json = False

    def run(self) -> Any:
        from headstart import api
        from headstart.recipes import parse_overrides

        cache = api.open_cache(
            self.stores, samples=self.samples, images=self.images, prompts=self.prompts, image_dir=self.image_dir
        )
        found = api.finetune(
            self.recipe,
            cache,
            self.runs,
            settings=parse_overrides(self.set),
            head=self.head,
            states=self.states,
            merge=self.merge,
            trackers=self.trackers,
        )
        for side, folder in found.adapters.items():
            print(f"{side} adapter: {folder}")
        print(f"report: {found.run_dir / 'report.html'}")
        return found.to_dict()


FINETUNE_COMMANDS: dict[str, type[Command]] = {"finetune": Finetune}
