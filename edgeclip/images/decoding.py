"""Images from files, bytes, PIL and arrays as uint8 RGB (H, W, 3)."""

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
    """A uint8 RGB array (H, W, 3) on the GPU."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


ImageSource: TypeAlias = (
    "str | PathLike[str] | bytes | bytearray | memoryview | Image | NDArray[np.uint8] | CudaFrame"
)
Attempt: TypeAlias = "tuple[str | io.BytesIO, tuple[str, ...]]"  # a file, and formats of Pillow's

# Pillow's own limit against decompression bombs, in pixels: above any camera of today.
MAX_PIXELS = 178_956_970
UNSUPPORTED = (
    "broken image, or a variant of its format that cannot be decoded; save it as PNG or JPEG"
)

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

    Any of `edgeclip.images.formats`; the first picture of an animation. The orientation is applied,
    transparency is laid on white, greys are scaled to 8 bits, metadata that cannot be read is ignored.
    fast_for: the encoder's input. A path or bytes of a JPEG far larger than that is decoded at 1/2,
    1/4 or 1/8 of its size, with at least twice the pixels needed left each way. None: exactly.
    Raises ImageError where the file cannot be read, needs a decoder that is not installed, has more
    than MAX_PIXELS pixels or samples without an agreed range; TypeError and ValueError for an
    argument that is no picture.
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
        except Exception as err:  # decoders raise anything on a file that they do not like
            if getattr(err, "errno", None) is not None:  # the system refuses it
                raise
            with suppress(StopIteration):
                return read_first(attempts)
            if source is not file and isinstance(err, UnidentifiedImageError):
                raise ImageError(UNSUPPORTED) from err
            raise

    return _guard(lambda: read_first(_attempts(file)), name)


def _attempts(file: str | io.BytesIO) -> Iterator[Attempt]:
    """Yield the file, then the same for the decoder that it needs, then a copy without metadata."""
    formats: tuple[str, ...] = FORMATS
    yield file, formats
    from edgeclip.images.metadata import without_metadata  # few files need it

    with _contents(file) as data:
        if extra := extra_format(data[:HEAD]):
            extra.load()
            formats = (extra.name,)
            yield file, formats
        if bare := without_metadata(data):
            yield bare, formats


@contextmanager
def _contents(file: str | io.BytesIO) -> Iterator[bytes | mmap.mmap]:
    """Yield the bytes of a file; none of a pipe, which can be read only once."""
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
