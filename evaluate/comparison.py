"""Two runs on the same samples: how every metric differs, how sure that is, and which samples changed.

Each run is scored on features of its own encoders; images, prompts and truths must be the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from jaxtyping import Bool, Float, Int64

from cache_schema import atomic
from cache_schema.errors import StoreMismatchError
from cache_schema.features import FeatureCache
from evaluate.bootstrap import DEFAULT, paired_differences
from evaluate.comparison_page import ChangedSample, write_comparison_page
from evaluate.evaluation import Evaluation, evaluate_run, label_runs, predict_rows
from evaluate.examples import open_image_of
from evaluate.metrics import slice_metrics, standard_tags
from evaluate.protocols import ORIGINAL_SIZE, Protocol
from evaluate.sample_table import TABLE, TableRun, write_sample_table

RESULTS, PAGE = "comparison.json", "comparison.html"

_NUM_LISTED = 20
_NUM_SHOWN = 6


def compare_runs(
    first: Path,
    second: Path,
    caches: tuple[FeatureCache, FeatureCache],
    out: Path,
    *,
    split: str = "val",
    protocol: Protocol = ORIGINAL_SIZE,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Score two runs on a split; leave `comparison.json`, `comparison.html` and `samples.csv` in `out`.

    Args:
        caches: what each is scored on, over one samples store.
        notes: sentences a reader must know.

    Returns:
        The object of comparison.json: `runs` (their metrics), `differences` (second - first of each metric, see
        `Difference`), `samples` (how many were won and lost by the second, and the most changed), `slices`.

    Raises:
        UsageError: a folder holds no finished run, or the split is unknown.
        StoreMismatchError: the runs were not scored on the same samples, or one on features of other encoders.
    """
    _require_same_samples(caches, split)
    evaluations = [
        evaluate_run(run, cache, split, protocol) for run, cache in zip((first, second), caches, strict=True)
    ]
    told: list[dict[str, Any] | None] = [None]
    accelerator = Accelerator()
    if accelerator.is_main_process:
        told = [_Comparison(evaluations, caches, split, protocol).write(out, notes)]
    if accelerator.num_processes > 1:
        broadcast_object_list(told)
    assert told[0] is not None
    return told[0]


def _require_same_samples(caches: tuple[FeatureCache, FeatureCache], split: str) -> None:
    first, second = caches
    if first.samples.fingerprint != second.samples.fingerprint:
        raise StoreMismatchError(
            f"the runs are of other samples: {first.samples.path} and {second.samples.path}. Compare runs that were "
            "trained on one samples store, or name the stores to score both on."
        )
    lacking = np.setxor1d(first.usable_samples(split), second.usable_samples(split))
    if len(lacking):
        raise StoreMismatchError(
            f"{len(lacking)} samples of {split} have image features in one store only; extract again where images "
            "failed, so that both runs are scored on the same samples."
        )


class _Comparison:
    """Two evaluations of the same samples, brought into one order."""

    def __init__(
        self,
        evaluations: Sequence[Evaluation],
        caches: tuple[FeatureCache, FeatureCache],
        split: str,
        protocol: Protocol,
    ) -> None:
        self._evaluations, self._caches, self._split, self._protocol = evaluations, caches, split, protocol
        self._labels = label_runs(evaluations)
        self._store = caches[0].samples
        self._rows = np.sort(evaluations[0].samples)
        orders = [np.argsort(evaluation.samples) for evaluation in evaluations]
        self._scores = [one.scores.take(order) for one, order in zip(evaluations, orders, strict=True)]
        self._expected = [
            None if one.predicted_iou is None else one.predicted_iou[order]
            for one, order in zip(evaluations, orders, strict=True)
        ]
        self._ious = [scores.iou for scores in self._scores]
        samples = self._store.samples
        self._prompts = [samples.prompts[row] for row in samples.prompt_rows[self._rows]]

    @property
    def _change(self) -> Float[np.ndarray, " S"]:
        return self._ious[1] - self._ious[0]

    def write(self, out: Path, notes: Sequence[str]) -> dict[str, Any]:
        """Write the files, and return the object of comparison.json."""
        results = self._results()
        tables = [
            TableRun(label, self._rows, scores, expected)
            for label, scores, expected in zip(self._labels, self._scores, self._expected, strict=True)
        ]
        out.mkdir(parents=True, exist_ok=True)
        atomic.write_json(out / RESULTS, results)
        write_sample_table(out / TABLE, tables, self._store.samples)
        write_comparison_page(out / PAGE, results, self._change, self._changed_samples(), notes)
        return results

    def _results(self) -> dict[str, Any]:
        images = self._store.samples.image_rows[self._rows]
        first, second = self._scores
        differences = paired_differences(first, second, images)
        return {
            "runs": [
                {"head": label, "run_dir": str(evaluation.run_dir), "metrics": evaluation.metrics}
                for label, evaluation in zip(self._labels, self._evaluations, strict=True)
            ],
            "differences": {name: asdict(difference) for name, difference in differences.items()},
            "samples": self._counts(),
            "slices": self._slices(),
            "protocol": {**self._protocol.to_dict(), "dataset": self._store.dataset, "split": self._split},
            "bootstrap": DEFAULT.to_dict(num_images=len(np.unique(images))),
            "provenance": {
                "first": self._caches[0].fingerprints,
                "second": self._caches[1].fingerprints,
                "split": self._split,
            },
        }

    def _counts(self) -> dict[str, Any]:
        change = self._change
        reached = [scores.intersection_px * 2 >= scores.union_px for scores in self._scores]
        return {
            "num": len(change),
            "won": int(np.count_nonzero(change > 0)),
            "lost": int(np.count_nonzero(change < 0)),
            "same": int(np.count_nonzero(change == 0)),
            "reached_0.5": int(np.count_nonzero(reached[1] & ~reached[0])),
            "fell_below_0.5": int(np.count_nonzero(reached[0] & ~reached[1])),
            "most_won": [self._told(place) for place in self._most_changed(won=True)[:_NUM_LISTED].tolist()],
            "most_lost": [self._told(place) for place in self._most_changed(won=False)[:_NUM_LISTED].tolist()],
        }

    def _most_changed(self, *, won: bool) -> Int64[np.ndarray, " C"]:
        """The samples that were won, or lost, from the most changed to the least."""
        change = self._change if won else -self._change
        return np.argsort(-change, kind="stable")[: np.count_nonzero(change > 0)]

    def _told(self, place: int) -> dict[str, Any]:
        samples, row = self._store.samples, int(self._rows[place])
        return {
            "id": samples.ids[row],
            "image": samples.images.ids[samples.image_rows[row]],
            "prompt": self._prompts[place],
            "iou": [float(iou[place]) for iou in self._ious],
        }

    def _slices(self) -> dict[str, dict[str, dict[str, Any]]]:
        samples = self._store.samples
        tags = {name: [values[row] for row in self._rows] for name, values in samples.tags.items()}
        tags |= standard_tags(self._scores[0], self._prompts)
        first, second = (slice_metrics(scores, tags) for scores in self._scores)
        return {
            tag: {
                value: {
                    "num_samples": metrics["num_samples"],
                    "mean_iou": [metrics["mean_iou"], second[tag][value]["mean_iou"]],
                }
                for value, metrics in values.items()
            }
            for tag, values in first.items()
        }

    def _changed_samples(self) -> list[ChangedSample]:
        """Those to look at, each of another image; one whose picture is gone is left out."""
        places = [place for won in (True, False) for place in self._of_other_images(self._most_changed(won=won))]
        masks = [self._masks(run, self._rows[places]) for run in (0, 1)]
        found, samples = [], self._store.samples
        for place in places:
            row = int(self._rows[place])
            image = open_image_of(self._store, row)
            if image is not None:
                found.append(
                    ChangedSample(
                        image=image,
                        truth=samples.target(row),
                        predicted=(masks[0][row], masks[1][row]),
                        iou=(float(self._ious[0][place]), float(self._ious[1][place])),
                        prompt=self._prompts[place],
                        sample_id=samples.ids[row],
                    )
                )
        return found

    def _of_other_images(self, places: Int64[np.ndarray, " C"]) -> list[int]:
        seen: dict[int, int] = {}
        for place in places.tolist():
            seen.setdefault(int(self._store.samples.image_rows[self._rows[place]]), place)
            if len(seen) == _NUM_SHOWN:
                break
        return list(seen.values())

    def _masks(self, run: int, rows: Int64[np.ndarray, " T"]) -> Mapping[int, Bool[np.ndarray, "h w"]]:
        evaluation = self._evaluations[run]
        said = predict_rows(evaluation.head, self._caches[run], self._split, rows, self._protocol)
        return {row: predicted.mask for row, predicted in said.items()}
