"""What `headstart predict` is asked: pictures and prompts, as arguments, folders and files name them."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cache_schema.errors import UsageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
"""What is taken for a picture in a folder. A file that is named itself may be called anything."""

PAIRS_COLUMNS = ("image", "prompt")

_MAX_STEM_BYTES = 100


@dataclass(frozen=True)
class Picture:
    """A picture and what to look for in it.

    Args:
        path: its file, as it was named.
        stem: what the names of files that are written for it begin with: one for each picture, relative,
            and in no folder but those below the one that was named.
    """

    path: Path
    stem: str
    prompts: tuple[str, ...]


class Names:
    """Names that are not used twice, not even where upper and lower case are one."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def take(self, name: str) -> str:
        """The name, or where it is taken the first of name-2, name-3, ... that is not."""
        number, free = 1, name
        while free.casefold() in self._taken:
            number += 1
            free = f"{name}-{number}"
        self._taken.add(free.casefold())
        return free


def find_pictures(
    named: Sequence[str], prompts: Sequence[str] = (), prompts_file: Path | None = None, out: Path | None = None
) -> list[Picture]:
    """Pictures with their prompts, each picture once, in the order in which they are named; folders are sorted.

    Args:
        named: a picture or folder and prompts; where `prompts` or a `prompts_file` say what to look for, pictures and
            folders alone.
        prompts_file: prompts, one to a line; or if its name ends in .csv, pairs of `image` and `prompt`, whose images
            lie under the one folder that is `named`, or under the file's own.
        out: a folder in which no pictures are looked for.

    Raises:
        UsageError: there is no prompt or no picture, or what was named cannot be used.
    """
    if prompts_file is not None and prompts_file.suffix.lower() == ".csv":
        if prompts:
            raise UsageError(f"{prompts_file} says what to look for in each picture; leave --prompts out.")
        if len(named) > 1:
            raise UsageError(f"name one folder under which the images of {prompts_file} lie, or none.")
        return _pictures_of_pairs(prompts_file, Path(named[0]) if named else prompts_file.parent)
    if prompts or prompts_file is not None:
        wanted = [*prompts, *([] if prompts_file is None else _read_lines(prompts_file))]
    else:
        named, wanted = named[:1], list(named[1:])
        _refuse_paths(wanted)
    if not wanted or not all(prompt.strip() for prompt in wanted):
        raise UsageError('there is no prompt, or an empty one; say what to segment, for example "the red circle".')
    for prompt in wanted:
        if not prompt.isprintable() and prompt.encode("utf-8", "replace").decode() != prompt:
            raise UsageError(f"the prompt {prompt!r} is not UTF-8 text; write it as such.")
    if not named:
        raise UsageError("there is no picture; name image files, or folders of them.")
    names, found = Names(), dict[Path, Picture]()
    for place in map(Path, named):
        for path, stem in _files_of(place, out, prefixed=len(named) > 1):
            if path.absolute() not in found:
                found[path.absolute()] = Picture(path, names.take(stem), tuple(wanted))
    return list(found.values())


def _refuse_paths(prompts: Sequence[str]) -> None:
    """A second picture, as a shell makes them of *.jpg, must not pass for a prompt."""
    for prompt in prompts:
        if _is_there(Path(prompt)) and (Path(prompt).is_file() or os.sep in prompt):
            raise UsageError(
                f"{prompt} stands where a prompt is expected, and is a file or folder; with several pictures, give the "
                'prompts as --prompts "the red circle".'
            )


def _files_of(place: Path, out: Path | None, *, prefixed: bool) -> Iterator[tuple[Path, str]]:
    """A file or the pictures of a folder, and the stem of each."""
    if not _is_there(place):
        raise UsageError(
            f"{place} cannot be used: there is no such file or folder. Name an image file such as a JPEG or a PNG, or "
            "a folder of them."
        )
    if not place.is_dir():
        yield place, _stem(PurePosixPath(place.name))
        return
    paths = sorted(_walk(place, None if out is None else out.resolve()))
    if not paths:
        raise UsageError(f"{place} holds no pictures ({' '.join(IMAGE_SUFFIXES)}); name another folder.")
    prefix = place.resolve().name if prefixed else ""
    for path in paths:
        yield path, _stem(PurePosixPath(prefix, path.relative_to(place).as_posix()))


def _walk(folder: Path, out: Path | None) -> Iterator[Path]:
    """Pictures in a folder and below it. What is hidden is left out, and links to folders are not followed."""
    for parent, folders, files in os.walk(folder, onerror=_raise):
        here = Path(parent)
        if here.resolve() == out:
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        shown = (name for name in files if not name.startswith("."))
        yield from (here / name for name in shown if Path(name).suffix.lower() in IMAGE_SUFFIXES)


def _raise(error: OSError) -> None:
    raise error


def _pictures_of_pairs(path: Path, folder: Path) -> list[Picture]:
    """Pairs by picture: those of one picture stand together, where its first stood."""
    prompts_of: dict[PurePosixPath, list[str]] = {}
    with_header = csv.DictReader(io.StringIO(_read(path), newline=""), strict=True)
    try:
        if not set(PAIRS_COLUMNS) <= set(with_header.fieldnames or ()):
            raise UsageError(f"{path} must begin with a line that names its columns, {' and '.join(PAIRS_COLUMNS)}.")
        for row in with_header:
            image, prompt = ((row[column] or "").strip() for column in PAIRS_COLUMNS)
            if not image or not prompt:
                raise UsageError(f"{path}, line {with_header.line_num}: give an image and a prompt.")
            name = PurePosixPath(image)
            if not name.name or name.is_absolute() or ".." in name.parts:
                raise UsageError(f"{path}, line {with_header.line_num}: {image} does not lie under {folder}.")
            if not _lies_under(folder, name):
                raise UsageError(
                    f"{path}, line {with_header.line_num}: {image} leads out of {folder} by a link; name the folder "
                    "that it leads to, or copy the image."
                )
            prompts_of.setdefault(name, []).append(prompt)
    except csv.Error as error:
        raise UsageError(f"{path}, after line {with_header.line_num}: {error}; mend the file.") from error
    if not prompts_of:
        raise UsageError(f"{path} holds no pair of an image and a prompt.")
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; name the one under which the images of {path} lie.")
    names = Names()
    return [Picture(folder / name, names.take(_stem(name)), tuple(said)) for name, said in prompts_of.items()]


def _lies_under(folder: Path, name: PurePosixPath) -> bool:
    """Whether a name still lies in the folder when links are followed."""
    try:
        return (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links, or a name that cannot be, leads nowhere at all
        return True


def _read_lines(path: Path) -> list[str]:
    lines = [line.strip() for line in _read(path).split("\n")]
    prompts = [line for line in lines if line]
    if not prompts:
        raise UsageError(f"{path} holds no prompt: write one to a line.")
    return prompts


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); name a file of prompts.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text; save it as such.") from error


def _stem(path: PurePosixPath) -> str:
    """A relative path without its suffix, as text, each part so short that there is room for a prompt behind it."""
    parts = [os.fsencode(part).decode("utf-8", "replace") for part in path.with_suffix("").parts]
    return str(PurePosixPath(*(part.encode()[:_MAX_STEM_BYTES].decode("utf-8", "ignore") for part in parts)))


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a prompt that is too long for a name
        return False
