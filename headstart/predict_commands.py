"""The command that segments pictures with a trained head."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from headstart.command import Command, Json


@dataclass(frozen=True)
class Predict:
    """Segment what prompts name in pictures: a mask and an overlay each, as PNG files at the picture's own size.

    Example: headstart predict runs/cross_attention-0123456789ab photo.jpg "the red circle" "all squares"

    Example: headstart predict runs/two_way-0123456789ab photos more/*.jpg --prompts "the dog" --attention

    A folder stands for all pictures in it and below it; pictures of one name do not overwrite each other. A picture
    that cannot be used is named and left out, and the exit code is then 1. predictions.json says everything again for
    scripts: masks as COCO run lengths, scores, sizes.
    """

    run_dir: Positional[Path]
    """Run folder of the head."""
    asked: Annotated[
        Positional[tuple[str, ...]],
        arg(
            metavar="PICTURE|FOLDER PROMPT...",
            help="A picture, or a folder of them, and what to segment; each prompt gives a mask of its own. With "
            "--prompts or --prompts-file, any number of pictures and folders.",
        ),
    ] = ()
    prompts: tuple[str, ...] = ()
    """What to segment in each of the pictures."""
    prompts_file: Path | None = None
    """A text file with a prompt on each line; or a .csv file with columns image and prompt, whose images lie under the
    folder that is named, or under its own."""
    attention: bool = False
    """Draw also how much each word of the prompt is looked at where, for heads that read a prompt's tokens."""
    out: Path = Path("predictions")
    """Folder that everything is written to. No pictures are looked for in it."""
    batch_size: int = 8
    """How many pictures are encoded at once."""
    device: str = "auto"
    """Where encoders and head run."""
    json: Json = False

    def run(self) -> Any:
        from headstart.prediction_inputs import find_pictures

        pictures = find_pictures(self.asked, self.prompts, self.prompts_file, self.out)

        from headstart.predictions import RESULTS, predict_pictures
        from headstart.prepare_commands import printable_line

        result = predict_pictures(
            self.run_dir,
            pictures,
            self.out,
            attention=self.attention,
            batch_size=self.batch_size,
            device=self.device,
        )
        predictions, failed = result["predictions"], result["failed"]
        if len(pictures) == 1:
            for said in predictions:
                shown = printable_line(
                    f"{said['prompt']}: {said['mask_share']:.1%} of the picture -> {said['overlay']}"
                )
                print(shown + (" (no target)" if said["no_target"] else ""))
        else:
            used = len(pictures) - len(failed)
            print(f"{len(predictions)} masks of {used} pictures -> {printable_line(str(self.out / RESULTS))}")
        for one in failed:
            print(f"left out: {one['reason']}", file=sys.stderr)
        if failed:
            print(f"{len(failed)} of {len(pictures)} pictures could not be used.", file=sys.stderr)
        return result


PREDICT_COMMANDS: dict[str, type[Command]] = {"predict": Predict}
