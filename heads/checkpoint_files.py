"""Files of a published checkpoint, wherever it lies."""

from __future__ import annotations

from pathlib import Path

from cache_schema.errors import UsageError


def find_checkpoint_file(
    source: str, name: str, *, example: str, noun: str = "checkpoint", writer: str = "save_pretrained"
) -> Path:
    """A file of a checkpoint: in a folder, or from the hub or its cache.

    Args:
        example: a model at the hub that would do.
        noun, writer: what messages call the checkpoint, and what writes such a folder.

    Raises:
        UsageError: there is no such folder or model, or it lacks the file.
    """
    if Path(source).is_dir():
        path = Path(source) / name
        if not path.is_file():
            raise UsageError(f"{source} holds no {name}: name a folder that {writer} wrote.")
        return path
    if source.count("/") != 1 or source.startswith((".", "~", "/")):
        raise UsageError(f"no {noun} at {source}: there is no such folder.")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, name))
    except (OSError, ValueError) as error:  # which all errors of the hub are, offline ones too
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(
            f"no {noun} {source!r}: there is no such folder, and the hub did not hand out {name} ({reason}). "
            f"Name a folder, or a model such as {example}."
        ) from error
