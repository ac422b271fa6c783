"""The evaluate stage: trained heads over one split of a cache, to numbers, per-sample scores and a report.

Where several processes were started together (`accelerate launch`), each scores its share of the batches, the first
of them gathers and writes, and all return the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from tqdm import tqdm

from cache_schema import atomic
from cache_schema.errors import StoreMismatchError, UsageError
from cache_schema.features import FeatureCache
from evaluate.baselines import score_baselines
from evaluate.bootstrap import DEFAULT, bootstrap_intervals
from evaluate.coco_results import CocoFiles, Detection, check_coco_path, write_coco_results
from evaluate.examples import Scored, make_examples, make_several
from evaluate.metrics import Metrics, SampleScores, compute, slice_metrics, standard_tags
from evaluate.predictor import probabilities_in_image
from evaluate.protocols import ORIGINAL_SIZE, Protocol
from evaluate.report import write_report
from evaluate.report_inputs import RunReport
from evaluate.sample_table import TABLE, TableRun, write_sample_table
from evaluate.split_scores import BATCH_SIZE, score_split
from heads.checkpoint import load_head
from heads.data import CachedSplit, Draw
from heads.inputs import Head
from heads.runs import read_history, read_run_config


@dataclass(frozen=True)
class Evaluation:
    """One head on one split. `scores` is parallel to `samples`, rows of the samples store.

    `predicted_iou` is what the head expected of each mask, None for a head that expects nothing.
    """

    name: str
    run_dir: Path
    num_parameters: int
    head: Head
    samples: NDArray[np.int64]
    scores: SampleScores
    seconds: float
    predicted_iou: Float[np.ndarray, " S"] | None = None

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
    coco_results: Path | None = None,
    notes: Sequence[str] = (),
    seconds: Mapping[str, Any] | None = None,
    title: str = "headstart report",
) -> dict[str, Any]:
    """Score the best checkpoint of every run on a split; leave `results.json`, `samples.csv`, `report.html` in `out`.

    Every run that was trained on these very stores gets its own part of the results in its folder as well. A picture
    that is no longer there, or cannot be read, is left out of the report; the numbers do not need it.

    Args:
        coco_results: also write the masks of the only run there, at original size; see `write_coco_results`.
        notes: sentences a reader of the report must know.
        seconds: what earlier stages took, shown beside what evaluation took.

    Returns:
        The object that is written to results.json.

    Raises:
        UsageError: a folder holds no finished run, the split is unknown, or COCO results of several runs are wanted, or
            in a file that is not named .json.
        StoreMismatchError: a run was trained on features of other encoders.
    """
    if coco_results is not None and len(run_dirs) > 1:
        raise UsageError("COCO results are of one head: evaluate the runs one by one for that.")
    if coco_results is not None:
        check_coco_path(coco_results)
    out.mkdir(parents=True, exist_ok=True)
    evaluations = [evaluate_run(run_dir, cache, split, protocol) for run_dir in run_dirs]
    told: list[dict[str, Any] | None] = [None]
    accelerator = Accelerator()
    if accelerator.is_main_process:
        written = _Results(evaluations, cache, split, protocol)
        results = written.make(seconds or {})
        if coco_results is not None:
            files = write_evaluation_as_coco(coco_results, evaluations[0], cache, split, protocol)
            results["coco_results"] = {"results": str(files.results), "truth": str(files.truth)}
        written.write(out, results, notes, title)
        told = [results]
    if accelerator.num_processes > 1:
        broadcast_object_list(told)
    assert told[0] is not None
    return told[0]


class _Results:
    """What came of some runs on one split, and its files."""

    def __init__(self, evaluations: Sequence[Evaluation], cache: FeatureCache, split: str, protocol: Protocol) -> None:
        self._evaluations, self._cache, self._split, self._protocol = evaluations, cache, split, protocol
        self._labels = label_runs(evaluations)
        samples, self._rows = cache.samples.samples, evaluations[0].samples
        self._prompts = [samples.prompts[samples.prompt_rows[row]] for row in self._rows]
        self._tags = {name: [values[row] for row in self._rows] for name, values in samples.tags.items()}
        self._num_left_out = len(samples.rows_of_split(split)) - len(self._rows)

    def make(self, seconds: Mapping[str, Any]) -> dict[str, Any]:
        """The object of results.json."""
        labelled = list(zip(self._labels, self._evaluations, strict=True))
        images = self._cache.samples.samples.image_rows[self._rows]
        return {
            "runs": [
                {
                    "head": label,
                    "run_dir": str(evaluation.run_dir),
                    "metrics": evaluation.metrics,
                    "intervals": {
                        name: interval if interval is None else list(interval)
                        for name, interval in bootstrap_intervals(evaluation.scores, images).items()
                    },
                    "slices": slice_metrics(
                        evaluation.scores, {**self._tags, **standard_tags(evaluation.scores, self._prompts)}
                    ),
                }
                for label, evaluation in labelled
            ],
            "baselines": self._baselines(),
            "protocol": {**self._protocol.to_dict(), "dataset": self._cache.samples.dataset, "split": self._split},
            "bootstrap": DEFAULT.to_dict(num_images=len(np.unique(images))),
            "num_left_out": self._num_left_out,
            "provenance": {**self._cache.fingerprints, "split": self._split},
            "seconds": {
                **seconds,
                "evaluate": {label: round(evaluation.seconds, 3) for label, evaluation in labelled},
            },
        }

    def write(self, out: Path, results: Mapping[str, Any], notes: Sequence[str], title: str) -> None:
        """The files in `out`, and each run's own in its folder."""
        num = self._num_left_out
        left_out = [f"{num} samples are left out: their images could not be encoded."] if num else []
        tables = [
            TableRun(label, evaluation.samples, evaluation.scores, evaluation.predicted_iou)
            for label, evaluation in zip(self._labels, self._evaluations, strict=True)
        ]
        samples = self._cache.samples.samples
        atomic.write_json(out / "results.json", results)
        write_sample_table(out / TABLE, tables, samples)
        for entry, table, evaluation in zip(results["runs"], tables, self._evaluations, strict=True):
            own_stores = read_run_config(evaluation.run_dir)["stores"]
            if own_stores == self._cache.fingerprints and evaluation.run_dir.resolve() != out.resolve():
                atomic.write_json(evaluation.run_dir / "results.json", {**results, "runs": [entry]})
                write_sample_table(evaluation.run_dir / TABLE, [table], samples)
        write_report(out / "report.html", results, self._reports(), [*notes, *left_out], title)

    def _baselines(self) -> dict[str, Metrics]:
        samples = self._cache.samples.samples
        shown = tqdm(self._rows, desc=f"scoring baselines on {self._split}", unit="prompt", delay=1)
        return score_baselines(
            ((samples.targets[row], samples.size_of(row)) for row in shown),
            (samples.no_target[row] for row in self._rows),
            (samples.ignored[row] for row in self._rows) if samples.ignored else None,
            self._protocol,
        )

    def _reports(self) -> list[RunReport]:
        return [self._report(*named) for named in zip(self._labels, self._evaluations, strict=True)]

    def _report(self, label: str, evaluation: Evaluation) -> RunReport:
        def predict(rows: NDArray[np.int64]) -> dict[int, Bool[np.ndarray, "h w"]]:
            predicted = predict_rows(evaluation.head, self._cache, self._split, rows, self._protocol)
            return {row: said.mask for row, said in predicted.items()}

        scored = Scored(evaluation.samples, evaluation.scores)
        expected = evaluation.predicted_iou
        return RunReport(
            head=label,
            history=read_history(evaluation.run_dir),
            scores=evaluation.scores,
            prompts=self._prompts,
            tags=self._tags,
            examples=make_examples(self._cache.samples, scored, predict),
            num_parameters=evaluation.num_parameters,
            predicted_iou=None if expected is None else expected.tolist(),
            several=make_several(self._cache.samples, scored, predict),
        )


def evaluate_run(run_dir: Path, cache: FeatureCache, split: str, protocol: Protocol = ORIGINAL_SIZE) -> Evaluation:
    """Score the best checkpoint of one run on a split of a cache.

    Of several processes each scores its share, and all get the whole.

    Raises:
        UsageError: the folder holds no finished run, or the split is unknown.
        StoreMismatchError: the run was trained on features of other encoders.
    """
    started = time.perf_counter()
    if not (run_dir / "training.json").is_file():
        raise UsageError(f"{run_dir} is not trained to its end; run its `headstart train` again, or leave it out.")
    accelerator = Accelerator()
    spec, head = load_head(run_dir / "best")
    head = head.to(accelerator.device)
    _check_same_encoders(run_dir, cache)
    found = score_split(head, cache, split, accelerator, protocol, name=spec.head)
    return Evaluation(
        name=spec.head,
        head=head,
        run_dir=run_dir,
        num_parameters=sum(parameter.numel() for parameter in head.parameters()),
        samples=found.samples,
        scores=found.scores,
        seconds=time.perf_counter() - started,
        predicted_iou=found.predicted_iou,
    )


@dataclass(frozen=True)
class PredictedMask:
    """What a head says of one sample: a mask, and where it has them its no-target decision and the IoU it expects.

    `confidence` is the mean probability of the marked pixels, 0 where none is marked.
    """

    mask: Bool[np.ndarray, "h w"]
    no_target: bool | None = None
    iou: float | None = None
    confidence: float = 0.0


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
            probability = probabilities_in_image(logits, cache.images.views[view], samples.size_of(row))[0]
            mask = protocol.binarize(probability)
            yield (
                row,
                PredictedMask(
                    mask,
                    None if absent is None else bool(absent[place] > 0),
                    None if ious is None else float(ious[place]),
                    float(probability[mask].mean(dtype=np.float64)) if mask.any() else 0.0,
                ),
            )


def predict_rows(
    head: Head, cache: FeatureCache, split: str, rows: NDArray[np.int64], protocol: Protocol = ORIGINAL_SIZE
) -> dict[int, PredictedMask]:
    """What a head says of a few samples of a split, by their rows; see `predict_masks`."""
    if not len(rows):
        return {}
    data = CachedSplit(
        cache, split, None, head.layers, residency="disk", attention=head.attention, tokens=head.reads_tokens
    )
    return dict(predict_masks(head, cache, data, Draw.whole(rows).cut(BATCH_SIZE), protocol))


def write_evaluation_as_coco(
    path: Path, evaluation: Evaluation, cache: FeatureCache, split: str, protocol: Protocol = ORIGINAL_SIZE
) -> CocoFiles:
    """The masks of an evaluated run as COCO results with their truths, at original size; see `write_coco_results`.

    The score of a mask is the IoU that the head expects, or the mean probability of its pixels where it expects none.
    A head that says that there is no target marks nothing.

    Raises:
        UsageError: `path` is no name of a JSON file.
    """
    head = evaluation.head
    data = CachedSplit(
        cache, split, None, head.layers, residency="disk", attention=head.attention, tokens=head.reads_tokens
    )
    said = predict_masks(head, cache, data, data.in_order(BATCH_SIZE), protocol)
    shown = tqdm(said, desc=f"writing masks of {evaluation.name}", total=len(data), unit="prompt", delay=1)
    detections = (
        Detection(row, found.mask, found.confidence if found.iou is None else found.iou)
        for row, found in shown
        if not found.no_target
    )
    return write_coco_results(path, detections, cache.samples.samples, evaluation.samples.tolist())


def label_runs(evaluations: Sequence[Evaluation]) -> list[str]:
    """What each run is called, each otherwise: its head, or its folder where two runs are of one head.

    Folders of one name have their parent's behind it; where that is the same too, all runs have their number.
    """
    names = [evaluation.name for evaluation in evaluations]
    if _differ(names):
        return names
    folders = [evaluation.run_dir.absolute() for evaluation in evaluations]
    names = [folder.name for folder in folders]
    names = [
        name if names.count(name) == 1 else f"{name} ({folder.parent.name})"
        for name, folder in zip(names, folders, strict=True)
    ]
    return names if _differ(names) else [f"{name}-{number}" for number, name in enumerate(names, start=1)]


def _differ(names: Sequence[str]) -> bool:
    return len(set(names)) == len(names)


def _check_same_encoders(run_dir: Path, cache: FeatureCache) -> None:
    """Features of other encoders have other meanings, even where their shapes agree."""
    trained_on = read_run_config(run_dir)["encoder_fingerprints"]
    if trained_on != cache.encoder_fingerprints:
        sides = [side for side, digest in cache.encoder_fingerprints.items() if trained_on.get(side) != digest]
        raise StoreMismatchError(
            f"{run_dir} was trained on features of another {' and '.join(sides)} encoder than this cache holds. "
            "Name the stores it was trained on, or train on these."
        )
