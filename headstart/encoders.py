"""Encoders by name, and the encoders a run needs to see new images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache_schema.errors import StoreMismatchError
from cache_schema.features import FeatureCache
from cache_schema.fingerprint import fingerprint
from cache_schema.masks import Size
from cache_schema.store import Store
from extract.encoders import IMAGE_ENCODERS, TEXT_ENCODERS, TINY, resolve_encoder
from extract.encoders.image import FINAL_LAYER, VisionTransformerEncoder, load_image_encoder
from extract.encoders.text import ClipTextEncoder, load_text_encoder
from extract.encoders.tiny import make_tiny_encoders
from extract.job import move_source, pick_device, resolve_source

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
    image, text = cache.images.store, cache.prompts.store
    identity = image.header.identity["encoder"]
    return {
        "image": {
            "source": _source(image, run_dir),
            "layers": identity["layers"],
            "input_size": identity["preprocessing"]["input_size"],
            "dtype": image.header.identity["dtype"],
        },
        "text": {"source": _source(text, run_dir)},
    }


def load_recorded_encoders(
    run_dir: Path, config: dict[str, Any], device: str = "auto"
) -> tuple[VisionTransformerEncoder, ClipTextEncoder]:
    """The encoders a run was trained on.

    Raises:
        UsageError: an encoder cannot be loaded.
        StoreMismatchError: what is loaded is not what the features were extracted with.
    """
    image, text = config["encoders"]["image"], config["encoders"]["text"]
    height, width = image["input_size"]
    loaded_image = load_image_encoder(
        resolve_source(image["source"], run_dir),
        layers=image["layers"],
        input_size=(height, width),
        device=pick_device(device),
    )
    loaded_text = load_text_encoder(resolve_source(text["source"], run_dir), device=pick_device(device))
    for side, encoder in (("image", loaded_image), ("text", loaded_text)):
        if fingerprint(encoder.identity) != config["encoder_fingerprints"][side]:
            raise StoreMismatchError(
                f"the {side} encoder {encoder.name} is not the one {run_dir} was trained on: its weights, config or "
                "preprocessing differ. Put the former one back, or extract and train again."
            )
    return loaded_image, loaded_text


def _source(store: Store, run_dir: Path) -> dict[str, str]:
    return move_source(store.header.recorded["encoder"], store.path, run_dir)
