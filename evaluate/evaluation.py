"""The evaluate stage: trained heads over one split of a cache, to numbers, per-sample scores and a report."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from tqdm import tqdm

from cache_schema import atomic
from cache_schema.errors import StoreMismatchError, UsageError
from cache_schema.features import FeatureCache
from evaluate.baselines import score_baselines
from evaluate.metrics import (
    ORIGINAL_SIZE,
    Metrics,
    Protocol,
    SampleScores,
    State,
    compute,
    score_mask,
    slice_metrics,
    standard_tags,
    update,
)
from evaluate.predictor import open_image
from evaluate.report import Example, Group, RunReport, write_report
from extract.job import pick_device
from heads.checkpoint import load_head
from heads.data import CachedSplit, prefetch
from heads.inputs import Head
from heads.losses import resize_logits

BATCH_SIZE = 64
_EXAMPLES_OF_GROUP = 4


@dataclass(frozen=True)
class Evaluation:
    """One head on one split. `scores` is parallel to `samples`, rows of the samples store."""

    head: str
    run_dir: Path
    num_parameters: int
    samples: NDArray[np.int64]
    scores: SampleScores
    seconds: float

    @property
    def metrics(self) -> Metrics:
        return compute((self.scores,))


def evaluate_runs(
    run_dirs: Sequence[Path],
    cache: FeatureCache,
    out: Path,
    *,
    split: str = "val",
    protocol: Protocol = ORIGINAL_SIZE,
    notes: Sequence[str] = (),
    seconds: Mapping[str, Any] | None = None,
    title: str = "headstart report",
) -> dict[str, Any]:
    """Score the best checkpoint of every run on a split, and leave `results.json` and `report.html` under `out`.

    Args:
        notes: sentences a reader of the report must know.
        seconds: what earlier stages took, shown beside what evaluation took.

    Returns:
        The object that is written to results.json.

    Raises:
        UsageError: a folder holds no trained head, or the split is unknown.
        StoreMismatchError: a run was trained on features of other encoders.
    """
    evaluations = [evaluate_run(run_dir, cache, split, protocol) for run_dir in run_dirs]
    samples = cache.samples.samples
    rows = evaluations[0].samples
    shown = tqdm(rows, desc=f"scoring baselines on {split}", unit="prompt", delay=1)
    baselines = score_baselines(
        ((samples.targets[row], samples.size_of(row)) for row in shown), (samples.no_target[row] for row in rows)
    )
    prompts = [samples.prompts[samples.prompt_rows[row]] for row in rows]
    tags = {name: [values[row] for row in rows] for name, values in samples.tags.items()}
    results: dict[str, Any] = {
        "runs": [
            {
                "head": evaluation.head,
                "run_dir": str(evaluation.run_dir),
                "metrics": evaluation.metrics,
                "slices": slice_metrics(evaluation.scores, {**tags, **standard_tags(evaluation.scores, prompts)}),
            }
            for evaluation in evaluations
        ],
        "baselines": baselines,
        "protocol": {**protocol.to_dict(), "dataset": cache.samples.dataset, "split": split},
        "provenance": {**cache.fingerprints, "split": split},
        "seconds": {**(seconds or {}), "evaluate": {e.head: round(e.seconds, 3) for e in evaluations}},
    }
    reports = [
        RunReport(
            head=evaluation.head,
            history=_read_history(evaluation.run_dir),
            scores=evaluation.scores,
            prompts=prompts,
            tags=tags,
            examples=list(_examples(evaluation, cache, split, protocol)),
            num_parameters=evaluation.num_parameters,
        )
        for evaluation in evaluations
    ]
    atomic.write_json(out / "results.json", results)
    write_report(out / "report.html", results, reports, notes, title)
    for entry, evaluation in zip(results["runs"], evaluations, strict=True):
        atomic.write_json(evaluation.run_dir / "results.json", {**results, "runs": [entry]})
    return results


def evaluate_run(run_dir: Path, cache: FeatureCache, split: str, protocol: Protocol = ORIGINAL_SIZE) -> Evaluation:
    """Score the best checkpoint of one run on a split of a cache."""
    started = time.perf_counter()
    spec, head = load_head(run_dir / "best")
    head = head.to(pick_device())
    _check_same_encoders(run_dir, cache)
    samples = cache.samples.samples
    data = CachedSplit(cache, split, (1, 1), head.layers)
    state: State = ()
    rows = []
    bar = tqdm(total=len(data), desc=f"evaluating {spec.head} on {split}", unit="prompt")
    for row, mask in predict_masks(head, cache, data, data.in_order(BATCH_SIZE), protocol):
        truth = samples.target(row)
        state = update(state, score_mask(mask, truth, no_target=samples.no_target[row], protocol=protocol))
        rows.append(row)
        bar.update()
    bar.close()
    return Evaluation(
        head=spec.head,
        run_dir=run_dir,
        num_parameters=sum(parameter.numel() for parameter in head.parameters()),
        samples=np.array(rows, np.int64),
        scores=SampleScores.concatenate(state),
        seconds=time.perf_counter() - started,
    )


def predict_masks(
    head: Head,
    cache: FeatureCache,
    data: CachedSplit,
    batches: Sequence[NDArray[np.int64]],
    protocol: Protocol = ORIGINAL_SIZE,
) -> Iterator[tuple[int, Bool[np.ndarray, "h w"]]]:
    """Each sample's row and the head's mask for it, (H, W) at the image's original size."""
    device = next(head.parameters()).device
    for batch in prefetch(data.load(samples) for samples in batches):
        with torch.inference_mode():
            logits = head(batch.inputs.to(device)).mask_logits.float()
        for row, prompt_logits in zip(batch.samples.tolist(), logits, strict=True):
            resized = resize_logits(prompt_logits[None], cache.samples.samples.size_of(row))[0]
            yield row, protocol.binarize(resized.sigmoid().cpu().numpy())


def _check_same_encoders(run_dir: Path, cache: FeatureCache) -> None:
    """Features of other encoders have other meanings, even where their shapes agree."""
    try:
        trained_on = json.loads((run_dir / "config.json").read_bytes())["encoder_fingerprints"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{run_dir} is not a run folder: it has no readable config.json.") from error
    if trained_on != cache.encoder_fingerprints:
        sides = [side for side, digest in cache.encoder_fingerprints.items() if trained_on.get(side) != digest]
        raise StoreMismatchError(
            f"{run_dir} was trained on features of another {' and '.join(sides)} encoder than this cache holds. "
            "Name the stores it was trained on, or train on these."
        )


def _read_history(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _examples(evaluation: Evaluation, cache: FeatureCache, split: str, protocol: Protocol) -> Iterator[Example]:
    """Best, median and worst samples with a target, each from another image, with the pictures to show them."""
    samples = cache.samples.samples
    order = np.argsort(evaluation.scores.iou, kind="stable")
    order = order[~evaluation.scores.no_target[order]]
    middle = len(order) // 2
    from_median = order[np.argsort(np.abs(np.arange(len(order)) - middle), kind="stable")]
    chosen: list[tuple[int, Group]] = []
    seen: set[int] = set()
    groups: list[tuple[Group, NDArray[np.int64]]] = [("best", order[::-1]), ("worst", order), ("median", from_median)]
    for group, candidates in groups:
        taken = 0
        for place in candidates.tolist():
            image = int(samples.image_rows[evaluation.samples[place]])
            if image not in seen and taken < _EXAMPLES_OF_GROUP:
                seen.add(image)
                chosen.append((place, group))
                taken += 1
    _, head = load_head(evaluation.run_dir / "best")
    data = CachedSplit(cache, split, (1, 1), head.layers, residency="disk")
    rows = evaluation.samples[[place for place, _ in chosen]]
    masks = dict(predict_masks(head, cache, data, [rows], protocol)) if len(rows) else {}
    for place, group in chosen:
        row = int(evaluation.samples[place])
        yield Example(
            image=open_image(cache.samples.image_dir / samples.images.paths[samples.image_rows[row]]),
            truth=samples.target(row),
            predicted=masks[row],
            prompt=samples.prompts[samples.prompt_rows[row]],
            iou=float(evaluation.scores.iou[place]),
            group=group,
            tags={name: values[row] for name, values in samples.tags.items()},
        )
