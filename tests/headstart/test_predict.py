"""`headstart predict`: what it writes, what it leaves out, and that it says what the predictor says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

import headstart
from evaluate.pictures import overlay
from evaluate.predictor import open_image
from evaluate.word_attention import draw_attention
from headstart import cli
from tests.headstart.shell import Shell

if TYPE_CHECKING:
    from cache_schema.features import FeatureCache
    from heads.runs import Training

SIZES = {"a.jpg": (40, 60), "b.png": (50, 30), "sub/a.jpg": (64, 64)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures, two of one name."""
    folder = tmp_path_factory.mktemp("pictures") / "photos"
    for number, (name, size) in enumerate(SIZES.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(noise).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def reading(workspace: Path, feature_cache: FeatureCache) -> Path:
    """A run whose head reads prompt tokens."""
    settings = {"epochs": 1, "target_size": [16, 24], "dim": 32, "inner_dim": 32, "hidden_dim": 32}
    return headstart.train("cross_attention", feature_cache, workspace / "runs", settings=settings).run_dir


def files_under(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_masks_and_overlays_are_what_the_predictor_says(
    run: Training, photos: Path, tmp_path: Path, shell: Shell
) -> None:
    prompts = ["the red circle", "all squares"]
    code, said = shell.json("predict", run.run_dir, photos / "a.jpg", *prompts, "--out", tmp_path / "p")
    assert code == cli.DONE
    image = open_image(photos / "a.jpg")
    expected = headstart.load(run).set_image(image).predict(prompts)
    for number, (one, prediction) in enumerate(zip(said["predictions"], expected, strict=True), start=1):
        slug = prediction.prompt.replace(" ", "-")
        assert Path(one["mask"]) == tmp_path / "p" / f"a-{number}-{slug}.mask.png"
        np.testing.assert_array_equal(np.asarray(Image.open(one["mask"])) == 255, prediction.mask)
        np.testing.assert_array_equal(open_image(Path(one["overlay"])), overlay(image, prediction.mask))
        assert one["prompt"] == prediction.prompt
        assert one["size"] == one["mask_rle"]["size"] == [40, 60]
        np.testing.assert_array_equal(coco_mask.decode(one["mask_rle"]).astype(bool), prediction.mask)
        assert one["mask_share"] == prediction.mask.mean()
        assert one["score"] == pytest.approx(prediction.score, abs=1e-6)
        assert one["predicted_iou"] is one["no_target"] is None


def test_one_picture_is_told_prompt_by_prompt(run: Training, photos: Path, tmp_path: Path, shell: Shell) -> None:
    code, printed = shell.run("predict", run.run_dir, photos / "a.jpg", "a circle", "--out", tmp_path / "p")
    assert code == cli.DONE
    share = json.loads((tmp_path / "p/predictions.json").read_text())["predictions"][0]["mask_share"]
    assert printed == f"a circle: {share:.1%} of the picture -> {tmp_path / 'p/a-1-a-circle.overlay.png'}\n"


def test_the_file_for_scripts_names_files_beside_it_and_no_path_of_the_run(
    run: Training, photos: Path, tmp_path: Path, shell: Shell
) -> None:
    _, said = shell.json("predict", run.run_dir, photos, "a circle", "--out", tmp_path / "p")
    written = json.loads((tmp_path / "p/predictions.json").read_text())
    assert written["run"] == run.run_dir.name
    assert [one["mask"] for one in written["predictions"]] == [
        "a-1-a-circle.mask.png",
        "b-1-a-circle.mask.png",
        "sub/a-1-a-circle.mask.png",
    ]
    for one, shown in zip(written["predictions"], said["predictions"], strict=True):
        assert shown == {**one, **{kind: str(tmp_path / "p" / one[kind]) for kind in ("mask", "overlay")}}
    assert {key: said[key] for key in ("failed", "num_pictures", "run")} == {
        "failed": [],
        "num_pictures": 3,
        "run": run.run_dir.name,
    }


@pytest.mark.parametrize("batch_size", [1, 2])
def test_folders_keep_pictures_of_one_name_apart_whatever_the_batches(
    run: Training, photos: Path, tmp_path: Path, shell: Shell, batch_size: int
) -> None:
    code, printed = shell.run(
        *("predict", run.run_dir, photos, "--prompts", "a circle", "all squares"),
        *("--out", tmp_path / "p", "--batch-size", batch_size),
    )
    assert code == cli.DONE
    assert printed == f"6 masks of 3 pictures -> {tmp_path / 'p/predictions.json'}\n"
    expected = {"predictions.json"}
    for stem in ("a", "b", "sub/a"):
        for prompt in ("1-a-circle", "2-all-squares"):
            expected |= {f"{stem}-{prompt}.mask.png", f"{stem}-{prompt}.overlay.png"}
    assert files_under(tmp_path / "p") == expected
    predictor = headstart.load(run)
    for name, size in SIZES.items():
        mask = np.asarray(Image.open(tmp_path / "p" / f"{Path(name).with_suffix('')}-2-all-squares.mask.png")) == 255
        prediction = predictor.set_image(photos / name).predict("all squares")[0]
        assert mask.shape == size
        assert np.count_nonzero(mask != prediction.mask) <= 1e-2 * mask.size


def test_what_cannot_be_decoded_is_named_counted_and_left_out(
    run: Training, photos: Path, tmp_path: Path, shell: Shell
) -> None:
    whole = (photos / "a.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "fine.jpg").write_bytes(whole)
    (tmp_path / "text.png").write_text("hello")
    code, said = shell.json("predict", run.run_dir, tmp_path, "a circle", "--out", tmp_path / "p", "--batch-size", 2)
    assert code == cli.WANTING
    assert said["num_pictures"] == 3
    assert [Path(one["image"]).name for one in said["failed"]] == ["cut.jpg", "text.png"]
    assert "not an image file" in said["failed"][1]["reason"]
    assert [Path(one["image"]).name for one in said["predictions"]] == ["fine.jpg"]
    assert Path(said["predictions"][0]["mask"]).is_file()


def test_where_no_picture_is_left_the_command_says_so_and_does_not_crash(
    run: Training, tmp_path: Path, shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    arguments = ["predict", str(run.run_dir), str(tmp_path / "notes.txt"), "a circle", "--out", str(tmp_path / "p")]
    assert cli.run(arguments) == cli.WANTING
    said = capsys.readouterr().err
    assert "left out: " in said
    assert "notes.txt cannot be used: not an image file" in said
    assert "1 of 1 pictures could not be used" in said
    assert files_under(tmp_path / "p") == {"predictions.json"}


def test_pairs_of_a_csv_file_get_their_own_prompts_alone(
    run: Training, photos: Path, tmp_path: Path, shell: Shell
) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("image,prompt\nsub/a.jpg,a circle\nb.png,all squares\nnone.png,a dog\nsub/a.jpg,the ring\n")
    code, said = shell.json("predict", run.run_dir, photos, "--prompts-file", pairs, "--out", tmp_path / "p")
    assert code == cli.WANTING
    found = [(Path(one["image"]).relative_to(photos).as_posix(), one["prompt"]) for one in said["predictions"]]
    assert found == [("sub/a.jpg", "a circle"), ("sub/a.jpg", "the ring"), ("b.png", "all squares")]
    assert [Path(one["image"]).name for one in said["failed"]] == ["none.png"]


def test_attention_per_word_is_drawn_where_it_is_asked_for(
    reading: Path, photos: Path, tmp_path: Path, shell: Shell
) -> None:
    prompt = "the red zeppelin"
    code, said = shell.json("predict", reading, photos / "a.jpg", prompt, "--attention", "--out", tmp_path / "p")
    assert code == cli.DONE
    (one,) = said["predictions"]
    (prediction,) = headstart.load(reading).set_image(photos / "a.jpg").predict(prompt)
    assert prediction.words == ("the", "red", "zeppelin")
    np.testing.assert_array_equal(
        open_image(Path(one["attention"])), draw_attention(open_image(photos / "a.jpg"), prediction)
    )
    assert files_under(tmp_path / "p") == {
        "predictions.json",
        *(f"a-1-the-red-zeppelin.{kind}.png" for kind in ("mask", "overlay", "attention")),
    }


def test_a_head_of_pooled_prompts_is_not_asked_for_attention(
    run: Training, photos: Path, tmp_path: Path, shell: Shell
) -> None:
    said = shell.mistake("predict", run.run_dir, photos, "a circle", "--attention", "--out", tmp_path / "p")
    assert "has no attention per word; leave --attention out" in said
    assert not (tmp_path / "p").exists()


def test_names_are_data(run: Training, photos: Path, tmp_path: Path, shell: Shell) -> None:
    """Pictures and prompts may be called anything; nothing is written outside, and nothing twice."""
    odd = tmp_path / "odd"
    odd.mkdir()
    names = [b"<b>&'\".jpg", b"two\nlines.jpg", b"\xff\xfe.jpg", b"-n.jpg", b"a-1.jpg", b"a.jpg", b"A.jpg", b"x" * 200]
    for name in names:
        with open(os.fsencode(odd) + b"/" + name, "wb") as file:  # noqa: PTH123  a Path is no bytes
            file.write((photos / "a.jpg").read_bytes())
    odd_files = {path.name for path in odd.iterdir()}
    before = files_under(tmp_path)
    prompts = ["1-1-b", "../../up & away", "b", "红色的圆", "x" * 3000]
    code, said = shell.json(
        *("predict", run.run_dir, *sorted(map(str, odd.iterdir()))), "--prompts", *prompts, "--out", tmp_path / "p"
    )
    assert code == cli.DONE
    assert len(said["predictions"]) == len(odd_files) * len(prompts)
    written = files_under(tmp_path) - before
    assert len(written) == 1 + 2 * len(said["predictions"])
    assert all(name.startswith("p/") for name in written)
    assert len({name.casefold() for name in written}) == len(written)


def test_nothing_is_written_through_a_link_that_leads_away(
    run: Training, photos: Path, tmp_path: Path, shell: Shell
) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "p" / "sub").symlink_to(tmp_path / "elsewhere")
    said = shell.mistake("predict", run.run_dir, photos, "a circle", "--out", tmp_path / "p")
    assert "is a link that leads out of" in said
    assert not files_under(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{photos}/a.jpg", "{photos}/b.png", "a circle"], "stands where a prompt is expected"),
        (["{photos}/a.jpg"], "there is no prompt"),
        (["{photos}/none.jpg", "a circle"], "none.jpg cannot be used: there is no such file or folder"),
        (["{photos}/a.jpg", "a circle", "--batch-size", "0"], "batch_size is 0"),
        (["{photos}/a.jpg", "--prompts-file", "{photos}/none.txt"], "none.txt cannot be read"),
    ],
)
def test_a_mistake_writes_nothing(
    run: Training, photos: Path, tmp_path: Path, shell: Shell, arguments: list[str], sentence: str
) -> None:
    given: list[Any] = [argument.format(photos=photos) for argument in arguments]
    assert sentence in shell.mistake("predict", run.run_dir, *given, "--out", tmp_path / "p")
    assert not (tmp_path / "p").exists()
