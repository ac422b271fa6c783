"""Masks of pictures, as files a person can open and a script can read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from cache_schema import atomic
from cache_schema.errors import UsageError
from cache_schema.masks import encode_mask
from evaluate.pictures import encode_png, overlay
from evaluate.predictor import Prediction, Predictor, PreparedImage, open_image
from headstart.api import load
from headstart.command import Wanting
from headstart.prediction_inputs import Names, Picture
from headstart.prepare_commands import printable_line

RESULTS = "predictions.json"


def predict_pictures(
    run_dir: Path,
    pictures: Sequence[Picture],
    out: Path,
    *,
    attention: bool = False,
    batch_size: int = 8,
    device: str = "auto",
) -> dict[str, Any]:
    """Write masks and overlays of pictures as PNG files, at each picture's original size, and what is said of each.

    For prompt n of a picture these are `<stem>-<n>-<prompt>.mask.png` and `.overlay.png`, with `attention`
    `.attention.png`, too. `predictions.json` comes last. A picture that cannot be used is left out and named.

    Args:
        batch_size: how many pictures are held at once, and how many pictures or prompts are encoded at once.

    Returns:
        What is in predictions.json, with paths of the files instead of their names in `out`; `Wanting` where a picture
        was left out.

    Raises:
        UsageError: the run cannot be used, or has no attention to write.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}: give a whole number of at least 1.")
    predictor = load(run_dir, device=device)
    if attention and not predictor.has_attention:
        raise UsageError(
            f"the head of {run_dir} sees a prompt as one vector and has no attention per word; leave --attention out, "
            "or take a head that reads tokens, such as cross_attention, pseg-tokens or text-driven."
        )
    writer = _Writer(out, attention)
    failed: list[dict[str, str]] = []
    with tqdm(total=len(pictures), desc="predicting", unit="picture", delay=1) as bar:
        for start in range(0, len(pictures), batch_size):
            batch = pictures[start : start + batch_size]
            opened = list(_open(predictor, batch, failed))
            prepared = [one.prepared for one in opened for _ in one.picture.prompts]
            prompts = [prompt for one in opened for prompt in one.picture.prompts]
            if prompts:
                predictions = predictor.predict_pairs(prepared, prompts, batch_size=batch_size)
                for one in opened:
                    for number in range(1, len(one.picture.prompts) + 1):
                        writer.write(one, number, next(predictions))
            bar.update(len(batch))
    result = {"run": run_dir.resolve().name, "num_pictures": len(pictures), "failed": failed}
    atomic.write_json(out / RESULTS, {**result, "predictions": writer.written})
    shown = [{**said, **{kind: str(out / said[kind]) for kind in _KINDS if kind in said}} for said in writer.written]
    return (Wanting if failed else dict)({**result, "predictions": shown})


@dataclass(frozen=True)
class _Opened:
    """A picture as a person sees it, (H, W, 3) uint8, and as the encoder will."""

    picture: Picture
    image: UInt8[np.ndarray, "h w 3"]
    prepared: PreparedImage


def _open(predictor: Predictor, pictures: Sequence[Picture], failed: list[dict[str, str]]) -> Iterator[_Opened]:
    """Those of the pictures that can be used; the others are added to `failed`."""
    for picture in pictures:
        try:
            image = open_image(picture.path)
            yield _Opened(picture, image, predictor.prepare(image))
        except UsageError as error:
            failed.append({"image": _text(picture.path), "reason": printable_line(str(error))})


_KINDS = ("mask", "overlay", "attention")


class _Writer:
    """Writes pictures of predictions into a folder, and nothing anywhere else."""

    def __init__(self, out: Path, attention: bool) -> None:
        self._out = out
        self._attention = attention
        self._names = Names()
        self.written: list[dict[str, Any]] = []

    def write(self, opened: _Opened, number: int, prediction: Prediction) -> None:
        slug = re.sub(r"[^a-z0-9]+", "-", prediction.prompt.lower())[:40].strip("-")
        stem = self._names.take(f"{opened.picture.stem}-{number}-{slug}".rstrip("-"))
        drawn = {"mask": encode_png(prediction.mask), "overlay": encode_png(overlay(opened.image, prediction.mask))}
        if self._attention:
            from evaluate.word_attention import draw_attention

            drawn["attention"] = encode_png(draw_attention(opened.image, prediction))
        names = {kind: f"{stem}.{kind}.png" for kind in drawn}
        for kind, encoded in drawn.items():
            atomic.write_file(self._inside(names[kind]), encoded)
        self.written.append({"image": _text(opened.picture.path), **names, **_describe(prediction)})

    def _inside(self, name: str) -> Path:
        path = self._out / name
        if not path.parent.resolve().is_relative_to(self._out.resolve()):
            raise UsageError(f"{path.parent} is a link that leads out of {self._out}; name another folder with --out.")
        return path


def _describe(prediction: Prediction) -> dict[str, Any]:
    """A prediction as plain JSON."""
    size = list(prediction.mask.shape)
    return {
        "prompt": prediction.prompt,
        "size": size,
        "mask_share": float(prediction.mask.mean()),
        "mask_rle": {"size": size, "counts": encode_mask(prediction.mask).decode("ascii")},
        "score": prediction.score,
        "predicted_iou": prediction.predicted_iou,
        "no_target": prediction.no_target,
    }


def _text(path: Path) -> str:
    """A path in letters that a file of UTF-8 can hold, whatever bytes its name is of."""
    return printable_line(str(path))
