"""A two-way head starts from the mask decoder of a `SamModel` of transformers: what goes where, strictly.

Weights are read from safetensors, without building the model: nothing of the checkpoint is executed, and of its
hundreds of megabytes only the decoder's four million values are read into tensors. A trained head is saved with all its
weights and needs the checkpoint no more.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cache_schema.errors import UsageError
from cache_schema.fingerprint import digest_file
from heads.checkpoint_files import find_checkpoint_file

POSITIONS = ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding")
"""Where a checkpoint keeps the frequencies of its positions: one tensor under two names, of which one may be saved."""

_NAMES = {
    "iou_token": "iou_token.weight",
    "mask_tokens": "mask_tokens.weight",
    "blocks.": "transformer.layers.",
    ".self_attention.": ".self_attn.",
    ".self_norm.": ".layer_norm1.",
    ".to_image.": ".cross_attn_token_to_image.",
    ".to_image_norm.": ".layer_norm2.",
    ".mlp.0.": ".mlp.lin1.",
    ".mlp.2.": ".mlp.lin2.",
    ".mlp_norm.": ".layer_norm3.",
    ".from_image.": ".cross_attn_image_to_token.",
    ".from_image_norm.": ".layer_norm4.",
    "final_attention.": "transformer.final_attn_token_to_image.",
    "final_norm.": "transformer.layer_norm_final_attn.",
    ".to_query.": ".q_proj.",
    ".to_key.": ".k_proj.",
    ".to_value.": ".v_proj.",
    ".to_output.": ".out_proj.",
    "upscale.0.": "upscale_conv1.",
    "upscale.1.": "upscale_layer_norm.",
    "upscale.3.": "upscale_conv2.",
    "hyper.0.": "output_hypernetworks_mlps.0.proj_in.",
    "hyper.2.": "output_hypernetworks_mlps.0.layers.0.",
    "hyper.4.": "output_hypernetworks_mlps.0.proj_out.",
    "iou_head.0.": "iou_prediction_head.proj_in.",
    "iou_head.2.": "iou_prediction_head.layers.0.",
    "iou_head.4.": "iou_prediction_head.proj_out.",
}
"""Parts of the names of a `SamDecoder`'s weights, and what transformers says instead."""

_FIRST_ROWS = ("decoder.mask_tokens", "decoder.iou_head.4.weight", "decoder.iou_head.4.bias")
"""Weights with a row for each of SAM's masks, of which a head with fewer takes the first."""

_OTHER_MASKS = re.compile(r"mask_decoder\.output_hypernetworks_mlps\.[1-9]\d*\.")
_BLOCK = re.compile(r"mask_decoder\.transformer\.layers\.(\d+)\.")


@dataclass(frozen=True)
class SamReport:
    """What became of every weight of a head and of the checkpoint's mask decoder.

    Args:
        source, sha256: the checkpoint, and the digest of its weight file.
        loaded: names here, and the checkpoint's names of what they were filled with.
        first_rows: names among `loaded` that took only so many rows of so many.
        copied: the same as `loaded` for blocks beyond the checkpoint's last, which start as copies of it.
        fresh: names here that a SAM has nothing for.
        left: names in the checkpoint's mask decoder that have no place here.
        num_others: tensors of the checkpoint outside its mask decoder and positions: image encoder, prompt encoder.
    """

    source: str
    sha256: str
    loaded: Mapping[str, str]
    first_rows: Mapping[str, tuple[int, int]]
    copied: Mapping[str, str]
    fresh: tuple[str, ...]
    left: tuple[str, ...]
    num_others: int

    def summary(self) -> str:
        """The counts, for people."""
        rows = ", ".join(f"{name}: {taken} of {there}" for name, (taken, there) in self.first_rows.items())
        return (
            f"started from {self.source} (SHA-256 {self.sha256[:12]}): {len(self.loaded)} tensors loaded"
            f"{f' (first rows of {rows})' if rows else ''}, {len(self.copied)} copied from its last block, "
            f"{len(self.fresh)} fresh ({_families(self.fresh)}); left there: {len(self.left)} of its mask decoder "
            f"({_families(self.left)}) and {self.num_others} of its other parts"
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def load_sam(head: nn.Module, source: str, *, num_heads: int) -> SamReport:
    """Fill a head's `decoder` and `positions` with those of a `SamModel`, or change nothing.

    Args:
        source: a folder that `SamModel.save_pretrained` wrote, or a hub id such as "facebook/sam-vit-base".
        num_heads: of the head's attentions, which the weights cannot tell.

    Raises:
        UsageError: there is no such checkpoint, or a weight is missing, of another shape, or without a known place.
    """
    config_path, weights_path = (_find(source, name) for name in ("config.json", "model.safetensors"))
    _check_config(source, config_path, num_heads)
    try:
        with safe_open(weights_path, "pt") as file:
            wanted = _plan(head.state_dict(), file.keys(), source)
            found = {theirs: file.get_tensor(theirs) for theirs in set(wanted.values())}
            names = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{weights_path} cannot be read ({error}); fetch the checkpoint again.") from error
    return _fill(head, wanted, found, names, source, digest_file(weights_path))


def _find(source: str, name: str) -> Path:
    return find_checkpoint_file(
        source, name, noun="SAM checkpoint", writer="SamModel.save_pretrained", example="facebook/sam-vit-base"
    )


def _check_config(source: str, path: Path, num_heads: int) -> None:
    """Make sure of what weights alone do not say. Fields that a config lacks have the defaults of transformers."""
    try:
        config = json.loads(path.read_bytes())
        model_type, decoder = config.get("model_type"), config.get("mask_decoder_config") or {}
        found = {
            "num_attention_heads": decoder.get("num_attention_heads", 8),
            "attention_downsample_rate": decoder.get("attention_downsample_rate", 2),
            "hidden_act": decoder.get("hidden_act", "relu"),
        }
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} is not the config of a model ({error}).") from error
    if model_type != "sam":
        raise UsageError(f"{source} is a model of type {model_type!r}: name a SamModel, such as facebook/sam-vit-base.")
    expected = {"num_attention_heads": num_heads, "attention_downsample_rate": 2, "hidden_act": "relu"}
    if found != expected:
        raise UsageError(
            f"the mask decoder of {source} has {found}, and this head {expected}: "
            "set num_heads to the checkpoint's, or name another checkpoint."
        )


def _plan(state: Mapping[str, Tensor], there: Iterable[str], source: str) -> dict[str, str]:
    """For every weight of the head that a SAM has, the checkpoint's name of what it starts from.

    Raises:
        UsageError: the checkpoint lacks one, or its mask decoder has weights that no head has a place for.
    """
    names = set(there)
    blocks = [int(match[1]) for match in map(_BLOCK.match, names) if match]
    last = max(blocks, default=0)
    wanted = {name: theirs for name in state if (theirs := _name_in_sam(name, last)) is not None}
    wanted["positions.frequencies"] = next((name for name in POSITIONS if name in names), POSITIONS[0])
    missing = sorted(set(wanted.values()) - names)
    if missing:
        raise UsageError(
            f"{source} lacks {len(missing)} weights of a SAM mask decoder (first: {missing[0]}); "
            "name a SamModel of transformers."
        )
    unknown = [name for name in _left(names, wanted) if not _OTHER_MASKS.match(name) and not _BLOCK.match(name)]
    if unknown:
        raise UsageError(
            f"the mask decoder of {source} has {len(unknown)} weights that SAM's has not (first: {unknown[0]}); "
            "name a SamModel of transformers."
        )
    return wanted


def _name_in_sam(name: str, last_block: int) -> str | None:
    """What transformers calls a weight of the head, or the weight that it starts as a copy of; None for our own."""
    part, _, rest = name.partition(".")
    if part != "decoder" or rest.startswith("no_target"):
        return None
    for ours, theirs in _NAMES.items():
        rest = rest.replace(ours, theirs)
    return _BLOCK.sub(
        lambda match: f"mask_decoder.transformer.layers.{min(int(match[1]), last_block)}.", f"mask_decoder.{rest}"
    )


def _fill(
    head: nn.Module,
    wanted: Mapping[str, str],
    found: Mapping[str, Tensor],
    names: set[str],
    source: str,
    sha256: str,
) -> SamReport:
    """Copy weights into the head, after all their shapes were seen to fit."""
    state, rows, copied = head.state_dict(), {}, []
    values = {}
    for name, theirs in wanted.items():
        value, weight = found[theirs], state[name]
        if name in _FIRST_ROWS and len(value) > len(weight):
            rows[name] = (len(weight), len(value))
            value = value[: len(weight)]
        if value.shape != weight.shape:
            raise UsageError(
                f"{theirs} of {source} is {list(found[theirs].shape)}, and {name} of this head {list(weight.shape)}: "
                "a SAM has dim=256, mlp_dim=2048 and at most four mask tokens."
            )
        values[name] = value
        match = _BLOCK.match(theirs)
        if match and not name.startswith(f"decoder.blocks.{match[1]}."):
            copied.append(name)
    with torch.no_grad():
        for name, value in values.items():
            state[name].copy_(value)
    left = _left(names, wanted)
    return SamReport(
        source=source,
        sha256=sha256,
        loaded={name: theirs for name, theirs in wanted.items() if name not in copied},
        first_rows=rows,
        copied={name: wanted[name] for name in copied},
        fresh=tuple(name for name in state if name not in wanted),
        left=left,
        num_others=len(names - set(left) - set(wanted.values()) - set(POSITIONS)),
    )


def _left(names: set[str], wanted: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(sorted(name for name in names - set(wanted.values()) if name.startswith("mask_decoder.")))


def _families(names: Iterable[str]) -> str:
    """The first parts of names, each once: what a reader can take in."""
    stems = {".".join(name.removeprefix("mask_decoder.").split(".")[:2]) for name in names}
    return ", ".join(sorted(stems)) or "none"
