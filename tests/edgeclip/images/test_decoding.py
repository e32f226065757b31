"""Decoding: the model gets the pixels that a viewer shows."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeclip import ImageError
from edgeclip.images.decoding import decode
from tests.support.data.image_files import camera_pixels, chunk, encoded

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture
def picture(rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (33, 47, 3), np.uint8))


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_keep_every_pixel(picture: Image.Image, form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    pixels = decode(encoded(picture, form, **options))
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.asarray(picture))


def test_jpeg_equals_pillow(picture: Image.Image) -> None:
    data = encoded(picture, "JPEG")
    np.testing.assert_array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data))))


def test_sources_give_the_same_pixels(picture: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture.save(path)
    expected = np.asarray(picture)
    for source in (path, str(path), path.read_bytes(), picture, expected):
        np.testing.assert_array_equal(decode(source), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:10, :15] = RED
    image = Image.fromarray(camera_pixels(pixels, orientation))
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode(encoded(image, "PNG", exif=exif)), pixels)


def test_transparency_is_laid_on_white() -> None:
    image = Image.new("RGBA", (2, 1))
    image.putpixel((0, 0), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    np.testing.assert_array_equal(decode(encoded(image, "PNG")), [[RED, WHITE]])


def test_half_transparency_and_grey_alpha() -> None:
    image = Image.new("LA", (1, 1), (0, 128))
    assert decode(encoded(image, "PNG"))[0, 0].tolist() == [127, 127, 127]


def test_palette_with_a_transparent_colour() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*BLUE, *GREEN])
    image.putpixel((1, 0), 1)
    np.testing.assert_array_equal(decode(encoded(image, "PNG")), [[BLUE, GREEN]])
    pixels = decode(encoded(image, "PNG", transparency=1))
    np.testing.assert_array_equal(pixels, [[BLUE, WHITE]])


def test_transparent_colour_of_an_rgb_png() -> None:
    image = Image.new("RGB", (1, 1), BLUE)
    np.testing.assert_array_equal(decode(encoded(image, "PNG", transparency=BLUE)), [[WHITE]])


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(form: str) -> None:
    grey = np.array([[0, 257, 32896, 65535]], np.uint16)
    pixels = decode(encoded(Image.fromarray(grey), form))
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 1, 128, 255])
    np.testing.assert_array_equal(pixels, pixels[..., :1].repeat(3, axis=2))


def test_bilevel_and_grey() -> None:
    image = Image.fromarray(np.array([[0, 255]], np.uint8))
    expected = [[(0, 0, 0), WHITE]]
    np.testing.assert_array_equal(decode(image), expected)
    np.testing.assert_array_equal(decode(encoded(image.convert("1"), "PNG")), expected)


def test_cmyk() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    pixels = decode(encoded(image, "JPEG", quality=95)).reshape(-1, 3)
    assert np.abs(pixels.astype(int) - RED).max() < 10


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(decode(data), np.full((8, 8, 3), RED))


def test_broken_files(picture: Image.Image, tmp_path: Path) -> None:
    jpeg = encoded(picture, "JPEG")
    cases = {
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "broken image"),
        "empty.png": (b"", "not an image of a known kind"),
        "text.jpg": (b"this is no picture", "not an image of a known kind"),
        "short.png": (encoded(picture, "PNG")[:60], "broken image"),
    }
    for name, (data, message) in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ImageError, match=message) as caught:
            decode(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        decode(tmp_path / "missing.png")
    with pytest.raises(ImageError, match="no images in this directory"):
        decode(tmp_path)


def test_decompression_bomb_is_refused_before_decoding() -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    with pytest.raises(ImageError, match="more than 178,956,970 pixels"):
        decode(bomb)


def test_float_images_are_refused() -> None:
    with pytest.raises(ImageError, match="floating-point"):
        decode(Image.new("F", (2, 2)))


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)],
)
def test_wrong_arrays_are_refused(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"\[decode\] expected \(H, W, 3\) uint8 RGB, got"):
        decode(array)


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="got int"):
        decode(3)  # type: ignore[arg-type]
