"""The command that serves trained heads on a web page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from headstart.command import Command, Json


@dataclass(frozen=True)
class Serve:
    """Try trained heads on a web page of this machine: drop a picture, type prompts, see masks and scores.

    Runs until Ctrl-C. Needs Gradio: pip install "headstart[serve]". docs/serve.md says what the page shows and what it
    keeps out.

    Example: headstart serve runs/cross_attention-0123456789ab runs/two_way-0123456789ab
    """

    runs: Positional[tuple[Path, ...]]
    """Run folders of the heads to choose from, as `headstart train` printed them."""
    port: int = 7860
    """Where to listen; 0 takes any port that is free and says which."""
    host: str = "127.0.0.1"
    """Which address of this machine to listen at. By default nobody else can reach the page; there is no password."""
    max_file_mb: float = 20
    """The largest picture file that may be dropped, in megabytes."""
    device: str = "auto"
    """Where encoders and heads run."""
    json: Json = False

    def run(self) -> Any:
        from headstart.serve import serve

        return serve(self.runs, host=self.host, port=self.port, max_file_mb=self.max_file_mb, device=self.device)


SERVE_COMMANDS: dict[str, type[Command]] = {"serve": Serve}
