"""How often the pixels of one class are taken for another, and the scores of semantic segmentation that follow.

Counts are whole numbers, so neither the order of images nor the way they are shared out among processes can change a
result. Knows nothing of classes' names, datasets or files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer

from cache_schema.errors import UsageError
from evaluate.metrics import Metrics


@dataclass(frozen=True)
class ClassScores:
    """What one class is worth.

    Args:
        index: the class's number.
        iou: pixels that are of the class and were said to be, over those of which either holds; None where there are
            none.
        accuracy: the same pixels over those that are of the class; None where no pixel is.
        truth_px, predicted_px: how many pixels are of the class, and were said to be.
    """

    index: int
    iou: float | None
    accuracy: float | None
    truth_px: int
    predicted_px: int


class ConfusionMatrix:
    """Counts of pixels by true and predicted class, gathered image by image.

    Args:
        num_classes: classes are numbered from 0 on.
        ignored: the number that the truth gives to pixels that do not count. What is predicted there plays no part.

    Raises:
        ValueError: there is no class, or `ignored` is the number of a class.
    """

    def __init__(self, num_classes: int, ignored: int = 255) -> None:
        if num_classes < 1:
            raise ValueError(f"there must be at least one class; got {num_classes}")
        if 0 <= ignored < num_classes:
            raise ValueError(f"ignored pixels are numbered {ignored}, which is one of {num_classes} classes")
        self.num_classes = num_classes
        self.ignored = ignored
        self._counts = np.zeros((num_classes, num_classes), np.int64)

    @property
    def counts(self) -> Int64[np.ndarray, "c c"]:
        """How many pixels of each true class (rows) were said to be of each class (columns); a copy."""
        return self._counts.copy()

    def update(self, predicted: Integer[np.ndarray, "*axes"], truth: Integer[np.ndarray, "*axes"]) -> None:
        """Count the pixels of an image, or of several.

        Args:
            predicted: the class of each pixel; any number where the truth is `ignored`.
            truth: the same, or `ignored`.

        Raises:
            ValueError: the two differ in shape, or hold a number that is no class. Nothing is counted then.
        """
        if predicted.shape != truth.shape:
            raise ValueError(f"the prediction is {predicted.shape} and the truth {truth.shape}: resize the prediction")
        counted = truth != self.ignored
        rows, columns = truth[counted].astype(np.int64), predicted[counted].astype(np.int64)
        for name, classes in (("truth", rows), ("prediction", columns)):
            if classes.size and not (classes.min() >= 0 and classes.max() < self.num_classes):
                strange = np.setdiff1d(classes, np.arange(self.num_classes))
                raise ValueError(f"the {name} holds {strange[:8].tolist()}: classes are 0 to {self.num_classes - 1}")
        pairs = np.bincount(rows * self.num_classes + columns, minlength=self.num_classes**2)
        self._counts += pairs.reshape(self._counts.shape)

    def __add__(self, other: ConfusionMatrix) -> ConfusionMatrix:
        """The counts of both, as those of two processes.

        Raises:
            ValueError: they count other classes, or ignore another number.
        """
        ours, theirs = ((matrix.num_classes, matrix.ignored) for matrix in (self, other))
        if ours != theirs:
            raise ValueError(f"matrices of (classes, ignored number) {ours} and {theirs} cannot be added")
        both = ConfusionMatrix(*ours)
        both._counts = self._counts + other._counts
        return both

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ConfusionMatrix):
            return NotImplemented
        return self.ignored == other.ignored and np.array_equal(self._counts, other._counts)

    __hash__ = None  # type: ignore[assignment]  # it changes with every update

    def metrics(self) -> Metrics:
        """The scores of all classes together.

        - `miou`: mean IoU of the classes that are in the truth or in a prediction. A class that is only predicted
          counts with 0.
        - `aacc`: share of pixels whose class was found. `macc`: mean accuracy of the classes in the truth.
        - `num_classes`: how many classes `miou` is the mean of. `num_pixels`: how many pixels were compared.

        Raises:
            UsageError: no pixel was compared.
        """
        num_pixels = int(self._counts.sum())
        if not num_pixels:
            raise UsageError("there is no pixel to score: choose a split whose images have labelled pixels.")
        rows = self.per_class()
        ious = [row.iou for row in rows if row.iou is not None]
        accuracies = [row.accuracy for row in rows if row.accuracy is not None]
        return {
            "miou": math.fsum(ious) / len(ious),
            "aacc": int(np.trace(self._counts)) / num_pixels,
            "macc": math.fsum(accuracies) / len(accuracies),
            "num_classes": len(ious),
            "num_pixels": num_pixels,
        }

    def per_class(self) -> list[ClassScores]:
        """The scores of each class, in the order of their numbers."""
        found = np.diagonal(self._counts).tolist()
        truth, predicted = self._counts.sum(1).tolist(), self._counts.sum(0).tolist()
        return [
            ClassScores(
                index=index,
                iou=both / (true + said - both) if true + said else None,
                accuracy=both / true if true else None,
                truth_px=true,
                predicted_px=said,
            )
            for index, (both, true, said) in enumerate(zip(found, truth, predicted, strict=True))
        ]

    def per_class_table(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """A row for each class, with its name, to be printed or written as JSON: the fields of `ClassScores`.

        Raises:
            ValueError: there is another number of names than of classes.
        """
        if len(names) != self.num_classes:
            raise ValueError(f"there are {len(names)} names for {self.num_classes} classes: give one for each")
        return [{"name": name, **asdict(scores)} for name, scores in zip(names, self.per_class(), strict=True)]
