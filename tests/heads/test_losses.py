"""Losses against cases worked by hand and against each other."""

from __future__ import annotations

import math

import pytest
import torch

from heads.losses import TERMS, bce, dice, focal, mask_loss, resize_logits

ONE_HIT_OF_TWO = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])


def logits_of(probabilities: list[list[float]]) -> torch.Tensor:
    return torch.logit(torch.tensor([probabilities]))


def test_bce_is_the_mean_over_pixels() -> None:
    loss = bce(logits_of([[0.9, 0.5], [0.5, 0.1]]), ONE_HIT_OF_TWO)
    assert loss.item() == pytest.approx(-(2 * math.log(0.9) + 2 * math.log(0.5)) / 4)


def test_dice_counts_overlap_against_both_areas() -> None:
    loss = dice(logits_of([[0.9, 0.5], [0.5, 0.1]]), ONE_HIT_OF_TWO)
    assert loss.item() == pytest.approx(1 - (2 * 1.4 + 1) / (2.0 + 2.0 + 1))


def test_dice_is_near_zero_for_an_empty_prediction_of_an_empty_truth() -> None:
    assert dice(torch.full((1, 8, 8), -20.0), torch.zeros(1, 8, 8)).item() == pytest.approx(0, abs=1e-6)


def test_focal_without_focus_is_half_of_bce() -> None:
    logits = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(0))
    targets = (logits > 0.3).float()
    torch.testing.assert_close(focal(logits, targets, gamma=0.0, alpha=0.5), bce(logits, targets) / 2)


def test_focal_weighs_a_hard_pixel_by_its_miss() -> None:
    loss = focal(logits_of([[0.2]]), torch.ones(1, 1, 1))
    assert loss.item() == pytest.approx(-0.25 * 0.8**2 * math.log(0.2))


def test_every_term_falls_when_the_prediction_gets_better() -> None:
    targets = torch.zeros(2, 8, 8)
    targets[:, 2:6, 2:6] = 1
    for term in TERMS.values():
        worse, better = (term((targets - 0.5) * scale, targets) for scale in (1.0, 6.0))
        assert better < worse


def test_the_mask_loss_is_the_weighted_sum_of_its_terms_at_the_size_of_the_targets() -> None:
    logits = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    targets = (torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    resized = resize_logits(logits, (16, 16))
    expected = 2 * bce(resized, targets) + 0.5 * dice(resized, targets)
    torch.testing.assert_close(mask_loss(logits, targets, {"bce": 2.0, "dice": 0.5}), expected)


def test_resizing_keeps_pixel_centres_where_they_are() -> None:
    ramp = torch.arange(4.0).expand(1, 4, 4)
    assert resize_logits(ramp, (8, 8))[0, 0].tolist() == pytest.approx([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
