"""Anything that is a picture -> uint8 RGB (H, W, 3), as a person would see it."""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Callable, Iterable
from os import PathLike
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgeclip.errors import ImageError

if TYPE_CHECKING:
    from PIL.Image import Image

ImageSource: TypeAlias = (
    "str | PathLike[str] | bytes | bytearray | memoryview | Image | NDArray[np.uint8]"
)

# Pillow's own limit against decompression bombs, in pixels: above any camera of today.
MAX_PIXELS = 178_956_970
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")


def decode(source: ImageSource) -> NDArray[np.uint8]:
    """Decode a path, the bytes of a file, a PIL image, or pass through a uint8 RGB array.

    JPEG, PNG, WebP, BMP, TIFF and GIF; the first frame of an animation. EXIF orientation is
    applied, transparency is laid on white, 16-bit grey is scaled to 8 bits.
    Raises ImageError where the file cannot be read or has more than MAX_PIXELS pixels, TypeError
    and ValueError for an argument that is no picture.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            raise ValueError(
                f"[decode] expected (H, W, 3) uint8 RGB, got {source.shape} {source.dtype}"
            )
        return source
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode_file(io.BytesIO(source), "the image data")
    if isinstance(source, (str, PathLike)):
        return _decode_file(os.fspath(source), os.fspath(source))
    if hasattr(source, "convert") and hasattr(source, "getexif"):
        return _guard(lambda: to_rgb(source), "the image")
    raise TypeError(
        "[decode] expected a path, bytes, a PIL image or a uint8 array, "
        f"got {type(source).__name__}"
    )


def _decode_file(file: str | io.BytesIO, name: str) -> NDArray[np.uint8]:
    from PIL import Image

    def read() -> NDArray[np.uint8]:
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError
            return to_rgb(image)

    return _guard(read, name)


def _guard(read: Callable[[], NDArray[np.uint8]], name: str) -> NDArray[np.uint8]:
    """Run `read`, turning whatever a decoder raises on a broken file into one ImageError."""
    from PIL import Image, UnidentifiedImageError

    try:
        return read()
    except ImageError as err:
        raise ImageError(f"{name}: {err}") from err
    except UnidentifiedImageError as err:
        raise ImageError(f"{name}: not an image of a known kind ({', '.join(FORMATS)})") from err
    except IsADirectoryError as err:
        raise ImageError(f"{name}: no images in this directory") from err
    except FileNotFoundError as err:
        raise ImageError(f"{name}: no such file") from err
    except Image.DecompressionBombError as err:
        raise ImageError(f"{name}: more than {MAX_PIXELS:,} pixels; make it smaller first") from err
    except MemoryError as err:
        raise ImageError(f"{name}: not enough memory to decode it") from err
    except OSError as err:  # the system's errors have a strerror, a decoder's have only a text
        raise ImageError(f"{name}: {err.strerror or f'broken image ({err})'}") from err
    except Exception as err:  # decoders raise anything on a broken file, struct.error included
        raise ImageError(f"{name}: broken image ({err})") from err


def to_rgb(image: Image) -> NDArray[np.uint8]:
    """A PIL image of any mode as uint8 RGB (H, W, 3), upright, on white where transparent."""
    from PIL import ExifTags, ImageOps
    from PIL import Image as PILImage

    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ImageError("floating-point images have no agreed range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow may also hold as 32-bit integers
        grey = np.asarray(image, dtype=np.int64).clip(0, 65535)
        grey8 = ((grey + 128) // 257).astype(np.uint8)
        return np.repeat(grey8[:, :, np.newaxis], 3, axis=2)
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        white = PILImage.new("RGBA", picture.size, "white")
        image = PILImage.alpha_composite(white, picture)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def expand(arguments: Iterable[str]) -> list[str]:
    """Image files named by paths, directories (recursive, sorted) and glob patterns.

    An argument that names no image, and a directory that cannot be read, stays as it is, so that
    `decode` says what is wrong with it.
    """
    files: list[str] = []
    for argument in arguments:
        found: list[str] = []
        if os.path.isdir(argument):
            found = _images_below(argument)
        elif glob.has_magic(argument) and not os.path.lexists(argument):
            found = sorted(filter(os.path.isfile, glob.glob(argument, recursive=True)))
        files += found or [argument]
    return files


def _images_below(folder: str) -> list[str]:
    found: list[str] = []

    def refused(err: OSError) -> None:
        found.append(str(err.filename))

    for parent, _, names in os.walk(folder, onerror=refused):
        paths = [os.path.join(parent, name) for name in names if _has_image_suffix(name)]
        # A link that leads nowhere is named, a pipe or a device is not waited for.
        found += [path for path in paths if os.path.isfile(path) or os.path.islink(path)]
    return sorted(found)


def _has_image_suffix(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES
