"""Talk2DINO (Barsellotti et al. 2024): a prompt, projected into the space of image tokens, is compared with each.

Only the text side is learned. It is trained without masks, on images with captions (`heads.contrastive.info_nce`), and
gives masks all the same; it can be trained on masks, too. The published weights are read and written as they are.
"""

from __future__ import annotations

import dataclasses
import io
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cache_schema import atomic
from cache_schema.errors import UsageError, unknown_name
from cache_schema.fingerprint import digest_file
from heads.inputs import Embeddings, FeatureShapes, Head, HeadInputs, HeadOutputs

ALIGNMENTS = ("cls", "mean_token", "head_tokens", "mean_patch")
"""What of an image a prompt is compared with in training: its CLS token, its patches pooled by the attention of the CLS
token (mean over heads, or one candidate for each head), or their plain mean."""

TEXTS = ("pooled", "mean")
"""What of a prompt is projected: its pooled feature, or the mean of its tokens."""

_DAMAGE = (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError)
"""What torch.load raises for bytes that it did not write, beside pickle.UnpicklingError."""

_OLD_NAME, _NAME = "linear_layer2.", "hidden_layers.0."


class Projection(nn.Module):
    """y = W_n tanh(... W_2 tanh(W_1 x + b_1) + b_2 ...) + b_n, (b, `pooled_width`) to (b, `image_width`).

    Its parameters have the names of the published weights.

    Args:
        hidden_layers: linear layers behind the first, each of `image_width`; the published models have one.
    """

    def __init__(self, *, pooled_width: int, image_width: int, hidden_layers: int = 1) -> None:
        super().__init__()
        self.linear_layer = nn.Linear(pooled_width, image_width)
        self.hidden_layers = nn.ModuleList(nn.Linear(image_width, image_width) for _ in range(hidden_layers))

    def forward(self, pooled: Float[Tensor, "b p"]) -> Float[Tensor, "b d"]:
        """Prompts in the space of image tokens, of any length."""
        projected = self.linear_layer(pooled)
        for layer in self.hidden_layers:
            projected = layer(projected.tanh())
        return projected


@dataclass(frozen=True)
class Talk2DinoReport:
    """The file a projection was taken from, and its digest."""

    source: str
    sha256: str

    def summary(self) -> str:
        return f"started from {self.source} (SHA-256 {self.sha256[:12]}): the whole projection"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Talk2DinoHead(Head):
    """mask_logits = logit_scale * (cosine of the projected prompt and each patch - log(background / (1 - background))).

    A logit is above 0 where the sigmoid of the cosine is above `background`, which is how the published evaluation
    tells things from background. The cosine itself is `cosine(inputs)`; with `logit_scale` 1 and `background` 0.5 the
    logits are the cosines, to the last bit.

    Args:
        image_width: d, the width of the image tokens.
        pooled_width: the width of what is projected of a prompt.
        layer: the cached layer it reads: the published models take the last, normalised.
        text: what of a prompt is projected: its pooled feature, or the mean of its tokens (JurasSigLIP).
        alignment: one of `ALIGNMENTS`; the published models take `head_tokens`. Masks do not depend on it.
        hidden_layers: see `Projection`.
        logit_scale, background: as above; 0.55 is published for ViT-B, 0.54 for ViT-L.
        learned_logits: learn a factor and a shift of the logits, starting from 1 and 0; for training on masks, with a
            `logit_scale` such as 10.
        contrastive_scale, contrastive_bias: learn what contrastive losses multiply cosines by and then add, starting
            there. Without them the embeddings have none, and losses take the fixed scale of Talk2DINO.
    """

    initial_report: Talk2DinoReport | None = None

    def __init__(
        self,
        *,
        image_width: int,
        pooled_width: int,
        layer: str,
        text: str = "pooled",
        alignment: str = "head_tokens",
        hidden_layers: int = 1,
        logit_scale: float = 1.0,
        background: float = 0.55,
        learned_logits: bool = False,
        contrastive_scale: float | None = None,
        contrastive_bias: float | None = None,
    ) -> None:
        super().__init__()
        self.layers = (layer,)
        self.attention = (alignment,) if alignment in ("mean_token", "head_tokens") else ()
        self.embedded_layers = (layer,) if alignment == "mean_patch" else ()
        self.alignment = alignment
        self.reads_tokens = text == "mean"
        self.projection = Projection(pooled_width=pooled_width, image_width=image_width, hidden_layers=hidden_layers)
        self.logit_scale, self.threshold = logit_scale, math.log(background / (1 - background))
        self.log_gain = _parameter(0.0 if learned_logits else None)
        self.shift = _parameter(0.0 if learned_logits else None)
        self.log_contrastive_scale = _parameter(None if contrastive_scale is None else math.log(contrastive_scale))
        self.contrastive_bias = _parameter(contrastive_bias)

    def forward(self, inputs: HeadInputs) -> HeadOutputs:
        """(b, gh, gw) mask logits, and embeddings of d channels."""
        projected = self._project(inputs)
        logits = self.logit_scale * (self._cosine(inputs, projected) - self.threshold)
        if self.log_gain is not None and self.shift is not None:
            logits = self.log_gain.exp() * (logits + self.shift)
        return HeadOutputs(logits, embeddings=self._embeddings(inputs, projected))

    def cosine(self, inputs: HeadInputs) -> Float[Tensor, "b gh gw"]:
        """Cosine of each projected prompt and each patch of its image."""
        return self._cosine(inputs, self._project(inputs))

    def embed(self, inputs: HeadInputs) -> Embeddings:
        """What contrastive losses compare; reads no token grid but for `mean_patch`."""
        return self._embeddings(inputs, self._project(inputs))

    def _project(self, inputs: HeadInputs) -> Float[Tensor, "b d"]:
        if not self.reads_tokens:
            projected: Tensor = self.projection(inputs.pooled)
            return projected
        mask = inputs.prompt_mask[..., None]
        mean: Tensor = self.projection((inputs.prompt_tokens * mask).sum(1) / mask.sum(1).clamp(min=1))
        return mean

    def _cosine(self, inputs: HeadInputs, projected: Float[Tensor, "b d"]) -> Float[Tensor, "b gh gw"]:
        tokens = F.normalize(inputs.features[self.layers[0]], dim=-1).index_select(0, inputs.image_index)
        return torch.einsum("bhwd,bd->bhw", tokens, F.normalize(projected, dim=-1))

    def _embeddings(self, inputs: HeadInputs, projected: Float[Tensor, "b d"]) -> Embeddings:
        scale = None if self.log_contrastive_scale is None else self.log_contrastive_scale.exp()
        # a copy, for several processes look for the parameters that were used by what was computed from them
        bias = None if self.contrastive_bias is None else self.contrastive_bias.clone()
        return Embeddings(self._candidates(inputs), projected, scale, bias)

    def _candidates(self, inputs: HeadInputs) -> Float[Tensor, "i k d"]:
        if self.alignment == "head_tokens":
            return inputs.attention["head_tokens"]
        if self.alignment == "mean_token":
            return inputs.attention["mean_token"][:, None]
        if self.alignment == "cls":
            return inputs.cls[self.layers[0]][:, None]
        return inputs.features[self.layers[0]].mean((1, 2))[:, None]


def build_talk2dino(
    shapes: FeatureShapes,
    *,
    layer: str | None = None,
    text: str = "pooled",
    alignment: str = "head_tokens",
    hidden_layers: int = 1,
    logit_scale: float = 1.0,
    background: float = 0.55,
    learned_logits: bool = False,
    contrastive_scale: float | None = None,
    contrastive_bias: float | None = None,
    initial: str | None = None,
) -> Talk2DinoHead:
    """A Talk2DINO head on one cached layer, by default the last that was cached.

    Args:
        initial: a file of the published layout to start from; see `read_talk2dino`.

    Raises:
        UsageError: the layer was not cached, or not with what `alignment` reads, or `initial` does not fit.
        ValueError: a number is out of its range, or the image's candidates are not of the layer's width.
    """
    if alignment not in ALIGNMENTS:
        raise unknown_name("alignment", alignment, ALIGNMENTS)
    if text not in TEXTS:
        raise unknown_name("text", text, TEXTS)
    if hidden_layers < 0:
        raise ValueError("hidden_layers must be at least 0")
    if not 0 < background < 1:
        raise ValueError("background must lie between 0 and 1, as the sigmoid of a cosine does")
    if not logit_scale > 0 or not (contrastive_scale is None or contrastive_scale > 0):
        raise ValueError("logit_scale and contrastive_scale must be above 0")
    (layer,) = shapes.layers([layer] if layer else None)
    image_width = shapes.grids[layer][2]
    candidate_width = image_width
    if alignment == "cls":
        shapes.require_cls(layer)
        candidate_width = shapes.cls_widths[layer]
    elif alignment != "mean_patch":
        shapes.require_attention(alignment)
        candidate_width = shapes.attention[alignment][-1]
    if candidate_width != image_width:
        raise ValueError(
            f"layer {layer} has patches of width {image_width} but {alignment} of {candidate_width}; "
            "name the layer that the two share"
        )
    head = Talk2DinoHead(
        image_width=image_width,
        pooled_width=shapes.token_width if text == "mean" else shapes.pooled_width,
        layer=layer,
        text=text,
        alignment=alignment,
        hidden_layers=hidden_layers,
        logit_scale=logit_scale,
        background=background,
        learned_logits=learned_logits,
        contrastive_scale=contrastive_scale,
        contrastive_bias=contrastive_bias,
    )
    if initial is not None:
        head.initial_report = load_talk2dino(head, Path(initial))
    return head


def read_talk2dino(path: Path) -> dict[str, Tensor]:
    """The state of a `Projection` from a file of the published layout, on the CPU wherever it was saved from.

    The layout is a dict of float32 tensors that torch saved: linear_layer.{weight,bias}, hidden_layers.0.{weight,bias}
    and so on; in older files linear_layer2 for hidden_layers.0. Nothing but tensors is unpickled.

    Raises:
        UsageError: the file cannot be read, holds other objects than tensors, or tensors that are unknown, missing, of
            another data type or of shapes that do not fit each other. All faults are named.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{path} holds more than tensors, or is no file that torch.save wrote; it was not loaded, because what "
            "else it holds could run code. Save the projection's state_dict() alone."
        ) from error
    except _DAMAGE as error:
        raise UsageError(f"{path} cannot be read ({error}); name a .pth file of Talk2DINO's projection.") from error
    if not isinstance(loaded, Mapping) or not all(isinstance(name, str) for name in loaded):
        raise UsageError(f"{path} holds no tensors by name; save the projection's state_dict().")
    renamed = {
        _NAME + name.removeprefix(_OLD_NAME) if name.startswith(_OLD_NAME) else name: value
        for name, value in loaded.items()
    }
    faults = _faults(renamed) if len(renamed) == len(loaded) else [f"both {_OLD_NAME}* and {_NAME}*"]
    if faults:
        raise UsageError(f"{path} does not hold Talk2DINO's projection: {'; '.join(faults)}. Name another file.")
    return {name: tensor.detach().contiguous() for name, tensor in renamed.items()}


def load_talk2dino(head: Talk2DinoHead, path: Path) -> Talk2DinoReport:
    """Give a head the projection of a file of the published layout, all of it; nothing else of the head changes.

    Raises:
        UsageError: as `read_talk2dino`, or the file's projection has other widths or another depth than the head's.
    """
    state, own = read_talk2dino(path), head.projection.state_dict()
    shapes, expected = ({name: tuple(tensor.shape) for name, tensor in found.items()} for found in (state, own))
    if shapes != expected:
        raise UsageError(
            f"{path} projects {_widths(state)}, this head {_widths(own)}; "
            "take the weights of the encoders in the cache, or a cache of the encoders of the weights."
        )
    head.projection.load_state_dict(state, strict=True)
    return Talk2DinoReport(str(path), digest_file(path))


def write_talk2dino(head: Talk2DinoHead, path: Path) -> None:
    """Write a head's projection in the published layout, whole or not at all."""
    state = {name: tensor.detach().cpu().float().contiguous() for name, tensor in head.projection.state_dict().items()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic.write_file(path, buffer.getbuffer())


def _parameter(value: float | None) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(torch.tensor(float(value)))


def _faults(state: Mapping[str, Any]) -> list[str]:
    """What keeps named values from being the state of a `Projection`."""
    hidden = {name.rpartition(".")[0] for name in state if name.startswith("hidden_layers.")}
    layers = ["linear_layer", *(f"hidden_layers.{index}" for index in range(len(hidden)))]
    expected = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    faults = [f"{name!r} is unknown" for name in state if name not in expected]
    faults += [f"{name} is missing" for name in expected if name not in state]
    known = {name: state[name] for name in expected if name in state}
    for name, value in known.items():
        if not isinstance(value, Tensor):
            faults.append(f"{name} is no tensor but {type(value).__name__}")
        elif value.dtype != torch.float32 or value.layout != torch.strided:
            faults.append(f"{name} is {value.dtype} ({value.layout}), not torch.float32")
        elif value.is_meta:
            faults.append(f"{name} has a shape but no values")
        elif value.numel() * value.element_size() > value.untyped_storage().nbytes():
            faults.append(f"{name} has fewer values than its shape says")
        elif not value.isfinite().all():
            faults.append(f"{name} has values that are not finite")
    if faults:
        return faults
    weight = known["linear_layer.weight"]
    if weight.ndim != 2 or 0 in weight.shape:
        return [f"linear_layer.weight has shape {tuple(weight.shape)}, not (image width, prompt width)"]
    width = weight.shape[0]
    for name, value in known.items():
        fitting = (width,) if name.endswith("bias") else (width, width)
        if name != "linear_layer.weight" and value.shape != fitting:
            faults.append(f"{name} has shape {tuple(value.shape)}, not {fitting}")
    return faults


def _widths(state: Mapping[str, Tensor]) -> str:
    weights = [tensor for name, tensor in state.items() if name.endswith("weight")]
    return " -> ".join(str(width) for width in (weights[0].shape[1], *(weight.shape[0] for weight in weights)))
