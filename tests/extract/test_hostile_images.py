"""Whatever lies in an image folder ends up right, or in the ledger with its reason. The files are named one by one."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import EpsImagePlugin

from cache_schema.errors import UsageError
from cache_schema.store import open_store
from extract.image_job import ImageJobConfig, extract_images
from extract.images import UndecodableImageError, decode_image
from extract.job import Extraction
from tests.extract.hostile import NOISE, encode, pipe, segments_of
from tests.extract.hostile_refused import EPS, REFUSED
from tests.extract.hostile_right import RIGHT
from tests.extract.toys import ToyImageEncoder, write_task

FILES = {name: file.data for name, file in (RIGHT | REFUSED).items()}


def outcome(data: bytes) -> NDArray[np.uint8] | str:
    try:
        return decode_image(data)
    except UndecodableImageError as error:
        return str(error)


def same(one: NDArray[np.uint8] | str, other: NDArray[np.uint8] | str) -> bool:
    return type(one) is type(other) and np.array_equal(one, other)


@pytest.mark.parametrize("name", RIGHT)
def test_it_comes_out_right(name: str) -> None:
    file = RIGHT[name]
    decoded = decode_image(file.data)
    assert decoded.dtype == np.uint8
    assert decoded.shape == file.pixels.shape
    assert np.abs(decoded.astype(int) - file.pixels).max() <= file.tolerance


@pytest.mark.parametrize("name", RIGHT)
def test_cut_short_it_is_refused_or_still_the_same(name: str) -> None:
    data = RIGHT[name].data
    whole = decode_image(data)
    for stop in {*range(0, len(data), len(data) // 20 + 1), *range(max(0, len(data) - 20), len(data))}:
        found = outcome(data[:stop])
        assert isinstance(found, str) or same(found, whole), f"{stop} of {len(data)} bytes"


def test_a_jpeg_that_was_cut_and_closed_again_lacks_no_more_than_its_last_cell() -> None:
    data = encode(NOISE, "JPEG", subsampling=0)
    whole, begin = decode_image(data), list(segments_of(data))[-1][2]
    found = [outcome(data[:stop] + b"\xff\xd9") for stop in range(begin, len(data) - 2, 3)]
    assert sum(isinstance(one, str) for one in found) > 0.9 * len(found)
    for one in found:
        if not isinstance(one, str):
            np.testing.assert_array_equal(one[:56], whole[:56])
            np.testing.assert_array_equal(one[:, :56], whole[:, :56])


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_its_reason(name: str) -> None:
    with pytest.raises(UndecodableImageError, match=REFUSED[name].reason):
        decode_image(REFUSED[name].data)


@pytest.mark.parametrize("name", REFUSED)
def test_its_reason_is_one_line_that_is_the_same_every_time(name: str) -> None:
    reason = outcome(REFUSED[name].data)
    assert isinstance(reason, str)
    assert reason == outcome(bytes(bytearray(REFUSED[name].data)))
    assert reason.isprintable()
    assert len(reason) < 160
    assert " at 0x" not in reason


def test_threads_decode_as_one_does_and_leave_the_warnings_of_others_alone() -> None:
    filters = list(warnings.filters)
    alone = {name: outcome(data) for name, data in FILES.items()}
    with ThreadPoolExecutor(4) as pool:
        together = dict(zip(FILES, pool.map(outcome, FILES.values()), strict=True))
    assert [name for name in FILES if not same(alone[name], together[name])] == []
    assert [entry for entry in warnings.filters if entry in filters] == filters
    with pytest.raises(UserWarning, match="still an error"):
        warnings.warn("still an error", stacklevel=1)


DECODE_ALL = """
import resource, sys
from pathlib import Path
from extract.images import UndecodableImageError, decode_image
from tests.extract.hostile import NOISE, encode, pipe, segments_of
from tests.extract.hostile_refused import REFUSED
from tests.extract.hostile_right import RIGHT

pages = int(Path("/proc/self/statm").read_text().split()[0])
room = pages * resource.getpagesize() + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (room, room))
for name, file in (RIGHT | REFUSED).items():
    if not name.startswith("avif"):  # its decoder starts a thread for each core, and those want room of their own
        try:
            decode_image(file.data)
        except UndecodableImageError:
            continue
        except MemoryError:
            print(name)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_file_takes_much_memory_or_makes_python_print() -> None:
    command = [sys.executable, "-W", "always", "-c", DECODE_ALL, str(200 * 2**20)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120, check=True
    )
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if "Warning" in line or ".py" in line] == []


def test_a_postscript_file_starts_no_other_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    for data in (EPS, REFUSED["eps-with-binary-header"].data):
        with pytest.raises(UndecodableImageError, match="not an image file"):
            decode_image(data)
    assert not (tmp_path / "started").exists()


# In a job


@dataclass
class Folder:
    """A task of every file above, and what has become of it. The last image is of another size than it should be."""

    names: list[str]
    image_dir: Path
    config: ImageJobConfig
    extraction: Extraction


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    path = tmp_path_factory.mktemp("hostile")
    sizes = {name: file.pixels.shape[:2] for name, file in RIGHT.items()}
    names = [*FILES, "of-another-size"]
    samples = write_task(
        path, [*FILES.values(), FILES["png"]], sizes=[*(sizes.get(name, (8, 8)) for name in FILES), (7, 9)]
    )
    config = ImageJobConfig(samples, path / "stores", batch_size=16, shard_rows=32)
    return Folder(names, path / "images", config, extract_images(config, ToyImageEncoder()))


def test_a_job_accounts_for_every_file(folder: Folder) -> None:
    store = open_store(folder.extraction.path)
    reasons = {folder.names[failure.row]: failure.reason for failure in store.failures()}
    valid = {name for name, valid in zip(folder.names, store.read("valid").tolist(), strict=True) if valid}
    assert valid == RIGHT.keys()
    assert reasons.keys() == REFUSED.keys() | {"of-another-size"}
    assert folder.extraction.num_failed == len(reasons)
    assert folder.extraction.num_encoded == len(folder.names)
    assert {name: reasons[name] for name in REFUSED} == {name: outcome(file.data) for name, file in REFUSED.items()}
    assert reasons["of-another-size"] == "it is 12 x 20 pixels where its annotations say 7 x 9"


def test_a_jobs_features_are_those_of_the_right_pixels_and_of_nothing_else(folder: Folder) -> None:
    features = open_store(folder.extraction.path).read("features/fine")
    encoder = ToyImageEncoder()
    for row, name in enumerate(folder.names):
        if name not in RIGHT:
            assert not features[row].any(), name
        else:
            pixels = encoder.preprocess(RIGHT[name].pixels)
            expected = encoder.encode(torch.from_numpy(pixels.copy())[None]).features["fine"][0].numpy()
            tolerance = 1e-3 + RIGHT[name].tolerance / 255
            np.testing.assert_allclose(features[row], expected, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("kind", ["pipe", "directory", "loop", "nothing"])
def test_what_took_the_place_of_a_file_stops_the_job_and_never_holds_it(
    folder: Folder, tmp_path: Path, kind: str
) -> None:
    moved = shutil.copytree(folder.image_dir, tmp_path / "images")
    place = moved / "40.img"
    place.unlink()
    with pipe(place) if kind == "pipe" else nullcontext():
        if kind == "directory":
            place.mkdir()
        elif kind == "loop":
            place.symlink_to(place)
        config = replace(folder.config, out=tmp_path / "stores", image_dir=moved)
        with pytest.raises(UsageError, match=r"'40.img' in .* cannot be had: the file cannot be read \("):
            extract_images(config, ToyImageEncoder())
