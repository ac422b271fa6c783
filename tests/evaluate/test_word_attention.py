"""Attention per word as pictures: warm where a word gets more than its mean, grey elsewhere, in the right places."""

from __future__ import annotations

import numpy as np
import pytest

from cache_schema.errors import UsageError
from cache_schema.views import View
from evaluate.predictor import Prediction
from evaluate.word_attention import draw_attention, draw_words, relative_attention

IMAGE = np.full((80, 120, 3), 120, np.uint8)


def prediction(attention, words=("red", "circle"), view=None, size=(80, 120), **said) -> Prediction:
    mask = np.zeros(size, np.bool_)
    mask[10:30, 10:40] = True
    logits = np.where(mask, 2.0, -2.0).astype(np.float32)
    return Prediction("red circle", mask, logits, view, words=words, attention=attention, **said)


def peak(rows, columns, at, height=5.0):
    """An even map with a peak at one cell."""
    grid = np.ones((rows, columns), np.float32)
    grid[at] = height
    return grid


def warmth(picture):
    """How much redder than blue each pixel is; a grey one is 0."""
    return picture[..., 0].astype(int) - picture[..., 2].astype(int)


def test_attention_is_relative_to_the_mean_of_its_own_word() -> None:
    attention = np.stack([peak(4, 6, (0, 0)), 7 * peak(4, 6, (3, 5))])
    relative = relative_attention(prediction(attention))
    np.testing.assert_allclose(relative.mean((1, 2)), 1, rtol=1e-6)
    assert relative[0].max() == pytest.approx(relative[1].max()) == pytest.approx(5 / ((23 + 5) / 24))


def test_each_words_picture_is_warm_where_its_attention_is_and_grey_where_it_is_below_its_mean() -> None:
    first, second = draw_words(IMAGE, prediction(np.stack([peak(4, 6, (0, 0)), peak(4, 6, (3, 5))])))
    assert first.shape == second.shape == IMAGE.shape
    assert warmth(first)[5, 5] > 50
    assert not warmth(first)[40:, 60:].any()
    assert warmth(second)[75, 115] > 50
    assert not warmth(second)[:40, :60].any()


def test_a_mirrored_view_of_a_part_is_put_where_it_belongs() -> None:
    view = View((60, 20, 120, 80), True)
    (drawn,) = draw_words(IMAGE, prediction(peak(6, 6, (0, 0))[None], ("red",), view))
    row, column = np.unravel_index(warmth(drawn).argmax(), (80, 120))
    assert 20 <= row < 30
    assert 110 <= column < 120
    assert not warmth(drawn)[:20].any()
    assert not warmth(drawn)[:, :60].any()


def test_a_letterboxed_view_lies_over_the_image_without_its_padding() -> None:
    view = View((0, -20, 120, 100), False)  # 120 x 120 around an image of 80 x 120
    (drawn,) = draw_words(IMAGE, prediction(peak(6, 6, (1, 3))[None], ("red",), view), longest_side=60)
    assert drawn.shape == (40, 60, 3)
    row, column = np.unravel_index(warmth(drawn).argmax(), (40, 60))
    assert row < 10
    assert 30 <= column < 40


def test_words_share_one_scale_so_that_a_faint_one_stays_faint() -> None:
    strong, faint = draw_words(IMAGE, prediction(np.stack([peak(4, 6, (0, 0), 9), peak(4, 6, (0, 0), 1.2)])))
    assert warmth(faint).max() < warmth(strong).max() / 2


def test_nearly_even_attention_is_not_blown_up() -> None:
    (drawn,) = draw_words(IMAGE, prediction(peak(4, 6, (0, 0), 1.01)[None], ("red",)))
    assert warmth(drawn).max() < 40


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_attention_that_is_the_same_everywhere_is_grey(value: float) -> None:
    attention = np.full((1, 4, 6), value, np.float32)
    (drawn,) = draw_words(IMAGE, prediction(attention, ("red",)))
    assert not warmth(drawn).any()


def test_the_strip_shows_the_mask_and_every_word_under_the_prompt() -> None:
    words = tuple(f"word{number}" for number in range(9))
    attention = np.stack([peak(4, 6, (number % 4, number % 6)) for number in range(9)])
    strip = draw_attention(IMAGE, prediction(attention, words))
    few = draw_attention(IMAGE, prediction(attention[:2], words[:2]))
    assert strip.shape[1] == few.shape[1] + 256 + 16  # four in a row, and three
    assert strip.shape[0] > 2 * few.shape[0]  # three rows, and one
    assert (strip[:10] == 255).all()  # a margin of paper
    assert (strip[:, :10] == 255).all()
    panel = few[:, 24 + 256 + 16 : 24 + 2 * 256 + 16]
    rows = np.flatnonzero((panel != 255).any((1, 2)))
    top = rows[warmth(panel[rows]).max(1) > 50][0]
    np.testing.assert_array_equal(
        panel[top : top + 100], draw_words(IMAGE, prediction(attention[:2], words[:2]), 256)[0][:100]
    )


def test_a_prediction_of_no_target_says_so_in_place_of_its_score() -> None:
    attention = peak(4, 6, (0, 0))[None]
    plain = draw_attention(IMAGE, prediction(attention, ("red",)))
    absent = draw_attention(IMAGE, prediction(attention, ("red",), no_target=True))
    assert plain.shape == absent.shape
    assert (plain != absent).any()


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (700, 2)])
def test_the_oddest_images_and_words_can_be_drawn(size: tuple[int, int]) -> None:
    image = np.zeros((*size, 3), np.uint8)
    words = ("w" * 300, "\x07\u202e", "猫🎈")
    strip = draw_attention(image, prediction(np.ones((3, 1, 1), np.float32), words, size=size))
    assert strip.shape[1] < 2000


def test_a_prompt_of_which_no_word_is_known_has_no_panels_but_the_mask() -> None:
    assert draw_words(IMAGE, prediction(np.zeros((0, 4, 6), np.float32), ())) == []
    assert draw_attention(IMAGE, prediction(np.zeros((0, 4, 6), np.float32), ())).size


def test_a_head_without_attention_has_none_to_show() -> None:
    with pytest.raises(UsageError, match="no attention per word; take a head that reads its tokens"):
        draw_attention(IMAGE, prediction(None, ()))
