"""Captions: a line of text in any script, drawn in the fonts that have its characters."""

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
LINE = 26  # height of a caption
LONGEST = 200  # characters of a caption that are looked at
# Of fonts that are pictures in one size: Noto Color Emoji, Apple Color Emoji, others.
BITMAP_SIZES = (109, 160, 136, 128, 96, 64)
JOINER = "\u200d"
SKIN_TONES = ("\U0001f3fb", "\U0001f3ff")
EMOJI = ("\U0001f000", "\U0001fbff")
AS_EMOJI, AS_TEXT = "\ufe0f", "\ufe0e"  # variation selectors
CJK_NAMES = ("CJK ", "HIRAGANA ", "KATAKANA ", "HANGUL ", "BOPOMOFO ", "IDEOGRAPHIC ", "FULLWIDTH ")


@dataclass(frozen=True, eq=False)
class _Font:
    font: ImageFont.FreeTypeFont
    scale: float  # from its size to FONT_SIZE
    file: FontFile | None  # None for Pillow's own, of ASCII

    @property
    def colour(self) -> bool:
        return self.file is not None and self.file.colour

    def has(self, cluster: str) -> bool:
        needed = [character for character in cluster if not _is_ignorable(character)]
        if self.file is None:
            return all(" " <= character <= "~" for character in needed)
        return all(map(self.file.has, needed))

    def length(self, text: str) -> float:
        return self.font.getlength(text) * self.scale


_Run = tuple[_Font, str]


def draw_captions(texts: Sequence[str], width: int) -> list[Image.Image]:
    """Return a strip of `width` x LINE pixels for each text, cut to that width.

    A character that no font here has is drawn as its number, such as [U+9774], and a warning names
    a package with a font for it.
    """
    lines = [_clusters(_one_line(text)) for text in texts]
    fonts = _load_fonts([cluster for line in lines for cluster in line])
    lines = [[part for cluster in line for part in _available(cluster, fonts)] for line in lines]
    return [_draw(_cut(line, width, fonts), width) for line in lines]


@functools.cache
def own_font() -> ImageFont.FreeTypeFont:
    """Return the font that Pillow brings, which has hardly more than ASCII."""
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(FONT_SIZE))


def _one_line(text: str) -> str:
    return unicodedata.normalize("NFC", " ".join(text.split())[:LONGEST])


def _clusters(text: str) -> list[str]:
    """Split a text into characters, each with the marks, modifiers and joined emoji after it."""
    found: list[str] = []
    for character in text:
        extends = unicodedata.category(character) in ("Mn", "Me", "Mc", "Cf")
        extends = extends or SKIN_TONES[0] <= character <= SKIN_TONES[1]
        if found and (extends or found[-1].endswith(JOINER)):
            found[-1] += character
        else:
            found.append(character)
    return found


def _is_ignorable(character: str) -> bool:
    """Return whether a character has no glyph of its own: joiners, selectors, directions."""
    return unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f"


def _is_emoji(cluster: str) -> bool:
    return AS_EMOJI in cluster or (EMOJI[0] <= cluster[0] <= EMOJI[1] and AS_TEXT not in cluster)


def _load_fonts(clusters: Iterable[str]) -> list[_Font]:
    """Load fonts until each cluster has one; emoji look for one in colour."""
    own = _Font(own_font(), 1, None)
    missing = {cluster for cluster in clusters if not own.has(cluster)}
    if not missing:
        return [own]
    fonts = []
    for file in system_fonts("".join(missing)):
        loaded = _load(file)
        if loaded is not None:
            fonts.append(loaded)
            missing = {c for c in missing if not (loaded.has(c) and loaded.colour == _is_emoji(c))}
        if not missing:
            break
    return [*fonts, own]


def _load(file: FontFile) -> _Font | None:
    for size in (FONT_SIZE, *BITMAP_SIZES):
        try:
            font = ImageFont.truetype(file.path, size, file.index)
        except OSError:  # not of this size, or damaged
            continue
        return _Font(font, FONT_SIZE / size, file)
    return None


def _available(cluster: str, fonts: Sequence[_Font]) -> list[str]:
    """Return a cluster as it can be drawn: whole, or else in parts, with numbers for the missing."""
    if any(font.has(cluster) for font in fonts):
        return [cluster]
    if len(cluster) > 1:
        return [part for character in cluster for part in _available(character, fonts)]
    _warn(cluster)
    return list(f"[U+{ord(cluster):04X}]")


_warned: set[str] = set()


def _warn(character: str) -> None:
    """Say once what to install for a character of a kind."""
    package = _package(character)
    if package not in _warned:
        _warned.add(package)
        hint = f"; install {package} (its name on Debian and Ubuntu)" if package else ""
        text = "no font here has U+%04X: captions show such characters by their numbers%s"
        logger.warning(text, ord(character), hint)


def _package(character: str) -> str:
    """Return Debian's name of a package with a font for a character; nothing for control codes."""
    if _is_emoji(character):
        return "fonts-noto-color-emoji"
    if unicodedata.name(character, "").startswith(CJK_NAMES):
        return "fonts-noto-cjk"
    return "" if unicodedata.category(character).startswith("C") else "fonts-noto-core"


def _runs(clusters: Sequence[str], fonts: Sequence[_Font]) -> list[_Run]:
    """Join neighbours of one font, which shapes them together."""
    runs: list[_Run] = []
    for cluster in clusters:
        emoji, last = _is_emoji(cluster), runs[-1][0] if runs else None
        # Fonts of emoji have digits too, and those of text emoji in black.
        order = sorted(fonts, key=lambda font: (font.colour != emoji, font is not last))
        font = next(font for font in order if font.has(cluster))
        if not features.check("raqm"):  # Pillow's basic layout draws a box for these
            cluster = "".join(c for c in cluster if not _is_ignorable(c))
        if font is last:
            runs[-1] = font, runs[-1][1] + cluster
        else:
            runs.append((font, cluster))
    return runs


def _cut(clusters: list[str], width: int, fonts: Sequence[_Font]) -> list[_Run]:
    """Return the runs of a line of `width` pixels at most, with three dots where it is longer."""

    def is_too_long(count: int, end: str = "...") -> bool:
        runs = _runs([*clusters[:count], *end], fonts)
        return sum(font.length(text) for font, text in runs) > width

    if not is_too_long(len(clusters), ""):
        return _runs(clusters, fonts)
    count = bisect_left(range(1, len(clusters)), True, key=is_too_long)
    return _runs([*clusters[:count], *"..."], fonts)


def _draw(runs: Sequence[_Run], width: int) -> Image.Image:
    strip = Image.new("RGB", (width, LINE), "white")
    ascent, _ = own_font().getmetrics()
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
    """Draw in the one size that a bitmap font has, and shrink the picture."""
    left, top, right, bottom = font.font.getbbox(text, anchor="ls")
    size = round((right - left) * font.scale), round((bottom - top) * font.scale)
    if min(size) < 1:
        return
    layer = Image.new("RGBA", (round(right - left), round(bottom - top)))
    draw = ImageDraw.Draw(layer)
    draw.text((-left, -top), text, "black", font.font, "ls", embedded_color=True)
    layer = layer.resize(size, Image.Resampling.LANCZOS)
    strip.paste(layer, (round(at[0] + left * font.scale), round(at[1] + top * font.scale)), layer)
