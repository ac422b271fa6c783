"""Anybody's own data: a folder with `samples.jsonl`, or with COCO files whose annotations carry texts."""

from __future__ import annotations

from pathlib import Path

from cache_schema.errors import UsageError
from extract.datasets.custom_coco import read_captioned_coco
from extract.datasets.custom_jsonl import SAMPLES, read_samples_jsonl
from extract.datasets.records import Dataset, DatasetReader, Source


def read_custom(source: Source) -> Dataset:
    """Open a folder of somebody's own, in whichever of the two ways it is laid out.

    Raises:
        UsageError: it is in neither way, or in both, so that half of it would be passed over.
        AnnotationError: an annotation file cannot be read at all.
    """
    has_lines = (source.root / SAMPLES).is_file()
    coco = [path for path in sorted(source.root.glob("*.json")) if path.is_file() and not path.name.startswith(".")]
    if has_lines and coco:
        raise UsageError(
            f"{source.root} holds both {SAMPLES} and {coco[0].name}, and only one of them can be what describes its "
            "images. Move the other out of the folder."
        )
    if has_lines:
        return read_samples_jsonl(source)
    if coco:
        return read_captioned_coco(source, coco)
    raise UsageError(f"{source.root} holds neither {SAMPLES} nor a COCO json. {_remedy(source.root)}")


def _remedy(root: Path) -> str:
    """What to do where nothing was found: often the file is there under another name."""
    if others := sorted(path.name for path in root.glob("*.jsonl*")):
        return f"Is it {others[0]}? Rename it to {SAMPLES}."
    return f"Write {SAMPLES}, one line for each object; docs/your-own-data.md has an example to copy."


CUSTOM_READERS: dict[str, DatasetReader] = {
    "custom": DatasetReader(
        read_custom,
        f"{SAMPLES}, or a COCO json with captions or expressions, and the images (docs/your-own-data.md)",
        counted="samples",
        as_shown=True,
    )
}
