"""A traced program as an ONNX file, and how far what onnxruntime says of it is from what torch says.

Knows nothing of heads and encoders. onnx and onnxruntime are optional, and imported when a file is written or read.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_schema.errors import UsageError

OPSET = 20
TOLERANCE = 1e-4
"""The greatest difference that a file may have from the module it was made of, in float32."""

MOST_INLINE_BYTES = 2_000_000_000
"""A model whose weights take more has them in a file beside it: a protobuf message ends at 2 GiB."""

Arrays = Mapping[str, NDArray[Any]]


class Example(NamedTuple):
    """What goes into a model by name, and what torch makes of it, by name too."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


class Port(NamedTuple):
    """An input or output of a model: its type as numpy calls it, and its shape, where free sizes have names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "shape": list(self.shape)}


def require_onnx() -> None:
    """Make sure that what writes and runs ONNX files is there.

    Raises:
        UsageError: it is not.
    """
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f'ONNX files need {", ".join(missing)}: run `pip install "headstart[onnx]"`.')


def write_onnx(
    program: torch.export.ExportedProgram,
    path: Path,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    sizes: Mapping[str, Sequence[str]],
    keep_unread: bool = False,
    most_inline_bytes: int = MOST_INLINE_BYTES,
) -> list[Path]:
    """Write a program as an ONNX model of opset 20 that onnx's own checker lets pass.

    Names of machines' folders, which torch notes beside each operation, are left out.

    Args:
        inputs, outputs: their names, in the program's order.
        sizes: what the leading sizes of inputs are called that are free, such as `{"pixels": ["images"]}`.
        keep_unread: whether inputs that nothing is made of stay.
        most_inline_bytes: where weights take more, they lie in `<path>.data`.

    Returns:
        The files: the model, and its weights if they lie apart.

    Raises:
        UsageError: onnx is not installed.
    """
    require_onnx()
    import onnx
    import onnx_ir

    with quiet_torch():
        exported = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=OPSET)
    assert exported is not None
    model = exported.model
    for values, names in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        for value, name in zip(values, names, strict=True):
            value.name = name
    _name_sizes(model, sizes)
    if not keep_unread:
        _drop_unread(model)
    _drop_notes(model)
    weights = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    num_bytes = sum(weight.nbytes for weight in weights)
    data = path.with_name(f"{path.name}.data") if num_bytes > most_inline_bytes else None
    onnx_ir.save(model, path, external_data=None if data is None else data.name)
    onnx.checker.check_model(path, full_check=True)
    return [path] if data is None else [path, data]


def _name_sizes(model: Any, sizes: Mapping[str, Sequence[str]]) -> None:
    """Give torch's numbered symbols the names that their axes have at the inputs."""
    import onnx_ir

    symbols = {
        size.value: name
        for value in model.graph.inputs
        for size, name in zip(value.shape, sizes.get(value.name, ()), strict=False)
    }
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, symbols)) + r")\b")

    def rename(size: Any) -> int | str | None:
        # Sizes of one name are one size to onnxruntime; what has no name must not get one.
        if isinstance(size, int) or size.value is None:
            return size if isinstance(size, int) else None
        return pattern.sub(lambda found: symbols[found[0]], size.value)

    for graph in model.graphs():
        for value in [*graph.inputs, *graph.outputs, *(output for node in graph for output in node.outputs)]:
            if value.shape is not None:
                value.shape = onnx_ir.Shape([rename(size) for size in value.shape])


def _drop_unread(model: Any) -> None:
    """Forget inputs of which nothing is read, or nothing but a free size that one of the others has as well."""
    import onnx_ir

    def is_read(value: Any) -> bool:
        return any(use.node.op_type != "Shape" for use in value.uses())

    free = {
        size.value: (value, axis)
        for value in model.graph.inputs
        if is_read(value)
        for axis, size in enumerate(value.shape)
        if not isinstance(size, int)
    }
    for value in [value for value in model.graph.inputs if not is_read(value)]:
        for use in tuple(value.uses()):
            start, end = (use.node.attributes[name].value for name in ("start", "end"))
            size = value.shape[start]
            if end == start + 1 and not isinstance(size, int) and size.value in free:
                other, axis = free[size.value]
                use.node.replace_input_with(0, other)
                use.node.attributes["start"] = onnx_ir.AttrInt64("start", axis)
                use.node.attributes["end"] = onnx_ir.AttrInt64("end", axis + 1)
        if not value.uses():
            model.graph.inputs.remove(value)


def _drop_notes(model: Any) -> None:
    """Forget where in which source file each operation came from."""
    model.metadata_props.clear()
    for graph in model.graphs():
        graph.metadata_props.clear()
        for value in [*graph.inputs, *graph.outputs, *graph.initializers.values()]:
            value.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()


class OnnxModel:
    """An ONNX file in onnxruntime, on the CPU.

    Raises:
        UsageError: onnxruntime is not installed.
    """

    def __init__(self, path: Path) -> None:
        require_onnx()
        import onnxruntime

        self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    @property
    def inputs(self) -> list[Port]:
        return [_port(value) for value in self._session.get_inputs()]

    @property
    def outputs(self) -> list[Port]:
        return [_port(value) for value in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
        """All outputs by name. Inputs that the model does not read are passed over."""
        given = {port.name: inputs[port.name].numpy() for port in self.inputs}
        names = [port.name for port in self.outputs]
        return dict(zip(names, self._session.run(names, given), strict=True))


def greatest_differences(model: OnnxModel, examples: Sequence[Example]) -> dict[str, float]:
    """By output, the greatest |found - expected| / max(1, |expected|) over some examples.

    Above 1 it is a relative one: float32 has seven digits, however large a logit is. What is infinite or no number on
    one side alone is infinitely far off.
    """
    worst = dict.fromkeys((port.name for port in model.outputs), 0.0)
    for example in examples:
        found = model.run(example.inputs)
        for name in worst:
            worst[name] = max(worst[name], _difference(found[name], example.outputs[name].numpy()))
    return worst


def _difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    if found.shape != expected.shape:
        return float("inf")
    with np.errstate(invalid="ignore"):
        differences = np.abs(found - expected) / np.maximum(1, np.abs(expected))
    alike = (found == expected) | (np.isnan(found) & np.isnan(expected))
    differences = np.where(alike, 0, np.nan_to_num(differences, nan=np.inf, posinf=np.inf))
    return float(differences.max(initial=0))


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Where torch makes an ONNX model: it warns of a call of its own, and logs that torchvision is not there."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        logger.setLevel(before)


def _port(value: Any) -> Port:
    kinds = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(bool)": "bool", "tensor(uint8)": "uint8"}
    return Port(value.name, kinds[value.type], tuple(value.shape))
