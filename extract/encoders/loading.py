"""Loading Hugging Face checkpoints, strictly: all weights or none, no remote code, and a digest of what was loaded.

Weights are read from safetensors, or unpickled by torch with `weights_only`, which runs no code of the file's.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from cache_schema.errors import UsageError
from cache_schema.fingerprint import canonical_json

T = TypeVar("T")
Model = TypeVar("Model", bound=PreTrainedModel)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_PICKLED_ADAPTER_WEIGHTS = "adapter_model.bin"
_INCIDENTAL = frozenset({"transformers_version", "dtype", "torch_dtype", "architectures", "id2label", "label2id"})
_INCIDENTAL_TO_AN_ADAPTER = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "lora_dropout",
        "peft_version",
        "revision",
        "task_type",
    }
)
_loading = threading.Lock()
"""transformers replaces functions of its classes while it loads a model: two threads at it would leave them so."""

_REFUSALS = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError, pickle.UnpicklingError)
"""What transformers, PEFT, torch and safetensors raise where a file is missing, cut short or of another model."""


def load_checkpoint(model_class: type[PreTrainedModel], source: str, **config_changes: Any) -> PreTrainedModel:
    """Load a checkpoint by hub id or folder, in float32, frozen and in evaluation mode.

    Args:
        config_changes: fields of the model's config that its file lacks.

    Raises:
        UsageError: nothing is there to load, or some weights of the model are missing from it or have another shape.
    """
    with _loading:
        model, report = from_hub(
            source,
            lambda: model_class.from_pretrained(
                source,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report, and refused below
                **config_changes,
            ),
        )
    mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    missing = sorted({*report["missing_keys"], *mismatched})
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
    except _REFUSALS as error:
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
    return _digest(model.state_dict()).hexdigest()


def lay_adapter(model: Model, folder: str) -> tuple[Model, str]:
    """Merge a LoRA adapter, a folder that PEFT's `save_pretrained` wrote, into the model it was made for.

    Every weight of the adapter must have its place in the model, and every place of the adapter its weight.

    Args:
        model: in float32, in which the merging is done. It is changed, and not to be used any more.

    Returns:
        The model with the adapter, and the adapter's digest: SHA-256 over its settings and its weights.

    Raises:
        UsageError: the folder holds no LoRA adapter, or one that was made for another model.
    """
    adapted, digest = open_adapter(model, folder)
    with _blaming(model, folder):
        merged = adapted.merge_and_unload(safe_merge=True)
    return merged.eval().requires_grad_(False), digest


def open_adapter(model: PreTrainedModel, folder: str, *, learns: bool = False) -> tuple[PeftModel, str]:
    """Lay a LoRA adapter on the model it was made for, beside its weights.

    Args:
        model: is changed: the adapter is in it.
        learns: whether the adapter's weights, and no others, require gradients.

    Returns:
        The model with the adapter, and the adapter's digest, as of `lay_adapter`.

    Raises:
        UsageError: the folder holds no LoRA adapter, or one that was made for another model.
    """
    settings = _read_adapter_settings(folder)
    with _blaming(model, folder):
        weights = load_peft_weights(folder, device="cpu")
        with quiet_peft():
            # Of settings that this version of PEFT does not know it only warns; they would have had a meaning.
            warnings.filterwarnings("error", "Unexpected keyword arguments")
            config = LoraConfig.from_pretrained(folder)
            config.inference_mode = not learns
            adapted = PeftModel(model, config)
        report = set_peft_model_state_dict(adapted, weights)
        missing = [key for key in report.missing_keys if "default" in key.split(".")]
        if missing or report.unexpected_keys:
            raise ValueError(
                f"{len(report.unexpected_keys)} of its weights have no place and {len(missing)} places no weight, "
                f"first {sorted([*missing, *report.unexpected_keys])[0]}"
            )
    digest = _digest(weights)
    digest.update(canonical_json(settings))
    return adapted, digest.hexdigest()


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Where PEFT makes a model: it still asks transformers for what v6 will not have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@contextmanager
def _blaming(model: PreTrainedModel, folder: str) -> Iterator[None]:
    try:
        yield
    except (*_REFUSALS, UserWarning) as error:
        raise UsageError(
            f"the adapter {folder} cannot be laid on {type(model).__name__} ({_first_line(error)}); "
            "name an adapter that was made for this model."
        ) from error


def _read_adapter_settings(folder: str) -> dict[str, Any]:
    """What of an adapter's config decides what it does. PEFT writes sets as lists, in another order each time."""
    files = [Path(folder, name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, _PICKLED_ADAPTER_WEIGHTS)]
    if not files[0].is_file() or not any(file.is_file() for file in files[1:]):
        raise UsageError(
            f"{folder} is no adapter folder: it lacks {ADAPTER_CONFIG} or {ADAPTER_WEIGHTS}; "
            "name a folder that PEFT's save_pretrained wrote."
        )
    try:
        settings = json.loads(files[0].read_bytes())
    except ValueError as error:
        raise UsageError(f"{files[0]} is not JSON ({error}); save the adapter again.") from error
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind != "LORA":
        raise UsageError(f"{folder} holds an adapter of type {kind}; LoRA adapters can be laid on an encoder.")
    return {
        key: sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value
        for key, value in settings.items()
        if key not in _INCIDENTAL_TO_AN_ADAPTER
    }


def read_config(source: str) -> dict[str, Any]:
    """A checkpoint's config.json as it was published, without names of models and classes, paths and versions.

    As published, not as a library fills it in: the identity of an encoder must not change with the library.

    Raises:
        UsageError: the checkpoint cannot be had.
    """
    config, _ = from_hub(source, lambda: PreTrainedConfig.get_config_dict(source))
    return _without_incidentals(config)


def _without_incidentals(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    kept = {key: value for key, value in config.items() if key not in _INCIDENTAL and not key.startswith("_")}
    return {key: _without_incidentals(value) for key, value in kept.items()}


def _digest(tensors: Mapping[str, Tensor]) -> Any:
    running = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        running.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        running.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return running


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
