"""The command that segments pictures with a trained head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from headstart.command import Command, Json


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


PREDICT_COMMANDS: dict[str, type[Command]] = {"predict": Predict}
