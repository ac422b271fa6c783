"""A disk that is full is named in one sentence; nothing half is left on it, and the job goes on once there is room."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from cache_schema import atomic
from cache_schema.errors import NoRoomError
from cache_schema.hdf5 import write_hdf5
from cache_schema.layout import ArrayLayout
from cache_schema.store import is_complete, open_store
from cache_schema.verify import verify_store
from tests.cache_schema import write_job
from tests.cache_schema.jobs import assert_equal_to, assert_nothing_half, files_of, leftovers_of, run_job

if TYPE_CHECKING:
    from extract.encoders.tiny import TinyEncoders
    from extract.job import Extraction

PAGE_BYTES = 4096
"""The least that a file takes of a small disk."""


@dataclass(frozen=True)
class SmallDisk:
    """A tmpfs that another process has mounted in a mount namespace of its own; it goes when that process does."""

    keeper: subprocess.Popen[str]
    mount_point: Path

    @property
    def path(self) -> Path:
        """Where it can be reached from here."""
        return Path(f"/proc/{self.keeper.pid}/root{self.mount_point}")

    def mount(self, num_bytes: int) -> None:
        """Put an empty disk in place of the one that is there."""
        self._do(f"mount -t tmpfs -o size={num_bytes} tmpfs '{self.mount_point}'")

    def resize(self, num_bytes: int) -> None:
        self._do(f"mount -o remount,size={num_bytes} '{self.mount_point}'")

    def _do(self, command: str) -> None:
        keeper = self.keeper
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            keeper.stdin.write(f"{command} >&2; echo $?\n")
            keeper.stdin.flush()
        if keeper.stdout.readline() != "0\n":
            keeper.kill()
            pytest.skip(f"no small disk can be mounted here: {keeper.communicate()[1].strip() or 'not allowed'}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk of 64 KiB."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    if shutil.which("unshare") is None:
        pytest.skip("no small disk can be mounted here: there is no `unshare`")
    command = ["unshare", "--map-root-user", "--mount", "sh"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=pipe) as keeper:
        disk = SmallDisk(keeper, mount_point)
        try:
            disk.mount(64 * 1024)
            yield disk
        finally:
            keeper.kill()


def pages_of(files: Mapping[str, bytes]) -> int:
    """What files take of a small disk, in bytes."""
    return sum(-(-len(data) // PAGE_BYTES) * PAGE_BYTES for data in files.values())


def one_sentence(error: str) -> str:
    """The one sentence for a full disk, in what was said on stderr beside progress bars."""
    assert "Traceback" not in error
    assert "fault of ours" not in error
    (sentence,) = (line for line in error.splitlines() if "make room and run the same command again" in line)
    assert sentence.endswith(" to go on.")
    assert sentence.count(". ") == 0
    return sentence


def test_whichever_file_the_disk_is_full_at_nothing_is_half_and_the_job_goes_on(
    disk: SmallDisk, tmp_path: Path
) -> None:
    write_job.fill(tmp_path / "undisturbed", 2)
    expected, num_sizes = files_of(tmp_path / "undisturbed"), 0
    for num_bytes in range(PAGE_BYTES, pages_of(expected), PAGE_BYTES):
        disk.mount(num_bytes)
        with pytest.raises(NoRoomError, match=r"there is no room for .*: 0\.0 MB are free .*; make room"):
            write_job.fill(disk.path, 2)
        num_receipts = assert_nothing_half(disk.path, expected)
        assert not leftovers_of(disk.path)
        with pytest.raises(NoRoomError):
            write_job.fill(disk.path, 2)
        assert assert_nothing_half(disk.path, expected) == num_receipts
        disk.resize(2**20)
        write_job.fill(disk.path, 2)
        assert_equal_to(disk.path, tmp_path / "undisturbed")
        num_sizes += 1
    assert num_sizes > 15


def test_a_write_job_on_a_full_disk_says_so_in_one_sentence_and_goes_on_once_there_is_room(
    disk: SmallDisk, tmp_path: Path
) -> None:
    num_units = 20
    write_job.fill(tmp_path / "undisturbed", num_units)
    expected = files_of(tmp_path / "undisturbed")
    disk.mount(pages_of(expected) // 2)
    code, units, error = run_job(disk.path, num_units)
    assert code == 2
    assert error.count("\n") == 1
    assert "MB are free" in one_sentence(error)
    assert str(disk.path) in error
    assert not leftovers_of(disk.path)
    assert assert_nothing_half(disk.path, expected) == len(units) + 1 > 5
    disk.resize(2**20)
    code, more_units, error = run_job(disk.path, num_units)
    assert (code, error) == (0, "")
    assert len(units) + len(more_units) == num_units
    assert_equal_to(disk.path, tmp_path / "undisturbed")


def test_extraction_on_a_full_disk_says_so_in_one_sentence_and_goes_on_once_there_is_room(
    disk: SmallDisk,
    tmp_path: Path,
    samples_path: Path,
    tiny_encoders: TinyEncoders,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from headstart import cli

    def extract(out: Path) -> int:
        encoders = ["--image-encoder", str(tiny_encoders.image), "--text-encoder", str(tiny_encoders.text)]
        cut = ["--input-size", "64", "96", "--shard-rows", "8", "--device", "cpu"]
        return cli.run(["extract", str(samples_path), "--out", str(out), *encoders, *cut])

    assert extract(tmp_path / "undisturbed") == cli.DONE
    expected = files_of(tmp_path / "undisturbed")
    images = pages_of({key: data for key, data in expected.items() if key.startswith("image_features")})
    done = []
    for num_bytes in (images // 2, images + 8 * PAGE_BYTES):
        disk.mount(num_bytes) if not done else disk.resize(num_bytes)
        capsys.readouterr()
        assert extract(disk.path) == cli.MISTAKE
        sentence = one_sentence(capsys.readouterr().err)
        assert str(disk.path) in sentence
        assert "MB are free" in sentence
        assert not leftovers_of(disk.path)
        # What headers record of paths depends on where a store lies, and is no part of its digest.
        shards = {key: data for key, data in files_of(disk.path).items() if "/c." in key}
        assert {key: expected[key] for key in shards} == shards
        done.append([store.name.split("-")[0] for store in disk.path.glob("*.zarr") if is_complete(store)])
    assert done == [[], ["image_features"]]
    disk.resize(pages_of(expected) + 2**20)
    assert extract(disk.path) == cli.DONE
    for store in sorted((tmp_path / "undisturbed").glob("*.zarr")):
        assert open_store(disk.path / store.name).manifest == open_store(store).manifest
        assert verify_store(disk.path / store.name).is_sound


@pytest.mark.parametrize("command", ["extract {samples} --out {disk}", "prepare scenes {disk}/scenes --make 24"])
def test_what_is_made_before_a_store_says_so_too_when_the_disk_is_full(
    disk: SmallDisk, samples_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny encoders, whose weights a library writes that has no number for an error; the scenes' own files."""
    from headstart import cli

    words = [word.format(samples=samples_path, disk=disk.path) for word in command.split()]
    for num_bytes in (PAGE_BYTES, 16 * PAGE_BYTES):
        disk.mount(num_bytes)
        assert cli.run(words) == cli.MISTAKE
        one_sentence(capsys.readouterr().err)
        assert not leftovers_of(disk.path)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.95])
@pytest.mark.parametrize("container", ["hdf5", "zarr"])
def test_conversion_onto_a_full_disk_says_so_in_one_sentence_and_works_once_there_is_room(
    disk: SmallDisk,
    image_extraction: Extraction,
    container: str,
    share: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from headstart import cli

    store = image_extraction.path
    command = ["cache", "convert", str(store), "--to", container, "--out", str(disk.path)]
    disk.mount(8 * 2**20)
    assert cli.run(command) == cli.DONE
    needed = pages_of(files_of(disk.path)) // PAGE_BYTES
    disk.mount(max(1, int(share * needed)) * PAGE_BYTES)
    capsys.readouterr()
    assert cli.run(command) == cli.MISTAKE
    sentence = one_sentence(capsys.readouterr().err)
    assert str(disk.path) in sentence
    assert "MB are free" in sentence
    assert not leftovers_of(disk.path)
    assert container == "zarr" or not files_of(disk.path)
    disk.resize(8 * 2**20)
    assert cli.run(command) == cli.DONE
    (converted,) = disk.path.iterdir()
    assert open_store(converted).manifest == open_store(store).manifest
    assert verify_store(converted).is_sound


def test_at_whatever_byte_the_disk_is_full_hdf5_neither_crashes_nor_publishes(disk: SmallDisk) -> None:
    """Small enough that HDF5 holds some of it back until it closes the file, too large for it to hold back all."""
    layouts = {
        "features/last": ArrayLayout("features/last", (64, 32, 32), np.dtype(np.float32), 1, 8, tuple("vhc")),
        "cls/last": ArrayLayout("cls/last", (64, 32), np.dtype(np.float32), 8, 8, tuple("vc")),
    }

    def write(path: Path) -> None:
        shards = [
            (layout, shard, np.full((8, *layout.shape[1:]), shard, layout.dtype))
            for layout in layouts.values()
            for shard in range(layout.num_shards)
        ]
        write_hdf5(path, {"zarr.json": bytes(5000)}, layouts, shards)

    disk.mount(2**20)
    write(disk.path / "store.h5")
    num_bytes = (disk.path / "store.h5").stat().st_size
    for size in [*range(PAGE_BYTES, num_bytes, 7 * PAGE_BYTES), num_bytes // PAGE_BYTES * PAGE_BYTES]:
        disk.mount(size)
        with pytest.raises(NoRoomError, match="there is no room"):
            write(disk.path / "store.h5")
        assert not list(disk.path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("fails_at", ["file", "folder"])
def test_a_disk_that_is_found_full_only_when_it_is_to_keep_a_file_is_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fails_at: str
) -> None:
    def fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir() == (fails_at == "folder"):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(NoRoomError, match=r"there is no room for .*file: .* MB are free .*; make room"):
        atomic.write_file(tmp_path / "file", b"data")
    assert files_of(tmp_path) == ({} if fails_at == "file" else {"file": b"data"})
    assert not leftovers_of(tmp_path)


def test_a_job_whose_quota_is_used_up_at_any_fsync_goes_on_when_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_job.fill(tmp_path / "undisturbed", 2)
    expected, failed = files_of(tmp_path / "undisturbed"), 0
    for number in range(1000):
        left = number

        def fsync(descriptor: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        folder = tmp_path / str(number)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            try:
                write_job.fill(folder, 2)
                break
            except NoRoomError:
                failed += 1
        assert_nothing_half(folder, expected)
        assert not leftovers_of(folder)
        write_job.fill(folder, 2)
        assert_equal_to(folder, tmp_path / "undisturbed")
    assert failed > 30
