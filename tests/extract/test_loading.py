"""Checkpoints load strictly or not at all, run no code, and have an identity that says what they compute."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from cache_schema.errors import UsageError
from cache_schema.fingerprint import canonical_json, fingerprint
from extract.encoders.image import HubImageEncoder, load_image_encoder
from extract.encoders.specs import ImageEncoderSpec
from tests.extract.image_checkpoints import FAMILIES, load_tower, make_checkpoints


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def load(checkpoint: Path | str, **settings: Any) -> HubImageEncoder:
    return load_image_encoder(ImageEncoderSpec(str(checkpoint), **settings))


def copy_of(checkpoint: Path, parent: Path, name: str = "copy") -> Path:
    return Path(shutil.copytree(checkpoint, parent / name))


def change_weights(checkpoint: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    change(weights)
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))


# Refusals


def test_there_must_be_a_model_at_the_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no encoder at .*nowhere: there is no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"has model type None; image encoders are dinov2, dinov2_with_registers"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"is not a model folder that can be loaded .*not a valid JSON file"):
        load(tmp_path)


def test_a_model_that_the_hub_does_not_hand_out_is_met_with_the_page_to_visit() -> None:
    with pytest.raises(
        UsageError, match=r"no encoder 'no-one/no-model': there is no such folder, and the hub"
    ) as caught:
        load("no-one/no-model")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("accept its licence at https://huggingface.co/no-one/no-model and log in.")


def test_a_model_of_another_family_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    other = copy_of(checkpoints["dinov2"], tmp_path)
    change_json(other / "config.json", model_type="bert")
    with pytest.raises(UsageError, match=r"has model type 'bert'; image encoders are .*resnet, dinov3_convnext\."):
        load(other)


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("dinov2", "embeddings.cls_token"),
        ("dinov2", "layernorm.weight"),
        ("dinov2", "encoder.layer.2.mlp.fc1.bias"),
        ("siglip", "vision_model.encoder.layers.1.mlp.fc1.bias"),
        ("clip", "vision_model.post_layernorm.weight"),
        ("resnet", "encoder.stages.2.layers.0.layer.0.normalization.running_var"),
    ],
)
def test_a_checkpoint_that_lacks_a_weight_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, weight: str
) -> None:
    checkpoint = copy_of(checkpoints[name], tmp_path)
    change_weights(checkpoint, lambda weights: weights.pop(weight))
    with pytest.raises(UsageError, match=r"lacks 1 weights that .*Model needs \(first: "):
        load(checkpoint)


@pytest.mark.parametrize("missing", ["model.safetensors", "preprocessor_config.json"])
def test_a_checkpoint_without_weights_or_processor_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path, missing: str
) -> None:
    checkpoint = copy_of(checkpoints["dinov2"], tmp_path)
    (checkpoint / missing).unlink()
    with pytest.raises(UsageError, match="is not a model folder that can be loaded"):
        load(checkpoint)


def test_weights_that_are_cut_short_or_of_another_shape_are_refused(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    short, other = copy_of(checkpoints["dinov2"], tmp_path, "short"), copy_of(checkpoints["dinov2"], tmp_path, "other")
    (short / "model.safetensors").write_bytes((short / "model.safetensors").read_bytes()[:1000])
    change_json(other / "config.json", hidden_size=16)
    for checkpoint in (short, other):
        with pytest.raises(UsageError):
            load(checkpoint)


# Pickles


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_no_code_of_a_pickled_checkpoint_is_ever_run(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    checkpoint = copy_of(checkpoints["dinov2"], tmp_path)
    (checkpoint / "model.safetensors").unlink()
    weights: dict[str, Any] = dict(load_tower(checkpoints["dinov2"]).state_dict())
    for payload in ({**weights, "layernorm.bias": Bomb(mark)}, Bomb(mark)):
        torch.save(payload, checkpoint / "pytorch_model.bin")
        with pytest.raises(UsageError, match="is not a model folder that can be loaded"):
            load(checkpoint)
        (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(payload, protocol=2))
        with pytest.raises(UsageError, match="is not a model folder that can be loaded"):
            load(checkpoint)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists(), "the bomb is a dud, and nothing was tested"


def test_a_pickled_checkpoint_of_weights_alone_is_the_same_checkpoint(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = copy_of(checkpoints["dinov2"], tmp_path)
    (checkpoint / "model.safetensors").unlink()
    torch.save(load_tower(checkpoints["dinov2"]).state_dict(), checkpoint / "pytorch_model.bin")
    assert load(checkpoint).identity == load(checkpoints["dinov2"]).identity


def test_threads_that_load_at_once_take_turns(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Or transformers, which replaces functions of its classes while it loads, would put the replaced ones back."""
    model_class, tie_weights = type(load_tower(checkpoints["dinov2"])), PreTrainedModel.tie_weights
    from_pretrained, met = model_class.from_pretrained, threading.Barrier(2)
    meetings = []

    def meet(*args: Any, **options: Any) -> Any:
        try:
            met.wait(0.2)
            meetings.append(1)
        except threading.BrokenBarrierError:
            pass
        return from_pretrained(*args, **options)

    monkeypatch.setattr(model_class, "from_pretrained", meet)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(load, [checkpoints["dinov2"]] * 2))
    assert not meetings
    assert PreTrainedModel.tie_weights is tie_weights


def test_code_in_a_checkpoint_is_left_alone(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    mark, checkpoint = tmp_path / "mark", copy_of(checkpoints["dinov2"], tmp_path)
    for module in ("modeling_own", "processing_own"):
        (checkpoint / f"{module}.py").write_text(f"import os; os.mkdir({str(mark)!r})\nclass Own: pass\n")
    change_json(
        checkpoint / "config.json", auto_map={"AutoModel": "modeling_own.Own", "AutoConfig": "modeling_own.Own"}
    )
    change_json(checkpoint / "preprocessor_config.json", auto_map={"AutoImageProcessor": "processing_own.Own"})
    load(checkpoint)
    assert not mark.exists()


# Identity


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_has_the_same_identity_wherever_it_lies(
    checkpoints: dict[str, Path], tmp_path: Path, name: str
) -> None:
    moved = copy_of(checkpoints[name], tmp_path, "elsewhere")
    assert load(moved).identity == load(checkpoints[name]).identity
    assert b"elsewhere" not in canonical_json(load(moved).identity)
    assert load(moved).name.endswith("elsewhere")


@pytest.mark.parametrize("name", FAMILIES)
def test_an_identity_is_plain_json_that_using_the_encoder_leaves_as_it_is(
    checkpoints: dict[str, Path], name: str
) -> None:
    encoder = load(checkpoints[name])
    before = fingerprint(encoder.identity)
    assert fingerprint(json.loads(json.dumps(encoder.identity))) == before
    encoder.encode(torch.from_numpy(encoder.preprocess(np.zeros((9, 9, 3), np.uint8)).copy())[None])
    assert fingerprint(encoder.identity) == before


def test_an_identity_says_what_it_is_made_of(checkpoints: dict[str, Path]) -> None:
    identity = load(checkpoints["clip"], precision="bfloat16", aspect="crop").identity
    assert identity.keys() == {"class", "config", "weights", "adapter", "preprocessing", "compute_dtype"}
    assert (identity["class"], identity["config"]["model_type"]) == ("CLIPVisionModel", "clip")
    assert (identity["compute_dtype"], identity["adapter"]) == ("bfloat16", None)
    assert identity["preprocessing"]["aspect"] == "crop"


def test_whatever_decides_the_features_changes_the_identity(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = checkpoints["dinov2"]
    nudged, configured, normalised, smoothed = (
        copy_of(checkpoint, tmp_path, name) for name in ("nudged", "configured", "normalised", "smoothed")
    )
    change_weights(nudged, lambda weights: weights["layernorm.bias"][3:4].mul_(1.0001))
    change_json(configured / "config.json", layer_norm_eps=1e-5)
    change_json(normalised / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    change_json(smoothed / "preprocessor_config.json", resample=2)
    encoders = [
        load(checkpoint),
        load(nudged),
        load(configured),
        load(normalised),
        load(smoothed),
        load(checkpoint, input_size=(56, 28)),
        load(checkpoint, input_size=(28, 56)),
        load(checkpoint, aspect="crop"),
        load(checkpoint, aspect="letterbox"),
        load(checkpoint, precision="bfloat16"),
        load(checkpoint, precision="float16"),
    ]
    assert len({fingerprint(encoder.identity) for encoder in encoders}) == len(encoders)


def test_a_weight_of_a_running_mean_is_part_of_the_identity_too(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    nudged = copy_of(checkpoints["resnet"], tmp_path)
    change_weights(nudged, lambda weights: weights["embedder.embedder.normalization.running_mean"].add_(1))
    assert load(nudged).identity["weights"] != load(checkpoints["resnet"]).identity["weights"]


def test_which_features_are_asked_for_and_where_they_are_computed_is_no_part_of_the_identity(
    checkpoints: dict[str, Path],
) -> None:
    identities = [
        load(checkpoints["dinov2"]).identity,
        load(checkpoints["dinov2"], layers=("0", "2+norm")).identity,
        load(checkpoints["dinov2"], layers=(), attention=("logits",)).identity,
        load(checkpoints["dinov2"], input_size=(56, 56)).identity,
    ]
    assert len({fingerprint(identity) for identity in identities}) == 1
    pyramids = [load(checkpoints["dinov3_convnext"], layers=layers).identity for layers in (("1",), ("last", "2"))]
    assert pyramids[0] == pyramids[1]


def test_a_model_saved_in_many_files_has_the_same_identity(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    split = copy_of(checkpoints["dinov2"], tmp_path)
    (split / "model.safetensors").unlink()
    load_tower(checkpoints["dinov2"]).save_pretrained(split, max_shard_size="20KB")
    assert len(list(split.glob("*.safetensors"))) > 3
    assert load(split).identity == load(checkpoints["dinov2"]).identity


def test_names_paths_and_versions_in_a_config_are_left_out(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    incidental = {
        "_name_or_path": "some/where",
        "torch_dtype": "float16",
        "transformers_version": "0.0.1",
        "id2label": {"0": "cat", "1": "dog"},
        "label2id": {"cat": 0, "dog": 1},
    }
    for name in ("dinov2", "clip"):
        checkpoint = copy_of(checkpoints[name], tmp_path, name)
        nested = {}
        if name == "clip":
            nested = {
                "vision_config": json.loads((checkpoint / "config.json").read_bytes())["vision_config"] | incidental
            }
        change_json(checkpoint / "config.json", **incidental, **nested)
        assert load(checkpoint).identity == load(checkpoints[name]).identity
