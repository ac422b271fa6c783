"""The public Python API: open a cache, train a head on it, evaluate it, load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cache_schema.atomic import StorePath, parse_path
from cache_schema.errors import UsageError
from cache_schema.features import FeatureCache
from evaluate.comparison import compare_runs
from evaluate.evaluation import evaluate_runs
from evaluate.finetune_report import BeforeAfter, before_and_after, write_finetune_report
from evaluate.predictor import Predictor
from evaluate.protocols import ORIGINAL_SIZE, Protocol, find_protocol
from extract.job import pick_device
from heads.checkpoint import load_head
from heads.finetune import FinetuneConfig, Finetuning
from heads.residency import Residency
from heads.runs import Training, read_run_config, run_name
from heads.train import TrainRequest, train_together
from heads.train_config import TrainConfig
from headstart.encoders import load_recorded_encoders, notes_on_encoders, record_encoders
from headstart.processes import is_first_process
from headstart.recipes import make_configs
from headstart.stores import StorePaths, find_stores, record_stores, stores_of_run

RunLike = Training | Path | str


def open_cache(
    stores: StorePath | str,
    *,
    samples: StorePath | str | None = None,
    images: StorePath | str | None = None,
    prompts: StorePath | str | None = None,
    image_dir: Path | str | None = None,
) -> FeatureCache:
    """Open the samples store, image features and prompt features under a folder, joined.

    Args:
        stores: a folder with one store of each kind, or a remote one such as s3://bucket/stores; where it has more,
            name the one you mean.
        image_dir: where the image files lie, if they were moved since the samples store was written.

    Raises:
        UsageError: a store is missing, incomplete, ambiguous, or does not match the others.
    """
    named = {"samples": samples, "images": images, "prompts": prompts}
    paths = {name: parse_path(path) for name, path in named.items() if path is not None}
    return find_stores(parse_path(stores), **paths, image_dir=None if image_dir is None else Path(image_dir)).open()


def train(
    recipe: str | TrainConfig,
    cache: FeatureCache,
    runs: Path | str = "runs",
    *,
    settings: Mapping[str, Any] | None = None,
    residency: Residency = "auto",
    trackers: Sequence[str] = ("tensorboard",),
) -> Training:
    """Train a head by a recipe's name, or by a config of your own, in a folder under `runs` named after its settings.

    Args:
        settings: values to replace in a named recipe, such as `{"epochs": 5, "depth": 3}`.

    Raises:
        UsageError: the recipe or a setting is unknown.
    """
    return train_heads([recipe], cache, runs, settings=settings, residency=residency, trackers=trackers)[0]


def train_heads(
    recipes: Sequence[str | TrainConfig],
    cache: FeatureCache,
    runs: Path | str = "runs",
    *,
    settings: Mapping[str, Any] | None = None,
    residency: Residency = "auto",
    trackers: Sequence[str] = ("tensorboard",),
) -> list[Training]:
    """Train several heads, each batch being read once for all; each learns to the bit what it learns alone.

    Args:
        settings: values to replace in the named recipes that know them; `{"film.dim": 64}` is for one alone.

    Raises:
        UsageError: a recipe or a setting is unknown, or the recipes want other batches.
    """
    named = [recipe for recipe in recipes if isinstance(recipe, str)]
    if settings and len(named) < len(recipes):
        raise UsageError("settings replace values of named recipes; a TrainConfig already has its own.")
    made = iter(make_configs(named, settings))
    configs = [next(made) if isinstance(recipe, str) else recipe for recipe in recipes]
    requests = [_request(config, cache, Path(runs)) for config in configs]
    return train_together(requests, cache, residency=residency, trackers=trackers)


def _request(config: TrainConfig, cache: FeatureCache, runs: Path) -> TrainRequest:
    run_dir = runs / run_name(config, cache)
    paths = StorePaths(cache.samples.path, cache.images.store.path, cache.prompts.store.path)
    recorded = {"encoders": record_encoders(cache, run_dir), "store_paths": record_stores(paths, run_dir)}
    return TrainRequest(config, run_dir, recorded)


def finetune(
    recipe: str | FinetuneConfig,
    cache: FeatureCache,
    runs: Path | str = "runs",
    *,
    settings: Mapping[str, Any] | None = None,
    head: RunLike | None = None,
    states: StorePath | str | None = None,
    merge: bool = False,
    trackers: Sequence[str] = ("tensorboard",),
) -> Finetuning:
    """Adapt the encoders of a cache by LoRA, by a recipe's name or by a config of your own.

    Args:
        settings: values to replace in a named recipe, such as `{"rank": 4, "segmentation.epochs": 3}`.
        head: a run on this cache whose head the segmentation stage goes on from.
        states: an image-feature store with layer `K+tokens`, for `from_states`.
        merge: write the adapted encoders as whole models of transformers, too.

    Returns:
        What came of it; `report.html` in its folder has curves and, with `head`, pictures from before and after.

    Raises:
        UsageError: the recipe or a setting is unknown, or encoders or images cannot be had.
        StoreMismatchError: the encoders do not say what the cache says.
    """
    from headstart.finetune_recipes import make_finetune_config
    from headstart.finetuning import finetune_encoders

    if settings and not isinstance(recipe, str):
        raise UsageError("settings replace values of a named recipe; a FinetuneConfig already has its own.")
    found = finetune_encoders(
        make_finetune_config(recipe, settings) if isinstance(recipe, str) else recipe,
        cache,
        runs,
        head=None if head is None else _run_dir(head),
        states=None if states is None else parse_path(states),
        merge=merge,
        trackers=trackers,
    )
    if not is_first_process():
        return found
    pictures: Sequence[BeforeAfter] = ()
    if head is not None:
        split = read_run_config(_run_dir(head))["config"]["val_split"]
        pictures = before_and_after(cache, load(head), load(found.stages["segmentation"]), split)
    write_finetune_report(found.run_dir, pictures)
    return found


def evaluate(
    runs: RunLike | Sequence[RunLike],
    cache: FeatureCache | None = None,
    *,
    split: str = "val",
    protocol: str | Protocol = ORIGINAL_SIZE,
    out: Path | str | None = None,
    coco_results: Path | str | None = None,
    seconds: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Score runs, by default at the images' original sizes, and leave `results.json`, `samples.csv` and `report.html`.

    Args:
        cache: by default the one the first run was trained on.
        protocol: how masks are made and compared, or the name of one of `evaluate.protocols.PROTOCOLS`.
        out: where all that goes; by default the folder of the only run, or `report` where there are several, or the
            cache is not the one it was trained on.
        coco_results: a .json file for the masks of the only run as COCO results.

    Returns:
        The object in results.json.

    Raises:
        UsageError: a folder is no finished run, the protocol is unknown, or the stores do not match.
    """
    listed = [runs] if isinstance(runs, Training | Path | str) else list(runs)
    run_dirs = [_run_dir(run) for run in listed]
    for run_dir in run_dirs:
        read_run_config(run_dir)
    if cache is None:
        cache = stores_of_run(run_dirs[0]).open()
    return evaluate_runs(
        run_dirs,
        cache,
        default_out(run_dirs, cache) if out is None else Path(out),
        split=split,
        protocol=find_protocol(protocol),
        coco_results=None if coco_results is None else Path(coco_results),
        notes=notes_on_encoders(cache),
        seconds=seconds,
    )


def default_out(run_dirs: Sequence[Path], cache: FeatureCache) -> Path:
    """Where `evaluate` leaves its files if nothing is said: with the run whose own they are, or in `report`.

    Raises:
        UsageError: the only folder is no run folder.
    """
    own = len(run_dirs) == 1 and read_run_config(run_dirs[0])["stores"] == cache.fingerprints
    return run_dirs[0] if own else Path("report")


def compare(
    first: RunLike,
    second: RunLike,
    cache: FeatureCache | None = None,
    *,
    split: str = "val",
    protocol: str | Protocol = ORIGINAL_SIZE,
    out: Path | str = "comparison",
) -> dict[str, Any]:
    """Score two runs on the same samples and leave `comparison.json`, `comparison.html` and `samples.csv`.

    Args:
        cache: by default the one each was trained on; their encoders may differ, the samples may not.
        protocol: see `evaluate`.

    Returns:
        The object in comparison.json: what the second run is more than the first.

    Raises:
        UsageError: a folder is no finished run, or the protocol is unknown.
        StoreMismatchError: the runs are not of the same samples.
    """
    run_dirs = _run_dir(first), _run_dir(second)
    for run_dir in run_dirs:
        read_run_config(run_dir)
    of_first, of_second = (stores_of_run(run_dir).open() if cache is None else cache for run_dir in run_dirs)
    notes = dict.fromkeys([*notes_on_encoders(of_first), *notes_on_encoders(of_second)])
    return compare_runs(
        *run_dirs,
        (of_first, of_second),
        Path(out),
        split=split,
        protocol=find_protocol(protocol),
        notes=list(notes),
    )


def load(run: RunLike, *, checkpoint: str = "best", device: str = "auto") -> Predictor:
    """A predictor from a trained run: the head, and the encoders it was trained on.

    Raises:
        UsageError: the folder is no run, or its encoders cannot be loaded.
        StoreMismatchError: the encoders are not those the run was trained on.
    """
    run_dir = _run_dir(run)
    config = read_run_config(run_dir, "encoders")
    _, head = load_head(run_dir / checkpoint)
    image_encoder, text_encoder = load_recorded_encoders(run_dir, config, device)
    dtypes = {side: config["encoders"][side]["dtype"] for side in ("image", "text")}
    return Predictor(
        head.to(pick_device(device)),
        image_encoder,
        text_encoder,
        image_dtype=dtypes["image"],
        text_dtype=dtypes["text"],
    )


def _run_dir(run: RunLike) -> Path:
    return run.run_dir if isinstance(run, Training) else Path(run)
