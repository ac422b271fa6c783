"""The evaluate stage: trained heads over one split of a cache, to numbers, per-sample scores and a report."""

from __future__ import annotations

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
from evaluate.predictor import open_image, probabilities_in_image
from evaluate.report import Example, Group, RunReport, write_report
from extract.job import pick_device
from heads.checkpoint import load_head
from heads.data import CachedSplit, Draw
from heads.inputs import Head
from heads.runs import read_history, read_run_config

BATCH_SIZE = 64
_EXAMPLES_OF_GROUP = 4


@dataclass(frozen=True)
class Evaluation:
    """One head on one split. `scores` is parallel to `samples`, rows of the samples store."""

    name: str
    run_dir: Path
    num_parameters: int
    head: Head
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

    Every run that was trained on these very stores gets its own part of the results in its folder as well. A picture
    that is no longer there is left out of the report; the numbers do not need it.

    Args:
        notes: sentences a reader of the report must know.
        seconds: what earlier stages took, shown beside what evaluation took.

    Returns:
        The object that is written to results.json.

    Raises:
        UsageError: a folder holds no finished run, or the split is unknown.
        StoreMismatchError: a run was trained on features of other encoders.
    """
    out.mkdir(parents=True, exist_ok=True)
    evaluations = [evaluate_run(run_dir, cache, split, protocol) for run_dir in run_dirs]
    labels = _labels(evaluations)
    num_left_out = len(cache.samples.samples.rows_of_split(split)) - len(evaluations[0].samples)
    notes = [
        *notes,
        *([f"{num_left_out} samples are left out: their images could not be encoded."] if num_left_out else []),
    ]
    samples = cache.samples.samples
    rows = evaluations[0].samples
    shown = tqdm(rows, desc=f"scoring baselines on {split}", unit="prompt", delay=1)
    baselines = score_baselines(
        ((samples.targets[row], samples.size_of(row)) for row in shown),
        (samples.no_target[row] for row in rows),
        (samples.ignored[row] for row in rows) if samples.ignored else None,
    )
    prompts = [samples.prompts[samples.prompt_rows[row]] for row in rows]
    tags = {name: [values[row] for row in rows] for name, values in samples.tags.items()}
    results: dict[str, Any] = {
        "runs": [
            {
                "head": label,
                "run_dir": str(evaluation.run_dir),
                "metrics": evaluation.metrics,
                "slices": slice_metrics(evaluation.scores, {**tags, **standard_tags(evaluation.scores, prompts)}),
            }
            for label, evaluation in zip(labels, evaluations, strict=True)
        ],
        "baselines": baselines,
        "protocol": {**protocol.to_dict(), "dataset": cache.samples.dataset, "split": split},
        "num_left_out": num_left_out,
        "provenance": {**cache.fingerprints, "split": split},
        "seconds": {
            **(seconds or {}),
            "evaluate": {label: round(e.seconds, 3) for label, e in zip(labels, evaluations, strict=True)},
        },
    }
    reports = [
        RunReport(
            head=label,
            history=read_history(evaluation.run_dir),
            scores=evaluation.scores,
            prompts=prompts,
            tags=tags,
            examples=list(_examples(evaluation, cache, split, protocol)),
            num_parameters=evaluation.num_parameters,
        )
        for label, evaluation in zip(labels, evaluations, strict=True)
    ]
    atomic.write_json(out / "results.json", results)
    write_report(out / "report.html", results, reports, notes, title)
    for entry, evaluation in zip(results["runs"], evaluations, strict=True):
        own_stores = read_run_config(evaluation.run_dir)["stores"]
        if own_stores == cache.fingerprints and evaluation.run_dir.resolve() != out.resolve():
            atomic.write_json(evaluation.run_dir / "results.json", {**results, "runs": [entry]})
    return results


def _labels(evaluations: Sequence[Evaluation]) -> list[str]:
    """What each run is called: its head, or its folder where two runs are of one head."""
    names = [evaluation.name for evaluation in evaluations]
    return names if len(set(names)) == len(names) else [evaluation.run_dir.name for evaluation in evaluations]


def evaluate_run(run_dir: Path, cache: FeatureCache, split: str, protocol: Protocol = ORIGINAL_SIZE) -> Evaluation:
    """Score the best checkpoint of one run on a split of a cache."""
    started = time.perf_counter()
    if not (run_dir / "training.json").is_file():
        raise UsageError(f"{run_dir} is not trained to its end; run its `headstart train` again, or leave it out.")
    spec, head = load_head(run_dir / "best")
    head = head.to(pick_device())
    _check_same_encoders(run_dir, cache)
    samples = cache.samples.samples
    data = CachedSplit(
        cache, split, None, head.layers, device=pick_device(), attention=head.attention, tokens=head.reads_tokens
    )
    state: State = ()
    rows = []
    bar = tqdm(total=len(data), desc=f"evaluating {spec.head} on {split}", unit="prompt")
    for row, predicted in predict_masks(head, cache, data, data.in_order(BATCH_SIZE), protocol):
        mask, truth, ignored = predicted.mask, samples.target(row), samples.ignored_pixels(row)
        if ignored is not None:
            mask, truth = mask & ~ignored, truth & ~ignored
        scores = score_mask(
            mask,
            truth,
            no_target=samples.no_target[row],
            predicted_no_target=predicted.no_target,
            protocol=protocol,
        )
        state = update(state, scores)
        rows.append(row)
        bar.update()
    bar.close()
    return Evaluation(
        name=spec.head,
        head=head,
        run_dir=run_dir,
        num_parameters=sum(parameter.numel() for parameter in head.parameters()),
        samples=np.array(rows, np.int64),
        scores=SampleScores.concatenate(state),
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True)
class PredictedMask:
    """What a head says of one sample: a mask, and where it has them its no-target decision and the IoU it expects."""

    mask: Bool[np.ndarray, "h w"]
    no_target: bool | None = None
    iou: float | None = None


def predict_masks(
    head: Head,
    cache: FeatureCache,
    data: CachedSplit,
    batches: Sequence[Draw],
    protocol: Protocol = ORIGINAL_SIZE,
) -> Iterator[tuple[int, PredictedMask]]:
    """Each sample's row and what the head says of it, the mask (H, W) at the image's original size.

    A head says nothing of what the view of an image does not show; it is not marked.
    """
    device, samples = next(head.parameters()).device, cache.samples.samples
    for draw, batch in zip(batches, data.batches(batches), strict=True):
        with torch.inference_mode():
            outputs = head(batch.inputs.to(device))
        absent, ious = outputs.no_target_logits, outputs.iou
        views = cache.image_rows[samples.image_rows[draw.samples]] + draw.views
        for place, (row, view) in enumerate(zip(draw.samples.tolist(), views.tolist(), strict=True)):
            logits = outputs.mask_logits[place : place + 1]
            probability = probabilities_in_image(logits, cache.images.views[view], samples.size_of(row))
            yield (
                row,
                PredictedMask(
                    protocol.binarize(probability[0]),
                    None if absent is None else bool(absent[place] > 0),
                    None if ious is None else float(ious[place]),
                ),
            )


def _check_same_encoders(run_dir: Path, cache: FeatureCache) -> None:
    """Features of other encoders have other meanings, even where their shapes agree."""
    trained_on = read_run_config(run_dir)["encoder_fingerprints"]
    if trained_on != cache.encoder_fingerprints:
        sides = [side for side, digest in cache.encoder_fingerprints.items() if trained_on.get(side) != digest]
        raise StoreMismatchError(
            f"{run_dir} was trained on features of another {' and '.join(sides)} encoder than this cache holds. "
            "Name the stores it was trained on, or train on these."
        )


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
    head = evaluation.head
    data = CachedSplit(cache, split, None, head.layers, residency="disk", attention=head.attention)
    rows = evaluation.samples[[place for place, _ in chosen]]
    masks = dict(predict_masks(head, cache, data, [Draw.whole(rows)], protocol)) if len(rows) else {}
    for place, group in chosen:
        row = int(evaluation.samples[place])
        image_dir = cache.samples.image_dir
        path = None if image_dir is None else image_dir / samples.images.paths[samples.image_rows[row]]
        if path is None or not path.is_file():
            continue
        yield Example(
            image=open_image(path),
            truth=samples.target(row),
            predicted=masks[row].mask,
            prompt=samples.prompts[samples.prompt_rows[row]],
            iou=float(evaluation.scores.iou[place]),
            group=group,
            tags={name: values[row] for name, values in samples.tags.items()},
        )
