"""Whatever the bytes, an image comes out upright and in RGB, or a refusal that says why."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from extract.images import (
    MAX_IMAGE_PIXELS,
    Preprocessing,
    UndecodableImageError,
    UnreadableFileError,
    decode_image,
    read_bytes,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ORIENTATION, IMAGE_WIDTH = 0x0112, 0x0100


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def png(width: int, height: int) -> bytes:
    """A PNG that says it has this size and holds no pixel."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(b"")) + part(b"IEND", b"")


RGB = noise(8, 10, 3)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF"])
def test_rgb_pixels_come_back_as_they_were(form: str) -> None:
    decoded = decode_image(encode(Image.fromarray(RGB), form))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, RGB)


def test_a_jpeg_is_decoded_as_pillow_decodes_it() -> None:
    data = encode(Image.fromarray(RGB), "JPEG", quality=92)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(decode_image(data), np.asarray(image))


def test_grey_becomes_three_equal_channels() -> None:
    grey = noise(6, 4)
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(grey), "PNG")), np.stack([grey] * 3, -1))


def test_black_and_white_becomes_0_and_255() -> None:
    bits = noise(6, 4) > 127
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(bits), "PNG"))[..., 0], bits * np.uint8(255))


def test_alpha_is_dropped_and_colours_stay() -> None:
    rgba = noise(6, 4, 4)
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(rgba), "PNG")), rgba[..., :3])


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_a_palette_is_looked_up(form: str) -> None:
    palette = Image.fromarray(RGB).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(decode_image(encode(palette, form)), expected)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
def test_a_palette_with_transparency_is_looked_up_too() -> None:
    palette = Image.fromarray(RGB).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    data = encode(palette, "PNG", transparency=bytes(range(16)))
    np.testing.assert_array_equal(decode_image(data), expected)


def test_cmyk_is_turned_into_rgb() -> None:
    flat = np.full((16, 16, 3), (200, 40, 40), np.uint8)
    decoded = decode_image(encode(Image.fromarray(flat).convert("CMYK"), "JPEG", quality=100))
    assert decoded.shape == (16, 16, 3)
    assert np.abs(decoded.astype(int) - flat).max() <= 4


def test_sixteen_bits_are_brought_down_to_eight() -> None:
    deep = np.linspace(0, 65535, 48).reshape(6, 8).astype(np.uint16)
    decoded = decode_image(encode(Image.fromarray(deep), "PNG"))
    np.testing.assert_allclose(decoded, np.stack([deep / 257] * 3, -1), atol=0.51)
    turned_over = decode_image(encode(Image.fromarray(deep), "PNG", exif=turned(6)))
    np.testing.assert_array_equal(turned_over, np.rot90(decoded, -1))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_thirty_two_bits_are_refused_rather_than_guessed_at(dtype: type[Any]) -> None:
    with pytest.raises(UndecodableImageError, match=r"its pixels have 32 bits, .* save it with 8 or 16"):
        decode_image(encode(Image.fromarray(np.zeros((6, 8), dtype)), "TIFF"))


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, RGB),
        (2, RGB[:, ::-1]),
        (3, RGB[::-1, ::-1]),
        (4, RGB[::-1]),
        (5, RGB.transpose(1, 0, 2)),
        (6, np.rot90(RGB, -1)),
        (7, RGB[::-1, ::-1].transpose(1, 0, 2)),
        (8, np.rot90(RGB)),
        (9, RGB),
    ],
)
def test_exif_says_how_an_image_is_turned_upright(orientation: int, upright: NDArray[np.uint8]) -> None:
    decoded = decode_image(encode(Image.fromarray(RGB), "PNG", exif=turned(orientation)))
    np.testing.assert_array_equal(decoded, upright)


def jpeg_with_odd_exif() -> bytes:
    """A JPEG that is turned by 90 degrees and whose EXIF spells a number as text."""
    entries = [(IMAGE_WIDTH, 2, 3, b"10\0\0"), (ORIENTATION, 3, 1, struct.pack(">HH", 6, 0))]
    table = b"MM\0*" + struct.pack(">IH", 8, len(entries))
    table += b"".join(struct.pack(">HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    exif = b"Exif\0\0" + table + bytes(4)
    data = encode(Image.fromarray(RGB), "JPEG", quality=100)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]


def test_exif_that_pillow_cannot_write_again_turns_an_image_all_the_same() -> None:
    data = jpeg_with_odd_exif()
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(decode_image(data), np.rot90(np.asarray(image), -1))


JPEG = encode(Image.fromarray(noise(64, 64, 3)), "JPEG")
PNG = encode(Image.fromarray(noise(64, 64, 3)), "PNG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"\0", "not an image file"),
        (b"<html>404 Not Found</html>", "not an image file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "not an image file"),
        (JPEG[:20], "not an image file|cannot be decoded"),
        (JPEG[: len(JPEG) // 2], r"cannot be decoded \(image file is truncated"),
        (PNG[: len(PNG) // 2], r"cannot be decoded \(.*truncated"),
        (PNG[:8], "not an image file|cannot be decoded"),
        (PNG[:200] + bytes(100) + PNG[300:], "cannot be decoded"),
        (png(0, 5), "not an image file|cannot be decoded"),
        (png(5, 0), "not an image file|cannot be decoded"),
        (png(5, 5), r"cannot be decoded \(.*truncated"),
        (png(60_000, 60_000), "decompression bomb|are more than"),
        (png(2**31 - 1, 2**31 - 1), "decompression bomb|are more than"),
    ],
)
def test_what_cannot_be_decoded_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UndecodableImageError, match=reason):
        decode_image(data)


def test_a_large_image_is_no_bomb_and_causes_no_warning() -> None:
    with pytest.raises(UndecodableImageError, match="truncated"):
        decode_image(png(12_000, 10_000))


def test_images_are_refused_for_their_size_from_the_declared_size_on() -> None:
    with pytest.raises(UndecodableImageError, match="truncated"):
        decode_image(png(MAX_IMAGE_PIXELS // 10_000, 10_000))
    with pytest.raises(UndecodableImageError, match=f"are more than {MAX_IMAGE_PIXELS}"):
        decode_image(png(MAX_IMAGE_PIXELS // 10_000 + 1, 10_000))


SOUND = (
    encode(Image.fromarray(RGB), "JPEG", exif=turned(6)),
    encode(Image.fromarray(RGB), "PNG", exif=turned(5)),
    encode(Image.fromarray(RGB), "WEBP", exif=turned(3)),
    encode(Image.fromarray(RGB).quantize(8), "GIF"),
    encode(Image.fromarray(RGB).convert("CMYK"), "JPEG"),
)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on broken EXIF
@settings(deadline=None, max_examples=300)
@given(st.sampled_from(SOUND), st.data())
def test_damaged_bytes_give_an_image_or_a_refusal_and_never_another_error(sound: bytes, data: st.DataObject) -> None:
    damaged = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(sound) - 1))] = data.draw(st.integers(0, 255))
    stop = data.draw(st.just(len(sound)) | st.integers(0, len(sound)))
    try:
        decoded = decode_image(bytes(damaged[:stop]))
    except UndecodableImageError:
        return
    assert decoded.dtype == np.uint8
    assert decoded.ndim == decoded.shape[2] == 3


def test_a_file_is_read_with_its_digest(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(JPEG)
    assert read_bytes(tmp_path / "file") == (JPEG, hashlib.sha256(JPEG).hexdigest())


@pytest.mark.parametrize(("name", "reason"), [("nothing", "No such file"), ("folder", "Is a directory")])
def test_a_file_that_cannot_be_read_is_refused_with_its_reason(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UnreadableFileError, match=rf"the file cannot be read \({reason}"):
        read_bytes(tmp_path / name)


@pytest.mark.parametrize("size", [(50, 70), (300, 200), (1, 1), (64, 96), (9, 400)])
@pytest.mark.parametrize("input_size", [(64, 96), (56, 56)])
@pytest.mark.parametrize(("resample", "code"), [("bicubic", 3), ("bilinear", 2)])
def test_preprocessing_is_that_of_the_hugging_face_processor(
    size: tuple[int, int], input_size: tuple[int, int], resample: str, code: int
) -> None:
    processor = BitImageProcessorPil(
        size={"height": input_size[0], "width": input_size[1]},
        resample=code,
        do_center_crop=False,
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    image = noise(*size, 3)
    expected = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    pixels = Preprocessing(input_size, MEAN, STD, resample)(image)
    assert pixels.dtype == np.float32
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, expected)


def test_preprocessing_keeps_the_whole_image_whatever_its_aspect() -> None:
    image = np.zeros((40, 160, 3), np.uint8)
    image[:, :80] = 255
    pixels = Preprocessing((32, 32), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear")(image)
    assert pixels.shape == (3, 32, 32)
    assert (pixels[:, :, :14] == 1).all()
    assert (pixels[:, :, 18:] == 0).all()


def test_preprocessing_says_all_that_decides_its_output() -> None:
    one = Preprocessing((64, 96), MEAN, STD, "bicubic").to_dict()
    assert one["orientation"] == "exif"
    others = [
        Preprocessing((96, 64), MEAN, STD, "bicubic"),
        Preprocessing((64, 96), STD, STD, "bicubic"),
        Preprocessing((64, 96), MEAN, MEAN, "bicubic"),
        Preprocessing((64, 96), MEAN, STD, "bilinear"),
    ]
    assert all(other.to_dict() != one for other in others)
