"""Files that Pillow, or we, could easily get wrong, each with the pixels that are to come of it."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageCms

from tests.extract.hostile import (
    GREY,
    HEIGHT,
    INDICES,
    LONG,
    NOISE,
    ORIENTATION,
    PALETTE,
    PICTURE,
    RATIONAL,
    SHORT,
    STRIPES,
    UPRIGHT,
    WIDTH,
    Right,
    bmp_rows,
    changed,
    decoded_by_pillow,
    encode,
    exif,
    exif_block,
    gif_codes,
    grey,
    make_bmp,
    make_gif,
    make_png,
    make_tiff,
    packed,
    place_of,
    png_header,
    png_of_chunks,
    segment,
    tiff_head,
    with_segments,
    without_segments,
)

Image.init()

JPEG = encode(PICTURE, "JPEG", quality=95, subsampling=0)
DECODED = decoded_by_pillow(JPEG)
PROGRESSIVE = encode(PICTURE, "JPEG", quality=95, subsampling=0, progressive=True)
CMYK_JPEG = encode(Image.fromarray(PICTURE).convert("CMYK"), "JPEG", quality=100)
# What Pillow turns upside down on writing: with no black ink and the rest as luma and chroma, it is Adobe's YCCK.
_YCC = np.asarray(Image.fromarray(255 - PICTURE).convert("YCbCr"))
_YCCK = np.dstack([255 - _YCC, np.zeros((HEIGHT, WIDTH, 1), np.uint8)])
_AS_CMYK = encode(Image.frombytes("CMYK", (WIDTH, HEIGHT), _YCCK.tobytes()), "JPEG", quality=100)
YCCK_JPEG = changed(_AS_CMYK, place_of(_AS_CMYK, 0xEE) + 11, b"\2")
# Made by libjpeg itself, which Pillow does not ask for arithmetic coding: 8 x 16 pixels of 9 * x + 12 * y.
ARITHMETIC_JPEG = base64.b85decode(
    "|JeWF01!$>Nk#wx0RR9200961|JwjV00IF40RaI50RaI50s;a81OoyB0s;jD1Oo&H1qKEN1qKEN2MGuU2MGrT1_%oX2?`1d3JL}Y3k(Yi3<(Mf3j"
    "fIf3kU!R01yEI5di<p00saM5C#9*00;pA002J#{{ZOqB?#~wWc-Wu45qS6rrVCyHwCU>|Je"
)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
RESTARTING = encode(NOISE, "JPEG", restart_marker_blocks=3)
THUMBNAIL = exif_block({ORIENTATION: (SHORT, (1,))}) + encode(PICTURE[:8, :8], "JPEG")


def restarts_of(jpeg: bytes) -> list[int]:
    return [place for place in range(len(jpeg) - 1) if jpeg[place] == 0xFF and 0xD0 <= jpeg[place + 1] <= 0xD7]


RIGHT_JPEGS = {
    "jpeg": Right(JPEG, PICTURE, 6),
    "jpeg-grey": Right(encode(GREY, "JPEG", quality=95), grey(GREY), 2),
    "jpeg-progressive": Right(PROGRESSIVE, DECODED),
    "jpeg-optimised": Right(encode(PICTURE, "JPEG", quality=95, subsampling=0, optimize=True), DECODED),
    "jpeg-half-the-chroma": Right(encode(PICTURE, "JPEG", quality=95, subsampling=2), PICTURE, 20),
    "jpeg-stored-as-rgb": Right(encode(PICTURE, "JPEG", quality=95, keep_rgb=True), PICTURE, 2),
    "jpeg-arithmetic": Right(ARITHMETIC_JPEG, grey(np.add.outer(np.arange(8) * 12, np.arange(16) * 9)), 1),
    "jpeg-cmyk": Right(CMYK_JPEG, PICTURE, 1),
    "jpeg-cmyk-without-adobe-marker": Right(without_segments(CMYK_JPEG, 0xEE), PICTURE, 1),
    "jpeg-ycck": Right(YCCK_JPEG, PICTURE, 4),
    "jpeg-without-huffman-tables": Right(without_segments(JPEG, 0xC4), DECODED),
    "jpeg-with-restart-markers": Right(RESTARTING, decoded_by_pillow(encode(NOISE, "JPEG"))),
    "jpeg-garbage-behind": Right(JPEG + bytes(range(256)), DECODED),
    "jpeg-zeros-behind": Right(JPEG + bytes(4096), DECODED),
    "jpeg-twice": Right(JPEG + encode(PICTURE[::-1], "JPEG"), DECODED),
    "jpeg-filled-between-segments": Right(JPEG[:2] + b"\xff\xff\xff" + JPEG[2:], DECODED),
    "jpeg-comment-of-64-KiB": Right(with_segments(JPEG, segment(0xFE, bytes(65533))), DECODED),
    "jpeg-srgb-profile": Right(encode(PICTURE, "JPEG", quality=95, subsampling=0, icc_profile=SRGB), DECODED),
    "jpeg-broken-profile": Right(with_segments(JPEG, segment(0xE2, b"ICC_PROFILE\0\7\1junk")), DECODED),
    "jpeg-broken-photoshop-block": Right(
        with_segments(JPEG, segment(0xED, b"Photoshop 3.0\0008BIM\4\4\0\0\0")), DECODED
    ),
    "jpeg-thumbnail-in-exif": Right(with_segments(JPEG, segment(0xE1, THUMBNAIL)), DECODED),
    "jpeg-grey-corner": Right(encode(np.full((9, 9), 128, np.uint8), "JPEG"), np.full((9, 9, 3), 128, np.uint8)),
    "jpeg-one-pixel": Right(encode(PICTURE[:1, -1:], "JPEG", quality=100), PICTURE[:1, -1:], 2),
    "jpeg-one-wide": Right(encode(np.full((65500, 1), 70, np.uint8), "JPEG"), np.full((65500, 1, 3), 70, np.uint8), 1),
    "jpeg-one-high": Right(encode(np.full((1, 65500), 70, np.uint8), "JPEG"), np.full((1, 65500, 3), 70, np.uint8), 1),
    "mpo": Right(
        encode(PICTURE, "MPO", quality=95, subsampling=0, save_all=True, append_images=[Image.new("RGB", (5, 5))]),
        DECODED,
    ),
    "mpo-malformed": Right(with_segments(JPEG, segment(0xE2, b"MPF\0II*\0\x08\0\0\0\0\0")), DECODED),
}

_KEEPING_EXIF: dict[str, tuple[str, NDArray[np.uint8], dict[str, Any]]] = {
    "jpeg": ("JPEG", DECODED, {"quality": 95, "subsampling": 0}),
    "png": ("PNG", PICTURE, {}),
    "tiff": ("TIFF", PICTURE, {}),
    "tiff-lzw": ("TIFF", PICTURE, {"compression": "tiff_lzw"}),
    "webp": ("WEBP", PICTURE, {"lossless": True}),
}
RIGHT_EXIF = {
    f"{name}-exif-{number}": Right(encode(PICTURE, form, exif=exif(number), **options), turn(kept))
    for name, (form, kept, options) in _KEEPING_EXIF.items()
    for number, turn in UPRIGHT.items()
}


def with_exif(payload: bytes) -> bytes:
    return with_segments(JPEG, segment(0xE1, payload))


ON_ITS_SIDE = UPRIGHT[6](DECODED)
SIX = (SHORT, (6,))
BROKEN_EXIF = {
    "exif-big-endian": Right(with_exif(exif_block({ORIENTATION: SIX}, ">")), ON_ITS_SIDE),
    "exif-long-number": Right(with_exif(exif_block({ORIENTATION: (LONG, (6,))})), ON_ITS_SIDE),
    "exif-tags-of-odd-types": Right(
        with_exif(exif_block({256: (2, tuple(b"10\0")), 270: (16, (1,)), ORIENTATION: SIX, 282: (1, (7,))})),
        ON_ITS_SIDE,
    ),
    "exif-twice": Right(
        with_segments(JPEG, *[segment(0xE1, exif_block({ORIENTATION: (SHORT, (n,))})) for n in (6, 3)]), ON_ITS_SIDE
    ),
    "exif-points-at-itself": Right(
        with_exif(exif_block({ORIENTATION: SIX, 34665: (LONG, (8,))}, following=8)), ON_ITS_SIDE
    ),
    "xmp-orientation": Right(
        with_segments(JPEG, segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>')), ON_ITS_SIDE
    ),
    "exif-orientation-0": Right(with_exif(exif_block({ORIENTATION: (SHORT, (0,))})), DECODED),
    "exif-orientation-9": Right(with_exif(exif_block({ORIENTATION: (SHORT, (9,))})), DECODED),
    "exif-orientation-65535": Right(with_exif(exif_block({ORIENTATION: (SHORT, (65535,))})), DECODED),
    "exif-orientation-as-text": Right(with_exif(exif_block({ORIENTATION: (2, tuple(b"6\0"))})), DECODED),
    "exif-orientation-as-bytes": Right(with_exif(exif_block({ORIENTATION: (7, (6, 6))})), DECODED),
    "exif-orientation-twice-in-one-tag": Right(with_exif(exif_block({ORIENTATION: (SHORT, (6, 3))})), ON_ITS_SIDE),
    "exif-empty": Right(with_exif(b"Exif\0\0"), DECODED),
    "exif-garbage": Right(with_exif(b"Exif\0\0" + bytes(range(1, 200))), DECODED),
    "exif-head-only": Right(with_exif(b"Exif\0\0" + tiff_head("<", 8)), DECODED),
    "exif-directory-out-of-reach": Right(with_exif(b"Exif\0\0" + tiff_head("<", 2**32 - 1)), DECODED),
    "exif-cut-in-a-value": Right(
        with_exif(exif_block({ORIENTATION: SIX, 305: (2, tuple(b"a long name"))})[:-4]), ON_ITS_SIDE
    ),
    "exif-cut-in-a-tag": Right(with_exif(exif_block({ORIENTATION: SIX})[:-8]), DECODED),
    "exif-65535-tags": Right(with_exif(b"Exif\0\0" + tiff_head("<", 8) + b"\xff\xff" + bytes(100)), DECODED),
    "exif-value-of-4-GiB": Right(
        with_exif(b"Exif\0\0" + tiff_head("<", 8) + struct.pack("<HHHII", 1, 305, 2, 2**32 - 1, 8) + bytes(4)), DECODED
    ),
    "exif-divided-by-zero": Right(with_exif(exif_block({282: (RATIONAL, (1, 0)), 296: (SHORT, (2,))})), DECODED),
    "webp-exif-garbage": Right(encode(PICTURE, "WEBP", lossless=True, exif=b"Exif\0\0garbage"), PICTURE),
    "png-exif-garbage": Right(make_png(PICTURE, 2, before=[(b"eXIf", b"garbage")]), PICTURE),
    "png-exif-as-broken-text": Right(
        make_png(PICTURE, 2, before=[(b"tEXt", b"Raw profile type exif\0\nexif\n 9\nno hexadecimals")]), PICTURE
    ),
}

RGBA = np.dstack([PICTURE, (255 - GREY)])
DEEP = (PICTURE.astype(np.uint16) << 8) + 77
"""Sixteen bits; Pillow keeps the upper eight of them where there are colours."""
DEEP_GREY = (GREY.astype(np.uint16) * 257 + 60).astype(np.uint16)
"""Sixteen bits that are `GREY` when they are rounded, as long as 60 / 257 is less than a half."""
LOOKED_UP = PALETTE[INDICES]
PLTE = (b"PLTE", PALETTE.tobytes())
PNG = make_png(PICTURE, 2)
IDAT = PNG[PNG.index(b"IDAT") + 4 : -16]
APNG = encode(PICTURE, "PNG", save_all=True, append_images=[Image.fromarray(PICTURE[::-1])])
NO_FRAMES = (b"acTL", struct.pack(">II", 0, 0))

RIGHT_PNGS = {
    "png": Right(PNG, PICTURE),
    "png-black-and-white": Right(make_png(STRIPES, 0, bits=1), grey(STRIPES * 255)),
    "png-grey-of-2-bits": Right(make_png(INDICES, 0, bits=2), grey(INDICES * 85)),
    "png-grey-of-4-bits": Right(make_png(GREY // 17, 0, bits=4), grey(GREY // 17 * 17)),
    "png-grey": Right(make_png(GREY, 0), grey(GREY)),
    "png-grey-of-16-bits": Right(make_png(DEEP_GREY, 0, bits=16), grey(GREY)),
    "png-of-16-bits": Right(make_png(DEEP, 2, bits=16), PICTURE),
    "png-grey-alpha": Right(make_png(np.dstack([GREY, 255 - GREY]), 4), grey(GREY)),
    "png-grey-alpha-of-16-bits": Right(make_png(np.dstack([DEEP[..., 0], DEEP[..., 1]]), 4, bits=16), grey(GREY)),
    "png-alpha": Right(make_png(RGBA, 6), PICTURE),
    "png-alpha-of-16-bits": Right(make_png(np.dstack([DEEP, DEEP[..., 0]]), 6, bits=16), PICTURE),
    "png-palette-of-1-bit": Right(make_png(STRIPES, 3, bits=1, before=[PLTE]), PALETTE[STRIPES]),
    "png-palette-of-2-bits": Right(make_png(INDICES, 3, bits=2, before=[PLTE]), LOOKED_UP),
    "png-palette-of-4-bits": Right(make_png(INDICES, 3, bits=4, before=[PLTE]), LOOKED_UP),
    "png-palette": Right(make_png(INDICES, 3, before=[PLTE]), LOOKED_UP),
    "png-palette-see-through": Right(make_png(INDICES, 3, before=[PLTE, (b"tRNS", b"\x80\x00\xff\x10")]), LOOKED_UP),
    "png-palette-one-clear-colour": Right(make_png(INDICES, 3, before=[PLTE, (b"tRNS", b"\xff\0")]), LOOKED_UP),
    "png-palette-too-much-transparency": Right(make_png(INDICES, 3, before=[PLTE, (b"tRNS", bytes(300))]), LOOKED_UP),
    "png-clear-colour": Right(make_png(PICTURE, 2, before=[(b"tRNS", struct.pack(">HHH", *PICTURE[3, 4]))]), PICTURE),
    "png-clear-grey": Right(make_png(GREY, 0, before=[(b"tRNS", b"\0\x0c")]), grey(GREY)),
    "png-clear-black": Right(make_png(STRIPES, 0, bits=1, before=[(b"tRNS", b"\0\0")]), grey(STRIPES * 255)),
    "png-clear-grey-of-16-bits": Right(make_png(DEEP_GREY, 0, bits=16, before=[(b"tRNS", b"\0\x3c")]), grey(GREY)),
    "png-interlaced": Right(make_png(PICTURE, 2, interlaced=True), PICTURE),
    "png-interlaced-1-bit": Right(make_png(STRIPES, 0, bits=1, interlaced=True), grey(STRIPES * 255)),
    "png-interlaced-16-bits": Right(make_png(DEEP_GREY, 0, bits=16, interlaced=True), grey(GREY)),
    "png-exif-behind-the-pixels": Right(
        make_png(PICTURE, 2, after=[(b"eXIf", exif_block({ORIENTATION: SIX})[6:])]), UPRIGHT[6](PICTURE)
    ),
    "png-srgb-profile": Right(encode(PICTURE, "PNG", icc_profile=SRGB), PICTURE),
    "png-broken-profile": Right(make_png(PICTURE, 2, before=[(b"iCCP", b"name\0\0no zlib stream")]), PICTURE),
    "png-gamma": Right(make_png(PICTURE, 2, before=[(b"gAMA", struct.pack(">I", 100_000))]), PICTURE),
    "png-unknown-chunk": Right(make_png(PICTURE, 2, before=[(b"teSt", b"?")], after=[(b"teSt", b"?")]), PICTURE),
    "png-many-idats": Right(
        png_of_chunks(
            png_header(WIDTH, HEIGHT),
            *((b"IDAT", IDAT[place : place + 7]) for place in range(0, len(IDAT), 7)),
            (b"IDAT", b""),
            (b"IEND", b""),
        ),
        PICTURE,
    ),
    "png-last-byte-missing": Right(PNG[:-1], PICTURE),
    "png-garbage-behind": Right(PNG + bytes(range(256)), PICTURE),
    "png-one-pixel": Right(make_png(PICTURE[:1, -1:], 2), PICTURE[:1, -1:]),
    "png-one-wide": Right(make_png(np.zeros((40_000, 1, 3)), 2), np.zeros((40_000, 1, 3), np.uint8)),
    "png-one-high": Right(make_png(np.ones((1, 40_000, 3)), 2), np.ones((1, 40_000, 3), np.uint8)),
    "apng": Right(APNG, PICTURE),
    "apng-of-no-frames": Right(make_png(PICTURE, 2, before=[NO_FRAMES]), PICTURE),
}

ROWS = PICTURE.tobytes()
RGB: dict[str, Any] = {"bits": (8, 8, 8), "photometric": 2}
_WIDER = np.pad(PICTURE, ((0, 4), (0, 12), (0, 0)), "edge")
TILES = [_WIDER[:, left : left + 16].tobytes() for left in (0, 16)]
TILED: dict[str, Any] = {"t273": None, "t278": None, "t279": None, "t322": (LONG, (16,)), "t323": (LONG, (16,))}
_COLORMAP = tuple(int(value) * 257 for value in np.vstack([PALETTE, np.zeros((252, 3), int)]).T.reshape(-1))
INKS = np.dstack([255 - PICTURE, np.zeros((HEIGHT, WIDTH), np.uint8)])
HALVED = np.dstack([GREY // 2, np.full_like(GREY, 128)])
_BIG_TAGS = {256: WIDTH, 257: HEIGHT, 258: 8, 259: 1, 262: 1, 273: 16, 277: 1, 278: HEIGHT, 279: GREY.size}
BIG_TIFF = (
    b"II\x2b\0\x08\0\0\0"
    + struct.pack("<Q", 16 + GREY.size)
    + GREY.tobytes()
    + struct.pack("<Q", len(_BIG_TAGS))
    + b"".join(struct.pack("<HHQQ", tag, LONG, 1, value) for tag, value in _BIG_TAGS.items())
    + bytes(8)
)

NEWER_TIFFS = {
    "tiff-grey-times-alpha": Right(make_tiff([HALVED.tobytes()], bits=(8, 8), t338=(SHORT, (1,))), grey(GREY), 2),
    "tiff-ycbcr": Right(
        make_tiff([np.asarray(Image.fromarray(PICTURE).convert("YCbCr")).tobytes()], bits=(8,) * 3, photometric=6),
        PICTURE,
        3,
    ),
}
"""Pillow reads these from version 13 on. Before, they are refused."""

KNOWS_NEWER = int(PIL.__version__.partition(".")[0]) >= 13

RIGHT_TIFFS = (NEWER_TIFFS if KNOWS_NEWER else {}) | {
    "tiff": Right(make_tiff([ROWS], **RGB), PICTURE),
    "tiff-big-endian": Right(make_tiff([ROWS], order=">", **RGB), PICTURE),
    "tiff-bigtiff": Right(BIG_TIFF, grey(GREY)),
    "tiff-three-strips": Right(make_tiff([PICTURE[top : top + 4].tobytes() for top in (0, 4, 8)], **RGB), PICTURE),
    "tiff-one-plane-each": Right(
        make_tiff(
            [PICTURE[..., band].tobytes() for band in range(3)], **RGB, t284=(SHORT, (2,)), t278=(LONG, (HEIGHT,))
        ),
        PICTURE,
    ),
    "tiff-tiled": Right(make_tiff(TILES, **RGB, **TILED, t324=(LONG, (8, 8 + 768)), t325=(LONG, (768, 768))), PICTURE),
    "tiff-tiled-deflate": Right(
        make_tiff(
            [zlib.compress(tile) for tile in TILES],
            **RGB,
            compression=8,
            **TILED,
            t324=(LONG, (8, 8 + len(zlib.compress(TILES[0])))),
            t325=(LONG, tuple(len(zlib.compress(tile)) for tile in TILES)),
        ),
        PICTURE,
    ),
    **{
        f"tiff-{name}": Right(encode(PICTURE, "TIFF", compression=compression), PICTURE)
        for name, compression in (("lzw", "tiff_lzw"), ("deflate", "tiff_adobe_deflate"), ("packbits", "packbits"))
    },
    "tiff-jpeg": Right(encode(PICTURE, "TIFF", compression="jpeg", quality=95), PICTURE, 2),
    "tiff-fax": Right(encode(Image.fromarray(STRIPES == 1), "TIFF", compression="group4"), grey(STRIPES * 255)),
    "tiff-black-and-white": Right(
        make_tiff([b"".join(packed(row, 1) for row in STRIPES)], bits=(1,)), grey(STRIPES * 255)
    ),
    "tiff-white-is-zero": Right(make_tiff([GREY.tobytes()], photometric=0), grey(255 - GREY)),
    "tiff-grey-of-4-bits": Right(
        make_tiff([b"".join(packed(row, 4) for row in GREY // 17)], bits=(4,)), grey(GREY // 17 * 17)
    ),
    "tiff-grey-of-16-bits": Right(make_tiff([DEEP_GREY.tobytes()], bits=(16,)), grey(GREY)),
    "tiff-grey-of-16-bits-big-endian": Right(
        make_tiff([DEEP_GREY.astype(">u2").tobytes()], bits=(16,), order=">"), grey(GREY)
    ),
    "tiff-grey-of-16-bits-deflate": Right(
        make_tiff([zlib.compress(DEEP_GREY.astype(">u2").tobytes())], bits=(16,), order=">", compression=8), grey(GREY)
    ),
    "tiff-of-16-bits": Right(make_tiff([DEEP.tobytes()], bits=(16,) * 3, photometric=2), PICTURE),
    "tiff-of-16-bits-big-endian": Right(
        make_tiff([DEEP.astype(">u2").tobytes()], bits=(16,) * 3, photometric=2, order=">"), PICTURE
    ),
    "tiff-alpha": Right(make_tiff([RGBA.tobytes()], bits=(8,) * 4, photometric=2, t338=(SHORT, (2,))), PICTURE),
    "tiff-grey-alpha": Right(
        make_tiff([np.dstack([GREY, GREY]).tobytes()], bits=(8, 8), t338=(SHORT, (2,))), grey(GREY)
    ),
    "tiff-times-alpha": Right(
        make_tiff(
            [np.dstack([PICTURE // 2, np.full_like(GREY, 128)]).tobytes()],
            bits=(8,) * 4,
            photometric=2,
            t338=(SHORT, (1,)),
        ),
        PICTURE,
        2,
    ),
    "tiff-palette": Right(make_tiff([INDICES.tobytes()], photometric=3, t320=(SHORT, _COLORMAP)), LOOKED_UP),
    "tiff-cmyk": Right(make_tiff([INKS.tobytes()], bits=(8,) * 4, photometric=5), PICTURE),
    "tiff-lab": Right(encode(Image.fromarray(PICTURE).convert("LAB"), "TIFF"), PICTURE, 30),
    "tiff-several-pages": Right(
        encode(PICTURE, "TIFF", save_all=True, append_images=[Image.fromarray(PICTURE[::-1])]), PICTURE
    ),
    "tiff-pages-in-a-circle": Right(make_tiff([ROWS], **RGB, following=8 + len(ROWS)), PICTURE),
    "tiff-next-page-out-of-reach": Right(make_tiff([ROWS], **RGB, following=2**32 - 1), PICTURE),
    "tiff-sub-directory-is-itself": Right(make_tiff([ROWS], **RGB, t34665=(LONG, (8 + len(ROWS),))), PICTURE),
    "tiff-broken-description": Right(make_tiff([ROWS], **RGB, t270=(16, (2**63,))), PICTURE),
    "tiff-one-pixel": Right(make_tiff([bytes([9])], size=(1, 1)), np.full((1, 1, 3), 9, np.uint8)),
}

RLE8 = b"".join(bytes([WIDTH, row]) + b"\0\0" for row in range(4)) * 3 + b"\0\1"
_RLE4 = b"".join(bytes([WIDTH, row * 17]) + b"\0\0" for row in range(4)) * 3 + b"\0\1"
_RLE_PIXELS = PALETTE[np.broadcast_to(np.arange(HEIGHT)[::-1, None] % 4, (HEIGHT, WIDTH))]
_565 = PICTURE[..., 0].astype(np.uint16) >> 3 << 11 | PICTURE[..., 1].astype(np.uint16) >> 2 << 5 | PICTURE[..., 2] >> 3
_555 = PICTURE[..., 0].astype(np.uint16) >> 3 << 10 | PICTURE[..., 1].astype(np.uint16) >> 3 << 5 | PICTURE[..., 2] >> 3
_BGRX = np.dstack([PICTURE[..., ::-1], np.zeros((HEIGHT, WIDTH, 1), np.uint8)])

RIGHT_BMPS = {
    "bmp": Right(encode(PICTURE, "BMP"), PICTURE),
    "bmp-of-32-bits": Right(make_bmp(bmp_rows(_BGRX, 32), 32), PICTURE),
    "bmp-of-16-bits": Right(make_bmp(bmp_rows(_555, 16), 16), PICTURE, 8),
    "bmp-of-16-bits-by-masks": Right(
        make_bmp(bmp_rows(_565, 16), 16, compression=3, masks=(0xF800, 0x7E0, 0x1F)), PICTURE, 8
    ),
    "bmp-of-8-bits": Right(make_bmp(bmp_rows(INDICES, 8), 8, palette=PALETTE), LOOKED_UP),
    "bmp-of-4-bits": Right(make_bmp(bmp_rows(INDICES, 4), 4, palette=PALETTE), LOOKED_UP),
    "bmp-of-1-bit": Right(make_bmp(bmp_rows(STRIPES, 1), 1, palette=PALETTE[:2]), PALETTE[STRIPES]),
    "bmp-from-the-top": Right(make_bmp(bmp_rows(_BGRX[::-1], 32), 32, size=(-HEIGHT, WIDTH)), PICTURE),
    "bmp-run-lengths": Right(make_bmp(RLE8, 8, compression=1, palette=PALETTE), _RLE_PIXELS),
    "bmp-run-lengths-of-4-bits": Right(make_bmp(_RLE4, 4, compression=2, palette=PALETTE), _RLE_PIXELS),
    "bmp-of-os2": Right(
        struct.pack("<2sIHHIIHHHH", b"BM", 0, 0, 0, 26, 12, WIDTH, HEIGHT, 1, 24) + bmp_rows(PICTURE[..., ::-1], 24),
        PICTURE,
    ),
    "bmp-wrong-file-size": Right(changed(encode(PICTURE, "BMP"), 2, b"\xff\xff\xff\xff"), PICTURE),
}

GIF = encode(Image.fromarray(LOOKED_UP).quantize(4), "GIF")
_WITHIN = np.broadcast_to(PALETTE[0], (HEIGHT, WIDTH, 3)).copy()
_WITHIN[2:8, 3:13] = PALETTE[INDICES[:6, :10]]

RIGHT_OTHERS = {
    "gif": Right(make_gif(gif_codes(INDICES), screen=(HEIGHT, WIDTH), frame=(HEIGHT, WIDTH)), LOOKED_UP),
    "gif-interlaced": Right(GIF, LOOKED_UP),
    "gif-clear-colour": Right(encode(Image.fromarray(LOOKED_UP).quantize(4), "GIF", transparency=1), LOOKED_UP),
    "gif-animated": Right(
        encode(
            Image.fromarray(LOOKED_UP).quantize(4),
            "GIF",
            save_all=True,
            append_images=[Image.fromarray(LOOKED_UP[::-1])],
        ),
        LOOKED_UP,
    ),
    "gif-frame-smaller-than-screen": Right(
        make_gif(gif_codes(INDICES[:6, :10]), screen=(HEIGHT, WIDTH), frame=(6, 10), at=(2, 3)), _WITHIN
    ),
    "gif-frame-larger-than-screen": Right(
        make_gif(gif_codes(INDICES), screen=(3, 3), frame=(HEIGHT, WIDTH)), LOOKED_UP
    ),
    "gif-without-end": Right(GIF[:-1], LOOKED_UP),
    "gif-garbage-behind": Right(GIF + bytes(range(256)), LOOKED_UP),
    "webp": Right(encode(PICTURE, "WEBP", quality=95), PICTURE, 20),
    "webp-lossless": Right(encode(PICTURE, "WEBP", lossless=True), PICTURE),
    "webp-alpha": Right(encode(RGBA, "WEBP", lossless=True, exact=True), PICTURE),
    "webp-animated": Right(
        encode(PICTURE, "WEBP", lossless=True, save_all=True, append_images=[Image.fromarray(PICTURE[::-1])]), PICTURE
    ),
    "webp-garbage-behind": Right(encode(PICTURE, "WEBP", lossless=True) + b"garbage", PICTURE),
}
AVIF = encode(PICTURE, "AVIF", quality=95, subsampling="4:4:4") if "AVIF" in Image.SAVE else b""
if AVIF:
    _TURNED_AVIF = encode(PICTURE, "AVIF", quality=95, subsampling="4:4:4", exif=exif(6))
    RIGHT_OTHERS |= {"avif": Right(AVIF, PICTURE, 6), "avif-exif-6": Right(_TURNED_AVIF, UPRIGHT[6](PICTURE), 6)}

RIGHT = {**RIGHT_JPEGS, **RIGHT_EXIF, **BROKEN_EXIF, **RIGHT_PNGS, **RIGHT_TIFFS, **RIGHT_BMPS, **RIGHT_OTHERS}
