"""From frozen features to adapted encoders and back to a cache, on the embedded dataset, step by step in one table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cache_schema import atomic
from cache_schema.features import FeatureCache
from evaluate.finetune_report import before_and_after, write_finetune_report
from heads.runs import Training
from headstart import api
from headstart.demo import Stopwatch, extract_tiny, make_samples
from headstart.finetune_recipes import FINETUNE_RECIPES, make_finetune_config

RECIPE = "scenes"
NUM_SEEDS = 3
EPOCHS = 6
"""Of every head that is trained on a cache."""


@dataclass(frozen=True)
class Step:
    """One station of the road, scored on the validation split at original size, with one head for each seed."""

    name: str
    mean_iou: Sequence[float]
    overall_iou: Sequence[float]

    def to_dict(self) -> dict[str, Any]:
        spread = stdev(self.mean_iou) if len(self.mean_iou) > 1 else None
        return {
            "name": self.name,
            "mean_iou": mean(self.mean_iou),
            "mean_iou_spread": spread,
            "overall_iou": mean(self.overall_iou),
            "seeds": len(self.mean_iou),
            "note": None if spread is None else f"{len(self.mean_iou)} heads, standard deviation {spread:.3f}",
        }


def run_lora_demo(out: Path, num_images: int, *, num_seeds: int = NUM_SEEDS) -> dict[str, Any]:
    """Frozen, contrastive, LoRA end to end, and heads on the new cache: results.json under `out`, and a report a stage.

    On each cache heads are trained from nothing. The second stage goes on from the first head on the cache of the
    first, so that its first validation is that head's, and what it gains is the encoders' doing and its own epochs'.
    Killed or repeated, the demo goes on where it was.

    Args:
        num_seeds: how many heads are trained on each cache. The encoders are adapted once.
    """
    watch = Stopwatch()
    samples = make_samples(out, num_images, watch)
    frozen = extract_tiny(out, samples, watch)
    before = _train(frozen, out, "frozen features", num_seeds, watch)
    config = make_finetune_config(RECIPE, {"segmentation": None})
    first = watch.time("finetune, contrastive", lambda: api.finetune(config, frozen, out / "runs"))
    matched = extract_tiny(out, samples, watch, first.run_dir)
    between = _train(matched, out, "the cache of the contrastive stage", num_seeds, watch)
    config = make_finetune_config(RECIPE, {"contrastive": None})
    second = watch.time("finetune, segmentation", lambda: api.finetune(config, matched, out / "runs", head=between[0]))
    adapted = extract_tiny(out, samples, watch, second.run_dir)
    after = _train(adapted, out, "the cache of the adapted encoders", num_seeds, watch)
    steps = [
        _score("frozen encoders", before, frozen, out),
        _score("after the contrastive stage, extracted anew", between, matched, out),
        _score("end to end with LoRA", [second.stages["segmentation"]], adapted, out),
        _score("new heads on the cache of the adapted encoders", after, adapted, out),
    ]
    told = [step.to_dict() for step in steps]
    results = {
        "steps": told,
        "finetuning": {"contrastive": first.to_dict(), "segmentation": second.to_dict()},
        "seconds": watch.seconds,
    }
    pictures = before_and_after(frozen, api.load(before[0]), api.load(after[0]), "val")
    pages = [write_finetune_report(first.run_dir, ()), write_finetune_report(second.run_dir, pictures, told)]
    atomic.write_json(out / "results.json", results)
    print()
    print(_table(steps))
    print(f"\nreports: {pages[0]} (contrastive), {pages[1]} (segmentation, all steps)")
    return results


def _train(cache: FeatureCache, out: Path, name: str, num_seeds: int, watch: Stopwatch) -> list[Training]:
    """The head of the segmentation stage, trained on a cache from nothing."""
    config = FINETUNE_RECIPES[RECIPE].segmentation
    assert config is not None
    runs = []
    for seed in range(num_seeds):
        seeded = dataclasses.replace(config, seed=seed, epochs=EPOCHS)
        run = watch.time(f"train on {name}, seed {seed}", lambda: api.train(seeded, cache, out / "runs"))  # noqa: B023
        print(run.summary())
        runs.append(run)
    return runs


def _score(name: str, runs: Sequence[Training], cache: FeatureCache, out: Path) -> Step:
    results = api.evaluate(list(runs), cache, out=out / "scores" / name.replace(" ", "-").replace(",", ""))
    metrics = [run["metrics"] for run in results["runs"]]
    return Step(name, [one["mean_iou"] for one in metrics], [one["overall_iou"] for one in metrics])


def _table(steps: Sequence[Step]) -> str:
    lines = [f"{'scenes/val, masks at original size':52}{'mean_iou':>10}{'spread':>10}{'overall_iou':>13}"]
    for step in steps:
        told = step.to_dict()
        spread = "-" if told["mean_iou_spread"] is None else f"{told['mean_iou_spread']:.3f}"
        lines.append(f"{step.name:52}{told['mean_iou']:>10.3f}{spread:>10}{told['overall_iou']:>13.3f}")
    return "\n".join(lines)
