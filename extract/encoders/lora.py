"""LoRA: which modules of an encoder learn, and adapters in PEFT's own format, laid on so that they do.

Knows nothing of images or prompts; `live.py` makes encoders of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from cache_schema import atomic
from cache_schema.errors import UsageError, require_at_least, unknown_name
from extract.encoders.families import PyramidFamily, TransformerFamily
from extract.encoders.loading import ADAPTER_CONFIG, ADAPTER_WEIGHTS, open_adapter, quiet_peft
from extract.encoders.text import TextFamily

_NAME = "default"


@dataclass(frozen=True)
class LoraSpec:
    """How an encoder learns: W x becomes W x + s B A x, where A and B are of low rank and B begins at zero.

    Source: Hu et al., LoRA. s is alpha / rank; `rank_stabilised` makes it alpha / sqrt(rank) (Kalajdzievski, rsLoRA),
    `dora` learns the length of each row of W as well (Liu et al., DoRA).

    Args:
        dropout: of the adapter's input, in training. The encoder's own dropout stays off.
        target_modules: names of linear modules in a block, such as `"q_proj"`, or their paths in it where a name occurs
            twice, such as `"attention.output.dense"`; None for all of them.
        first_block: adapters are in this block and those behind it. The first is 0.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None
    first_block: int = 0
    dora: bool = False
    rank_stabilised: bool = False

    def __post_init__(self) -> None:
        require_at_least(self, 1, "rank")
        require_at_least(self, 0, "first_block")
        if not self.alpha > 0:
            raise UsageError(f"alpha is {self.alpha}: give a number above 0, such as twice the rank.")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout is {self.dropout}: give a share from 0 to below 1.")
        if self.target_modules is not None and not self.target_modules:
            raise UsageError("no target module is named; name some, or leave it out to adapt all.")


def lora_targets(
    model: PreTrainedModel,
    family: TransformerFamily | TextFamily | PyramidFamily,
    spec: LoraSpec,
    num_blocks: int | None = None,
) -> list[str]:
    """Full names of the linear modules that get an adapter: projections of attention and MLP, in the model's order.

    Those are all linear modules that a transformer's block has, in every family.

    Args:
        num_blocks: how many blocks anything is asked of; those behind them would never learn. None for all.

    Raises:
        UsageError: the model has no such modules or blocks, or is no transformer.
    """
    if isinstance(family, PyramidFamily):
        raise UsageError(
            f"{type(model).__name__} is a convolutional network; LoRA adapts the linear modules of transformers only."
        )
    blocks = model.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    num_blocks = len(blocks) if num_blocks is None else num_blocks
    if spec.first_block >= num_blocks:
        raise UsageError(
            f"there is nothing to adapt from block {spec.first_block} on: of {type(model).__name__}, the features that "
            f"are asked for come of {num_blocks} blocks, counted from 0."
        )
    paths = [path for path, module in blocks[spec.first_block].named_modules() if isinstance(module, nn.Linear)]
    chosen = paths if spec.target_modules is None else _choose(paths, spec.target_modules)
    return [f"{family.blocks}.{block}.{path}" for block in range(spec.first_block, num_blocks) for path in chosen]


def _choose(paths: list[str], names: tuple[str, ...]) -> list[str]:
    """The paths in a block that are meant by their last names or as a whole."""
    short = [path.rpartition(".")[2] for path in paths]
    for name in names:
        if name not in short and name not in paths:
            twice = {path for path, last in zip(paths, short, strict=True) if short.count(last) > 1}
            raise unknown_name("target module", name, {*short, *twice})
    return [path for path, last in zip(paths, short, strict=True) if last in names or path in names]


def add_lora(model: PreTrainedModel, targets: Iterable[str], spec: LoraSpec) -> PeftModel:
    """Add a fresh adapter, whose matrices A are drawn from torch's random numbers. What the model says stays the same.

    Args:
        model: is changed: the adapter is in it, and all else is frozen.
        targets: full names, see `lora_targets`.
    """
    names = list(targets)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=names,
        use_dora=spec.dora,
        use_rslora=spec.rank_stabilised,
        bias="none",
    )
    with quiet_peft():
        adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    # PEFT shortens the names as far as they are unique in this very model, and notes where it was loaded from.
    config.target_modules = sorted(names)
    source = str(model.name_or_path)
    config.base_model_name_or_path = Path(source).name if Path(source).exists() else source
    return adapted


def load_lora(model: PreTrainedModel, folder: str) -> PeftModel:
    """Lay a saved adapter on a model so that it learns on, as strictly as `lay_adapter` does.

    Args:
        model: is changed: the adapter is in it, and all else is frozen.

    Raises:
        UsageError: the folder holds no LoRA adapter, or one that was made for another model.
    """
    return open_adapter(model, folder, learns=True)[0]


def require_lora(adapted: PeftModel, targets: Iterable[str], spec: LoraSpec, folder: str) -> None:
    """Make sure that a saved adapter is what a spec says.

    Args:
        targets: full names of the modules that the spec means, see `lora_targets`.

    Raises:
        UsageError: it is not, and which settings differ.
    """
    config = adapted.peft_config[_NAME]
    settings = {
        "rank": ("r", spec.rank),
        "alpha": ("lora_alpha", spec.alpha),
        "dropout": ("lora_dropout", spec.dropout),
        "dora": ("use_dora", spec.dora),
        "rank_stabilised": ("use_rslora", spec.rank_stabilised),
    }
    told = [
        f"{name} is {getattr(config, theirs)} there and {ours} here"
        for name, (theirs, ours) in settings.items()
        if getattr(config, theirs) != ours
    ]
    if config.rank_pattern or config.alpha_pattern or config.bias != "none":
        told.append("it has ranks or scales of its own for some modules, or learns biases, which settings cannot say")
    names, wanted = set(adapted_names(adapted.get_base_model())), set(targets)
    if names != wanted:
        told.append(f"it adapts {len(names)} modules, of which {len(names & wanted)} are among the {len(wanted)} here")
    if told:
        raise UsageError(
            f"the adapter {folder} was made with other settings: {'; '.join(told)}. Set them as they are there."
        )


def save_lora(adapted: PeftModel, folder: Path) -> None:
    """Write an adapter as PEFT does, adapter_config.json and adapter_model.safetensors, over one that is there.

    Nothing in it tells of the machine that it was written on.
    """
    config = copy.copy(adapted.peft_config[_NAME])
    config.inference_mode = True
    weights: Mapping[str, Any] = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    packed = safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, {"format": "pt"}
    )
    settings = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    atomic.write_file(folder / ADAPTER_WEIGHTS, packed)
    atomic.write_json(folder / ADAPTER_CONFIG, settings)


def adapted_names(model: nn.Module) -> tuple[str, ...]:
    """Full names of the modules of a model that an adapter changes, in the model's order."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, LoraLayer | ModulesToSaveWrapper))


def set_training(model: nn.Module, learning: bool) -> None:
    """Switch the dropout of adapters on or off. All else stays as in evaluation: features are those that were cached.

    A dropout of the model's own would be one more difference from the cache, and so would DINOv3's random places.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            assert isinstance(module, nn.Module)
            module.training = learning  # DoRA looks here whether there is a dropout
            assert isinstance(module.lora_dropout, nn.ModuleDict)
            module.lora_dropout.train(learning)
