"""Finetuning with the encoders of a cache: how they are made live, and what a finished run records of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cache_schema import atomic
from cache_schema.atomic import StorePath
from cache_schema.errors import StoreMismatchError, UsageError
from cache_schema.features import TOKENS, FeatureCache, ImageFeatures
from cache_schema.fingerprint import fingerprint
from cache_schema.store import open_store
from heads.finetune import FinetuneConfig, Finetuning, finetune, finetune_name
from heads.live import ADAPTERS, ImageSource, LiveEncoders
from heads.runs import read_run_config
from headstart.encoders import image_spec_of_store, record_encoders, text_spec_of_store
from headstart.processes import is_first_process
from headstart.stores import StorePaths, record_stores

if TYPE_CHECKING:  # slow to import
    from extract.encoders.live import LiveImageEncoder, LiveTextEncoder
    from extract.encoders.lora import LoraSpec

MERGED = {"image": "merged_image", "text": "merged_text"}
"""The folders of a run for encoders with their adapters merged into them."""


@dataclass(frozen=True)
class HubEncoders:
    """Makes the encoders of a cache live, as a `FinetuneConfig` says.

    Where features were extracted with an adapter, that one learns on.

    Args:
        states: a store of what goes into the first adapted block, where the forward pass is to start there.
    """

    cache: FeatureCache
    config: FinetuneConfig
    states: ImageFeatures | None = None

    def frozen(self) -> LiveEncoders:
        """Those that are to be adapted, without an adapter."""
        return self._live(self._load_image(None, None), self._load_text(None, None))

    def adapted(self, adapters: Path | None, *, learn: bool) -> LiveEncoders:
        """With the adapters of a folder; or with those of the cache's own encoders, or fresh ones."""
        torch.manual_seed(next(iter(self.config.stages.values())).seed)
        lora = self.lora() if adapters is None else None
        image, text = self._load_image(lora, adapters), self._load_text(lora, adapters)
        for live in (image, text):
            if live is not None:
                live.gradient_checkpointing(self.config.gradient_checkpointing)
                if not learn:
                    live.requires_grad_(False)
        return self._live(image, text)

    def _live(self, image: LiveImageEncoder | None, text: LiveTextEncoder | None) -> LiveEncoders:
        config = self.config
        source = None if image is None else self._source(image)
        return LiveEncoders(
            self.cache, image, text, source, rate=config.adapter_rate, images_at_once=config.images_at_once
        )

    def _source(self, image: LiveImageEncoder) -> ImageSource:
        from extract.live_images import PixelSource, StateSource

        if self.states is None:
            return PixelSource(self.cache, image)
        return StateSource(self.states, self.cache)

    def _load_image(self, lora: LoraSpec | None, adapters: Path | None) -> LiveImageEncoder | None:
        from extract.encoders.live import LiveImageEncoder

        if "image" not in self.config.sides:
            return None
        store = self.cache.images.store
        spec = image_spec_of_store(store.path, store.header)
        layers = self.cache.images.grid_layers
        folder = spec.adapter if adapters is None else str(adapters / ADAPTERS["image"])
        start = self.config.first_block if self.config.from_states else None
        bare = dataclasses.replace(spec, layers=layers, adapter=None)
        return LiveImageEncoder.load(bare, lora, adapter=folder, start=start)

    def _load_text(self, lora: LoraSpec | None, adapters: Path | None) -> LiveTextEncoder | None:
        from extract.encoders.live import LiveTextEncoder

        if "text" not in self.config.sides:
            return None
        store = self.cache.prompts.store
        spec = text_spec_of_store(store.path, store.header)
        of_text = None if lora is None else dataclasses.replace(lora, first_block=0)
        folder = spec.adapter if adapters is None else str(adapters / ADAPTERS["text"])
        return LiveTextEncoder.load(dataclasses.replace(spec, adapter=None), of_text, adapter=folder)

    def lora(self) -> LoraSpec:
        """How they are adapted.

        Raises:
            UsageError: rank, alpha or dropout cannot be.
        """
        from extract.encoders.lora import LoraSpec

        config = self.config
        return LoraSpec(
            config.rank,
            config.alpha,
            config.dropout,
            config.target_modules,
            config.first_block,
            config.dora,
            config.rank_stabilised,
        )


def finetune_encoders(
    config: FinetuneConfig,
    cache: FeatureCache,
    runs: Path | str = "runs",
    *,
    head: Path | str | None = None,
    states: StorePath | None = None,
    merge: bool = False,
    trackers: Sequence[str] = ("tensorboard",),
) -> Finetuning:
    """Adapt the encoders of a cache by LoRA, in a folder under `runs` named after everything that decides the outcome.

    Where the cache was extracted with an adapter, that adapter learns on: its settings must be those of `config`.

    What is left there: a run folder for each stage, `adapter/` and `text_adapter/` for `headstart extract`, and, if
    they are to be merged, whole models beside them.

    Args:
        head: a run whose head the segmentation stage goes on from.
        states: an image-feature store with layer `K+tokens`, K being the first block that is adapted.

    Raises:
        UsageError: as `heads.finetune.finetune`.
        StoreMismatchError: live encoders do not say what the cache says, or `states` or `head` is of another cache.
    """
    if config.from_states and states is None:
        raise UsageError(
            f"from_states needs a store of what goes into block {config.first_block}: "
            f"extract it with --layers {config.first_block}{TOKENS}, and name it with --states."
        )
    tokens = None if states is None else ImageFeatures(open_store(states, "image_features"))
    if tokens is not None and not config.from_states:
        raise UsageError("a store of states is used with from_states=true alone; set that, or leave --states out.")
    initial = None if head is None else Path(head) / "best"
    if initial is not None and config.segmentation is None:
        raise UsageError("there is no segmentation stage for a trained head to go on in; leave --head out.")
    if head is not None:
        trained_on = read_run_config(Path(head))["encoder_fingerprints"]
        others = [side for side, digest in cache.encoder_fingerprints.items() if trained_on.get(side) != digest]
        if others:
            raise StoreMismatchError(
                f"the head of {head} was trained on features of another {' and '.join(others)} encoder than this cache "
                "holds; name a head that was trained on these stores."
            )
    encoders = HubEncoders(cache, config, tokens)
    encoders.lora()  # what cannot be is refused before anything is written
    run_dir = Path(runs) / finetune_name(config, cache, initial)
    paths = StorePaths(cache.samples.path, cache.images.store.path, cache.prompts.store.path)
    stage_dir = run_dir / "contrastive"  # paths are relative to a stage's folder
    recorded = {"encoders": record_encoders(cache, stage_dir), "store_paths": record_stores(paths, stage_dir)}
    found = finetune(config, cache, encoders, run_dir, head=initial, recorded=recorded, trackers=trackers)
    if is_first_process():
        for name in found.stages:
            _record_adapted(encoders, run_dir / name)
        if merge:
            _merge(encoders, run_dir)
    return found


def _record_adapted(encoders: HubEncoders, run_dir: Path) -> None:
    """Say in a stage's config.json what its head was trained on: the encoders with the stage's best adapters."""
    live = encoders.adapted(run_dir, learn=False)
    path = run_dir / "config.json"
    config: dict[str, Any] = json.loads(path.read_bytes())
    for side, encoder in _sides(live).items():
        config["encoder_fingerprints"][side] = fingerprint(encoder.identity)
        config["encoders"][side]["adapter"] = ADAPTERS[side]
    atomic.write_json(path, config)


def _merge(encoders: HubEncoders, run_dir: Path) -> None:
    for side, encoder in _sides(encoders.adapted(run_dir, learn=False)).items():
        folder = run_dir / MERGED[side]
        if not folder.exists():
            encoder.save_merged(folder)


def _sides(live: LiveEncoders) -> Mapping[str, Any]:
    return live.sides
