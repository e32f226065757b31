"""Anything that is a picture -> uint8 RGB (H, W, 3), as a person would see it."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray

from edgeclip.errors import ImageError
from edgeclip.formats import FORMATS

if TYPE_CHECKING:
    from PIL.Image import Image

    from edgeclip.manifest import ImageSpec


class CudaFrame(Protocol):
    """A uint8 RGB array (H, W, 3) on the GPU."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


ImageSource: TypeAlias = (
    "str | PathLike[str] | bytes | bytearray | memoryview | Image | NDArray[np.uint8] | CudaFrame"
)

# Pillow's own limit against decompression bombs, in pixels: above any camera of today.
MAX_PIXELS = 178_956_970
STRIP = 64  # rows copied at a time

# Of six photographs, as JPEGs of quality 75 and 95 in all three scales, the worst embedding had the
# cosine 0.99992 to the exact one where twice the pixels needed were left, and 0.9994 where 1.5 times
# (28 x 28, embedded bundle; at 224 x 224 the worst pixels differed by 12 and 19 levels of 255).
MARGIN = 2.0
# A side that does not divide is rounded up, and the picture shrinks a little: by half a pixel of the
# encoder's input that cosine fell to 0.9992. So much is allowed, in such pixels.
MAX_SHIFT = 0.1


def is_on_gpu(source: ImageSource) -> TypeGuard[CudaFrame]:
    """Whether a source is an array on the GPU, which only a GPU takes as a picture."""
    return hasattr(source, "__cuda_array_interface__")


def decode(source: ImageSource, *, fast_for: ImageSpec | None = None) -> NDArray[np.uint8]:
    """Decode a path, the bytes of a file, a PIL image, or pass through a uint8 RGB array.

    JPEG, PNG, WebP, BMP, TIFF and GIF; the first frame of an animation. EXIF orientation is
    applied, transparency is laid on white, 16-bit grey is scaled to 8 bits.
    fast_for: the encoder's input. A path or bytes of a JPEG far larger than that is decoded at 1/2,
    1/4 or 1/8 of its size, with at least twice the pixels needed left each way. None: exactly.
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
        return _decode_file(io.BytesIO(source), "the image data", fast_for)
    if isinstance(source, (str, PathLike)):
        return _decode_file(os.fspath(source), os.fspath(source), fast_for)
    if hasattr(source, "convert") and hasattr(source, "getexif"):
        image: Any = source
        return _guard(lambda: to_rgb(image), "the image")
    raise TypeError(
        "[decode] expected a path, bytes, a PIL image or a uint8 array, "
        f"got {type(source).__name__}"
    )


def _decode_file(
    file: str | io.BytesIO, name: str, fast_for: ImageSpec | None
) -> NDArray[np.uint8]:
    from PIL import Image, JpegImagePlugin

    def read() -> NDArray[np.uint8]:
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if fast_for is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
                scale = _jpeg_scale(width, height, _turned(image), fast_for)
                image.draft(None, (max(width // scale, 1), max(height // scale, 1)))
            return to_rgb(image)

    return _guard(read, name)


def _jpeg_scale(width: int, height: int, turned: bool, spec: ImageSpec) -> int:
    """By how much libjpeg may shrink a JPEG, as stored, on its way to an encoder: 1, 2, 4 or 8."""
    down, across = spec.size if not turned else spec.size[::-1]
    ratios = height / down, width / across
    shrink = max(ratios) if spec.resize == "longest" else min(ratios)
    for scale in (8, 4, 2):
        shift = max(-width % scale, -height % scale) / shrink
        if shrink >= MARGIN * scale and shift <= MAX_SHIFT:
            return scale
    return 1


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
    from PIL import Image as PILImage
    from PIL import ImageOps

    if _orientation(image) != 1:
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
    return _as_array(image if image.mode == "RGB" else image.convert("RGB"))


def _as_array(image: Image) -> NDArray[np.uint8]:
    """np.asarray(image) of an RGB image, which copies all of it twice, in memory that is new."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, STRIP):
        strip = image.crop((0, top, image.width, min(top + STRIP, image.height)))
        pixels[top : top + STRIP] = np.asarray(strip)
    return pixels


def _orientation(image: Image) -> int:
    from PIL import ExifTags

    found: int = image.getexif().get(ExifTags.Base.Orientation, 1)
    return found


def _turned(image: Image) -> bool:
    """Whether a viewer swaps width and height, by EXIF."""
    return _orientation(image) in (5, 6, 7, 8)
