"""A CLIPSeg head takes over the decoder of a `transformers.CLIPSegForImageSegmentation` checkpoint, strictly.

Weights are read from safetensors, without building the model: of 150 million values only the decoder's million are read
into tensors. A trained head is saved with all its weights and needs the checkpoint no more.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from cache_schema.errors import UsageError
from cache_schema.fingerprint import digest_file
from heads.checkpoint_files import find_checkpoint_file

if TYPE_CHECKING:
    from heads.clipseg import CLIPSegHead

PUBLISHED = "CIDAS/clipseg-rd64-refined"

_NAMES = {"blocks.": "layers.", ".linear": ".mlp.fc", ".norm": ".layer_norm"}
"""Parts of the names of a head's weights, and what transformers says instead."""


@dataclass(frozen=True)
class CLIPSegReport:
    """What became of every weight of a head and of the checkpoint's decoder.

    Args:
        source, sha256: the checkpoint, and the digest of its weight file.
        loaded: names here, each with the checkpoint's names of what it was filled with, one above the other.
        fresh: names here for which the checkpoint has nothing of the same shape.
        left: names in the checkpoint's decoder that have no place here.
        differences: what the head does otherwise than the checkpoint's decoder, whatever the weights.
    """

    source: str
    sha256: str
    loaded: Mapping[str, tuple[str, ...]]
    fresh: tuple[str, ...]
    left: tuple[str, ...]
    differences: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether the head now is the checkpoint's decoder."""
        return not self.faults()

    def faults(self) -> list[str]:
        """Each reason why it is not, for people."""
        return [
            *([f"it has nothing for {', '.join(self.fresh)}"] if self.fresh else []),
            *([f"there is no place for {', '.join(self.left)}"] if self.left else []),
            *self.differences,
        ]

    def summary(self) -> str:
        """The counts, for people."""
        counts = f"{len(self.loaded)} tensors loaded, {len(self.fresh)} fresh, {len(self.left)} left there"
        return "; ".join([f"started from {self.source} (SHA-256 {self.sha256[:12]}): {counts}", *self.differences])

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def load_clipseg_weights(head: CLIPSegHead, source: str, *, strict: bool = True) -> CLIPSegReport:
    """Fill a head with the decoder of a checkpoint, or change nothing.

    Args:
        source: a folder that `CLIPSegForImageSegmentation.save_pretrained` wrote, or a hub id.
        strict: refuse a checkpoint that is not this very decoder. Without it, what fits by name and shape is loaded,
            and the report says what did not and what else differs.

    Raises:
        UsageError: there is no such checkpoint, or it does not fit.
    """
    config_path, weights_path = (
        find_checkpoint_file(source, name, example=PUBLISHED) for name in ("config.json", "model.safetensors")
    )
    differences = _compare_settings(head, source, config_path)
    try:
        with safe_open(weights_path, "pt") as file:
            decoder = {name: file.get_tensor(name) for name in file.keys() if name.startswith("decoder.")}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{weights_path} cannot be read ({error}); fetch the checkpoint again.") from error
    weights, loaded = {}, {}
    state = head.state_dict()
    for name, weight in state.items():
        names = _checkpoint_names(name)
        value = torch.cat([decoder[each] for each in names]) if all(each in decoder for each in names) else None
        if value is not None and value.shape == weight.shape:
            weights[name], loaded[name] = value, names
    used = {each for names in loaded.values() for each in names}
    report = CLIPSegReport(
        source=source,
        sha256=digest_file(weights_path),
        loaded=loaded,
        fresh=tuple(name for name in state if name not in loaded),
        left=tuple(sorted(decoder.keys() - used)),
        differences=differences,
    )
    if strict and not report.complete:
        raise UsageError(
            f"{source} is not the decoder that was built: {'; '.join(report.faults())}. Build the head with the "
            "checkpoint's settings."
        )
    with torch.no_grad():
        for name, value in weights.items():
            state[name].copy_(value)
    return report


def _compare_settings(head: CLIPSegHead, source: str, path: Path) -> tuple[str, ...]:
    """What weights alone do not say and the head does otherwise. Absent fields have the defaults of transformers."""
    try:
        config = json.loads(path.read_bytes())
        model_type, vision = config.get("model_type"), config.get("vision_config") or {}
        expected = {
            "layers": [str(number + 1) for number in config.get("extract_layers", (3, 6, 9))],
            "with_cls": True,
            "num_heads": config.get("decoder_num_attention_heads", 4),
            "conditional_layer": config.get("conditional_layer", 0),
            "the epsilon of norms": vision.get("layer_norm_eps", 1e-5),
        }
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UsageError(f"{path} is not the config of a model ({error}).") from error
    if model_type != "clipseg":
        raise UsageError(f"{source} is a model of type {model_type!r}: name a CLIPSeg, such as {PUBLISHED}.")
    block = head.blocks[0]
    assert isinstance(block, nn.TransformerEncoderLayer)
    found = {
        "layers": list(head.layers),
        "with_cls": head.with_cls,
        "num_heads": block.self_attn.num_heads,
        "conditional_layer": head.conditional_layer,
        "the epsilon of norms": block.norm1.eps,
    }
    return tuple(f"{name} is {found[name]}, not {value}" for name, value in expected.items() if found[name] != value)


def _checkpoint_names(name: str) -> tuple[str, ...]:
    """The tensors of the checkpoint that, one above the other, are a weight of the head.

    >>> _checkpoint_names("blocks.2.linear1.weight")
    ('decoder.layers.2.mlp.fc1.weight',)
    >>> [name[-13:] for name in _checkpoint_names("blocks.0.self_attn.in_proj_weight")]
    ['q_proj.weight', 'k_proj.weight', 'v_proj.weight']
    """
    for ours, theirs in _NAMES.items():
        name = name.replace(ours, theirs)
    parts = "qkv" if "in_proj_" in name else ""
    return tuple(f"decoder.{name.replace('in_proj_', f'{part}_proj.')}" for part in parts) or (f"decoder.{name}",)
