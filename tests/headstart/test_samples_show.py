"""`headstart samples show`: figures that agree with the samples, and a picture that shows them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache_schema.masks import encode_mask
from cache_schema.samples import ImageTable, Samples, open_samples
from headstart import cli
from headstart.samples_info import QUANTILES, draw_rows, make_card, samples_statistics, sheet_remarks, statistics_text
from tests.headstart.shell import Home, Shell


def make_samples(prompts: list[str], **changes: object) -> Samples:
    """A sample for each prompt, on two images of 10 x 20 pixels; the first n rows of the first image are its mask."""
    num = len(prompts)
    targets = []
    for row in range(num):
        mask = np.zeros((10, 20), np.bool_)
        mask[: row + 1] = True
        targets.append(encode_mask(mask))
    made = Samples(
        images=ImageTable(["a", "b"], ["a.png", "b.png"], np.array([[10, 20], [10, 20]], np.int32), ["0" * 64] * 2),
        prompts=prompts,
        ids=[f"sample {row}" for row in range(num)],
        image_rows=np.arange(num, dtype=np.int32) % 2,
        prompt_rows=np.arange(num, dtype=np.int32),
        targets=targets,
        no_target=np.zeros(num, np.bool_),
        splits=["train"] * num,
        tags={},
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def all_of(samples: Samples) -> np.ndarray:
    return np.arange(len(samples))


def test_figures_agree_with_the_samples(samples_path: Path) -> None:
    samples = open_samples(samples_path).samples
    found = samples_statistics(samples, all_of(samples))
    assert (found.num_images, found.num_prompts, found.num_samples) == (24, len(samples.prompts), len(samples))
    assert {split: share.num_samples for split, share in found.splits.items()} == Counter(samples.splits)
    assert found.num_no_target == samples.no_target.sum()
    assert found.num_without_mask == found.num_with_ignored == 0
    shares = [samples.target(row).mean() for row in range(len(samples)) if not samples.no_target[row]]
    np.testing.assert_allclose(found.mask_share, np.quantile(shares, QUANTILES))
    assert found.words == Counter(len(prompt.split()) for prompt in samples.prompts)
    for name, values in samples.tags.items():
        assert found.tags[name] == Counter(value for value in values if value is not None)
    assert sum(found.image_sizes.values()) == 24


def test_figures_of_a_split_are_of_that_split_alone(samples_path: Path) -> None:
    samples = open_samples(samples_path).samples
    rows = samples.rows_of_split("val")
    found = samples_statistics(samples, rows)
    assert set(found.splits) == {"val"}
    assert found.num_samples == len(rows) < len(samples)
    assert found.num_images == len(set(samples.image_rows[rows].tolist())) < 24


def test_samples_without_masks_have_no_share_of_the_image() -> None:
    samples = make_samples(["a caption", "another caption"], targets=[b"", b""])
    found = samples_statistics(samples, all_of(samples))
    assert found.mask_share is None
    assert found.num_without_mask == 2
    assert "without a mask: 2 samples" in statistics_text(found)
    assert "covers" not in statistics_text(found)
    assert found.to_dict()["mask_share"] is None


def test_prompts_without_a_target_do_not_count_as_small_masks() -> None:
    empty = encode_mask(np.zeros((10, 20), np.bool_))
    full = encode_mask(np.ones((10, 20), np.bool_))
    samples = make_samples(["none", "all"], targets=[empty, full], no_target=np.array([True, False]))
    found = samples_statistics(samples, all_of(samples))
    assert found.mask_share == (1.0,) * len(QUANTILES)
    assert "no target: 1 samples (50.0%)" in statistics_text(found)


def test_the_histogram_counts_words_and_lumps_long_prompts_together() -> None:
    samples = make_samples(["cat", "black cat", "white cat", " ".join("w" * 20), " ".join("v" * 30)])
    lines = statistics_text(samples_statistics(samples, all_of(samples))).splitlines()
    start = lines.index("words in a prompt")
    rows = [line.replace("#", " ").split() for line in lines[start + 1 : start + 17]]
    assert rows[:3] == [["1", "1"], ["2", "2"], ["3", "0"]]
    assert rows[-1] == ["16-30", "2"]
    bars = [line.count("#") for line in lines[start + 1 : start + 17]]
    assert bars[1] == bars[-1] == 2 * bars[0] == 40
    assert bars[2] == 0


def test_only_the_ten_most_frequent_values_of_a_tag_are_shown() -> None:
    values = [str(n) for n in range(12) for _ in range(n + 1)]
    samples = make_samples(["p"] * len(values), tags={"category": values})
    found = samples_statistics(samples, all_of(samples))
    text = statistics_text(found)
    assert "tag category: 12 values" in text
    assert "and 2 more" in text
    listed = found.to_dict()["tags"]["category"]
    assert listed["num_values"] == 12
    assert next(iter(listed["first"].items())) == ("11", 12)
    assert len(listed["first"]) == 10


def test_a_draw_is_of_different_samples_in_order_and_follows_the_seed() -> None:
    rows = np.arange(100, 200)
    first, again, other = draw_rows(rows, 10, 1), draw_rows(rows, 10, 1), draw_rows(rows, 10, 2)
    assert first.tolist() == again.tolist() != other.tolist()
    assert sorted(set(first.tolist())) == first.tolist()
    assert draw_rows(rows, 1000, 1).tolist() == rows.tolist()
    assert draw_rows(rows, 0, 1).tolist() == []


def test_a_store_is_shown_in_figures_and_a_picture(shell: Shell, home: Home, tmp_path: Path) -> None:
    code, printed = shell.run("samples", "show", home.stores, "--out", tmp_path / "sheets", "--num", 7)
    assert code == cli.DONE
    sheet = tmp_path / "sheets" / f"{home.samples.stem}.png"
    assert f"picture of 7 samples: {sheet}" in printed
    assert "words in a prompt" in printed
    assert "note:" not in printed
    with Image.open(sheet) as picture:
        assert picture.format == "PNG"
        assert picture.mode == "RGB"


def test_json_has_the_figures_and_the_samples_that_are_shown(shell: Shell, home: Home, tmp_path: Path) -> None:
    arguments = ("samples", "show", home.samples, "--out", tmp_path, "--num", 3, "--split", "train", "--seed", 5)
    code, found = shell.json(*arguments)
    samples = open_samples(home.samples).samples
    assert code == cli.DONE
    assert found["split"] == "train"
    assert found["sheet"] == str(tmp_path / f"{home.samples.stem}-train.png")
    assert len(found["shown"]) == 3
    assert {samples.splits[samples.ids.index(shown)] for shown in found["shown"]} == {"train"}
    assert shell.json(*arguments)[1] == found


def test_no_picture_is_made_where_none_is_asked_for(shell: Shell, home: Home, tmp_path: Path) -> None:
    code, found = shell.json("samples", "show", home.samples, "--out", tmp_path / "sheets", "--num", 0)
    assert (code, found["sheet"], found["shown"]) == (cli.DONE, None, [])
    assert not (tmp_path / "sheets").exists()


def test_images_that_were_moved_are_said_to_be_missing_and_found_where_they_are(
    shell: Shell, home: Home, tmp_path: Path
) -> None:
    (home.folder / "scenes" / "images").rename(tmp_path / "pictures")
    code, printed = shell.run("samples", "show", home.samples, "--out", tmp_path, "--num", 4)
    assert code == cli.DONE
    assert "4 of 4 images" in printed
    assert "is missing" in printed
    assert "--image-dir" in printed
    again = ("samples", "show", home.samples, "--out", tmp_path, "--num", 4, "--image-dir", tmp_path / "pictures")
    assert shell.json(*again)[1]["remarks"] == []


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_text("no picture"), "not an image file"),
        (lambda path: Image.new("RGB", (3, 3)).save(path), "another size than when the store was written"),
    ],
    ids=["missing", "no image", "another size"],
)
def test_an_image_that_cannot_be_shown_has_a_card_that_says_why(home: Home, harm, reason: str) -> None:
    store = open_samples(home.samples)
    image_dir = home.folder / "scenes" / "images"
    harm(image_dir / store.samples.images.paths[store.samples.image_rows[0]])
    card = make_card(store, 0, image_dir)
    assert isinstance(card.image, str)
    assert reason in card.image
    (remark,) = sheet_remarks([card], image_dir)
    assert reason in remark


def test_a_card_of_a_caption_says_that_there_is_no_mask(home: Home) -> None:
    store = open_samples(home.samples)
    with_mask = make_card(store, 0, home.folder / "scenes" / "images")
    store = replace(store, samples=replace(store.samples, targets=[b""] * len(store.samples)))
    card = make_card(store, 0, home.folder / "scenes" / "images")
    assert card.note == f"no mask, {with_mask.note}"
    assert card.truth is None
    assert not with_mask.note.startswith("no mask")


def test_an_image_with_a_name_too_long_to_be_any_is_missing(home: Home) -> None:
    store = open_samples(home.samples)
    images = replace(store.samples.images, paths=["x" * 300] * len(store.samples.images))
    card = make_card(replace(store, samples=replace(store.samples, images=images)), 0, home.folder)
    assert card.image == f"{'x' * 300} is missing"


def test_splits_with_long_names_have_sheets_of_their_own(shell: Shell, tmp_path: Path) -> None:
    folder, names = tmp_path / "mine", ["\u4e2d" * 300, "\u4e2d" * 299 + "x"]
    folder.mkdir()
    Image.new("RGB", (60, 40)).save(folder / "a.png")
    lines = [{"image": "a.png", "prompt": "x", "box": [1, 1, 5, 5], "split": name} for name in names]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert shell.run("prepare", "custom", folder, "--out", tmp_path / "stores")[0] == cli.DONE
    sheets = set()
    for name in names:
        code, found = shell.json("samples", "show", tmp_path / "stores", "--split", name, "--out", tmp_path / "sheets")
        assert code == cli.DONE
        sheets.add(found["sheet"])
    assert len(sheets) == 2
    assert all(Path(sheet).is_file() for sheet in sheets)


def test_an_image_outside_the_folder_is_not_opened(home: Home) -> None:
    store = open_samples(home.samples)
    images = replace(store.samples.images, paths=["../grefs(unc).json"] * len(store.samples.images))
    store = replace(store, samples=replace(store.samples, images=images))
    card = make_card(store, 0, home.folder / "scenes" / "images")
    assert "does not lie inside the image folder" in card.image


def test_a_store_that_does_not_know_its_images_says_so(home: Home) -> None:
    assert "does not say where its images lie" in make_card(open_samples(home.samples), 0, None).image


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{tmp}/nowhere"], "no folder at"),
        (["{tmp}/empty"], "holds no store of samples"),
        (["{images}"], "is a store of image_features, where one of samples is wanted; name that one"),
        (["{samples}", "--split", "vall"], "unknown split 'vall': did you mean 'val'"),
        (["{samples}", "--num", "-1"], "--num is -1"),
        (["{samples}", "--num", "1001"], "--num is 1001"),
        (["{samples}", "--seed", "-1"], "--seed is -1"),
        (["{samples}", "--image-dir", "{tmp}/nowhere"], "--image-dir"),
        (["{samples}", "--image-dir", "x" * 300], "--image-dir"),
        (["nosuch://bucket/samples.zarr"], "cannot be reached"),
    ],
)
def test_a_mistake_gets_one_sentence_with_the_remedy(
    shell: Shell, home: Home, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    (tmp_path / "empty").mkdir()
    names = {"tmp": str(tmp_path), "samples": str(home.samples), "images": str(home.images)}
    given = [argument.format(**names) for argument in arguments]
    assert sentence in shell.mistake("samples", "show", *given, "--out", tmp_path / "sheets")
    assert not (tmp_path / "sheets").exists()


def test_a_file_in_the_place_of_the_folder_is_named(shell: Shell, home: Home, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file; name a folder" in shell.mistake("samples", "show", home.samples, "--out", tmp_path / "file")


def test_the_group_and_its_command_teach(shell: Shell) -> None:
    for command in (["samples"], ["samples", "show"]):
        code, printed = shell.run(*command, "--help")
        assert code == cli.DONE
        assert "usage: headstart samples" in printed


def test_a_copy_of_a_store_elsewhere_is_shown_by_its_own_path(shell: Shell, home: Home, tmp_path: Path) -> None:
    shutil.copytree(home.samples, tmp_path / "elsewhere" / home.samples.name)
    code, found = shell.json("samples", "show", tmp_path / "elsewhere", "--num", 0)
    assert (code, found["path"]) == (cli.DONE, str(tmp_path / "elsewhere" / home.samples.name))
