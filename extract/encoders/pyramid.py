"""Convolutional networks as towers: normalised pixels in, a pyramid of feature maps out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from cache_schema.errors import UsageError
from cache_schema.masks import Size
from extract.encoders.families import PyramidFamily
from extract.encoders.hidden_states import HiddenStates
from extract.encoders.precision import halve_weights
from extract.encoders.protocols import ImageEncoding
from extract.encoders.specs import FINAL_LAYER, NORMED, Precision


class Pyramid(nn.Module):
    """A convolutional network, cut off behind the deepest stage that is asked for.

    Layers `"1"` to `"4"` are the stages' outputs, `hidden_states[i]`, on ever coarser grids. `"last"` is
    `last_hidden_state`: of a ResNet the fourth stage; of a ConvNeXt the same after the final norm, and the only layer
    with a CLS token, the normed mean of the patches.

    Args:
        model: of the family, in float32. It is cut, and of no use to anyone else afterwards.
        layers: in the order in which they are given back.
        input_size: (H, W) in pixels, a multiple of `stride_of` the network.
        precision: that of the autocast under which this will be called.

    Raises:
        UsageError: the model has no such layer, or attention outputs are asked for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: PyramidFamily,
        layers: Sequence[str],
        attention: Sequence[str],
        input_size: Size,
        precision: Precision = "float32",
    ) -> None:
        super().__init__()
        name = type(model).__name__
        stages = model.get_submodule(family.stages)
        assert isinstance(stages, nn.ModuleList)
        if attention:
            raise UsageError(f"{name} has no attention outputs, only DINO's transformers do; ask for layers alone.")
        self._layers = {layer: _parse_layer(layer, len(stages), name) for layer in layers}
        self.grids: dict[str, tuple[int, int, int]] = {}
        for layer, number in self._layers.items():
            stride, width = stride_of(model) >> (len(stages) - number), int(model.config.hidden_sizes[number - 1])
            self.grids[layer] = (input_size[0] // stride, input_size[1] // stride, width)
        with_cls = [FINAL_LAYER] if family.has_cls and FINAL_LAYER in layers else []
        self.cls_widths: Mapping[str, int] = {layer: self.grids[layer][2] for layer in with_cls}
        self.attention_shapes: Mapping[str, tuple[int, ...]] = {}
        if FINAL_LAYER not in layers:
            del stages[max(self._layers.values()) :]
            if family.norm is not None:  # which has the width of the last stage
                model.set_submodule(family.norm, nn.Identity())
        halve_weights(stages, precision)
        self._memory_format = torch.channels_last if family.channels_last else torch.contiguous_format
        self._model = model.to(memory_format=self._memory_format)
        self._stages = stages
        self._states = HiddenStates(stages, [number for layer, number in self._layers.items() if layer != FINAL_LAYER])
        self._has_cls = family.has_cls

    def compile_blocks(self) -> None:
        """Compile stage by stage, for any size: torch compiles the same code a few times at most."""
        for stage in self._stages:
            stage.forward = torch.compile(stage.forward, dynamic=True)

    def forward(self, pixels: Float[Tensor, "i 3 h w"]) -> ImageEncoding:
        """Features of i normalised images."""
        last = self._model(pixel_values=pixels.contiguous(memory_format=self._memory_format)).last_hidden_state
        heard = self._states.take()
        features, cls = {}, {}
        for layer, number in self._layers.items():
            if layer == FINAL_LAYER and self._has_cls:
                cls[layer] = last[:, 0]
                features[layer] = last[:, 1:].reshape(last.shape[0], *self.grids[layer])
            else:
                features[layer] = (last if layer == FINAL_LAYER else heard[number]).permute(0, 2, 3, 1)
        return ImageEncoding(features, cls)


def stride_of(model: PreTrainedModel) -> int:
    """How many pixels a cell of the last stage is wide: the stem makes 4 of them one, each further stage halves."""
    first = 8 if getattr(model.config, "downsample_in_first_stage", False) else 4
    return first << (len(model.config.hidden_sizes) - 1)


def _parse_layer(layer: str, num_stages: int, name: str) -> int:
    """The number of a layer's stage; the last layer comes of the last stage."""
    known = {FINAL_LAYER: num_stages, **{str(number): number for number in range(1, num_stages + 1)}}
    if layer.endswith(NORMED) and (stage := layer.removesuffix(NORMED)) in known:
        raise UsageError(f"{name} has no norm for a stage of its own; ask for {stage} or {FINAL_LAYER}.")
    if layer not in known:
        raise UsageError(f"{name} has no layer {layer!r}: it has {FINAL_LAYER}, and 1 to {num_stages}.")
    return known[layer]
