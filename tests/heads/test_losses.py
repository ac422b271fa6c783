"""Losses against cases worked by hand and against each other."""

from __future__ import annotations

import math

import pytest
import torch

from cache_schema.errors import UsageError
from heads.inputs import HeadOutputs
from heads.losses import (
    MASK_TERMS,
    Targets,
    bce,
    dice,
    focal,
    iou_regression,
    loss_terms,
    mask_iou,
    resize_logits,
    total_loss,
)

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
    for term in MASK_TERMS.values():
        worse, better = (term((targets - 0.5) * scale, targets) for scale in (1.0, 6.0))
        assert better < worse


def test_the_mask_loss_is_the_weighted_sum_of_its_terms_at_the_size_of_the_targets() -> None:
    logits = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    targets = (torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    resized = resize_logits(logits, (16, 16))
    expected = 2 * bce(resized, targets) + 0.5 * dice(resized, targets)
    wanted = Targets(targets, torch.zeros(2, dtype=torch.bool))
    found = total_loss(HeadOutputs(logits), wanted, {"bce": 2.0, "dice": 0.5})
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("term", MASK_TERMS)
def test_pixels_that_nobody_labelled_change_no_loss(term: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 6, generator=generator)
    targets = (torch.rand(2, 6, 6, generator=generator) > 0.5).float()
    labelled = torch.ones(2, 6, 6)
    labelled[:, :, 4:] = 0
    loss = MASK_TERMS[term](logits, targets, labelled)
    torch.testing.assert_close(loss, MASK_TERMS[term](logits[:, :, :4], targets[:, :, :4]))
    spoiled = torch.where(labelled > 0, logits, -7.0), torch.where(labelled > 0, targets, 1 - targets)
    torch.testing.assert_close(MASK_TERMS[term](*spoiled, labelled), loss)


@pytest.mark.parametrize("term", MASK_TERMS)
def test_where_every_pixel_is_labelled_it_need_not_be_said(term: str) -> None:
    logits = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0))
    targets = (logits > 0.2).float()
    torch.testing.assert_close(
        MASK_TERMS[term](logits, targets, torch.ones(2, 6, 6)), MASK_TERMS[term](logits, targets)
    )


def test_the_iou_of_two_masks_counts_labelled_pixels_and_is_one_where_both_are_empty() -> None:
    predicted = torch.tensor([[[True, True, False, False]], [[False] * 4], [[True, False, False, True]]])
    truth = torch.tensor([[[True, False, True, False]], [[False] * 4], [[False] * 4]])
    assert mask_iou(predicted, truth).tolist() == pytest.approx([1 / 3, 1.0, 0.0])
    labelled = torch.tensor([[[1.0, 0.0, 1.0, 1.0]]]).expand(3, 1, 4)
    assert mask_iou(predicted, truth, labelled).tolist() == pytest.approx([1 / 2, 1.0, 0.0])


def test_an_expected_iou_is_held_against_the_one_the_mask_has() -> None:
    logits = torch.tensor([[[3.0, 3.0, -3.0, -3.0]]], requires_grad=True)
    expected = torch.tensor([0.5], requires_grad=True)
    loss = iou_regression(logits, torch.tensor([[[1.0, 0.0, 1.0, 0.0]]]), expected)
    assert loss.item() == pytest.approx((0.5 - 1 / 3) ** 2)
    loss.backward()
    assert logits.grad is None


def test_saying_that_there_is_no_target_is_a_binary_decision() -> None:
    outputs = HeadOutputs(torch.zeros(2, 2, 2), no_target_logits=torch.tensor([2.0, -1.0]))
    targets = Targets(torch.zeros(2, 2, 2), torch.tensor([True, False]))
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 2
    assert total_loss(outputs, targets, {"no_target": 3.0}).item() == pytest.approx(3 * expected)


@pytest.mark.parametrize("term", ["iou", "no_target", "info_nce"])
def test_a_head_that_does_not_say_what_a_loss_needs_is_refused(term: str) -> None:
    targets = Targets(torch.zeros(2, 2, 2), torch.zeros(2, dtype=torch.bool), None, torch.arange(2))
    with pytest.raises(UsageError, match=f"the loss '{term}' needs"):
        loss_terms(HeadOutputs(torch.zeros(2, 2, 2)), targets, {term: 1.0})


def test_a_term_takes_arguments_by_its_name() -> None:
    logits = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    targets = Targets((logits > 0.3).float(), torch.zeros(2, dtype=torch.bool))
    found = total_loss(HeadOutputs(logits), targets, {"focal": 1.0}, {"focal": {"gamma": 0.0, "alpha": 0.5}})
    torch.testing.assert_close(found, bce(logits, targets.masks) / 2)


def test_resizing_keeps_pixel_centres_where_they_are() -> None:
    ramp = torch.arange(4.0).expand(1, 4, 4)
    assert resize_logits(ramp, (8, 8))[0, 0].tolist() == pytest.approx([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
