"""The report of a finetuning: one HTML file that shows what was adapted, how both stages went and what came of them.

Prompts, names and paths are data: the template escapes them. Knows nothing about how encoders are adapted; the masks
it compares are asked of predictors that are handed in.
"""

from __future__ import annotations

import json
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from numpy.typing import NDArray

from cache_schema import atomic
from cache_schema.errors import UsageError
from cache_schema.features import FeatureCache
from evaluate.metrics import score_mask
from evaluate.pages import (
    Panel,
    capital,
    css_colour,
    fit_panels,
    flatten,
    in_seconds,
    is_number,
    number,
    render_page,
    short,
)
from evaluate.pictures import PREDICTED_COLOUR, TRUTH_COLOUR, triptych
from evaluate.plots import colour_of
from evaluate.predictor import Prediction, open_image
from evaluate.report_plots import Line, draw_curves
from heads.finetune import FINISHED, STAGES, read_finetuning
from heads.runs import METRICS, read_history

PAGE = "report.html"

_TRAIN, _VALIDATION, _OTHER = 0, 1, 2
"""Places of colours: what is learned from, what is validated on, and another measure of it."""

_CURVES = (
    ("loss", "Loss", False, (("training", "train_loss", _TRAIN), ("validation", "val_loss", _VALIDATION))),
    ("iou", "Validation mean IoU", True, (("validation", "val_mean_iou", _VALIDATION),)),
    (
        "recall",
        "Validation recall@1",
        True,
        (
            ("text to image", "val_text_to_image_recall@1", _VALIDATION),
            ("image to text", "val_image_to_text_recall@1", _OTHER),
        ),
    ),
)
"""(name, title, whether it begins at zero, its lines) of each plot of a stage."""

_MAX_OPEN_NAMES = 8


@typing.runtime_checkable
class Segmenter(typing.Protocol):
    """What is asked for masks; see `evaluate.predictor.Predictor`."""

    def set_image(self, image: UInt8[np.ndarray, "h w 3"]) -> Any: ...

    def predict(self, prompts: str) -> Sequence[Prediction]: ...


@dataclass(frozen=True)
class BeforeAfter:
    """One sample, and what is marked in it before and after encoders were adapted.

    Args:
        image: (H, W, 3) uint8.
        truth, before, after: (H, W) masks at the image's size.
    """

    image: UInt8[np.ndarray, "h w 3"]
    prompt: str
    truth: Bool[np.ndarray, "h w"]
    before: Bool[np.ndarray, "h w"]
    after: Bool[np.ndarray, "h w"]

    @property
    def ious(self) -> tuple[float, float]:
        """IoU with the truth before and after; two empty masks count as 1."""
        before, after = (float(score_mask(mask, self.truth).iou[0]) for mask in (self.before, self.after))
        return before, after


def before_and_after(
    cache: FeatureCache, before: Segmenter, after: Segmenter, split: str, num: int = 8
) -> list[BeforeAfter]:
    """Ask two predictors for the masks of up to `num` samples, each of another image, spread evenly over a split.

    Of an image it is the first sample with a target. A picture that is no longer there is left out, and pixels that
    nobody labelled are marked in no mask.

    Raises:
        UsageError: the split is unknown.
    """
    samples, image_dir = cache.samples.samples, cache.samples.image_dir
    pictures = []
    for row in _spread(cache, split, num).tolist():
        path = None if image_dir is None else image_dir / samples.images.paths[samples.image_rows[row]]
        if path is None or not path.is_file():
            continue
        image, prompt = open_image(path), samples.prompts[samples.prompt_rows[row]]
        masks = [samples.target(row)]
        for predictor in (before, after):
            predictor.set_image(image)
            masks.append(predictor.predict(prompt)[0].mask)
        ignored = samples.ignored_pixels(row)
        if ignored is not None:
            masks = [mask & ~ignored for mask in masks]
        pictures.append(BeforeAfter(image, prompt, *masks))
    return pictures


def write_finetune_report(
    run_dir: Path, pictures: Sequence[BeforeAfter] = (), steps: Sequence[Mapping[str, Any]] = ()
) -> Path:
    """Write `report.html` of a finished finetuning into its folder, as one self-contained file, and return its path.

    Equal arguments give equal bytes.

    Args:
        steps: what each step on the way is worth, from the first to the last: `name`, `mean_iou` and `overall_iou`
            (None where they do not apply), and in `note` what else there is to say.

    Raises:
        UsageError: the folder holds no finished finetuning.
    """
    told, config = _read(run_dir)
    sides = told["adapted"]
    stages = [
        _stage(name, told["stages"][name], config["stages"][name], _read_history(run_dir / name))
        for name in STAGES
        if name in told["stages"]
    ]
    page = render_page(
        "finetune.html.j2",
        {
            "title": f"LoRA finetuning of the {' and '.join(sides)} encoder{'s' if len(sides) > 1 else ''}",
            "finding": _finding(steps, stages),
            "head_alone": config["finetune"]["head_alone"],
            "steps": _steps(steps),
            "bar_colour": colour_of(_VALIDATION),
            "stages": stages,
            "parameters": _parameters(told, stages),
            "modules": [_modules(side, names) for side, names in sides.items()],
            "parity": [_parity(entry) for entry in told["parity"]],
            "pictures": _pictures(pictures),
            "num_better": sum(after > before for before, after in (picture.ious for picture in pictures)),
            "num_worse": sum(after < before for before, after in (picture.ious for picture in pictures)),
            "truth_colour": css_colour(TRUTH_COLOUR),
            "predicted_colour": css_colour(PREDICTED_COLOUR),
            "run_dir": str(run_dir),
            "settings": _settings(config["finetune"]),
            "stores": list(flatten(config["stores"])),
        },
    )
    path = run_dir / PAGE
    atomic.write_file(path, page.encode())
    return path


def _spread(cache: FeatureCache, split: str, num: int) -> NDArray[np.int64]:
    samples = cache.samples.samples
    rows = [row for row in cache.usable_samples(split).tolist() if samples.targets[row] and not samples.no_target[row]]
    first_rows = np.array(sorted({samples.image_rows[row]: row for row in reversed(rows)}.values()), np.int64)
    num = min(num, len(first_rows))
    return first_rows[np.linspace(0, len(first_rows) - 1, num).round().astype(np.int64)]


def _read(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a finished finetuning found, and what it was told to do."""
    remedy = "name what `headstart finetune` printed, or run it again: it goes on where it was killed."
    if not run_dir.is_dir():
        raise UsageError(f"there is no folder {run_dir}: {remedy}")
    try:
        told = read_finetuning(run_dir)
        config = json.loads((run_dir / "config.json").read_bytes()) if told is not None else {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{run_dir} holds no finetuning that can be read ({error}): {remedy}") from error
    if told is None:
        raise UsageError(f"{run_dir} holds no finished finetuning, for it lacks {FINISHED}: {remedy}")
    return told, config


def _read_history(stage_dir: Path) -> list[dict[str, Any]]:
    """The validations of a stage; none where its folder was removed after it."""
    return read_history(stage_dir) if (stage_dir / METRICS).is_file() else []


@dataclass(frozen=True, slots=True)
class _Stage:
    name: str
    head: str
    best_step: str
    num_steps: str
    mean_iou: str
    loss: str
    num_parameters: int
    seconds: str
    stopped_early: bool
    curves: list[tuple[str, str]]
    resolution: str
    finding: str


def _stage(
    name: str, training: Mapping[str, Any], config: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
) -> _Stage:
    scored = [entry for entry in history if is_number(entry["val_mean_iou"])]
    return _Stage(
        name=capital(name),
        head=config["head"],
        best_step=f"{training['best_step']:,}",
        num_steps=f"{training['num_steps']:,}",
        mean_iou=number(training["best_val_mean_iou"]),
        loss=number(training["best_val_loss"]),
        num_parameters=training["num_parameters"],
        seconds=in_seconds(training["seconds"]),
        stopped_early=training["stopped_early"],
        curves=_curves(name, history),
        resolution=" × ".join(map(str, scored[-1]["val_resolution"])) if scored else "",  # noqa: RUF001
        finding=_stage_finding(name, training, history),
    )


def _curves(stage: str, history: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(caption, SVG) of whatever was measured."""
    plots = []
    for name, title, from_zero, series in _CURVES:
        lines = [Line.of_history(label, history, key, colour) for label, key, colour in series]
        drawn = [line for line in lines if line.values]
        if drawn:
            label = f"{title} of the {stage} stage"
            plots.append((title, draw_curves(f"{stage}-{name}", drawn, label, from_zero=from_zero)))
    return plots


def _finding(steps: Sequence[Mapping[str, Any]], stages: Sequence[_Stage]) -> str:
    """The one sentence to take home: of the steps where they are told, of the last stage where not."""
    scored = [step for step in steps if is_number(step["mean_iou"])]
    if not scored:
        return stages[-1].finding
    first, best = scored[0], max(scored, key=lambda step: step["mean_iou"])
    if len(scored) > 1 and best is first:
        return f"No step reaches more than “{first['name']}” with a mean IoU of {number(first['mean_iou'])}."
    sentence = f"“{best['name']}” reaches a mean IoU of {number(best['mean_iou'])}"
    return f"{sentence}." if best is first else f"{sentence}; “{first['name']}” reached {number(first['mean_iou'])}."


def _stage_finding(name: str, training: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> str:
    best = next((entry for entry in history if entry["step"] == training["best_step"]), {})
    start = next((entry for entry in history if entry["step"] == 0), {})
    key, score = "val_loss", f"validation loss of {number(training['best_val_loss'])}"
    if training["best_val_mean_iou"] is not None and best.get("selects") != "val_loss":
        key, score = "val_mean_iou", f"validation mean IoU of {number(training['best_val_mean_iou'])}"
    elif is_number(best.get("val_text_to_image_recall@1")):
        key = "val_text_to_image_recall@1"
        score = f"validation recall@1 from text to image of {number(best[key])}"
    if training["best_step"] == 0:
        return f"The {name} stage found nothing better than what it began with, a {score}."
    began = f"; it began at {number(start[key])}" if is_number(start.get(key)) else ""
    return f"The {name} stage reaches a {score}{began}."


def _steps(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    texts = [number(step["mean_iou"]) for step in steps]
    scores = [step["mean_iou"] for step in steps if is_number(step["mean_iou"])]
    best = number(max(scores)) if len(set(scores)) > 1 else None
    return [
        {
            "name": step["name"],
            "mean_iou": text,
            "is_best": text == best,
            "share": step["mean_iou"] if is_number(step["mean_iou"]) else 0.0,
            "overall_iou": number(step["overall_iou"]),
            "note": step.get("note") or "",
        }
        for step, text in zip(steps, texts, strict=True)
    ]


def _parameters(told: Mapping[str, Any], stages: Sequence[_Stage]) -> dict[str, Any]:
    """Adapters against all of the encoders; the heads of the stages beside them."""
    learned, frozen = told["num_adapted"], told["num_encoder"]
    rows = [("Adapters, which learn", learned), ("Encoders beside them, as they were", frozen)]
    return {
        "learned": short(learned),
        "frozen": short(frozen),
        "rows": [(name, short(value), f"{value / (learned + frozen):.2%}") for name, value in rows],
        "heads": [(f"Head of the {stage.name.lower()} stage", short(stage.num_parameters)) for stage in stages],
    }


def _modules(side: str, names: Sequence[str]) -> dict[str, Any]:
    kinds = Counter(name.rpartition(".")[2] for name in names)
    return {
        "side": side,
        "kinds": ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
        "names": list(names),
        "open": len(names) <= _MAX_OPEN_NAMES,
    }


def _parity(entry: Mapping[str, Any]) -> tuple[str, ...]:
    cosines = (number(entry[key], 6) for key in ("mean_cosine", "least_cosine"))
    return (entry["name"], f"{entry['num']:,}", *cosines, f"{entry['max_error']:.3g}")


def _pictures(pictures: Sequence[BeforeAfter]) -> list[tuple[str, list[Panel]]]:
    """The prompt and the panels of each, as small as it takes to keep the page light."""
    return fit_panels(
        lambda side_px: [(picture.prompt, _panels(picture, side_px)) for picture in pictures],
        lambda shown: [panel for _, panels in shown for panel in panels],
    )


def _panels(picture: BeforeAfter, side_px: int) -> list[Panel]:
    before, after = (triptych(picture.image, picture.truth, mask, side_px) for mask in (picture.before, picture.after))
    captions = [f"{name}: IoU {number(iou, 2)}" for name, iou in zip(("Before", "After"), picture.ious, strict=True)]
    return [
        Panel.of_image(before.image, picture.truth.shape),
        Panel.of_mask(before.truth, "Truth", picture.truth),
        Panel.of_mask(before.predicted, "Before", picture.before, captions[0]),
        Panel.of_mask(after.predicted, "After", picture.after, captions[1]),
    ]


def _settings(finetune: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Those that were set, as people read them."""
    answers = {True: "yes", False: "no"}
    return [
        (name, answers[value] if isinstance(value, bool) else str(value))
        for name, value in flatten(finetune)
        if value is not None
    ]
