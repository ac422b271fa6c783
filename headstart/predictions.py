"""Masks of one picture, as files a person can open."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache_schema import atomic
from cache_schema.errors import UsageError
from evaluate.pictures import encode_png, overlay
from evaluate.predictor import open_image
from headstart.api import load


def predict_image(
    run_dir: Path, image_path: Path, prompts: Sequence[str], out: Path, device: str = "auto"
) -> list[dict[str, Any]]:
    """Write `<picture>-<n>-<prompt>.mask.png` and `.overlay.png` for every prompt, at the picture's original size.

    Raises:
        UsageError: the run or the picture cannot be used, or there is no prompt.
    """
    if not prompts:
        raise UsageError('there is no prompt; say what to segment, for example "the red circle".')
    image = open_image(image_path)
    predictor = load(run_dir, device=device).set_image(image)
    written = []
    for number, prediction in enumerate(predictor.predict(prompts), start=1):
        slug = re.sub(r"[^a-z0-9]+", "-", prediction.prompt.lower()).strip("-")[:40]
        stem = f"{image_path.stem}-{number}-{slug}".rstrip("-")
        mask_path, overlay_path = out / f"{stem}.mask.png", out / f"{stem}.overlay.png"
        atomic.write_file(mask_path, encode_png(prediction.mask))
        atomic.write_file(overlay_path, encode_png(overlay(image, prediction.mask)))
        written.append(
            {
                "prompt": prediction.prompt,
                "mask": str(mask_path),
                "overlay": str(overlay_path),
                "mask_share": float(prediction.mask.mean()),
                "size": list(prediction.mask.shape),
            }
        )
    return written
