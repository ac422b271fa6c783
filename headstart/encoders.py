"""Encoders by name, and the encoders a run needs to see new images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cache_schema.atomic import StorePath
from cache_schema.errors import StoreMismatchError
from cache_schema.features import FeatureCache
from cache_schema.fingerprint import fingerprint
from cache_schema.masks import Size
from cache_schema.store import Store, StoreHeader, absolute_path, recorded_path, relative_paths
from extract.encoders import IMAGE_ENCODERS, TEXT_ENCODERS, TINY, resolve_encoder
from extract.encoders.image import FINAL_LAYER, VisionTransformerEncoder, load_image_encoder
from extract.encoders.protocols import ImageEncoder, TextEncoder
from extract.encoders.text import ClipTextEncoder, load_text_encoder
from extract.encoders.tiny import make_tiny_encoders
from extract.job import pick_device

UNTRAINED_NOTE = (
    "The encoders are tiny and untrained: random weights from a fixed seed. "
    "What is learned here is learned by the heads alone, and says nothing about pretrained encoders."
)


def image_encoder(
    name: str,
    tiny_folder: Path,
    *,
    layers: Sequence[str] = (FINAL_LAYER,),
    input_size: Size | None = None,
    device: str = "auto",
) -> VisionTransformerEncoder:
    """An image encoder by name, hub id or folder; `"tiny"` is made under `tiny_folder` if it is not there."""
    source = str(make_tiny_encoders(tiny_folder).image) if name == TINY else resolve_encoder(name, IMAGE_ENCODERS)
    return load_image_encoder(source, layers=layers, input_size=input_size, device=pick_device(device))


def text_encoder(name: str, tiny_folder: Path, *, device: str = "auto") -> ClipTextEncoder:
    """A text encoder by name, hub id or folder; `"tiny"` is made under `tiny_folder` if it is not there."""
    source = str(make_tiny_encoders(tiny_folder).text) if name == TINY else resolve_encoder(name, TEXT_ENCODERS)
    return load_text_encoder(source, device=pick_device(device))


def record_encoders(cache: FeatureCache, run_dir: Path) -> dict[str, Any]:
    """How to load the encoders of a cache again, relative to a run folder."""
    return {"image": _record(cache.images.store, run_dir), "text": _record(cache.prompts.store, run_dir)}


def _record(store: Store, run_dir: Path) -> dict[str, Any]:
    folder = recorded_path(store.header, store.path, "encoder")
    where = {"hub": store.header.recorded["encoder"]} if folder is None else relative_paths({"folder": folder}, run_dir)
    return {"source": where, "dtype": store.header.identity["dtype"], **_image_settings(store.header)}


def _image_settings(header: StoreHeader) -> dict[str, Any]:
    """What of an image encoder is chosen beside its checkpoint."""
    identity = header.identity["encoder"]
    if header.kind != "image_features":
        return {}
    return {"layers": identity["layers"], "input_size": identity["preprocessing"]["input_size"]}


def load_image_encoder_of_store(
    store: StorePath, header: StoreHeader, device: str = "auto"
) -> VisionTransformerEncoder:
    """The encoder that an image-feature store was made with.

    Raises:
        UsageError: it cannot be loaded.
        StoreMismatchError: what is loaded is not what the store was made with.
    """
    encoder = _load_image(_source_of_store(store, header), _image_settings(header), device)
    _require_same(encoder, fingerprint(header.identity["encoder"]), f"{store} was made with")
    return encoder


def load_text_encoder_of_store(store: StorePath, header: StoreHeader, device: str = "auto") -> ClipTextEncoder:
    """The encoder that a prompt-feature store was made with. Raises as `load_image_encoder_of_store` does."""
    encoder = load_text_encoder(_source_of_store(store, header), device=pick_device(device))
    _require_same(encoder, fingerprint(header.identity["encoder"]), f"{store} was made with")
    return encoder


def load_recorded_encoders(
    run_dir: Path, config: dict[str, Any], device: str = "auto"
) -> tuple[VisionTransformerEncoder, ClipTextEncoder]:
    """The encoders a run was trained on.

    Raises:
        UsageError: an encoder cannot be loaded.
        StoreMismatchError: what is loaded is not what the features were extracted with.
    """
    image, text = config["encoders"]["image"], config["encoders"]["text"]
    loaded_image = _load_image(_source_of_run(run_dir, image["source"]), image, device)
    loaded_text = load_text_encoder(_source_of_run(run_dir, text["source"]), device=pick_device(device))
    for side, encoder in (("image", loaded_image), ("text", loaded_text)):
        _require_same(encoder, config["encoder_fingerprints"][side], f"{run_dir} was trained on")
    return loaded_image, loaded_text


def _source_of_store(store: StorePath, header: StoreHeader) -> str:
    folder = recorded_path(header, store, "encoder")
    return str(header.recorded["encoder"] if folder is None else folder)


def _source_of_run(run_dir: Path, source: Mapping[str, str]) -> str:
    return str(absolute_path(source["folder"], run_dir)) if "folder" in source else source["hub"]


def _load_image(source: str, settings: Mapping[str, Any], device: str) -> VisionTransformerEncoder:
    height, width = settings["input_size"]
    return load_image_encoder(source, layers=settings["layers"], input_size=(height, width), device=pick_device(device))


def _require_same(encoder: ImageEncoder | TextEncoder, expected: str, what: str) -> None:
    if fingerprint(encoder.identity) != expected:
        raise StoreMismatchError(
            f"the encoder {encoder.name} is not the one {what}: its weights, config or preprocessing differ. "
            "Put the former one back, or extract and train again."
        )
