"""A trained run as ONNX files: its head alone, and the whole pipeline from pixels and token ids on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cache_schema import atomic
from cache_schema.errors import UsageError
from cache_schema.views import PADDING_RGB
from evaluate.onnx_export import (
    MOST_INLINE_BYTES,
    OPSET,
    TOLERANCE,
    Example,
    OnnxModel,
    greatest_differences,
    require_onnx,
    write_onnx,
)
from evaluate.pipeline import (
    PIPELINE_SIZES,
    ImageGraph,
    PaddingToLimit,
    Pipeline,
    PromptGraph,
    export_pipeline,
    pad_prompts,
)
from evaluate.predictor import ShowsAttention
from evaluate.protocols import ORIGINAL_SIZE
from evaluate.tokenizer_file import PROMPTS, make_tokenizer_json
from extract.encoders.image import ImageParts, load_image_parts
from extract.encoders.loading import lay_adapter
from extract.encoders.specs import ImageEncoderSpec, TextEncoderSpec
from extract.encoders.text import TextFamily, TextTower, load_text_parts
from heads.checkpoint import HeadSpec, load_head
from heads.export import FlatHead, export_head, flat_inputs, free_sizes, make_example
from heads.inputs import Head, HeadInputs
from heads.runs import read_run_config
from headstart.encoders import load_recorded_encoders

Part = Literal["head", "pipeline"]

MODEL, TOKENIZER = "model.onnx", "tokenizer.json"
_FORMAT = 1
_TRACED = (2, 4, 5)
_COMPARED = ((1, 1, 1), (3, 5, 7), (2, 6, 3))
"""Numbers of images, prompts and tokens: those a model is traced on, and others that it is compared on."""


class _OffError(Exception):
    """A model says something else than what it was made of."""

    def __init__(self, differences: Mapping[str, float]) -> None:
        super().__init__(differences)
        self.differences = differences


@dataclass(frozen=True)
class Exported:
    """What became of one part of a run.

    Args:
        folder: where its files are; None if they were not kept, because they are too far off.
        differences: by output, see `evaluate.onnx_export.greatest_differences`.
    """

    part: Part
    folder: Path | None
    num_bytes: int
    differences: Mapping[str, float]
    seconds: float

    @property
    def difference(self) -> float:
        return max(self.differences.values())

    def summary(self) -> str:
        """One sentence for people."""
        measured = f"at most {self.difference:.1e} away from torch"
        if self.folder is None:
            return f"{self.part}: not written: {measured}, and {TOLERANCE:.0e} is allowed ({self.differences})"
        return f"{self.part}: {self.num_bytes / 1000:,.0f} kB in {self.seconds:.0f} s, {measured} -> {self.folder}"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON, which has no infinity: what is infinitely far off is null."""
        differences = {
            name: value if math.isfinite(value) else None
            for name, value in {**self.differences, "": self.difference}.items()
        }
        return {
            "part": self.part,
            "folder": None if self.folder is None else str(self.folder),
            "num_bytes": self.num_bytes,
            "seconds": round(self.seconds, 3),
            "difference": differences.pop(""),
            "differences": differences,
        }


def export_run(
    run_dir: Path,
    out: Path,
    parts: Sequence[Part] = ("head", "pipeline"),
    *,
    most_inline_bytes: int = MOST_INLINE_BYTES,
) -> list[Exported]:
    """Write parts of a run's best checkpoint to folders `out/head` and `out/pipeline`.

    Each is compared with torch in float32, on other numbers of images, prompts and tokens than it was traced on, before
    its folder appears under its name; one that is further off than `TOLERANCE` does not.

    Raises:
        UsageError: the folder is no run, its encoders cannot be loaded or written so, something is in the way, or what
            writes ONNX files is not installed.
        StoreMismatchError: the encoders are not those the run was trained on.
    """
    require_onnx()
    config = read_run_config(run_dir, *(["encoders"] if "pipeline" in parts else []))
    for part in parts:
        if (out / part).exists():
            raise UsageError(f"{out / part} is there already; name another folder, or remove it.")
    spec, head = load_head(run_dir / "best")
    head.requires_grad_(False)
    if isinstance(head, ShowsAttention):
        head.shows_attention = True
    write: dict[Part, Callable[[Path], Mapping[str, float]]] = {
        "head": partial(_write_head, spec, head, config, most_inline_bytes),
        "pipeline": partial(_write_pipeline, run_dir, spec, head, config, most_inline_bytes),
    }
    return [_publish(part, out / part, write[part]) for part in parts]


def _publish(part: Part, folder: Path, write: Callable[[Path], Mapping[str, float]]) -> Exported:
    started = time.perf_counter()
    try:
        with atomic.staged(folder) as temporary:
            temporary.mkdir()
            differences = write(temporary)
            num_bytes = sum(path.stat().st_size for path in temporary.iterdir())
    except _OffError as off:
        return Exported(part, None, 0, off.differences, time.perf_counter() - started)
    return Exported(part, folder, num_bytes, differences, time.perf_counter() - started)


def _compare(model: OnnxModel, examples: Sequence[Example]) -> Mapping[str, float]:
    differences = greatest_differences(model, examples)
    if max(differences.values()) > TOLERANCE:
        raise _OffError(differences)
    return differences


def _write_head(
    spec: HeadSpec, head: Head, config: Mapping[str, Any], most_inline_bytes: int, folder: Path
) -> Mapping[str, float]:
    traced = make_example(head, spec.shapes, *_TRACED)
    outputs = _said_by(head, traced)
    files = write_onnx(
        export_head(head, traced),
        folder / MODEL,
        inputs=list(flat_inputs(traced)),
        outputs=list(outputs),
        sizes=free_sizes(traced),
        most_inline_bytes=most_inline_bytes,
    )
    examples = [make_example(head, spec.shapes, *sizes, seed=seed) for seed, sizes in enumerate(_COMPARED, start=1)]
    model = OnnxModel(folder / MODEL)
    differences = _compare(model, [Example(flat_inputs(example), _said_by(head, example)) for example in examples])
    atomic.write_json(folder / "head.json", _describe("head", spec, config, model, files, differences))
    return differences


@torch.no_grad()
def _said_by(head: Head, inputs: HeadInputs) -> dict[str, Tensor]:
    arguments = (inputs.prompt_tokens, inputs.prompt_mask, inputs.pooled, inputs.image_index)
    said: dict[str, Tensor] = FlatHead(head)(inputs.features, inputs.cls, inputs.attention, *arguments)
    return said


def _write_pipeline(
    run_dir: Path, spec: HeadSpec, head: Head, config: dict[str, Any], most_inline_bytes: int, folder: Path
) -> Mapping[str, float]:
    encoders = _load_encoders(run_dir, config, head)
    preprocessing, text = encoders.image.preprocessing, encoders.text_identity["tokenizer"]
    tokenizer = make_tokenizer_json(encoders.text_source, text, encoders.text.tokenize)
    traced = encoders.example(head, *_TRACED, seed=0)
    files = write_onnx(
        export_pipeline(encoders.pipeline(head), traced.inputs, encoders.text.max_length),
        folder / MODEL,
        inputs=list(PIPELINE_SIZES),
        outputs=list(traced.outputs),
        sizes=PIPELINE_SIZES,
        keep_unread=True,
        most_inline_bytes=most_inline_bytes,
    )
    examples = [encoders.example(head, *sizes, seed=seed) for seed, sizes in enumerate(_COMPARED, start=1)]
    model = OnnxModel(folder / MODEL)
    differences = _compare(model, examples)
    described = _describe("pipeline", spec, config, model, files, differences)
    image = {
        "input_size": list(preprocessing.input_size),
        "aspect": preprocessing.aspect,
        "resample": preprocessing.resample,
        "padding_rgb": list(PADDING_RGB),
    }
    prompts = {"tokenizer": TOKENIZER, "max_tokens": encoders.text.max_length}
    atomic.write_file(folder / TOKENIZER, tokenizer.encode())
    atomic.write_json(folder / "pipeline.json", {**described, "image": image, "prompts": prompts})
    return differences


def _describe(
    kind: Part,
    spec: HeadSpec,
    config: Mapping[str, Any],
    model: OnnxModel,
    files: Sequence[Path],
    differences: Mapping[str, float],
) -> dict[str, Any]:
    """What whoever runs a model must know of it, as plain JSON."""
    return {
        "format": _FORMAT,
        "kind": kind,
        "model": MODEL,
        "weights": files[1].name if len(files) > 1 else None,
        "opset": OPSET,
        "inputs": {port.name: port.to_dict() for port in model.inputs},
        "outputs": {port.name: port.to_dict() for port in model.outputs},
        "threshold": ORIGINAL_SIZE.threshold,
        "comparison": ORIGINAL_SIZE.comparison,
        "head": spec.head,
        "encoder_fingerprints": config["encoder_fingerprints"],
        "difference": dict(differences),
    }


@dataclass(frozen=True)
class _Encoders:
    """The encoders of a run in float32, and what the text encoder was loaded from."""

    image: ImageParts
    text: TextTower
    text_model: PreTrainedModel
    text_family: TextFamily
    text_identity: Mapping[str, Any]
    text_source: str

    def pipeline(self, head: Head) -> Pipeline:
        """Encoders and head as one module."""
        settings = self.text_identity["tokenizer"]
        padding = None
        if self.text_family.padded_to_limit:
            side = settings["padding"]["side"]
            padding = PaddingToLimit(self.text.max_length, settings["padding"]["token"], is_left=side == "left")
        prompts = PromptGraph(self.text_model, self.text_family.pooled, padding)
        return Pipeline(ImageGraph(self.image.tower, self.image.preprocessing), prompts, head)

    @torch.no_grad()
    def example(self, head: Head, num_images: int, num_prompts: int, num_tokens: int, seed: int) -> Example:
        """Noise and prompts, and what is said of them step by step, as a predictor does it.

        The longest prompt has `num_tokens` tokens, or the first of them where that many are none of the tokenizer's.
        """
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(
            0, 256, (num_images, *self.image.preprocessing.input_size, 3), generator=generator, dtype=torch.uint8
        )
        whole = self.text.tokenize(PROMPTS)
        token_ids = [_shortened(whole[row % len(whole)], num_tokens + row % 2) for row in range(num_prompts)]
        image_index = torch.arange(num_prompts) % num_images
        seen = self.image.tower(self.image.preprocessing.normalise(pixels))
        said = self.text(token_ids)
        tokens = said.tokens.masked_fill(~said.mask[..., None], 0)
        inputs = HeadInputs(seen.features, seen.cls, tokens, said.mask, said.pooled, image_index, seen.attention)
        padded, mask = pad_prompts(token_ids)
        given = {"pixels": pixels, "token_ids": padded, "token_mask": mask, "image_index": image_index}
        return Example(given, _said_by(head, inputs))


def _shortened(token_ids: list[int], num_tokens: int) -> list[int]:
    """A prompt of at most so many tokens, which ends as it did."""
    return [*token_ids[: num_tokens - 1], token_ids[-1]] if len(token_ids) > num_tokens else token_ids


def _load_encoders(run_dir: Path, config: dict[str, Any], head: Head) -> _Encoders:
    """The encoders that a run was trained on, for the layers that its head reads, computing in float32."""
    recorded = config["encoders"]["image"]
    images, prompts = load_recorded_encoders(run_dir, config, "cpu")  # which makes sure that they are the same
    height, width = recorded["input_size"]
    image_spec = ImageEncoderSpec(
        images.name,
        layers=head.layers,
        attention=tuple(output for output in recorded["attention"] if output in head.attention),
        input_size=(height, width),
        aspect=recorded["aspect"],
        adapter=images.adapter,
    )
    text_spec = TextEncoderSpec(prompts.name, adapter=prompts.adapter)
    del images, prompts
    loaded: list[tuple[PreTrainedModel, TextFamily]] = []

    def adapt_text(model: PreTrainedModel, family: TextFamily) -> tuple[PreTrainedModel, str | None]:
        adapted = (model, None) if text_spec.adapter is None else lay_adapter(model, text_spec.adapter)
        loaded.append((adapted[0], family))
        return adapted

    tower, identity = load_text_parts(text_spec, adapt_text)
    parts = load_image_parts(
        image_spec,
        lambda model, _: (model, None) if image_spec.adapter is None else lay_adapter(model, image_spec.adapter),
        "float32",
    )
    return _Encoders(parts, tower.eval(), *loaded[0], identity, text_spec.source)
