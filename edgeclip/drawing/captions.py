"""Captions: a line of text in any script, drawn with fonts that have its characters."""

from __future__ import annotations

import functools
import logging
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from PIL import Image, ImageDraw, ImageFont, features

from edgeclip.drawing.fonts import FontFile, system_fonts

logger = logging.getLogger(__name__)

FONT_SIZE = 18
LINE = 26  # height of a caption in pixels
MAX_LENGTH = 200  # characters of a caption
# Sizes of bitmap fonts: Noto Color Emoji, Apple Color Emoji, others.
BITMAP_SIZES = (109, 160, 136, 128, 96, 64)
JOINER = "\u200d"
SKIN_TONES = ("\U0001f3fb", "\U0001f3ff")
EMOJI = ("\U0001f000", "\U0001fbff")
AS_EMOJI, AS_TEXT = "\ufe0f", "\ufe0e"  # variation selectors
CJK_NAMES = ("CJK ", "HIRAGANA ", "KATAKANA ", "HANGUL ", "BOPOMOFO ", "IDEOGRAPHIC ", "FULLWIDTH ")


@dataclass(frozen=True, eq=False)
class _Font:
    """Loaded font, with the scale from its size to FONT_SIZE."""

    font: ImageFont.FreeTypeFont
    scale: float
    file: FontFile | None  # None for Pillow's built-in font of ASCII

    @property
    def colour(self) -> bool:
        return self.file is not None and self.file.colour

    def has(self, cluster: str) -> bool:
        """Return whether the font has a glyph for every character of a cluster."""
        needed = [character for character in cluster if not _is_ignorable(character)]
        if self.file is None:
            return all(" " <= character <= "~" for character in needed)
        return all(map(self.file.has, needed))

    def length(self, text: str) -> float:
        """Return the width of a text in pixels."""
        return self.font.getlength(text) * self.scale


_Run = tuple[_Font, str]


def draw_captions(texts: Sequence[str], width: int) -> list[Image.Image]:
    """Return a strip of `width` x LINE pixels for each text, cut to that width.

    A character that no installed font has is drawn as its code point, such as [U+9774]; a warning
    names a package with a font for it.
    """
    lines = [_clusters(_one_line(text)) for text in texts]
    fonts = _load_fonts([cluster for line in lines for cluster in line])
    lines = [[part for cluster in line for part in _available(cluster, fonts)] for line in lines]
    return [_draw(_cut(line, width, fonts), width) for line in lines]


@functools.cache
def builtin_font() -> ImageFont.FreeTypeFont:
    """Return Pillow's built-in font, which has little more than ASCII."""
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(FONT_SIZE))


def _one_line(text: str) -> str:
    """Return a text as one normalized line of limited length."""
    return unicodedata.normalize("NFC", " ".join(text.split())[:MAX_LENGTH])


def _clusters(text: str) -> list[str]:
    """Split a text into characters, each with its marks, modifiers and joined emoji."""
    clusters: list[str] = []
    for character in text:
        extends = unicodedata.category(character) in ("Mn", "Me", "Mc", "Cf")
        extends = extends or SKIN_TONES[0] <= character <= SKIN_TONES[1]
        if clusters and (extends or clusters[-1].endswith(JOINER)):
            clusters[-1] += character
        else:
            clusters.append(character)
    return clusters


def _is_ignorable(character: str) -> bool:
    """Return whether a character needs no glyph: joiners, selectors, directions."""
    return unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f"


def _is_emoji(cluster: str) -> bool:
    """Return whether a cluster is drawn in colour."""
    return AS_EMOJI in cluster or (EMOJI[0] <= cluster[0] <= EMOJI[1] and AS_TEXT not in cluster)


def _load_fonts(clusters: Iterable[str]) -> list[_Font]:
    """Load fonts until one has each cluster; emoji need a font in colour."""
    builtin = _Font(builtin_font(), 1, None)
    missing = {cluster for cluster in clusters if not builtin.has(cluster)}
    if not missing:
        return [builtin]
    fonts = []
    for file in system_fonts("".join(missing)):
        loaded = _load(file)
        if loaded is not None:
            fonts.append(loaded)
            missing = {c for c in missing if not (loaded.has(c) and loaded.colour == _is_emoji(c))}
        if not missing:
            break
    return [*fonts, builtin]


def _load(file: FontFile) -> _Font | None:
    """Return a font in FONT_SIZE or its only size, None if it cannot be loaded."""
    for size in (FONT_SIZE, *BITMAP_SIZES):
        try:
            font = ImageFont.truetype(file.path, size, file.index)
        except OSError:  # another size, or damaged
            continue
        return _Font(font, FONT_SIZE / size, file)
    return None


def _available(cluster: str, fonts: Sequence[_Font]) -> list[str]:
    """Return a cluster as drawable parts, with code points in place of missing characters."""
    if any(font.has(cluster) for font in fonts):
        return [cluster]
    if len(cluster) > 1:
        return [part for character in cluster for part in _available(character, fonts)]
    _warn(cluster)
    return list(f"[U+{ord(cluster):04X}]")


_warned: set[str] = set()


def _warn(character: str) -> None:
    """Log, once for each package, which package to install for a character."""
    package = _package(character)
    if package not in _warned:
        _warned.add(package)
        hint = f"; install {package} (its name on Debian and Ubuntu)" if package else ""
        text = "no font here has U+%04X: captions show such characters by their numbers%s"
        logger.warning(text, ord(character), hint)


def _package(character: str) -> str:
    """Return the Debian package of a font for a character, "" for control codes."""
    if _is_emoji(character):
        return "fonts-noto-color-emoji"
    if unicodedata.name(character, "").startswith(CJK_NAMES):
        return "fonts-noto-cjk"
    return "" if unicodedata.category(character).startswith("C") else "fonts-noto-core"


def _runs(clusters: Sequence[str], fonts: Sequence[_Font]) -> list[_Run]:
    """Join neighbouring clusters that share a font, so that the font shapes them together."""
    runs: list[_Run] = []
    for cluster in clusters:
        emoji, last = _is_emoji(cluster), runs[-1][0] if runs else None
        # Emoji fonts have digits too, and text fonts have emoji in black.
        order = sorted(fonts, key=lambda font: (font.colour != emoji, font is not last))
        font = next(font for font in order if font.has(cluster))
        if not features.check("raqm"):  # Pillow's basic layout draws boxes for them
            cluster = "".join(c for c in cluster if not _is_ignorable(c))
        if font is last:
            runs[-1] = font, runs[-1][1] + cluster
        else:
            runs.append((font, cluster))
    return runs


def _cut(clusters: list[str], width: int, fonts: Sequence[_Font]) -> list[_Run]:
    """Return the runs of a line cut to `width` pixels, with three dots if it is longer."""

    def is_too_long(count: int, end: str = "...") -> bool:
        runs = _runs([*clusters[:count], *end], fonts)
        return sum(font.length(text) for font, text in runs) > width

    if not is_too_long(len(clusters), ""):
        return _runs(clusters, fonts)
    count = bisect_left(range(1, len(clusters)), True, key=is_too_long)
    return _runs([*clusters[:count], *"..."], fonts)


def _draw(runs: Sequence[_Run], width: int) -> Image.Image:
    """Draw runs on a white strip."""
    strip = Image.new("RGB", (width, LINE), "white")
    ascent, _ = builtin_font().getmetrics()
    x = 0.0
    for font, text in runs:
        if font.scale == 1:
            draw = ImageDraw.Draw(strip)
            draw.text((x, ascent), text, "black", font.font, "ls", embedded_color=font.colour)
        else:
            _draw_scaled(strip, (x, ascent), text, font)
        x += font.length(text)
    return strip


def _draw_scaled(strip: Image.Image, at: tuple[float, float], text: str, font: _Font) -> None:
    """Draw in a bitmap font's only size, and shrink the drawing."""
    left, top, right, bottom = font.font.getbbox(text, anchor="ls")
    size = round((right - left) * font.scale), round((bottom - top) * font.scale)
    if min(size) < 1:
        return
    layer = Image.new("RGBA", (round(right - left), round(bottom - top)))
    draw = ImageDraw.Draw(layer)
    draw.text((-left, -top), text, "black", font.font, "ls", embedded_color=True)
    layer = layer.resize(size, Image.Resampling.LANCZOS)
    strip.paste(layer, (round(at[0] + left * font.scale), round(at[1] + top * font.scale)), layer)
