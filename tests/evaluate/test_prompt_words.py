"""Tokens and words: what tokenizers themselves say of where a token comes from, for each family of them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluate.prompt_words import TokenWords, attention_of_words, find_words
from extract.encoders.specs import TextEncoderSpec
from extract.encoders.text import load_text_encoder
from tests.extract.text_checkpoints import HAS_SENTENCEPIECE, LIMIT, save_text_checkpoint
from tests.extract.toys import ToyTextEncoder

FAMILIES = ("clip", "bert", "siglip2", "siglip2-fixed")
PROMPTS = (
    "the red circle",
    "red",
    "A dog's LEFT-hand Red circle, please",
    "dogged reddening",
    "a zxqv, 3.5 and é",
    "Red  CIRCLE\n!",
    " the  dog ",
)


@pytest.fixture(scope="module", params=FAMILIES)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("text") / request.param
    save_text_checkpoint(request.param, folder)
    return load_text_encoder(TextEncoderSpec(str(folder)))


def words_by_offsets(encoder, prompt: str) -> TokenWords:
    """What the tokenizer's own offsets say: a token belongs to the word in which its letters lie."""
    tokenizer = encoder._tower._tokenizer
    encoded = tokenizer(
        prompt, truncation=True, max_length=LIMIT, return_offsets_mapping=True, return_special_tokens_mask=True
    )
    spans = [match.span() for match in re.finditer(r"\S+", prompt)]
    of_token: list[int | None] = []
    for (start, end), special in zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True):
        within = [place for place, (first, last) in enumerate(spans) if first < end and start < last]
        behind = [place for place, (first, _) in enumerate(spans) if first >= end]  # of a piece that is but a space
        of_token.append(None if special else within[-1] if within else behind[0] if behind else None)
    spelled = sorted({word for word in of_token if word is not None})
    names = tuple(prompt[slice(*spans[word])] for word in spelled)
    return TokenWords(names, tuple(None if word is None else spelled.index(word) for word in of_token))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_each_token_belongs_to_the_word_in_which_its_letters_lie(encoder, prompt: str) -> None:
    (ids,) = encoder.tokenize([prompt])
    found = find_words(prompt, ids, encoder.tokenize)
    assert found == words_by_offsets(encoder, prompt)
    assert len(found.word_of_token) == len(ids)


@given(words=st.lists(st.sampled_from(["red", "dog", "the", "a", "circle,", "left-hand", "3.5", "é!"]), min_size=1))
@settings(deadline=None, max_examples=25)
def test_any_words_are_found_as_far_as_the_limit_lets_them_in(encoder, words: list[str]) -> None:
    prompt = " ".join(words)
    (ids,) = encoder.tokenize([prompt])
    found = find_words(prompt, ids, encoder.tokenize)
    assert found.words == tuple(words[: len(found.words)])
    assert found == words_by_offsets(encoder, prompt)


@pytest.mark.skipif(not HAS_SENTENCEPIECE, reason="SiglipTokenizer needs sentencepiece")
def test_a_word_of_which_a_tokenizer_keeps_nothing_is_left_out(tmp_path: Path) -> None:
    save_text_checkpoint("siglip", tmp_path)
    encoder = load_text_encoder(TextEncoderSpec(str(tmp_path)))
    (ids,) = encoder.tokenize(["the dog - left !"])
    found = find_words("the dog - left !", ids, encoder.tokenize)
    assert found.words == ("the", "dog", "left")
    assert found.word_of_token == (0, 1, 2, None)


def test_a_prompt_of_special_tokens_is_text_like_any_other(encoder) -> None:
    special = encoder._tower._tokenizer.eos_token or encoder._tower._tokenizer.sep_token
    prompt = f"red {special} dog"
    (ids,) = encoder.tokenize([prompt])
    found = find_words(prompt, ids, encoder.tokenize)
    assert found.words == ("red", special, "dog")


def test_padding_and_special_tokens_add_to_no_word() -> None:
    attention = np.random.default_rng(0).random((7, 2, 3), np.float32)
    words = TokenWords(("red", "circles"), (None, 0, 1, 1, None))
    joined = attention_of_words(attention, words)
    np.testing.assert_array_equal(joined, [attention[1], attention[2] + attention[3]])


def test_a_tokenizer_of_whole_words_gives_each_word_its_token() -> None:
    toy = ToyTextEncoder()
    assert find_words("a b", toy.tokenize(["a b"])[0], toy.tokenize) == TokenWords(("a", "b"), (None, 0, 1, None))
