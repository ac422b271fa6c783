"""The commands that take a trained head elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from cache_schema.errors import UsageError
from headstart.command import Command, Json


@dataclass(frozen=True)
class Publish:
    """Write a run's head with a model card (protocol, scores, fingerprints) to a folder, or push it to the Hub.

    Example: headstart publish runs/film-0123456789ab --out film --push owner/film-scenes
    """

    run_dir: Positional[Path]
    """Run folder of the head."""
    out: Path | None = None
    """Folder to write: config.json, model.safetensors, facts.json, README.md."""
    push: str | None = None
    """Name at the Hugging Face Hub, owner/name; needs a token (`hf auth login`)."""
    private: bool = False
    """Make the repository at the Hub private, if it is made now."""
    json: Json = False

    def run(self) -> Any:
        from heads.hub import HubHead

        if self.out is None and self.push is None:
            raise UsageError("name a folder with --out, a repository with --push owner/name, or both.")
        head = HubHead.of_run(self.run_dir)
        if self.out is not None:
            head.save_pretrained(self.out)
            print(f"wrote {self.out}")
        url = None if self.push is None else str(head.push_to_hub(self.push, private=self.private))
        if url is not None:
            print(f"pushed to {url}")
        return {"out": None if self.out is None else str(self.out), "url": url}


PUBLISH_COMMANDS: dict[str, type[Command]] = {"publish": Publish}
