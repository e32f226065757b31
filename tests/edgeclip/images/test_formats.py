"""Optional formats (HEIC, AVIF, JPEG XL), with and without their decoders."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeclip import ImageError
from edgeclip.images import formats
from edgeclip.images.decoding import decode
from tests.support.data.image_files import camera_pixels, encoded
from tests.support.paths import VECTORS

HEIC = VECTORS / "red_over_blue.heic"  # stored sideways, with an orientation
JXL = b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(20)
needs_avif = pytest.mark.skipif(not formats.AVIF.installed, reason="Pillow without AVIF")


def halves() -> Image.Image:
    """Return an image that is red on the left and blue on the right."""
    image = Image.new("RGB", (32, 16), (255, 0, 0))
    image.paste((0, 0, 255), (16, 0, 32, 16))
    return image


@pytest.mark.parametrize(
    ("extra", "data", "message"),
    [
        (
            formats.HEIF,
            HEIC.read_bytes(),
            "HEIC files is not installed: pip install 'edgeclip[formats]'",
        ),
        (formats.JPEG_XL, JXL, "JPEG XL files is not installed: pip install 'edgeclip[formats]'"),
        (formats.JPEG_XL, b"\xff\x0a" + bytes(20), "JPEG XL files is not installed"),
        (
            formats.AVIF,
            b"\0\0\0\x20ftypavif" + bytes(20),
            "AVIF files is not installed: pip install",
        ),
    ],
)
def test_without_a_decoder(
    extra: formats.Extra, data: bytes, message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, extra.decoder, None)
    assert not extra.installed
    assert not formats.suffixes() & set(extra.suffixes)
    path = tmp_path / "photo.jpg"  # the content decides, not the name
    path.write_bytes(data)
    for source in (path, data):
        with pytest.raises(ImageError) as caught:
            decode(source)
        name = "the image data" if source is data else str(source)
        assert str(caught.value).startswith(f"{name}: the decoder of {message}")


def test_brands() -> None:
    def head(*brands: bytes) -> bytes:
        body = b"ftyp" + brands[0] + bytes(4) + b"".join(brands[1:])
        return (len(body) + 4).to_bytes(4, "big") + body + b"avis"  # the next box

    assert formats.extra_format(head(b"heic", b"mif1", b"heic")) is formats.HEIF
    assert formats.extra_format(head(b"mif1", b"miaf", b"heix")) is formats.HEIF
    assert formats.extra_format(head(b"mif1", b"miaf", b"avif")) is formats.AVIF
    assert formats.extra_format(head(b"isom", b"mp42")) is None
    assert formats.extra_format(b"") is None


@needs_avif
@pytest.mark.parametrize("orientation", range(1, 9))
def test_avif(orientation: int) -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(camera_pixels(pixels, orientation))
    decoded = decode(encoded(image, "AVIF", quality=95, exif=exif))
    assert decoded.shape == pixels.shape
    assert np.abs(decoded.astype(int) - pixels).mean() < 3


@needs_avif
def test_avif_with_transparency_and_frames() -> None:
    clear, blue = Image.new("RGBA", (8, 8), (255, 0, 0, 0)), Image.new("RGBA", (8, 8), "blue")
    data = encoded(clear, "AVIF", quality=95, save_all=True, append_images=[blue])
    assert decode(data).min() > 250


@needs_avif
def test_the_limit_holds_for_avif(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeclip.images.decoding.MAX_PIXELS", 100)
    with pytest.raises(ImageError, match="more than 100 pixels"):
        decode(encoded(halves(), "AVIF"))


def test_heic() -> None:
    pytest.importorskip("pi_heif")
    for source in (HEIC, HEIC.read_bytes()):
        decoded = decode(source)
        assert decoded.shape == (32, 16, 3)
        assert np.abs(decoded[2, 8].astype(int) - (255, 0, 0)).max() < 9
        assert np.abs(decoded[-3, 8].astype(int) - (0, 0, 255)).max() < 9
    with pytest.raises(ImageError, match="broken image"):
        decode(HEIC.read_bytes()[:400])


def test_jpeg_xl() -> None:
    pytest.importorskip("pillow_jxl")
    image = halves()
    exif = Image.Exif()
    exif[0x0112] = 6
    for options in ({}, {"exif": exif.tobytes()}):  # viewers of JPEG XL ignore EXIF's orientation
        data = encoded(image, "JXL", lossless=True, **options)
        np.testing.assert_array_equal(decode(data), np.asarray(image))
    grey = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    decoded = decode(encoded(Image.fromarray(grey), "JXL", lossless=True))
    np.testing.assert_array_equal(decoded[..., 0], np.rint(grey / 257))


def test_optional_decoders_are_loaded_on_demand() -> None:
    before = set(sys.modules)
    decode(encoded(halves(), "PNG"))
    with pytest.raises(ImageError, match="not an image of a known kind"):
        decode(b"text")
    assert not {"pi_heif", "pillow_jxl"} & (set(sys.modules) - before)
