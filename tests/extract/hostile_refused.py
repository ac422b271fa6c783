"""Files that are no image, damaged, or made to do harm, each with the reason for which it is refused."""

from __future__ import annotations

import base64
import io
import struct
import zipfile
import zlib

import numpy as np
from PIL import Image

from extract.images import MAX_IMAGE_PIXELS
from tests.extract.hostile import (
    GREY,
    HEIGHT,
    LONG,
    NOISE,
    PALETTE,
    PICTURE,
    SHORT,
    WIDTH,
    ZEROS,
    Refused,
    changed,
    encode,
    make_bmp,
    make_gif,
    make_ifd,
    make_png,
    make_tiff,
    place_of,
    png_header,
    png_of_chunks,
    segment,
    segments_of,
    tiff_head,
    with_segments,
    without_segments,
)
from tests.extract.hostile_right import (
    AVIF,
    BIG_TIFF,
    DEEP_GREY,
    GIF,
    JPEG,
    KNOWS_NEWER,
    NEWER_TIFFS,
    PNG,
    PROGRESSIVE,
    RESTARTING,
    RGB,
    RLE8,
    ROWS,
    THUMBNAIL,
    TILED,
    restarts_of,
)

NO_IMAGE = "not an image file: nothing in it reads as the header of JPEG, PNG"
TOO_MANY = f"more than {MAX_IMAGE_PIXELS}"
CUT = r"cannot be decoded \(image file is truncated"
NO_END = "cut short: the marker that ends it is missing"
NO_LAST_CHUNK = "cut short: the chunk that ends it is missing"
BREAKS_OFF = "the image breaks off: where its data end, the decoder filled in grey"
NO_RANGE = "nothing says in which range they are"
WRONG_CHECKSUM = "its data do not have the checksum that stands beside them"


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        made.writestr("image.jpg", JPEG)
    return buffer.getvalue()


def numpy_file() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, PICTURE)
    return buffer.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 12\n%%EndComments\n(here) (w) file closefile showpage\n%%EOF\n"

NO_IMAGES = {
    "empty": Refused(b"", "the file is empty"),
    **{
        name: Refused(data, NO_IMAGE)
        for name, data in {
            "one-byte": b"\0",
            "zeros": bytes(4096),
            "ones": b"\xff" * 4096,
            "line-feeds": b"\n" * 100,
            "text": b"Ein Bild, das keines ist.\n",
            "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
            "json": b'{"error": "rate limit exceeded"}',
            "xml-of-s3": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
            "git-lfs-pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>',
            "pdf": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF",
            "eps": EPS,
            "eps-with-binary-header": b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, len(EPS)) + bytes(18) + EPS,
            "zip": archive(),
            "gzip": b"\x1f\x8b\x08\0\0\0\0\0\0\3" + zlib.compress(JPEG)[2:],
            "npy": numpy_file(),
            "pickle": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x94\x8c\x02id\x94\x85\x94R\x94.",
            "elf": b"\x7fELF\2\1\1" + bytes(57),
            "exe": b"MZ\x90\0" + bytes(124),
            "shell-script": b"#!/bin/sh\necho here\n",
            "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(88),
            "mp4": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom",
            "heic": b"\0\0\0\x18ftypheic\0\0\0\0heicmif1",
            "wav": b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0",
            "ppm": b"P6 2 1 255\n\0\0\0\1\1\1",
            "psd": b"8BPS\0\1" + bytes(40),
            "ico": struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, 100, 22),
            "jpeg-2000": b"\0\0\0\x0cjP  \r\n\x87\n",
            "jpeg-behind-a-line-feed": b"\n" + JPEG,
            "jpeg-as-text": base64.b64encode(JPEG),
            "png-with-other-line-ends": PNG.replace(b"\r\n", b"\n"),
        }.items()
    },
}

TWO_HALVES = encode(NOISE, "JPEG")
HALF = len(TWO_HALVES) // 2
WITH_ZERO_TAIL = TWO_HALVES[:HALF] + bytes(len(TWO_HALVES) - HALF)
SCAN_HEADER = segment(0xDA, b"\1\1\0\1\5\0")
SOF = place_of(JPEG, 0xC0)

_NEWER_TIFFS = {
    "tiff-grey-times-alpha": Refused(NEWER_TIFFS["tiff-grey-times-alpha"].data, NO_IMAGE),
    "tiff-ycbcr": Refused(NEWER_TIFFS["tiff-ycbcr"].data, "cannot be decoded"),
}

REFUSED_JPEGS = {
    "jpeg-magic-only": Refused(JPEG[:3], NO_IMAGE),
    "jpeg-cut-in-first-segment": Refused(JPEG[:11], r"cannot be decoded|not an image file"),
    "jpeg-cut-before-size": Refused(JPEG[: SOF - 4], NO_IMAGE),
    "jpeg-cut-before-scan": Refused(JPEG[: list(segments_of(JPEG))[-1][1]], "cannot load this image|" + NO_IMAGE),
    "jpeg-cut-in-scan-header": Refused(JPEG[: list(segments_of(JPEG))[-1][1] + 5], "cannot be decoded"),
    "jpeg-cut-behind-scan-header": Refused(JPEG[: list(segments_of(JPEG))[-1][2]], NO_END),
    "jpeg-cut-in-the-middle": Refused(TWO_HALVES[:HALF], NO_END),
    "jpeg-progressive-cut-in-the-middle": Refused(PROGRESSIVE[: len(PROGRESSIVE) // 2], NO_END),
    "jpeg-end-missing": Refused(JPEG[:-2], NO_END),
    "jpeg-last-byte-missing": Refused(JPEG[:-1], NO_END),
    "jpeg-zeros-instead-of-the-rest": Refused(WITH_ZERO_TAIL, NO_END),
    "jpeg-cut-with-thumbnail": Refused(with_segments(TWO_HALVES[:HALF], segment(0xE1, THUMBNAIL)), NO_END),
    "jpeg-cut-and-closed": Refused(TWO_HALVES[:HALF] + b"\xff\xd9", BREAKS_OFF),
    "jpeg-grey-cut-and-closed": Refused(
        encode(NOISE[..., 0], "JPEG")[: HALF // 2] + b"\xff\xd9" + bytes(range(99)), BREAKS_OFF
    ),
    "jpeg-cmyk-cut-and-closed": Refused(
        encode(Image.fromarray(NOISE).convert("CMYK"), "JPEG")[:HALF] + b"\xff\xd9", BREAKS_OFF
    ),
    "jpeg-progressive-cut-and-closed": Refused(
        (cut := encode(NOISE, "JPEG", progressive=True))[: list(segments_of(cut))[-1][2] + 21] + b"\xff\xd9", BREAKS_OFF
    ),
    "jpeg-piece-missing": Refused(
        RESTARTING[: restarts_of(RESTARTING)[1]] + RESTARTING[restarts_of(RESTARTING)[3] :],
        "2 of its [0-9]+ restart markers are missing",
    ),
    "jpeg-one-restart-marker-missing": Refused(
        RESTARTING[: restarts_of(RESTARTING)[1]] + RESTARTING[restarts_of(RESTARTING)[1] + 2 :],
        "1 of its [0-9]+ restart markers are missing",
    ),
    "jpeg-of-65535-by-65535": Refused(changed(JPEG, SOF + 1, b"\xff" * 4), TOO_MANY),
    "jpeg-larger-than-its-data": Refused(changed(JPEG, SOF + 1, b"\2\0\2\0"), BREAKS_OFF),
    "jpeg-no-rows": Refused(changed(JPEG, SOF + 1, b"\0\0"), NO_IMAGE),
    "jpeg-no-columns": Refused(changed(JPEG, SOF + 3, b"\0\0"), NO_IMAGE),
    "jpeg-of-12-bits": Refused(changed(JPEG, SOF, b"\x0c"), NO_IMAGE),
    "jpeg-of-5-components": Refused(changed(JPEG, SOF + 5, b"\5"), NO_IMAGE),
    "jpeg-without-quantisation": Refused(without_segments(JPEG, 0xDB), "broken data stream"),
    "jpeg-lossless-by-name-only": Refused(JPEG.replace(b"\xff\xc0", b"\xff\xc3", 1), "broken data stream"),
    "jpeg-scan-bomb": Refused(
        PROGRESSIVE[:-2] + SCAN_HEADER * 2000 + b"\xff\xd9", "it has [0-9]+ scans, more than 1000"
    ),
    "jpeg-broken-photoshop-name": Refused(with_segments(JPEG, segment(0xED, b"Photoshop 3.0\0008BIM\4\4")), NO_IMAGE),
}

_STORED = png_of_chunks(
    png_header(WIDTH, HEIGHT), (b"IDAT", zlib.compress(b"".join(b"\0" + r.tobytes() for r in PICTURE), 0))
)
TEXT_TOO_LARGE = "Decompressed data too large"

REFUSED_PNGS = {
    "png-magic-only": Refused(PNG[:8], "cannot be decoded|not an image file"),
    "png-cut-in-header": Refused(PNG[:20], "cannot be decoded|not an image file"),
    "png-cut-behind-header": Refused(PNG[:33], "cannot be decoded|not an image file"),
    "png-cut-in-pixels": Refused(PNG[: PNG.index(b"IDAT") + 40], NO_LAST_CHUNK),
    "png-end-missing": Refused(PNG[:-12], NO_LAST_CHUNK),
    "png-pixels-of-4-GiB": Refused(changed(PNG, PNG.index(b"IDAT") - 4, b"\xff\xff\xff\xff"), NO_LAST_CHUNK),
    "png-no-pixels": Refused(png_of_chunks(png_header(WIDTH, HEIGHT), (b"IEND", b"")), "cannot be decoded"),
    "png-too-few-pixels": Refused(
        png_of_chunks(png_header(WIDTH, HEIGHT), (b"IDAT", zlib.compress(bytes(50))), (b"IEND", b"")), CUT
    ),
    "png-header-checksum-wrong": Refused(changed(PNG, 29, b"\0\0\0\0"), NO_IMAGE),
    "png-pixel-checksum-wrong": Refused(changed(PNG, len(PNG) - 16, b"\0\0\0\0"), WRONG_CHECKSUM),
    "png-one-bit-flipped": Refused(changed(_STORED, 100, bytes([_STORED[100] ^ 1])), WRONG_CHECKSUM),
    "png-pixels-overwritten": Refused(changed(PNG, PNG.index(b"IDAT") + 20, bytes(20)), WRONG_CHECKSUM),
    "png-broken-stream": Refused(
        png_of_chunks(png_header(WIDTH, HEIGHT), (b"IDAT", b"x\x9cnot deflate"), (b"IEND", b"")), "broken data stream"
    ),
    "png-unknown-filter": Refused(
        png_of_chunks(png_header(1, 1), (b"IDAT", zlib.compress(b"\x09abc")), (b"IEND", b"")), "cannot be decoded"
    ),
    "png-chunk-of-4-GiB": Refused(
        png_of_chunks(png_header(WIDTH, HEIGHT)) + b"\xff\xff\xff\xffteSt" + bytes(99), "cannot be decoded"
    ),
    "png-no-rows": Refused(png_of_chunks(png_header(5, 0), (b"IDAT", zlib.compress(b""))), NO_IMAGE),
    "png-no-columns": Refused(png_of_chunks(png_header(0, 5), (b"IDAT", zlib.compress(b""))), NO_IMAGE),
    "png-of-3-bits": Refused(png_of_chunks(png_header(4, 4, bits=3), (b"IDAT", zlib.compress(bytes(99)))), NO_IMAGE),
    "png-of-unknown-colours": Refused(
        png_of_chunks(png_header(4, 4, colour=5), (b"IDAT", zlib.compress(b""))), NO_IMAGE
    ),
    "png-bomb": Refused(png_of_chunks(png_header(60_000, 60_000), (b"IDAT", ZEROS), (b"IEND", b"")), TOO_MANY),
    "png-bomb-of-2-to-the-62": Refused(png_of_chunks(png_header(2**31 - 1, 2**31 - 1), (b"IDAT", ZEROS)), TOO_MANY),
    "png-bomb-of-one-column": Refused(png_of_chunks(png_header(1, 2**31 - 1), (b"IDAT", ZEROS)), TOO_MANY),
    "png-just-too-large": Refused(
        png_of_chunks(png_header(MAX_IMAGE_PIXELS // 10_000 + 1, 10_000), (b"IDAT", ZEROS)), f"pixels, {TOO_MANY}"
    ),
    "png-text-bomb": Refused(make_png(PICTURE, 2, before=[(b"zTXt", b"name\0\0" + ZEROS)]), TEXT_TOO_LARGE),
    "png-text-bomb-behind-the-pixels": Refused(
        make_png(PICTURE, 2, after=[(b"zTXt", b"name\0\0" + ZEROS)]), TEXT_TOO_LARGE
    ),
    "png-unicode-bomb": Refused(make_png(PICTURE, 2, before=[(b"iTXt", b"name\0\1\0\0\0" + ZEROS)]), TEXT_TOO_LARGE),
    "png-profile-bomb": Refused(make_png(PICTURE, 2, before=[(b"iCCP", b"name\0\0" + ZEROS)]), TEXT_TOO_LARGE),
    "apng-cut-in-a-frame-header": Refused(
        make_png(PICTURE, 2, before=[(b"acTL", struct.pack(">II", 1, 0)), (b"fcTL", b"\0\0\0\0")]), "truncated fcTL"
    ),
}

NO_FIT = "its strips hold [0-9]+ bytes, too few"
REFUSED_TIFFS = ({} if KNOWS_NEWER else _NEWER_TIFFS) | {
    "tiff-head-only": Refused(tiff_head("<", 8), NO_IMAGE),
    "tiff-directory-out-of-reach": Refused(tiff_head("<", 2**32 - 1) + ROWS, NO_IMAGE),
    "tiff-directory-is-the-head": Refused(tiff_head("<", 0) + ROWS, NO_IMAGE),
    "tiff-size-and-no-more": Refused(tiff_head("<", 8) + make_ifd({256: (LONG, (9,)), 257: (LONG, (9,))}, 8), NO_IMAGE),
    "tiff-cut-in-pixels": Refused(encode(PICTURE, "TIFF")[:-50], CUT),
    "tiff-directory-cut": Refused(make_tiff([GREY.tobytes()])[:-8], "what describes it goes on behind its end"),
    "bigtiff-directory-cut": Refused(BIG_TIFF[:-12], "what describes it goes on behind its end"),
    "tiff-65535-tags": Refused(tiff_head("<", 8) + b"\xff\xff" + bytes(500), NO_IMAGE),
    "tiff-tag-of-4-GiB": Refused(
        tiff_head("<", 8) + struct.pack("<HHHII", 1, 256, LONG, 2**32 - 1, 8) + bytes(64), NO_IMAGE
    ),
    "bigtiff-2-to-the-60-tags": Refused(b"II\x2b\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**60) + bytes(100), NO_IMAGE),
    "tiff-no-size": Refused(make_tiff([ROWS], **RGB, t256=None), NO_IMAGE),
    "tiff-size-as-text": Refused(make_tiff([ROWS], **RGB, t256=(2, tuple(b"20\0"))), "cannot be decoded"),
    "tiff-no-strips": Refused(make_tiff([ROWS], **RGB, t273=None, t279=None), NO_IMAGE),
    "tiff-strip-out-of-reach": Refused(make_tiff([ROWS], **RGB, t273=(LONG, (10**9,))), CUT),
    "tiff-strips-missing": Refused(make_tiff([ROWS[:240]], **RGB, t278=(LONG, (4,))), NO_FIT),
    "tiff-strip-too-short": Refused(make_tiff([ROWS[:-1]], **RGB), NO_FIT),
    "tiff-of-4-gigapixels": Refused(make_tiff([ROWS], **RGB, t256=(LONG, (65535,)), t257=(LONG, (65535,))), TOO_MANY),
    "tiff-of-2-to-the-64": Refused(
        make_tiff([ROWS], **RGB, t256=(LONG, (2**32 - 1,)), t257=(LONG, (2**32 - 1,))), TOO_MANY
    ),
    "tiff-of-65535-samples": Refused(make_tiff([ROWS], **RGB, t277=(SHORT, (65535,))), NO_IMAGE),
    "tiff-tile-bomb": Refused(
        make_tiff(
            [ZEROS],
            **RGB,
            compression=8,
            **(TILED | {"t322": (LONG, (20_000,)), "t323": (LONG, (20_000,))}),
            t324=(LONG, (8,)),
            t325=(LONG, (len(ZEROS),)),
        ),
        "a tile of it has 20000 x 20000 pixels, more than",
    ),
    "tiff-tile-of-text": Refused(
        make_tiff([ROWS], **RGB, **(TILED | {"t322": (2, tuple(b"16\0"))}), t324=(LONG, (8,))), "cannot be decoded"
    ),
    "tiff-unknown-compression": Refused(make_tiff([ROWS], **RGB, compression=54321), NO_IMAGE),
    "tiff-broken-deflate": Refused(make_tiff([b"no zlib stream"], **RGB, compression=8), "decoder error"),
    "tiff-deflate-cut": Refused(make_tiff([zlib.compress(ROWS)[:99]], **RGB, compression=8), "decoder error"),
    "tiff-lzw-cut": Refused(
        encode(NOISE, "TIFF", compression="tiff_lzw")[:-5000], "cannot be decoded|not an image file"
    ),
    "tiff-of-32-bits": Refused(encode(GREY.astype(np.int32), "TIFF"), NO_RANGE),
    "tiff-of-32-bits-unsigned": Refused(make_tiff([GREY.astype("<u4").tobytes()], bits=(32,)), NO_RANGE),
    "tiff-of-floats": Refused(encode(GREY.astype(np.float32), "TIFF"), NO_RANGE),
    "tiff-of-signed-16-bits": Refused(make_tiff([DEEP_GREY.tobytes()], bits=(16,), t339=(SHORT, (2,))), NO_RANGE),
    "tiff-of-signed-8-bits": Refused(make_tiff([GREY.tobytes()], t339=(SHORT, (2,))), NO_RANGE),
    "tiff-of-12-bits": Refused(make_tiff([bytes(HEIGHT * WIDTH * 3 // 2)], bits=(12,)), "less than 16 bits"),
    "tiff-of-16-bits-white-is-zero": Refused(
        make_tiff([DEEP_GREY.tobytes()], bits=(16,), photometric=0), "0 stands for white"
    ),
}

BMP = encode(PICTURE, "BMP")
WEBP = encode(PICTURE, "WEBP", lossless=True)
NO_DECODER = r"could not create decoder object"
_VP8X = b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\xff\xff" * 2 + b"VP8 \0\0\0\0"

REFUSED_OTHERS = {
    "bmp-head-only": Refused(BMP[:14], "cannot be decoded|not an image file"),
    "bmp-cut-in-pixels": Refused(BMP[:-50], CUT),
    "bmp-last-byte-missing": Refused(BMP[:-1], CUT),
    "bmp-negative-width": Refused(make_bmp(b"", 24, size=(5, -5)), TOO_MANY),
    "bmp-of-2-to-the-62": Refused(make_bmp(b"", 24, size=(2**31 - 1, 2**31 - 1)), TOO_MANY),
    "bmp-lowest-height": Refused(make_bmp(b"", 24, size=(-(2**31), 9)), TOO_MANY),
    "bmp-no-rows": Refused(make_bmp(b"", 24, size=(0, 9)), NO_IMAGE),
    "bmp-of-2-bits": Refused(make_bmp(bytes(99), 2), "Unsupported BMP pixel depth"),
    "bmp-around-a-jpeg": Refused(make_bmp(JPEG, 24, compression=4), "Unsupported BMP compression"),
    "bmp-unknown-masks": Refused(
        make_bmp(bytes(999), 16, compression=3, masks=(7, 56, 448)), "Unsupported BMP bitfields"
    ),
    "bmp-run-lengths-cut": Refused(make_bmp(RLE8[:20], 8, compression=1, palette=PALETTE), "not enough image data"),
    "gif-head-only": Refused(GIF[:13], "cannot be decoded|not an image file"),
    "gif-cut-in-pixels": Refused(GIF[:-20], CUT),
    "gif-ends-early": Refused(make_gif([4, 1, 1, 5], screen=(8, 8), frame=(8, 8)), CUT),
    "gif-no-frame": Refused(GIF[:25] + b";", "cannot be decoded|not an image file"),
    "gif-screen-bomb": Refused(make_gif([4, 1, 5], screen=(65535, 65535), frame=(8, 8)), TOO_MANY),
    "gif-frame-bomb": Refused(make_gif([4, 1, 5], screen=(8, 8), frame=(65535, 65535)), TOO_MANY),
    "webp-head-only": Refused(WEBP[:12], "cannot be decoded|not an image file"),
    "webp-cut-in-header": Refused(WEBP[:20], "cannot be decoded|not an image file"),
    "webp-cut-in-pixels": Refused(WEBP[: len(WEBP) // 2], NO_DECODER),
    "webp-last-byte-missing": Refused(WEBP[:-2], NO_DECODER),
    "webp-wrong-signature": Refused(changed(WEBP, 20, b"\0"), NO_DECODER),
    "webp-canvas-bomb": Refused(_VP8X, f"{TOO_MANY}|{NO_DECODER}"),
}
if AVIF:
    REFUSED_OTHERS |= {
        "avif-head-only": Refused(AVIF[:32], "cannot be decoded|not an image file"),
        "avif-cut-in-pixels": Refused(AVIF[:-40], "Truncated data"),
        "avif-last-byte-missing": Refused(AVIF[:-1], "Truncated data"),
    }

REFUSED = {**NO_IMAGES, **REFUSED_JPEGS, **REFUSED_PNGS, **REFUSED_TIFFS, **REFUSED_OTHERS}
