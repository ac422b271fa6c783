"""The contact sheet and its lettering: every sample has its place, whatever its shape and its script."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluate import lettering
from evaluate.contact_sheet import Card, draw_sheet
from evaluate.lettering import Lettering, can_show

GREY = np.full((60, 80, 3), 100, np.uint8)
FIELD = (236, 236, 232)


def half(size: tuple[int, int] = (60, 80)) -> np.ndarray:
    mask = np.zeros(size, np.bool_)
    mask[:, : size[1] // 2] = True
    return mask


def has(sheet: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((sheet == colour).all(axis=2).any())


def test_an_image_without_a_mask_is_a_plain_picture() -> None:
    sheet = draw_sheet("title", [Card("a caption", GREY)])
    assert has(sheet, (100, 100, 100))
    assert not has(sheet, (0, 114, 200))


def test_the_truth_lies_over_the_image() -> None:
    plain = draw_sheet("title", [Card("left", GREY)])
    sheet = draw_sheet("title", [Card("left", GREY, truth=half())])
    assert has(sheet, (0, 114, 200)), "the outline has the colour of truth"
    assert (sheet[..., 2].astype(int) - sheet[..., 0] > 20).sum() > 256 * 192 // 2 - 2000
    assert (plain[..., 2].astype(int) - plain[..., 0] > 20).sum() == 0


def test_pixels_that_nobody_labelled_are_hatched_and_explained() -> None:
    plain = draw_sheet("title", [Card("p", GREY, truth=half())])
    sheet = draw_sheet("title", [Card("p", GREY, truth=half(), ignored=~half())])
    assert has(sheet, (82, 82, 82))
    assert has(sheet, (160, 160, 160))
    assert not has(plain, (82, 82, 82))
    assert (sheet[:90] != plain[:90]).any(), "the legend names them"


def test_a_prompt_without_a_target_is_stamped() -> None:
    plain = draw_sheet("title", [Card("p", GREY, truth=~half() & half())])
    sheet = draw_sheet("title", [Card("p", GREY, truth=~half() & half(), no_target=True)])
    assert plain.shape == sheet.shape
    changed = np.argwhere((plain != sheet).any(axis=2))
    assert len(changed) > 500


def test_an_image_that_is_missing_is_a_field_with_the_reason() -> None:
    sheet = draw_sheet("title", [Card("p", "photo.jpg is missing")])
    other = draw_sheet("title", [Card("p", "")])
    assert has(sheet, FIELD)
    assert (sheet != other).any()


def test_the_cards_stand_in_rows_in_their_order() -> None:
    colours = [(10 * n, 0, 255 - 10 * n) for n in range(24)]
    cards = [Card(f"prompt {n}", np.full((30, 40, 3), colour, np.uint8)) for n, colour in enumerate(colours)]
    sheet = draw_sheet("title", cards)
    centres = [np.argwhere((sheet == colour).all(axis=2)).mean(axis=0) for colour in colours]
    tops = [round(top) for top, _ in centres]
    assert len(set(tops)) == 4
    order = sorted(range(24), key=lambda n: (tops[n], centres[n][1]))
    assert order == list(range(24))


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 3), (900, 300), (300, 900), (256, 256)])
def test_every_shape_of_image_is_drawn_with_its_mask(size: tuple[int, int]) -> None:
    card = Card("p", np.full((*size, 3), 100, np.uint8), truth=np.ones(size, np.bool_))
    fitted = card.fitted()
    assert max(fitted.image.shape) == 256
    assert fitted.truth.shape == fitted.image.shape[:2]
    assert fitted.truth.all()
    sheet = draw_sheet("title", [card])
    assert sheet.shape[1] < 700
    assert has(sheet, (0, 114, 200))


def test_a_tiny_image_keeps_its_pixels_sharp() -> None:
    board = np.zeros((2, 2, 3), np.uint8)
    board[0, 0] = board[1, 1] = 200
    assert set(np.unique(Card("p", board).fitted().image)) == {0, 200}


def test_a_mask_of_one_pixel_of_a_large_image_is_still_seen() -> None:
    mask = np.zeros((4000, 4000), np.bool_)
    mask[1000, 3000] = True
    assert Card("p", np.zeros((4000, 4000, 3), np.uint8), truth=mask).fitted().truth.any()


def test_no_card_at_all_gives_a_sheet_with_a_title() -> None:
    assert draw_sheet("nothing to see", []).shape[0] < 150


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=500), lines=st.integers(1, 5))
def test_any_text_is_broken_into_lines_that_fit(text: str, lines: int) -> None:
    letters = Lettering(16)
    wrapped = letters.wrap(text, 120, lines)
    assert len(wrapped) <= lines
    assert all(letters.width(line) <= 120 or len(line) == 1 for line in wrapped)


def test_words_stay_whole_where_they_fit_and_are_broken_where_they_do_not() -> None:
    letters = Lettering(16)
    assert letters.wrap("the cat sat on the mat", 10_000, 2) == ["the cat sat on the mat"]
    assert " ".join(letters.wrap("the cat sat on the mat", 100, 9)) == "the cat sat on the mat"
    assert "".join(letters.wrap("w" * 50, 100, 20)) == "w" * 50
    assert letters.wrap("", 100, 2) == []


def test_what_does_not_fit_ends_in_an_ellipsis() -> None:
    wrapped = Lettering(16).wrap("word " * 1000, 100, 3)
    assert len(wrapped) == 3
    assert wrapped[-1].endswith("\u2026")


@pytest.mark.parametrize(
    "text", ["plain", "\u03b1\u03b2\u03b3", "\u0436\u0443\u043a", "e\u0301", "a\u200db", "a\tb", "\u05d0\u05d1"]
)
def test_scripts_that_come_with_the_project_can_be_shown(text: str) -> None:
    assert can_show(text)


def test_a_letter_without_a_font_is_said_and_drawn_as_something(monkeypatch: pytest.MonkeyPatch) -> None:
    lettering._font_for.cache_clear()
    monkeypatch.setattr(lettering, "_other_fonts", lambda: ())
    assert not can_show("two \u9f98")
    assert Lettering(16).width("\u9f98") > 0
    assert draw_sheet("title", [Card("two \u9f98", GREY)]).shape[0] > 100
    lettering._font_for.cache_clear()
