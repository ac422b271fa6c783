"""The command that writes a trained head for runtimes that know nothing of this project."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from headstart.command import Command, Json, Wanting


@dataclass(frozen=True)
class Export:
    """Write a run's head as ONNX files, and the whole pipeline: its encoders, the head, the tokenizer.

    Each file is run in onnxruntime and compared with torch before it gets its name; one that is further off than 1e-4
    is not kept, and the exit code is 1. docs/onnx.md says what goes in and out; docs/onnx_predict.py uses it.

    Example: headstart export runs/cross_attention-0123456789ab --out onnx
    """

    run_dir: Positional[Path]
    """Run folder of the head."""
    out: Path
    """Folder to write: head/ (model.onnx, head.json), pipeline/ (model.onnx, pipeline.json, tokenizer.json)."""
    what: Literal["head", "pipeline", "both"] = "both"
    """The head takes features and gives logits, the pipeline takes pixels and token ids."""
    json: Json = False

    def run(self) -> Any:
        from headstart.exporting import export_run

        exported = export_run(self.run_dir, self.out, ("head", "pipeline") if self.what == "both" else (self.what,))
        for part in exported:
            print(part.summary())
        result = {"run_dir": str(self.run_dir), "exported": [part.to_dict() for part in exported]}
        return result if all(part.folder is not None for part in exported) else Wanting(result)


EXPORT_COMMANDS: dict[str, type[Command]] = {"export": Export}
