"""The commands, as plain values: their fields are the options, their docstrings the help, `run` does the work.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from tyro.conf import Positional, arg

from cache_schema.atomic import parse_path
from cache_schema.errors import UsageError

Place = Annotated[str, arg(metavar="PATH|URL")]
"""Where stores lie: a path of this machine, or s3://bucket/folder and the like."""

Json = Annotated[bool, arg(help="Print one JSON object on stdout and everything else on stderr.")]


class Command(Protocol):
    """One parsed command line."""

    @property
    def json(self) -> bool: ...

    def run(self) -> Any:
        """Do the work, print for people, return what `--json` prints."""
        ...


class Wanting(dict[str, Any]):
    """A result that is found wanting: printed like any other, and exit code 1."""


@dataclass(frozen=True)
class Demo:
    """Walk the whole road on an embedded dataset: make scenes, cache features, train two heads, evaluate, report.

    Takes about four minutes on two cores. Killed or repeated, it goes on where it was and extracts nothing twice.
    """

    out: Path = Path("demo")
    """Folder for everything it makes: scenes/, encoders/, stores/, runs/, results.json, report.html."""
    num_images: int = 2000
    """How many scenes to make. Fewer are faster and worse."""
    json: Json = False

    def run(self) -> Any:
        from headstart.demo import run_demo

        return run_demo(self.out, self.num_images)


@dataclass(frozen=True)
class Prepare:
    """Read a dataset and write its samples store: images, prompts, targets, splits and tags.

    Example: headstart prepare grefcoco /data/grefcoco --out stores
    """

    dataset: Positional[str]
    """Which reader: scenes or grefcoco."""
    root: Positional[Path]
    """Folder of the dataset. For grefcoco: grefs(unc).json, instances.json and images/ or train2014/."""
    out: Place = "stores"
    """Folder the samples store is written to; s3://bucket/folder and the like work too."""
    make: int = 0
    """For scenes: first make a dataset of this many images in the folder."""
    json: Json = False

    def run(self) -> Any:
        from extract.datasets.scenes import ScenesConfig, make_scenes
        from extract.prepare import PrepareConfig, prepare

        if self.make:
            if self.dataset != "scenes":
                raise UsageError(f"only scenes can be made, not {self.dataset}; leave --make out.")
            make_scenes(ScenesConfig(self.root, num_images=self.make))
        prepared = prepare(PrepareConfig(self.dataset, self.root, parse_path(self.out)))
        print(prepared.summary())
        return prepared.to_dict()


@dataclass(frozen=True)
class Extract:
    """Encode the images and prompts of a samples store, once, into feature stores beside it.

    A killed job goes on where it was; a finished one is not done again. Images that cannot be read are listed in
    the store's ledger.jsonl.

    Example: headstart extract stores/samples-0123456789ab.zarr --image-encoder facebook/dinov2-base --text-encoder
    openai/clip-vit-base-patch16 --input-size 518 518
    """

    samples: Positional[Place]
    """The samples store, or a folder that holds just one; s3://bucket/folder and the like work too."""
    out: Place | None = None
    """Folder the feature stores are written to; by default the one the samples store is in."""
    image_encoder: str = "tiny"
    """Name, hub id or folder of the image encoder. "tiny" is the embedded one, untrained."""
    text_encoder: str = "tiny"
    """Name, hub id or folder of the text encoder."""
    layers: tuple[str, ...] = ("last",)
    """Layers to keep: "last" is the output after the final norm, a number that block's output before any norm."""
    input_size: tuple[int, int] | None = None
    """(height, width) the images are resized to; multiples of the encoder's patch. By default the encoder's own."""
    image_dir: Path | None = None
    """Where the images lie, if they were moved since the samples store was written."""
    views: tuple[str, ...] = ("whole",)
    """How each image is looked at: whole first, then flip, scale-S, crop-S (S such as 0.8), the last two perhaps with
    +flip. Training draws a view of each image anew in every epoch."""
    dtype: Literal["float16", "float32", "int8"] = "float16"
    """Data type in which token grids are kept; int8 takes half the room of float16, with a scale for each token."""
    container: Literal["zarr", "hdf5"] = "zarr"
    """What the finished stores lie in: folders of shards, or one HDF5 file each."""
    batch_size: int = 32
    """Views in one forward pass."""
    shard_rows: int = 64
    """Views in one shard: what a killed job loses at most."""
    device: str = "auto"
    """Where the encoders run: auto, cpu, cuda, cuda:1, ..."""
    json: Json = False

    def run(self) -> Any:
        from cache_schema.quantize import float_dtype
        from extract.image_job import ImageJobConfig, extract_images
        from extract.prompt_job import PromptJobConfig, extract_prompts
        from headstart import encoders
        from headstart.stores import find_samples

        samples = find_samples(parse_path(self.samples))
        out = samples.parent if self.out is None else parse_path(self.out)
        tiny = (out if isinstance(out, Path) else Path()) / "encoders"
        image_encoder = encoders.image_encoder(
            self.image_encoder, tiny, layers=self.layers, input_size=self.input_size, device=self.device
        )
        text_encoder = encoders.text_encoder(self.text_encoder, tiny, device=self.device)
        image_job = ImageJobConfig(
            samples, out, self.image_dir, self.dtype, self.batch_size, self.shard_rows, self.views
        )
        images = extract_images(image_job, image_encoder)
        prompts = extract_prompts(PromptJobConfig(samples, out, float_dtype(self.dtype)), text_encoder)
        if self.container == "hdf5":
            from headstart.cache_care import pack_hdf5

            images, prompts = (dataclasses.replace(job, path=pack_hdf5(job.path)) for job in (images, prompts))
        print(images.summary("images" if len(self.views) == 1 else "views"))
        print(prompts.summary("prompts"))
        return {"images": images.to_dict(), "prompts": prompts.to_dict()}


@dataclass(frozen=True)
class Train:
    """Train a head on cached features, in a run folder named after everything that decides what it learns.

    A killed run goes on where it was; a finished one is not trained again.

    Example: headstart train cross_attention --stores stores --set epochs=5 depth=3
    """

    recipe: Positional[str]
    """Which recipe: linear, cross_attention, or juras (JurasSigLIP's fusion, losses and optimiser)."""
    stores: Place = "stores"
    """Folder with one store of each kind; s3://bucket/folder and the like work too."""
    samples: Place | None = None
    """The samples store, where the folder holds several."""
    images: Place | None = None
    """The image-feature store, where the folder holds several."""
    prompts: Place | None = None
    """The prompt-feature store, where the folder holds several."""
    runs: Path = Path("runs")
    """Folder the run's own folder is made in."""
    set: tuple[str, ...] = field(default=())
    """Settings to replace, as key=value: fields of the recipe (epochs, learning_rate, ...) or arguments of its head."""
    residency: Literal["auto", "device", "ram", "disk"] = "auto"
    """Where features are kept while training; auto takes the first they fit into half of what is free of."""
    json: Json = False

    def run(self) -> Any:
        from headstart import api
        from headstart.recipes import parse_overrides

        cache = api.open_cache(self.stores, samples=self.samples, images=self.images, prompts=self.prompts)
        run = api.train(self.recipe, cache, self.runs, settings=parse_overrides(self.set), residency=self.residency)
        print(run.summary())
        return run.to_dict()


@dataclass(frozen=True)
class Evaluate:
    """Score trained heads at the images' original sizes, and leave results.json and report.html.

    Example: headstart evaluate runs/* --split test --out report
    """

    runs: Positional[tuple[Path, ...]]
    """Run folders, as `headstart train` printed them."""
    split: str = "val"
    """Which split to score."""
    out: Path | None = None
    """Folder for results.json and report.html; by default the first run's."""
    stores: Place | None = None
    """Folder with one store of each kind, if not the stores the first run was trained on."""
    samples: Place | None = None
    """The samples store, where that folder holds several."""
    images: Place | None = None
    """The image-feature store, where that folder holds several."""
    prompts: Place | None = None
    """The prompt-feature store, where that folder holds several."""
    json: Json = False

    def run(self) -> Any:
        from headstart import api, tables

        if not self.runs:
            raise UsageError("there is no run to evaluate; name the run folders that `headstart train` printed.")
        named = {"samples": self.samples, "images": self.images, "prompts": self.prompts}
        if self.stores is None and any(named.values()):
            raise UsageError(
                "--samples, --images and --prompts choose among the stores of a folder; name it with --stores."
            )
        cache = api.open_cache(self.stores, **named) if self.stores else None
        results = api.evaluate(list(self.runs), cache, split=self.split, out=self.out)
        print(tables.results_table(results))
        print(f"report: {(self.out or self.runs[0]) / 'report.html'}")
        return results


@dataclass(frozen=True)
class Predict:
    """Segment what prompts name in one picture: a mask and an overlay, as PNG files at the picture's own size.

    Example: headstart predict runs/cross_attention-0123456789ab photo.jpg "the red circle" "all squares"
    """

    run_dir: Positional[Path]
    """Run folder of the head."""
    image: Positional[Path]
    """Picture to look at."""
    prompts: Positional[tuple[str, ...]]
    """What to segment; each prompt gives a mask of its own."""
    out: Path = Path("predictions")
    """Folder the PNG files are written to."""
    device: str = "auto"
    """Where encoders and head run."""
    json: Json = False

    def run(self) -> Any:
        from headstart.predictions import predict_image

        predictions = predict_image(self.run_dir, self.image, self.prompts, self.out, self.device)
        for prediction in predictions:
            print(f"{prediction['prompt']}: {prediction['mask_share']:.1%} of the picture -> {prediction['overlay']}")
        return {"image": str(self.image), "predictions": predictions}


@dataclass(frozen=True)
class CacheInfo:
    """What stores hold, where they come from, how large they are, and whether they are complete (exit code 1 if not).

    Example: headstart cache info demo/stores
    """

    path: Positional[Place] = "stores"
    """A store, or a folder of stores."""
    json: Json = False

    def run(self) -> Any:
        from headstart.cache_info import describe_stores, print_description

        described = describe_stores(parse_path(self.path))
        for description in described:
            print_description(description)
        complete = all(description["complete"] for description in described)
        return {"stores": described} if complete else Wanting(stores=described)


@dataclass(frozen=True)
class CacheList:
    """One line for each store of a folder: what it is, how large, and whether it is complete.

    Example: headstart cache list demo/stores
    """

    path: Positional[Place] = "stores"
    """A folder of stores."""
    json: Json = False

    def run(self) -> Any:
        from headstart.cache_info import describe_stores, stores_table

        described = describe_stores(parse_path(self.path))
        print(stores_table(described))
        return {"stores": described}


@dataclass(frozen=True)
class CacheVerify:
    """Check every byte of stores against what was written; exit code 1 if any differs, with every damaged file named.

    Example: headstart cache verify demo/stores --sample 0.1
    """

    path: Positional[Place] = "stores"
    """A store, or a folder of stores."""
    sample: float = 1.0
    """Share of the shards to read, drawn at random; metadata, receipts and sizes are always checked."""
    seed: int = 0
    """Which shards a sample takes."""
    threads: int | None = None
    """How many shards are read at a time; by default one for each core."""
    json: Json = False

    def run(self) -> Any:
        from headstart.cache_care import verify_all

        found = verify_all(parse_path(self.path), sample=self.sample, seed=self.seed, threads=self.threads)
        for verification in found:
            print(verification.summary())
            for damage in verification.damages:
                print(f"  {damage.key}: {damage.reason}")
        result = {"stores": [verification.to_dict() for verification in found]}
        return result if all(verification.is_sound for verification in found) else Wanting(result)


@dataclass(frozen=True)
class CacheRepair:
    """Extract again what is damaged or missing in a feature store, and nothing else.

    Example: headstart cache repair demo/stores/image_features-0123456789ab.zarr
    """

    path: Positional[Path]
    """A feature store that ends in .zarr."""
    samples: Place | None = None
    """The samples store it was made from, if it is no longer where it was."""
    image_dir: Path | None = None
    """Where the images lie, if they were moved."""
    device: str = "auto"
    """Where the encoder runs; the one that ran it first gives the same bits again."""
    json: Json = False

    def run(self) -> Any:
        from headstart.cache_care import repair

        samples = None if self.samples is None else parse_path(self.samples)
        repaired = repair(self.path, samples=samples, image_dir=self.image_dir, device=self.device)
        print(repaired.summary())
        for key in repaired.damaged:
            print(f"  {key}")
        return repaired.to_dict()


@dataclass(frozen=True)
class CacheConvert:
    """Write a store again in another container or with other compression, every value to the bit.

    Example: headstart cache convert demo/stores/image_features-0123456789ab.zarr --to hdf5
    """

    path: Positional[Place]
    """A store."""
    to: Literal["zarr", "hdf5"]
    """The container: a folder (or remote prefix) of shards, or one HDF5 file."""
    out: Place | None = None
    """Folder for the new store; by default the one the store is in. s3://bucket/folder and the like work too."""
    zstd: int | None = None
    """Compress the chunks of a zarr store at this zstd level (1 to 22). Smaller by a little, slower by far."""
    json: Json = False

    def run(self) -> Any:
        from headstart.cache_care import convert

        path = parse_path(self.path)
        out = path.parent if self.out is None else parse_path(self.out)
        written = convert(path, out, self.to, self.zstd)
        print(f"{path} -> {written}")
        return {"path": str(written)}


@dataclass(frozen=True)
class CacheGc:
    """Show what may be cleared away under a folder of stores, and how much it is; with --yes, remove it.

    Stores whose job never finished, files that killed jobs left in the making and, with --runs, stores that no run
    uses. What was changed within the last hour is left alone.

    Example: headstart cache gc stores --runs runs --yes
    """

    path: Positional[Path] = Path("stores")
    """A folder of stores."""
    runs: Path | None = None
    """Folder of run folders: stores that none of them was trained on go too."""
    idle_minutes: float = 60
    """What was changed less than so many minutes ago may belong to a job at work, and stays."""
    yes: bool = False
    """Remove what was found."""
    json: Json = False

    def run(self) -> Any:
        from headstart.cache_care import clear, find_garbage

        garbage = find_garbage(self.path, self.runs, idle_s=60 * self.idle_minutes)
        for item in garbage:
            print(f"{item.num_bytes / 1e6:12.1f} MB  {item.path}: {item.reason}")
        total = sum(item.num_bytes for item in garbage)
        if self.yes:
            clear(garbage)
        did = "removed" if self.yes else "may be removed; add --yes to do it"
        print(f"{total / 1e6:12.1f} MB in {len(garbage)} places {did}" if garbage else "nothing to clear away")
        return {"garbage": [item.to_dict() for item in garbage], "num_bytes": total, "removed": self.yes}


COMMANDS: dict[str, type[Command]] = {
    "demo": Demo,
    "prepare": Prepare,
    "extract": Extract,
    "train": Train,
    "evaluate": Evaluate,
    "predict": Predict,
}

CACHE_COMMANDS: dict[str, type[Command]] = {
    "info": CacheInfo,
    "list": CacheList,
    "verify": CacheVerify,
    "repair": CacheRepair,
    "convert": CacheConvert,
    "gc": CacheGc,
}
