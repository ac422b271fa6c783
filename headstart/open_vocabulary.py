"""Open-vocabulary segmentation: heads, encoders, classes and images brought together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_schema import atomic
from cache_schema.atomic import StorePath
from cache_schema.errors import StoreMismatchError, UsageError
from cache_schema.features import ImageFeatures
from cache_schema.fingerprint import digest_file, fingerprint
from cache_schema.samples import SamplesStore, open_samples
from cache_schema.store import open_store, read_header
from evaluate.open_vocabulary.background import CLEANING
from evaluate.open_vocabulary.benchmarks import list_images, make_benchmark
from evaluate.open_vocabulary.cached_windows import CachedWindows
from evaluate.open_vocabulary.classes import OpenClass, encode_classes, parse_classes
from evaluate.open_vocabulary.evaluation import image_paths, make_results, run_benchmark, write_results
from evaluate.open_vocabulary.label_pictures import LabelPicture
from evaluate.open_vocabulary.live_windows import LiveWindows, SeenImage
from evaluate.open_vocabulary.pamr import Pamr
from evaluate.open_vocabulary.scores import compares_cosines, make_scorer
from evaluate.open_vocabulary.segmenter import SegmentationProtocol, Segmenter
from evaluate.pictures import encode_png
from evaluate.predictor import open_image
from extract.encoders.protocols import ImageEncoder
from extract.encoders.specs import AttentionOutput
from extract.job import pick_device
from extract.prepare import PrepareConfig, prepare
from headstart.encoders import UNTRAINED_NOTE
from headstart.open_heads import Choices, OpenHead, attention_read, load_encoders, open_head
from headstart.stores import STORE_SUFFIXES, list_stores


@dataclass(frozen=True)
class OpenSegmenter:
    """A segmenter, the encoder that looks at windows, and what is written beside what the two make, as plain JSON."""

    segmenter: Segmenter
    encoder: ImageEncoder
    layers: tuple[str, ...]
    attention: tuple[AttentionOutput, ...]
    batch_size: int
    protocol: dict[str, Any]
    provenance: dict[str, Any]

    def live(self) -> LiveWindows:
        """Windows that are encoded live."""
        return LiveWindows(self.encoder, self.segmenter.protocol.windows, self.batch_size)


def open_segmenter(
    opened: OpenHead, classes: Sequence[OpenClass], choices: Choices, *, background: bool, cached: bool = False
) -> OpenSegmenter:
    """A segmenter of these classes.

    Args:
        background: whether pixels may belong to no class.
        cached: features come from a store, rounded already.

    Raises:
        UsageError: an encoder cannot be loaded, or cannot give what is asked for.
        StoreMismatchError: the encoders are not those the run was trained on.
    """
    cosines = compares_cosines(opened.head)
    cleaning = choices.cleaning if choices.cleaning is not None else CLEANING if background and cosines else 0.0
    if choices.background is not None and not background:
        raise UsageError("there is no background here: leave out --background-level.")
    attention = attention_read(opened.head, cleans=cosines and cleaning > 0)
    image_encoder, text_encoder = load_encoders(opened, choices, attention)
    head = opened.head.to(pick_device(choices.device))
    image_dtype, text_dtype = opened.dtypes
    prompts = encode_classes(classes, choices.templates, text_encoder, text_dtype)
    scorer = make_scorer(head, prompts, cleaning=cleaning, image_dtype="float32" if cached else image_dtype)
    level = scorer.background if choices.background is None else choices.background
    protocol = SegmentationProtocol(
        templates=choices.templates,
        aliases=choices.aliases,
        windows=choices.windows,
        background=level if background else None,
        cleaning=cleaning,
        pamr=Pamr() if choices.pamr else None,
    )
    by_default = 8 if image_encoder.device == "cpu" else 64
    untrained = any(encoder.identity["config"].get("untrained") for encoder in (image_encoder, text_encoder))
    return OpenSegmenter(
        Segmenter(scorer, protocol),
        image_encoder,
        head.layers,
        attention,
        by_default if choices.batch_size is None else choices.batch_size,
        {**protocol.to_dict(), **scorer.describe(), "windows_of": "original image" if cached else "resized image"},
        {
            "model": str(opened.path if opened.run_dir is None else opened.run_dir),
            "head_sha256": digest_file(opened.path),
            "encoders": {"image": image_encoder.name, "text": text_encoder.name},
            "encoder_fingerprints": {
                "image": fingerprint(image_encoder.identity),
                "text": fingerprint(text_encoder.identity),
            },
            "notes": [UNTRAINED_NOTE] if untrained else [],
        },
    )


def evaluate_benchmark(
    model: Path,
    name: str,
    data: StorePath,
    choices: Choices | None = None,
    *,
    split: str = "val",
    out: Path | None = None,
    image_dir: Path | None = None,
    images: StorePath | None = None,
) -> dict[str, Any]:
    """Score a head on one of the eight benchmarks and leave results.json and classes.csv.

    Args:
        model: a run folder, or a file of Talk2DINO's weights.
        data: a samples store of the benchmark, a folder with one, or the dataset as it is published; of that, a samples
            store is made under `out` first.
        out: by default `open-vocabulary/NAME` in the run's folder, or in one called as the file of weights.
        images: an image-feature store over that samples store that holds the windows; by default they are encoded live.

    Raises:
        UsageError: there is no such benchmark, or model or data cannot be used.
        StoreMismatchError: the features are of other images, or of another encoder.
    """
    choices = choices or Choices()
    benchmark = make_benchmark(name, aliases=choices.aliases)
    opened = open_head(model, choices)
    out = out or (Path(model.stem) if opened.run_dir is None else opened.run_dir) / "open-vocabulary" / name
    store = find_truth(data, name, out, image_dir)
    listed = list_images(store, benchmark, split)
    background, cached = benchmark.has_background, images is not None
    made = open_segmenter(opened, benchmark.classes, choices, background=background, cached=cached)
    provenance = {**made.provenance, "samples": store.fingerprint}
    seen: Iterator[SeenImage]
    if images is None:
        seen = made.live().look_at(image_paths(store, listed))
    else:
        windows = _open_windows(images, made, store)
        provenance["image_features"] = windows.images.store.header.fingerprint
        seen = windows.look_at(store.samples.images, (image.row for image in listed))
    run = run_benchmark(made.segmenter, benchmark, store, listed, seen)
    results = make_results(run, benchmark, split, made.protocol, provenance)
    write_results(out, results)
    return {**results, "out": str(out)}


def _open_windows(path: StorePath, made: OpenSegmenter, store: SamplesStore) -> CachedWindows:
    """The windows in an image-feature store, for what a segmenter reads of them.

    Raises:
        UsageError: the store holds others, or its images are needed and cannot be found.
        StoreMismatchError: it was made with another encoder.
    """
    features = ImageFeatures(open_store(path, "image_features"))
    if fingerprint(features.store.header.identity["encoder"]) != made.provenance["encoder_fingerprints"]["image"]:
        raise StoreMismatchError(
            f"{path} was not made with {made.encoder.name} as this head takes it; extract with that encoder, at that "
            "input size and precision, or leave --images out."
        )
    refines = made.segmenter.protocol.pamr is not None
    if refines:
        image_paths(store, [])
    windows = made.segmenter.protocol.windows
    return CachedWindows(features, windows, made.layers, made.attention, store.image_dir, with_images=refines)


def find_truth(data: StorePath, name: str, out: Path, image_dir: Path | None = None) -> SamplesStore:
    """The samples store of a dataset: the one at `data`, the one in that folder, or one made of it under `out`.

    Raises:
        UsageError: a folder of stores holds none of this dataset, or several; or it cannot be made.
    """
    if data.suffix in STORE_SUFFIXES:
        return open_samples(data, image_dir)
    stores = {path.stem: path for path in list_stores(data) if path.name.startswith("samples")}
    if not stores:
        if not isinstance(data, Path):
            raise UsageError(f"{data} holds no samples store; make one with `headstart prepare {name}`.")
        prepared = prepare(PrepareConfig(name, data, out / "stores", image_dir))
        print(prepared.summary())
        return open_samples(prepared.path, image_dir)
    of_name = [path for path in stores.values() if _dataset_of(path) == name]
    if len(of_name) != 1:
        found = f"{len(of_name)} samples stores" if of_name else "no samples store"
        raise UsageError(f"{data} holds {found} of {name}; make one with `headstart prepare {name}`, or name its path.")
    return open_samples(of_name[0], image_dir)


def segment_picture(
    model: Path,
    image_path: Path,
    classes: str,
    out: Path,
    choices: Choices | None = None,
    *,
    background: bool = False,
) -> dict[str, Any]:
    """Write the label map of one picture as a PNG file, in colours over the picture and with its legend.

    Args:
        classes: names with commas between them, see `parse_classes`.
        background: whether pixels may belong to no class.

    Raises:
        UsageError: the model, the picture or the classes cannot be used.
    """
    choices = choices or Choices()
    found, image = parse_classes(classes), open_image(image_path)
    made = open_segmenter(open_head(model, choices), found, choices, background=background)
    (seen,) = made.live().look_at([image])
    labels = made.segmenter.label(seen)
    picture = LabelPicture.of([one.name for one in found], background=background)
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_file(out, encode_png(picture.draw(image, labels)))
    rows = zip(picture.classes, picture.colours, picture.shares(labels), strict=True)
    return {
        "image": str(image_path),
        "out": str(out),
        "size": list(labels.shape),
        "classes": [{"name": name, "colour": colour, "share": share} for name, colour, share in rows],
        "protocol": made.protocol,
        "provenance": made.provenance,
    }


def _dataset_of(path: StorePath) -> str:
    header, _ = read_header(path)
    return str(header.identity["dataset"])
