"""What pictures and prompts a command line names, and the names of what is written for them."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_schema.errors import UsageError
from headstart.prediction_inputs import Names, find_pictures


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of pictures in folders, with other things between them. Nothing here opens a picture."""
    folder = tmp_path / "photos"
    for name in ("b.jpg", "a.PNG", "a.jpg", "sub/a.jpg", "sub/deep/c.webp", "notes.txt", ".hidden.jpg", ".git/d.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def stems(*arguments: object, **options: object) -> list[str]:
    return [picture.stem for picture in find_pictures(*arguments, **options)]  # type: ignore[arg-type]


def test_one_picture_and_its_prompts(photos: Path) -> None:
    (picture,) = find_pictures([str(photos / "a.jpg"), "the red circle", "all squares"])
    assert picture.path == photos / "a.jpg"
    assert picture.stem == "a"
    assert picture.prompts == ("the red circle", "all squares")


def test_a_folder_stands_for_the_pictures_in_it_and_below_sorted_and_no_two_have_one_stem(photos: Path) -> None:
    found = find_pictures([str(photos), "a dog"])
    names = [picture.path.relative_to(photos).as_posix() for picture in found]
    assert names == ["a.PNG", "a.jpg", "b.jpg", "sub/a.jpg", "sub/deep/c.webp"]
    assert [picture.stem for picture in found] == ["a", "a-2", "b", "sub/a", "sub/deep/c"]
    assert {picture.prompts for picture in found} == {("a dog",)}


def test_with_several_places_each_folder_keeps_its_name(photos: Path) -> None:
    places = [str(photos / "sub"), str(photos / "b.jpg"), str(photos / "sub" / "deep")]
    assert stems(places, ["a dog"]) == ["sub/a", "sub/deep/c", "b"]  # c.webp is named twice, and taken once


def test_what_was_written_before_is_not_looked_at(photos: Path) -> None:
    out = photos / "predictions"
    (out / "sub").mkdir(parents=True)
    (out / "a-1-a-dog.mask.png").touch()
    (out / "sub" / "a-1-a-dog.mask.png").touch()
    assert len(find_pictures([str(photos), "a dog"], out=out)) == 5
    with pytest.raises(UsageError, match="holds no pictures"):
        find_pictures([str(out), "a dog"], out=out)


def test_a_link_to_a_folder_is_not_followed(photos: Path) -> None:
    (photos / "sub" / "around").symlink_to(photos)
    assert len(find_pictures([str(photos), "a dog"])) == 5


def test_prompts_come_from_a_file_one_to_a_line(photos: Path, tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_bytes("\ufeffthe dog, brown\r\n\r\n  né 1900 \n".encode())
    found = find_pictures([str(photos / "a.jpg"), str(photos / "b.jpg")], ["first"], lines)
    assert [picture.prompts for picture in found] == [("first", "the dog, brown", "né 1900")] * 2


def test_pairs_come_from_a_csv_file_and_lie_under_a_folder(photos: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.CSV"
    lines = ["id,prompt,image", '1,"a ""big"" dog, left",sub/a.jpg', "2,cat,b.jpg", "3,tree,sub/a.jpg"]
    pairs.write_text("\n".join(lines), "utf-8-sig")
    first, second = find_pictures([str(photos)], (), pairs)
    assert (first.path, first.stem) == (photos / "sub/a.jpg", "sub/a")
    assert first.prompts == ('a "big" dog, left', "tree")
    assert (second.path, second.prompts) == (photos / "b.jpg", ("cat",))
    beside = photos / "pairs.csv"
    beside.write_text("image,prompt\nb.jpg,cat\n")
    assert [picture.path for picture in find_pictures([], (), beside)] == [photos / "b.jpg"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "must begin with a line that names its columns"),
        ("picture,prompt\na.jpg,dog\n", "must begin with a line that names its columns, image and prompt"),
        ("image,prompt\n", "holds no pair"),
        ("image,prompt\na.jpg,dog\na.jpg,  \n", "line 3: give an image and a prompt"),
        ("image,prompt\na.jpg\n", "line 2: give an image and a prompt"),
        ("image,prompt\n../a.jpg,dog\n", r"line 2: \.\./a.jpg does not lie under"),
        ("image,prompt\n/etc/a.jpg,dog\n", "line 2: /etc/a.jpg does not lie under"),
        ("image,prompt\n.,dog\n", "line 2: . does not lie under"),
        ('image,prompt\n"a.jpg"x,dog\n', "after line 1: .*mend the file"),
        ("image,prompt\na.jpg,\xff\n", "is not UTF-8 text"),
    ],
)
def test_pairs_that_are_none_are_refused_with_their_line(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "pairs.csv"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UsageError, match=sentence):
        find_pictures([], (), path)


def test_pairs_do_not_lead_out_of_their_folder_by_a_link(photos: Path, tmp_path: Path) -> None:
    outside, pairs = tmp_path / "outside", tmp_path / "pairs.csv"
    outside.mkdir()
    (outside / "x.jpg").touch()
    (photos / "file.jpg").symlink_to(outside / "x.jpg")
    (photos / "folder").symlink_to(outside)
    (photos / "within.jpg").symlink_to(photos / "sub" / "a.jpg")
    for image in ("file.jpg", "folder/x.jpg"):
        pairs.write_text(f"image,prompt\nb.jpg,cat\n{image},dog\n")
        with pytest.raises(UsageError, match=f"line 3: {image} leads out of .*photos by a link"):
            find_pictures([str(photos)], (), pairs)
    (photos / "loop.jpg").symlink_to(photos / "loop.jpg")
    pairs.write_text("image,prompt\nloop.jpg,dog\n")
    assert len(find_pictures([str(photos)], (), pairs)) == 1  # it is named among those that cannot be read, later
    pairs.write_text("image,prompt\nwithin.jpg,dog\n")
    (tmp_path / "link").symlink_to(photos)
    for folder in (photos, tmp_path / "link"):  # the folder itself may be reached by a link
        assert [picture.path for picture in find_pictures([str(folder)], (), pairs)] == [folder / "within.jpg"]


def test_mistakes_are_named_with_their_remedy(photos: Path, tmp_path: Path) -> None:
    a, b = str(photos / "a.jpg"), str(photos / "b.jpg")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    for arguments, sentence in (
        (([],), "there is no prompt"),
        (([a],), "there is no prompt"),
        (([a, " "],), "there is no prompt, or an empty one"),
        (([], ["dog"]), "there is no picture"),
        (([a, b, "dog"],), r"b.jpg stands where a prompt is expected.*--prompts"),
        (([a, str(photos / "sub"), "dog"],), "sub stands where a prompt is expected"),
        (([a + "x", "dog"],), "a.jpgx cannot be used: there is no such file or folder"),
        (([str(tmp_path / "none")], ["dog"]), "there is no such file or folder"),
        (([a], (), empty), "holds no prompt"),
        (([a], (), tmp_path / "none.txt"), "cannot be read"),
        (([a, b], (), tmp_path / "pairs.csv"), "name one folder"),
        (([a], ["dog"], tmp_path / "pairs.csv"), "leave --prompts out"),
        (([a, "dog\udcff"],), "is not UTF-8 text"),
    ):
        with pytest.raises(UsageError, match=sentence):
            find_pictures(*arguments)  # type: ignore[arg-type]


def test_a_prompt_may_look_like_a_path_or_be_longer_than_any(photos: Path) -> None:
    prompts = ["../up & away", "x" * 5000, "a\0b", "sub"]
    assert find_pictures([str(photos / "a.jpg"), *prompts])[0].prompts == tuple(prompts)


def test_a_very_long_name_leaves_room_for_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 120 + ".jpg")
    path.touch()
    (stem,) = stems([str(path), "a dog"])
    assert stem == "é" * 50


@given(st.lists(st.sampled_from(["a", "A", "a-2", "a-2-2", "b"]), max_size=12))
def test_no_name_is_given_twice(names: list[str]) -> None:
    given_names = Names()
    taken = [given_names.take(name) for name in names]
    assert len({name.casefold() for name in taken}) == len(taken)
    assert all(free.startswith(name) for name, free in zip(names, taken, strict=True))
    assert taken[:1] == names[:1]


def test_stems_never_lead_out_of_a_folder(photos: Path) -> None:
    for picture in find_pictures([str(photos / "sub" / ".." / "sub"), str(photos / "a.jpg")], ["a dog"]):
        assert not PurePosixPath(picture.stem).is_absolute()
        assert ".." not in PurePosixPath(picture.stem).parts
