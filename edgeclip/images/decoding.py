"""Decoding of files, bytes, PIL images and arrays to uint8 RGB (H, W, 3)."""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray

from edgeclip.errors import ImageError
from edgeclip.images.formats import FORMATS, HEAD, extra_format
from edgeclip.images.pixels import orientation, to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

    from edgeclip.manifest import ImageSpec


class CudaFrame(Protocol):
    """Array on the GPU, uint8 RGB (H, W, 3)."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


ImageSource: TypeAlias = (
    "str | PathLike[str] | bytes | bytearray | memoryview | Image | NDArray[np.uint8] | CudaFrame"
)
Attempt: TypeAlias = "tuple[str | io.BytesIO, tuple[str, ...]]"  # a file and the formats to try

# Pillow's limit against decompression bombs, in pixels; no camera of today reaches it.
MAX_PIXELS = 178_956_970
UNSUPPORTED = (
    "broken image, or a variant of its format that cannot be decoded; save it as PNG or JPEG"
)

# Pixels to keep on each side, relative to the encoder's input. Six photographs as JPEGs of quality 75
# and 95, at all three scales: the lowest cosine to the exact embedding was 0.99992 with a margin of 2
# and 0.9994 with 1.5 (28 x 28, embedded bundle; at 224 x 224 the largest pixel differences were 12 and
# 19 levels of 255).
MARGIN = 2.0
# Largest shift of the picture, in pixels of the encoder's input. A side that the scale does not divide
# is rounded up, which shrinks the picture: half a pixel lowered that cosine to 0.9992.
MAX_SHIFT = 0.1


def is_on_gpu(source: ImageSource) -> TypeGuard[CudaFrame]:
    """Return whether a source is an array on the GPU."""
    return hasattr(source, "__cuda_array_interface__")


def decode(source: ImageSource, *, fast_for: ImageSpec | None = None) -> NDArray[np.uint8]:
    """Decode a path, the bytes of a file or a PIL image; return a uint8 RGB array unchanged.

    The formats are those of `edgeclip.images.formats`; of an animation the first picture is taken.
    The orientation is applied, transparency becomes white, greys are scaled to 8 bits, and unreadable
    metadata is ignored.
    fast_for: the encoder's input. A JPEG file or bytes of a JPEG far larger than that input is decoded
    at 1/2, 1/4 or 1/8 of its size, keeping at least twice the pixels needed on each side. None decodes
    all pixels.
    Raises ImageError if the file cannot be read, needs a decoder that is not installed, has more than
    MAX_PIXELS pixels, or samples without a defined range; TypeError and ValueError for an argument
    that is no image.
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
    """Decode a file, falling back to another decoder or to a copy without metadata."""
    from PIL import Image, JpegImagePlugin, UnidentifiedImageError

    def read(source: str | io.BytesIO, formats: tuple[str, ...]) -> NDArray[np.uint8]:
        with Image.open(source, formats=formats) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if fast_for is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
                scale = _jpeg_scale(width, height, orientation(image) >= 5, fast_for)
                image.draft(None, (max(width // scale, 1), max(height // scale, 1)))
            return to_rgb(image)

    def read_first(attempts: Iterator[Attempt]) -> NDArray[np.uint8]:
        source, formats = next(attempts)
        try:
            return read(source, formats)
        except (ImageError, Image.DecompressionBombError, MemoryError):
            raise
        except Exception as err:  # decoders raise anything on a damaged file
            if getattr(err, "errno", None) is not None:  # an error of the operating system
                raise
            with suppress(StopIteration):
                return read_first(attempts)
            if source is not file and isinstance(err, UnidentifiedImageError):
                raise ImageError(UNSUPPORTED) from err
            raise

    return _guard(lambda: read_first(_attempts(file)), name)


def _attempts(file: str | io.BytesIO) -> Iterator[Attempt]:
    """Yield the file, then the file for the decoder it needs, then a copy without metadata."""
    formats: tuple[str, ...] = FORMATS
    yield file, formats
    from edgeclip.images.metadata import without_metadata  # rarely needed

    with _contents(file) as data:
        if extra := extra_format(data[:HEAD]):
            extra.load()
            formats = (extra.name,)
            yield file, formats
        if bare := without_metadata(data):
            yield bare, formats


@contextmanager
def _contents(file: str | io.BytesIO) -> Iterator[bytes | mmap.mmap]:
    """Yield the bytes of a file, or none for a pipe, which can be read only once."""
    if isinstance(file, io.BytesIO):
        yield file.getvalue()
    elif os.path.isfile(file) and os.path.getsize(file):
        with (
            open(file, "rb") as opened,
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            yield data
    else:
        yield b""


def _jpeg_scale(width: int, height: int, turned: bool, spec: ImageSpec) -> int:
    """Return the divisor, 1, 2, 4 or 8, at which libjpeg may decode a JPEG of this stored size."""
    down, across = spec.size if not turned else spec.size[::-1]
    ratios = height / down, width / across
    shrink = max(ratios) if spec.resize == "longest" else min(ratios)
    for scale in (8, 4, 2):
        shift = max(-width % scale, -height % scale) / shrink
        if shrink >= MARGIN * scale and shift <= MAX_SHIFT:
            return scale
    return 1


def _guard(read: Callable[[], NDArray[np.uint8]], name: str) -> NDArray[np.uint8]:
    """Run `read`; turn any exception of a decoder into one ImageError."""
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
    except OSError as err:  # only errors of the operating system have a strerror
        raise ImageError(f"{name}: {err.strerror or f'broken image ({err})'}") from err
    except Exception as err:  # decoders raise anything on a damaged file, struct.error included
        raise ImageError(f"{name}: broken image ({err})") from err
