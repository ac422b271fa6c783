"""A file or folder is there whole or not at all, whatever happens to whoever writes it."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path

import pytest
from upath import UPath

from cache_schema import atomic
from cache_schema.errors import UsageError


def everything_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def interrupted_file(path: Path, error: type[BaseException]) -> None:
    with atomic.staged(path) as temporary:
        temporary.write_bytes(b"half of")
        raise error


def interrupted_folder(path: Path) -> None:
    with atomic.staged(path) as temporary:
        (temporary / "sub").mkdir(parents=True)
        (temporary / "sub" / "file").write_bytes(b"data")
        raise KeyboardInterrupt


def publish_while_another_does(path: Path) -> None:
    with atomic.staged(path) as slow:
        slow.mkdir()
        (slow / "file").write_bytes(b"slow")
        with atomic.staged(path) as fast:
            fast.mkdir()
            (fast / "file").write_bytes(b"fast")


def test_a_file_holds_what_was_written_and_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file"
    atomic.write_file(path, b"first")
    atomic.write_file(path, bytearray(b"second, and longer"))
    assert path.read_bytes() == b"second, and longer"
    atomic.write_file(path, memoryview(b""))
    assert path.read_bytes() == b""
    assert everything_under(tmp_path) == {"deep", "deep/er", "deep/er/file"}


def test_a_view_of_numbers_is_written_as_its_bytes(tmp_path: Path) -> None:
    atomic.write_file(tmp_path / "file", memoryview(bytes(range(16))).cast("I"))
    assert (tmp_path / "file").read_bytes() == bytes(range(16))


def test_a_write_that_the_system_cuts_short_is_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reluctant:
        """Takes three bytes at a time, as a disk that is nearly full may."""

        def __init__(self, path: Path) -> None:
            self._file = open(path, "xb", buffering=0)  # noqa: PTH123, SIM115

        def __enter__(self) -> Reluctant:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def write(self, data: memoryview) -> int:
            return self._file.write(data[:3])

    monkeypatch.setattr(Path, "open", lambda path, *_, **__: Reluctant(path))
    atomic.write_file(tmp_path / "file", b"0123456789")
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_json_is_sorted_readable_and_strict(tmp_path: Path) -> None:
    atomic.write_json(tmp_path / "value.json", {"b": [1], "a": "ü"})
    assert (tmp_path / "value.json").read_text().splitlines()[1].strip() == '"a": "ü",'
    assert json.loads((tmp_path / "value.json").read_bytes()) == {"a": "ü", "b": [1]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.write_json(tmp_path / "nan.json", float("nan"))
    assert everything_under(tmp_path) == {"value.json"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("was_there", [True, False])
def test_a_block_that_raises_changes_nothing(tmp_path: Path, error: type[BaseException], was_there: bool) -> None:
    path = tmp_path / "file"
    if was_there:
        path.write_bytes(b"before")
    before = everything_under(tmp_path)
    with pytest.raises(error):
        interrupted_file(path, error)
    assert everything_under(tmp_path) == before
    assert not was_there or path.read_bytes() == b"before"


def test_a_folder_is_published_with_all_it_holds(tmp_path: Path) -> None:
    with atomic.staged(tmp_path / "out") as temporary:
        (temporary / "sub").mkdir(parents=True)
        (temporary / "sub" / "file").write_bytes(b"data")
        assert not (tmp_path / "out").exists()
    assert everything_under(tmp_path) == {"out", "out/sub", "out/sub/file"}


def test_a_folder_whose_block_raises_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted_folder(tmp_path / "out")
    assert everything_under(tmp_path) == set()


def test_of_two_that_publish_a_folder_the_first_wins_and_the_second_is_told(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(OSError, match="not empty"):
        publish_while_another_does(path)
    assert everything_under(tmp_path) == {"out", "out/file"}
    assert (path / "file").read_bytes() == b"fast"


def test_of_two_that_publish_a_file_the_last_wins_and_both_are_content(tmp_path: Path) -> None:
    with atomic.staged(tmp_path / "file") as slow:
        slow.write_bytes(b"slow")
        atomic.write_file(tmp_path / "file", b"fast")
    assert (tmp_path / "file").read_bytes() == b"slow"
    assert everything_under(tmp_path) == {"file"}


def test_a_file_is_on_disk_before_it_has_its_name_and_its_name_before_the_block_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor: int) -> None:
        fsync(descriptor)
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        steps.append("folder kept" if is_folder else "file kept")

    def watched_replace(path: Path, target: Path) -> Path:
        steps.append("named")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    atomic.write_file(tmp_path / "file", b"data")
    assert steps == ["file kept", "named", "folder kept"]


def test_every_file_of_a_folder_is_on_disk_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: set[int] = set()
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor: int) -> None:
        kept.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def watched_replace(path: Path, target: Path) -> Path:
        assert {entry.stat().st_ino for entry in [path, *path.rglob("*")]} <= kept
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    with atomic.staged(tmp_path / "out") as temporary:
        (temporary / "sub").mkdir(parents=True)
        (temporary / "sub" / "file").write_bytes(b"data")
        (temporary / "file").write_bytes(b"data")


def test_whoever_reads_while_others_write_sees_one_whole_version(tmp_path: Path) -> None:
    path, size = tmp_path / "file", 50_000
    atomic.write_file(path, bytes(size))

    def write(version: int) -> None:
        for _ in range(20):
            atomic.write_file(path, bytes([version]) * size)

    writers = [threading.Thread(target=write, args=(version,)) for version in (1, 2)]
    for writer in writers:
        writer.start()
    seen = []
    while any(writer.is_alive() for writer in writers):
        seen.append(path.read_bytes())
    for writer in writers:
        writer.join()
    assert all(len(data) == size and len(set(data)) == 1 for data in seen)
    assert everything_under(tmp_path) == {"file"}


def test_temporary_names_are_hidden_beside_the_file_and_never_twice_the_same(tmp_path: Path) -> None:
    names = {atomic.temporary_name(tmp_path / "c.0") for _ in range(100)}
    assert len(names) == 100
    assert {name.parent for name in names} == {tmp_path}
    assert all(name.name.startswith(".c.0.") and name.name.endswith(atomic.TEMPORARY_SUFFIX) for name in names)


def test_removing_takes_files_and_whole_folders_and_does_not_mind_what_is_gone(tmp_path: Path) -> None:
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "folder" / "sub" / "file").write_bytes(b"data")
    (tmp_path / "file").write_bytes(b"data")
    for name in ("folder", "file", "nothing"):
        atomic.remove(tmp_path / name)
    assert everything_under(tmp_path) == set()


def test_removing_a_folder_never_reaches_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_bytes(b"data")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "precious")
    atomic.remove(tmp_path / "folder")
    assert everything_under(tmp_path) == {"precious", "precious/file"}


# Remote files


def test_a_path_with_a_scheme_is_remote_and_any_other_is_of_this_machine(tmp_path: Path) -> None:
    assert atomic.parse_path(str(tmp_path)) == tmp_path
    assert isinstance(atomic.parse_path("features/a.zarr"), Path)
    assert atomic.parse_path(tmp_path) is tmp_path
    remote = atomic.parse_path("memory://bucket/a.zarr")
    assert isinstance(remote, UPath)
    assert not isinstance(remote, Path)
    assert atomic.parse_path(remote) is remote
    assert str(remote / "b").endswith("bucket/a.zarr/b")


@pytest.mark.parametrize("text", ["nosuchscheme://bucket/a.zarr", "s4://a"])
def test_a_scheme_that_nobody_speaks_is_the_users_mistake(text: str) -> None:
    with pytest.raises(UsageError, match="cannot be reached"):
        atomic.parse_path(text)


def test_a_remote_file_is_written_under_its_own_name_at_once(remote: UPath) -> None:
    atomic.write_file(remote / "deep" / "file", memoryview(bytes(range(16))).cast("I"))
    atomic.write_file(remote / "deep" / "file", bytearray(b"second"))
    atomic.write_json(remote / "value.json", {"b": [1], "a": "ü"})
    assert (remote / "deep" / "file").read_bytes() == b"second"
    assert json.loads((remote / "value.json").read_bytes()) == {"a": "ü", "b": [1]}
    root = remote.path.strip("/") + "/"
    assert {name.strip("/").removeprefix(root) for name in remote.fs.find(remote.path)} == {"deep/file", "value.json"}


def test_a_remote_file_is_removed(remote: UPath) -> None:
    atomic.write_file(remote / "file", b"data")
    atomic.remove(remote / "file")
    atomic.remove(remote / "file")
    assert not remote.fs.find(remote.path)
