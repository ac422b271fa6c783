"""Fingerprints and digests follow from what docs/cache-format.md says they cover."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zarr

from cache_schema import SCHEMA_VERSION
from cache_schema.features import ImageFeatures
from cache_schema.fingerprint import canonical_json
from cache_schema.samples import read_strings
from cache_schema.store import open_store
from tests.cache_schema.document import codes
from tests.cache_schema.format.rules import PAGE, digest_of_list, groups_of, rows_by_image, sha256_of, spell
from tests.cache_schema.format.stores import Stores

if TYPE_CHECKING:
    from torch import Tensor

    from extract.encoders.tiny import TinyEncoders


def test_the_examples_of_canonical_json_hold() -> None:
    for row in PAGE.tables["Canonical JSON"]:
        value, canonical = json.loads(row["JSON"].strip("`")), row["canonical"].strip("`").encode()
        assert canonical_json(value) == spell(value) == canonical


def test_the_worked_example_of_a_fingerprint_holds() -> None:
    value = json.loads(PAGE.block("Fingerprints", "json"))
    canonical, digest, name = PAGE.block("Fingerprints", "text").splitlines()
    assert canonical_json(value).decode() == canonical
    assert hashlib.sha256(canonical.encode()).hexdigest() == digest
    assert name == f"{value['kind']}-{digest[:12]}.zarr"
    assert value["schema_version"] == SCHEMA_VERSION


def test_fingerprints_and_digests_follow_from_what_the_document_says_they_cover(stores: Stores) -> None:
    for store in stores.zarr:
        about = store.attributes
        covered = {key: about[key] for key in ("schema_version", "kind", "identity")}
        assert about["fingerprint"] == sha256_of(covered)
        assert about["metadata_sha256"] == sha256_of(store.nodes)
        assert store.nodes.keys() == {*store.arrays, *groups_of(store)}
    for store in stores.of_kind("samples"):
        arrays = {name: zarr.open_array(store.path / name, mode="r")[...] for name in store.arrays}
        assert store.identity["arrays"] == {
            name: hashlib.sha256(values.tobytes()).hexdigest() for name, values in arrays.items()
        }
        assert store.identity["tags"].keys() == {
            name.removeprefix("sample/tag/") for name in arrays if name.startswith("sample/tag/")
        }
        assert all(
            names == sorted(set(names)) for names in (store.identity["splits"], *store.identity["tags"].values())
        )
    for path in (store.path for store in stores.of_kind("prompt_features")):
        opened = open_store(path)
        assert opened.header.identity["prompts"] == digest_of_list(read_strings(opened, "prompt/text"))
    for path in (store.path for store in stores.of_kind("image_features")):
        opened = open_store(path)
        images, sizes = ImageFeatures(opened), opened.read("original_size").tolist()
        lines = [
            f"{images.ids[rows[0]]} {sizes[rows[0]][0]}x{sizes[rows[0]][1]} {images.sha256[rows[0]]}"
            for rows in rows_by_image(images)
        ]
        assert opened.header.identity["images"] == digest_of_list(lines)


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> Any:
    """Names, types, lengths and bytes of tensors, hashed as the document says."""
    running = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.numpy()
        running.update(f"{name} torch.{values.dtype.name} {values.shape}\n".encode() + values.tobytes())
    return running


def test_the_digests_of_encoders_follow_from_their_checkpoints(
    stores: Stores, tiny_encoders: TinyEncoders, siglip: Path
) -> None:
    import transformers

    folders = {
        "Dinov2WithRegistersModel": tiny_encoders.image,
        "CLIPTextModelWithProjection": tiny_encoders.text,
        "SiglipTextModel": siglip,
    }
    encoders = [store.identity["encoder"] for store in stores.zarr if store.kind != "samples"]
    assert {encoder["class"] for encoder in encoders} == folders.keys()
    silent = ("architectures", "dtype", "torch_dtype", "transformers_version")

    def loud(config: Any) -> Any:
        if not isinstance(config, dict):
            return config
        return {key: loud(value) for key, value in config.items() if key not in silent and not key.startswith("_")}

    for name, folder in folders.items():
        config = loud(json.loads((folder / "config.json").read_bytes()))
        weights = digest_of_tensors(getattr(transformers, name).from_pretrained(folder).state_dict()).hexdigest()
        for encoder in encoders:
            if encoder["class"] == name:
                assert encoder["weights"] == weights
                assert encoder["config"] == config


def test_the_digest_of_an_adapter_follows_from_its_folder(stores: Stores, adapter: Path) -> None:
    from safetensors.torch import load_file

    section = PAGE.text.split("### Encoder digests")[1].split("###")[0]
    silent = codes(section.split("This lacks the fields")[1].split(", and lists")[0])
    settings = json.loads((adapter / "adapter_config.json").read_bytes())
    assert len(silent) == len({*silent} & settings.keys()) > 1
    kept = {key: value for key, value in settings.items() if key not in silent}
    kept["target_modules"] = sorted(kept["target_modules"])
    running = digest_of_tensors(load_file(adapter / "adapter_model.safetensors"))
    running.update(spell(kept))
    found = [(store.path.name, store.identity["encoder"]["adapter"]) for store in stores.of_kind("image_features")]
    assert {digest for _, digest in found} == {None, running.hexdigest()}
    for store in stores.of_kind("image_features"):
        adapted = store.identity["encoder"]["adapter"] is not None
        assert ("adapter" in store.attributes["recorded"]["paths"]) == adapted


def test_the_digest_of_a_tokenizer_follows_from_its_checkpoint(
    stores: Stores, tiny_encoders: TinyEncoders, siglip: Path
) -> None:
    for store in stores.of_kind("prompt_features"):
        encoder = store.identity["encoder"]
        lower_cases = encoder["class"] == "SiglipTextModel"
        folder = siglip if lower_cases else tiny_encoders.text
        rules = json.loads((folder / "tokenizer.json").read_bytes())
        kept = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
        if lower_cases:
            before = [] if kept["normalizer"] is None else [kept["normalizer"]]
            kept["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *before]}
        expected = {"rules": kept, "side": "right", "split_special_tokens": False}
        assert encoder["tokenizer"]["sha256"] == sha256_of(expected)
        assert ("lower_case" in encoder["tokenizer"]) == ("padding" in encoder["tokenizer"]) == lower_cases
