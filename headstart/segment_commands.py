"""The commands that segment whole pictures into classes: one picture, or one of the eight benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from headstart.command import Command, Json, Place

if TYPE_CHECKING:  # slow to import
    from headstart.open_heads import Choices

BENCHMARK_NAMES = ("voc20", "voc21", "context59", "context60", "coco-object", "coco-stuff", "ade20k", "cityscapes")
"""The names in evaluate.open_vocabulary.benchmarks, which is slow to import where only --help is asked for."""

Model = Annotated[Positional[Path], arg(metavar="RUN", help="Run folder, or a .pth file of Talk2DINO's weights.")]


@dataclass(frozen=True)
class SegmentOptions:
    """How label maps are made."""

    templates: Literal["bare", "1", "5", "7", "80"] = "7"
    """How many templates the name of a class is put into; bare is the name alone, for heads that learned from plain
    phrases."""
    background_level: float | None = None
    """Score below which a pixel is background; by default 0.55 for Talk2DINO with ViT-B, 0.54 with ViT-L, and 0.5 for
    other heads."""
    cleaning: float | None = None
    """Strength of background cleaning; by default 0.2 for Talk2DINO where there is a background, and 0 elsewhere."""
    pamr: bool = False
    """Refine masks by what looks alike in the image (PAMR)."""
    short_side: int = 448
    """Pixels of the shorter side to which images are resized before they are cut into windows."""
    window: int = 448
    """Pixels of the side of a window."""
    stride: int = 224
    """Pixels from one window to the next."""
    image_encoder: str | None = None
    """With a .pth file: name, hub id or folder of the image encoder, such as dinov2-base-reg."""
    text_encoder: str | None = None
    """With a .pth file: the text encoder, such as clip-base-16."""
    input_size: tuple[int, int] | None = None
    """With a .pth file: (height, width) at which the encoder sees a window; by default 518 518."""
    batch_size: int | None = None
    """Windows in one forward pass; by default 8 on a CPU, 64 elsewhere."""
    device: str = "auto"
    """Where encoders and head run."""

    def choices(self, *, aliases: bool = False) -> Choices:
        """What was chosen, as the work takes it."""
        from evaluate.open_vocabulary.windows import SlidingWindow
        from headstart.open_heads import Choices

        return Choices(
            templates=self.templates,
            aliases=aliases,
            windows=SlidingWindow(
                short_side_px=self.short_side,
                long_side_px=max(2048, self.short_side),
                window_px=self.window,
                stride_px=self.stride,
            ),
            background=self.background_level,
            cleaning=self.cleaning,
            pamr=self.pamr,
            image_encoder=self.image_encoder,
            text_encoder=self.text_encoder,
            input_size=self.input_size,
            batch_size=self.batch_size,
            device=self.device,
        )


@dataclass(frozen=True)
class _Benchmarked:
    """What is scored, on what."""

    model: Model
    benchmark: Annotated[
        Positional[str], arg(metavar="BENCHMARK", help=f"One of the eight: {', '.join(BENCHMARK_NAMES)}.")
    ]
    data: Place
    """The dataset in the layout in which it is published; or the samples store that `headstart prepare` made of it, or
    a folder with that store. Of a dataset, a store is made in OUT/stores."""


@dataclass(frozen=True)
class OpenVocabulary(SegmentOptions, _Benchmarked):
    """Score a head on one of the eight open-vocabulary benchmarks: mean IoU, accuracy, and a table of all classes.

    Every class of the benchmark is prompted for, images are seen through sliding windows, and each pixel goes to the
    best class. Leaves results.json, which names every choice, and classes.csv.

    Example: headstart openvocab runs/talk2dino-0123456789ab voc21 --data VOCdevkit/VOC2012 --pamr

    Example: headstart openvocab vitb_mlp_infonce.pth ade20k --data stores --image-encoder dinov2-base-reg
    --text-encoder clip-base-16
    """

    split: str = "val"
    """Which split to score."""
    aliases: bool = False
    """Prompt for the other names of a class, too, and average all."""
    image_dir: Path | None = None
    """Where the images lie, if they were moved since the samples store was written."""
    images: Place | None = None
    """An image-feature store of windows over that samples store, made with `headstart extract --views whole
    windows-1-0.5`; by default windows are encoded live."""
    out: Path | None = None
    """Folder for results.json and classes.csv; by default open-vocabulary/BENCHMARK in the run's folder."""
    json: Json = False

    def run(self) -> Any:
        from cache_schema.atomic import parse_path
        from headstart.class_table import class_table
        from headstart.open_vocabulary import evaluate_benchmark

        results = evaluate_benchmark(
            self.model,
            self.benchmark,
            parse_path(self.data),
            self.choices(aliases=self.aliases),
            split=self.split,
            out=self.out,
            image_dir=self.image_dir,
            images=None if self.images is None else parse_path(self.images),
        )
        print(class_table(results))
        print(f"results: {results['out']}")
        return results


@dataclass(frozen=True)
class _Pictured:
    """What is looked at, and what is looked for."""

    model: Model
    image: Path
    """Picture to look at."""
    classes: str
    """Names of classes with commas between them; _ stands for a blank, as in traffic_sign."""
    out: Path = Path("map.png")
    """PNG file to write."""


@dataclass(frozen=True)
class Segment(SegmentOptions, _Pictured):
    """Segment one picture into classes of your own: a map in colours over the picture, with its legend.

    Example: headstart segment runs/talk2dino-0123456789ab --image photo.jpg --classes pikachu,traffic_sign,forest,road
    --background --out map.png
    """

    background: bool = False
    """Let pixels be of no class, where none scores above the level of the background."""
    json: Json = False

    def run(self) -> Any:
        from headstart.open_vocabulary import segment_picture

        result = segment_picture(
            self.model, self.image, self.classes, self.out, self.choices(), background=self.background
        )
        for found in sorted(result["classes"], key=lambda found: -found["share"]):
            print(f"{found['name']}: {found['share']:.1%}")
        print(f"map: {result['out']}")
        return result


SEGMENT_COMMANDS: dict[str, type[Command]] = {"openvocab": OpenVocabulary, "segment": Segment}
