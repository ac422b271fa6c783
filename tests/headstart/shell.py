"""A home for stores that a test may harm, and a shell to run commands in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import pytest

from cache_schema.store import open_store
from headstart import cli

NUM_VIEWS, SHARD_ROWS = 24, 8


@dataclass(frozen=True)
class Home:
    """A dataset, its encoders and one store of each kind, which a test may harm."""

    folder: Path
    images_name: str
    prompts_name: str
    samples_name: str

    @property
    def stores(self) -> Path:
        return self.folder / "stores"

    @property
    def images(self) -> Path:
        return self.stores / self.images_name

    @property
    def prompts(self) -> Path:
        return self.stores / self.prompts_name

    @property
    def samples(self) -> Path:
        return self.stores / self.samples_name


@dataclass(frozen=True)
class Printed:
    """What a command left on stdout and stderr."""

    out: str
    err: str


@dataclass(frozen=True)
class Shell:
    """Runs commands; `json` gives their exit code and the one JSON object on their stdout."""

    capsys: pytest.CaptureFixture[str]

    def run(self, *arguments: object) -> tuple[int, str]:
        """Exit code and what was printed for people."""
        code, captured = self._run(arguments)
        return code, captured.out

    def json(self, *arguments: object) -> tuple[int, Any]:
        code, captured = self._run((*arguments, "--json"))
        assert code in (cli.DONE, cli.WANTING), captured.err
        return code, json.loads(captured.out)

    def mistake(self, *arguments: object) -> str:
        """The one sentence for a mistake of the user's."""
        code, captured = self._run(arguments)
        lines = [line for line in captured.err.splitlines() if line.startswith("headstart: ")]
        assert code == cli.MISTAKE, captured.err
        assert len(lines) == 1
        assert "Traceback" not in captured.err
        return lines[0]

    def _run(self, arguments: Sequence[object]) -> tuple[int, Printed]:
        self.capsys.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        return code, Printed(*self.capsys.readouterr())


def extract(shell: Shell, home: Home, out: Path, *arguments: object) -> tuple[int, Any]:
    """`headstart extract` with the encoders at hand, at a small size unless told otherwise."""
    encoders = ("--image-encoder", home.folder / "encoders/tiny-dinov2-reg")
    encoders += ("--text-encoder", home.folder / "encoders/tiny-clip-text")
    size = () if "--input-size" in arguments else ("--input-size", 32, 32)
    return shell.json("extract", home.samples, "--out", out, *encoders, *size, *arguments)


def packed_home(home: Home, shell: Shell) -> Path:
    """A folder with the home's three stores, each in one file."""
    out = home.folder / "files"
    for path in (home.images, home.prompts, home.samples):
        assert shell.run("cache", "convert", path, "--to", "hdf5", "--out", out)[0] == cli.DONE
    return out


def flip(path: Path, place: int = 7) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 32
    path.write_bytes(data)


def flip_in_hdf5(path: Path, array: str) -> None:
    """Flip a bit of an array's first row."""
    with h5py.File(path) as file:
        offset = file[array].id.get_offset()
    flip(path, offset)


def digest_of(path: Path) -> str:
    store = open_store(path)
    store.close()
    return store.manifest.digest


def named(result: dict[str, Any]) -> dict[str, list[str]]:
    """The damaged files that a verification names, by store."""
    return {Path(store["path"]).name: [damage["key"] for damage in store["damages"]] for store in result["stores"]}
