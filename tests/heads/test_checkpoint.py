"""Heads on disk: what is saved is what is loaded, and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cache_schema.errors import UsageError
from heads.checkpoint import HeadSpec, load_head, save_head
from heads.inputs import FeatureShapes

SPEC = HeadSpec("linear", {"layer": "9"}, FeatureShapes({"9": (2, 3, 8)}, token_width=6, pooled_width=4))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_head(tmp_path / "best", SPEC, SPEC.build())
    return tmp_path / "best"


def test_a_head_comes_back_as_it_was_saved(folder: Path) -> None:
    spec, head = load_head(folder)
    assert spec == SPEC
    assert not head.training
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in head.state_dict().items())


def test_a_missing_weight_is_never_filled_in_silence(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["projection.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UsageError, match=r"does not fit its config.json.*projection.weight"):
        load_head(folder)


def test_weights_that_are_cut_short_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UsageError, match="cannot be read"):
        load_head(folder)


def test_a_folder_without_a_head_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no head at"):
        load_head(tmp_path)


def test_a_config_that_describes_no_head_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"head": "linear"}))
    with pytest.raises(UsageError, match="does not describe a head"):
        load_head(folder)
