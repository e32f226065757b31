"""Fonts of the system, and the characters of each font.

Pillow draws a box for a character that a font lacks, without an error: the font's character table
(OpenType's "cmap") has to be read.
"""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SUFFIXES = (".ttf", ".ttc", ".otf", ".otc")
# Folders to search if fontconfig is missing, and parts of file names to prefer, in this order.
FOLDERS = (
    "~/.local/share/fonts",
    "~/.fonts",
    "/usr/local/share/fonts",
    "/usr/share/fonts",
    "~/Library/Fonts",
    "/Library/Fonts",
    "/System/Library/Fonts",
)
PREFERRED = (
    "DejaVuSans.",
    "NotoSans-Regular.",
    "LiberationSans-Regular.",
    "NotoSansCJK-Regular.",
    "wqy-",
    "DroidSansFallback",
    "NotoColorEmoji",
    "Apple Color Emoji",
    "Symbola",
)
COLOUR_TABLES = frozenset({b"CBDT", b"COLR", b"sbix"})
LARGEST_TABLE = 1 << 24  # bytes; ten times the largest table of the Noto fonts


@dataclass(frozen=True, eq=False)
class FontFile:
    """Font in a file."""

    path: str
    index: int  # in a collection
    colour: bool  # whether it has glyphs in colour
    cmap: bytes  # subtable of Unicode characters, in format 4 or 12

    @classmethod
    def read(cls, path: str, index: int = 0) -> FontFile | None:
        """Return a font, None for a damaged file or another kind of file."""
        try:
            with open(path, "rb") as file:
                start = 0
                if file.read(4) == b"ttcf":
                    file.seek(12 + 4 * index)
                    (start,) = struct.unpack(">I", file.read(4))
                file.seek(start + 4)
                (count,) = struct.unpack(">H6x", file.read(8))
                tables = {}
                for _ in range(count):
                    name, offset, length = struct.unpack(">4s4xII", file.read(16))
                    tables[name] = offset, min(length, LARGEST_TABLE)
                offset, length = tables[b"cmap"]
                file.seek(offset)
                cmap = _unicode_subtable(file.read(length))
        except (OSError, struct.error, KeyError):
            return None
        return cls(path, index, bool(COLOUR_TABLES & tables.keys()), cmap)

    def has(self, character: str) -> bool:
        """Return whether the font has a glyph for a character."""
        code = ord(character)
        try:
            if self.cmap[:2] == b"\0\x0c":
                return _glyph_12(self.cmap, code) != 0
            return code <= 0xFFFF and _glyph_4(self.cmap, code) != 0
        except (struct.error, ValueError):  # a damaged table
            return False


def _unicode_subtable(cmap: bytes) -> bytes:
    """Return the subtable with the most characters. Raise KeyError if none has a known format."""
    subtables = {}
    (count,) = struct.unpack_from(">H", cmap, 2)
    for i in range(count):
        platform, encoding, offset = struct.unpack_from(">HHI", cmap, 4 + 8 * i)
        if platform == 0 or (platform, encoding) in ((3, 1), (3, 10)):
            subtables[struct.unpack_from(">H", cmap, offset)[0]] = cmap[offset:]
    return subtables[12] if 12 in subtables else subtables[4]


def _glyph_12(table: bytes, code: int) -> int:
    """Return the glyph of a character by groups (first, last, glyph of the first), 0 for none."""
    (count,) = struct.unpack_from(">I", table, 12)
    groups = np.frombuffer(table, ">u4", 3 * count, 16).reshape(count, 3)
    i = int(np.searchsorted(groups[:, 0], code, "right")) - 1
    if i < 0 or code > groups[i, 1]:
        return 0
    return int(groups[i, 2]) + code - int(groups[i, 0])


def _glyph_4(table: bytes, code: int) -> int:
    """Return the glyph of a character by segments of the first 65,536 characters, 0 for none."""
    (double,) = struct.unpack_from(">H", table, 6)
    count = double // 2
    ends = np.frombuffer(table, ">u2", count, 14)
    starts, deltas, offsets = np.frombuffer(table, ">u2", 3 * count, 16 + double).reshape(3, count)
    i = int(np.searchsorted(ends, code))
    if i == count or code < starts[i]:
        return 0
    glyph, delta, offset = code, int(deltas[i]), int(offsets[i])
    if offset:  # relative to its own position in the table
        position = 16 + 3 * double + 2 * i + offset + 2 * (code - int(starts[i]))
        (glyph,) = struct.unpack_from(">H", table, position)
        if glyph == 0:
            return 0
    return (glyph + delta) & 0xFFFF


def system_fonts(text: str) -> Iterator[FontFile]:
    """Yield the fonts of this system, fonts for the characters of `text` first."""
    fonts = _by_fontconfig(text)
    for path, index in _in_folders() if fonts is None else fonts:
        font = FontFile.read(path, index)
        if font is not None:
            yield font


def _by_fontconfig(text: str) -> list[tuple[str, int]] | None:
    """Return files and indices in fontconfig's order, None if fontconfig is not installed.

    Sorting omits fonts that add no character to the fonts before them.
    """
    codes = " ".join(f"{ord(character):x}" for character in sorted(set(text)))
    command = ["fc-match", "--sort", "--format=%{index} %{file}\n", f"sans:charset={codes}"]
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    fonts = []
    for line in os.fsdecode(done.stdout).splitlines():
        index, _, path = line.partition(" ")
        if index.isdecimal() and path.lower().endswith(SUFFIXES):
            fonts.append((path, int(index) & 0xFFFF))  # upper bits: a variable font's instance
    return fonts


def _in_folders() -> list[tuple[str, int]]:
    """Return the font files of FOLDERS, preferred names first."""
    paths = [
        os.path.join(folder, name)
        for top in FOLDERS
        for folder, _, names in os.walk(Path(top).expanduser())
        for name in names
        if name.lower().endswith(SUFFIXES)
    ]

    def rank(path: str) -> tuple[int, str]:
        name = os.path.basename(path)
        ranks = (i for i, part in enumerate(PREFERRED) if part in name)
        return next(ranks, len(PREFERRED)), path

    return [(path, 0) for path in sorted(paths, key=rank)]
