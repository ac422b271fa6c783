"""Contrastive losses against loops, against torch's cross-entropy, and in the corners where they could break."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cache_schema.errors import UsageError
from heads.contrastive import LARGEST_SCALE, clip_contrastive, info_nce, sigmoid_contrastive
from heads.inputs import Embeddings

Loss = Callable[[Embeddings, Tensor], Tensor]


def make_embeddings(
    num_images: int = 4, num_candidates: int = 3, num_prompts: int = 7, seed: int = 0, scale: float | None = 10.0
) -> tuple[Embeddings, Tensor]:
    """Noise with a scale and a bias, and an image for each prompt; some images may have no prompt, some several."""
    generator = torch.Generator().manual_seed(seed)
    image = 3 * torch.randn(num_images, num_candidates, 6, generator=generator)
    text = 2 * torch.randn(num_prompts, 6, generator=generator)
    index = torch.randint(num_images, (num_prompts,), generator=generator)
    return Embeddings(image, text, *(None if scale is None else torch.tensor(v) for v in (scale, -2.0))), index


def variant(loss: Callable[..., Tensor], **arguments: Any) -> Loss:
    return lambda embeddings, index: loss(embeddings, index, **arguments)


VARIANTS: dict[str, Loss] = {
    **{
        f"info_nce-{select}-{same_image}": variant(
            info_nce, select=select, same_image=same_image, over_batch_squared=False
        )
        for select in ("own", "pair")
        for same_image in ("negatives", "masked", "positives")
    },
    "talk2dino": info_nce,
    "clip": clip_contrastive,
    "juras": variant(clip_contrastive, same_image="negatives"),
    "sigmoid": sigmoid_contrastive,
    "sigmoid-pair": variant(sigmoid_contrastive, select="pair"),
}


def cosine(left: Tensor, right: Tensor) -> float:
    pairs = list(zip(left.tolist(), right.tolist(), strict=True))
    lengths = [math.sqrt(sum(value**2 for value in vector.tolist())) for vector in (left, right)]
    return sum(a * b for a, b in pairs) / lengths[0] / lengths[1]


def slow_similarities(embeddings: Embeddings, index: list[int], select: str) -> list[list[float]]:
    """rows: prompts; columns: the images of prompts."""
    table = []
    for text in embeddings.text:
        row = []
        for other, image in enumerate(index):
            chooser = text if select == "pair" else embeddings.text[other]
            best = max(embeddings.image[image], key=lambda candidate: cosine(chooser, candidate))
            row.append(cosine(text, best))
        table.append(row)
    return table


def slow_softmax_loss(embeddings: Embeddings, index: list[int], scale: float, select: str, same_image: str) -> float:
    table = slow_similarities(embeddings, index, select)
    num = len(index)
    total = 0.0
    for scores in (table, [list(column) for column in zip(*table, strict=True)]):
        for i in range(num):
            siblings = [j for j in range(num) if index[j] == index[i]]
            seen = [j for j in range(num) if same_image != "masked" or j == i or index[j] != index[i]]
            positives = siblings if same_image == "positives" else [i]
            whole = sum(math.exp(scale * scores[i][j]) for j in seen)
            share = [math.log(math.exp(scale * scores[i][j]) / whole) for j in positives]
            total -= sum(share) / len(share) / num / 2
    return total


def slow_sigmoid_loss(embeddings: Embeddings, index: list[int], scale: float, bias: float, select: str) -> float:
    table, num = slow_similarities(embeddings, index, select), len(index)
    total = 0.0
    for i in range(num):
        for j in range(num):
            sign = 1 if index[i] == index[j] else -1
            total += math.log(1 + math.exp(-sign * (scale * table[i][j] + bias)))
    return total / num


@pytest.mark.parametrize("select", ["own", "pair"])
@pytest.mark.parametrize("same_image", ["negatives", "masked", "positives"])
@pytest.mark.parametrize("scale", [10.0, None])
def test_info_nce_is_what_loops_say(select: Any, same_image: Any, scale: float | None) -> None:
    embeddings, index = make_embeddings(scale=scale)
    assert len(set(index.tolist())) < len(index), "some prompts should share an image"
    loss = info_nce(embeddings, index, select=select, same_image=same_image, over_batch_squared=False)
    expected = slow_softmax_loss(embeddings, index.tolist(), scale or 1 / 0.07, select, same_image)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_info_nce_as_published_is_divided_by_the_batch_squared_and_takes_siblings_for_negatives() -> None:
    embeddings, index = make_embeddings(scale=None)
    expected = slow_softmax_loss(embeddings, index.tolist(), 1 / 0.07, "own", "negatives") / 7**2
    assert float(info_nce(embeddings, index)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("num_candidates", [1, 3])
@pytest.mark.parametrize("same_image", ["negatives", "masked", "positives"])
def test_clip_contrastive_is_what_loops_say(same_image: Any, num_candidates: int) -> None:
    embeddings, index = make_embeddings(num_candidates=num_candidates)
    expected = slow_softmax_loss(embeddings, index.tolist(), 10.0, "own", same_image)
    assert float(clip_contrastive(embeddings, index, same_image=same_image)) == pytest.approx(expected, rel=1e-5)


def test_clip_contrastive_leaves_siblings_out_unless_told_otherwise() -> None:
    embeddings, index = make_embeddings(num_candidates=1)
    assert clip_contrastive(embeddings, index) == clip_contrastive(embeddings, index, same_image="masked")


@pytest.mark.parametrize("select", ["own", "pair"])
def test_sigmoid_contrastive_is_what_loops_say(select: Any) -> None:
    embeddings, index = make_embeddings()
    expected = slow_sigmoid_loss(embeddings, index.tolist(), 10.0, -2.0, select)
    assert float(sigmoid_contrastive(embeddings, index, select=select)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("missing", ["scale", "bias"])
def test_sigmoid_contrastive_says_how_to_get_a_scale_and_a_bias(missing: str) -> None:
    embeddings, index = make_embeddings()
    with pytest.raises(UsageError, match=r"contrastive_scale=10.0 and contrastive_bias=-10.0\."):
        sigmoid_contrastive(dataclasses.replace(embeddings, **{missing: None}), index)


@pytest.mark.parametrize("same_image", ["negatives", "masked", "positives"])
def test_with_one_prompt_to_an_image_it_is_the_symmetric_cross_entropy_of_torch(same_image: Any) -> None:
    embeddings, _ = make_embeddings(num_images=7, num_candidates=1)
    index = torch.randperm(7, generator=torch.Generator().manual_seed(5))
    text, image = F.normalize(embeddings.text, dim=1), F.normalize(embeddings.image[index, 0], dim=1)
    logits, labels = 10 * text @ image.T, torch.arange(7)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(clip_contrastive(embeddings, index, same_image=same_image), expected)
    torch.testing.assert_close(info_nce(embeddings, index, same_image=same_image), expected / 49)


def test_siblings_that_are_alike_cost_nothing_where_they_are_masked() -> None:
    """Two captions of one image, both right: only as negatives of each other do they cost log 2."""
    image = torch.eye(2)[:, None]
    embeddings = Embeddings(image, torch.eye(2)[[0, 0, 1, 1]], torch.tensor(50.0))
    index = torch.tensor([0, 0, 1, 1])
    assert float(clip_contrastive(embeddings, index)) == pytest.approx(0, abs=1e-6)
    assert float(clip_contrastive(embeddings, index, same_image="negatives")) == pytest.approx(math.log(2))


def test_a_prompt_picks_its_own_candidate_whichever_of_them_a_sibling_picks() -> None:
    image = torch.eye(3)[None]
    embeddings = Embeddings(image, torch.eye(3), torch.tensor(50.0))
    index = torch.zeros(3, dtype=torch.int64)
    assert float(info_nce(embeddings, index)) == pytest.approx(0, abs=1e-6)
    everyone_is_as_near = variant(info_nce, select="pair", over_batch_squared=False)
    assert float(everyone_is_as_near(embeddings, index)) == pytest.approx(math.log(3))


@pytest.mark.parametrize("name", VARIANTS)
@given(seed=st.integers(0, 2**16), num_prompts=st.integers(1, 9), num_images=st.integers(1, 5))
@settings(deadline=None, max_examples=15)
def test_the_order_of_prompts_and_images_does_not_matter(
    name: str, seed: int, num_prompts: int, num_images: int
) -> None:
    embeddings, index = make_embeddings(num_images, 3, num_prompts, seed)
    generator = torch.Generator().manual_seed(seed)
    prompts, images = (torch.randperm(num, generator=generator) for num in (num_prompts, num_images))
    shuffled = dataclasses.replace(embeddings, text=embeddings.text[prompts], image=embeddings.image[images])
    moved = images.argsort()[index[prompts]]
    torch.testing.assert_close(VARIANTS[name](shuffled, moved), VARIANTS[name](embeddings, index))


@pytest.mark.parametrize("name", VARIANTS)
def test_lengths_of_vectors_and_images_without_prompts_do_not_matter(name: str) -> None:
    embeddings, index = make_embeddings()
    other = dataclasses.replace(
        embeddings,
        text=embeddings.text * torch.linspace(0.1, 30, 7)[:, None],
        image=torch.cat([embeddings.image * torch.linspace(5, 0.2, 4)[:, None, None], torch.ones(2, 3, 6)]),
    )
    torch.testing.assert_close(VARIANTS[name](other, index), VARIANTS[name](embeddings, index))


@pytest.mark.parametrize("name", [name for name in VARIANTS if name in ("talk2dino", "juras") or "negatives" in name])
def test_an_image_given_once_is_as_good_as_one_copy_for_each_prompt(name: str) -> None:
    """The batches of the original systems hold a copy for each prompt; those of a cache hold each image once."""
    embeddings, index = make_embeddings()
    copies = dataclasses.replace(embeddings, image=embeddings.image[index])
    torch.testing.assert_close(VARIANTS[name](copies, torch.arange(7)), VARIANTS[name](embeddings, index))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("case", ["duplicates", "one prompt", "one image", "zeros", "opposites"])
def test_gradients_are_finite(name: str, case: str) -> None:
    embeddings, index = make_embeddings(num_prompts=1 if case == "one prompt" else 6)
    image, text = embeddings.image, embeddings.text
    if case == "duplicates":
        image, text = image[:1, :1].expand(4, 3, 6).clone(), image[:1, 0].expand(6, 6).clone()
    elif case == "one image":
        index = torch.zeros_like(index)
    elif case == "zeros":
        image, text = torch.zeros_like(image), torch.zeros_like(text)
    elif case == "opposites":
        text = -1e4 * image[index, 0]
    leaves = [image.requires_grad_(), text.requires_grad_(), torch.tensor(99.0).requires_grad_()]
    leaves.append(torch.tensor(-10.0).requires_grad_())
    loss = VARIANTS[name](Embeddings(*leaves), index)
    loss.backward()
    assert loss.isfinite()
    assert loss >= 0
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves)
    assert text.grad is not None


@pytest.mark.parametrize("name", ["talk2dino", "clip", "juras"])
def test_one_prompt_has_nothing_to_be_told_from(name: str) -> None:
    embeddings, index = make_embeddings(num_prompts=1)
    assert float(VARIANTS[name](embeddings, index)) == 0


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_reach_prompts_candidates_and_scale(name: str) -> None:
    embeddings, index = make_embeddings()
    leaves = [embeddings.image.requires_grad_(), embeddings.text.requires_grad_()]
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-2.0, requires_grad=True)
    VARIANTS[name](Embeddings(*leaves, scale, bias), index).backward()
    for leaf in (*leaves, scale, *([bias] if name.startswith("sigmoid") else [])):
        assert leaf.grad is not None
        assert leaf.grad.any()
    assert embeddings.text.grad is not None
    assert embeddings.text.grad.any(dim=1).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_autocast_does_not_blur_the_loss(name: str) -> None:
    embeddings, index = make_embeddings(scale=90.0)
    expected = VARIANTS[name](embeddings, index)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(VARIANTS[name](embeddings, index), expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_half_precision_embeddings_give_a_float32_loss(name: str) -> None:
    embeddings, index = make_embeddings(scale=90.0)
    fields = {field.name: getattr(embeddings, field.name).half() for field in dataclasses.fields(embeddings)}
    rounded = {name: value.float() for name, value in fields.items()}
    assert torch.equal(VARIANTS[name](Embeddings(**fields), index), VARIANTS[name](Embeddings(**rounded), index))


class TestScale:
    def loss(self, scale: Tensor, wrong: bool) -> Tensor:
        """Prompts that are right want a larger scale, prompts that are wrong a smaller one."""
        vectors = torch.eye(3) + 2
        index = torch.tensor([1, 2, 0] if wrong else [0, 1, 2])
        return clip_contrastive(Embeddings(vectors[:, None], vectors, scale), index)

    def test_it_is_at_most_100(self) -> None:
        assert float(self.loss(torch.tensor(1e4), wrong=True)) == pytest.approx(
            float(self.loss(torch.tensor(LARGEST_SCALE), wrong=True))
        )
        assert float(self.loss(torch.tensor(99.0), wrong=True)) < float(self.loss(torch.tensor(100.0), wrong=True))

    @pytest.mark.parametrize(("wrong", "moves"), [(True, True), (False, False)])
    def test_above_100_it_can_come_down_but_not_go_up(self, wrong: bool, moves: bool) -> None:
        scale = torch.tensor(101.0, requires_grad=True)
        self.loss(scale, wrong).backward()
        assert scale.grad is not None
        assert (float(scale.grad) > 0) == moves
        assert float(scale.grad) >= 0

    def test_below_100_it_moves_both_ways(self) -> None:
        for wrong in (True, False):
            scale = torch.tensor(5.0, requires_grad=True)
            self.loss(scale, wrong).backward()
            assert scale.grad is not None
            assert (float(scale.grad) > 0) == wrong
            assert scale.grad.any()
