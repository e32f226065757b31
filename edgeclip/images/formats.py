"""Image formats: names in Pillow, file suffixes, and plug-ins that some formats need."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass

from edgeclip.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".jpe", ".mpo", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
)


@dataclass(frozen=True)
class Extra:
    """Format that needs a plug-in, or a build of Pillow with its decoder."""

    name: str  # in Pillow
    title: str
    suffixes: tuple[str, ...]
    decoder: str  # the package or module to look for
    plugin: str  # the module that registers it with Pillow
    install: str

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.decoder) is not None

    def load(self) -> None:
        """Register the format with Pillow. Raise ImageError if its decoder is not installed."""
        if not self.installed:
            raise ImageError(f"the decoder of {self.title} files is not installed: {self.install}")
        importlib.import_module(self.plugin)


PLUGINS = "pip install 'edgeclip[formats]'"
AVIF = Extra(
    "AVIF", "AVIF", (".avif", ".avifs"), "PIL._avif", "PIL.AvifImagePlugin",
    "pip install --upgrade pillow",
)  # fmt: skip
HEIF = Extra(
    "HEIF", "HEIC", (".heic", ".heif", ".hif"), "pi_heif", "pi_heif.HeifImagePlugin", PLUGINS
)
JPEG_XL = Extra("JXL", "JPEG XL", (".jxl",), "pillow_jxl", "pillow_jxl", PLUGINS)
EXTRAS = (AVIF, HEIF, JPEG_XL)

HEAD = 64  # first bytes of a file that identify an extra format
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}


def extra_format(head: bytes) -> Extra | None:
    """Return the extra format that the first bytes of a file identify, None for any other."""
    if head[4:8] == b"ftyp":  # followed by the brand, its version, and compatible brands
        end = min(int.from_bytes(head[:4], "big"), len(head))
        brands = {head[8:12]} | {head[i : i + 4] for i in range(16, end, 4)}
        if brands & {b"avif", b"avis"}:
            return AVIF
        return HEIF if brands & HEIF_BRANDS else None
    return JPEG_XL if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")) else None


def suffixes() -> frozenset[str]:
    """Return the suffixes of files that can be decoded here, in lower case."""
    return SUFFIXES.union(*(extra.suffixes for extra in EXTRAS if extra.installed))
