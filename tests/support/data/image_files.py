"""Image files written byte by byte, as by other software; Pillow would not write some of them."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

ORIENTATION = 0x0112
Tag = tuple[int, int, int, bytes]  # number, type, count, and four bytes: the value or its offset


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def camera_pixels(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return the pixels a camera stores so that a viewer, undoing an orientation, shows `pixels`."""
    transposed = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(
        {
            1: pixels,
            2: np.fliplr(pixels),
            3: np.rot90(pixels, 2),
            4: np.flipud(pixels),
            5: transposed,
            6: np.rot90(pixels, 1),
            7: np.rot90(transposed, 2),
            8: np.rot90(pixels, 3),
        }[orientation]
    )


def exif(*tags: Tag, order: str = "<") -> bytes:
    """Return EXIF data with these tags: a TIFF without an image."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    rows = (struct.pack(f"{order}HHI", *tag[:3]) + tag[3] for tag in tags)
    return head + b"".join(rows) + bytes(4)


def turned(orientation: int) -> Tag:
    return ORIENTATION, 3, 1, struct.pack("<HH", orientation, 0)


def chunk(kind: bytes, body: bytes, damage: int = 0) -> bytes:
    """Return a chunk of a PNG; its checksum is wrong if damage is not 0."""
    checksum = zlib.crc32(kind + body) ^ damage
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def png(samples: np.ndarray, bits: int, colour: int, *chunks: bytes) -> bytes:
    """Return a PNG of samples (H, W) or (H, W, C), without filters, with chunks before the pixels."""
    height, width = samples.shape[:2]
    rows = pack_samples(samples.reshape(height, -1), bits, ">")
    size = len(rows) // height
    lines = b"".join(b"\0" + rows[i : i + size] for i in range(0, len(rows), size))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
        + b"".join(chunks)
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


def with_chunks(data: bytes, *chunks: bytes, after: bool = False) -> bytes:
    """Insert chunks into a PNG, before or after its pixels."""
    offset = data.index(b"IEND" if after else b"IDAT") - 4
    return data[:offset] + b"".join(chunks) + data[offset:]


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def with_segments(data: bytes, *segments: bytes, jfif: bytes | None = None) -> bytes:
    """Insert segments into a JPEG; jfif, which may be empty, replaces its first segment."""
    end = 4 + struct.unpack(">H", data[4:6])[0] if jfif is not None else 2
    return data[:2] + (jfif or b"") + b"".join(segments) + data[end:]


def pack_samples(rows: np.ndarray, bits: int, order: str) -> bytes:
    """Pack rows of samples of 1 to 32 bits; each row starts at a byte, and the dtype has the sign."""
    if bits in (8, 16, 32):
        kind = rows.dtype.kind if rows.dtype.itemsize * 8 == bits else "u"
        return rows.astype(f"{order}{kind}{bits // 8}").tobytes()
    planes = rows[..., np.newaxis] >> np.arange(bits)[::-1] & 1
    return np.packbits(planes.reshape(len(rows), -1), axis=1).tobytes()


def tiff(
    samples: np.ndarray,
    bits: int,
    photometric: int,
    *,
    order: str = "<",
    deflate: bool = False,
    separate: bool = False,
    tags: Sequence[tuple[int, int, Sequence[int]]] = (),
    raw: bytes | None = None,
) -> bytes:
    """Return a TIFF of samples (H, W) or (H, W, C), in one strip or in one strip per plane.

    tags: number, type (3 for 16 bits, 4 for 32) and values. raw: a strip that replaces the samples.
    """
    height, width = samples.shape[:2]
    count = samples[0, 0].size
    planes = np.moveaxis(samples, -1, 0) if separate else [samples.reshape(height, -1)]
    strips = [pack_samples(plane, bits, order) for plane in planes] if raw is None else [raw]
    strips = [zlib.compress(strip) if deflate else strip for strip in strips]
    offsets = [8 + sum(map(len, strips[:i])) for i in range(len(strips))]
    rows = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [bits] * count),
        259: (3, [8 if deflate else 1]),
        262: (3, [photometric]),
        273: (4, offsets),
        277: (3, [count]),
        278: (4, [height]),
        279: (4, [len(strip) for strip in strips]),
        284: (3, [2 if separate else 1]),
    } | {number: (kind, values) for number, kind, values in tags}
    body = b"".join(strips)
    body += bytes(len(body) % 2)
    directory = 8 + len(body)
    table, values_at = b"", directory + 6 + 12 * len(rows)
    outside = b""
    for number, (kind, values) in sorted(rows.items()):
        value = struct.pack(f"{order}{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(value) > 4:
            outside += value + bytes(len(value) % 2)
            value = struct.pack(f"{order}I", values_at + len(outside) - len(value))
        table += struct.pack(f"{order}HHI", number, kind, len(values)) + value.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", directory)
    return head + body + struct.pack(f"{order}H", len(rows)) + table + bytes(4) + outside
