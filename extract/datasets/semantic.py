"""Semantic-segmentation sets as samples: one for each class that an image shows, its prompt the name of the class."""

from __future__ import annotations

import os.path
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath

from cache_schema.errors import UsageError
from cache_schema.masks import Size
from extract.datasets.faults import FaultReport, FileFaults, is_text
from extract.datasets.instance_maps import draw_instances
from extract.datasets.label_maps import IGNORED, masks_of, read_label_map
from extract.datasets.places import Folder, find_image_dir
from extract.datasets.records import Dataset, DatasetReader, SampleRecord, Source
from extract.datasets.semantic_sets import SEMANTIC_SETS, SemanticSet
from extract.images import UndecodableImageError, UnreadableFileError


def read_semantic(source: Source, name: str) -> Dataset:
    """Open one of `SEMANTIC_SETS`; a split of which nothing is there is left out.

    A sample's id is `"{image}:{class id}"`, where a class id is the place of the class in `Dataset.classes`, and the
    image's name goes without leading zeros if it is a number. Its target is all that the image shows of the class, its
    tag `category` the class, and `ignored` the pixels that count for no class, the background of sets without it among
    them. Each pixel is in one sample of its image, or ignored. An image without a pixel that counts gives no sample.

    Raises:
        UsageError: the folder holds none of the splits, or no image folder.
    """
    chosen = SEMANTIC_SETS[name]
    home = _find_home(source.root, chosen)
    image_dir = find_image_dir(replace(source, root=home), chosen.images)
    sources: list[Path] = []
    streams: list[Iterator[SampleRecord]] = []
    for split, place in chosen.splits.items():
        labels, instances = home / chosen.labels / place, home / chosen.instances.get(split, "")
        if chosen.listed:
            if (home / place).is_file():
                sources.append(home / place)
                streams.append(_read_listed(home, place, split, image_dir, chosen, source.faults))
        elif images := _keys_below(image_dir / place, chosen.image_suffix):
            if maps := _find_label_maps(labels, chosen):
                streams.append(_read_folder(labels, maps, images, split, chosen, source.faults))
            elif instances.is_file():
                sources.append(instances)
                streams.append(_read_instances(instances, image_dir, split, chosen, source.faults))
    if not streams:
        raise UsageError(
            f"{home} holds no split of {name} ({', '.join(chosen.splits)}) that has images and labels both. Name the "
            f"folder that holds {chosen.layout}."
        )
    return Dataset(name, image_dir, tuple(sources), chain.from_iterable(streams), chosen.class_names)


@dataclass(frozen=True, slots=True)
class _LabelMap:
    """A label map: its path below a folder, the class ids of its numbers, and the path of its image."""

    path: str
    class_of: Mapping[int, int]
    image_path: str


def _find_home(root: Path, chosen: SemanticSet) -> Path:
    """The folder in which the set's own folders lie: the one that was named, or one below it."""
    for home in (root, *(root / below for below in chosen.homes)):
        if any((home / mark).exists() for mark in chosen.marks):
            return home
    raise UsageError(
        f"{root} holds neither {' nor '.join(chosen.splits)}: there is no {' and no '.join(chosen.marks)}. Name the "
        f"folder that holds {chosen.layout}."
    )


def _keys_below(folder: Path, suffix: str) -> list[str]:
    """The files below a folder whose names end in `suffix`, without it, in any order."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob(f"*{suffix}"))
    return [name.removesuffix(suffix) for name in found]


def _find_label_maps(folder: Path, chosen: SemanticSet) -> dict[str, _LabelMap]:
    """The label maps below a folder, by the name of their image; of several for one image the first way counts."""
    place = folder.name
    maps: dict[str, _LabelMap] = {}
    names = [f"{key}.png" for key in _keys_below(folder, ".png")]
    for files in chosen.label_files:
        class_of = chosen.class_of(files)
        for name in names:
            key = files.key_of(name)
            if key is not None and key not in maps:
                maps[key] = _LabelMap(name, class_of, f"{place}/{key}{chosen.image_suffix}")
    return maps


def _read_folder(
    folder: Path,
    maps: Mapping[str, _LabelMap],
    images: Iterable[str],
    split: str,
    chosen: SemanticSet,
    faults: FaultReport,
) -> Iterator[SampleRecord]:
    """Samples of a split whose images and label maps are what their folders hold."""
    of_folder, inside, with_image = faults.of(folder), Folder(folder), set(images)
    for key in sorted(with_image | maps.keys()):
        label_map = maps.get(key)
        if not is_text(key):
            of_folder.add(repr(key), "a file's name is not valid UTF-8")
        elif label_map is None:
            of_folder.add(key, "the image has no label map")
        elif key not in with_image:
            of_folder.add(label_map.path, f"there is no image {label_map.image_path}")
        else:
            yield from _read_map(inside, label_map, split, chosen, of_folder)


def _read_listed(
    home: Path, place: str, split: str, image_dir: Path, chosen: SemanticSet, faults: FaultReport
) -> Iterator[SampleRecord]:
    """Samples of a split whose images are listed in a text file, a name in each line."""
    of_list, of_folder = faults.of(home / place), faults.of(home / chosen.labels)
    images, labels = Folder(image_dir), Folder(home / chosen.labels)
    (files,) = chosen.label_files
    class_of = chosen.class_of(files)
    with (home / place).open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                key = line.decode().removeprefix("\ufeff").strip()
            except UnicodeDecodeError:
                of_list.add(f"line {number}", "it is not valid UTF-8")
                continue
            label_map = _LabelMap(f"{key}{files.suffix}", class_of, f"{key}{chosen.image_suffix}")
            if not key:
                continue
            if label_map.image_path not in images or label_map.path not in labels:
                of_list.add(f"line {number}", f"{key!r} does not lie inside the folders of images and label maps")
            elif not os.path.exists(labels.path / label_map.path):  # noqa: PTH110  also for names too long to be any
                of_list.add(f"line {number}", f"the image {key} has no label map")
            elif not os.path.exists(image_dir / label_map.image_path):  # noqa: PTH110
                of_list.add(f"line {number}", f"there is no image {label_map.image_path}")
            else:
                yield from _read_map(labels, label_map, split, chosen, of_folder)


def _read_instances(
    path: Path, image_dir: Path, split: str, chosen: SemanticSet, faults: FaultReport
) -> Iterator[SampleRecord]:
    """Samples of a split whose label maps are drawn from COCO's instances."""
    place = chosen.splits[split]
    for image, labels in draw_instances(path, image_dir / place, chosen.class_names, faults):
        masks = masks_of(labels, chosen.train_ids)
        yield from _samples_of(f"{place}/{image.path}", image.size, masks, split, chosen)


def _read_map(
    folder: Folder, label_map: _LabelMap, split: str, chosen: SemanticSet, faults: FileFaults
) -> Iterator[SampleRecord]:
    """The samples of one image; a label map that is not what it should be is a fault."""
    if label_map.path not in folder:
        faults.add(label_map.path, "it does not lie inside the folder of label maps")
        return
    try:
        labels = read_label_map(folder.path / label_map.path)
        masks = masks_of(labels, label_map.class_of)
    except (UnreadableFileError, UndecodableImageError, ValueError) as fault:
        faults.add(label_map.path, str(fault))
        return
    height, width = labels.shape
    yield from _samples_of(label_map.image_path, (height, width), masks, split, chosen)


def _samples_of(
    image_path: str, size: Size, masks: Mapping[int, bytes], split: str, chosen: SemanticSet
) -> Iterator[SampleRecord]:
    stem = PurePosixPath(image_path).name.removesuffix(chosen.image_suffix)
    image_id = str(int(stem)) if stem.isascii() and stem.isdecimal() else stem
    names = chosen.class_names
    for class_id, mask in masks.items():
        if class_id != IGNORED:
            yield SampleRecord(
                id=f"{image_id}:{class_id}",
                image_id=image_id,
                image_path=image_path,
                image_size=size,
                prompt=names[class_id],
                target=mask,
                no_target=False,
                split=split,
                tags={"category": names[class_id]},
                ignored=masks.get(IGNORED, b""),
            )


def _reader(name: str) -> Callable[[Source], Dataset]:
    return partial(read_semantic, name=name)


SEMANTIC_READERS: dict[str, DatasetReader] = {
    name: DatasetReader(_reader(name), chosen.layout, chosen.published, counted="images")
    for name, chosen in SEMANTIC_SETS.items()
}
"""A reader for each of the sets."""
