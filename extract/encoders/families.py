"""Which models of transformers are image encoders, and where each keeps what an encoder needs of it.

Shared by the loader and the towers; knows nothing of a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import (
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ConvNextModel,
    DINOv3ViTModel,
    PreTrainedModel,
    ResNetModel,
    Siglip2VisionModel,
    SiglipVisionModel,
)

from extract.preprocessing import BICUBIC, BILINEAR


@dataclass(frozen=True)
class TransformerFamily:
    """A family of vision transformers.

    Args:
        blocks, norm: where the list of blocks and the final layer norm are in the model.
        before_blocks: what makes the tokens that go into the first block, in that order: embeddings and their norm.
        has_cls: whether a CLS token comes first. Register tokens, if any, come next.
        resample: Pillow's number of the filter that is meant where a checkpoint names none.
        attention: where the attention module is in a block, for families whose CLS row is cached on request.
        rotates: queries and keys of patches are rotated by their place before they are compared (RoPE).
        asks_to_interpolate: other sizes than the checkpoint's own must be asked for by `interpolate_pos_encoding`.
        takes_patches: the model is given patches that are cut already, with the shape of their grid (NaFlex).
    """

    model_class: type[PreTrainedModel]
    blocks: str
    norm: str
    has_cls: bool
    resample: int
    before_blocks: tuple[str, ...] = ("embeddings",)
    attention: str | None = None
    rotates: bool = False
    asks_to_interpolate: bool = False
    takes_patches: bool = False


@dataclass(frozen=True)
class PyramidFamily:
    """A family of convolutional networks whose stages are layers, each with a grid of its own.

    Args:
        stages: where the list of stages is in the model.
        norm: where the layer norm is that `last_hidden_state` went through, if any. It fits the last stage alone.
        has_cls: whether `last_hidden_state` is a row of tokens that begins with the pooled one, and not a map.
        resample: Pillow's number of the filter that is meant where a checkpoint names none.
        channels_last: the memory format in which it runs faster.
    """

    model_class: type[PreTrainedModel]
    stages: str
    norm: str | None
    has_cls: bool
    resample: int
    channels_last: bool


_CLIP = TransformerFamily(
    CLIPVisionModel,
    "encoder.layers",
    "post_layernorm",
    has_cls=True,
    resample=BICUBIC,
    before_blocks=("embeddings", "pre_layrnorm"),
    asks_to_interpolate=True,
)
_SIGLIP = TransformerFamily(
    SiglipVisionModel, "encoder.layers", "post_layernorm", has_cls=False, resample=BICUBIC, asks_to_interpolate=True
)
_SIGLIP2_NAFLEX = TransformerFamily(
    Siglip2VisionModel, "encoder.layers", "post_layernorm", has_cls=False, resample=BILINEAR, takes_patches=True
)

TRANSFORMERS: dict[str, TransformerFamily] = {
    "dinov2": TransformerFamily(
        Dinov2Model, "encoder.layer", "layernorm", has_cls=True, resample=BICUBIC, attention="attention"
    ),
    "dinov2_with_registers": TransformerFamily(
        Dinov2WithRegistersModel, "encoder.layer", "layernorm", has_cls=True, resample=BICUBIC, attention="attention"
    ),
    "dinov3_vit": TransformerFamily(
        DINOv3ViTModel, "model.layer", "norm", has_cls=True, resample=BILINEAR, attention="attention", rotates=True
    ),
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "siglip2": _SIGLIP2_NAFLEX,
    "siglip2_vision_model": _SIGLIP2_NAFLEX,
}
"""By the `model_type` of a checkpoint's config.json. Of a whole CLIP or SigLIP model, the vision tower is taken.

SigLIP2 checkpoints of one fixed resolution have the model type of SigLIP; `siglip2` is NaFlex alone.
"""

PYRAMIDS: dict[str, PyramidFamily] = {
    "resnet": PyramidFamily(
        # On 2 cores, ResNet-50 at 224 px takes 0.19 s for 8 images, against 0.23 s; in bfloat16 0.10 s against 0.14 s.
        ResNetModel,
        "encoder.stages",
        norm=None,
        has_cls=False,
        resample=BICUBIC,
        channels_last=True,
    ),
    "dinov3_convnext": PyramidFamily(
        # There, ConvNeXt-tiny takes 0.37 s either way; in bfloat16 0.47 s in channels-last, against 0.17 s.
        DINOv3ConvNextModel,
        "model.stages",
        norm="layer_norm",
        has_cls=True,
        resample=BILINEAR,
        channels_last=False,
    ),
}
"""By the `model_type` of a checkpoint's config.json."""
