"""Laws of reading and decoding, whatever the pixels and whatever the bytes. Single files are in test_hostile_images."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image

from extract import images
from extract.images import (
    IMAGE_FORMATS,
    MAX_FILE_BYTES,
    MAX_IMAGE_PIXELS,
    UndecodableImageError,
    UnreadableFileError,
    decode_image,
    image_size,
    read_bytes,
    read_image_header,
)
from tests.extract.hostile import (
    PICTURE,
    UPRIGHT,
    ZEROS,
    decoded_by_pillow,
    encode,
    exif,
    grey,
    make_png,
    pipe,
    png_header,
    png_of_chunks,
)
from tests.extract.hostile_right import JPEG, RIGHT

SIDES = st.integers(1, 40)
PIXELS = st.tuples(SIDES, SIDES, st.just(3)).flatmap(lambda shape: arrays(np.uint8, shape))
LOSSLESS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "BMP": {},
    "TIFF": {},
    "TIFF in LZW": {"compression": "tiff_lzw"},
    "TIFF in deflate": {"compression": "tiff_adobe_deflate"},
    "WEBP": {"lossless": True},
}


@pytest.mark.parametrize("form", LOSSLESS)
@settings(deadline=None, max_examples=50)
@given(PIXELS)
def test_pixels_that_were_kept_come_back(form: str, pixels: NDArray[np.uint8]) -> None:
    decoded = decode_image(encode(pixels, form.split()[0], **LOSSLESS[form]))
    np.testing.assert_array_equal(decoded, pixels)


@settings(deadline=None, max_examples=300)
@given(
    PIXELS,
    st.sampled_from(["RGB", "L", "CMYK"]),
    st.integers(1, 100),
    st.integers(0, 2),
    st.booleans(),
    st.integers(0, 5),
    st.booleans(),
)
def test_a_sound_jpeg_is_never_refused(
    pixels: NDArray[np.uint8], mode: str, quality: int, subsampling: int, progressive: bool, restart: int, flat: bool
) -> None:
    if flat:
        pixels[pixels.shape[0] // 2 :] = 128  # what the decoder fills in where there is nothing
    data = encode(
        Image.fromarray(pixels).convert(mode),
        "JPEG",
        quality=quality,
        subsampling=subsampling,
        progressive=progressive,
        restart_marker_blocks=restart,
    )
    np.testing.assert_array_equal(decode_image(data), decoded_by_pillow(data))


@given(arrays(np.uint16, (5, 7)))
def test_sixteen_bits_of_grey_are_rounded_to_eight(deep: NDArray[np.uint16]) -> None:
    np.testing.assert_array_equal(decode_image(make_png(deep, 0, bits=16)), grey(np.rint(deep / 257)))


@settings(deadline=None, max_examples=500)
@given(st.sampled_from(sorted(RIGHT)), st.data())
def test_damaged_bytes_give_an_image_or_a_refusal_and_never_another_error(name: str, data: st.DataObject) -> None:
    sound = RIGHT[name].data
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


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("form", IMAGE_FORMATS)
def test_the_header_tells_the_size_of_the_decoded_image_and_whether_it_is_turned(form: str, orientation: int) -> None:
    data = encode(PICTURE, form, exif=exif(orientation))
    keeps_exif = form not in ("BMP", "GIF")
    assert image_size(data) == decode_image(data).shape[:2]
    assert image_size(data) == (PICTURE.shape[1::-1] if keeps_exif and orientation > 4 else PICTURE.shape[:2])
    assert read_image_header(data).is_turned == (keeps_exif and orientation != 1)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_an_orientation_that_only_the_xmp_of_a_tiff_names_counts_for_its_size_too(orientation: int) -> None:
    xmp = f'<rdf:Description tiff:Orientation="{orientation}"/>'.encode()
    data = encode(PICTURE, "TIFF", tiffinfo={700: xmp})
    assert image_size(data) == decode_image(data).shape[:2]
    assert read_image_header(data).is_turned == (orientation != 1)


COLOURS = {(0, 1): 1, (0, 2): 1, (0, 8): 1, (0, 16): 1, (3, 4): 1, (2, 8): 3, (2, 16): 3, (4, 8): 2, (6, 8): 4}
"""By colour type and bits of a PNG how many values a pixel has."""


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("colour", "bits"), COLOURS)
@settings(deadline=None, max_examples=30)
@given(data=st.data(), width=st.integers(1, 20), height=st.integers(1, 20))
def test_a_png_whose_sound_data_end_too_early_is_refused_and_a_whole_one_is_not(
    colour: int, bits: int, interlaced: bool, data: st.DataObject, width: int, height: int
) -> None:
    values = data.draw(st.sampled_from([0, 1, 2**bits - 1, 245, 62965]) | st.integers(0, 2**bits - 1)) % 2**bits
    pixels = np.full((height, width, COLOURS[colour, bits]), values, np.uint16)
    palette = [(b"PLTE", bytes(3 * 2**bits))] if colour == 3 else []
    whole = make_png(pixels, colour, bits=bits, interlaced=interlaced, before=palette)
    decode_image(whole)
    start = whole.index(b"IDAT")
    body = zlib.decompress(whole[start + 4 : start + 4 + int.from_bytes(whole[start - 4 : start], "big")])
    kept = body[: data.draw(st.integers(1, len(body) - 1))]
    header = png_header(width, height, bits, colour, int(interlaced))
    cut = png_of_chunks(header, *palette, (b"IDAT", zlib.compress(kept)), (b"IEND", b""))
    with pytest.raises(UndecodableImageError, match=r"breaks off|cannot be decoded"):
        decode_image(cut)


def test_pixels_in_several_chunks_are_counted_together() -> None:
    pixels = np.full((40, 30), 245)  # what stands where nothing is decoded, so that the data are looked at
    body = zlib.compress(b"".join(b"\0" + bytes([245]) * 30 for _ in range(40)))
    chunks = [(b"IDAT", body[place : place + 5]) for place in range(0, len(body), 5)]
    assert len(chunks) > 1
    np.testing.assert_array_equal(
        decode_image(png_of_chunks(png_header(30, 40, 8, 0), *chunks, (b"IEND", b""))), grey(pixels)
    )


@pytest.mark.parametrize("num_pixels", [120_000_000, MAX_IMAGE_PIXELS])
def test_a_large_image_is_no_bomb_and_causes_no_warning(num_pixels: int) -> None:
    data = png_of_chunks(png_header(num_pixels // 10_000, 10_000), (b"IDAT", ZEROS[:999]), (b"IEND", b""))
    with pytest.raises(UndecodableImageError, match="truncated"):
        decode_image(data)


# Reading


def test_a_file_is_read_with_its_digest(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(JPEG)
    assert read_bytes(tmp_path / "file") == (JPEG, hashlib.sha256(JPEG).hexdigest())


def test_a_link_to_a_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(JPEG)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_bytes(tmp_path / "link")[0] == JPEG


@pytest.mark.parametrize("name", [b"two\nlines.jpg", b"\xff\xfe.jpg", b" .jpg", b"-rf", b"a" * 255])
def test_a_file_may_have_any_name(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / os.fsdecode(name)
    path.write_bytes(JPEG)
    assert read_bytes(path)[0] == JPEG


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nothing", "No such file or directory"),
        ("dangling", "No such file or directory"),
        ("folder", "Is a directory"),
        ("loop", "Too many levels of symbolic links"),
        ("file/below", "Not a directory"),
        ("long" * 100, "File name too long"),
        ("nul\0", "embedded null byte"),
        ("\ud800", "surrogates not allowed"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_reason(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").write_bytes(JPEG)
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UnreadableFileError, match=rf"the file cannot be read \(.*{reason}"):
        read_bytes(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(JPEG)
    (tmp_path / "file").chmod(0)
    with pytest.raises(UnreadableFileError, match=r"the file cannot be read \(Permission denied"):
        read_bytes(tmp_path / "file")


@pytest.mark.parametrize("linked", [False, True])
def test_nobody_waits_for_a_pipe(tmp_path: Path, linked: bool) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with pipe(tmp_path / "pipe"), pytest.raises(UnreadableFileError, match=r"\(it is a pipe, not a regular file\)"):
        read_bytes(tmp_path / ("link" if linked else "pipe"))


def test_a_socket_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's address is short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        listening.listen()
        with pytest.raises(UnreadableFileError, match="the file cannot be read"):
            read_bytes(tmp_path / "socket")


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/random", "/dev/tty"])
def test_a_device_is_not_read(device: str) -> None:
    with pytest.raises(UnreadableFileError, match=r"it is a device|No such device|cannot be read"):
        read_bytes(Path(device))


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
def test_a_file_of_no_size_is_empty_whatever_it_would_say() -> None:
    assert read_bytes(Path("/proc/self/status"))[0] == b""


def test_a_file_too_large_to_be_an_image_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(UndecodableImageError, match=rf"the file has {MAX_FILE_BYTES + 1} bytes; no more than"):
        read_bytes(tmp_path / "file")


def test_a_file_of_the_largest_size_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_FILE_BYTES", len(JPEG))
    (tmp_path / "file").write_bytes(JPEG)
    assert read_bytes(tmp_path / "file")[0] == JPEG


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
def test_a_refused_file_is_closed(tmp_path: Path) -> None:
    before = sorted(Path("/proc/self/fd").iterdir())
    for path in (tmp_path, Path("/dev/zero")):
        with pytest.raises(UnreadableFileError):
            read_bytes(path)
    assert sorted(Path("/proc/self/fd").iterdir()) == before
