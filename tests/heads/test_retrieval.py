"""Recall of retrieval against loops, and against answers known by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heads.inputs import Embeddings
from heads.retrieval import retrieval_recall


def make_embeddings(num_images: int, num_candidates: int, num_prompts: int, seed: int) -> tuple[Embeddings, Tensor]:
    """Prompts that resemble a candidate of their image, some more than others."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(num_images, num_candidates, 4, generator=generator)
    index = torch.randint(num_images, (num_prompts,), generator=generator)
    text = image[index, 0] + torch.randn(num_prompts, 4, generator=generator)
    lengths = 5 * torch.rand(num_prompts, 1, generator=generator) + 0.1
    return Embeddings(image, text * lengths), index


def slow_recall(embeddings: Embeddings, index: list[int], rank: int) -> tuple[float, float]:
    """Sort everything for every prompt and for every image that has prompts."""
    table: list[list[float]] = []
    for text in embeddings.text.double():
        row = []
        for image in embeddings.image.double():
            row.append(max(float(text @ one / text.norm() / one.norm()) for one in image))
        table.append(row)
    prompts, images = range(len(index)), range(len(embeddings.image))
    found = [index[p] in sorted(images, key=lambda i: -table[p][i])[:rank] for p in prompts]
    named = [
        any(index[p] == i for p in sorted(prompts, key=lambda p: -table[p][i])[:rank]) for i in images if i in index
    ]
    return sum(found) / len(found), sum(named) / len(named)


@given(
    num_images=st.integers(1, 9),
    num_candidates=st.integers(1, 3),
    num_prompts=st.integers(1, 14),
    chunk=st.integers(1, 20),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=40)
def test_recall_is_what_sorting_says(
    num_images: int, num_candidates: int, num_prompts: int, chunk: int, seed: int
) -> None:
    embeddings, index = make_embeddings(num_images, num_candidates, num_prompts, seed)
    recall = retrieval_recall(embeddings, index, ranks=(1, 2, 5), chunk=chunk)
    for rank in (1, 2, 5):
        found, named = slow_recall(embeddings, index.tolist(), rank)
        assert recall[f"text_to_image_recall@{rank}"] == pytest.approx(found)
        assert recall[f"image_to_text_recall@{rank}"] == pytest.approx(named)


def test_both_ways_are_given_at_1_5_and_10() -> None:
    ways = ("text_to_image", "image_to_text")
    assert list(retrieval_recall(*make_embeddings(3, 1, 5, 0))) == [f"{w}_recall@{k}" for w in ways for k in (1, 5, 10)]


def test_every_prompt_and_every_image_finds_its_own_where_they_are_equal() -> None:
    embeddings = Embeddings(torch.eye(4)[:, None], torch.eye(4)[[0, 0, 1, 3, 3, 3]])
    assert set(retrieval_recall(embeddings, torch.tensor([0, 0, 1, 3, 3, 3])).values()) == {1.0}


def test_one_prompt_among_the_best_is_enough_for_an_image_but_not_for_the_other_prompts() -> None:
    """Image 0 is answered by its first prompt; its second looks like image 1."""
    embeddings = Embeddings(torch.eye(2)[:, None], torch.tensor([[1.0, 0.0], [0.1, 1.0], [0.0, 1.0]]))
    recall = retrieval_recall(embeddings, torch.tensor([0, 0, 1]), ranks=(1,))
    assert recall == {"text_to_image_recall@1": pytest.approx(2 / 3), "image_to_text_recall@1": 1.0}


def test_vectors_are_normalised_along_their_channels() -> None:
    """A long prompt or image wins nothing by its length, and no channel by its spread over the batch."""
    angles = torch.tensor([0.0, 0.1, 0.2]) * math.pi
    directions = torch.stack([angles.cos(), angles.sin()], dim=1)
    lengths = torch.tensor([[1.0], [50.0], [0.01]])
    embeddings = Embeddings((directions * lengths)[:, None], directions * lengths.flip(0))
    assert set(retrieval_recall(embeddings, torch.arange(3), ranks=(1,)).values()) == {1.0}


def test_embeddings_that_are_all_alike_find_nothing() -> None:
    embeddings = Embeddings(torch.ones(12, 1, 4), torch.ones(12, 4))
    recall = retrieval_recall(embeddings, torch.arange(12), ranks=(1, 11, 12))
    for way in ("text_to_image", "image_to_text"):
        assert [recall[f"{way}_recall@{rank}"] for rank in (1, 11, 12)] == [0, 0, 1]


def test_an_image_without_prompts_distracts_but_is_not_asked() -> None:
    embeddings = Embeddings(torch.tensor([[[1.0, 0.0]], [[0.9, 0.1]]]), torch.tensor([[1.0, 0.12]]))
    recall = retrieval_recall(embeddings, torch.tensor([0]), ranks=(1, 2))
    assert recall["text_to_image_recall@1"] == 0
    assert recall["text_to_image_recall@2"] == 1
    assert recall["image_to_text_recall@1"] == 1
