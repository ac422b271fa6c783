"""The embedded encoders are the same wherever they are made, and ordinary checkpoints to everyone else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, CLIPTextModelWithProjection, Dinov2WithRegistersModel

from cache_schema import atomic
from cache_schema.features import FeatureCache
from extract.encoders import tiny
from extract.encoders.image import load_image_encoder
from extract.encoders.protocols import ImageEncoder, TextEncoder
from extract.encoders.specs import ImageEncoderSpec
from extract.encoders.tiny import TinyEncoders, make_tiny_encoders


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_they_are_made_byte_by_byte_the_same(tiny_encoders: TinyEncoders, tmp_path: Path) -> None:
    torch.manual_seed(1234)
    torch.randn(7)
    state = torch.get_rng_state()
    make_tiny_encoders(tmp_path)
    assert files_of(tmp_path) == files_of(tiny_encoders.image.parent)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers were touched"


def test_another_process_with_another_hash_seed_makes_the_same(tiny_encoders: TinyEncoders, tmp_path: Path) -> None:
    script = "import pathlib, extract.encoders.tiny as tiny; tiny.make_tiny_encoders(pathlib.Path('here'))"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env={"PYTHONHASHSEED": "7"}, check=True)
    assert files_of(tmp_path / "here") == files_of(tiny_encoders.image.parent)


def test_another_seed_makes_other_weights_of_the_same_shapes(tiny_encoders: TinyEncoders, tmp_path: Path) -> None:
    others = files_of(make_tiny_encoders(tmp_path, seed=1).image.parent)
    differing = {name for name, data in files_of(tiny_encoders.image.parent).items() if others[name] != data}
    assert differing == {"tiny-dinov2-reg/model.safetensors", "tiny-clip-text/model.safetensors"}


def test_what_is_there_is_left_as_it_is(tiny_encoders: TinyEncoders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "staged", lambda path: pytest.fail(f"{path} was made anew"))
    assert make_tiny_encoders(tiny_encoders.image.parent) == tiny_encoders


def test_what_is_missing_is_made_beside_what_is_there(tiny_encoders: TinyEncoders, tmp_path: Path) -> None:
    made = make_tiny_encoders(tmp_path)
    atomic.remove(made.text)
    times = [path.stat().st_mtime_ns for path in made.image.iterdir()]
    assert files_of(make_tiny_encoders(tmp_path).text) == files_of(tiny_encoders.text)
    assert [path.stat().st_mtime_ns for path in made.image.iterdir()] == times


def test_a_save_that_is_cut_off_leaves_nothing_that_passes_for_an_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_config_and_stop(folder: Path, seed: int) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "_save_text_encoder", save_config_and_stop)
    with pytest.raises(KeyboardInterrupt):
        make_tiny_encoders(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-dinov2-reg"]


def test_two_may_make_them_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = tiny._save_image_encoder

    def save_while_another_does(folder: Path, seed: int) -> None:
        monkeypatch.setattr(tiny, "_save_image_encoder", save)
        make_tiny_encoders(tmp_path)
        save(folder, seed)

    monkeypatch.setattr(tiny, "_save_image_encoder", save_while_another_does)
    assert make_tiny_encoders(tmp_path).image.is_dir()


def test_they_hold_no_path(tiny_encoders: TinyEncoders, workspace: Path) -> None:
    assert not [name for name, data in files_of(tiny_encoders.image.parent).items() if str(workspace).encode() in data]


def test_anyone_can_load_them(tiny_encoders: TinyEncoders) -> None:
    assert isinstance(AutoModel.from_pretrained(tiny_encoders.image), Dinov2WithRegistersModel)
    text = CLIPTextModelWithProjection.from_pretrained(tiny_encoders.text)
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoders.text)
    with torch.inference_mode():
        embedded = text(**tokenizer(["a red circle", "sky"], padding=True, return_tensors="pt")).text_embeds
    assert embedded.shape == (2, 96)
    assert AutoModel.from_pretrained(tiny_encoders.text).config.vocab_size == len(tokenizer)


def test_their_configs_say_that_they_are_untrained(tiny_encoders: TinyEncoders) -> None:
    for folder in (tiny_encoders.image, tiny_encoders.text):
        assert json.loads((folder / "config.json").read_bytes())["untrained"] is True


@pytest.mark.parametrize("word", ["red", "leftmost", "triangles", "the", "a", "smallest", "person"])
def test_everyday_words_are_one_token(text_encoder: TextEncoder, word: str) -> None:
    start, token, end = text_encoder.tokenize([word])[0]
    assert text_encoder.tokenize([""]) == [[start, end]]
    assert text_encoder.tokenize([f"{word} {word}", word.upper()]) == [[start, token, token, end], [start, token, end]]


def test_every_word_of_the_scenes_is_one_token(text_encoder: TextEncoder, feature_cache: FeatureCache) -> None:
    prompts = feature_cache.samples.samples.prompts
    for prompt, token_ids in zip(prompts, text_encoder.tokenize(prompts), strict=True):
        assert len(token_ids) == len(prompt.split()) + 2, prompt


@pytest.mark.parametrize("word", ["zyxwv", "größe", "猫", "redd", "42", "!?", "\N{PILE OF POO}"])
def test_unknown_words_fall_apart_but_are_never_lost(tiny_encoders: TinyEncoders, word: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoders.text)
    token_ids = tokenizer(word)["input_ids"]
    assert len(token_ids) > 3 or len(word) == 1
    assert not {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id} & set(token_ids[1:-1])
    assert tokenizer.decode(token_ids, skip_special_tokens=True).replace(" ", "") == word


def test_words_that_differ_in_a_letter_have_different_tokens(text_encoder: TextEncoder) -> None:
    words = ["circle", "circles", "ring", "rings", "red", "reed", "top", "stop", "bottom"]
    assert len({tuple(ids) for ids in text_encoder.tokenize(words)}) == len(words)


def test_different_images_and_places_have_different_features(
    tiny_encoders: TinyEncoders, image_encoder: ImageEncoder
) -> None:
    pixels = torch.randint(0, 256, (2, 64, 96, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    grid = image_encoder.encode(pixels).features["last"]
    assert not torch.allclose(grid[0], grid[1], atol=1e-2)
    assert not torch.allclose(grid[:, 0, 0], grid[:, 1, 1], atol=1e-2)
    assert load_image_encoder(ImageEncoderSpec(str(tiny_encoders.image))).grids == {"last": (12, 12, 96)}
