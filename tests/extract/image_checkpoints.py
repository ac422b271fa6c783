"""Small random checkpoints of the real classes of every family of image encoders, and what transformers makes of them.

The oracle here is transformers alone: its own processors on Pillow, its own models, all hidden states kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    Siglip2Config,
    Siglip2Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from cache_schema.masks import Size
from extract.encoders.protocols import ImageEncoder, ImageEncoding

WIDTH, NUM_BLOCKS, NUM_HEADS = 32, 3, 4
STAGES = (16, 24, 32, 40)
COLOURS: dict[str, Any] = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}

_SIZES: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": NUM_BLOCKS, "num_attention_heads": NUM_HEADS}
_WIDER: dict[str, Any] = {**_SIZES, "intermediate_size": 64}
_TEXT: dict[str, Any] = {**_WIDER, "vocab_size": 50, "max_position_embeddings": 8, "projection_size": WIDTH}
_CLIP = CLIPVisionConfig(**_WIDER, patch_size=16, image_size=64, projection_dim=24)
_SIGLIP = SiglipVisionConfig(**_WIDER, patch_size=16, image_size=64)
_NAFLEX = Siglip2VisionConfig(**_WIDER, patch_size=16, num_patches=16)
_DINOV3_PROCESSOR = {
    **COLOURS,
    "image_processor_type": "DINOv3ViTImageProcessorFast",
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "resample": 2,
    "size": {"height": 64, "width": 64},
}


def _whole_clip() -> CLIPModel:
    return CLIPModel(CLIPConfig(text_config=_TEXT, vision_config=_CLIP.to_dict(), projection_dim=24))


def _whole_siglip() -> SiglipModel:
    return SiglipModel(SiglipConfig(text_config=_TEXT, vision_config=_SIGLIP.to_dict()))


def _whole_naflex() -> Siglip2Model:
    return Siglip2Model(Siglip2Config(text_config=_TEXT, vision_config=_NAFLEX.to_dict()))


@dataclass(frozen=True)
class Family:
    """How to make a checkpoint, and what is true of it.

    Args:
        processor: of the real class where it works on Pillow, else what a published checkpoint's file says.
        step: pixels of a patch, or the stride of the last stage.
        has_cls: of every layer; of `"last"` alone in a pyramid.
    """

    make: Callable[[], PreTrainedModel]
    processor: Any
    step: int
    side: int
    has_cls: bool
    num_registers: int = 0

    @property
    def is_pyramid(self) -> bool:
        return self.step == 32

    @property
    def layers(self) -> tuple[str, ...]:
        numbers = map(str, range(1, 5)) if self.is_pyramid else map(str, range(NUM_BLOCKS + 1))
        return ("last", *numbers)


def _dinov2_processor() -> BitImageProcessorPil:
    return BitImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}, **COLOURS)


FAMILIES: dict[str, Family] = {
    "dinov2": Family(
        lambda: Dinov2Model(Dinov2Config(**_SIZES, patch_size=14, image_size=56)), _dinov2_processor(), 14, 56, True
    ),
    "dinov2_with_registers": Family(
        lambda: Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(**_SIZES, patch_size=14, image_size=56, num_register_tokens=4)
        ),
        _dinov2_processor(),
        14,
        56,
        True,
        num_registers=4,
    ),
    "dinov3_vit": Family(
        lambda: DINOv3ViTModel(
            DINOv3ViTConfig(**_WIDER, patch_size=16, image_size=64, num_register_tokens=4, use_gated_mlp=True)
        ),
        _DINOV3_PROCESSOR,
        16,
        64,
        True,
        num_registers=4,
    ),
    "clip": Family(_whole_clip, CLIPImageProcessorPil(size=64, crop_size=64, **COLOURS), 16, 64, True),
    "clip_vision_model": Family(
        lambda: CLIPVisionModel(_CLIP), CLIPImageProcessorPil(size=64, crop_size=64, **COLOURS), 16, 64, True
    ),
    "siglip": Family(
        _whole_siglip, SiglipImageProcessorPil(size={"height": 64, "width": 64}, resample=2, **COLOURS), 16, 64, False
    ),
    "siglip_vision_model": Family(
        lambda: SiglipVisionModel(_SIGLIP),
        SiglipImageProcessorPil(size={"height": 64, "width": 64}, **COLOURS),
        16,
        64,
        False,
    ),
    "siglip2": Family(
        _whole_naflex, Siglip2ImageProcessorPil(patch_size=16, max_num_patches=16, **COLOURS), 16, 64, False
    ),
    "siglip2_vision_model": Family(
        lambda: Siglip2VisionModel(_NAFLEX),
        Siglip2ImageProcessorPil(patch_size=16, max_num_patches=16, **COLOURS),
        16,
        64,
        False,
    ),
    "resnet": Family(
        lambda: ResNetModel(
            ResNetConfig(embedding_size=8, hidden_sizes=list(STAGES), depths=[1, 2, 1, 1], layer_type="bottleneck")
        ),
        ConvNextImageProcessorPil(size={"shortest_edge": 64}, **COLOURS),
        32,
        64,
        False,
    ),
    "dinov3_convnext": Family(
        lambda: DINOv3ConvNextModel(
            DINOv3ConvNextConfig(hidden_sizes=list(STAGES), depths=[1, 1, 2, 1], image_size=64)
        ),
        _DINOV3_PROCESSOR,
        32,
        64,
        True,
    ),
}
"""By model type, as the product has them."""

TRANSFORMERS = tuple(name for name, family in FAMILIES.items() if not family.is_pyramid)
PYRAMIDS = tuple(name for name, family in FAMILIES.items() if family.is_pyramid)
DINO = ("dinov2", "dinov2_with_registers", "dinov3_vit")


def scramble(model: nn.Module) -> None:
    """Random values for what initialises to zeros or ones, so that every weight makes a difference."""
    for name, parameter in model.named_parameters():
        is_scale = parameter.ndim == 1 and name.endswith(("weight", "lambda1", "gamma"))
        nn.init.normal_(parameter, mean=float(is_scale), std=0.3 if is_scale else 0.15)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 1.5)


def make_checkpoints(folder: Path) -> dict[str, Path]:
    """Save a checkpoint of each family; return their folders by model type."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, family in FAMILIES.items():
            model = family.make()
            scramble(model)
            model.save_pretrained(folder / name)
            if isinstance(family.processor, dict):
                (folder / name / "preprocessor_config.json").write_text(json.dumps(family.processor))
            else:
                family.processor.save_pretrained(folder / name)
    return {name: folder / name for name in FAMILIES}


def load_tower(checkpoint: Path) -> Any:
    """The image model of a checkpoint as transformers loads it: the vision tower of a whole model."""
    model_type = json.loads((checkpoint / "config.json").read_bytes())["model_type"]
    model: Any = type(FAMILIES[model_type].make()).from_pretrained(checkpoint).eval()
    return model.vision_model if hasattr(model, "vision_model") else model


@torch.no_grad()
def forward_directly(model_type: str, model: Any, images: Sequence[NDArray[np.uint8]], input_size: Size) -> Any:
    """All that transformers says of images that are squashed to a size, through processor and model of its own.

    NaFlex finds the size itself, from how many patches there may be, for images of that shape.
    """
    height, width = input_size
    family = FAMILIES[model_type]
    pictures = [Image.fromarray(image) for image in images]
    size: dict[str, Any] = {"size": {"height": height, "width": width}, "return_tensors": "pt"}
    if isinstance(family.processor, Siglip2ImageProcessorPil):
        num_patches = height * width // family.step**2
        inputs = family.processor(pictures, max_num_patches=num_patches, return_tensors="pt")
        assert inputs["spatial_shapes"].tolist() == [[height // family.step, width // family.step]] * len(images)
    elif isinstance(family.processor, SiglipImageProcessorPil):
        inputs = family.processor(pictures, **size)
    elif isinstance(family.processor, CLIPImageProcessorPil | BitImageProcessorPil):
        inputs = family.processor(pictures, do_center_crop=False, **size)
    else:  # DINOv3's processor needs torchvision, ConvNeXt's always crops
        resample = 2 if isinstance(family.processor, dict) else 3
        squashing = BitImageProcessorPil(do_center_crop=False, resample=resample, **COLOURS)
        inputs = squashing(pictures, **size)
    if "clip" in model_type or (model_type.startswith("siglip") and not model_type.startswith("siglip2")):
        inputs["interpolate_pos_encoding"] = input_size != (family.side, family.side)
    return model(**inputs, output_hidden_states=True)


def expected_layer(model_type: str, output: Any, layer: str, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """The (i, gh, gw, d) grid of a layer and its CLS token, if it has one, out of what transformers said."""
    family = FAMILIES[model_type]
    state = output.last_hidden_state if layer == "last" else output.hidden_states[int(layer)]
    if state.ndim == 4:
        return state.permute(0, 2, 3, 1), None
    num_prefix = int(family.has_cls) + family.num_registers
    patches = state[:, num_prefix:].reshape(len(state), *grid, state.shape[-1])
    return patches, state[:, 0] if family.has_cls else None


def encode(encoder: ImageEncoder, images: Sequence[NDArray[np.uint8]]) -> ImageEncoding:
    """What an encoder says of images as a job would show them to it."""
    return encoder.encode(torch.from_numpy(np.stack([encoder.preprocess(image) for image in images])))


def noise_images(sizes: Sequence[Size], seed: int = 0) -> list[NDArray[np.uint8]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
