"""A batch that is encoded part by part has the gradients of the whole batch, also where something is dropped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from heads.contrastive import clip_contrastive
from heads.gradient_cache import backward_in_parts
from heads.inputs import Embeddings, HeadInputs, HeadOutputs
from heads.live import EndToEnd, LiveInputs
from tests.heads.live_encoders import Read, Seen

NUM_IMAGES, NUM_PROMPTS = 5, 9


class Images(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Sequential(nn.Linear(6, 8), nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, given: Tensor) -> Seen:
        return Seen({}, {"last": self.linear(given)})


class Texts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 4)

    def forward(self, token_ids: list[list[int]]) -> Read:
        tokens = torch.stack([self.embedding(torch.tensor(ids)) for ids in token_ids])
        return Read(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool), tokens.mean(1))


class Compare(nn.Module):
    """A learner that gives its embeddings, with a learned scale and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)
        self.scale, self.bias = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.tensor(0.5))

    def forward(self, inputs: HeadInputs) -> HeadOutputs:
        embeddings = Embeddings(inputs.cls["last"][:, None], self.project(inputs.pooled), self.scale * 1, self.bias * 1)
        return HeadOutputs(torch.empty(len(inputs.pooled), 0, 0), embeddings=embeddings)


def make(dropout: float = 0.0, *, live_text: bool = True) -> EndToEnd:
    torch.manual_seed(0)
    return EndToEnd(Compare(), Images(dropout), Texts() if live_text else None)


def make_inputs() -> LiveInputs:
    generator = torch.Generator().manual_seed(1)
    cached = HeadInputs(
        features={},
        cls={},
        prompt_tokens=torch.zeros(NUM_PROMPTS, 2, 4),
        prompt_mask=torch.ones(NUM_PROMPTS, 2, dtype=torch.bool),
        pooled=torch.randn(NUM_PROMPTS, 4, generator=generator),
        image_index=torch.tensor([2, 0, 1, 1, 4, 3, 0, 2, 4]),
    )
    ids = [[1, 2], [3, 4], [5, 5], [7, 19], [0, 6], [8, 9], [10, 11]]
    given = torch.randn(NUM_IMAGES, 6, generator=generator)
    return LiveInputs(cached, given, ids, torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 2]))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def loss_of(embeddings: Embeddings) -> Tensor:
    sums = clip_contrastive(embeddings, make_inputs().cached.image_index, same_image="negatives")
    assert embeddings.bias is not None
    return sums + 0.1 * embeddings.bias**2


@pytest.mark.parametrize("images_at_once", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("live_text", [True, False])
def test_parts_have_the_gradients_of_the_whole(images_at_once: int, live_text: bool) -> None:
    whole, parts = make(live_text=live_text), make(live_text=live_text)
    outputs = whole(make_inputs())
    assert outputs.embeddings is not None
    expected = loss_of(outputs.embeddings)
    (3 * expected).backward()  # type: ignore[no-untyped-call]
    found = backward_in_parts(parts, make_inputs(), loss_of, images_at_once=images_at_once, scale=lambda loss: 3 * loss)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=0)
    assert gradients(parts).keys() == gradients(whole).keys() == dict(whole.named_parameters()).keys()
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(parts)[name], gradient, rtol=1e-4, atol=1e-6)


def test_what_is_dropped_is_dropped_in_both_passes() -> None:
    """By finite differences: with one seed, the loss really falls as fast along the gradient as the gradient says."""

    def learn(model: EndToEnd) -> Tensor:
        torch.manual_seed(7)
        return backward_in_parts(model, make_inputs(), loss_of, images_at_once=2)

    model = make(dropout=0.5)
    before = learn(model)
    slopes = gradients(model)
    step, square = 1e-3, sum(float((gradient**2).sum()) for gradient in slopes.values())
    moved = make(dropout=0.5)
    with torch.no_grad():
        for name, value in moved.named_parameters():
            value -= step * slopes[name]
    assert float(before - learn(moved)) == pytest.approx(step * square, rel=0.05)


def test_randomness_goes_on_as_after_one_pass() -> None:
    model, states = make(dropout=0.5), []
    for images_at_once in (NUM_IMAGES, NUM_IMAGES + 3):
        torch.manual_seed(7)
        backward_in_parts(model, make_inputs(), loss_of, images_at_once=images_at_once)
        states.append(torch.get_rng_state())
    torch.manual_seed(7)
    model(make_inputs())
    assert all(torch.equal(state, torch.get_rng_state()) for state in states)


@pytest.mark.parametrize("images_at_once", [1, 2, 5])
def test_parts_are_a_partition(images_at_once: int) -> None:
    inputs = make_inputs()
    assert inputs.token_ids is not None
    assert inputs.prompt_index is not None
    assert inputs.given is not None
    seen = []
    for start in range(0, NUM_IMAGES, images_at_once):
        part, places = inputs.part(start, start + images_at_once)
        assert part.token_ids is not None
        assert part.prompt_index is not None
        assert part.given is not None
        for row, place in enumerate(places.tolist()):
            asked = part.token_ids[part.prompt_index[row]]
            assert asked == inputs.token_ids[inputs.prompt_index[place]]
            image = part.given[part.cached.image_index[row]]
            assert torch.equal(image, inputs.given[inputs.cached.image_index[place]])
            assert torch.equal(part.cached.pooled[row], inputs.cached.pooled[place])
        seen += places.tolist()
    assert sorted(seen) == list(range(NUM_PROMPTS))
