"""The prompt extraction job: one text encoder over the unique prompts of a samples store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
from cache_schema.store import StaticArray, StoreHeader, StoreWriter
from extract.encoders.protocols import TextEncoder
from extract.job import EncodedUnit, Extraction, Unit, recorded_provenance, run_job

TOKENS_PER_CHUNK = 32
DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class PromptJobConfig:
    """Which samples store's prompts to encode, where the feature store goes, and how it is cut.

    Args:
        batch_size: prompts in one forward pass.
        unit_prompts: prompts in one unit of work, which a killed job loses at most.
        shard_tokens: token features in one shard file.
    """

    samples: StorePath
    out: StorePath
    dtype: str = "float16"
    batch_size: int = 128
    unit_prompts: int = 1024
    shard_tokens: int = 4096

    def __post_init__(self) -> None:
        require_at_least(self, 1, "batch_size", "unit_prompts", "shard_tokens")
        if self.shard_tokens % TOKENS_PER_CHUNK:
            raise UsageError(f"shard_tokens is {self.shard_tokens}: give a multiple of {TOKENS_PER_CHUNK}.")
        if self.dtype not in DTYPES:
            raise unknown_name("dtype", self.dtype, DTYPES)


def extract_prompts(config: PromptJobConfig, encoder: TextEncoder, *, repair: Path | None = None) -> Extraction:
    """Encode every unique prompt of a samples store, once. Safe to kill, to repeat, and to run twice at once.

    A unit of work owns whole files: the pooled features of its own prompts, and every token shard that *begins*
    among its tokens. Where the last of those ends among the prompts of the next unit, these are encoded by both.

    Args:
        repair: a store of which every file is to be checked against its digest, and made again where it differs.

    Raises:
        UsageError: the samples store is missing, or a feature does not fit the data type.
        StoreMismatchError: this job makes another store than the one to repair.
    """
    prompts = open_samples(config.samples).samples.prompts
    token_ids = encoder.tokenize(prompts)
    offsets = offsets_of(map(len, token_ids))
    writer = _make_writer(config, prompts, token_ids, offsets, encoder)

    def encode(pending: Sequence[Unit]) -> Iterator[EncodedUnit]:
        for unit in pending:
            yield EncodedUnit(unit, _encode_unit(config, encoder, token_ids, offsets, unit))

    label = f"encoding prompts with {Path(encoder.name).name}"
    return run_job(writer, len(prompts), config.unit_prompts, encode, label=label, noun="prompt", repair=repair)


def _make_writer(
    config: PromptJobConfig, prompts: Sequence[str], token_ids: list[list[int]], offsets: Offsets, encoder: TextEncoder
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
        StaticArray("token_ids", np.array([token for ids in token_ids for token in ids], np.int32), ("token",)),
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
        encoder.name, config.samples, len(prompts), config.batch_size, config.out / header.folder_name
    )
    return StoreWriter(config.out, replace(header, recorded=recorded), layouts, static)


def _encode_unit(
    config: PromptJobConfig, encoder: TextEncoder, token_ids: list[list[int]], offsets: Offsets, unit: Unit
) -> dict[tuple[str, int], NDArray[Any]]:
    """The shards a unit owns."""
    step, num_tokens = config.shard_tokens, int(offsets[-1])
    first_token, last_token = int(offsets[unit.rows.start]), int(offsets[unit.rows.stop])
    token_shards = range(-(-first_token // step), -(-last_token // step))
    end_of_tokens = min(token_shards.stop * step, num_tokens) if token_shards else last_token
    last_prompt = max(unit.rows.stop, int(np.searchsorted(offsets, end_of_tokens, "left")))
    tokens, pooled = _encode_prompts(config, encoder, token_ids[unit.rows.start : last_prompt])
    shards: dict[tuple[str, int], NDArray[Any]] = {("pooled", unit.number): pooled[: len(unit.rows)]}
    for shard in token_shards:
        stop = min((shard + 1) * step, num_tokens)
        shards["tokens", shard] = tokens[shard * step - first_token : stop - first_token]
    return shards


def _encode_prompts(
    config: PromptJobConfig, encoder: TextEncoder, token_ids: list[list[int]]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """(L, D) token features end to end and (M, P) pooled features, computed in batches of like lengths."""
    dtype, offsets = np.dtype(config.dtype), offsets_of(map(len, token_ids))
    tokens = np.empty((int(offsets[-1]), encoder.token_width), dtype)
    pooled = np.empty((len(token_ids), encoder.pooled_width), dtype)
    by_length = sorted(range(len(token_ids)), key=lambda row: len(token_ids[row]))
    for start in range(0, len(by_length), config.batch_size):
        rows = by_length[start : start + config.batch_size]
        encoding = encoder.encode([token_ids[row] for row in rows])
        with np.errstate(over="ignore"):
            pooled[rows] = encoding.pooled.float().cpu().numpy()
            for row, values, mask in zip(rows, encoding.tokens.float().cpu(), encoding.mask.cpu(), strict=True):
                tokens[offsets[row] : offsets[row + 1]] = values[mask].numpy()
    for name, values in (("token", tokens), ("pooled", pooled)):
        if not np.isfinite(values).all():
            raise UsageError(
                f"{encoder.name} gave {name} features that {dtype.name} cannot hold; store them as float32."
            )
    return tokens, pooled
