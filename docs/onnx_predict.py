"""Segment what prompts name in a picture, with a pipeline that `headstart export` wrote.

    python onnx_predict.py onnx/pipeline photo.jpg "the red circle" --out mask.png

Needs onnxruntime, numpy, pillow and tokenizers, and nothing of headstart, torch or transformers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer


def read_picture(path):
    """(H, W, 3) uint8 RGB, turned upright as the camera says."""
    with Image.open(path) as picture:
        if picture.mode.startswith(("I", "F")):
            raise SystemExit(f"{path} has more than 8 bits a channel; save it with 8.")
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))


def find_box(size, input_size, aspect):
    """(left, top, right, bottom) of what the model looks at in an (H, W) picture; a letterbox is larger than that."""
    (height, width), (input_height, input_width) = size, input_size
    if aspect == "squash" or width * input_height == height * input_width:
        return 0, 0, width, height
    is_wide = width * input_height > height * input_width
    if is_wide == (aspect == "crop"):
        seen = max(1, round(height * input_width / input_height))
        left = (width - seen) // 2
        return left, 0, left + seen, height
    seen = max(1, round(width * input_height / input_width))
    top = (height - seen) // 2
    return 0, top, width, top + seen


def overlap(start, stop, length):
    """Where pixels start to stop of a box lie in a picture of that length, and the same places of the box."""
    first, last = max(0, start), min(stop, length)
    return slice(first, last), slice(first - start, last - start)


def make_pixels(picture, box, settings):
    """(1, h, w, 3) uint8 at the model's input size. Resampling is Pillow's, as it was when the head was trained."""
    left, top, right, bottom = box
    rows, box_rows = overlap(top, bottom, picture.shape[0])
    columns, box_columns = overlap(left, right, picture.shape[1])
    seen = np.empty((bottom - top, right - left, 3), np.uint8)
    seen[...] = settings["padding_rgb"]
    seen[box_rows, box_columns] = picture[rows, columns]
    height, width = settings["input_size"]
    resampling = Image.Resampling[settings["resample"].upper()]
    return np.asarray(Image.fromarray(seen).resize((width, height), resampling))[None]


def tokenize(folder, settings, prompts):
    """(b, l) token ids with zeros behind them, and a mask that is True on tokens. The file knows the limit."""
    tokenizer = Tokenizer.from_file(str(folder / settings["tokenizer"]))
    token_ids = [encoded.ids for encoded in tokenizer.encode_batch(prompts)]
    lengths = np.array([len(ids) for ids in token_ids])
    mask = np.arange(lengths.max()) < lengths[:, None]
    padded = np.zeros(mask.shape, np.int64)
    padded[mask] = np.concatenate(token_ids)
    return padded, mask


def resize(logits, size):
    """(h, w) -> (H, W), bilinear, pixel centres aligned, edges continued, no smoothing: as torch interpolates."""
    places = []
    for given, wanted in zip(logits.shape, size, strict=True):
        centres = np.clip((np.arange(wanted) + 0.5) * (given / wanted) - 0.5, 0, given - 1)
        before = np.minimum(centres.astype(int), max(given - 2, 0))
        places.append((before, np.minimum(before + 1, given - 1), (centres - before).astype(np.float32)))
    (top, bottom, down), (left, right, across) = places
    rows = logits[top] * (1 - down[:, None]) + logits[bottom] * down[:, None]
    return rows[:, left] * (1 - across) + rows[:, right] * across


def mask_of(logits, box, size, settings):
    """(H, W) mask of a picture. What the model did not look at is not marked."""
    left, top, right, bottom = box
    with np.errstate(over="ignore"):
        probability = 1 / (1 + np.exp(-resize(logits, (bottom - top, right - left))))
    marked = probability >= settings["threshold"]
    if settings["comparison"] == ">":
        marked = probability > settings["threshold"]
    rows, box_rows = overlap(top, bottom, size[0])
    columns, box_columns = overlap(left, right, size[1])
    mask = np.zeros(size, bool)
    mask[rows, columns] = marked[box_rows, box_columns]
    return mask


def main():
    parser = argparse.ArgumentParser(description="Segment what prompts name in a picture.")
    parser.add_argument("pipeline", type=Path, help="folder with pipeline.json")
    parser.add_argument("picture", type=Path)
    parser.add_argument("prompts", nargs="+", help="what to segment; each prompt gives a mask of its own")
    parser.add_argument("--out", type=Path, default=Path("mask.png"), help="of several masks: mask-1.png and so on")
    given = parser.parse_args()

    settings = json.loads((given.pipeline / "pipeline.json").read_text(encoding="utf-8"))
    session = onnxruntime.InferenceSession(given.pipeline / settings["model"], providers=["CPUExecutionProvider"])
    picture = read_picture(given.picture)
    size = picture.shape[:2]
    box = find_box(size, settings["image"]["input_size"], settings["image"]["aspect"])
    token_ids, token_mask = tokenize(given.pipeline, settings["prompts"], given.prompts)
    inputs = {
        "pixels": make_pixels(picture, box, settings["image"]),
        "token_ids": token_ids,
        "token_mask": token_mask,
        "image_index": np.zeros(len(given.prompts), np.int64),
    }
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, inputs), strict=True))
    for number, (prompt, logits) in enumerate(zip(given.prompts, outputs["mask_logits"], strict=True)):
        mask = mask_of(logits, box, size, settings)
        path = given.out
        if len(given.prompts) > 1:
            path = path.with_name(f"{path.stem}-{number + 1}{path.suffix}")
        Image.fromarray(mask.astype(np.uint8) * 255).save(path)
        said = [f"{mask.mean():.1%} of the picture"]
        if "iou" in outputs:
            said.append(f"IoU expected {outputs['iou'][number]:.2f}")
        if "no_target_logits" in outputs and outputs["no_target_logits"][number] > 0:
            said.append("says that there is no such thing")
        print(f"{prompt}: {', '.join(said)} -> {path}")


if __name__ == "__main__":
    main()
