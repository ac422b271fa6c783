"""docs/heads.md says what the builders say: every argument by name with its default, and encoders that exist."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from extract.encoders import IMAGE_ENCODERS, TEXT_ENCODERS
from heads import HEADS
from heads.bidirectional import build_bidirectional
from heads.clipseg import build_clipseg
from heads.cross_attention import build_cross_attention
from heads.film import build_film
from heads.linear import build_linear
from heads.talk2dino import build_talk2dino
from heads.two_way import build_two_way

BUILDERS: dict[str, Callable[..., Any]] = {
    "linear": build_linear,
    "cross_attention": build_cross_attention,
    "film": build_film,
    "clipseg": build_clipseg,
    "two_way": build_two_way,
    "bidirectional": build_bidirectional,
    "talk2dino": build_talk2dino,
}
DOCUMENT = (Path(__file__).parents[2] / "docs" / "heads.md").read_text(encoding="utf-8")
SECTIONS = {
    name.strip(): text for name, text in re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
}


def test_every_head_has_its_section_and_its_row() -> None:
    assert set(SECTIONS) == set(BUILDERS)
    assert set(HEADS) <= set(SECTIONS)
    assert set(re.findall(r"^\| \[`(\w+)`\]\(#\w+\)", DOCUMENT, re.MULTILINE)) == set(SECTIONS)


@pytest.mark.parametrize("head", BUILDERS)
def test_arguments_have_the_names_and_defaults_of_the_builder(head: str) -> None:
    parameters = inspect.signature(BUILDERS[head]).parameters
    documented = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", SECTIONS[head], re.MULTILINE))
    assert {name: json.loads(default) for name, default in documented.items()} == {
        name: list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        for name, parameter in parameters.items()
        if name != "shapes"
    }


@pytest.mark.parametrize("head", BUILDERS)
def test_the_extraction_command_names_encoders_that_exist(head: str) -> None:
    (image,) = re.findall(r"--image-encoder (\S+)", SECTIONS[head])
    (text,) = re.findall(r"--text-encoder (\S+)", SECTIONS[head])
    (size,) = re.findall(r"--input-size (\d+) \d+", SECTIONS[head])
    assert int(size) % IMAGE_ENCODERS[image].patch == 0
    assert text in TEXT_ENCODERS
