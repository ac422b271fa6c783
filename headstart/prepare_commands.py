"""The commands that turn datasets into samples stores, list the datasets there are, and look for leakage."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from cache_schema.atomic import parse_path, write_file
from cache_schema.errors import UsageError, unknown_name
from headstart.command import Command, Json, Place, Wanting

if TYPE_CHECKING:  # slow to import
    from extract.datasets.faults import FaultReport
    from extract.prepare import Counts, PrepareConfig

DATASET_NAMES = (
    *("scenes", "custom", "refcoco", "refcoco+", "refcocog-umd", "refcocog-google", "grefcoco"),
    *(
        "refcoco-m",
        "phrasecut",
        "coco-captions-2014",
        "coco-captions-2017",
        "coco-instances-2014",
        "coco-instances-2017",
    ),
    *("voc20", "voc21", "context59", "context60", "ade20k", "coco-stuff", "coco-object", "cityscapes"),
)
"""The names in extract.datasets.DATASETS, which is slow to import where only --help is asked for."""

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_URL = re.compile(r"\w{2,}:/")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""All that steers a terminal but tabs and ends of lines, and what makes letters run the other way."""


@dataclass(frozen=True)
class Prepare:
    """Read a dataset and write its samples store: images, prompts, targets, splits and tags.

    Every item and every image file is checked. A fault anywhere stops everything, unless --skip-bad leaves those items
    out; --check names all of them and writes nothing. With --check-leakage nothing is prepared: samples stores that are
    there already are compared.

    Example: headstart prepare refcoco /data/refcoco --out stores

    Example: headstart prepare --check-leakage stores/samples-0123456789ab.zarr other_stores
    """

    dataset: Annotated[
        Positional[str | None],
        arg(metavar="DATASET", help=f"Which: {', '.join(DATASET_NAMES)}. `headstart datasets` says what each holds."),
    ] = None
    root: Annotated[Positional[Path | None], arg(metavar="ROOT")] = None
    """Folder of the dataset, as it is published."""
    out: Place = "stores"
    """Folder the samples store is written to; s3://bucket/folder and the like work too."""
    image_dir: Annotated[Path | None, arg(metavar="PATH")] = None
    """Where the images lie, if not where the dataset has them."""
    unpack: Annotated[Path | None, arg(metavar="PATH")] = None
    """Folder for images that a dataset carries inside other files; by default images/ in the dataset's folder."""
    strict: bool = False
    """Write nothing if anything has a fault. This is the default, and may be said."""
    skip_bad: bool = False
    """Leave items with a fault out, and say how many there were."""
    check: bool = False
    """Read and check everything, write nothing, and print every fault. Exit code 1 if there is one."""
    faults: Annotated[Path | None, arg(metavar="FILE")] = None
    """A file for all faults: one JSON object a line with source, where and what."""
    make: Annotated[int, arg(metavar="NUM")] = 0
    """For scenes: first make a dataset of this many images in the folder."""
    check_leakage: Annotated[tuple[str, ...] | None, arg(metavar="STORE [STORE ...]")] = None
    """Samples stores, or folders that hold just one: tell which images and prompts their splits share. Exit code 1 if
    different splits share an image."""
    json: Json = False

    def run(self) -> Any:
        if self.check_leakage is not None:
            return self._compare(self.check_leakage)
        dataset, root = self._named()
        if self.strict and self.skip_bad:
            raise UsageError("--strict and --skip-bad exclude each other; leave one out.")
        if self.check and self.skip_bad:
            raise UsageError("--check writes nothing, so nothing is skipped; leave --check or --skip-bad out.")
        if self.faults is not None:
            _require_file_name(self.faults)
        from extract.datasets.scenes import ScenesConfig, make_scenes
        from extract.prepare import PrepareConfig

        config = PrepareConfig(dataset, root, parse_path(self.out), self.image_dir, self.unpack, self.skip_bad)
        if self.make:
            if dataset != "scenes":
                raise UsageError(f"only scenes can be made, not {dataset}; leave --make out.")
            if self.check:
                raise UsageError("--check writes nothing, so nothing is made; leave --check or --make out.")
            make_scenes(ScenesConfig(root, num_images=self.make))
        return self._check(config) if self.check else self._prepare(config)

    def _named(self) -> tuple[str, Path]:
        if self.dataset is None:
            raise UsageError(
                "name a dataset and its folder, as in `headstart prepare refcoco /data/refcoco`; `headstart datasets` "
                "lists the datasets."
            )
        if self.dataset not in DATASET_NAMES:
            raise unknown_name("dataset", self.dataset, DATASET_NAMES)
        if self.root is None:
            raise UsageError(
                f"name the folder of {self.dataset}, as in `headstart prepare {self.dataset} FOLDER`; `headstart "
                "datasets` says what it holds."
            )
        if _URL.match(str(self.root)):
            url = str(self.root).replace(":/", "://", 1)
            raise UsageError(f"{url} is remote, and datasets are read from a local folder; fetch it first.")
        if self.root.is_file():
            raise UsageError(f"{self.root} is a file; name the folder that holds it.")
        return self.dataset, self.root

    def _prepare(self, config: PrepareConfig) -> Any:
        from extract.datasets.faults import FaultReport
        from extract.prepare import prepare

        faults = FaultReport()
        try:
            prepared = prepare(config, faults)
        except BaseException:
            if self.faults is not None and faults.num_faults:  # none is no news of files that could not be read
                write_faults(self.faults, faults)
            raise
        if self.faults is not None:
            write_faults(self.faults, faults)
        print(printable(prepared.summary()))
        return prepared.to_dict()

    def _check(self, config: PrepareConfig) -> Any:
        from extract.prepare import check

        counts, report = check(config)
        if self.faults is not None:
            write_faults(self.faults, report)
        print(printable_line(f"{config.dataset} at {config.root}: {counts}"))
        if counts.num_samples:
            print(counts_table(counts))
        for line in fault_lines(report):
            print(line)
        result = {
            "dataset": config.dataset,
            **asdict(counts),
            "differences": counts.differences,
            "num_faults": report.num_faults,
            "faults": [fault.to_dict() for fault in report.faults],
        }
        if not counts.num_samples:
            print("NO SAMPLE is left: there would be nothing to write.")
        return result if counts.num_samples and not report.num_faults else Wanting(result)

    def _compare(self, places: Sequence[str]) -> Any:
        if not places:
            raise UsageError(
                "--check-leakage is given no store; name a samples store to compare its splits, or several."
            )
        if self.dataset is not None or self.check or self.make:
            raise UsageError("--check-leakage compares samples stores and prepares nothing; leave the rest out.")
        from cache_schema.samples import open_samples
        from extract.leakage import check_leakage
        from headstart.stores import find_samples

        paths = [find_samples(parse_path(place)) for place in places]
        leakage = check_leakage([open_samples(path) for path in paths])
        print(printable(leakage.table()))
        result = leakage.to_dict()
        return Wanting(result) if leakage.leaks else result


@dataclass(frozen=True)
class Datasets:
    """The datasets that `headstart prepare` reads: their names, what their folders hold, and their published counts."""

    json: Json = False

    def run(self) -> Any:
        described = describe_datasets()
        print(datasets_table(described["datasets"]))
        return described


def _require_file_name(path: Path) -> None:
    if path.is_dir():
        raise UsageError(f"--faults {path} is a folder; name a file in it.")
    if any(parent.exists() and not parent.is_dir() for parent in path.parents):
        raise UsageError(f"--faults {path} lies below a file, not a folder; name another place.")


def describe_datasets() -> dict[str, Any]:
    """Every dataset that can be prepared by name."""
    from extract.datasets import DATASETS

    return {
        "datasets": [
            {
                "name": name,
                "holds": reader.layout,
                "counted": reader.counted if reader.published else None,
                "published": dict(reader.published) or None,
            }
            for name, reader in DATASETS.items()
        ]
    }


def datasets_table(described: Sequence[Mapping[str, Any]]) -> str:
    """What `describe_datasets` gave, for people, as wide as the terminal."""
    margin = max(len(dataset["name"]) for dataset in described) + 2
    width = max(60, min(120, shutil.get_terminal_size().columns)) - margin
    lines = [f"{'dataset':{margin}}what its folder holds, and how much of it was published", ""]
    for dataset in described:
        texts = [dataset["holds"]]
        if dataset["published"] is not None:
            counts = ", ".join(f"{split} {number:,}" for split, number in dataset["published"].items())
            texts.append(f"{dataset['counted']}: {counts}")
        rows = [row for text in texts for row in textwrap.wrap(text, width)]
        lines += [
            f"{head:{margin}}{row}" for head, row in zip([dataset["name"], *[""] * len(rows)], rows, strict=False)
        ]
    lines += ["", "Example: headstart prepare refcoco /data/refcoco --check"]
    return "\n".join(lines)


def counts_table(counts: Counts) -> str:
    """Counts by split, with the published ones beside them where there are any."""
    counted, published = counts.counted, counts.published or {}
    columns = ["samples"] + ([] if counted == "samples" else [counted]) + (["published"] if published else [])
    lines = ["".join([f"  {'split':12}", *(f"{column:>12}" for column in columns)])]
    for split in dict.fromkeys([*published, *counts.num_samples_of_split]):
        cells = [str(counts.num_samples_of_split.get(split, 0))]
        if counted != "samples":
            cells.append(str(counts.num_counted_of_split.get(split, 0)))
        if published:
            cells.append(str(published.get(split, "-")))
        lines.append("".join([f"  {printable_line(split):12}", *(f"{cell:>12}" for cell in cells)]))
    if counts.differences:
        lines.append(printable_line(f"NOT AS PUBLISHED: {'; '.join(counts.differences)}"))
    return "\n".join(lines)


def fault_lines(report: FaultReport) -> list[str]:
    """Every fault on a line of its own, with its file and its place."""
    if not report.num_faults:
        return ["no fault"]
    lines = [printable_line(f"{fault.source}: {fault}") for fault in report.faults]
    if hidden := report.num_faults - len(report.faults):
        lines.append(f"and {hidden} more")
    return [*lines, f"{report.num_faults} fault{'' if report.num_faults == 1 else 's'}"]


def write_faults(path: Path, report: FaultReport) -> None:
    """Every fault as a JSON object on a line; an empty file where there is none."""
    lines = [json.dumps(fault.to_dict()) + "\n" for fault in report.faults]
    write_file(path, "".join(lines).encode())


def printable(text: str) -> str:
    """A text that nobody vouches for, with what would steer a terminal or could not be encoded replaced."""
    return _CONTROL.sub(_REPLACEMENT, text).encode("utf-8", "replace").decode()


def printable_line(text: str) -> str:
    """The same for a text that is to be one line, or a part of one: what ends a line is replaced too."""
    return printable(text.replace("\n", _REPLACEMENT))


PREPARE_COMMANDS: dict[str, type[Command]] = {"prepare": Prepare, "datasets": Datasets}
