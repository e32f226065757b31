"""Decoding of samples of every depth and colour model, compared with the array in the file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from edgeclip import ImageError
from edgeclip.images.decoding import decode
from tests.support.data.image_files import camera_pixels, chunk, encoded, png, tiff

BLACK_IS_ZERO, WHITE_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, LAB = 1, 0, 2, 3, 5, 6, 8
HEIGHT, WIDTH = 19, 23
UNSIGNED, SIGNED, FLOAT = ((339, 3, [value]) for value in (1, 2, 3))
ALPHA, PREMULTIPLIED, UNKNOWN = ((338, 3, [value]) for value in (2, 1, 0))


def samples(bits: int, channels: int | None = None) -> np.ndarray:
    """Return random samples of this many bits, which include the lowest and highest level."""
    shape = (HEIGHT, WIDTH) if channels is None else (HEIGHT, WIDTH, channels)
    levels = np.random.default_rng(bits).integers(0, 2**bits, shape)
    levels[0, 0], levels[0, 1] = 0, 2**bits - 1
    return levels


def grey(levels: np.ndarray, maximum: int) -> np.ndarray:
    """Return 8-bit greys of levels from 0 (black) to `maximum` (white)."""
    return np.rint(levels / maximum * 255)[..., np.newaxis].repeat(3, axis=2)


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Blend colours and alpha, from 0 to 1, with white; return levels of three channels."""
    levels = 255 * (colours * alpha + 1 - alpha)
    return levels if levels.shape[2] == 3 else levels.repeat(3, axis=2)


def check(actual: np.ndarray, expected: np.ndarray, tolerance: float = 0) -> None:
    assert actual.dtype == np.uint8
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance


def refusal(source: object) -> str:
    with pytest.raises(ImageError) as caught:
        decode(source)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
@pytest.mark.parametrize("white", [False, True], ids=["black is zero", "white is zero"])
def test_greys_of_a_tiff(bits: int, white: bool, order: str, deflate: bool) -> None:
    levels = samples(bits)
    data = tiff(
        levels, bits, WHITE_IS_ZERO if white else BLACK_IS_ZERO, order=order, deflate=deflate
    )
    # Pillow does not know these variants.
    unknown = {(12, "<", True), (12, ">", True), (12, ">", False), (16, ">", True)}
    if (bits, order, white) in unknown:
        assert "a variant of its format that cannot be decoded" in refusal(data)
        return
    expected = grey(levels, 2**bits - 1)
    check(decode(data), 255 - expected if white else expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("bits", "photometric"), [(8, 1), (12, 1), (16, 1), (16, 0)])
def test_turned_greys_of_a_tiff(bits: int, photometric: int, orientation: int) -> None:
    levels = samples(bits)
    data = tiff(
        camera_pixels(levels, orientation), bits, photometric, tags=[(274, 3, [orientation])]
    )
    expected = grey(levels, 2**bits - 1)
    check(decode(data), expected if photometric else 255 - expected)


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("dtype", "tag", "message"),
    [
        (np.uint32, UNSIGNED, "32-bit integers have no agreed range"),
        (np.int32, SIGNED, "signed integers have no agreed range"),
        (np.int16, SIGNED, "signed integers have no agreed range"),
        (np.int8, SIGNED, "signed integers have no agreed range"),
        (np.float32, FLOAT, "floating-point images have no agreed range"),
    ],
)
@pytest.mark.parametrize("photometric", [BLACK_IS_ZERO, WHITE_IS_ZERO])
def test_samples_without_a_range_are_refused(
    dtype: type, tag: tuple[int, int, Sequence[int]], message: str, photometric: int,
    order: str, deflate: bool,
) -> None:  # fmt: skip
    levels = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(dtype)
    bits = levels.dtype.itemsize * 8
    error = refusal(tiff(levels, bits, photometric, order=order, deflate=deflate, tags=[tag]))
    assert message in error or "a variant of its format that cannot be decoded" in error
    if photometric == BLACK_IS_ZERO and order == "<":
        assert message in error


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("separate", [False, True], ids=["alternating", "planes"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    ("channels", "photometric", "extra"),
    [
        (3, RGB, None),
        (4, RGB, ALPHA),
        (4, RGB, PREMULTIPLIED),
        (4, RGB, UNKNOWN),
        (4, CMYK, None),
        (2, BLACK_IS_ZERO, ALPHA),
        (2, BLACK_IS_ZERO, PREMULTIPLIED),
        (2, BLACK_IS_ZERO, UNKNOWN),
    ],
)
def test_colours_of_a_tiff(
    channels: int, photometric: int, extra: tuple[int, int, Sequence[int]] | None, bits: int,
    separate: bool, order: str, deflate: bool,
) -> None:  # fmt: skip
    stored_samples = samples(bits, channels)
    values = stored_samples / (2**bits - 1)
    if photometric == CMYK:
        expected = 255 * (1 - values[..., :3]) * (1 - values[..., 3:])
    elif extra is None or extra is UNKNOWN:
        colours = values if extra is None else values[..., :-1]
        expected = on_white(colours, np.ones((1, 1, 1)))
    elif extra is PREMULTIPLIED:
        stored_samples[..., :-1] = np.minimum(stored_samples[..., :-1], stored_samples[..., -1:])
        values = stored_samples / (2**bits - 1)
        expected = on_white(values[..., :-1] / np.maximum(values[..., -1:], 1e-9), values[..., -1:])
    else:
        expected = on_white(values[..., :-1], values[..., -1:])
    data = tiff(
        stored_samples, bits, photometric, order=order, deflate=deflate, separate=separate,
        tags=[extra] if extra else [],
    )  # fmt: skip
    # Rare layouts may be refused, but never decoded wrongly.
    if separate or (channels == 2 and bits == 16):
        with suppress(ImageError):
            check(decode(data), expected, 3)
    else:
        # Pillow reduces 16 bits to the upper byte, and divides by alpha in 8 bits.
        check(decode(data), expected, 1.5 if bits == 8 else 3)


@pytest.mark.parametrize(
    ("bits", "channels", "deflate"), [(16, 3, False), (16, 4, False), (8, 2, True)]
)
def test_planes_that_pillow_misreads_are_refused(bits: int, channels: int, deflate: bool) -> None:
    photometric, tags = (RGB, []) if channels == 3 else (RGB, [ALPHA])
    if channels == 2:
        photometric = BLACK_IS_ZERO
    data = tiff(
        samples(bits, channels), bits, photometric, separate=True, deflate=deflate, tags=tags
    )
    assert "a layout of TIFF that is not supported" in refusal(data)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("largest", [255, 65535])
def test_palette_of_a_tiff(bits: int, order: str, largest: int) -> None:
    """Test 16-bit palettes, and palettes of bytes, which some software writes instead."""
    indices = samples(bits)
    colours = np.random.default_rng(0).integers(0, largest, (3, 2**bits), endpoint=True)
    colours[0, 0] = largest
    data = tiff(indices, bits, PALETTE, order=order, tags=[(320, 3, colours.ravel().tolist())])
    check(decode(data), np.moveaxis(colours[:, indices], 0, -1) / largest * 255, 1)


def test_palette_with_alpha_of_a_tiff() -> None:
    colours = np.zeros((3, 256), int)
    colours[0, 0] = colours[2, 1] = 65535  # red and blue
    pixels = np.array([[[0, 255], [1, 128], [1, 0]]])
    data = tiff(pixels, 8, PALETTE, tags=[ALPHA, (320, 3, colours.ravel().tolist())])
    check(decode(data), np.array([[[255, 0, 0], [127, 127, 255], [255, 255, 255]]]), 1)


def test_luma_and_chroma_of_a_tiff() -> None:
    """Use the coefficients of ITU-R BT.601, TIFF's default."""
    y, cb, cr = 100, 60, 200
    red, blue = y + 1.402 * (cr - 128), y + 1.772 * (cb - 128)
    green = (y - 0.299 * red - 0.114 * blue) / 0.587
    expected = np.clip(np.full((16, 24, 3), (red, green, blue)), 0, 255)
    pixels = np.full((16, 24, 3), (y, cb, cr))
    whole = (530, 3, [1, 1])
    for deflate in (False, True):
        check(decode(tiff(pixels, 8, YCBCR, deflate=deflate, tags=[whole])), expected, 2)
    # Four lumas and one pair of chromas per 2 x 2 pixels, the tag's default.
    units = bytes([y] * 4 + [cb, cr]) * (8 * 12)
    for tags in ([], [(530, 3, [2, 2])]):
        check(decode(tiff(pixels, 8, YCBCR, deflate=True, tags=tags, raw=units)), expected, 2)
        trailing = tiff(pixels, 8, YCBCR, tags=tags, raw=units) + bytes(1000)
        assert "a layout of TIFF that is not supported" in refusal(trailing)


def test_lab_of_a_tiff() -> None:
    """Convert CIE 1976 L*a*b* at D50 to sRGB's white by Bradford's method."""
    lab = np.array([[[60.0, 40, -30], [60, 10, -10], [20, 0, 0], [90, -20, 20]]])
    pixels = np.rint(np.dstack([lab[..., 0] * 2.55, lab[..., 1:] % 256])).astype(np.uint8)
    y = (lab[..., 0] + 16) / 116
    cubes = np.dstack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200])
    xyz = np.where(cubes > 6 / 29, cubes**3, (cubes - 4 / 29) * 108 / 841)
    matrix = [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
    linear = xyz * (0.96422, 1.0, 0.82521) @ np.transpose(matrix)
    expected = 255 * (1.055 * linear ** (1 / 2.4) - 0.055)
    check(decode(tiff(pixels, 8, LAB)), expected, 2)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_greys_of_a_png(bits: int) -> None:
    levels = samples(bits)
    expected = grey(levels, 2**bits - 1)
    check(decode(png(levels, bits, 0)), expected)
    for transparent in {0, 1, 2**bits - 1, int(levels[3, 4])}:
        data = png(levels, bits, 0, chunk(b"tRNS", transparent.to_bytes(2, "big")))
        visible = np.where(levels[..., np.newaxis] == transparent, 255, expected)
        check(decode(data), visible)
        with Image.open(io.BytesIO(data)) as image:
            check(decode(image), visible)
            assert image.info["transparency"] in (
                transparent,
                255,
            )  # the caller's image is unchanged


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("channels", "colour"), [(3, 2), (2, 4), (4, 6)])
def test_colours_of_a_png(bits: int, channels: int, colour: int) -> None:
    levels = samples(bits, channels)
    values = levels / (2**bits - 1)
    ones = np.ones((1, 1, 1))
    expected = (
        on_white(values, ones) if channels == 3 else on_white(values[..., :-1], values[..., -1:])
    )
    check(decode(png(levels, bits, colour)), expected, 2)


def test_a_transparent_colour_of_a_png() -> None:
    levels = samples(8, 3)
    levels[5:9] = levels[0, 3]
    colour = b"".join(int(level).to_bytes(2, "big") for level in levels[0, 3])
    expected = np.where((levels == levels[0, 3]).all(axis=2)[..., np.newaxis], 255, levels)
    check(decode(png(levels, 8, 2, chunk(b"tRNS", colour))), expected)
    # Pillow keeps one of two bytes, which mixes the colour up with its neighbours.
    for value in (levels[0, 3] * 257, np.zeros(3, int)):
        colour = b"".join(int(level).to_bytes(2, "big") for level in value)
        data = png(levels * 257, 16, 2, chunk(b"tRNS", colour))
        assert "a transparent colour of 16 bits is not supported" in refusal(data)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes_of_a_png(bits: int) -> None:
    rng = np.random.default_rng(0)
    indices = samples(bits)
    colours = rng.integers(0, 256, (2**bits, 3), np.uint8)
    alphas = rng.integers(0, 256, 2**bits, np.uint8)
    palette = chunk(b"PLTE", colours.tobytes())
    check(decode(png(indices, bits, 3, palette)), colours[indices])
    actual = decode(png(indices, bits, 3, palette, chunk(b"tRNS", alphas.tobytes())))
    check(actual, on_white(colours[indices] / 255, alphas[indices][..., np.newaxis] / 255), 1)
    actual = decode(png(indices, bits, 3, palette, chunk(b"tRNS", b"\xff\0")))
    check(actual, np.where(indices[..., np.newaxis] == 1, 255, colours[indices]))


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_pil_images_of_16_bits(mode: str) -> None:
    levels = samples(16)
    image = Image.frombytes(
        mode, (WIDTH, HEIGHT), levels.astype(">u2" if mode[-1] == "B" else "<u2").tobytes()
    )
    check(decode(image), grey(levels, 65535))


def test_pil_images_without_a_range() -> None:
    assert "32-bit integers have no agreed range" in refusal(Image.new("I", (2, 2)))
    assert "floating-point images have no agreed range" in refusal(Image.new("F", (2, 2)))
    levels = np.zeros((HEIGHT, WIDTH), np.int16)
    with Image.open(io.BytesIO(tiff(levels, 16, BLACK_IS_ZERO, tags=[SIGNED]))) as image:
        assert "signed integers" in refusal(image)


def test_a_loaded_pil_image_of_a_tiff() -> None:
    levels = samples(12)
    with Image.open(io.BytesIO(tiff(levels, 12, BLACK_IS_ZERO))) as image:
        image.load()
        check(decode(image), grey(levels, 4095))


@pytest.mark.parametrize(
    "mode", ["L", "LA", "La", "RGBA", "RGBa", "P", "1", "CMYK", "YCbCr", "HSV"]
)
def test_pil_modes(mode: str) -> None:
    """Decode images of one colour: half-transparent or opaque red or grey."""
    red = Image.new("RGBA", (3, 2), (255, 0, 0, 128))
    grey_alpha = Image.new("LA", (3, 2), (0, 128))
    image = {
        "L": lambda: Image.new("L", (3, 2), 77),
        "LA": lambda: grey_alpha,
        "La": lambda: grey_alpha.convert("La"),
        "RGBA": lambda: red,
        "RGBa": lambda: red.convert("RGBa"),
        "P": lambda: red.convert("RGB").quantize(2),
        "1": lambda: Image.new("1", (3, 2), 1),
    }.get(mode, lambda: red.convert("RGB").convert(mode))()
    assert image.mode == mode
    expected = {
        "L": (77, 77, 77),
        "LA": (127, 127, 127),
        "La": (127, 127, 127),
        "RGBA": (255, 127, 127),
        "RGBa": (255, 127, 127),
        "1": (255, 255, 255),
    }.get(mode, (255, 0, 0))
    check(decode(image), np.full((2, 3, 3), expected), 1)


def test_ink_of_adobes_jpegs_is_inverted() -> None:
    """Decode a JPEG that stores inverted ink, as Adobe's software and Pillow do."""
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert b"Adobe" in data
    check(decode(data), np.full((16, 16, 3), (255, 0, 0)), 9)


@pytest.mark.parametrize("form", ["TIFF", "PNG", "GIF", "WEBP"])
def test_the_first_frame_of_16_bits_or_colour(form: str) -> None:
    frames = [Image.fromarray(samples(16).astype(np.uint16) // shrink) for shrink in (1, 2)]
    if form != "TIFF":
        frames = [Image.fromarray(samples(8).astype(np.uint8)), Image.new("L", (WIDTH, HEIGHT))]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    levels, maximum = (samples(16), 65535) if form == "TIFF" else (samples(8), 255)
    check(decode(data), grey(levels, maximum))
