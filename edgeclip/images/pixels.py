"""Conversion of PIL images of any mode to 8-bit RGB."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.errors import ImageError

if TYPE_CHECKING:
    from PIL.Image import Image

ORIENTATION = 0x0112  # EXIF tag
STRIP = 64  # rows copied at a time

# TIFF tags, and some of their values.
BITS, COMPRESSION, PHOTOMETRIC, PLANES, COLOURS, FORMAT, SUBSAMPLING = (
    258, 259, 262, 284, 320, 339, 530
)  # fmt: skip
UNCOMPRESSED, WHITE_IS_ZERO, SEPARATE, SIGNED = 1, 0, 2, 2

# Pillow scales a PNG's greys of 2 and 4 bits to 8 bits, but not its transparent grey.
PNG_STEPS = {"L;2": 85, "L;4": 17}


def to_rgb(image: Image) -> NDArray[np.uint8]:
    """Return upright uint8 RGB (H, W, 3), with white in place of transparency.

    Raises ImageError for samples without a defined range, and if Pillow would decode wrongly.
    """
    from PIL import Image as PILImage

    # Only the opened file has these; copies of the image lack them.
    tags: Any = getattr(image, "tag_v2", {})
    raw = _raw_mode(image)
    transparent = image.info.get("transparency")
    if problem := _problem(image, tags, raw):
        raise ImageError(problem)
    image.load()  # first: Pillow applies and removes a TIFF's orientation here
    image = _upright(image)
    if image.mode.startswith("I"):
        bits = tags.get(BITS, (16,))[0]
        inverted = tags.get(PHOTOMETRIC) == WHITE_IS_ZERO
        return _grey(image, 2**bits - 1, transparent, inverted)
    if image.mode == "L" and isinstance(transparent, int):
        return _grey(image, 255, transparent * PNG_STEPS.get(raw, 1))
    if image.mode == "P" and tags and max(tags[COLOURS]) < 256:  # palette of 8 bits instead of 16
        palette: NDArray[np.uint8] = np.array(tags[COLOURS], np.uint8).reshape(3, -1).T
        return np.take(palette, np.asarray(image), axis=0)
    if image.has_transparency_data:
        if image.mode == "La":  # Pillow converts it to LA alone
            image = image.convert("LA")
        picture = image.convert("RGBA")
        white = PILImage.new("RGBA", picture.size, "white")
        image = PILImage.alpha_composite(white, picture)
    return _as_array(image if image.mode == "RGB" else image.convert("RGB"))


def orientation(image: Image) -> int:
    """Return the orientation, 1 to 8, of EXIF or else XMP; 1 if neither can be read."""
    value = None
    with suppress(Exception):  # Pillow raises anything on broken EXIF
        value = image.getexif().get(ORIENTATION)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(image: Image) -> Image:
    """Return the image turned by its orientation; other EXIF entries are not read."""
    turn = orientation(image)
    if turn == 1:
        return image
    # A decoded JPEG XL is upright although it keeps its EXIF, unless it is a repacked JPEG.
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        return image
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[turn])


def _raw_mode(image: Image) -> str:
    """Return the storage mode of a PNG's samples, "" for other formats and loaded images."""
    tiles = getattr(image, "tile", None)
    return str(tiles[0][3]) if tiles and image.format == "PNG" else ""


def _problem(image: Image, tags: Any, raw: str) -> str | None:
    """Return why the samples of an image cannot be decoded correctly, None if they can."""
    transparent = image.info.get("transparency")
    if image.mode == "F":
        return "floating-point images have no agreed range; save it with 8 or 16 bits"
    if SIGNED in tags.get(FORMAT, ()):
        return "signed integers have no agreed range; save it with 8 or 16 bits, unsigned"
    # Older versions of Pillow use this mode for a PNG of 16 bits.
    if image.mode == "I" and image.format != "PNG":
        return "32-bit integers have no agreed range; save it with 8 or 16 bits"
    if isinstance(transparent, tuple) and (raw == "RGB;16B" or max(transparent) > 255):
        return "a transparent colour of 16 bits is not supported; save it with an alpha channel"
    if _pillow_is_wrong(image.mode, tags):
        return "a layout of TIFF that is not supported; save it as PNG"
    return None


def _pillow_is_wrong(mode: str, tags: Any) -> bool:
    """Return whether Pillow misreads the samples of a TIFF.

    Pillow reads uncompressed planes as 8-bit planes, planes of grey and alpha as interleaved samples,
    and subsampled chroma as full chroma.
    """
    if not tags:
        return False
    uncompressed = tags.get(COMPRESSION, UNCOMPRESSED) == UNCOMPRESSED
    if tags.get(PLANES) == SEPARATE:
        if uncompressed:
            return mode not in ("RGB", "RGBA", "CMYK") or max(tags[BITS]) != 8
        return mode in ("LA", "La", "PA")
    return mode == "YCbCr" and uncompressed and tags.get(SUBSAMPLING, (2, 2)) != (1, 1)


def _grey(
    image: Image, largest: int, transparent: int | None, inverted: bool = False
) -> NDArray[np.uint8]:
    """Scale greys from [0, largest] to 8 bits, with white in place of the transparent grey."""
    stored = np.asarray(image).astype(np.uint32)
    levels = largest - stored if inverted else stored
    grey = ((levels * 255 + largest // 2) // largest).astype(np.uint8)
    if transparent is not None:
        grey[stored == transparent] = 255
    return np.repeat(grey[:, :, np.newaxis], 3, axis=2)


def _as_array(image: Image) -> NDArray[np.uint8]:
    """Return a new array of an RGB image; np.asarray(image) would copy all of it twice."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, STRIP):
        strip = image.crop((0, top, image.width, min(top + STRIP, image.height)))
        pixels[top : top + STRIP] = np.asarray(strip)
    return pixels
