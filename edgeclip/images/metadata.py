"""Removal of metadata from image files that Pillow refuses because of it.

A copy keeps the chunks, segments or tags that pixels and orientation need. Compressed text and colour
profiles are never inflated.
"""

from __future__ import annotations

import io
import mmap
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TypeAlias

from edgeclip.errors import ImageError
from edgeclip.images.pixels import ORIENTATION

Data: TypeAlias = "bytes | mmap.mmap"  # slices of either are bytes


# Uncompressed text chunks in which Pillow looks for an orientation if a PNG has no eXIf chunk.
PNG_TEXT = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0\0")
PNG_TEXT_BYTES = 1 << 20
XMP = b"http://ns.adobe.com/xap/1.0/\0"
WEBP_CHUNKS = (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF", b"EXIF")
# Tags of TIFF 6.0 and its JPEG supplement: size, layout, compression, colours and orientation.
TIFF_TAGS = frozenset(
    {254, 255, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320}
    | {322, 323, 324, 325, 332, 338, 339, 347, *range(512, 522), 529, 530, 531, 532}
)


def without_metadata(data: Data) -> io.BytesIO | None:
    """Return a copy of an image file without metadata, None for an unknown format.

    Raises ImageError for a truncated file.
    """
    for offset, magic, parts in KINDS:
        if data[offset : offset + len(magic)] == magic:
            try:
                return io.BytesIO(b"".join(parts(data)))
            except (struct.error, IndexError) as err:
                raise ImageError("broken image, which ends early") from err
    return None


def _png(data: Data) -> Iterator[bytes]:
    """Yield the signature, the critical chunks, and intact chunks of transparency and orientation."""
    yield data[:8]
    at = 8
    while at + 8 <= len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        end = at + 12 + size
        critical = not kind[0] & 0x20
        if critical or _is_kept(data, at, kind, size):
            yield data[at:end]
        if kind == b"IEND":
            return
        at = end


def _is_kept(data: Data, at: int, kind: bytes, size: int) -> bool:
    """Return whether an ancillary chunk has transparency or orientation, and a valid checksum."""
    body = data[at + 8 : at + 8 + min(size, PNG_TEXT_BYTES)]
    if kind in (b"tEXt", b"iTXt"):
        if not body.startswith(PNG_TEXT):
            return False
    elif kind not in (b"tRNS", b"eXIf"):
        return False
    checksum = data[at + 8 + size : at + 12 + size]
    return struct.pack(">I", zlib.crc32(kind + body)) == checksum


def _jpeg(data: Data) -> Iterator[bytes]:
    """Yield all segments except comments and applications; keep JFIF, Adobe and orientation."""
    yield data[:2]
    at = 2
    while data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0xDA:  # start of scan: the rest is pixels
            break
        end = at + 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]
        body = data[at + 4 : end]
        if 0xE0 <= marker <= 0xEF or marker == 0xFE:
            jfif = marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 14
            adobe = marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12
            if jfif or adobe or body.startswith(XMP):
                yield data[at:end]
            elif body.startswith(b"Exif\0\0"):
                yield _exif_segment(body)
        else:
            yield data[at:end]
        at = end
    yield data[at:]


def _exif_segment(exif: bytes) -> bytes:
    """Return a segment with nothing but the orientation, empty if it cannot be read."""
    from PIL import Image

    original, reduced = Image.Exif(), Image.Exif()
    with suppress(Exception):  # Pillow raises anything on broken EXIF
        original.load(exif)
        reduced[ORIENTATION] = original[ORIENTATION]
        body = reduced.tobytes()
        return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
    return b""


def _webp(data: Data) -> Iterator[bytes]:
    """Yield a container of the pixel chunks and a complete EXIF chunk."""
    chunks = []
    at = 12
    while at + 8 <= len(data):
        kind, size = struct.unpack("<4sI", data[at : at + 8])
        end = at + 8 + size
        if kind in WEBP_CHUNKS and (kind != b"EXIF" or end <= len(data)):
            chunks.append(data[at:end] + b"\0" * (size & 1))
        at = end + (size & 1)
    body = b"WEBP" + b"".join(chunks)
    yield b"RIFF" + struct.pack("<I", len(body)) + body


def _gif(data: Data) -> Iterator[bytes]:
    """Yield all blocks; of the extensions before the first frame only complete graphic controls."""
    flags = data[10]
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    yield data[:at]
    while data[at] == 0x21:
        end = at + 2
        while data[end]:  # the size of a block; the last one is empty
            end += data[end] + 1
        end += 1
        if data[at + 1] == 0xF9 and data[at + 2] >= 4:
            yield data[at:end]
        at = end
    yield data[at:]


def _tiff(data: Data) -> Iterator[bytes]:
    """Yield the file with a new directory of the kept tags appended for its first picture.

    Entries refer to values by offset in the file, so that no value moves.
    """
    order = "<" if data[:2] == b"II" else ">"
    big = 43 in data[2:4]  # BigTIFF
    start, place, count, entry = (8, "Q", "Q", 20) if big else (4, "I", "H", 12)
    first = start + struct.calcsize(place)
    (at,) = struct.unpack(order + place, data[start:first])
    begin = at + struct.calcsize(count)
    (entries,) = struct.unpack(order + count, data[at:begin])
    table = (data[i : i + entry] for i in range(begin, begin + entries * entry, entry))
    kept = [row for row in table if struct.unpack(order + "H", row[:2])[0] in TIFF_TAGS]
    padding = b"\0" * (-len(data) % 8)
    yield data[:start] + struct.pack(order + place, len(data) + len(padding)) + data[first:]
    yield padding + struct.pack(order + count, len(kept)) + b"".join(kept)
    yield struct.pack(order + place, 0)  # no second picture


def _avif(data: Data) -> Iterator[bytes]:
    """Yield the file with its EXIF item marked as free space; AVIF stores orientation elsewhere."""
    item = rb"(infe(?:\x02.{3}.{2}|\x03.{3}.{4}).{2})Exif"  # version, flags, item, protection, type
    yield re.sub(item, rb"\1free", data, flags=re.DOTALL)


KINDS: tuple[tuple[int, bytes, Callable[[Data], Iterator[bytes]]], ...] = (
    (0, b"\x89PNG\r\n\x1a\n", _png),
    (0, b"\xff\xd8\xff", _jpeg),
    (8, b"WEBP", _webp),
    (0, b"GIF8", _gif),
    (0, b"II*\0", _tiff),
    (0, b"MM\0*", _tiff),
    (0, b"II+\0", _tiff),
    (0, b"MM\0+", _tiff),
    (4, b"ftyp", _avif),
)
