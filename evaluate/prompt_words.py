"""Which tokens spell which word of a prompt, and attention of tokens as attention of words.

Knows nothing of tokenizers but that they can be asked: a word's tokens are those that come when it is added to what
stands before it. So it holds for byte-pair, WordPiece and SentencePiece tokenizers alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from jaxtyping import Float

Tokenize = Callable[[Sequence[str]], list[list[int]]]
"""Token ids of each prompt, special tokens included; see `extract.encoders.protocols.TextEncoder`."""


@dataclass(frozen=True)
class TokenWords:
    """The words of a prompt that have tokens of their own, and for each token the place of its word among them.

    A word is what stands between white space, punctuation included. Tokens that start or end a prompt spell none.
    """

    words: tuple[str, ...]
    word_of_token: tuple[int | None, ...]


def find_words(prompt: str, token_ids: Sequence[int], tokenize: Tokenize) -> TokenWords:
    """The words that the tokens of a prompt spell.

    A word without a token is left out: what a tokenizer drops, as SigLIP's first does with punctuation, and what is
    cut off because the prompt is too long. A token that reaches over white space counts for the later word.
    """
    start, end = _count_special(tokenize)
    own = list(token_ids[start : len(token_ids) - end])
    words: list[str] = []
    word_of_token: list[int] = []
    for word in re.finditer(r"\S+", prompt):
        if len(word_of_token) == len(own):
            break
        (ids,) = tokenize([prompt[: word.end()]])
        num_spelled = _num_shared(ids[start : len(ids) - end], own)
        if num_spelled > len(word_of_token):
            word_of_token += [len(words)] * (num_spelled - len(word_of_token))
            words.append(word.group())
    rest = [None] * (len(token_ids) - start - len(word_of_token))
    return TokenWords(tuple(words), (*[None] * start, *word_of_token, *rest))


def attention_of_words(attention: Float[np.ndarray, "l gh gw"], words: TokenWords) -> Float[np.ndarray, "words gh gw"]:
    """Attention of each token, padding behind it, as attention of each word: that of its tokens added up."""
    joined = np.zeros((len(words.words), *attention.shape[1:]), attention.dtype)
    for token, word in enumerate(words.word_of_token):
        if word is not None:
            joined[word] += attention[token]
    return joined


def _count_special(tokenize: Tokenize) -> tuple[int, int]:
    """How many special tokens stand before and behind every prompt."""
    empty, letter = tokenize(["", "a"])
    start = _num_shared(empty, letter)
    return start, len(empty) - start


def _num_shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many token ids two prompts have in common from the first one on."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, others, strict=False)))
