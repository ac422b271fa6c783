"""The scores of one head on one split of a cache, a batch at a time, shared among the processes that were started."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from tqdm import tqdm

from cache_schema.features import FeatureCache
from cache_schema.reader import default_threads
from evaluate.metrics import SampleScores, State, update
from evaluate.protocols import ORIGINAL_SIZE, Protocol
from evaluate.scoring import ScoringBatch, Truth, score_batch, scoring_threads
from heads.data import CachedSplit, Draw
from heads.inputs import Head

BATCH_SIZE = 64


@dataclass(frozen=True, eq=False)
class SplitScores:
    """S samples by their rows in the samples store, their scores, and the IoU that the head expected, if it does."""

    samples: NDArray[np.int64]
    scores: SampleScores
    predicted_iou: NDArray[np.float64] | None

    @classmethod
    def join(cls, parts: Sequence[SplitScores]) -> SplitScores:
        """One after the other. A part without a sample cannot say whether the head expects an IoU."""
        expected = [part.predicted_iou for part in parts if part.predicted_iou is not None]
        return cls(
            np.concatenate([part.samples for part in parts]),
            SampleScores.concatenate([part.scores for part in parts]),
            np.concatenate(expected) if expected else None,
        )

    def in_order_of(self, samples: NDArray[np.int64]) -> SplitScores:
        """The same in the order of these rows, which are its own."""
        order = np.argsort(self.samples)[np.argsort(np.argsort(samples))]
        expected = self.predicted_iou
        return SplitScores(samples, self.scores.take(order), None if expected is None else expected[order])


def score_split(
    head: Head,
    cache: FeatureCache,
    split: str,
    accelerator: Accelerator,
    protocol: Protocol = ORIGINAL_SIZE,
    *,
    name: str = "",
) -> SplitScores:
    """Score every usable sample of a split, those of one image side by side.

    Each process scores every so manyth batch, and all get the whole, in the same order as one process alone.

    Args:
        head: on the accelerator's device.
        name: what the progress bar calls it.

    Raises:
        UsageError: the split is unknown, or a sample has no mask.
    """
    data = CachedSplit(
        cache, split, None, head.layers, device=accelerator.device, attention=head.attention, tokens=head.reads_tokens
    )
    draws = data.in_order(BATCH_SIZE)
    mine = draws[accelerator.process_index :: accelerator.num_processes]
    num = sum(len(draw.samples) for draw in mine)
    quiet = not accelerator.is_main_process
    with tqdm(total=num, desc=f"evaluating {name} on {split}", unit="prompt", disable=quiet) as bar:
        parts = [_score(head, cache, data, mine, protocol, bar)]
    if accelerator.num_processes > 1:
        parts = gather_object(parts)
    return SplitScores.join(parts).in_order_of(np.concatenate([draw.samples for draw in draws]))


def _score(
    head: Head, cache: FeatureCache, data: CachedSplit, draws: Sequence[Draw], protocol: Protocol, bar: tqdm[Any]
) -> SplitScores:
    device, samples = next(head.parameters()).device, cache.samples.samples
    state: State = ()
    expected = []
    # Processes of one machine share its cores.
    num_threads = max(1, default_threads() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    with scoring_threads(num_threads) as pool:
        for draw, batch in zip(draws, data.batches(draws), strict=True):
            with torch.inference_mode():
                outputs = head(batch.inputs.to(device))
            absent = outputs.no_target_logits
            views = cache.image_rows[samples.image_rows[draw.samples]] + draw.views
            scores = score_batch(
                ScoringBatch(
                    outputs.mask_logits,
                    [cache.images.views[view] for view in views.tolist()],
                    [Truth.of(samples, row) for row in draw.samples.tolist()],
                    None if absent is None else (absent > 0).cpu().numpy(),
                ),
                pool,
                protocol,
            )
            state = update(state, scores)
            if outputs.iou is not None:
                expected.append(outputs.iou.double().cpu().numpy())
            bar.update(len(draw.samples))
    rows = np.concatenate([np.empty(0, np.int64), *(draw.samples for draw in draws)])
    return SplitScores(rows, SampleScores.concatenate(state), np.concatenate(expected) if expected else None)
