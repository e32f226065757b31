"""Broken, odd or large metadata: the picture is decoded, upright if its orientation is readable."""

from __future__ import annotations

import io
import os
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from edgeclip import ImageError
from edgeclip.images import formats
from edgeclip.images.decoding import decode
from edgeclip.manifest import ImageSpec
from tests.support.data.image_files import (
    camera_pixels,
    chunk,
    encoded,
    exif,
    png,
    segment,
    tiff,
    turned,
    with_chunks,
    with_segments,
)

# Pillow warns about such metadata when it is read.
pytestmark = pytest.mark.filterwarnings("ignore")

PIXELS = np.random.default_rng(0).integers(0, 256, (33, 47, 3), np.uint8)
PICTURE = Image.fromarray(PIXELS)
JPEG, PNG, GIF = (encoded(PICTURE, form) for form in ("JPEG", "PNG", "GIF"))
WEBP = encoded(PICTURE, "WEBP", lossless=True, exif=b"Exif\0\0" + exif(turned(1)))
GIF_HEAD = 13 + 768  # with its global palette
DENSITY = segment(0xE0, b"JFIF\0\1\1\1\0H\0H\0\0")  # makes Pillow read EXIF later
HUGE = zlib.compress(bytes(2 << 20))  # above Pillow's limit once inflated
JUNK = b"Exif\0\0" + b"junk" * 10
XMP = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'
SIX = exif(turned(6))
# Pillow divides the resolution, which should be two numbers but is one.
ODD = exif(turned(6), (0x011A, 1, 1, b"\1\0\0\0"), (0x0128, 3, 1, b"\2\0\0\0"))
# A tag whose value Pillow reads but cannot write.
UNWRITABLE = exif((0x010F, 3, 1, b"\6\0\0\0"), turned(6), (0x011A, 2, 4, b"abc\0"))


def mpf(*tags: tuple[int, int, int, bytes]) -> bytes:
    return segment(0xE2, b"MPF\0" + exif(*tags))


def jpeg(*segments: bytes, jfif: bytes | None = None) -> bytes:
    return with_segments(JPEG, *segments, jfif=jfif)


def gif_with(extension: bytes) -> bytes:
    return GIF[:GIF_HEAD] + extension + GIF[GIF_HEAD:]


def text(key: bytes, value: bytes) -> bytes:
    return chunk(b"tEXt", key + b"\0" + value)


def webp_without(size: int) -> bytes:
    """Return the file without its last bytes, which belong to EXIF."""
    return WEBP[:-size]


UPRIGHT = {
    "jpeg, junk EXIF after a density": jpeg(segment(0xE1, JUNK), jfif=DENSITY),
    "jpeg, junk EXIF": jpeg(segment(0xE1, JUNK), jfif=b""),
    "jpeg, EXIF cut": jpeg(segment(0xE1, b"Exif\0\0" + SIX[:15]), jfif=DENSITY),
    "jpeg, EXIF cut, no density": jpeg(segment(0xE1, b"Exif\0\0" + SIX[:15]), jfif=b""),
    "jpeg, empty EXIF": jpeg(segment(0xE1, b"Exif\0\0"), jfif=b""),
    "jpeg, odd XMP": jpeg(segment(0xE1, XMP.replace(b'"6"', b'"9"'))),
    "jpeg, short JFIF": jpeg(segment(0xE0, b"JFIF\0"), jfif=b""),
    "jpeg, short Adobe": jpeg(segment(0xEE, b"Adobe")),
    "jpeg, short profile": jpeg(segment(0xE2, b"ICC_PROFILE\0")),
    "jpeg, bad profile": jpeg(segment(0xE2, b"ICC_PROFILE\0\1\5junk")),
    "jpeg, cut Photoshop": jpeg(segment(0xED, b"Photoshop 3.0\0008BIM\4\4")),
    "jpeg, junk MPF": jpeg(segment(0xE2, b"MPF\0junkjunkjunk")),
    "jpeg, MPF of text": jpeg(mpf((0xB001, 2, 1, b"a\0\0\0"))),
    "jpeg, MPF without entries": jpeg(mpf((0xB001, 4, 1, b"\2\0\0\0"))),
    "jpeg, all junk": jpeg(*(segment(marker, b"\xff\xd8junk") for marker in range(0xE0, 0xF0))),
    "jpeg, all empty": jpeg(*(segment(marker, b"") for marker in range(0xE0, 0xF0))),
    "jpeg, junk comment": jpeg(segment(0xFE, b"\xff\xfe\0")),
    "png, junk EXIF": with_chunks(PNG, chunk(b"eXIf", b"junk")),
    "png, junk EXIF after": with_chunks(PNG, chunk(b"eXIf", b"junk"), after=True),
    "png, cut raw profile": with_chunks(PNG, text(b"Raw profile type exif", b"\nexif\n9\n4578696")),
    "png, raw profile of junk": with_chunks(PNG, text(b"Raw profile type exif", b"\n\n\nzz")),
    "png, text called exif": with_chunks(PNG, text(b"exif", b"zz")),
    "png, large text": with_chunks(PNG, chunk(b"zTXt", b"a\0\0" + HUGE)),
    "png, large text after": with_chunks(PNG, chunk(b"zTXt", b"a\0\0" + HUGE), after=True),
    "png, large Unicode text": with_chunks(PNG, chunk(b"iTXt", b"a\0\1\0\0\0" + HUGE)),
    "png, many texts": with_chunks(PNG, *[text(b"a", bytes(1_000_000))] * 68),
    "png, unknown compression": with_chunks(PNG, chunk(b"zTXt", b"a\0\1junk")),
    "png, large profile": with_chunks(PNG, chunk(b"iCCP", b"a\0\0" + HUGE)),
    "png, cut profile": with_chunks(PNG, chunk(b"iCCP", b"a\0")),
    "png, damaged text": with_chunks(PNG, chunk(b"tEXt", b"a\0b", damage=1)),
    "png, damaged unknown chunk": with_chunks(PNG, chunk(b"abCd", b"", damage=1)),
    "png, damaged EXIF": with_chunks(PNG, chunk(b"eXIf", SIX, damage=1)),
    "png, unknown chunk of an odd name": with_chunks(PNG, chunk(b"a-Cd", b"x")),
    "png, cut gamma": with_chunks(PNG, chunk(b"gAMA", b"a")),
    "png, cut resolution": with_chunks(PNG, chunk(b"pHYs", b"a")),
    "png, cut animation": with_chunks(PNG, chunk(b"acTL", b"a")),
    "webp, junk EXIF": encoded(PICTURE, "WEBP", lossless=True, exif=JUNK),
    "webp, EXIF cut": webp_without(3),
    "webp, bad profile": encoded(PICTURE, "WEBP", lossless=True, icc_profile=b"junk"),
    "gif, junk comment": gif_with(b"!\xfe\3a\0b\xff" + b"x" * 255 + b"\0"),
    "gif, empty extension": gif_with(b"!\xff\0"),
    "gif, junk application": gif_with(b"!\xff\x0bNETSCAPE2.0\1a\0"),
    "gif, cut control": gif_with(b"!\xf9\1\1\0"),
    "tiff, junk profile": tiff(PIXELS, 8, 2, tags=[(34675, 3, [1])]),
    "tiff, XMP of numbers": tiff(PIXELS, 8, 2, tags=[(700, 4, [1, 2, 3])]),
    "tiff, XMP of numbers, deflated": tiff(PIXELS, 8, 2, deflate=True, tags=[(700, 4, [1, 2, 3])]),
    "tiff, EXIF elsewhere": tiff(PIXELS, 8, 2, tags=[(34665, 4, [1 << 31])]),
    "tiff, big-endian": tiff(PIXELS, 8, 2, order=">", tags=[(700, 4, [1, 2, 3])]),
    "tiff, orientation 9": tiff(PIXELS, 8, 2, tags=[(274, 3, [9])]),
}  # fmt: skip

TURNED = {
    "jpeg, an unwritable tag": jpeg(segment(0xE1, b"Exif\0\0" + UNWRITABLE), jfif=DENSITY),
    "jpeg, an odd resolution": jpeg(segment(0xE1, b"Exif\0\0" + ODD), jfif=b""),
    "jpeg, XMP": jpeg(segment(0xE1, XMP)),
    "jpeg, XMP and a short profile": jpeg(segment(0xE1, XMP), segment(0xE2, b"ICC_PROFILE\0")),
    "png, EXIF and large text": with_chunks(PNG, chunk(b"eXIf", SIX), chunk(b"zTXt", b"a\0\0" + HUGE)),
    "png, EXIF after large text": with_chunks(
        with_chunks(PNG, chunk(b"zTXt", b"a\0\0" + HUGE)), chunk(b"eXIf", SIX), after=True
    ),
    "png, XMP and large text": with_chunks(
        PNG,
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP.partition(b"\0")[2]),
        chunk(b"iTXt", b"a\0\1\0\0\0" + HUGE),
    ),
    "png, raw profile and large text": with_chunks(
        PNG,
        text(b"Raw profile type exif", b"\nexif\n9\n" + SIX.hex().encode()),
        chunk(b"zTXt", b"a\0\0" + HUGE),
    ),
    "webp, XMP cut": encoded(
        PICTURE, "WEBP", lossless=True, exif=b"Exif\0\0" + SIX, xmp=b"<x/>" * 9
    )[:-9],
    "tiff, XMP of numbers": tiff(PIXELS, 8, 2, tags=[(274, 3, [6]), (700, 4, [1, 2, 3])]),
}  # fmt: skip


def clean_pixels(data: bytes) -> np.ndarray:
    """Return the pixels of the file before metadata was added."""
    clean = {b"\xff\xd8": JPEG, b"GI": GIF}.get(data[:2], PNG)
    return np.asarray(Image.open(io.BytesIO(clean)).convert("RGB"))


@pytest.mark.parametrize("name", UPRIGHT)
def test_broken_metadata_is_ignored(name: str, tmp_path: Path) -> None:
    data = UPRIGHT[name]
    path = tmp_path / "picture"
    path.write_bytes(data)
    for source in (data, path, memoryview(data)):
        np.testing.assert_array_equal(decode(source), clean_pixels(data))


@pytest.mark.parametrize("name", TURNED)
def test_orientation_is_applied(name: str) -> None:
    data = TURNED[name]
    np.testing.assert_array_equal(decode(data), np.rot90(clean_pixels(data), -1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "write",
    [
        lambda image, tags: with_segments(
            encoded(image, "JPEG", quality=95), segment(0xE1, b"Exif\0\0" + tags), jfif=DENSITY
        ),
        lambda image, tags: with_chunks(
            encoded(image, "PNG"), chunk(b"eXIf", tags), chunk(b"tEXt", b"a\0b", damage=1)
        ),
        lambda image, tags: encoded(image, "WEBP", exif=b"Exif\0\0" + tags, quality=95),
        lambda image, tags: tiff(np.asarray(image), 8, 2, tags=[(274, 3, [tags[18]])]),
    ],
    ids=["jpeg", "png", "webp", "tiff"],
)
def test_every_orientation_beside_an_odd_tag(
    write: Callable[[Image.Image, bytes], bytes], orientation: int
) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)
    upright = np.asarray(Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC))
    image = Image.fromarray(camera_pixels(upright, orientation))
    data = write(image, exif(turned(orientation), (0x011A, 2, 4, b"abc\0")))
    decoded = decode(data)
    assert decoded.shape == upright.shape
    assert np.abs(decoded.astype(int) - upright).mean() < 4


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (2, b"6\0\0\0"),
        (1, b"\6\0\0\0"),
        (3, b"\0\0\0\0"),
        (3, b"\t\0\0\0"),
        (7, b"\6\0\0\0"),
        (9, b"\xfa\xff\xff\xff"),
        (11, struct.pack("<f", 6)),
        (11, struct.pack("<f", np.nan)),
        (99, b"\6\0\0\0"),
    ],
)
def test_orientations_of_other_types_are_ignored(kind: int, value: bytes) -> None:
    tags = exif((0x0112, kind, 1, value))
    for data in (
        jpeg(segment(0xE1, b"Exif\0\0" + tags)),
        jpeg(segment(0xE1, b"Exif\0\0" + tags), segment(0xE2, b"ICC_PROFILE\0")),
        with_chunks(PNG, chunk(b"eXIf", tags)),
    ):
        np.testing.assert_array_equal(decode(data), clean_pixels(data))


def test_a_pil_image_with_broken_metadata() -> None:
    for name in ("jpeg, junk EXIF after a density", "png, junk EXIF", "webp, junk EXIF"):
        with Image.open(io.BytesIO(UPRIGHT[name])) as image:
            np.testing.assert_array_equal(decode(image), clean_pixels(UPRIGHT[name]))
    turned_six = TURNED["jpeg, an unwritable tag"]
    with Image.open(io.BytesIO(turned_six)) as image:
        np.testing.assert_array_equal(decode(image), np.rot90(clean_pixels(turned_six), -1))
        assert image.size == (47, 33)  # the caller's image is unchanged


def test_fast_decoding_of_a_jpeg_with_broken_metadata() -> None:
    large = PICTURE.resize((480, 320), Image.Resampling.BICUBIC)
    spec = ImageSpec((20, 30), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "squash")
    for body, shape in ((JUNK, (40, 60, 3)), (b"Exif\0\0" + ODD, (120, 80, 3))):
        data = with_segments(encoded(large, "JPEG"), segment(0xE1, body), jfif=b"")
        assert decode(data, fast_for=spec).shape == shape


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_colours_of_a_jpeg_without_its_metadata(mode: str) -> None:
    """Check that Adobe's segment, which defines the colours, is kept if there is no JFIF."""
    colours = Image.new(mode, (16, 16), (200, 30, 90) if mode == "RGB" else (0, 180, 90, 20))
    clean = encoded(colours, "JPEG", quality=95, keep_rgb=True)
    assert b"Adobe" in clean
    for offset in (2, clean.index(b"\xff\xdb")):
        data = clean[:offset] + segment(0xE2, b"ICC_PROFILE\0") + clean[offset:]
        with pytest.raises(OSError, match="cannot identify"):
            Image.open(io.BytesIO(data))
        np.testing.assert_array_equal(decode(data), decode(clean))


def test_transparency_of_a_png_without_its_metadata() -> None:
    broken = chunk(b"tEXt", b"a\0b", damage=1)
    palette = chunk(b"PLTE", bytes([255, 0, 0, 0, 0, 255]))
    data = png(np.array([[0, 1]]), 1, 3, broken, palette, chunk(b"tRNS", b"\xff\0"))
    assert decode(data).tolist() == [[[255, 0, 0], [255, 255, 255]]]


@pytest.mark.skipif(not formats.AVIF.installed, reason="Pillow without AVIF")
def test_avif_with_junk_exif() -> None:
    data = encoded(PICTURE, "AVIF", quality=95, exif=exif((0x010F, 3, 1, b"\6\0\0\0")))
    assert data.count(b"II*\0") == 1
    decoded = decode(data.replace(b"II*\0", b"junk"))
    np.testing.assert_array_equal(decoded, decode(data))


BROKEN = {
    "jpeg": jpeg(segment(0xE1, JUNK), jfif=b"")[:-300],
    "jpeg, short profile": jpeg(segment(0xE2, b"ICC_PROFILE\0"))[:-300],
    "jpeg, cut before the pixels": jpeg(segment(0xE2, b"ICC_PROFILE\0"))[:60],
    "png": with_chunks(PNG, chunk(b"zTXt", b"a\0\0" + HUGE))[:-300],
    "png, damaged text": with_chunks(PNG, chunk(b"tEXt", b"a\0b", damage=1))[:-300],
    "png, no pixels": with_chunks(PNG, chunk(b"tEXt", b"a\0b", damage=1))[:60],
    "png, damaged header": PNG[:29] + bytes(4) + PNG[33:],
    "webp": WEBP[: len(WEBP) // 2],
    "gif": gif_with(b"!\xff\0")[:-500],
    "gif, nothing but an extension": gif_with(b"!\xff\0")[: GIF_HEAD + 3],
    "tiff": tiff(PIXELS, 8, 2, tags=[(700, 4, [1, 2, 3])])[:200],
    "tiff, header": tiff(PIXELS, 8, 2)[:6],
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pixels_stay_an_error(name: str, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(BROKEN[name])
    for source in (path, BROKEN[name]):
        with pytest.raises(ImageError, match="broken image") as caught:
            decode(source)
        assert "\n" not in str(caught.value)


def test_the_limit_holds_without_metadata() -> None:
    broken = chunk(b"tEXt", b"a\0b", damage=1)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    bomb = PNG[:8] + header + broken + chunk(b"IDAT", zlib.compress(bytes(1000)))
    with pytest.raises(ImageError, match="more than 178,956,970 pixels"):
        decode(bomb)


def test_pillows_settings_are_restored() -> None:
    def settings() -> list[object]:
        modules = ((ImageFile, "LOAD_TRUNCATED_IMAGES"), (Image, "MAX_IMAGE_PIXELS"))
        limits = [getattr(module, name) for module, name in modules]
        return [*limits, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY]

    data = UPRIGHT["png, large text"]
    before = settings()
    decode(data)
    assert settings() == before
    with pytest.raises(ValueError, match="too large"):
        Image.open(io.BytesIO(data))


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    pipe = tmp_path / "picture.png"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(UPRIGHT["png, damaged text"],))
    writer.start()
    with pytest.raises(ImageError, match="picture"):
        decode(pipe)  # without waiting for another writer
    writer.join()
