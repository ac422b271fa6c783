"""Whoever writes `samples.jsonl` gets exactly what it says, and hears of everything wrong with it by line."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from cache_schema.errors import UsageError
from cache_schema.masks import decode_mask, encode_mask
from cache_schema.samples import open_samples
from extract.datasets import custom_jsonl
from extract.datasets.custom import read_custom
from extract.datasets.faults import AnnotationError, FaultReport
from extract.datasets.mask_files import read_mask
from extract.datasets.records import Dataset, SampleRecord, Source
from extract.prepare import PrepareConfig, check, prepare

H, W = 40, 60
BOX = [2, 4, 12, 14]
LINE = {"image": "images/a.png", "prompt": "the cat", "box": BOX}


def box_mask(x0: int, y0: int, x1: int, y1: int) -> NDArray[np.bool_]:
    mask = np.zeros((H, W), np.bool_)
    mask[y0:y1, x0:x1] = True
    return mask


TARGET = box_mask(2, 4, 12, 14)
BIG = [-1, -1, W + 1, -1, W + 1, H + 1, -1, H + 1]
"""A polygon that reaches out of an image of 40 x 60 pixels as far as it may."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with two images of 40 x 60 and 60 x 40 pixels, a mask of the first, and a file outside."""
    folder = tmp_path / "mydata"
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    Image.new("RGB", (W, H)).save(folder / "images" / "a.png")
    Image.new("RGB", (H, W)).save(folder / "images" / "b.png")
    Image.fromarray(TARGET).save(folder / "masks" / "a.png")
    Image.fromarray(TARGET).save(tmp_path / "outside.png")
    return folder


def write(root: Path, *lines: Any) -> None:
    """One line each; texts and bytes as they are."""
    encoded = (line if isinstance(line, str | bytes) else json.dumps(line) for line in lines)
    content = b"\n".join(line.encode() if isinstance(line, str) else line for line in encoded)
    (root / "samples.jsonl").write_bytes(content + b"\n")


def read(root: Path) -> tuple[list[SampleRecord], list[str]]:
    """The samples, and the faults of the file."""
    report = FaultReport()
    samples = list(read_custom(Source(root, report)).samples)
    return samples, [str(fault) for fault in report.faults]


def sound(root: Path, *lines: Any) -> list[SampleRecord]:
    """The samples of lines that must have no fault."""
    write(root, *lines)
    samples, faults = read(root)
    assert faults == []
    return samples


def faults_of(root: Path, *lines: Any) -> list[str]:
    write(root, *lines)
    return read(root)[1]


def mask_of(sample: SampleRecord) -> NDArray[np.bool_]:
    assert sample.target is not None
    return decode_mask(sample.target, sample.image_size)


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in LINE.items() if key not in keys}


def test_the_shortest_line_is_a_sample_of_the_training_split_named_after_its_line(root: Path) -> None:
    first, second = sound(root, LINE, {**LINE, "image": "images/b.png"})
    assert (first.id, second.id) == ("line-1", "line-2")
    assert (first.image_id, first.image_path, first.image_size) == ("images/a.png", "images/a.png", (H, W))
    assert second.image_size == (W, H)
    assert (first.prompt, first.split, first.tags, first.no_target) == ("the cat", "train", {}, False)


def test_a_line_says_its_own_id_image_id_split_and_tags(root: Path) -> None:
    said = {"id": "c-1", "image_id": "photo 1", "split": "val", "tags": {"kind": "animal"}}
    (sample,) = sound(root, {**LINE, **said})
    assert (sample.id, sample.image_id, sample.split, sample.tags) == ("c-1", "photo 1", "val", {"kind": "animal"})


def test_several_prompts_are_several_samples_with_the_same_target(root: Path) -> None:
    samples = sound(root, {**without("prompt"), "prompts": ["the cat", "  a\tcat "], "id": "c"})
    assert [(sample.id, sample.prompt) for sample in samples] == [("c:0", "the cat"), ("c:1", "a cat")]
    assert samples[0].target == samples[1].target


RUNS = encode_mask(TARGET).decode()
COUNTED = [2 * H + 4, 10, *[H - 10, 10] * 9, H * W - 12 * H + H - 14]
FORMS: list[dict[str, Any]] = [
    {"mask": "masks/a.png"},
    {"rle": {"size": [H, W], "counts": RUNS}},
    {"rle": {"size": [H, W], "counts": COUNTED}},
    {"polygons": [[2, 4, 12, 4, 12, 14, 2, 14]]},
    {"polygons": [[2, 4, 7, 4, 7, 14, 2, 14], [7, 4, 12, 4, 12, 14, 7, 14]]},
    {"box": BOX},
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_target_gives_the_same_pixels(root: Path, form: dict[str, Any]) -> None:
    (sample,) = sound(root, {**without("box"), **form})
    np.testing.assert_array_equal(mask_of(sample), TARGET)


def test_no_target_is_the_empty_mask_and_false_says_nothing(root: Path) -> None:
    nothing, something = sound(root, {**without("box"), "no_target": True}, {**LINE, "no_target": False})
    assert nothing.no_target
    assert not mask_of(nothing).any()
    assert not something.no_target
    np.testing.assert_array_equal(mask_of(something), TARGET)


def test_polygons_that_overlap_count_once(root: Path) -> None:
    polygon = [2, 4, 12, 4, 12, 14, 2, 14]
    (sample,) = sound(root, {**without("box"), "polygons": [polygon, polygon]})
    np.testing.assert_array_equal(mask_of(sample), TARGET)


@given(x=st.tuples(st.floats(-1, W + 1), st.floats(-1, W + 1)), y=st.tuples(st.floats(-1, H + 1), st.floats(-1, H + 1)))
def test_a_box_holds_the_pixels_whose_centres_lie_in_it(x: tuple[float, float], y: tuple[float, float]) -> None:
    (x0, x1), (y0, y1) = sorted(x), sorted(y)
    if x0 == x1 or y0 == y1:
        return
    columns, rows = np.arange(W) + 0.5, np.arange(H) + 0.5
    expected = ((y0 <= rows) & (rows < y1))[:, None] & ((x0 <= columns) & (columns < x1))
    counts = custom_jsonl._fill_box([x0, y0, x1, y1], (H, W))
    np.testing.assert_array_equal(decode_mask(counts, (H, W)), expected)


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_no_faults(root: Path) -> None:
    line = json.dumps(LINE).encode()
    (root / "samples.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)
    samples, faults = read(root)
    assert faults == []
    assert [sample.id for sample in samples] == ["line-1", "line-4"]


def test_one_image_written_in_two_ways_is_one_image(root: Path) -> None:
    samples = sound(root, LINE, {**LINE, "image": "./images//a.png"})
    assert {sample.image_id for sample in samples} == {"images/a.png"}


def test_blanks_inside_a_path_stay(root: Path) -> None:
    (root / "images" / "a.png").rename(root / "images" / "my  cat.png")
    (sample,) = sound(root, {**LINE, "image": "images/my  cat.png"})
    assert sample.image_path == "images/my  cat.png"


def test_images_may_lie_in_a_folder_that_is_named_and_masks_stay_beside_the_lines(root: Path, tmp_path: Path) -> None:
    (root / "images").rename(tmp_path / "photos")
    write(root, {"image": "a.png", "prompt": "the cat", "mask": "masks/a.png"})
    dataset = read_custom(Source(root, image_dir=tmp_path / "photos"))
    assert dataset.image_dir == tmp_path / "photos"
    assert [sample.image_path for sample in dataset.samples] == ["a.png"]


def test_each_image_is_looked_at_once_however_many_lines_name_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    look = custom_jsonl.image_size
    monkeypatch.setattr(custom_jsonl, "image_size", lambda data: seen.append(data) or look(data))
    sound(root, *[LINE] * 5, {**LINE, "image": "images/b.png"})
    assert len(seen) == 2


def test_lines_are_read_as_samples_are_asked_for(root: Path) -> None:
    write(root, LINE, "nonsense")
    report = FaultReport()
    samples = read_custom(Source(root, report)).samples
    next(samples)
    assert report.num_faults == 0
    assert list(samples) == []
    assert report.num_faults == 1


def test_what_is_written_is_what_the_store_holds(root: Path, tmp_path: Path) -> None:
    prompts = ["the cat", "a cat"]
    write(
        root,
        {"image": "images/a.png", "prompts": prompts, "mask": "masks/a.png", "tags": {"kind": "one"}},
        {"image": "images/b.png", "prompt": "the dog", "no_target": True, "split": "val"},
    )
    prepared = prepare(PrepareConfig("custom", root, tmp_path / "stores"))
    assert prepared.counts.num_samples_of_split == {"train": 2, "val": 1}
    store = open_samples(prepared.path)
    assert store.dataset == "custom"
    assert list(store.samples.ids) == ["line-1:0", "line-1:1", "line-2"]
    np.testing.assert_array_equal(store.samples.target(1), TARGET)
    assert list(store.samples.tags["kind"]) == ["one", "one", None]


FAULTS: list[tuple[Any, str]] = [
    ("[1]", "must be an object, is a list"),
    ('{"image": }', "it is not valid JSON: Expecting value at column 11; each line is one JSON object"),
    ('{"image": "a.png"} {}', "it is not valid JSON: Extra data at column 20; each line is one JSON object"),
    (b'{"image": "\xff"}', "its byte 12 is not valid UTF-8; save the file as UTF-8"),
    ('{"box": [NaN]}', "the number NaN is not JSON"),
    ('{"mask": "a", "mask": "b"}', "the key 'mask' is there twice; give it once"),
    ("[" * 200_000, "it is nested too deeply; each line is one plain JSON object"),
    ('{"a":' * 200_000, "it is nested too deeply; each line is one plain JSON object"),
    ({**without("prompt"), "promt": "the cat"}, "unknown key 'promt': did you mean 'prompt'? Known: box, id, image"),
    ({**LINE, "x": 1}, "unknown key 'x'. Known: box, id, image"),
    (without("image"), "'image' is missing"),
    ({**LINE, "image": 7}, "'image' must be a text, is a whole number"),
    ({**LINE, "image": " "}, "'image' is empty"),
    ({**LINE, "image": "images/c.png"}, "the image 'images/c.png' is missing"),
    ({**LINE, "image": "images"}, "the image 'images': the file cannot be read (Is a directory)"),
    (
        {**LINE, "image": "samples.jsonl"},
        "the image 'samples.jsonl': not an image file: nothing in it reads as the head",
    ),
    ({**LINE, "image": "images\\a.png"}, "the image 'images\\\\a.png' must be written with '/' between its folders"),
    ({**LINE, "image": "x" * 5000}, "the file cannot be read (File name too long)"),
    (without("prompt"), "'prompt' is missing"),
    ({**LINE, "prompt": " \t"}, "'prompt' is empty"),
    ({**LINE, "prompt": None}, "'prompt' must be a text, is null"),
    ({**LINE, "prompt": ["the cat"]}, "'prompt' must be a text, is a list"),
    ('{"image": "images/a.png", "prompt": "\\ud800", "box": [0, 0, 1, 1]}', "'prompt' is not valid UTF-8"),
    ({**LINE, "prompts": ["a cat"]}, "it has 'prompt' and 'prompts'; give one of them"),
    ({**without("prompt"), "prompts": "a cat"}, "'prompts' must be a list, is a text"),
    ({**without("prompt"), "prompts": []}, "'prompts' is empty"),
    ({**without("prompt"), "prompts": ["a cat", " "]}, "'prompts' item 1 is empty"),
    ({**without("prompt"), "prompts": [3]}, "'prompts' item 0 must be a text, is a whole number"),
    (without("box"), "it has no target; give 'mask', 'rle', 'polygons' or 'box', or \"no_target\": true"),
    ({**without("box"), "no_target": False}, "it has no target; give 'mask', 'rle', 'polygons' or 'box'"),
    ({**LINE, "mask": "masks/a.png"}, "it has 'mask' and 'box'; give one of them"),
    ({**LINE, "no_target": True}, "it has 'box' and 'no_target'; give one of them"),
    ({**without("box"), "no_target": 1}, "'no_target' must be true or false, is a whole number"),
    ({**without("box"), "mask": "masks/b.png"}, "'mask': 'masks/b.png' is missing"),
    ({**without("box"), "mask": 1}, "'mask' must be a text, is a whole number"),
    ({**without("box"), "mask": "samples.jsonl"}, "'mask': 'samples.jsonl': it is no PNG file; save masks as PNG"),
    (
        {"image": "images/b.png", "prompt": "the cat", "mask": "masks/a.png"},
        "'mask': 'masks/a.png': it has 40 x 60 pixels (height x width), its image 60 x 40. Is one of them turned",
    ),
    ({**without("box"), "rle": RUNS}, "'rle' must be an object, is a text"),
    ({**without("box"), "rle": {}}, "'rle': it is empty"),
    ({**without("box"), "rle": {"size": [H, W]}}, "'rle': run lengths must hold 'counts' and 'size'"),
    ({**without("box"), "rle": {"size": [W, H], "counts": RUNS}}, "'counts' and the image's size [40, 60]"),
    ({**without("box"), "rle": {"size": [H, W], "counts": [H * W]}}, "'rle' marks no pixel; if the prompt names noth"),
    ({**without("box"), "rle": {"size": [H, W], "counts": [7]}}, "'rle': run lengths must be whole numbers that add"),
    ({**without("box"), "polygons": [2, 4, 12, 4, 12, 14]}, "'polygons': a polygon must be a list of numbers"),
    ({**without("box"), "polygons": []}, "'polygons': it is empty"),
    ({**without("box"), "polygons": [[0, 0, 1, 1]]}, "'polygons': a polygon is a flat list of at least three x, y"),
    ({**without("box"), "polygons": [[70, 0, 80, 0, 80, 9]]}, "'polygons': a polygon lies outside the image of 40 x"),
    ({**without("box"), "polygons": [[1, 1, 1, 1, 1, 1]]}, "'polygons' marks no pixel; if the prompt names nothing"),
    ({**LINE, "box": [2, 4, 12]}, "'box': it must be a list of 4 numbers, [x0, y0, x1, y1]"),
    ({**LINE, "box": [2, 4, 12, True]}, "'box': it must be a list of 4 numbers, [x0, y0, x1, y1]"),
    ({**LINE, "box": {"x": 1}}, "'box' must be a list, is an object"),
    ({**LINE, "box": [20, 20, 10, 10]}, "'box': its second corner must lie right of and below its first; write [x0"),
    ({**LINE, "box": [2, 4, 2, 14]}, "'box': its second corner must lie right of and below its first"),
    ({**LINE, "box": [2, 4, 62, 14]}, "'box': it reaches out of the image of 40 x 60 pixels (height x width)"),
    ({**without("box"), "polygons": [[-2, 4, 12, 4, 12, 14]]}, "'polygons': it reaches out of the image of 40 x 60"),
    ({**without("box"), "polygons": [BIG, [2, 4, 62, 4, 12, 14]]}, "'polygons': it reaches out of the image of 40 x"),
    ({**without("box"), "polygons": [[2, 4, 12, 4, 12, 42]]}, "'polygons': it reaches out of the image of 40 x 60"),
    ({**LINE, "box": [-3, 4, 12, 14]}, "'box': it reaches out of the image of 40 x 60 pixels (height x width)"),
    ({**LINE, "box": [10**400, 4, 12, 14]}, "'box': "),
    ({**LINE, "box": [2.6, 4, 3.4, 14]}, "'box' marks no pixel; if the prompt names nothing"),
    ({**LINE, "split": ""}, "'split' is empty"),
    ({**LINE, "split": 1}, "'split' must be a text, is a whole number"),
    ({**LINE, "tags": ["x"]}, "'tags' must be an object, is a list"),
    ({**LINE, "tags": {"kind": 1}}, "'tags' must map texts to texts"),
    ({**LINE, "tags": {"a b": "c"}}, "'a b' is no name for a tag: use up to 64 letters, digits, '_' and '-'"),
    ({**LINE, "id": 7}, "'id' must be a text, is a whole number"),
    ({**LINE, "id": ""}, "'id' is empty"),
    ({**LINE, "image_id": None}, "'image_id' must be a text, is null"),
]


@pytest.mark.parametrize(("line", "message"), FAULTS, ids=[message[:60] for _, message in FAULTS])
def test_a_fault_is_told_once_with_its_line_and_only_that_line_is_left_out(root: Path, line: Any, message: str) -> None:
    write(root, LINE, "", line, LINE)
    samples, faults = read(root)
    assert [sample.id for sample in samples] == ["line-1", "line-4"]
    told = [fault for fault in faults if message in fault]
    assert len(told) == 1, faults
    assert all(fault.startswith("line 3: ") for fault in faults)
    assert len(faults) == 1 + ("promt" in message)


def test_every_fault_of_a_line_and_of_a_file_is_in_one_report_in_the_order_of_the_file(root: Path) -> None:
    faults = faults_of(
        root,
        {"image": "images/c.png", "prompt": "", "mask": "masks/c.png", "split": 3},
        "nonsense",
        {"prompts": [], "tag": {}},
    )
    assert faults == [
        "line 1: the image 'images/c.png' is missing",
        "line 1: 'prompt' is empty",
        "line 1: 'mask': 'masks/c.png' is missing",
        "line 1: 'split' must be a text, is a whole number",
        "line 2: it is not valid JSON: Expecting value at column 1; each line is one JSON object",
        "line 3: unknown key 'tag': did you mean 'tags'? Known: box, id, image, image_id, mask, no_target, polygons, "
        "prompt, prompts, rle, split, tags",
        "line 3: 'image' is missing",
        "line 3: 'prompts' is empty",
        "line 3: it has no target; give 'mask', 'rle', 'polygons' or 'box', or \"no_target\": true",
    ]


def test_an_image_that_cannot_be_used_is_a_fault_of_every_line_that_names_it(root: Path) -> None:
    faults = faults_of(root, *[{**LINE, "image": "c.png"}] * 2)
    assert faults == ["line 1: the image 'c.png' is missing", "line 2: the image 'c.png' is missing"]


def test_an_id_that_was_there_before_names_both_lines(root: Path) -> None:
    faults = faults_of(root, {**LINE, "id": "cat"}, LINE, {**LINE, "id": " cat"})
    assert faults == ["line 3: line 1 has the same id 'cat'; give each line its own, or none"]


def test_an_image_id_of_two_images_is_a_fault(root: Path) -> None:
    lines = [{**LINE, "image": f"images/{name}.png", "image_id": "one"} for name in "aab"]
    assert faults_of(root, *lines) == [
        "line 3: image_id 'one' belongs to another image, 'images/a.png'; give each image its own, or none"
    ]


def test_a_polygon_that_reaches_out_by_a_pixel_is_cut_off(root: Path) -> None:
    (sample,) = sound(root, {**without("box"), "polygons": [BIG]})
    assert mask_of(sample).all()


def test_a_line_of_very_many_keys_is_looked_through_once(root: Path) -> None:
    class Counted(str):
        num_compared = 0

        def __eq__(self, other: object) -> bool:
            Counted.num_compared += 1
            return str.__eq__(self, str(other))

        __hash__ = str.__hash__

    pairs = [(Counted(f"k{number}"), number) for number in range(500)]
    with pytest.raises(ValueError, match="the key 'k499' is there twice; give it once"):
        custom_jsonl._unique_keys([*pairs, (Counted("k499"), 0)])
    assert Counted.num_compared < 10 * len(pairs)


def test_a_line_longer_than_the_limit_is_passed_over_and_the_next_is_read(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(custom_jsonl, "MAX_LINE_BYTES", 200)
    fits = json.dumps(LINE).ljust(199)
    write(root, fits, json.dumps(LINE).ljust(200), "x" * 1000, LINE)
    samples, faults = read(root)
    assert [sample.id for sample in samples] == ["line-1", "line-4"]
    assert faults == [f"line {number}: it is longer than 200 bytes; keep the mask in a PNG file" for number in (2, 3)]


OUTSIDE = ["../outside.png", "images/../../outside.png", "/etc/hostname", "masks/../masks/a.png", "link.png", "a\0b"]


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("key", ["image", "mask"])
def test_no_path_leads_out_of_the_folder(root: Path, key: str, path: str) -> None:
    (root / "link.png").symlink_to(root.parent / "outside.png")
    (fault,) = faults_of(root, {**without("box"), "mask": "masks/a.png", key: path})
    assert fault.startswith("line 1: ")
    assert f"{path!r} does not lie inside {root}; copy the file there, and write the path from there" in fault


def test_a_folder_that_is_a_link_to_elsewhere_is_left_by_no_path(root: Path) -> None:
    (root / "linked").symlink_to(root.parent, target_is_directory=True)
    (fault,) = faults_of(root, {**LINE, "image": "linked/outside.png"})
    assert "'linked/outside.png' does not lie inside" in fault


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says it has that many pixels, and holds none of them."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_header_of_a_billion_pixels_is_refused_as_image_and_as_mask(root: Path) -> None:
    (root / "huge.png").write_bytes(png_of_size(40_000, 40_000))
    image, mask = faults_of(root, {**LINE, "image": "huge.png"}, {**without("box"), "mask": "huge.png"})
    assert image.startswith("line 1: the image 'huge.png': ")
    assert "more than 150000000" in image
    assert mask == ("line 2: 'mask': 'huge.png': it has 40000 x 40000 pixels (height x width), its image 40 x 60")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04rest", r"samples\.jsonl is a zip archive, not lines of text\. Unpack it first\."),
        (b"\x1f\x8brest", r"samples\.jsonl is a gzip file, not lines of text\. Unpack it first\."),
        (json.dumps(LINE).encode("utf-16"), r"samples\.jsonl is written in UTF-16\. Save it as UTF-8\."),
    ],
)
def test_a_file_that_is_no_text_is_refused_as_a_whole(root: Path, content: bytes, message: str) -> None:
    (root / "samples.jsonl").write_bytes(content)
    with pytest.raises(AnnotationError, match=message):
        read(root)


def test_nothing_is_written_where_anything_is_wrong(root: Path, tmp_path: Path) -> None:
    write(root, LINE, {**LINE, "image": "../outside.png"})
    with pytest.raises(UsageError, match=r"samples\.jsonl has 1 fault: line 2: the image '\.\./outside\.png' does not"):
        prepare(PrepareConfig("custom", root, tmp_path / "stores"))
    assert not (tmp_path / "stores").exists()


def test_a_check_counts_what_is_sound_and_writes_nothing(root: Path, tmp_path: Path) -> None:
    write(root, LINE, {**LINE, "image": "c.png"}, "{")
    before = sorted(tmp_path.rglob("*"))
    counts, report = check(PrepareConfig("custom", root, tmp_path / "stores"))
    assert counts.num_samples == 1
    assert [fault.where for fault in report.faults] == ["line 2", "line 3"]
    assert {fault.source for fault in report.faults} == {str(root / "samples.jsonl")}
    assert sorted(tmp_path.rglob("*")) == before


def test_faulty_lines_can_be_left_out(root: Path, tmp_path: Path) -> None:
    write(root, LINE, "{")
    prepared = prepare(PrepareConfig("custom", root, tmp_path / "stores", skip_bad=True))
    assert prepared.counts.num_samples == 1
    assert prepared.faults.num_faults == 1


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        (None, "Write samples.jsonl, one line for each object"),
        ("data.jsonl", r"Is it data\.jsonl\? Rename it to samples\.jsonl\."),
        ("samples.jsonl.txt", r"Is it samples\.jsonl\.txt\? Rename it to samples\.jsonl\."),
    ],
)
def test_a_folder_with_neither_file_says_what_to_do(root: Path, name: str | None, remedy: str) -> None:
    if name:
        (root / name).write_text("")
    with pytest.raises(UsageError, match=rf"holds neither samples\.jsonl nor a COCO json\. {remedy}"):
        read_custom(Source(root))


def test_a_folder_in_both_ways_is_refused(root: Path) -> None:
    write(root, LINE)
    (root / "train.json").write_text("{}")
    with pytest.raises(UsageError, match=r"holds both samples\.jsonl and train\.json.*Move the other out"):
        read_custom(Source(root))


def save_mask(root: Path, image: Image.Image, **options: Any) -> NDArray[np.bool_]:
    path = root / "masks" / "made.png"
    image.save(path, **options)
    return read_mask(path.read_bytes(), (H, W))


def as_grey(value: int) -> Image.Image:
    return Image.fromarray(TARGET.astype(np.uint8) * value)


def with_palette(colours: list[int], indices: NDArray[np.uint8]) -> Image.Image:
    image = Image.fromarray(indices).convert("L")
    image.putpalette(colours)
    return image


CLEAR: dict[str, Callable[[], Image.Image]] = {
    "1 bit": lambda: Image.fromarray(TARGET),
    "grey, any value above 0": lambda: as_grey(1),
    "palette with black first": lambda: with_palette([0, 0, 0, 128, 0, 0], TARGET.astype(np.uint8)),
    "RGB, any channel": lambda: Image.fromarray(np.stack([TARGET * 0, TARGET * 0, TARGET * 3], -1).astype(np.uint8)),
    "opaque RGBA": lambda: as_grey(255).convert("RGBA"),
    "opaque grey with alpha": lambda: as_grey(255).convert("LA"),
}


@pytest.mark.parametrize("kind", CLEAR)
def test_the_target_of_a_mask_is_whatever_is_not_black(root: Path, kind: str) -> None:
    np.testing.assert_array_equal(save_mask(root, CLEAR[kind]()), TARGET)


def transparent() -> Image.Image:
    image = as_grey(255).convert("RGBA")
    image.putalpha(as_grey(255))
    return image


AMBIGUOUS: list[tuple[Callable[[], Image.Image], dict[str, Any], str]] = [
    (transparent, {}, "it has transparent pixels"),
    (lambda: as_grey(255), {"transparency": 0}, "it has transparent pixels"),
    (lambda: with_palette([255, 255, 255, 0, 0, 0], TARGET.astype(np.uint8)), {}, "its palette has black elsewhere"),
    (lambda: with_palette([0, 0, 0, 0, 0, 0], TARGET.astype(np.uint8)), {}, "its palette has black elsewhere"),
    (lambda: Image.fromarray(TARGET.astype(np.uint16)), {}, "it has 16 bits for each value"),
]


@pytest.mark.parametrize(("make", "options", "message"), AMBIGUOUS)
def test_a_mask_that_could_be_read_in_two_ways_is_refused(
    root: Path, make: Callable[[], Image.Image], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        save_mask(root, make(), **options)


def test_a_mask_is_turned_by_its_orientation_as_images_are(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = Image.fromarray(TARGET[::-1, ::-1].astype(np.uint8))
    np.testing.assert_array_equal(save_mask(root, turned, exif=exif), TARGET)


def test_a_damaged_mask_is_refused(root: Path) -> None:
    noise = np.random.default_rng(0).random((H, W)) < 0.5
    save_mask(root, Image.fromarray(noise))
    path = root / "masks" / "made.png"
    path.write_bytes(path.read_bytes()[:-100])
    (fault,) = faults_of(root, {**without("box"), "mask": "masks/made.png"})
    assert fault.startswith("line 1: 'mask': 'masks/made.png': ")


def test_a_line_that_is_cut_short_is_located_by_the_column_after_its_end(root: Path) -> None:
    write(root, '{"image": "images/a.png", "box": [1, 2')
    (root / "samples.jsonl").write_bytes((root / "samples.jsonl").read_bytes().replace(b"\n", b"\r\n"))
    (fault,) = read(root)[1]
    assert fault == ("line 1: it is not valid JSON: Expecting ',' delimiter at column 39; each line is one JSON object")


def test_the_opened_folder_names_its_source(root: Path) -> None:
    write(root, LINE)
    dataset: Dataset = read_custom(Source(root))
    assert dataset.name == "custom"
    assert dataset.sources == (root / "samples.jsonl",)
