"""int8 tokens are as near to the tokens as their scale allows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cache_schema.quantize import LARGEST, dequantize, quantize

SMALLEST_SCALE = float(np.finfo(np.float16).smallest_subnormal)
LARGEST_TOKEN = float(np.finfo(np.float16).max) * LARGEST


@st.composite
def tokens(draw: st.DrawFn) -> NDArray[np.float32]:
    """Tokens of any size that float16 can scale, from zero up, of all shapes."""
    shape = (*draw(st.lists(st.integers(0, 3), max_size=3)), draw(st.integers(1, 8)))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    size = 10.0 ** rng.uniform(-12, math.log10(LARGEST_TOKEN), shape[:-1])[..., None]
    kind = draw(st.sampled_from(["even", "wild", "zero", "one channel"]))
    values = rng.uniform(-1, 1, shape)
    if kind == "wild":
        values = values**9
    if kind == "zero":
        values = values * (rng.random(shape) < 0.2)
    if kind == "one channel":
        values[..., 1:] = 0
    return (values * size).astype(np.float32)


@given(tokens())
def test_no_value_is_off_by_more_than_half_its_scale(given_tokens: NDArray[np.float32]) -> None:
    values, scale = quantize(given_tokens)
    assert (values.dtype, scale.dtype) == (np.int8, np.float16)
    assert (values.shape, scale.shape) == (given_tokens.shape, given_tokens.shape[:-1])
    exact, step = given_tokens.astype(np.float64), scale.astype(np.float64)[..., None]
    assert (np.abs(exact - values * step) <= step / 2 * (1 + 1e-6)).all()
    assert (np.abs(values.astype(int)) <= LARGEST).all()
    back = dequantize(values, scale)
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, (values * step).astype(np.float32))


@given(tokens())
def test_a_scale_is_the_least_float16_that_reaches_the_largest_channel(given_tokens: NDArray[np.float32]) -> None:
    _, scale = quantize(given_tokens)
    largest = np.abs(given_tokens.astype(np.float64)).max(axis=-1)
    assert (scale.astype(np.float64) * LARGEST >= largest * (1 - 1e-6)).all()
    below = np.nextafter(scale, np.float16(0)).astype(np.float64)
    assert ((below * LARGEST < largest * (1 + 1e-6)) | (scale == 0)).all()
    assert ((scale == 0) == (largest == 0)).all()


def test_whole_numbers_up_to_127_come_back_exactly() -> None:
    given_tokens = np.arange(-127, 128, dtype=np.float32)[None]
    values, scale = quantize(given_tokens)
    assert scale.tolist() == [1.0]
    np.testing.assert_array_equal(dequantize(values, scale), given_tokens)


def test_a_token_of_zeros_is_zeros() -> None:
    values, scale = quantize(np.zeros((2, 3), np.float32))
    assert not values.any()
    assert scale.tolist() == [0, 0]
    assert not dequantize(values, scale).any()


@pytest.mark.parametrize("tiny", [1e-42, 1e-30, SMALLEST_SCALE / 2, SMALLEST_SCALE])
def test_a_token_too_small_for_its_scale_is_near_zero_and_no_division_by_zero(tiny: float) -> None:
    given_tokens = np.array([[tiny, -tiny, 0]], np.float32)
    values, scale = quantize(given_tokens)
    assert scale.tolist() == [SMALLEST_SCALE]
    assert np.abs(dequantize(values, scale) - given_tokens).max() <= SMALLEST_SCALE / 2


def test_tokens_are_scaled_each_by_its_own() -> None:
    rows = np.array([[1, -2, 0.5], [1000, 3, -4]], np.float32)
    values, scale = quantize(rows)
    for row in range(2):
        alone_values, alone_scale = quantize(rows[row])
        assert values[row].tolist() == alone_values.tolist()
        assert scale[row] == alone_scale


@pytest.mark.parametrize("size", [LARGEST_TOKEN * 1.01, 3e38])
def test_a_token_that_float16_cannot_scale_says_so_in_its_scale(size: float) -> None:
    values, scale = quantize(np.array([[size, 1.0], [1.0, 1.0]], np.float32))
    assert np.isinf(scale).tolist() == [True, False]
    assert not values[0].any()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_no_number_says_so_in_its_scale(wrong: float) -> None:
    values, scale = quantize(np.array([[wrong, 1.0], [1.0, 2.0]], np.float32))
    assert np.isfinite(scale).tolist() == [False, True]
    assert dequantize(values[1], scale[1]) == pytest.approx([1, 2], abs=0.01)
