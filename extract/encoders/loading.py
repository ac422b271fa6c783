"""Loading Hugging Face checkpoints, strictly: all weights or none, no remote code, and a digest of what was loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from cache_schema.errors import UsageError

T = TypeVar("T")


def load_checkpoint(model_class: type[PreTrainedModel], source: str) -> PreTrainedModel:
    """Load a checkpoint by hub id or folder, in float32, frozen and in evaluation mode.

    Raises:
        UsageError: nothing is there to load, or some weights of the model are missing from it.
    """
    model, report = from_hub(
        source,
        lambda: model_class.from_pretrained(
            source, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        ),
    )
    missing = sorted({*report["missing_keys"], *report["mismatched_keys"]})
    if missing:
        raise UsageError(
            f"{source} lacks {len(missing)} weights that {model_class.__name__} needs (first: {missing[0]}); "
            "name a checkpoint of that model."
        )
    return model.eval().requires_grad_(False)


def from_hub(source: str, load: Callable[[], T]) -> T:
    """Call `load`, and say in one sentence what is wrong where `source` is no folder and no model that can be had.

    Raises:
        UsageError: the folder holds no model, or the hub does not hand it out.
    """
    try:
        return load()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if isinstance(error, UsageError):
            raise
        if Path(source).exists():
            raise UsageError(f"{source} is not a model folder that can be loaded ({_first_line(error)}).") from error
        if source.count("/") != 1 or source.startswith((".", "~", "/")):
            raise UsageError(f"no encoder at {source}: there is no such folder.") from error
        raise UsageError(
            f"no encoder {source!r}: there is no such folder, and the hub did not hand it out ({_first_line(error)}). "
            f"If the model is gated, accept its licence at https://huggingface.co/{source} and log in."
        ) from error


def digest_weights(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of all weights and buffers that are saved.

    It is the same for a hub id, a folder and any split into files, and another one as soon as a weight differs.
    """
    running = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        running.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        running.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return running.hexdigest()


def read_config(source: str) -> dict[str, Any]:
    """A checkpoint's config.json as it was published, without names, paths and library versions.

    As published, not as a library fills it in: the identity of an encoder must not change with the library.

    Raises:
        UsageError: the checkpoint cannot be had.
    """
    config, _ = from_hub(source, lambda: PreTrainedConfig.get_config_dict(source))
    return _without_incidentals(config)


def _without_incidentals(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    skipped = {"transformers_version", "dtype", "torch_dtype", "architectures"}
    kept = {key: value for key, value in config.items() if key not in skipped and not key.startswith("_")}
    return {key: _without_incidentals(value) for key, value in kept.items()}


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
