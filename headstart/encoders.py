"""Encoders by name, and the encoders that a store or a run was made with.

transformers is imported when an encoder is loaded or made, and not before: training needs none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_schema.atomic import StorePath
from cache_schema.errors import StoreMismatchError
from cache_schema.features import FeatureCache
from cache_schema.fingerprint import fingerprint
from cache_schema.masks import Size
from cache_schema.store import Store, StoreHeader, absolute_path, recorded_path, relative_paths
from cache_schema.views import Aspect
from extract.encoders import IMAGE_ENCODERS, TEXT_ENCODERS, TINY, resolve_encoder
from extract.encoders.protocols import ImageEncoder, TextEncoder
from extract.encoders.specs import FINAL_LAYER, AttentionOutput, ImageEncoderSpec, Precision, TextEncoderSpec
from extract.job import pick_device

if TYPE_CHECKING:  # slow to import
    from extract.encoders.tiny import TinyEncoders

UNTRAINED_NOTE = (
    "The encoders are tiny and untrained: random weights from a fixed seed. "
    "What is learned here is learned by the heads alone, and says nothing about pretrained encoders."
)


def image_spec(
    name: str,
    tiny_folder: Path,
    *,
    layers: Sequence[str] = (FINAL_LAYER,),
    attention: Sequence[AttentionOutput] = (),
    input_size: Size | None = None,
    aspect: Aspect = "squash",
    precision: Precision = "float32",
    adapter: Path | None = None,
) -> ImageEncoderSpec:
    """An image encoder by name, hub id or folder; `"tiny"` is made under `tiny_folder` if it is not there."""
    preset = IMAGE_ENCODERS.get(name)
    return ImageEncoderSpec(
        source=str(_make_tiny(tiny_folder).image) if name == TINY else resolve_encoder(name, IMAGE_ENCODERS),
        layers=tuple(layers),
        attention=tuple(attention),
        input_size=input_size or (preset.input_size if preset else None),
        aspect=aspect,
        precision=precision,
        adapter=None if adapter is None else str(adapter),
    )


def text_spec(
    name: str, tiny_folder: Path, *, precision: Precision = "float32", adapter: Path | None = None
) -> TextEncoderSpec:
    """A text encoder by name, hub id or folder; `"tiny"` is made under `tiny_folder` if it is not there."""
    source = str(_make_tiny(tiny_folder).text) if name == TINY else resolve_encoder(name, TEXT_ENCODERS)
    return TextEncoderSpec(source, precision, None if adapter is None else str(adapter))


def _make_tiny(folder: Path) -> TinyEncoders:
    from extract.encoders.tiny import make_tiny_encoders

    return make_tiny_encoders(folder)


def describe_encoders() -> dict[str, Any]:
    """Every encoder with a name, and what it takes in a float16 store: of one layer of an image, or of a token."""
    images = [
        {
            "name": name,
            "hub_id": preset.hub_id,
            "input_size": list(preset.input_size),
            "patch": preset.patch,
            "grid": [side // preset.patch for side in preset.input_size],
            "width": preset.width,
            "image_bytes": 2 * preset.width * math.prod(side // preset.patch for side in preset.input_size),
        }
        for name, preset in IMAGE_ENCODERS.items()
    ]
    prompts = [
        {
            "name": name,
            "hub_id": preset.hub_id,
            "max_length": preset.max_length,
            "token_width": preset.token_width,
            "pooled_width": preset.pooled_width,
        }
        for name, preset in TEXT_ENCODERS.items()
    ]
    return {"image": images, "text": prompts}


def encoders_table(described: Mapping[str, Any]) -> str:
    """What `describe_encoders` gave, for people."""
    lines = [f"{'image encoder':22} {'input':>9} {'grid':>7} {'width':>6} {'kB/image':>9}  hub id"]
    for encoder in described["image"]:
        size, grid = ("x".join(map(str, encoder[key])) for key in ("input_size", "grid"))
        kilobytes = encoder["image_bytes"] / 1000
        lines.append(
            f"{encoder['name']:22} {size:>9} {grid:>7} {encoder['width']:>6} {kilobytes:>9.0f}  {encoder['hub_id']}"
        )
    lines += ["", f"{'text encoder':22} {'tokens':>9} {'width':>7} {'pooled':>6} {'':>9}  hub id"]
    for encoder in described["text"]:
        lines.append(
            f"{encoder['name']:22} {encoder['max_length']:>9} {encoder['token_width']:>7} "
            f"{encoder['pooled_width']:>6} {'':>9}  {encoder['hub_id']}"
        )
    lines += [
        "",
        "Grid and kB/image (one layer, float16) are those of the checkpoint's own input; --input-size takes another.",
        "DINOv3 is gated: accept its licence on the model's page first. Any other hub id or folder works too.",
    ]
    return "\n".join(lines)


def notes_on_encoders(cache: FeatureCache) -> list[str]:
    """What whoever reads scores of heads on this cache must know; the tiny encoders say so in their own config.json."""
    stores = (cache.images.store, cache.prompts.store)
    untrained = any(store.header.identity["encoder"]["config"].get("untrained", False) for store in stores)
    return [UNTRAINED_NOTE] if untrained else []


def record_encoders(cache: FeatureCache, run_dir: Path) -> dict[str, Any]:
    """How to load the encoders of a cache again, relative to a run folder."""
    return {"image": _record(cache.images.store, run_dir), "text": _record(cache.prompts.store, run_dir)}


def _record(store: Store, run_dir: Path) -> dict[str, Any]:
    header = store.header
    folder = recorded_path(header, store.path, "encoder")
    adapter = recorded_path(header, store.path, "adapter")
    source = {"hub": header.recorded["encoder"]} if folder is None else relative_paths({"folder": folder}, run_dir)
    return {
        "source": source,
        "adapter": None if adapter is None else relative_paths({"adapter": adapter}, run_dir)["adapter"],
        "dtype": header.identity["dtype"],
        **_settings(header),
    }


def _settings(header: StoreHeader) -> dict[str, Any]:
    """What of an encoder is chosen beside its checkpoint and adapter."""
    identity = header.identity["encoder"]
    settings = {"precision": identity["compute_dtype"]}
    if header.kind != "image_features":
        return settings
    preprocessing, outputs = identity["preprocessing"], header.identity["outputs"]
    return {
        **settings,
        "layers": outputs["layers"],
        "attention": outputs["attention"],
        "input_size": preprocessing["input_size"],
        "aspect": preprocessing["aspect"],
    }


def load_image_encoder_of_store(store: StorePath, header: StoreHeader, device: str = "auto") -> ImageEncoder:
    """The encoder that an image-feature store was made with.

    Raises:
        UsageError: it cannot be loaded.
        StoreMismatchError: what is loaded is not what the store was made with.
    """
    from extract.encoders.image import load_image_encoder

    encoder = load_image_encoder(image_spec_of_store(store, header), device=pick_device(device))
    _require_same(encoder, fingerprint(header.identity["encoder"]), f"{store} was made with")
    return encoder


def load_text_encoder_of_store(store: StorePath, header: StoreHeader, device: str = "auto") -> TextEncoder:
    """The encoder that a prompt-feature store was made with. Raises as `load_image_encoder_of_store` does."""
    from extract.encoders.text import load_text_encoder

    encoder = load_text_encoder(text_spec_of_store(store, header), device=pick_device(device))
    _require_same(encoder, fingerprint(header.identity["encoder"]), f"{store} was made with")
    return encoder


def load_recorded_encoders(
    run_dir: Path, config: dict[str, Any], device: str = "auto"
) -> tuple[ImageEncoder, TextEncoder]:
    """The encoders a run was trained on.

    Raises:
        UsageError: an encoder cannot be loaded.
        StoreMismatchError: what is loaded is not what the features were extracted with.
    """
    from extract.encoders.image import load_image_encoder
    from extract.encoders.text import load_text_encoder

    image, text = config["encoders"]["image"], config["encoders"]["text"]
    loaded_image = load_image_encoder(_image_spec(*_source_of_run(run_dir, image), image), device=pick_device(device))
    loaded_text = load_text_encoder(_text_spec(*_source_of_run(run_dir, text), text), device=pick_device(device))
    for side, encoder in (("image", loaded_image), ("text", loaded_text)):
        _require_same(encoder, config["encoder_fingerprints"][side], f"{run_dir} was trained on")
    return loaded_image, loaded_text


def image_spec_of_store(store: StorePath, header: StoreHeader) -> ImageEncoderSpec:
    """How the image encoder of a store is loaded again, for the layers that the store holds."""
    return _image_spec(*_source_of_store(store, header), _settings(header))


def text_spec_of_store(store: StorePath, header: StoreHeader) -> TextEncoderSpec:
    """How the text encoder of a store is loaded again."""
    return _text_spec(*_source_of_store(store, header), _settings(header))


def _source_of_store(store: StorePath, header: StoreHeader) -> tuple[str, str | None]:
    """Hub id or folder, and the adapter's folder."""
    folder, adapter = (recorded_path(header, store, name) for name in ("encoder", "adapter"))
    source = str(header.recorded["encoder"] if folder is None else folder)
    return source, None if adapter is None else str(adapter)


def _source_of_run(run_dir: Path, recorded: Mapping[str, Any]) -> tuple[str, str | None]:
    source, adapter = recorded["source"], recorded["adapter"]
    return (
        str(absolute_path(source["folder"], run_dir)) if "folder" in source else source["hub"],
        None if adapter is None else str(absolute_path(adapter, run_dir)),
    )


def _image_spec(source: str, adapter: str | None, settings: Mapping[str, Any]) -> ImageEncoderSpec:
    height, width = settings["input_size"]
    return ImageEncoderSpec(
        source,
        layers=tuple(settings["layers"]),
        attention=tuple(settings["attention"]),
        input_size=(height, width),
        aspect=settings["aspect"],
        precision=settings["precision"],
        adapter=adapter,
    )


def _text_spec(source: str, adapter: str | None, settings: Mapping[str, Any]) -> TextEncoderSpec:
    return TextEncoderSpec(source, settings["precision"], adapter)


def _require_same(encoder: ImageEncoder | TextEncoder, expected: str, what: str) -> None:
    if fingerprint(encoder.identity) != expected:
        raise StoreMismatchError(
            f"the encoder {encoder.name} is not the one {what}: its weights, adapter, config or preprocessing differ. "
            "Put the former one back, or extract and train again."
        )
