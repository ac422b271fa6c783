"""Masks, views, attention outputs and int8 tokens are what docs/cache-format.md says."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cache_schema.features import ImageFeatures
from cache_schema.masks import encode_mask
from cache_schema.quantize import quantize
from cache_schema.store import open_store
from cache_schema.views import ASPECTS, MAX_WINDOWS, PADDING_RGB, View, fit_view, make_views
from tests.cache_schema.document import codes, name_of
from tests.cache_schema.format.rules import PAGE, rows_by_image
from tests.cache_schema.format.stores import Stores, ZarrStore

if TYPE_CHECKING:
    from numpy.typing import NDArray


def test_the_example_of_a_target_mask_holds() -> None:
    *rows, runs, counts = PAGE.block("Target masks", "mask").splitlines()
    mask = np.array([[cell == "1" for cell in row.split()] for row in rows])
    assert encode_mask(mask).decode() == counts.removeprefix("bytes ")
    changes = np.flatnonzero(np.diff(mask.T.reshape(-1), prepend=False)).tolist()
    assert np.diff([0, *changes, mask.size]).tolist() == [int(run) for run in runs.split()[1:]]


def test_the_examples_of_views_hold() -> None:
    assert str(PADDING_RGB) in PAGE.text
    assert f"No image has more than {MAX_WINDOWS} of them." in PAGE.text
    digest = hashlib.sha256(b"").hexdigest()
    assert f"`{digest}`" in PAGE.text
    rows = PAGE.tables["Views"]
    ((height, width),) = {tuple(numbers(row["size"])) for row in rows}
    specs = list(dict.fromkeys(name_of(row) for row in rows))
    assert [int(row["row"]) for row in rows] == [*range(len(rows))]
    assert [numbers(row["box and flip"]) for row in rows] == [
        list(view.to_row()) for view in make_views(specs, (height, width), digest)
    ]


def test_the_examples_of_what_an_encoder_sees_hold() -> None:
    rows = PAGE.tables["What the encoder sees"]
    assert {codes(row["aspect"])[0] for row in rows} == set(ASPECTS)
    for row in rows:
        height, width = numbers(row["input size"])
        aspect: Any = codes(row["aspect"])[0]
        fitted = fit_view(View.from_row(numbers(row["view"])), (height, width), aspect)
        assert numbers(row["row of `view`"]) == list(fitted.to_row())


def numbers(cell: str) -> list[int]:
    return [int(number) for number in cell.split(",")]


def test_rows_are_the_views_that_the_identity_names_as_the_encoder_sees_them(stores: Stores) -> None:
    seen = set()
    for path in (store.path for store in stores.of_kind("image_features")):
        opened = open_store(path)
        images, sizes, identity = ImageFeatures(opened), opened.read("original_size").tolist(), opened.header.identity
        preprocessing = identity["encoder"]["preprocessing"]
        height, width = preprocessing["input_size"]
        groups = rows_by_image(images)
        assert len({images.ids[rows[0]] for rows in groups}) == len(groups) == 24
        for number, rows in enumerate(groups):
            asked = make_views(identity["views"], tuple(sizes[rows[0]]), images.sha256[rows[0]])
            shown = [fit_view(view, (height, width), preprocessing["aspect"]) for view in asked]
            assert [images.views[row] for row in rows] == shown
            assert images.rows_of_image(number) == range(rows[0], rows[-1] + 1)
        seen.add((preprocessing["aspect"], len({len(rows) for rows in groups}) > 1))
    assert {aspect for aspect, _ in seen} == set(ASPECTS)
    assert {uneven for _, uneven in seen} == {False, True}, "images with unequal numbers of windows, too"


def test_attention_outputs_are_pooled_as_the_document_says(with_attention: Path) -> None:
    images = ImageFeatures(open_store(with_attention))
    logits, heads, mean = (images.attention(name).read() for name in ("logits", "head_tokens", "mean_token"))
    patches = images.features("last").read().reshape(len(logits), -1, heads.shape[-1])
    flat = logits.reshape(*logits.shape[:2], -1).astype(np.float64)

    def pool(weighing: NDArray[np.float64]) -> NDArray[np.float64]:
        weights = np.exp(weighing - weighing.max(-1, keepdims=True))
        return (weights / weights.sum(-1, keepdims=True)) @ patches / patches.shape[1]

    np.testing.assert_allclose(heads, pool(flat), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(mean, pool(flat.mean(1, keepdims=True))[:, 0], rtol=1e-4, atol=1e-6)


def test_int8_tokens_and_scales_follow_the_documents_rule() -> None:
    tokens = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32) * np.float32(3)
    tokens[0] = 0
    values, scales = quantize(tokens)
    for token, value, scale in zip(tokens, values, scales, strict=True):
        exact = np.abs(token).max() / np.float32(127)
        assert scale >= exact
        assert scale == 0 or np.nextafter(scale, np.float16(0)) < exact
        expected = np.rint(token / np.float32(scale)) if scale else np.zeros(8)
        np.testing.assert_array_equal(value, expected)
        assert (np.abs(value * np.float32(scale) - token) <= np.float32(scale) / 2 * (1 + 1e-5)).all()


def test_a_row_that_is_not_valid_holds_zeros_and_every_other_value_is_finite(stores: Stores, int8_images: Path) -> None:
    failed = {failure["row"] for failure in ZarrStore(int8_images).ledger}
    opened = open_store(int8_images)
    assert set(np.flatnonzero(~opened.read("valid")).tolist()) == failed
    for name in opened.layouts:
        if name.startswith(("features/", "scale/", "cls/", "attention/")):
            values = opened.read(name)
            assert not values[sorted(failed)].any()
            assert np.isfinite(values).all()
