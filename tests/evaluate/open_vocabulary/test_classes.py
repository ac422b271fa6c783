"""Classes, their prompts, and what a text encoder says of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cache_schema.errors import UsageError
from evaluate.open_vocabulary.classes import ClassPrompts, OpenClass, encode_classes, parse_classes
from evaluate.open_vocabulary.templates import TEMPLATE_SETS, TEMPLATES, fill
from evaluate.rounding import as_cached
from tests.extract.toys import ToyTextEncoder

CLASSES = [OpenClass("cat", ("cat", "small cat")), OpenClass("traffic sign", ("traffic sign",))]


def test_template_sets_are_as_large_as_their_names_say() -> None:
    assert list(TEMPLATES) == list(TEMPLATE_SETS)
    for name, templates in TEMPLATES.items():
        assert len(set(templates)) == len(templates) == (1 if name == "bare" else int(name))
        assert all(template.count("{}") == 1 for template in templates)
    assert set(TEMPLATES["7"]) < set(TEMPLATES["80"])
    assert TEMPLATES["1"][0] in TEMPLATES["80"]


def test_the_seven_and_the_five_are_those_that_were_published() -> None:
    assert TEMPLATES["7"] == (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    )
    assert TEMPLATES["5"] == (
        "there is a {} in the scene.",
        "there is the {} in the scene.",
        "this is a {} in the scene.",
        "this is the {} in the scene.",
        "this is one {} in the scene.",
    )


@given(st.text(min_size=1), st.sampled_from(TEMPLATE_SETS))
def test_a_name_is_put_in_whatever_it_holds(name: str, templates: str) -> None:
    for template, prompt in zip(TEMPLATES[templates], fill(templates, name), strict=True):
        front, back = template.split("{}")
        assert prompt == front + name + back


def test_names_on_a_command_line_have_blanks_for_underscores() -> None:
    found = parse_classes("pikachu,traffic_sign, the_ big  tree ,été")
    assert [one.name for one in found] == ["pikachu", "traffic sign", "the big tree", "été"]
    assert all(one.spellings == (one.name,) for one in found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a class has no name"),
        ("cat,,dog", "a class has no name"),
        ("cat,_", "a class has no name"),
        ("cat,dog,cat", "cat stands there twice"),
        ("a_b,a b", "a b stands there twice"),
        ("cat,background", "ask for it with --background"),
        ("Background,cat", "ask for it with --background"),
        ("cat,_BACKGROUND", "ask for it with --background"),
    ],
)
def test_names_that_cannot_be_told_apart_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_classes(text)


def test_every_spelling_is_put_into_every_template() -> None:
    assert CLASSES[0].prompts("5") == [*fill("5", "cat"), *fill("5", "small cat")]


def test_features_are_averaged_over_the_prompts_of_a_class() -> None:
    encoder = ToyTextEncoder()
    found = encode_classes(CLASSES, "7", encoder, "float32")
    pooled, tokens = [], []
    for one in CLASSES:
        said = [encoder.encode(encoder.tokenize([prompt])) for prompt in one.prompts("7")]
        pooled.append(torch.stack([each.pooled[0] for each in said]).mean(0))
        tokens.append(torch.stack([each.tokens[0].mean(0) for each in said]).mean(0))
    assert found.num_classes == 2
    torch.testing.assert_close(found.mean_pooled(), torch.stack(pooled))
    torch.testing.assert_close(found.mean_tokens(), torch.stack(tokens))


def test_prompts_that_are_encoded_in_several_batches_are_those_of_one() -> None:
    encoder = ToyTextEncoder()
    found = encode_classes([OpenClass(name, (name,)) for name in ("a", "b c d e f")], "80", encoder, "float32")
    assert encoder.encoded == [64, 64, 32]
    prompts = [*fill("80", "a"), *fill("80", "b c d e f")]
    whole = encoder.encode(encoder.tokenize(prompts))
    assert torch.equal(found.mask, whole.mask)
    assert torch.equal(found.pooled, whole.pooled)
    assert torch.equal(found.tokens, whole.tokens.nan_to_num())
    assert found.class_index.tolist() == [0] * 80 + [1] * 80


def test_features_are_rounded_as_the_cache_of_the_training_rounded_them() -> None:
    found = encode_classes(CLASSES, "1", ToyTextEncoder(), "float16")
    exact = encode_classes(CLASSES, "1", ToyTextEncoder(), "float32")
    assert found.pooled.dtype == torch.float32
    assert torch.equal(found.pooled, exact.pooled.half().float())
    assert not torch.equal(found.pooled, exact.pooled)


def test_int8_keeps_a_scale_for_each_token() -> None:
    values = torch.randn(2, 3, 16)
    rounded = as_cached(values, "int8")
    step = values.abs().amax(-1, keepdim=True) / 127
    assert ((rounded - values).abs() <= 0.505 * step).all()
    assert not torch.equal(rounded, values)


def test_no_class_is_a_mistake() -> None:
    with pytest.raises(UsageError, match="there is no class to look for"):
        encode_classes([], "7", ToyTextEncoder(), "float32")


def test_means_are_taken_class_by_class() -> None:
    prompts = ClassPrompts(
        torch.eye(3), torch.zeros(3, 0, 2), torch.zeros(3, 0, dtype=torch.bool), torch.tensor([0, 1, 1])
    )
    assert prompts.mean_pooled().tolist() == [[1, 0, 0], [0, 0.5, 0.5]]
