"""Scores of windows: cosines as the head itself computes them, and mask logits of any head, however they are cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cache_schema.errors import UsageError
from evaluate.open_vocabulary import scores
from evaluate.open_vocabulary.classes import ClassPrompts
from evaluate.open_vocabulary.scores import CosineScorer, HeadScorer, make_scorer
from extract.encoders.protocols import ImageEncoding
from heads.cross_attention import build_cross_attention
from heads.inputs import FeatureShapes, Head, HeadInputs, HeadOutputs
from heads.linear import build_linear
from heads.talk2dino import Talk2DinoHead

NUM_WINDOWS, GH, GW, D, E, P = 3, 4, 5, 8, 6, 7
SHAPES = FeatureShapes({"last": (GH, GW, D)}, E, P, {"last": D})


@pytest.fixture
def encoding() -> ImageEncoding:
    generator = torch.Generator().manual_seed(2)
    return ImageEncoding(
        {"last": torch.randn(NUM_WINDOWS, GH, GW, D, generator=generator)},
        {"last": torch.randn(NUM_WINDOWS, D, generator=generator)},
        {"logits": torch.randn(NUM_WINDOWS, 2, GH, GW, generator=generator)},
    )


@pytest.fixture
def prompts() -> ClassPrompts:
    """Three classes with two, one and three prompts of one to four tokens."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(4) < torch.tensor([3, 1, 4, 2, 4, 1])[:, None]
    tokens = torch.randn(6, 4, E, generator=generator) * mask[..., None]
    return ClassPrompts(torch.randn(6, P, generator=generator), tokens, mask, torch.tensor([0, 0, 1, 2, 2, 2]))


def build_talk2dino(text: str = "pooled", **settings: bool) -> Talk2DinoHead:
    torch.manual_seed(4)
    width = P if text == "pooled" else E
    return Talk2DinoHead(image_width=D, pooled_width=width, layer="last", text=text, **settings).eval()


@pytest.mark.parametrize("text", ["pooled", "mean"])
def test_cosines_are_those_of_the_head_for_the_mean_of_the_prompts(
    text: str, encoding: ImageEncoding, prompts: ClassPrompts
) -> None:
    head = build_talk2dino(text)
    found = make_scorer(head, prompts).score(encoding)
    mean = torch.stack([tokens[mask].mean(0) for tokens, mask in zip(prompts.tokens, prompts.mask, strict=True)])
    pooled, tokens = (
        torch.stack([values[prompts.class_index == number].mean(0) for number in range(3)])
        for values in (prompts.pooled, mean)
    )
    for window in range(NUM_WINDOWS):
        inputs = HeadInputs(
            features={"last": encoding.features["last"][window : window + 1]},
            cls={},
            prompt_tokens=tokens[:, None],
            prompt_mask=torch.ones(3, 1, dtype=torch.bool),
            pooled=pooled,
            image_index=torch.zeros(3, dtype=torch.long),
        )
        torch.testing.assert_close(found[window], head.cosine(inputs).sigmoid())


def test_averaging_before_the_projection_is_not_averaging_behind_it(
    encoding: ImageEncoding, prompts: ClassPrompts
) -> None:
    head = build_talk2dino()
    each = ClassPrompts(prompts.pooled, prompts.tokens, prompts.mask, torch.arange(6))
    behind = prompts.mean_over_prompts(make_scorer(head, each).score(encoding).transpose(0, 1)).transpose(0, 1)
    assert (make_scorer(head, prompts).score(encoding) - behind).abs().max() > 1e-3


def test_a_head_that_reads_pooled_prompts_is_given_their_mean(encoding: ImageEncoding, prompts: ClassPrompts) -> None:
    head = build_linear(SHAPES).eval()
    assert not head.reads_tokens
    inputs = HeadInputs(
        features=encoding.features,
        cls=encoding.cls,
        prompt_tokens=torch.zeros(9, 0, E),
        prompt_mask=torch.zeros(9, 0, dtype=torch.bool),
        pooled=prompts.mean_pooled().repeat(NUM_WINDOWS, 1),
        image_index=torch.arange(NUM_WINDOWS).repeat_interleave(3),
    )
    expected = head(inputs).mask_logits.sigmoid().unflatten(0, (NUM_WINDOWS, 3))
    torch.testing.assert_close(make_scorer(head, prompts).score(encoding), expected)


def test_a_head_that_reads_tokens_is_given_each_prompt_and_its_logits_are_averaged(
    encoding: ImageEncoding, prompts: ClassPrompts
) -> None:
    torch.manual_seed(5)
    head = build_cross_attention(SHAPES, dim=8, inner_dim=8, num_heads=2, hidden_dim=8).eval()
    assert head.reads_tokens
    expected = []
    for window in range(NUM_WINDOWS):
        logits = []
        for row in range(6):
            length = int(prompts.mask[row].sum())
            inputs = HeadInputs(
                features={"last": encoding.features["last"][window : window + 1]},
                cls={"last": encoding.cls["last"][window : window + 1]},
                prompt_tokens=prompts.tokens[row : row + 1, :length],
                prompt_mask=prompts.mask[row : row + 1, :length],
                pooled=prompts.pooled[row : row + 1],
                image_index=torch.zeros(1, dtype=torch.long),
            )
            logits.append(head(inputs).mask_logits[0])
        of_class = [torch.stack(logits[start:stop]).mean(0) for start, stop in ((0, 2), (2, 3), (3, 6))]
        expected.append(torch.stack(of_class).sigmoid())
    torch.testing.assert_close(make_scorer(head, prompts).score(encoding), torch.stack(expected))


class CountingHead(Head):
    """Says of a pair the sum of the window's first patch and the prompt's pooled feature; counts what it is given."""

    def __init__(self, reads_tokens: bool) -> None:
        super().__init__()
        self.layers, self.reads_tokens, self.given = ("last",), reads_tokens, list[int]()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, inputs: HeadInputs) -> HeadOutputs:
        self.given.append(len(inputs.pooled))
        patches = inputs.features["last"][inputs.image_index, 0, 0].sum(-1)
        logits: Tensor = patches + inputs.pooled.sum(-1)
        return HeadOutputs(self.scale * logits[:, None, None].expand(-1, 2, 2))


@pytest.mark.parametrize("reads_tokens", [False, True])
@pytest.mark.parametrize("pairs_at_once", [1, 4, 7, 64])
def test_classes_are_given_in_calls_of_bounded_size_that_change_nothing(
    reads_tokens: bool,
    pairs_at_once: int,
    encoding: ImageEncoding,
    prompts: ClassPrompts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scores, "PAIRS_AT_ONCE", pairs_at_once)
    head = CountingHead(reads_tokens)
    found = make_scorer(head, prompts).score(encoding)
    assert max(head.given) <= max(NUM_WINDOWS, pairs_at_once)
    assert sum(head.given) == NUM_WINDOWS * (6 if reads_tokens else 3)
    patches = encoding.features["last"][:, 0, 0].sum(-1)
    expected = (patches[:, None] + prompts.mean_pooled().sum(-1)).sigmoid()
    torch.testing.assert_close(found, expected[..., None, None].expand(-1, -1, 2, 2))


def test_live_features_are_rounded_as_the_cache_rounds_them(encoding: ImageEncoding, prompts: ClassPrompts) -> None:
    head = build_talk2dino()
    rounded = ImageEncoding({"last": encoding.features["last"].half().float()})
    found = make_scorer(head, prompts, image_dtype="float16").score(encoding)
    assert torch.equal(found, make_scorer(head, prompts).score(rounded))
    assert not torch.equal(found, make_scorer(head, prompts).score(encoding))


def test_which_scores_suit_a_head(prompts: ClassPrompts) -> None:
    cosines, learned = build_talk2dino(), build_talk2dino(learned_logits=True)
    assert isinstance(make_scorer(cosines, prompts), CosineScorer)
    assert isinstance(make_scorer(learned, prompts), HeadScorer)
    assert make_scorer(cosines, prompts).background == 0.55
    assert make_scorer(learned, prompts).background == 0.5
    assert make_scorer(cosines, prompts).describe()["scores"] == "sigmoid of cosines"
    assert make_scorer(build_linear(SHAPES), prompts).describe()["prompts_of_class"] == "averaged before the head"
    with pytest.raises(UsageError, match="only Talk2DINO's projection cleans the background"):
        make_scorer(learned, prompts, cleaning=0.2)


def test_cleaning_reads_the_attention_logits(encoding: ImageEncoding, prompts: ClassPrompts) -> None:
    head = build_talk2dino()
    plain, cleaned = (make_scorer(head, prompts, cleaning=strength).score(encoding) for strength in (0.0, 0.2))
    assert (plain - cleaned).abs().max() > 1e-3
    other = ImageEncoding(encoding.features, {}, {"logits": -encoding.attention["logits"]})
    assert (make_scorer(head, prompts, cleaning=0.2).score(other) - cleaned).abs().max() > 1e-3
