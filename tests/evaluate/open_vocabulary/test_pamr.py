"""PAMR against its definition, pixel by pixel in float64, and what must hold whatever the image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluate.open_vocabulary.pamr import Pamr

SIX = (1, 2, 4, 8, 12, 24)


def neighbours_of(image, row, column, dilations):
    """The values of the 8 neighbours at each dilation, the nearest pixel of the image standing for those outside."""
    height, width = image.shape[-2:]
    return [
        image[..., min(max(row + down * dilation, 0), height - 1), min(max(column + right * dilation, 0), width - 1)]
        for dilation in dilations
        for down in (-1, 0, 1)
        for right in (-1, 0, 1)
        if (down, right) != (0, 0)
    ]


def weights_of(image, row, column, dilations):
    """The affinity of one pixel, word for word as it is defined."""
    logits = []
    neighbours = neighbours_of(image, row, column, dilations)
    for neighbour in neighbours:
        mean = 0.0
        for channel in range(3):
            centre = image[channel, row, column]
            values = [value[channel] for value in neighbours] + [centre] * len(dilations)
            average = math.fsum(values) / len(values)
            sigma = math.sqrt(math.fsum((value - average) ** 2 for value in values) / (len(values) - 1))
            mean += -abs(centre - neighbour[channel]) / (1e-8 + 0.1 * sigma) / 3
        logits.append(mean)
    exponentials = [math.exp(logit - max(logits)) for logit in logits]
    return [value / math.fsum(exponentials) for value in exponentials]


def naive(image, masks, iterations, dilations):
    height, width = image.shape[1:]
    weights = [[weights_of(image, row, column, dilations) for column in range(width)] for row in range(height)]
    for _ in range(iterations):
        refined = np.empty_like(masks)
        for row in range(height):
            for column in range(width):
                neighbours = neighbours_of(masks, row, column, dilations)
                parts = [weight * value for weight, value in zip(weights[row][column], neighbours, strict=True)]
                refined[:, row, column] = np.sum(parts, axis=0)
        masks = refined
    return masks


def random_case(size, num_classes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    image, masks = (
        torch.rand((planes, *size), generator=generator, dtype=torch.float64) for planes in (3, num_classes)
    )
    return image.to(dtype), masks.to(dtype)


@pytest.mark.parametrize(
    ("size", "iterations", "dilations"),
    [((9, 11), 10, SIX), ((30, 5), 2, SIX), ((6, 7), 3, (1,)), ((7, 5), 2, (2, 3)), ((1, 6), 2, (1, 2))],
)
def test_it_is_the_definition_pixel_by_pixel(size, iterations, dilations):
    image, masks = random_case(size, 3)
    expected = naive(image.numpy(), masks.numpy(), iterations, dilations)

    refined = Pamr(iterations, dilations).affinity(image).refine(masks)

    assert refined.dtype == torch.float64
    np.testing.assert_allclose(refined.numpy(), expected, rtol=0, atol=1e-12)


def test_it_is_the_definition_in_float32_on_an_image_of_whole_numbers():
    # Flat regions and sharp edges, as images have them, with values from 0 to 255.
    image = torch.zeros(3, 12, 10)
    image[0, 3:9, 2:7], image[1, :, 5:], image[2, 6:] = 255, 128, 17
    masks = torch.rand((2, 12, 10), generator=torch.Generator().manual_seed(0))
    expected = naive(image.double().numpy(), masks.double().numpy(), 10, SIX)

    refined = Pamr().affinity(image).refine(masks)

    assert refined.dtype == torch.float32
    np.testing.assert_allclose(refined.numpy(), expected, rtol=0, atol=1e-5)


def test_the_defaults_are_those_of_the_benchmarks():
    assert Pamr() == Pamr(iterations=10, dilations=SIX)
    assert Pamr().affinity(random_case((4, 4), 1)[0]).weights.shape == (16, 48)


def test_an_image_longer_than_what_is_compared_at_once_is_the_definition_everywhere():
    image, _ = random_case((2, 3000), 1)
    weights = Pamr(1, (1, 24)).affinity(image).weights

    for pixel in (0, 2046, 2047, 2048, 2049, 4095, 4096, 5999):
        expected = weights_of(image.numpy(), *divmod(pixel, 3000), (1, 24))
        np.testing.assert_allclose(weights[pixel].numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_classes", [1, 7, 31, 32, 33, 70])
def test_a_class_is_refined_the_same_alone_or_among_many(num_classes):
    image, masks = random_case((13, 17), num_classes, dtype=torch.float32)
    affinity = Pamr().affinity(image)
    alone = torch.cat([affinity.refine(mask[None]) for mask in masks])

    # Sums of 48 weighted values; a single column may be summed in another order.
    torch.testing.assert_close(affinity.refine(masks), alone, rtol=0, atol=1e-6)


def test_refining_leaves_the_affinity_and_what_came_in_as_they_were():
    image, masks = random_case((8, 9), 2)
    affinity = Pamr().affinity(image)
    before = image.clone(), masks.clone(), affinity.weights.clone()
    first = affinity.refine(masks)

    assert torch.equal(affinity.refine(masks), first)
    assert all(map(torch.equal, (image, masks, affinity.weights), before))


def test_a_plain_image_averages_the_neighbours():
    masks = torch.rand((2, 10, 12), dtype=torch.float64)
    refined = Pamr(1, (1, 2)).affinity(torch.full((3, 10, 12), 0.3, dtype=torch.float64)).refine(masks)
    expected = [[np.mean(neighbours_of(masks.numpy(), row, column, (1, 2)), axis=0) for column in range(12)]
                for row in range(10)]  # fmt: skip

    np.testing.assert_allclose(refined.permute(1, 2, 0).numpy(), expected, rtol=0, atol=1e-12)


def test_a_mask_does_not_cross_a_sharp_edge():
    image = torch.zeros(3, 40, 60)
    image[:, :, 30:] = 1
    mask = torch.zeros(1, 40, 60)
    mask[:, :, :30] = 1
    mask[:, 20, 15] = 0  # a hole that its surroundings fill

    refined = Pamr().affinity(image).refine(mask)

    assert refined[0, 20, 15] > 0.9
    assert refined[0, :, 30:].max() < 0.01
    assert refined[0, :, :30].min() > 0.9


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**16))
def test_what_comes_out_lies_between_the_least_and_the_most_that_went_in(height, width, seed):
    image, masks = random_case((height, width), 2, seed)
    refined = Pamr(3).affinity(image).refine(masks)

    assert (refined.amin((1, 2)) >= masks.amin((1, 2)) - 1e-12).all()
    assert (refined.amax((1, 2)) <= masks.amax((1, 2)) + 1e-12).all()


def test_weights_are_shares_of_one():
    weights = Pamr().affinity(random_case((20, 21), 1)[0]).weights
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(1), torch.ones(20 * 21, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_range_of_the_image_plays_no_part():
    image, masks = random_case((15, 14), 2)
    refined = Pamr().affinity(image).refine(masks)
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in ((0.5, 0.4, 0.3), (0.2, 1, 3)))

    for changed in (255 * image, (image - mean) / std):
        torch.testing.assert_close(Pamr().affinity(changed).refine(masks), refined, rtol=0, atol=1e-5)


def test_masks_of_another_size_are_brought_to_the_images_first():
    image, _ = random_case((12, 18), 1)
    masks = torch.rand((40, 4, 6), dtype=torch.float64)
    affinity = Pamr().affinity(image)
    at_size = F.interpolate(masks[None], (12, 18), mode="bilinear", align_corners=True)[0]

    torch.testing.assert_close(affinity.refine(masks), affinity.refine(at_size), rtol=0, atol=1e-14)


def test_half_precision_is_refined_in_float32():
    image, masks = random_case((6, 6), 2, dtype=torch.float32)
    refined = Pamr().affinity(image.half()).refine(masks.half())

    assert refined.dtype == torch.float32
    torch.testing.assert_close(refined, Pamr().affinity(image.half().float()).refine(masks.half().float()))


@pytest.mark.parametrize("wrong", [{"iterations": 0}, {"dilations": ()}, {"dilations": (1, 0)}])
def test_settings_that_refine_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="at least one iteration and dilations of at least 1"):
        Pamr(**wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_cuda_device_gives_the_same():
    image, masks = random_case((40, 50), 40, dtype=torch.float32)
    on_device = Pamr().affinity(image.cuda()).refine(masks.cuda())

    torch.testing.assert_close(on_device.cpu(), Pamr().affinity(image).refine(masks), rtol=0, atol=1e-5)
