"""The table of single samples: a CSV file with one line for each sample of each head, beside the results.

Names in it are data. A spreadsheet would take one that begins like a formula for a formula, and could be made to send
what it holds elsewhere; so such a text, and one that begins with an apostrophe, gets an apostrophe in front, which
spreadsheets do not show. Whoever reads the file by a program takes one apostrophe off again.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from cache_schema import atomic
from cache_schema.samples import Samples
from evaluate.metrics import SampleScores, standard_tags

TABLE = "samples.csv"

COLUMNS = (
    "head",
    "id",
    "image",
    "prompt",
    "iou",
    "predicted_iou",
    "intersection_px",
    "union_px",
    "predicted_px",
    "target_px",
    "area_px",
    "no_target",
    "predicted_no_target",
    "prompt_length",
    "object_size",
)
"""Those before one column `tag:<name>` for each tag of the dataset."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What a text must not begin with. The last four are the first four in full width."""


@dataclass(frozen=True, slots=True, eq=False)
class TableRun:
    """One head's part of the table: S samples by their rows in the samples store, and what is said of each."""

    head: str
    rows: Int64[np.ndarray, " S"]
    scores: SampleScores
    predicted_iou: Float[np.ndarray, " S"] | None = None


def write_sample_table(path: Path, runs: Sequence[TableRun], samples: Samples) -> None:
    """Write the table of some heads, in UTF-8 as RFC 4180 says: a header of `COLUMNS` and tags, then line by line.

    `no_target` and `predicted_no_target` are 0 or 1, `iou` is written to the last digit, and a cell is empty where
    there is nothing to say.
    """
    tags = sorted(samples.tags)
    with atomic.staged(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS, *(guard_text(f"tag:{name}") for name in tags)])
        for run in runs:
            writer.writerows(_lines(run, samples, tags))


def guard_text(text: str) -> str:
    """A text that no spreadsheet takes for a formula.

    >>> guard_text("=1+1"), guard_text("'tis"), guard_text("the dog")
    ("'=1+1", "''tis", 'the dog')
    """
    return f"'{text}" if text.startswith(("'", *_FORMULA)) else text


def _lines(run: TableRun, samples: Samples, tags: Sequence[str]) -> Iterator[list[Any]]:
    scores, iou = run.scores, run.scores.iou.tolist()
    prompts = [samples.prompts[row] for row in samples.prompt_rows[run.rows]]
    standard = standard_tags(scores, prompts)
    for place, row in enumerate(run.rows.tolist()):
        yield [
            guard_text(run.head),
            guard_text(samples.ids[row]),
            guard_text(samples.images.ids[samples.image_rows[row]]),
            guard_text(prompts[place]),
            iou[place],
            "" if run.predicted_iou is None else float(run.predicted_iou[place]),
            int(scores.intersection_px[place]),
            int(scores.union_px[place]),
            int(scores.predicted_px[place]),
            int(scores.target_px[place]),
            int(scores.area_px[place]),
            int(scores.no_target[place]),
            int(scores.predicted_no_target[place]),
            standard["prompt_length"][place] or "",
            standard["object_size"][place],
            *(guard_text(samples.tags[name][row] or "") for name in tags),
        ]
