"""Stores are joined by what images and prompts are, not by where they stand, and never when one does not fit."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache_schema.errors import StoreMismatchError, UsageError
from cache_schema.features import FeatureCache, ImageFeatures, open_cache
from cache_schema.fingerprint import fingerprint
from cache_schema.layout import ArrayLayout
from cache_schema.masks import Size, empty_mask
from cache_schema.ragged import offsets_of
from cache_schema.samples import ImageTable, Samples, digest_array, string_arrays, write_samples
from cache_schema.store import StaticArray, StoreHeader, StoreWriter, open_store
from cache_schema.views import View, make_views

IMAGES = ("a", "b", "c", "d", "e")
PROMPTS = ("one", "two", "three", "four")


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_task(parent: Path, images: Sequence[str], prompts: Sequence[str], digests: Sequence[str] = ()) -> Path:
    """A samples store with one sample for each pair of an image and a prompt; every second image is for validation."""
    num = len(images) * len(prompts)
    image_rows, prompt_rows = np.divmod(np.arange(num, dtype=np.int32), len(prompts))
    samples = Samples(
        images=ImageTable(
            images,
            [f"{image}.png" for image in images],
            np.full((len(images), 2), 4, np.int32),
            digests or [sha256_of(image) for image in images],
        ),
        prompts=prompts,
        ids=[str(row) for row in range(num)],
        image_rows=image_rows,
        prompt_rows=prompt_rows.astype(np.int32),
        targets=[empty_mask((4, 4))] * num,
        no_target=np.ones(num, np.bool_),
        splits=["val" if row % 2 else "train" for row in image_rows],
        tags={},
    )
    return write_samples(parent, samples, dataset="pairs", sources={}, image_dir=parent, libraries={})[0]


def write_images(
    parent: Path,
    images: Sequence[str],
    invalid: Sequence[str] = (),
    views: Sequence[str] = ("whole",),
    layers: Sequence[str] = ("last",),
    cls: Sequence[str] = ("last",),
    attention: Sequence[str] = (),
) -> Path:
    """An image-feature store in which every feature of row n is n, and which holds rows for each view of an image.

    Every image is as high as its place in the alphabet and 4 pixels wide, so that images differ in their windows.
    """
    shown = [make_views(views, size_of(image), sha256_of(image)) for image in images]
    rows = [image for image, of_image in zip(images, shown, strict=True) for _ in of_image]
    num = len(rows)
    layouts = [
        ArrayLayout("valid", (num,), np.dtype(np.bool_), 2, 2, ("view",)),
        *(
            ArrayLayout(f"features/{layer}", (num, 2, 2, 3), np.dtype(np.float16), 1, 2, ("view", "h", "w", "d"))
            for layer in layers
        ),
        *(ArrayLayout(f"cls/{layer}", (num, 3), np.dtype(np.float16), 2, 2, ("view", "d")) for layer in cls),
        *(ArrayLayout(f"attention/{name}", (num, 2), np.dtype(np.float16), 1, 2, ("view", "d")) for name in attention),
    ]
    static = [
        *string_arrays("image/id", rows, "view"),
        StaticArray("image/sha256", digest_array([sha256_of(image) for image in rows]), ("view", "byte")),
        StaticArray(
            "view", np.array([view.to_row() for of_image in shown for view in of_image], np.int32), ("view", "box")
        ),
    ]
    identity = {
        "encoder": {"name": "fake"},
        "outputs": {"layers": list(layers), "cls": list(cls), "attention": list(attention)},
        "views": list(views),
        "images": list(images),
    }
    writer = StoreWriter(parent, StoreHeader("image_features", identity, {}), layouts, static)
    writer.begin()
    valid = np.array([image not in invalid for image in rows])
    units = []
    for shard in range(layouts[0].num_shards):
        part = layouts[0].rows_of_shard(shard)
        units.append(f"{shard:06d}")
        shards = {("valid", shard): valid[part.start : part.stop]}
        for layout in layouts[1:]:
            values = np.arange(part.start, part.stop, dtype=layout.dtype)
            values = values.reshape(-1, *(1 for _ in layout.shape[1:]))
            shards[layout.name, shard] = np.broadcast_to(values, (len(part), *layout.shape[1:]))
        writer.commit(units[-1], (part.start, part.stop), shards)
    writer.finish(units)
    return writer.path


def size_of(image: str) -> Size:
    return (ord(image[0]) - ord("a") + 1, 4)


def write_prompts(parent: Path, prompts: Sequence[str]) -> Path:
    """A prompt-feature store in which prompt number n has n + 1 tokens, all of them n."""
    num = len(prompts)
    tokens = np.repeat(np.arange(num, dtype=np.float16), np.arange(1, num + 1))[:, None]
    static = [
        *string_arrays("prompt/text", prompts, "prompt"),
        StaticArray("offsets", offsets_of(range(1, num + 1)), ("prompt_start",)),
        StaticArray("tokens", tokens, ("token", "channel")),
        StaticArray("pooled", np.arange(num, dtype=np.float16)[:, None], ("prompt", "channel")),
    ]
    identity = {"encoder": {"name": "fake text"}, "prompts": list(prompts)}
    writer = StoreWriter(parent, StoreHeader("prompt_features", identity, {}), (), static)
    writer.begin()
    writer.finish(())
    return writer.path


def test_stores_of_the_same_images_and_prompts_are_joined_row_by_row(tmp_path: Path) -> None:
    cache = open_cache(
        write_task(tmp_path, IMAGES, PROMPTS), write_images(tmp_path, IMAGES), write_prompts(tmp_path, PROMPTS)
    )
    assert cache.image_rows.tolist() == [0, 1, 2, 3, 4]
    assert cache.prompt_rows.tolist() == [0, 1, 2, 3]
    assert cache.images.layers == ("last",)
    assert cache.images.features("last").shape == (5, 2, 2, 3)
    assert cache.images.cls("last").shape == (5, 3)
    assert cache.images.ids == list(IMAGES)
    assert cache.prompts.prompts == list(PROMPTS)
    assert cache.prompts.offsets.tolist() == [0, 1, 3, 6, 10]
    assert cache.prompts.tokens().shape == (10, 1)
    assert cache.prompts.pooled().shape == (4, 1)


def test_rows_of_larger_stores_in_another_order_are_found(tmp_path: Path) -> None:
    samples = write_task(tmp_path, ["d", "a", "c"], ["three", "one"])
    cache = open_cache(samples, write_images(tmp_path, IMAGES), write_prompts(tmp_path, PROMPTS))
    assert cache.image_rows.tolist() == [3, 0, 2]
    assert cache.prompt_rows.tolist() == [2, 0]
    assert cache.images.features("last").read(cache.image_rows)[:, 0, 0, 0].tolist() == [3, 0, 2]
    assert cache.prompts.pooled()[cache.prompt_rows, 0].tolist() == [2, 0]


def test_of_an_image_with_several_views_the_whole_is_found_and_the_others_follow_it(tmp_path: Path) -> None:
    samples = write_task(tmp_path, ["d", "a", "c"], PROMPTS)
    images = write_images(tmp_path, IMAGES, invalid=["a"], views=["whole", "flip", "scale-2"])
    cache = open_cache(samples, images, write_prompts(tmp_path, PROMPTS))
    assert cache.images.view_specs == cache.images.fixed_specs == ("whole", "flip", "scale-2")
    assert cache.image_rows.tolist() == [9, 0, 6]
    assert [cache.images.views[row].flip for row in (9, 10, 11)] == [False, True, False]
    assert cache.images.views[9] == View((0, 0, 4, 4), flip=False)
    assert cache.images.rows_of_image(3) == range(9, 12)
    assert [cache.images.ids[row] for row in cache.image_rows] == ["d", "a", "c"]
    assert cache.usable_samples("val").tolist() == []
    assert cache.usable_samples("train").tolist() == [*range(4), *range(8, 12)]


def test_images_with_unequal_numbers_of_windows_are_found_by_where_they_start(tmp_path: Path) -> None:
    samples = write_task(tmp_path, ["d", "a", "c", "b"], PROMPTS)
    images = write_images(tmp_path, IMAGES, invalid=["c"], views=["whole", "flip", "windows-1-1"])
    cache = open_cache(samples, images, write_prompts(tmp_path, PROMPTS))
    assert cache.images.view_specs == ("whole", "flip", "windows-1-1")
    assert cache.images.fixed_specs == ("whole", "flip")
    num_windows = [4, 2, 2, 1, 2]  # of images that are 1 to 5 high and 4 wide
    first = [sum(2 + num for num in num_windows[:image]) for image in range(6)]
    assert [cache.images.rows_of_image(image) for image in range(5)] == [
        range(start, stop) for start, stop in itertools.pairwise(first)
    ]
    assert cache.image_rows.tolist() == [first[3], first[0], first[2], first[1]]
    for image, row in zip(["d", "a", "c", "b"], cache.image_rows.tolist(), strict=True):
        rows = cache.images.rows_of_image(IMAGES.index(image))
        assert {cache.images.ids[other] for other in rows} == {image}
        assert [cache.images.views[other] for other in rows] == make_views(
            cache.images.view_specs, size_of(image), sha256_of(image)
        )
        assert cache.images.features("last").read([row])[0, 0, 0, 0] == row
    assert cache.usable_samples("train").tolist() == [*range(4)], "those of d; c failed, and a and b are for validation"


def test_a_store_may_hold_cls_tokens_and_attention_alone(tmp_path: Path) -> None:
    path = write_images(tmp_path, IMAGES, layers=(), cls=("last",), attention=("head_tokens", "mean_token"))
    cache = open_cache(write_task(tmp_path, IMAGES, PROMPTS), path, write_prompts(tmp_path, PROMPTS))
    assert cache.images.layers == ()
    assert cache.images.cls_layers == ("last",)
    assert cache.images.attention_outputs == ("head_tokens", "mean_token")
    assert cache.images.cls("last").read([3])[0].tolist() == [3, 3, 3]
    for name in cache.images.attention_outputs:
        assert cache.images.attention(name).read([4])[0].tolist() == [4, 4]


def test_layers_without_a_cls_token_have_none(tmp_path: Path) -> None:
    images = ImageFeatures(open_store(write_images(tmp_path, IMAGES, layers=("1", "last"), cls=())))
    assert images.layers == ("1", "last")
    assert images.cls_layers == images.attention_outputs == ()
    with pytest.raises(UsageError, match="has no array 'cls/last'"):
        images.cls("last")


def test_scales_are_there_only_where_features_are_int8(feature_cache: FeatureCache) -> None:
    assert feature_cache.images.scale("last") is None


def test_a_part_of_a_real_dataset_is_joined_with_the_features_of_the_whole(
    feature_cache: FeatureCache, tmp_path: Path
) -> None:
    whole = feature_cache.samples.samples
    picked = np.array([17, 3, 40, 3 * 4])
    samples = replace(
        whole,
        images=ImageTable(
            [whole.images.ids[row] for row in whole.image_rows[picked]],
            [whole.images.paths[row] for row in whole.image_rows[picked]],
            whole.images.sizes[whole.image_rows[picked]],
            [whole.images.sha256[row] for row in whole.image_rows[picked]],
        ),
        prompts=[whole.prompts[row] for row in whole.prompt_rows[picked]],
        ids=[whole.ids[row] for row in picked],
        image_rows=np.arange(4, dtype=np.int32),
        prompt_rows=np.arange(4, dtype=np.int32),
        targets=[whole.targets[row] for row in picked],
        no_target=whole.no_target[picked],
        splits=[whole.splits[row] for row in picked],
        tags={},
    )
    path, _ = write_samples(tmp_path, samples, dataset="part", sources={}, image_dir=tmp_path, libraries={})
    cache = open_cache(path, feature_cache.images.store.path, feature_cache.prompts.store.path)
    assert [cache.images.ids[row] for row in cache.image_rows] == samples.images.ids
    assert [cache.prompts.prompts[row] for row in cache.prompt_rows] == samples.prompts


@pytest.mark.parametrize(
    ("images", "prompts", "complaint"),
    [
        (["a", "x", "y"], PROMPTS, r"2 of 3 images of samples-.* have no features in image_.*\(first: 'x'\)"),
        (IMAGES, ["one", "none"], r"1 of 2 prompts of samples-.* have no features in prompt_.*'none'\)"),
        (IMAGES, ["One"], "'One'"),
    ],
)
def test_what_has_no_features_is_counted_and_the_first_is_named(
    tmp_path: Path, images: Sequence[str], prompts: Sequence[str], complaint: str
) -> None:
    samples = write_task(tmp_path, images, prompts)
    with pytest.raises(StoreMismatchError, match=complaint) as caught:
        open_cache(samples, write_images(tmp_path, IMAGES), write_prompts(tmp_path, PROMPTS))
    assert str(caught.value).endswith(
        "Extract features for these samples, or name the stores that were extracted from them."
    )


def test_features_of_an_image_that_had_other_bytes_do_not_fit(tmp_path: Path) -> None:
    samples = write_task(tmp_path, ["a", "b"], PROMPTS, digests=[sha256_of("a"), sha256_of("b, edited")])
    with pytest.raises(StoreMismatchError, match=r"1 of 2 images .*\(first: 'b'\)"):
        open_cache(samples, write_images(tmp_path, IMAGES), write_prompts(tmp_path, PROMPTS))


def test_stores_given_in_the_wrong_place_are_refused(feature_cache: FeatureCache) -> None:
    samples, images, prompts = (
        store.path for store in (feature_cache.samples, feature_cache.images.store, feature_cache.prompts.store)
    )
    for order in ((images, samples, prompts), (samples, prompts, images), (samples, images, samples)):
        with pytest.raises(UsageError, match="is a store of"):
            open_cache(*order)


def test_usable_samples_are_those_whose_image_could_be_encoded(tmp_path: Path) -> None:
    samples = write_task(tmp_path, ["e", "d", "c", "b", "a"], ["one", "two"])
    images = write_images(tmp_path, IMAGES, invalid=["b", "c"])
    cache = open_cache(samples, images, write_prompts(tmp_path, PROMPTS))
    assert cache.samples.samples.rows_of_split("train").tolist() == [0, 1, 4, 5, 8, 9]
    assert cache.usable_samples("train").tolist() == [0, 1, 8, 9]
    assert cache.samples.samples.rows_of_split("val").tolist() == [2, 3, 6, 7]
    assert cache.usable_samples("val").tolist() == [2, 3]
    with pytest.raises(UsageError, match="unknown split 'test'"):
        cache.usable_samples("test")


def test_fingerprints_tell_the_stores_and_the_encoders(tmp_path: Path, feature_cache: FeatureCache) -> None:
    samples = write_task(tmp_path, IMAGES, PROMPTS)
    cache = open_cache(samples, write_images(tmp_path, IMAGES), write_prompts(tmp_path, PROMPTS))
    assert cache.fingerprints == {
        "samples": cache.samples.fingerprint,
        "image_features": cache.images.store.header.fingerprint,
        "prompt_features": cache.prompts.store.header.fingerprint,
    }
    assert cache.encoder_fingerprints == {
        "image": fingerprint({"name": "fake"}),
        "text": fingerprint({"name": "fake text"}),
    }
    more = open_cache(samples, write_images(tmp_path, [*IMAGES, "f"]), write_prompts(tmp_path, PROMPTS))
    assert more.encoder_fingerprints == cache.encoder_fingerprints
    assert more.fingerprints != cache.fingerprints
    assert not set(feature_cache.encoder_fingerprints.values()) & set(cache.encoder_fingerprints.values())


def test_real_stores_hold_no_absolute_path(feature_cache: FeatureCache, workspace: Path) -> None:
    folder = feature_cache.images.store.path.parent
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 60
    assert not [file for file in files if str(workspace).encode() in file.read_bytes()]
