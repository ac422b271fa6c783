"""What the tests of commands share: a home that may be harmed, a run trained on it, and a shell."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.headstart.shell import Home, Shell

if TYPE_CHECKING:
    from extract.job import Extraction
    from heads.runs import Training


@pytest.fixture
def home(
    workspace: Path,
    samples_path: Path,
    image_extraction: Extraction,
    prompt_extraction: Extraction,
    tmp_path: Path,
) -> Home:
    for name in ("scenes", "encoders", "stores"):
        shutil.copytree(workspace / name, tmp_path / name)
    return Home(tmp_path, image_extraction.path.name, prompt_extraction.path.name, samples_path.name)


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture
def trained(home: Home, run: Training) -> Path:
    """The folder of a run that was trained on the home's three stores."""
    shutil.copytree(run.run_dir, home.folder / "runs" / run.run_dir.name)
    return home.folder / "runs"
