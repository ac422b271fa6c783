"""Heads for open-vocabulary segmentation: of a run, or made of Talk2DINO's weights, and the way to their encoders."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from cache_schema.errors import UsageError
from cache_schema.masks import Size
from cache_schema.store import absolute_path
from evaluate.open_vocabulary.scores import LOGITS, compares_cosines
from evaluate.open_vocabulary.templates import TemplateSet
from evaluate.open_vocabulary.windows import SlidingWindow
from extract.encoders.families import TRANSFORMERS
from extract.encoders.loading import read_config
from extract.encoders.protocols import ImageEncoder, TextEncoder
from extract.encoders.specs import FINAL_LAYER, AttentionOutput
from extract.job import pick_device
from heads.checkpoint import WEIGHTS, load_head
from heads.inputs import Head
from heads.runs import read_run_config
from heads.talk2dino import Talk2DinoHead, load_talk2dino, read_talk2dino
from headstart.encoders import image_spec, load_recorded_encoders, text_spec

PROJECTION_SUFFIX = ".pth"
"""The end of the name of a file of Talk2DINO's weights."""

_REMEDY = "do without background cleaning by --cleaning 0."

PROJECTION_SIZE: Size = (518, 518)
"""The input size with which Talk2DINO's numbers were published."""


@dataclass(frozen=True)
class Choices:
    """What is to be chosen of how label maps are made; None is what suits the head and the task.

    Args:
        background: the level of the background channel, where there is one.
        cleaning: the strength of background cleaning.
        image_encoder, text_encoder, input_size: of a file of Talk2DINO's weights; a run knows its own.
    """

    templates: TemplateSet = "7"
    aliases: bool = False
    windows: SlidingWindow = field(default_factory=SlidingWindow)
    background: float | None = None
    cleaning: float | None = None
    pamr: bool = False
    image_encoder: str | None = None
    text_encoder: str | None = None
    input_size: Size | None = None
    batch_size: int | None = None
    device: str = "auto"


@dataclass(frozen=True)
class OpenHead:
    """A head and the way to its encoders.

    Args:
        run_dir: the run it is of; None for one made of a file of weights.
        config: what the run recorded of its encoders, or for weights what was chosen.
    """

    head: Head
    path: Path
    run_dir: Path | None
    config: Mapping[str, Any]

    @property
    def dtypes(self) -> tuple[str, str]:
        """The data types of the image and prompt features that it learned from."""
        if self.run_dir is None:
            return "float32", "float32"
        return self.config["encoders"]["image"]["dtype"], self.config["encoders"]["text"]["dtype"]


def open_head(model: Path, choices: Choices) -> OpenHead:
    """The head of a run folder, or one made of a file of Talk2DINO's published weights.

    Raises:
        UsageError: it is neither, or encoders are chosen for a run or not chosen for weights.
    """
    chosen = {"--image-encoder": choices.image_encoder, "--text-encoder": choices.text_encoder}
    if model.suffix != PROJECTION_SUFFIX:
        if any(chosen.values()) or choices.input_size is not None:
            raise UsageError(
                "a run knows its encoders: leave out --image-encoder, --text-encoder and --input-size, which go with a "
                f"{PROJECTION_SUFFIX} file of Talk2DINO's weights."
            )
        config = read_run_config(model, "encoders")
        _, head = load_head(model / "best")
        return OpenHead(head, model / "best" / WEIGHTS, model, config)
    if missing := [option for option, value in chosen.items() if value is None]:
        raise UsageError(
            f"{model} holds a projection alone: name {' and '.join(missing)}, such as --image-encoder "
            "dinov2-base-reg and --text-encoder clip-base-16."
        )
    state = read_talk2dino(model)
    image_width, pooled_width = state["linear_layer.weight"].shape
    head = Talk2DinoHead(
        image_width=image_width,
        pooled_width=pooled_width,
        layer=FINAL_LAYER,
        hidden_layers=sum(name.endswith("weight") for name in state) - 1,
    )
    load_talk2dino(head, model)
    return OpenHead(head.eval(), model, None, {})


def attention_read(head: Head, *, cleans: bool) -> tuple[AttentionOutput, ...]:
    """The attention outputs that a head's scores are made of; for cosines, those of its training play no part.

    Raises:
        UsageError: background cleaning is asked for, and the head compares other patches than the attention is of.
    """
    if not compares_cosines(head):
        return cast(tuple[AttentionOutput, ...], head.attention)
    if cleans and head.layers != (FINAL_LAYER,):
        raise UsageError(f"this head compares patches of layer {head.layers[0]}, not the last one's; {_REMEDY}")
    return (LOGITS,) if cleans else ()


def load_encoders(
    opened: OpenHead, choices: Choices, attention: tuple[AttentionOutput, ...]
) -> tuple[ImageEncoder, TextEncoder]:
    """The encoders of a head, for nothing but what its scores are made of."""
    from extract.encoders.image import load_image_encoder
    from extract.encoders.text import load_text_encoder

    head = opened.head
    if opened.run_dir is not None:
        config = copy.deepcopy(dict(opened.config))
        config["encoders"]["image"] |= {"layers": list(head.layers), "attention": list(attention)}
        if LOGITS in attention:
            source = config["encoders"]["image"]["source"]
            _require_attention(
                str(absolute_path(source["folder"], opened.run_dir)) if "folder" in source else source["hub"]
            )
        return load_recorded_encoders(opened.run_dir, config, choices.device)
    assert choices.image_encoder is not None
    assert choices.text_encoder is not None
    here = Path("encoders")
    size = choices.input_size or PROJECTION_SIZE
    seen = replace(image_spec(choices.image_encoder, here, layers=head.layers, input_size=size), attention=attention)
    if LOGITS in attention:
        _require_attention(seen.source)
    image_encoder = load_image_encoder(seen, device=pick_device(choices.device))
    text_encoder = load_text_encoder(text_spec(choices.text_encoder, here), device=pick_device(choices.device))
    assert isinstance(head, Talk2DinoHead)
    widths = image_encoder.grids[FINAL_LAYER][2], text_encoder.pooled_width
    if widths != (wanted := (head.projection.linear_layer.out_features, head.projection.linear_layer.in_features)):
        raise UsageError(
            f"{opened.path} projects prompts of width {wanted[1]} to image tokens of width {wanted[0]}; "
            f"{text_encoder.name} and {image_encoder.name} have {widths[1]} and {widths[0]}. Name the encoders it was "
            "trained with."
        )
    return image_encoder, text_encoder


def _require_attention(source: str) -> None:
    """Make sure that an encoder gives what background cleaning reads.

    Raises:
        UsageError: it does not.
    """
    family = TRANSFORMERS.get(read_config(source)["model_type"])
    if family is None or family.attention is None:
        raise UsageError(f"{source} has no attention outputs, only DINO's transformers do; {_REMEDY}")
