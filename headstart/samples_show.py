"""The commands that look into samples stores: `headstart samples ...`."""

from __future__ import annotations

import hashlib
import os.path
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from cache_schema.atomic import parse_path, write_file
from cache_schema.errors import UsageError
from headstart.command import Command, Json, Place
from headstart.prepare_commands import printable_line

_MAX_NAME_LETTERS = 32


@dataclass(frozen=True)
class SamplesShow:
    """Look at a task before training on it: statistics, and a PNG of samples with their truth and their prompts.

    Example: headstart samples show stores --split val --num 12
    """

    store: Positional[Place]
    """A samples store, or a folder that holds just one; s3://bucket/folder and the like work too."""
    out: Path = Path("sheets")
    """Folder the picture is written to."""
    num: int = 24
    """How many samples to draw; 0 for no picture."""
    split: str | None = None
    """Look at this split alone."""
    seed: int = 0
    """Which samples are drawn."""
    image_dir: Path | None = None
    """Where the images lie, if they were moved since the samples store was written."""
    json: Json = False

    def run(self) -> Any:
        if not 0 <= self.num <= 1000:
            raise UsageError(f"--num is {self.num}: give a whole number from 0 to 1000.")
        if self.seed < 0:
            raise UsageError(f"--seed is {self.seed}: give a whole number of at least 0.")
        if self.image_dir is not None and not os.path.isdir(self.image_dir):  # noqa: PTH112  also for names too long
            raise UsageError(f"no folder at {self.image_dir}; name the one that holds the images with --image-dir.")
        if self.num and self.out.exists() and not self.out.is_dir():
            raise UsageError(f"--out {self.out} is a file; name a folder.")
        import numpy as np

        from cache_schema.samples import open_samples
        from evaluate.contact_sheet import draw_sheet
        from evaluate.pictures import encode_png
        from headstart import samples_info
        from headstart.stores import find_samples

        store = open_samples(find_samples(parse_path(self.store)))
        samples = store.samples
        rows = np.arange(len(samples)) if self.split is None else samples.rows_of_split(self.split)
        statistics = samples_info.samples_statistics(samples, rows)
        print(printable_line(f"{store.dataset}: {store.path}") + "\n")
        print(samples_info.statistics_text(statistics))
        shown, sheet, remarks = samples_info.draw_rows(rows, self.num, self.seed).tolist(), None, list[str]()
        if shown:
            image_dir = self.image_dir or store.image_dir
            cards = [samples_info.make_card(store, row, image_dir) for row in shown]
            of_split = "" if self.split is None else f" of split {self.split}"
            title = f"{store.dataset}: {len(shown)} of {len(rows)} samples{of_split}"
            sheet = self.out / f"{store.path.stem}{'' if self.split is None else f'-{_file_name(self.split)}'}.png"
            write_file(sheet, encode_png(draw_sheet(title, cards)))
            remarks = samples_info.sheet_remarks(cards, image_dir)
            print("\n" + printable_line(f"picture of {len(shown)} samples: {sheet}"))
            for remark in remarks:
                print(printable_line(f"note: {remark}"))
        return {
            "path": str(store.path),
            "dataset": store.dataset,
            "split": self.split,
            **statistics.to_dict(),
            "sheet": None if sheet is None else str(sheet),
            "shown": [samples.ids[row] for row in shown],
            "remarks": remarks,
        }


def _file_name(split: str) -> str:
    """A split's name as a part of a file name; of a long one the beginning, and a digest that tells it from others."""
    name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in split)
    if len(name) <= _MAX_NAME_LETTERS:
        return name
    return f"{name[:_MAX_NAME_LETTERS]}-{hashlib.sha256(split.encode()).hexdigest()[:12]}"


SAMPLES_COMMANDS: dict[str, type[Command]] = {"show": SamplesShow}
