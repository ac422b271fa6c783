"""Every head as an ONNX file: what onnxruntime says of it is what torch says, and docs/onnx.md has it right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from evaluate.onnx_export import Example, OnnxModel, greatest_differences, write_onnx
from evaluate.predictor import ShowsAttention
from heads import HEADS, build_head
from heads.export import FlatHead, export_head, flat_inputs, free_sizes, make_example
from heads.inputs import FeatureShapes, Head, HeadInputs

PAGE = Path(__file__).parents[2] / "docs" / "onnx.md"

WIDTHS = {"4": 16, "7": 16, "10": 24, "last": 16}
SHAPES = FeatureShapes(
    {layer: (5, 7, width) for layer, width in WIDTHS.items()},
    token_width=12,
    pooled_width=10,
    cls_widths=WIDTHS,
    attention={"logits": (4, 5, 7), "head_tokens": (4, 16), "mean_token": (16,)},
)
PYRAMID = FeatureShapes({"1": (8, 12, 6), "2": (4, 6, 8), "3": (2, 3, 10)}, token_width=12, pooled_width=10)
BIDIRECTIONAL: dict[str, Any] = {"dim": 16, "num_heads": 4, "hidden_dim": 24, "lstm_dim": 5, "stages": [8]}

COMPLETE: dict[str, tuple[FeatureShapes, dict[str, Any]]] = {
    "linear": (SHAPES, {}),
    "cross_attention": (
        SHAPES,
        {"layers": ["4", "last"], "dim": 32, "image_depth": 1, "depth": 2, "self_attention": True, "upsample": 2},
    ),
    "film": (SHAPES, {"layers": ["4", "last"], "dim": 32, "num_heads": 4, "residual": True, "upsample": 2}),
    "clipseg": (SHAPES, {"dim": 16, "hidden_dim": 32, "refined": True, "patch_size": 8}),
    "two_way": (
        SHAPES,
        {"dim": 32, "mlp_dim": 48, "num_heads": 4, "depth": 2, "layers": ["4", "last"], "text": "both"}
        | {"no_target": True},
    ),
    "bidirectional": (
        PYRAMID,
        BIDIRECTIONAL | {"skips": True, "positions": True, "no_target": True, "num_layers": 1, "lstm_layers": 2},
    ),
    "talk2dino": (SHAPES, {"learned_logits": True}),
}
"""Each head with all that it can read and say switched on."""

VARIANTS: dict[str, tuple[str, FeatureShapes, dict[str, Any]]] = {
    "a fused block of the published cross_attention": ("cross_attention", SHAPES, {}),
    "film on one layer": ("film", SHAPES, {}),
    "clipseg as published": ("clipseg", SHAPES, {"dim": 16, "hidden_dim": 32, "patch_size": 4}),
    "two_way on a pyramid": ("two_way", PYRAMID, {"dim": 32, "mlp_dim": 48, "num_heads": 4, "depth": 1}),
    "talk2dino on the mean of tokens": ("talk2dino", SHAPES, {"text": "mean"}),
}
SIZES = ((1, 1, 1), (1, 4, 6), (4, 3, 9), (3, 7, 2))
"""Numbers of images, prompts and tokens; a model is traced on (2, 4, 5)."""


def make_head(name: str, shapes: FeatureShapes, arguments: dict[str, Any]) -> Head:
    """With statistics of batch norms that are no longer 0 and 1."""
    torch.manual_seed(0)
    head = build_head(name, shapes, arguments)
    if isinstance(head, ShowsAttention):
        head.shows_attention = True
    head.train()
    with torch.no_grad():
        head(make_example(head, shapes, 3, 8, 6, seed=9))
    return head.eval()


def said_by(head: Head, inputs: HeadInputs) -> dict[str, torch.Tensor]:
    mappings = (dict(inputs.features), dict(inputs.cls), dict(inputs.attention))
    with torch.no_grad():
        return FlatHead(head)(*mappings, *list(flat_inputs(inputs).values())[-4:])


def write(head: Head, shapes: FeatureShapes, path: Path) -> OnnxModel:
    traced = make_example(head, shapes, 2, 4, 5)
    write_onnx(
        export_head(head, traced),
        path,
        inputs=list(flat_inputs(traced)),
        outputs=list(said_by(head, traced)),
        sizes=free_sizes(traced),
    )
    return OnnxModel(path)


def check_parity(head: Head, shapes: FeatureShapes, model: OnnxModel) -> None:
    for seed, sizes in enumerate(SIZES, start=1):
        inputs = make_example(head, shapes, *sizes, seed=seed)
        expected, found = said_by(head, inputs), model.run(flat_inputs(inputs))
        assert found.keys() == expected.keys()
        for name, values in found.items():
            np.testing.assert_allclose(values, expected[name].numpy(), rtol=0, atol=1e-4, err_msg=f"{name} of {sizes}")
        prompts = list(range(sizes[1]))[::-1]  # other prompts in other places, so that nothing can be a constant
        turned = flat_inputs(inputs) | {
            name: tensor[prompts] for name, tensor in flat_inputs(inputs).items() if "/" not in name
        }
        np.testing.assert_allclose(model.run(turned)["mask_logits"], found["mask_logits"][::-1], atol=1e-4)


def rows_of_page() -> dict[str, tuple[set[str], set[str]]]:
    """What the table says that each head reads and says."""
    table = PAGE.read_text(encoding="utf-8").partition("\n| head |")[2].partition("\n\n")[0]
    cells = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    rows = {found[1]: row for row in cells if (found := re.fullmatch(r"`(\w+)`", row[0].strip()))}
    names = re.compile(r"`([\w/]+)`")
    return {head: (set(names.findall(row[1])), set(names.findall(row[2]))) for head, row in rows.items()}


@pytest.mark.parametrize("name", COMPLETE)
def test_a_head_says_the_same_in_onnxruntime_and_its_row_has_it_right(name: str, tmp_path: Path) -> None:
    shapes, arguments = COMPLETE[name]
    head = make_head(name, shapes, arguments)
    model = write(head, shapes, tmp_path / "model.onnx")
    check_parity(head, shapes, model)
    reads, says = rows_of_page()[name]
    assert {re.sub("/.*", "/layer", port.name) for port in model.inputs} == reads
    assert {port.name for port in model.outputs} == says


@pytest.mark.parametrize("variant", VARIANTS)
def test_so_does_a_head_with_other_arguments(variant: str, tmp_path: Path) -> None:
    name, shapes, arguments = VARIANTS[variant]
    head = make_head(name, shapes, arguments)
    check_parity(head, shapes, write(head, shapes, tmp_path / "model.onnx"))


def test_every_head_is_exported_here_and_has_a_row() -> None:
    assert COMPLETE.keys() == HEADS.keys() == rows_of_page().keys()


def test_free_sizes_have_names_and_the_file_says_nothing_of_the_code(tmp_path: Path) -> None:
    head = make_head("linear", SHAPES, {})
    model = write(head, SHAPES, tmp_path / "model.onnx")
    ports = {port.name: port for port in (*model.inputs, *model.outputs)}
    assert ports["features/last"].shape == ("images", 5, 7, 16)
    assert ports["pooled"].shape == ("prompts", 10)
    assert ports["mask_logits"].shape == ("prompts", 5, 7)
    assert ports["image_index"].dtype == "int64"
    written = onnx.load(tmp_path / "model.onnx")
    assert [(entry.domain, entry.version) for entry in written.opset_import] == [("", 20)]
    assert not any(node.metadata_props for node in written.graph.node)
    assert str(Path(__file__).parents[2]).encode() not in (tmp_path / "model.onnx").read_bytes()


def test_a_wrong_answer_is_measured(tmp_path: Path) -> None:
    head = make_head("linear", SHAPES, {})
    model, inputs = write(head, SHAPES, tmp_path / "model.onnx"), make_example(head, SHAPES, 1, 2, 3)
    right = said_by(head, inputs)["mask_logits"]

    def difference(expected: torch.Tensor) -> float:
        return greatest_differences(model, [Example(flat_inputs(inputs), {"mask_logits": expected})])["mask_logits"]

    assert difference(right) < 1e-5
    off = right.clone()
    off[1, 2, 3] = 0.5 if right[1, 2, 3] < 0 else -0.5
    assert difference(off) == pytest.approx(abs(float(off[1, 2, 3] - right[1, 2, 3])), rel=1e-4)
    assert difference(right[:1]) == float("inf")
    for strange in (float("nan"), float("inf")):
        off[1, 2, 3] = strange
        assert difference(off) == float("inf")
