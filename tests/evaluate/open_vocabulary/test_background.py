"""Background cleaning, against loops over heads, classes and patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evaluate.open_vocabulary.background import clean_background, default_background
from tests.evaluate.open_vocabulary.oracle import slow_cleaning

NUM_WINDOWS, NUM_CLASSES, NUM_HEADS, GH, GW, D = 3, 5, 4, 3, 4, 8


@pytest.fixture
def given() -> tuple[torch.Tensor, ...]:
    """Masks, attention logits and patches of three windows, and five classes, in float64."""
    generator = torch.Generator().manual_seed(1)
    masks, logits, patches, classes = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in (
            (NUM_WINDOWS, NUM_CLASSES, GH, GW),
            (NUM_WINDOWS, NUM_HEADS, GH, GW),
            (NUM_WINDOWS, GH, GW, D),
            (NUM_CLASSES, D),
        )
    )
    return masks.sigmoid(), 3 * logits, patches, F.normalize(classes, dim=-1)


def test_cleaning_is_what_its_definition_says(given: tuple[torch.Tensor, ...]) -> None:
    masks, logits, patches, classes = given
    cleaned = clean_background(masks, logits, patches, classes, 0.3)
    for number in range(NUM_WINDOWS):
        window = (part[number].numpy() for part in (masks, logits, patches))
        expected = slow_cleaning(*window, classes.numpy(), 0.3)
        np.testing.assert_allclose(cleaned[number].numpy(), expected, rtol=1e-10)


def test_masks_stay_in_their_range_and_keep_it_where_there_is_no_strength(given: tuple[torch.Tensor, ...]) -> None:
    masks, logits, patches, classes = given
    torch.testing.assert_close(clean_background(masks, logits, patches, classes, 0.0), masks)
    cleaned = clean_background(masks, logits, patches, classes, 5.0)
    assert cleaned.min() >= masks.min() - 1e-12
    assert cleaned.max() <= masks.max() + 1e-12


def test_a_window_is_worked_out_by_itself(given: tuple[torch.Tensor, ...]) -> None:
    masks, logits, patches, classes = given
    together = clean_background(masks, logits, patches, classes)
    for number in range(NUM_WINDOWS):
        alone = clean_background(*(part[number : number + 1] for part in (masks, logits, patches)), classes)
        torch.testing.assert_close(together[number], alone[0])


def test_attention_that_is_alike_everywhere_tells_nothing(given: tuple[torch.Tensor, ...]) -> None:
    masks, logits, patches, classes = given
    cleaned = clean_background(masks, torch.ones_like(logits), patches, classes, 0.2)
    lowest = masks.flatten(1).amin(1)[:, None, None, None]
    torch.testing.assert_close(cleaned, (masks + 0.2 * lowest) / 1.2)


def test_the_published_levels_go_by_the_width_of_the_image_tokens() -> None:
    assert [default_background(width) for width in (384, 768, 1024, 1536)] == [0.55, 0.55, 0.54, 0.54]
