"""Talk2DINO's head: what it computes, the laws of all heads, and the files of the published layout."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cache_schema.errors import UsageError
from heads.contrastive import clip_contrastive, info_nce, sigmoid_contrastive
from heads.inputs import FeatureShapes, HeadOutputs
from heads.retrieval import retrieval_recall
from heads.talk2dino import (
    ALIGNMENTS,
    Talk2DinoHead,
    build_talk2dino,
    load_talk2dino,
    read_talk2dino,
    write_talk2dino,
)
from tests.heads.laws import (
    check_export,
    check_gradients_reach_everything,
    check_padding_is_not_seen,
    check_prompts_do_not_see_each_other,
    check_tokens_are_missed_by_who_reads_them,
    make_inputs,
    overfit,
    sum_of_outputs,
)

SHAPES = FeatureShapes(
    {"3": (3, 2, 8), "last": (5, 7, 16)},
    token_width=12,
    pooled_width=10,
    cls_widths={"3": 8, "last": 16},
    attention={"logits": (4, 5, 7), "head_tokens": (4, 16), "mean_token": (16,)},
)
LEARNED: dict[str, Any] = {
    "logit_scale": 10.0,
    "learned_logits": True,
    "contrastive_scale": 10.0,
    "contrastive_bias": -10.0,
}
HEADS: dict[str, dict[str, Any]] = {
    "faithful": {},
    "learned": LEARNED,
    "linear": {"hidden_layers": 0, "alignment": "cls"},
    "deep": {"hidden_layers": 2, "alignment": "mean_patch"},
    "mean_token": {"alignment": "mean_token"},
}


def make_head(**arguments: Any) -> Talk2DinoHead:
    torch.manual_seed(0)
    return build_talk2dino(SHAPES, **arguments)


@pytest.fixture(params=HEADS)
def head(request: pytest.FixtureRequest) -> Talk2DinoHead:
    return make_head(**HEADS[request.param])


class TestLaws:
    def test_prompts_of_a_batch_do_not_see_each_other(self, head: Talk2DinoHead) -> None:
        check_prompts_do_not_see_each_other(head, make_inputs(SHAPES))

    def test_padding_is_not_seen(self, head: Talk2DinoHead) -> None:
        check_padding_is_not_seen(head, make_inputs(SHAPES))
        check_tokens_are_missed_by_who_reads_them(head, make_inputs(SHAPES))

    def test_gradients_reach_every_parameter(self, head: Talk2DinoHead) -> None:
        check_gradients_reach_everything(head, make_inputs(SHAPES), sum_of_outputs)

    def test_it_can_be_exported_for_any_number_of_prompts(self, head: Talk2DinoHead) -> None:
        check_export(head, make_inputs(SHAPES), make_inputs(SHAPES, num_images=2, num_prompts=5, seed=1))

    def test_gradients_of_the_masks_alone_reach_what_makes_masks(self) -> None:
        head = make_head(learned_logits=True)
        check_gradients_reach_everything(head, make_inputs(SHAPES), lambda outputs: outputs.mask_logits.sin().sum())

    @pytest.mark.parametrize(
        ("loss", "arguments"),
        [
            (info_nce, {}),
            (info_nce, {"contrastive_scale": 14.0}),
            (clip_contrastive, {"contrastive_scale": 14.0, "alignment": "cls"}),
            (sigmoid_contrastive, {"contrastive_scale": 10.0, "contrastive_bias": -10.0}),
        ],
    )
    def test_gradients_of_contrastive_losses_reach_every_parameter(
        self, loss: Callable[..., Tensor], arguments: dict[str, Any]
    ) -> None:
        inputs = make_inputs(SHAPES)

        def contrast(outputs: HeadOutputs) -> Tensor:
            assert outputs.embeddings is not None
            return loss(outputs.embeddings, inputs.image_index)

        check_gradients_reach_everything(make_head(**arguments), inputs, contrast)

    def test_eight_masks_are_learned_by_heart_where_there_are_more_channels_than_cells(self) -> None:
        """One direction per prompt can draw any mask over fixed tokens only where the tokens are independent."""
        shapes = FeatureShapes({"last": (14, 16, 256)}, token_width=12, pooled_width=16)
        torch.manual_seed(0)
        head = build_talk2dino(shapes, alignment="mean_patch", logit_scale=50.0, background=0.5, learned_logits=True)
        assert overfit(head, make_inputs(shapes), steps=200, rate=3e-3) > 0.95


def test_prompts_learn_to_find_their_images_without_masks() -> None:
    """Trained as published, the b^2 and all, each prompt's nearest image becomes its own."""
    head, inputs = make_head(), make_inputs(SHAPES, num_images=8, num_prompts=16)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)

    def recall() -> float:
        return retrieval_recall(head.embed(inputs), inputs.image_index, ranks=(1,))["text_to_image_recall@1"]

    before = recall()
    for _ in range(200):
        loss = info_nce(head.embed(inputs), inputs.image_index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before < 0.5
    assert recall() == 1


def test_the_projection_of_vit_b_has_as_many_parameters_as_the_published_one() -> None:
    shapes = FeatureShapes({"last": (32, 32, 768)}, 512, 512, attention={"head_tokens": (12, 768)})
    head = build_talk2dino(shapes)
    assert sum(parameter.numel() for parameter in head.parameters()) == 984_576
    assert head.layers == ("last",)
    assert head.attention == ("head_tokens",)


def test_a_prompt_is_projected_by_two_layers_with_a_tanh_between() -> None:
    head, inputs = make_head(), make_inputs(SHAPES)
    first, second = head.projection.linear_layer, head.projection.hidden_layers[0]
    assert isinstance(second, torch.nn.Linear)
    for prompt in range(8):
        hidden = torch.tanh(first.weight @ inputs.pooled[prompt] + first.bias)
        expected = second.weight @ hidden + second.bias
        torch.testing.assert_close(head.embed(inputs).text[prompt], expected)


def test_the_score_of_a_patch_is_its_cosine_with_the_projected_prompt() -> None:
    head, inputs = make_head(), make_inputs(SHAPES)
    projected, scores = head.projection(inputs.pooled).detach(), head.cosine(inputs)
    assert scores.shape == (8, 5, 7)
    for prompt, image in enumerate(inputs.image_index.tolist()):
        for row in range(5):
            for column in range(7):
                patch = inputs.features["last"][image, row, column]
                expected = float(patch @ projected[prompt] / patch.norm() / projected[prompt].norm())
                assert scores[prompt, row, column].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("background", [0.55, 0.54, 0.5])
def test_a_logit_is_above_0_where_the_sigmoid_of_the_cosine_is_above_the_background(background: float) -> None:
    head, inputs = make_head(background=background, logit_scale=7.0), make_inputs(SHAPES)
    logits, cosines = head(inputs).mask_logits, head.cosine(inputs)
    assert torch.equal(logits > 0, cosines.sigmoid() > background)
    assert 0 < int((logits > 0).sum()) < logits.numel()
    torch.testing.assert_close(logits, 7 * (cosines - math.log(background / (1 - background))))


def test_the_mean_of_its_tokens_may_stand_for_a_prompt() -> None:
    head, inputs = make_head(text="mean"), make_inputs(SHAPES)
    check_padding_is_not_seen(head, inputs)
    check_tokens_are_missed_by_who_reads_them(head, inputs)
    length = int(inputs.prompt_mask[1].sum())
    (expected,) = head.projection(inputs.prompt_tokens[1:2, :length].mean(1))
    torch.testing.assert_close(head.embed(inputs).text[1], expected)
    with pytest.raises(UsageError, match="unknown text 'means': did you mean 'mean'"):
        make_head(text="means")


def test_the_background_is_that_of_vit_b_unless_told_otherwise() -> None:
    inputs = make_inputs(SHAPES)
    assert torch.equal(make_head()(inputs).mask_logits, make_head(background=0.55, logit_scale=1.0)(inputs).mask_logits)


def test_logits_can_be_the_cosines_themselves() -> None:
    head, inputs = make_head(background=0.5), make_inputs(SHAPES)
    assert torch.equal(head(inputs).mask_logits, head.cosine(inputs))


def test_learned_logits_start_as_the_fixed_ones() -> None:
    inputs = make_inputs(SHAPES)
    heads = (make_head(logit_scale=10.0, learned_logits=learned) for learned in (False, True))
    fixed, learned = (head(inputs).mask_logits for head in heads)
    assert torch.equal(fixed, learned)


def test_masks_do_not_depend_on_what_training_compares() -> None:
    inputs = make_inputs(SHAPES)
    masks = [make_head(alignment=alignment)(inputs).mask_logits for alignment in ALIGNMENTS]
    assert all(torch.equal(mask, masks[0]) for mask in masks)


@pytest.mark.parametrize(
    ("alignment", "expected", "reads"),
    [
        ("cls", lambda inputs: inputs.cls["last"].unsqueeze(1), ()),
        ("mean_token", lambda inputs: inputs.attention["mean_token"].unsqueeze(1), ("mean_token",)),
        ("head_tokens", lambda inputs: inputs.attention["head_tokens"], ("head_tokens",)),
        ("mean_patch", lambda inputs: inputs.features["last"].flatten(1, 2).mean(1, keepdim=True), ()),
    ],
)
def test_a_prompt_is_compared_with_what_the_alignment_names(
    alignment: str, expected: Callable[..., Tensor], reads: tuple[str, ...]
) -> None:
    head, inputs = make_head(alignment=alignment), make_inputs(SHAPES)
    embeddings = head(inputs).embeddings
    assert embeddings is not None
    torch.testing.assert_close(embeddings.image, expected(inputs))
    assert head.attention == reads
    assert (embeddings.scale, embeddings.bias) == (None, None)


def test_embeddings_alone_need_no_token_grids() -> None:
    head, inputs = make_head(), make_inputs(SHAPES)
    alone, beside = head.embed(dataclasses.replace(inputs, features={})), head(inputs).embeddings
    assert beside is not None
    assert torch.equal(alone.text, beside.text)
    assert torch.equal(alone.image, beside.image)


def test_a_learned_scale_and_bias_start_where_they_are_told_to() -> None:
    embeddings = make_head(contrastive_scale=1 / 0.07, contrastive_bias=-10.0).embed(make_inputs(SHAPES))
    assert embeddings.scale is not None
    assert embeddings.bias is not None
    assert embeddings.scale.item() == pytest.approx(1 / 0.07)
    assert embeddings.bias.item() == -10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alignment": "head_token"}, "did you mean 'head_tokens'"),
        ({"alignment": "cls", "layer": "3+norm"}, "unknown layer '3.norm'"),
        ({"alignment": "head_tokens", "layer": "3"}, "patches of width 8 but head_tokens of 16"),
        ({"hidden_layers": -1}, "hidden_layers must be at least 0"),
        ({"background": 1.0}, "background must lie between 0 and 1"),
        ({"logit_scale": 0.0}, "must be above 0"),
        ({"contrastive_scale": -1.0}, "must be above 0"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_head(**arguments)


@pytest.mark.parametrize(
    ("alignment", "message"), [("head_tokens", "attention output head_tokens"), ("cls", "without CLS tokens")]
)
def test_what_was_not_cached_is_named(alignment: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_talk2dino(FeatureShapes({"last": (5, 7, 16)}, 12, 10), alignment=alignment)


def published(width: int = 16, pooled_width: int = 10, hidden: str = "hidden_layers.0") -> OrderedDict[str, Tensor]:
    """A state of the published layout with noise for weights."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "linear_layer.weight": (width, pooled_width),
        "linear_layer.bias": (width,),
        f"{hidden}.weight": (width, width),
        f"{hidden}.bias": (width,),
    }
    return OrderedDict((name, torch.randn(shape, generator=generator)) for name, shape in shapes.items())


class TestFiles:
    @pytest.mark.parametrize("hidden", ["hidden_layers.0", "linear_layer2"])
    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_file_of_the_published_layout_is_read(self, tmp_path: Path, hidden: str, zipped: bool) -> None:
        state, path = published(hidden=hidden), tmp_path / "vitb_mlp_infonce.pth"
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        head, inputs = make_head(contrastive_scale=14.0), make_inputs(SHAPES)
        load_talk2dino(head, path)
        hidden_features = torch.tanh(inputs.pooled @ state["linear_layer.weight"].T + state["linear_layer.bias"])
        expected = hidden_features @ state[f"{hidden}.weight"].T + state[f"{hidden}.bias"]
        torch.testing.assert_close(head.embed(inputs).text, expected)

    def test_a_file_saved_from_cuda_is_read_on_a_cpu(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "cuda.pth"
        with monkeypatch.context() as patch:
            patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
            torch.save(published(), path)
        with pytest.raises(RuntimeError, match="deserialize object on a CUDA device"):
            torch.load(path, weights_only=True)
        state = read_talk2dino(path)
        assert {tensor.device.type for tensor in state.values()} == {"cpu"}
        for name, tensor in published().items():
            assert torch.equal(state[name], tensor)

    @pytest.mark.parametrize("hidden_layers", [0, 1, 2])
    def test_a_head_comes_back_as_it_was_written(self, tmp_path: Path, hidden_layers: int) -> None:
        head, path = make_head(hidden_layers=hidden_layers), tmp_path / "projection.pth"
        write_talk2dino(head, path)
        torch.manual_seed(1)
        other = build_talk2dino(SHAPES, hidden_layers=hidden_layers)
        load_talk2dino(other, path)
        for name, tensor in head.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor)

    def test_a_written_file_has_the_published_names_and_nothing_else(self, tmp_path: Path) -> None:
        write_talk2dino(make_head(**LEARNED).half(), tmp_path / "projection.pth")
        state = torch.load(tmp_path / "projection.pth", weights_only=True)
        assert list(state) == list(published())
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
        assert [path.name for path in tmp_path.iterdir()] == ["projection.pth"]

    @pytest.mark.parametrize(
        ("changes", "messages"),
        [
            ({"linear_layer.bias": None}, ["linear_layer.bias is missing"]),
            ({"hidden_layers.0.weight": None}, ["hidden_layers.0.weight is missing"]),
            ({"hidden_layers.1.bias": torch.zeros(16)}, ["hidden_layers.1.weight is missing"]),
            ({"attn_weights": torch.zeros(12)}, ["'attn_weights' is unknown"]),
            ({"hidden_layers.0.gain": torch.zeros(12)}, ["'hidden_layers.0.gain' is unknown"]),
            ({"linear_layer2.bias": torch.zeros(16)}, ["both linear_layer2"]),
            ({"linear_layer.weight": torch.zeros(16, 10).half()}, ["linear_layer.weight is torch.float16"]),
            ({"linear_layer.weight": torch.zeros(16, 10).to_sparse()}, ["torch.sparse_coo"]),
            ({"linear_layer.weight": torch.zeros(16)}, [r"linear_layer.weight has shape \(16,\)"]),
            ({"hidden_layers.0.bias": torch.zeros(15)}, [r"hidden_layers.0.bias has shape \(15,\), not \(16,\)"]),
            ({"linear_layer.bias": torch.full((16,), torch.nan)}, ["linear_layer.bias has values that are not finite"]),
            ({"linear_layer.bias": torch.zeros(()).expand(1 << 40)}, ["fewer values than its shape says"]),
            ({"linear_layer.bias": torch.zeros(16, device="meta")}, ["linear_layer.bias has a shape but no values"]),
            ({"linear_layer.bias": 3.0}, ["linear_layer.bias is no tensor but float"]),
            (
                {"linear_layer.bias": torch.zeros(16).double(), "hidden_layers.0.bias": None, "other": torch.zeros(1)},
                ["linear_layer.bias is torch.float64", "hidden_layers.0.bias is missing", "'other' is unknown"],
            ),
        ],
    )
    def test_every_fault_of_a_file_is_named(self, tmp_path: Path, changes: dict[str, Any], messages: list[str]) -> None:
        state = {name: value for name, value in {**published(), **changes}.items() if value is not None}
        torch.save(state, tmp_path / "faulty.pth")
        for message in messages:
            with pytest.raises(UsageError, match=message):
                read_talk2dino(tmp_path / "faulty.pth")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"width": 24}, "projects 10 -> 24 -> 24, this head 10 -> 16 -> 16"),
            ({"pooled_width": 12}, "projects 12 -> 16 -> 16, this head 10 -> 16 -> 16"),
        ],
    )
    def test_weights_of_other_encoders_are_refused(
        self, tmp_path: Path, arguments: dict[str, int], message: str
    ) -> None:
        torch.save(published(**arguments), tmp_path / "other.pth")
        head = make_head()
        before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
        with pytest.raises(UsageError, match=message):
            load_talk2dino(head, tmp_path / "other.pth")
        assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())

    def test_weights_of_another_depth_are_refused(self, tmp_path: Path) -> None:
        write_talk2dino(make_head(hidden_layers=2), tmp_path / "deep.pth")
        with pytest.raises(UsageError, match="projects 10 -> 16 -> 16 -> 16, this head 10 -> 16 -> 16;"):
            load_talk2dino(make_head(), tmp_path / "deep.pth")

    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_file_that_would_run_code_is_refused_and_does_not_run_it(self, tmp_path: Path, zipped: bool) -> None:
        path, trace = tmp_path / "evil.pth", tmp_path / "it-ran"
        torch.save({**published(), "extra": Evil(trace)}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UsageError, match=r"holds more than tensors.* Save the projection's state_dict"):
            read_talk2dino(path)
        assert not trace.exists()

    def test_a_plain_pickle_is_refused_and_does_not_run(self, tmp_path: Path) -> None:
        path, trace = tmp_path / "evil.pth", tmp_path / "it-ran"
        path.write_bytes(pickle.dumps(Evil(trace), protocol=2))
        with pytest.raises(UsageError, match="could run code"):
            read_talk2dino(path)
        assert not trace.exists()

    def test_what_is_no_dict_of_tensors_is_refused(self, tmp_path: Path) -> None:
        torch.save([torch.zeros(3)], tmp_path / "list.pth")
        torch.save({1: torch.zeros(3)}, tmp_path / "numbers.pth")
        torch.save("linear_layer.weight", tmp_path / "text.pth")
        for name in ("list.pth", "numbers.pth", "text.pth"):
            with pytest.raises(UsageError, match="holds no tensors by name"):
                read_talk2dino(tmp_path / name)

    @pytest.mark.parametrize(
        "content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04" + bytes(64)]
    )
    def test_a_file_that_is_damaged_or_no_weights_at_all_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "damaged.pth").write_bytes(content)
        with pytest.raises(UsageError, match=r"damaged\.pth"):
            read_talk2dino(tmp_path / "damaged.pth")

    def test_a_cut_file_is_refused(self, tmp_path: Path) -> None:
        torch.save(published(), tmp_path / "cut.pth")
        whole = (tmp_path / "cut.pth").read_bytes()
        for length in range(1, len(whole), 97):
            (tmp_path / "cut.pth").write_bytes(whole[:length])
            with pytest.raises(UsageError, match=r"cut\.pth"):
                read_talk2dino(tmp_path / "cut.pth")

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    def test_a_file_with_changed_bytes_is_read_or_refused(self, tmp_path: Path) -> None:
        """No other error comes out, whatever is harmed: torch raises many kinds."""
        torch.save(published(), tmp_path / "harmed.pth", _use_new_zipfile_serialization=False)
        whole = (tmp_path / "harmed.pth").read_bytes()
        refused = 0
        for place in range(0, 900, 3):
            (tmp_path / "harmed.pth").write_bytes(whole[:place] + bytes([whole[place] ^ 9]) + whole[place + 1 :])
            try:
                read_talk2dino(tmp_path / "harmed.pth")
            except UsageError:
                refused += 1
        assert refused > 100

    def test_a_file_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        for path in (tmp_path / "missing.pth", tmp_path):
            with pytest.raises(UsageError, match="cannot be read"):
                read_talk2dino(path)


class Evil:
    """Leaves a trace where it is unpickled without care."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))
