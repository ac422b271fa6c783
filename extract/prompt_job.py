"""The prompt extraction job: one text encoder over the unique prompts of a samples store."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_schema.atomic import StorePath
from cache_schema.errors import UsageError, require_at_least, unknown_name
from cache_schema.fingerprint import digest_strings
from cache_schema.layout import ArrayLayout
from cache_schema.ragged import Offsets, offsets_of
from cache_schema.samples import open_samples, string_arrays
from cache_schema.shards import ShardBuffer
from cache_schema.store import COMMIT_THREADS, StaticArray, StoreHeader, StoreWriter
from extract.batches import BatchSize
from extract.encoders.protocols import TextEncoder, TextEncoding
from extract.job import EncodedUnit, Extraction, Unit, recorded_provenance, run_job
from extract.stages import StageClock

TOKENS_PER_CHUNK = 32
DTYPES = ("float16", "float32")

_TOKENIZED_AT_ONCE = 4096
"""Token ids are lists only for so many prompts at a time: a list takes twenty times the room of an array."""


@dataclass(frozen=True)
class PromptJobConfig:
    """Which samples store's prompts to encode, where the feature store goes, and how it is cut.

    Args:
        batch_size: prompts in one forward pass.
        unit_prompts: prompts in one unit of work.
        shard_tokens: token features in one shard file.
    """

    samples: StorePath
    out: StorePath
    dtype: str = "float16"
    batch_size: int = 128
    unit_prompts: int = 4096
    shard_tokens: int = 4096

    def __post_init__(self) -> None:
        require_at_least(self, 1, "batch_size", "unit_prompts", "shard_tokens")
        if self.shard_tokens % TOKENS_PER_CHUNK:
            raise UsageError(f"shard_tokens is {self.shard_tokens}: give a multiple of {TOKENS_PER_CHUNK}.")
        if self.dtype not in DTYPES:
            raise unknown_name("dtype", self.dtype, DTYPES)


class PromptJob:
    """One prompt-feature store in the making.

    A unit of work owns whole files: the pooled features of its own prompts, and every token shard that *begins*
    among its tokens. Where the last of those ends among the prompts of the next unit, these are encoded by both.

    Args:
        prompts: the prompts, if not all of the samples store.

    Raises:
        UsageError: the samples store is missing.
    """

    def __init__(self, config: PromptJobConfig, encoder: TextEncoder, prompts: Sequence[str] | None = None) -> None:
        prompts = open_samples(config.samples).samples.prompts if prompts is None else prompts
        self._prompts = prompts
        self._config = config
        self._encoder = encoder
        self._token_ids, self._offsets = _tokenize(encoder, prompts)
        self._batch_size = BatchSize(config.batch_size)
        self._encoder_lock = threading.Lock()
        self.writer = _make_writer(config, prompts, self._token_ids, self._offsets, encoder)
        self.num_items = len(prompts)
        self.items_per_unit = config.unit_prompts
        self.label = f"encoding prompts with {Path(encoder.name).name}"
        self.noun = "prompt"
        self.clock = StageClock({"write": COMMIT_THREADS})

    def encode(self, units: Sequence[Unit]) -> Generator[EncodedUnit, None, None]:
        """Each unit encoded, in order.

        Raises:
            UsageError: a feature does not fit the data type.
        """
        for unit in units:
            yield EncodedUnit(unit, self._encode_unit(unit), (), self._batch_size.size)

    def probe(self, out: StorePath, num_items: int, unit_items: int, seed: int) -> PromptJob:
        """The same job on prompts drawn at random."""
        num_prompts = min(len(self._prompts), num_items)
        drawn = np.sort(np.random.default_rng(seed).choice(len(self._prompts), num_prompts, replace=False))
        config = replace(
            self._config,
            out=out,
            unit_prompts=unit_items,
            shard_tokens=max(1, self._config.shard_tokens * unit_items // self._config.unit_prompts // TOKENS_PER_CHUNK)
            * TOKENS_PER_CHUNK,
            batch_size=min(self._config.batch_size, unit_items),
        )
        return PromptJob(config, self._encoder, [self._prompts[row] for row in drawn])

    def _encode_unit(self, unit: Unit) -> dict[tuple[str, int], NDArray[Any] | ShardBuffer]:
        """The shards a unit owns."""
        offsets, step, num_tokens = self._offsets, self._config.shard_tokens, int(self._offsets[-1])
        first_token, last_token = int(offsets[unit.rows.start]), int(offsets[unit.rows.stop])
        token_shards = range(-(-first_token // step), -(-last_token // step))
        end_of_tokens = min(token_shards.stop * step, num_tokens) if token_shards else last_token
        last_prompt = max(unit.rows.stop, int(np.searchsorted(offsets, end_of_tokens, "left")))
        tokens, pooled = self._encode_prompts(range(unit.rows.start, last_prompt))
        shards: dict[tuple[str, int], NDArray[Any] | ShardBuffer] = {("pooled", unit.number): pooled[: len(unit.rows)]}
        for shard in token_shards:
            stop = min((shard + 1) * step, num_tokens)
            shards["tokens", shard] = tokens[shard * step - first_token : stop - first_token]
        return shards

    def _encode_prompts(self, prompts: range) -> tuple[NDArray[Any], NDArray[Any]]:
        """(L, D) token features end to end and (M, P) pooled features, computed in batches of like lengths."""
        dtype, offsets = np.dtype(self._config.dtype), self._offsets[prompts.start : prompts.stop + 1]
        tokens = np.empty((int(offsets[-1] - offsets[0]), self._encoder.token_width), dtype)
        pooled = np.empty((len(prompts), self._encoder.pooled_width), dtype)
        by_length = np.argsort(np.diff(offsets), kind="stable").tolist()
        token_ids = [self._token_ids[start:stop] for start, stop in pairwise(offsets.tolist())]
        offsets = offsets - offsets[0]

        def forward(batch: slice) -> TextEncoding:
            with self._encoder_lock, self.clock.at_work("forward", len(by_length[batch])):
                encoding = self._encoder.encode([token_ids[row].tolist() for row in by_length[batch]])
                return TextEncoding(*(tensor.cpu() for tensor in (encoding.tokens, encoding.mask, encoding.pooled)))

        for batch, encoding in self._batch_size.run(forward, len(by_length)):
            rows = by_length[batch]
            with self.clock.at_work("copy", len(rows)), np.errstate(over="ignore"):
                pooled[rows] = encoding.pooled.float().numpy()
                for row, values, mask in zip(rows, encoding.tokens.float().numpy(), encoding.mask.numpy(), strict=True):
                    tokens[offsets[row] : offsets[row + 1]] = values[mask]
        for name, features in (("token", tokens), ("pooled", pooled)):
            if not np.isfinite(features).all():
                remedy = (
                    "compute in float32 (--precision)" if dtype == np.float32 else "store them as float32 (--dtype)"
                )
                raise UsageError(f"{self._encoder.name} gave {name} features that {dtype.name} cannot hold; {remedy}.")
        return tokens, pooled


def extract_prompts(
    config: PromptJobConfig, encoder: TextEncoder, *, repair: Path | None = None, overcommit: bool = False
) -> Extraction:
    """Encode every unique prompt of a samples store, once. Safe to kill, to repeat, and to run twice at once.

    Args:
        repair: a store of which every file is to be checked against its digest, and made again where it differs.
        overcommit: begin even where the disk has less room than the store will need.

    Raises:
        UsageError: the samples store is missing, or a feature does not fit the data type.
        StoreMismatchError: this job makes another store than the one to repair.
        NoRoomError: the disk has too little room.
    """
    return run_job(PromptJob(config, encoder), repair=repair, overcommit=overcommit)


def _tokenize(encoder: TextEncoder, prompts: Sequence[str]) -> tuple[NDArray[np.int32], Offsets]:
    """The token ids of all prompts end to end, and where each one's begin."""
    parts, lengths = [np.empty(0, np.int32)], list[int]()
    for start in range(0, len(prompts), _TOKENIZED_AT_ONCE):
        token_ids = encoder.tokenize(prompts[start : start + _TOKENIZED_AT_ONCE])
        parts.append(np.fromiter(chain.from_iterable(token_ids), np.int32))
        lengths += map(len, token_ids)
    return np.concatenate(parts), offsets_of(lengths)


def _make_writer(
    config: PromptJobConfig,
    prompts: Sequence[str],
    token_ids: NDArray[np.int32],
    offsets: Offsets,
    encoder: TextEncoder,
) -> StoreWriter:
    dtype, num_tokens = np.dtype(config.dtype), int(offsets[-1])
    layouts = [
        ArrayLayout(
            "tokens",
            (num_tokens, encoder.token_width),
            dtype,
            TOKENS_PER_CHUNK,
            config.shard_tokens,
            ("token", "channel"),
        ),
        ArrayLayout(
            "pooled",
            (len(prompts), encoder.pooled_width),
            dtype,
            config.unit_prompts,
            config.unit_prompts,
            ("prompt", "pooled_channel"),
        ),
    ]
    static = [
        *string_arrays("prompt/text", prompts, "prompt"),
        StaticArray("offsets", offsets, ("prompt_start",)),
        StaticArray("token_ids", token_ids, ("token",)),
    ]
    identity = {
        "encoder": encoder.identity,
        "dtype": dtype.name,
        "unit_prompts": config.unit_prompts,
        "shard_tokens": config.shard_tokens,
        "prompts": digest_strings(prompts),
    }
    header = StoreHeader("prompt_features", identity, {})
    recorded = recorded_provenance(
        encoder, config.samples, len(prompts), config.batch_size, config.out / header.folder_name
    )
    return StoreWriter(config.out, replace(header, recorded=recorded), layouts, static)
