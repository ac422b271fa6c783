"""Heads at the Hugging Face Hub: weights, what it takes to build them again, and a card with their scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from cache_schema.errors import UsageError
from heads.checkpoint import CONFIG, WEIGHTS, HeadSpec, load_head, save_head
from heads.inputs import Head
from heads.runs import read_run_config

CARD = "README.md"
_TAGS = ["image-segmentation", "referring-image-segmentation", "headstart"]


class HubHead(ModelHubMixin):
    """A head with `save_pretrained`, `from_pretrained` and `push_to_hub`; `.head` is the module.

    The files are those of a run's `best/`: safetensors and a config.json, nothing that runs. The encoders are not among
    them; the card names them by their fingerprints.

    Args:
        facts: what the card says: encoders, stores, protocol and scores, as `HubHead.of_run` gathers them.
    """

    def __init__(self, spec: HeadSpec, head: Head, facts: Mapping[str, Any] | None = None) -> None:
        self.spec = spec
        self.head = head
        self.facts = dict(facts or {})

    @classmethod
    def of_run(cls, run_dir: Path, checkpoint: str = "best") -> HubHead:
        """The head of a run, with its scores if its folder holds those of this run on the stores it was trained on.

        Raises:
            UsageError: the folder is no run folder.
        """
        config = read_run_config(run_dir)
        spec, head = load_head(run_dir / checkpoint)
        found = _own_results(run_dir, config["stores"])
        facts = {
            "encoder_fingerprints": config["encoder_fingerprints"],
            "stores": config["stores"],
            "recipe": config["config"],
            "protocol": found.get("protocol"),
            "metrics": found.get("metrics"),
            "baselines": found.get("baselines"),
        }
        return cls(spec, head, facts)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> HubHead:
        """A head from a folder, or by its name at the hub; `options` are those of huggingface_hub's mixin.

        Raises:
            UsageError: there is none, or it is no head.
        """
        try:
            found: HubHead = super().from_pretrained(pretrained_model_name_or_path, **options)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            raise UsageError(
                f"no head at {pretrained_model_name_or_path}: it is no folder, and the hub does not give it ({error}). "
                "Name another."
            ) from error
        return found

    def generate_model_card(self, *_: Any, **__: Any) -> ModelCard:
        """What the head is, what it needs, and how it was scored."""
        data = ModelCardData(library_name="headstart", pipeline_tag="image-segmentation", tags=_TAGS)
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{self._describe()}")

    def _save_pretrained(self, save_directory: Path) -> None:
        save_head(save_directory, self.spec, self.head)
        (save_directory / "facts.json").write_text(json.dumps(self.facts, indent=1, sort_keys=True))

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **_: Any,
    ) -> HubHead:
        folder = Path(model_id)
        if not folder.is_dir():
            paths = [
                hf_hub_download(
                    model_id,
                    name,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
                for name in (CONFIG, WEIGHTS, "facts.json")
            ]
            folder = Path(paths[0]).parent
        spec, head = load_head(folder)
        facts = folder / "facts.json"
        return cls(spec, head, json.loads(facts.read_bytes()) if facts.is_file() else None)

    def _describe(self) -> str:
        num_parameters = sum(parameter.numel() for parameter in self.head.parameters())
        parts = [
            f"# {self.spec.head}: a head for text-prompted segmentation\n",
            f"{num_parameters:,} parameters, on cached features of frozen encoders. It reads the layers "
            f"{', '.join(self.head.layers)}.\n",
            "```python\nfrom heads.hub import HubHead\n\nhead = HubHead.from_pretrained(...).head\n```\n",
        ]
        if self.facts.get("encoder_fingerprints"):
            lines = [f"- {side}: `{digest}`" for side, digest in sorted(self.facts["encoder_fingerprints"].items())]
            parts.append("## Encoders it was trained on, by fingerprint\n\n" + "\n".join(lines) + "\n")
        if self.facts.get("stores"):
            lines = [f"- {kind}: `{digest}`" for kind, digest in sorted(self.facts["stores"].items())]
            parts.append("## Stores\n\n" + "\n".join(lines) + "\n")
        if self.facts.get("metrics"):
            parts.append(self._describe_scores())
        return "\n".join(parts)

    def _describe_scores(self) -> str:
        protocol, metrics, baselines = self.facts["protocol"], self.facts["metrics"], self.facts["baselines"] or {}
        said = ", ".join(f"{key} {value}" for key, value in sorted(protocol.items()))
        columns = [name for name, value in metrics.items() if isinstance(value, float)]
        rows = {self.spec.head: metrics, **{f"({name})": values for name, values in baselines.items()}}
        table = [f"| | {' | '.join(columns)} |", f"|---{'|---' * len(columns)}|"]
        table += [
            f"| {name} | {' | '.join(_number(values.get(column)) for column in columns)} |"
            for name, values in rows.items()
        ]
        return f"## Scores\n\nProtocol: {said}.\n\n" + "\n".join(table) + "\n"


def _own_results(run_dir: Path, stores: Mapping[str, str]) -> dict[str, Any]:
    """Protocol, baselines and metrics of this run on its own stores; nothing, where the folder holds others.

    The run is known by its folder's name, since it may have been moved; by its path, where several have that name.
    """
    path = run_dir / "results.json"
    results: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    scored_on = {kind: digest for kind, digest in results.get("provenance", {}).items() if kind != "split"}
    if scored_on != stores:
        return {}
    folder = run_dir.resolve()
    entries = [entry for entry in results["runs"] if Path(entry["run_dir"]).resolve().name == folder.name]
    if len(entries) > 1:
        entries = [entry for entry in entries if Path(entry["run_dir"]).resolve() == folder][:1]
    return {**results, "metrics": entries[0]["metrics"]} if entries else {}


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "-"
