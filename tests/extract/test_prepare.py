"""The prepare stage turns any dataset that can be read into one samples store, and says what is wrong with the rest."""

from __future__ import annotations

import io
import json
import re
import shutil
import struct
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np
import pytest
from PIL import Image

from cache_schema.errors import UsageError
from cache_schema.fingerprint import digest_file
from cache_schema.masks import decode_mask, empty_mask, encode_mask
from cache_schema.samples import open_samples, write_samples
from cache_schema.store import open_store
from extract.datasets import DATASETS
from extract.datasets.faults import AnnotationError
from extract.datasets.records import Counted, Dataset, DatasetReader, SampleRecord, Source
from extract.datasets.scenes import open_scenes
from extract.prepare import PrepareConfig, check, prepare

SIZE = (6, 8)
TARGET = encode_mask(np.eye(*SIZE) > 0)
DIGESTS = {
    "image/id/offsets": "ab25350e3e65",
    "image/id/values": "6f4b6612125f",
    "image/path/offsets": "abf703c6840c",
    "image/path/values": "694c454656d3",
    "image/size": "1c3b621066b9",
    "prompt/text/offsets": "13cb1d4b7316",
    "prompt/text/values": "967734320930",
    "sample/id/offsets": "4514c25ffa3f",
    "sample/id/values": "f743f516487a",
    "sample/image": "c3e42245ffdf",
    "sample/no_target": "cf7605ed1bc7",
    "sample/prompt": "31190090408f",
    "sample/split": "7d450465ceb4",
    "sample/tag/category": "8c4a95f406e1",
    "sample/tag/targets": "7d450465ceb4",
    "sample/target/offsets": "6d986e6d8b04",
    "sample/target/values": "91d77eb755b6",
}
"""Of the arrays of `make_grefcoco`'s store, since the schema's first version."""


def make_grefcoco(root: Path) -> Path:
    """Two images, three sentences of two references."""
    (root / "images").mkdir(parents=True)
    for image_id in (1, 2):
        Image.new("RGB", SIZE[::-1], (image_id, 0, 0)).save(root / "images" / f"{image_id}.png")
    instances = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": SIZE[0], "width": SIZE[1]} for i in (1, 2)],
        "annotations": [
            {
                "id": 5,
                "image_id": 2,
                "category_id": 3,
                "segmentation": {"size": list(SIZE), "counts": TARGET.decode()},
                "area": 6,
                "bbox": [0, 0, 6, 6],
                "iscrowd": 0,
            }
        ],
        "categories": [{"id": 3, "name": "line"}],
    }
    refs = [
        {
            "ref_id": ref_id,
            "ann_id": ann_id,
            "image_id": image_id,
            "category_id": [3 if ann_id != [-1] else -1],
            "split": split,
            "file_name": f"{image_id}.png",
            "sentences": [{"sent_id": 10 * ref_id + n, "sent": sent} for n, sent in enumerate(sents)],
            "sent_ids": [10 * ref_id + n for n in range(len(sents))],
            "no_target": ann_id == [-1],
        }
        for ref_id, ann_id, image_id, split, sents in (
            (1, [5], 2, "val", ["the line", "a diagonal"]),
            (2, [-1], 1, "train", ["the line"]),
        )
    ]
    (root / "instances.json").write_text(json.dumps(instances))
    (root / "grefs(unc).json").write_text(json.dumps(refs))
    return root


def record(number: int, **changes: object) -> SampleRecord:
    made = SampleRecord(
        id=str(number),
        image_id="one",
        image_path="1.png",
        image_size=SIZE,
        prompt=f"prompt {number}",
        target=TARGET,
        no_target=False,
        split="train",
    )
    return replace(made, **changes)  # type: ignore[arg-type]


class Offer(Protocol):
    """Offers records as the dataset "mine", whose image folder holds 1.png and 2.png."""

    def __call__(
        self,
        records: Sequence[SampleRecord],
        published: Mapping[str, int] = ...,
        counted: Counted = ...,
        classes: tuple[str, ...] = ...,
    ) -> PrepareConfig: ...


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Offer:
    root = make_grefcoco(tmp_path / "mine")

    def offered(
        records: Sequence[SampleRecord],
        published: Mapping[str, int] = MappingProxyType({}),
        counted: Counted = "samples",
        classes: tuple[str, ...] = (),
    ) -> PrepareConfig:
        def read(source: Source) -> Dataset:
            return Dataset("mine", source.root / "images", (source.root / "instances.json",), iter(records), classes)

        monkeypatch.setitem(DATASETS, "mine", DatasetReader(read, "whatever it likes", published, counted))
        return PrepareConfig("mine", root, tmp_path / "stores")

    return offered


def test_every_sample_of_the_scenes_is_in_the_store(scenes_root: Path, samples_path: Path) -> None:
    store = open_samples(samples_path)
    samples = store.samples
    assert store.dataset == "scenes"
    assert store.image_dir.resolve() == (scenes_root / "images").resolve()
    records = list(open_scenes(Source(scenes_root)).samples)
    assert len(records) == len(samples)
    for row, expected in enumerate(records):
        image, prompt = samples.image_rows[row], samples.prompt_rows[row]
        assert samples.ids[row] == expected.id
        assert samples.images.ids[image] == expected.image_id
        assert samples.images.paths[image] == expected.image_path
        assert samples.size_of(row) == expected.image_size
        assert samples.prompts[prompt] == expected.prompt
        assert samples.targets[row] == expected.target
        assert samples.no_target[row] == expected.no_target
        assert samples.splits[row] == expected.split
        assert {name: values[row] for name, values in samples.tags.items() if values[row] is not None} == expected.tags


def test_images_and_prompts_are_in_the_store_once(samples_path: Path) -> None:
    samples = open_samples(samples_path).samples
    assert len(set(samples.images.ids)) == len(samples.images) == 24
    assert len(set(samples.prompts)) == len(samples.prompts) < len(samples)


def test_images_carry_the_digest_of_their_file(scenes_root: Path, samples_path: Path) -> None:
    images = open_samples(samples_path).samples.images
    assert list(images.sha256) == [digest_file(scenes_root / "images" / path) for path in images.paths]


def test_a_copy_of_grefcoco_is_prepared(tmp_path: Path) -> None:
    root = make_grefcoco(tmp_path / "grefcoco")
    prepared = prepare(PrepareConfig("grefcoco", root, tmp_path / "stores"))
    samples = open_samples(prepared.path).samples
    assert samples.images.ids == ["2", "1"]
    assert samples.prompts == ["the line", "a diagonal"]
    assert samples.prompt_rows.tolist() == [0, 1, 0]
    assert samples.image_rows.tolist() == [0, 0, 1]
    assert list(samples.targets) == [TARGET, TARGET, empty_mask(SIZE)]
    assert samples.no_target.tolist() == [False, False, True]
    assert (prepared.counts.num_images, prepared.counts.num_prompts, prepared.counts.num_samples) == (2, 2, 3)
    assert prepared.counts.num_samples_of_split == {"train": 1, "val": 2}
    sources = open_store(prepared.path).header.identity["sources"]
    assert sources == {name: digest_file(root / name) for name in ("grefs(unc).json", "instances.json")}


def test_the_summary_says_what_was_written_and_then_what_was_found(tmp_path: Path) -> None:
    config = PrepareConfig("grefcoco", make_grefcoco(tmp_path / "grefcoco"), tmp_path / "stores")
    first, second = prepare(config), prepare(config)
    counts = f"2 images, 2 prompts, 3 samples (train 1, val 2) -> {first.path.name}"
    assert first.summary() == f"wrote {counts}"
    assert second.summary() == f"found {counts}"
    assert (first.reused, second.reused) == (False, True)
    assert second.path == first.path
    assert json.loads(json.dumps(first.to_dict()))["path"] == str(first.path)


def test_counts_of_the_summary_are_those_of_the_samples(scenes_root: Path, samples_path: Path) -> None:
    prepared = prepare(PrepareConfig("scenes", scenes_root, samples_path.parent))
    samples = open_samples(samples_path).samples
    assert prepared.reused
    assert prepared.counts.num_samples_of_split == Counter(samples.splits)
    assert prepared.counts.num_samples == len(samples)


def test_the_same_dataset_elsewhere_is_the_same_store(tmp_path: Path) -> None:
    one = prepare(PrepareConfig("grefcoco", make_grefcoco(tmp_path / "one"), tmp_path / "stores of one"))
    other = prepare(PrepareConfig("grefcoco", make_grefcoco(tmp_path / "other" / "deep"), tmp_path / "stores"))
    assert one.path.name == other.path.name
    assert open_store(one.path).manifest == open_store(other.path).manifest


@pytest.mark.parametrize("change", ["an image's bytes", "a sentence", "a split"])
def test_a_change_in_the_dataset_is_another_store(tmp_path: Path, change: str) -> None:
    root = make_grefcoco(tmp_path / "grefcoco")
    config = PrepareConfig("grefcoco", root, tmp_path / "stores")
    before = prepare(config)
    refs = root / "grefs(unc).json"
    if change == "an image's bytes":
        Image.new("RGB", SIZE[::-1], (9, 9, 9)).save(root / "images" / "1.png")
    elif change == "a sentence":
        refs.write_text(refs.read_text().replace("a diagonal", "the diagonal"))
    else:
        refs.write_text(refs.read_text().replace('"val"', '"testA"'))
    after = prepare(config)
    assert not after.reused
    assert after.path != before.path
    assert before.path.is_dir()


def test_the_store_holds_no_absolute_path_and_moves_with_its_dataset(tmp_path: Path) -> None:
    home = tmp_path / "home"
    prepared = prepare(PrepareConfig("grefcoco", make_grefcoco(home / "grefcoco"), home / "stores"))
    assert not [
        path for path in prepared.path.rglob("*") if path.is_file() and str(tmp_path).encode() in path.read_bytes()
    ]
    shutil.move(home, tmp_path / "moved")
    store = open_samples(tmp_path / "moved" / "stores" / prepared.path.name)
    assert (store.image_dir / store.samples.images.paths[0]).is_file()


def test_a_dataset_that_is_not_known_is_met_with_those_that_are(tmp_path: Path) -> None:
    complaint = r"unknown dataset 'grefcocco': did you mean 'grefcoco'\? Known: .*grefcoco, .*scenes"
    with pytest.raises(UsageError, match=complaint):
        prepare(PrepareConfig("grefcocco", tmp_path, tmp_path / "stores"))


@pytest.mark.parametrize("dataset", sorted(DATASETS))
def test_a_folder_that_is_not_there_is_named(tmp_path: Path, dataset: str) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        prepare(PrepareConfig(dataset, tmp_path / "nowhere", tmp_path / "stores"))
    assert not (tmp_path / "stores").exists()


def test_every_missing_image_is_named_at_once_and_nothing_is_written(offer: Offer) -> None:
    config = offer([record(n, image_id=f"image {n}", image_path=f"{n}.png") for n in range(4)])
    with pytest.raises(UsageError) as caught:
        prepare(config)
    assert "0.png is missing" in str(caught.value)
    assert "3.png is missing" in str(caught.value)
    assert "1.png" not in str(caught.value)
    assert not config.out.exists()


def test_a_folder_without_any_of_the_images_is_said_in_one_sentence(tmp_path: Path) -> None:
    root = make_grefcoco(tmp_path / "grefcoco")
    for name in ("1.png", "2.png"):
        (root / "images" / name).unlink()
    complaint = r"images holds none of the images, not even '2.png'\. Name their folder: --image-dir\.$"
    with pytest.raises(UsageError, match=complaint):
        prepare(PrepareConfig("grefcoco", root, tmp_path / "stores"))
    assert not (tmp_path / "stores").exists()


def test_images_may_lie_elsewhere(tmp_path: Path) -> None:
    root = make_grefcoco(tmp_path / "grefcoco")
    (root / "images").rename(tmp_path / "pictures")
    prepared = prepare(PrepareConfig("grefcoco", root, tmp_path / "stores", image_dir=tmp_path / "pictures"))
    assert open_samples(prepared.path).image_dir.resolve() == (tmp_path / "pictures").resolve()


def test_a_dataset_without_a_sample_is_refused(offer: Offer) -> None:
    with pytest.raises(UsageError, match=r"mine at .*mine holds no sample: its annotation files are empty"):
        prepare(offer([]))


FLAWS: dict[str, tuple[dict[str, object], str]] = {
    "an image that is missing": ({"image_id": "9", "image_path": "9.png"}, r"image 9: 9\.png is missing"),
    "an image that is none": (
        {"image_id": "text", "image_path": "text.png"},
        r"image text: text\.png: not an image file",
    ),
    "an image cut off in its header": ({"image_id": "cut", "image_path": "cut.png"}, r"image cut: cut\.png: "),
    "an image of another size": (
        {"image_id": "2", "image_path": "2.png", "image_size": (8, 6)},
        r"image 2: 2\.png has 6 x 8 pixels \(height x width\), its annotations say 8 x 6",
    ),
    "an image of two sizes": ({"image_size": (8, 6)}, r"sample 1: its image one had another path or size before"),
    "an image at two places": ({"image_path": "2.png"}, r"sample 1: its image one had another path or size before"),
    "an image outside the folder": (
        {"image_id": "outside", "image_path": "../instances.json"},
        r"image outside: '\.\./instances\.json' does not lie inside the image folder",
    ),
    "an image behind a link": (
        {"image_id": "link", "image_path": "link.png"},
        r"image link: 'link\.png' does not lie inside the image folder",
    ),
    "an image of too many pixels": (
        {"image_id": "bomb", "image_path": "bomb.png", "image_size": (40000, 40000)},
        r"image bomb: bomb\.png: .*more than 150000000",
    ),
    "an id that was there before": ({"id": "0"}, r"sample 0: another sample has this id"),
    "an empty mask": ({"target": empty_mask(SIZE)}, r"sample 1: its mask has no pixel"),
}


def spoil(root: Path) -> None:
    """Put files into the image folder that are no usable images of it."""
    images, whole = root / "images", io.BytesIO()
    Image.new("RGB", SIZE[::-1]).save(whole, "PNG")
    (images / "text.png").write_text("this is no picture")
    (images / "cut.png").write_bytes(whole.getvalue()[:20])
    outside = root.parent / "outside.png"
    outside.write_bytes(whole.getvalue())
    (images / "link.png").symlink_to(outside)
    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (images / "bomb.png").write_bytes(bomb + whole.getvalue()[33:])


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_sample_with_a_fault_stops_everything(offer: Offer, flaw: str) -> None:
    changes, complaint = FLAWS[flaw]
    config = offer([record(0), record(1, **changes), record(2)])
    spoil(config.root)
    with pytest.raises(AnnotationError, match=complaint):
        prepare(config)
    assert not config.out.exists()


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_sample_with_a_fault_is_left_out_on_demand(offer: Offer, flaw: str) -> None:
    changes, complaint = FLAWS[flaw]
    config = replace(offer([record(0), record(1, **changes), record(2)]), skip_bad=True)
    spoil(config.root)
    prepared = prepare(config)
    assert open_samples(prepared.path).samples.ids == ["0", "2"]
    (fault,) = prepared.faults.faults
    assert re.match(complaint, str(fault))
    place = "instances.json" if fault.where.startswith("sample") else "images"
    assert fault.source == str(config.root / place)
    assert re.search(rf"^LEFT OUT: .* has 1 fault: .*{complaint}", prepared.summary(), re.MULTILINE)
    assert prepared.to_dict()["faults"] == [fault.to_dict()]
    assert open_store(prepared.path).header.recorded["num_faults"] == 1


def test_what_is_left_out_is_no_part_of_what_is_kept(offer: Offer) -> None:
    flawed = offer([record(0), record(1, id="0")])
    prepared = prepare(replace(flawed, skip_bad=True))
    assert prepare(replace(offer([record(0)]), out=flawed.out)).path == prepared.path


def test_an_image_that_many_samples_share_is_one_fault(offer: Offer) -> None:
    records = [record(n, image_id="9", image_path="9.png") for n in range(5)]
    counts, faults = check(offer([*records, record(5)]))
    assert faults.num_faults == 1
    assert counts.num_samples == 1


def test_a_dataset_of_faults_alone_is_refused_even_where_they_may_be_left_out(offer: Offer) -> None:
    config = replace(offer([record(0, image_path="9.png")]), skip_bad=True)
    with pytest.raises(
        UsageError, match=r"holds no sample: nothing is left: .*images has 1 fault: .*9\.png is missing"
    ):
        prepare(config)
    assert not config.out.exists()


def test_a_prompt_without_a_target_may_have_an_empty_mask(offer: Offer) -> None:
    samples = open_samples(prepare(offer([record(0, target=empty_mask(SIZE), no_target=True)])).path).samples
    assert samples.no_target.tolist() == [True]


def test_samples_without_masks_are_kept_without(offer: Offer) -> None:
    samples = open_samples(prepare(offer([record(0, target=None), record(1)])).path).samples
    assert list(samples.targets) == [b"", TARGET]
    with pytest.raises(UsageError, match="sample 0 has no mask"):
        samples.target(0)


def test_pixels_that_nobody_labelled_and_classes_are_kept(offer: Offer) -> None:
    unlabelled = np.zeros(SIZE, np.bool_)
    unlabelled[:, 5:] = True
    config = offer([record(0, ignored=encode_mask(unlabelled)), record(1)], classes=("line", "dot"))
    samples = open_samples(prepare(config).path).samples
    np.testing.assert_array_equal(samples.ignored_pixels(0), unlabelled)
    assert samples.ignored_pixels(1) is None
    assert samples.classes == ("line", "dot")


def test_checking_writes_nothing_and_knows_every_fault(offer: Offer) -> None:
    config = offer([record(0), *(record(n, **changes) for n, (changes, _) in enumerate(FLAWS.values(), 1))])
    spoil(config.root)
    counts, report = check(config)
    assert report.num_faults == len(FLAWS)
    assert counts.num_samples_of_split == {"train": 1}
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("counted", "published", "differences"),
    [
        ("samples", {"train": 3, "val": 1}, []),
        ("samples", {"train": 4, "val": 1}, ["split train has 3 samples, published are 4"]),
        ("refs", {"train": 2, "val": 1}, []),
        ("refs", {"train": 2, "val": 1, "test": 5}, ["split test has 0 refs, published are 5"]),
        ("images", {"train": 1, "val": 1}, []),
        ("images", {"train": 3, "val": 1}, ["split train has 1 images, published are 3"]),
        ("images", {}, []),
    ],
)
def test_counts_are_held_against_the_published_ones(
    offer: Offer, counted: str, published: dict[str, int], differences: list[str]
) -> None:
    records = [
        record(0, ref_id="a"),
        record(1, ref_id="a"),
        record(2, ref_id="b"),
        record(3, ref_id="c", split="val", image_id="two", image_path="2.png"),
    ]
    prepared = prepare(offer(records, published=published, counted=counted))
    assert prepared.counts.differences == differences
    assert prepared.counts.published == (published or None)
    warned = f"NOT AS PUBLISHED: {'; '.join(differences)}" in prepared.summary()
    assert warned == bool(differences)
    assert prepared.to_dict()["differences"] == differences


def test_more_samples_than_are_looked_at_together_stay_in_order(offer: Offer) -> None:
    names = [("one", "1.png"), ("two", "2.png")]
    records = [
        record(n, image_id=names[n % 2][0], image_path=names[n % 2][1], prompt=f"prompt {n % 7}") for n in range(1300)
    ]
    samples = open_samples(prepare(offer(records)).path).samples
    assert samples.ids == [str(n) for n in range(1300)]
    assert [samples.prompts[row] for row in samples.prompt_rows] == [one.prompt for one in records]
    assert samples.images.ids == ["one", "two"]


def test_rows_come_in_the_order_of_their_first_sample(offer: Offer) -> None:
    records = [
        record(0, prompt="b"),
        record(1, prompt="a", image_id="two", image_path="2.png"),
        record(2, prompt="b", image_id="two", image_path="2.png"),
    ]
    samples = open_samples(prepare(offer(records)).path).samples
    assert samples.prompts == ["b", "a"]
    assert samples.images.ids == ["one", "two"]
    assert samples.images.paths == ["1.png", "2.png"]
    assert samples.image_rows.tolist() == [0, 1, 1]
    assert samples.prompt_rows.tolist() == [0, 1, 0]


def test_a_tag_that_only_some_samples_have_is_none_for_the_others(offer: Offer) -> None:
    records = [record(0, tags={"kind": "colour"}), record(1, tags={"category": "cat"}), record(2)]
    samples = open_samples(prepare(offer(records)).path).samples
    assert samples.tags == {"category": [None, "cat", None], "kind": ["colour", None, None]}


def test_targets_stay_at_the_size_of_their_image(offer: Offer) -> None:
    samples = open_samples(prepare(offer([record(0)])).path).samples
    np.testing.assert_array_equal(samples.target(0), decode_mask(TARGET, SIZE))


def test_a_prepared_store_is_byte_for_byte_that_of_the_same_samples_in_memory(tmp_path: Path) -> None:
    path = prepare(PrepareConfig("grefcoco", make_grefcoco(tmp_path / "data"), tmp_path / "out")).path
    identity, recorded = (getattr(open_store(path).header, name) for name in ("identity", "recorded"))
    again = write_samples(
        tmp_path / "again",
        open_samples(path).samples,
        dataset="grefcoco",
        sources=identity["sources"],
        image_dir=tmp_path / "data" / "images",
        libraries=recorded["libraries"],
    )[0]
    assert isinstance(path, Path)
    assert isinstance(again, Path)
    assert again.name == path.name
    files = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
    assert [(again / name).read_bytes() for name in files] == [(path / name).read_bytes() for name in files]
    digests = {name: digest[:12] for name, digest in identity["arrays"].items() if name != "image/sha256"}
    assert digests == DIGESTS, "stores that were prepared before are made again"


def test_every_image_is_opened_once(offer: Offer, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    look = Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: opened.append(args) or look(*args, **kwargs))
    prepare(offer([record(1), record(2), record(3, image_id="two", image_path="2.png")]))
    assert len(opened) == 2


def turned(root: Path) -> None:
    """Write images/1.png as it was, with EXIF that turns it upside down."""
    exif = Image.Exif()
    exif[0x0112] = 3
    path = root / "images" / "1.png"
    with Image.open(path) as image:
        image.save(path, exif=exif)


def test_an_image_that_its_exif_turns_does_not_fit_masks_of_stored_pixels(offer: Offer) -> None:
    config = offer([record(0)])
    turned(config.root)
    with pytest.raises(AnnotationError, match=r"1\.png is turned by its EXIF"):
        prepare(config)


def test_annotations_of_images_as_they_are_shown_fit_a_turned_one(
    offer: Offer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = offer([record(0)])
    turned(config.root)
    monkeypatch.setitem(DATASETS, "mine", replace(DATASETS["mine"], as_shown=True))
    assert prepare(config).counts.num_samples == 1
    assert {name for name, reader in DATASETS.items() if reader.as_shown} == {"mine", "custom", "scenes"}


def test_a_split_that_nobody_published_is_named(offer: Offer, monkeypatch: pytest.MonkeyPatch) -> None:
    config = offer([record(0, ref_id="1"), record(1, ref_id="2", split="extra")])
    monkeypatch.setitem(DATASETS, "mine", replace(DATASETS["mine"], published={"train": 1}))
    (difference,) = prepare(config).counts.differences
    assert difference == "split extra has 1 samples, published are 0"
