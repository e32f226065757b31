"""Captions: each character is drawn with a font that has it, or as its number."""

from __future__ import annotations

import io
import logging
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import TTCollection, TTFont
from fontTools.ttLib.tables.DefaultTable import DefaultTable
from PIL import Image, ImageChops, ImageDraw, ImageFont, features

from edgeclip.drawing import captions, fonts
from edgeclip.drawing.captions import FONT_SIZE, LINE, draw_captions
from edgeclip.drawing.fonts import FontFile, system_fonts
from edgeclip.explain import Explanation, render

FOLDER = Path(mpl.get_data_path(), "fonts", "ttf")
DEJAVU = FOLDER / "DejaVuSans.ttf"
SHOE, BOOT = "靴", "👢"
WIDTH = 320
STRIKE = 109  # size of a bitmap font, in pixels


def build(path: Path, *characters: str, colour: str = "") -> Path:
    """Write a font in which each of the characters is a square as large as a letter."""
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(character): "square" for character in characters})
    pen = TTGlyphPen(None)
    for point in ((0, 0), (0, 700), (700, 700), (700, 0)):
        (pen.lineTo if point != (0, 0) else pen.moveTo)(point)
    pen.closePath()
    square = pen.glyph()
    builder.setupGlyf({".notdef": square, "square": square})
    builder.setupHorizontalMetrics({".notdef": (800, 0), "square": (800, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    builder.setupPost()
    if colour == "layers":
        builder.setupCOLR({"square": [("square", 0)]})
        builder.setupCPAL([[(1, 0, 0, 1)]])
    elif colour == "bitmaps":
        add_bitmaps(builder.font)
    builder.save(path)
    return path


def add_bitmaps(font: TTFont) -> None:
    """Replace the square by a red bitmap in one size, the format of Noto Color Emoji."""
    png = io.BytesIO()
    Image.new("RGBA", (STRIKE, STRIKE), "red").save(png, "PNG")
    # Small metrics: height, width, bearings, advance; then the PNG (format 17).
    glyph = struct.pack(">BBbbBI", STRIKE, STRIKE, 0, 90, STRIKE + 11, len(png.getvalue()))
    data = struct.pack(">HH", 3, 0) + glyph + png.getvalue()
    lines = struct.pack(">bbBbbbbbbbbb", 100, -20, STRIKE, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    subtable = struct.pack(">HHI", 1, 17, 4) + struct.pack(">II", 0, len(data) - 4)
    array = struct.pack(">HHI", 1, 1, 8)  # range of one glyph; offset of its subtable
    size = struct.pack(">IIII", 56, len(array + subtable), 1, 0) + 2 * lines
    size += struct.pack(">HHBBBb", 1, 1, STRIKE, STRIKE, 32, 1)
    for tag, content in (("CBDT", data), ("CBLC", struct.pack(">HHI", 3, 0, 1) + size)):
        font[tag] = DefaultTable(tag)
        font[tag].data = content + (array + subtable if tag == "CBLC" else b"")
    del font["glyf"], font["loca"]


def read(path: Path, index: int = 0) -> FontFile:
    font = FontFile.read(str(path), index)
    assert font is not None
    return font


@pytest.fixture(autouse=True)
def _reset_warnings() -> Iterator[None]:
    captions._warned.clear()
    yield
    captions._warned.clear()


@pytest.fixture
def use_fonts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes these the system's only fonts."""

    def patch(*paths: Path) -> None:
        monkeypatch.setattr(captions, "system_fonts", lambda _: iter(map(read, paths)))

    return patch


def draw_with_pillow(text: str, font: ImageFont.FreeTypeFont | None = None) -> Image.Image:
    """Draw the text with Pillow alone."""
    strip = Image.new("RGB", (WIDTH, LINE), "white")
    ascent = ImageFont.load_default(FONT_SIZE).getmetrics()[0]
    font = font or ImageFont.load_default(FONT_SIZE)
    ImageDraw.Draw(strip).text((0, ascent), text, "black", font, "ls")
    return strip


def caption(text: str) -> Image.Image:
    (strip,) = draw_captions([text], WIDTH)
    assert strip.size == (WIDTH, LINE)
    return strip


def ink(strip: Image.Image) -> tuple[int, int, int, int]:
    box = ImageChops.invert(strip).getbbox()
    assert box is not None
    return box


# Characters of a font.


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ttf"))[::9], ids=lambda path: path.stem)
def test_characters_of_a_font(path: Path) -> None:
    font, covered = read(path), TTFont(path).getBestCmap().keys()
    random = np.random.default_rng(0)
    chosen = {int(code) for code in random.choice(sorted(covered), 500)}
    chosen |= {code + i for code in chosen for i in (-1, 1)} | {0, 0xFFFF, 0x10000, 0x10FFFF}
    chosen |= {int(code) for code in random.integers(0, 0x20000, 1000)}
    for code in chosen:
        assert font.has(chr(code)) == (code in covered)
    assert not font.colour


@pytest.mark.parametrize("characters", ["a", "\0", "\ufffe", f"ac{SHOE}", f"a{BOOT}\U0010ffff"])
def test_characters_of_a_small_font(tmp_path: Path, characters: str) -> None:
    font = read(build(tmp_path / "a.ttf", *characters))
    for code in {0, 1, 0x10FFFF, *(ord(c) + i for c in characters for i in (-1, 0, 1))}:
        if 0 <= code <= 0x10FFFF:
            assert font.has(chr(code)) == (chr(code) in characters)


def test_fonts_of_a_collection(tmp_path: Path) -> None:
    collection = TTCollection()
    collection.fonts = [TTFont(build(tmp_path / f"{c}.ttf", c)) for c in ("a", SHOE)]
    path = tmp_path / "both.ttc"
    collection.save(path)
    assert [read(path, i).has(SHOE) for i in (0, 1)] == [False, True]
    assert FontFile.read(str(path), 2) is None or not read(path, 2).has(SHOE)


def test_fonts_that_are_damaged(tmp_path: Path) -> None:
    good = DEJAVU.read_bytes()
    path = tmp_path / "a.ttf"
    assert FontFile.read(str(path)) is None
    for data in (b"", b"no font", b"ttcf" + good[4:], bytes(2000)):
        path.write_bytes(data)
        assert FontFile.read(str(path)) is None
    start = read(DEJAVU).cmap
    at = good.index(start[:4096])
    random = np.random.default_rng(0)
    for _ in range(60):  # any damage gives an answer, not an error
        broken = bytearray(good)
        for offset in random.integers(0, 64, 3):
            broken[at + int(offset)] = int(random.integers(256))
        path.write_bytes(broken[: int(random.integers(at, len(good)))])
        font = FontFile.read(str(path))
        for character in ("a", "é", SHOE, BOOT):
            assert font is None or font.has(character) in (True, False)


# Fonts of the system.


@pytest.mark.skipif(shutil.which("fc-match") is None, reason="needs fontconfig")
def test_fontconfig_names_the_font_of_a_character(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "with space é"
    folder.mkdir()
    for name, character in (("a", "a"), ("b", SHOE), ("c", BOOT)):
        build(folder / f"{name}.ttf", character)
    (tmp_path / "fonts.conf").write_text(
        f"<fontconfig><dir>{folder}</dir><cachedir>{tmp_path}/cache</cachedir></fontconfig>"
    )
    monkeypatch.setenv("FONTCONFIG_FILE", str(tmp_path / "fonts.conf"))
    monkeypatch.setattr(fonts, "FOLDERS", ())
    for name, character in (("b", SHOE), ("c", BOOT)):
        first = next(system_fonts(character))
        assert (first.path, first.has(character)) == (str(folder / f"{name}.ttf"), True)
    assert {Path(font.path).stem for font in system_fonts(SHOE)} >= {"b"}


def test_folders_are_searched_without_fontconfig(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b", "a", "Symbola", "NotoSansCJK-Regular"):
        build(tmp_path / "deep" / "er" / f"{name}.TTF", SHOE)
    shutil.copy(DEJAVU, tmp_path)
    (tmp_path / "broken.ttf").write_text("no font")
    (tmp_path / "readme.txt").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(fonts, "FOLDERS", (str(tmp_path), str(tmp_path / "none")))
    names = [Path(font.path).stem for font in system_fonts("x")]
    assert names == ["DejaVuSans", "NotoSansCJK-Regular", "Symbola", "a", "b"]


# Drawing.


@pytest.mark.parametrize(
    "text", ["ankle boot", "clean, similarity 0.812", "".join(map(chr, range(33, 127)))[:30]]
)
def test_ascii_needs_no_fonts(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "system_fonts", pytest.fail)
    assert caption(text) == draw_with_pillow(text)
    assert draw_captions(["", " \n"], WIDTH) == [draw_with_pillow("")] * 2


@pytest.mark.parametrize(
    "text", ["Stiefel für Männer", "e\u0301", "ботинок", "μπότα", "אדום", "two\nlines\tand more"]
)
def test_one_font_draws_the_whole_text(text: str, use_fonts: Callable[..., None]) -> None:
    """Compare order and shape with Pillow: from right to left, with marks."""
    use_fonts(DEJAVU)
    font = ImageFont.truetype(str(DEJAVU), FONT_SIZE) if not text.isascii() else None
    line = "é" if text == "e\u0301" else text.replace("\n", " ").replace("\t", " ")
    assert caption(text) == draw_with_pillow(line, font)


def test_scripts_mix(tmp_path: Path, use_fonts: Callable[..., None]) -> None:
    """Draw each script with a font that has it, on one line."""
    use_fonts(DEJAVU, build(tmp_path / "cjk.ttf", SHOE))
    strip, font = caption(f"né{SHOE}né"), ImageFont.truetype(str(DEJAVU), FONT_SIZE)
    start = font.getlength("né")
    base = ImageFont.load_default(FONT_SIZE).getmetrics()[0]
    rows = slice(base - round(0.6 * FONT_SIZE), base)
    square = np.asarray(strip)[rows, round(start) + 1 : round(start + 0.6 * FONT_SIZE)]
    assert square.max() == 0  # black all over
    assert ImageChops.difference(strip, draw_with_pillow("né", font)).getbbox()[0] >= start - 1
    end = start + 0.8 * FONT_SIZE + font.getlength("né")
    assert ink(strip)[2] == pytest.approx(end, abs=2)


@pytest.mark.parametrize("kind", ["layers", "bitmaps"])
def test_emoji_are_in_colour(tmp_path: Path, use_fonts: Callable[..., None], kind: str) -> None:
    """Prefer a colour font for emoji, even if another has them in black, but not for letters."""
    plain = build(tmp_path / "symbols.ttf", BOOT, "é")
    use_fonts(build(tmp_path / "emoji.ttf", BOOT, "é", colour=kind), plain)
    pixels = np.asarray(caption(f"a{BOOT}")).astype(int)
    red = (pixels[..., 0] > 200) & (pixels[..., 1:].max(axis=-1) < 60)
    rows, columns = (np.flatnonzero(red.any(axis=axis)) for axis in (1, 0))
    for extent in (rows, columns):  # as large as letters
        assert 0.5 * FONT_SIZE < len(extent) <= 1.1 * FONT_SIZE
    assert columns[0] >= ImageFont.load_default(FONT_SIZE).getlength("a") - 1
    assert rows[-1] <= LINE - 4
    pixels = np.asarray(caption("é1"))
    assert (pixels == pixels[..., :1]).all()  # grey


def test_joined_emoji_are_one(tmp_path: Path) -> None:
    for text, count in (
        ("👩\u200d🔬", 1), ("👍🏽👍", 2), ("❤️", 1), ("e\u0323\u0301x", 2), ("한글", 2), ("🏴\U000e0067\U000e007f", 1),
    ):  # fmt: skip
        clusters = captions._clusters(text)
        assert len(clusters) == count
        assert "".join(clusters) == text


@pytest.mark.parametrize(
    ("text", "shown", "package"),
    [
        (SHOE, "[U+9774]", "install fonts-noto-cjk "),
        (f"{SHOE} {BOOT}", "[U+9774] [U+1F462]", "install fonts-noto-"),
        (f"a {SHOE}{SHOE}", "a [U+9774][U+9774]", "install fonts-noto-cjk "),
        (BOOT, "[U+1F462]", "install fonts-noto-color-emoji "),
        ("クツ", "[U+30AF][U+30C4]", "install fonts-noto-cjk "),
        ("\u1208", "[U+1208]", "install fonts-noto-core "),
        ("a\u033f", "a[U+033F]", "install fonts-noto-core "),
        ("\x01", "[U+0001]", "by their numbers"),
        ("\ue000\ud800", "[U+E000][U+D800]", "by their numbers"),
        ("\U0010ffff", "[U+10FFFF]", "by their numbers"),
    ],
)
def test_missing_characters_are_numbers(
    text: str,
    shown: str,
    package: str,
    use_fonts: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    use_fonts()
    with caplog.at_level(logging.WARNING):
        assert caption(text) == draw_with_pillow(shown)
        messages = [record.getMessage() for record in caplog.records]
        assert package in messages[0]
        assert shown.partition("[")[2].partition("]")[0] in messages[0]
        assert not any("\n" in line for line in messages)
        caption(text)
    assert len(caplog.records) == len(messages) == len(set(messages))  # each warning comes once


def test_a_font_with_the_mark_is_preferred(tmp_path: Path, use_fonts: Callable[..., None]) -> None:
    """Prefer a font with the letter and its mark to a font with the letter alone."""
    use_fonts(build(tmp_path / "letters.ttf", "x", "é"), DEJAVU)
    font = ImageFont.truetype(str(DEJAVU), FONT_SIZE)
    assert caption("x\u0301") == draw_with_pillow("x\u0301", font)


def test_fonts_that_pillow_cannot_load_are_skipped(
    tmp_path: Path, use_fonts: Callable[..., None]
) -> None:
    broken = build(tmp_path / "broken.ttf", SHOE)
    font = TTFont(broken)
    del font["head"]
    font.save(broken)
    use_fonts(broken)
    assert caption(SHOE) == draw_with_pillow("[U+9774]")


def test_without_raqm(monkeypatch: pytest.MonkeyPatch, use_fonts: Callable[..., None]) -> None:
    """Drop characters that only shape others; Pillow's basic layout draws boxes for them."""
    monkeypatch.setattr(features, "check", lambda _: False)
    use_fonts(DEJAVU)
    font = ImageFont.truetype(str(DEJAVU), FONT_SIZE)
    assert caption("é\u200d\ufe0e\u200f") == draw_with_pillow("é", font)


@pytest.mark.parametrize("letter", ["x", "é", SHOE])
@pytest.mark.parametrize("width", [1, 100, WIDTH])
def test_long_lines_are_cut(
    tmp_path: Path, use_fonts: Callable[..., None], letter: str, width: int
) -> None:
    use_fonts(DEJAVU, build(tmp_path / "cjk.ttf", SHOE))
    (strip,) = draw_captions([5000 * letter], width)
    assert strip.size == (width, LINE)
    if letter == "x":
        font = ImageFont.load_default(FONT_SIZE)
        counts = [n for n in range(200) if font.getlength("x" * n + "...") <= width]
        whole = draw_with_pillow("x" * max(counts, default=0) + "...")
        assert strip == whole.crop((0, 0, width, LINE))
    if width > 1:
        assert width - 30 < ink(strip)[2] <= width


def test_a_line_that_just_fits_is_not_cut(use_fonts: Callable[..., None]) -> None:
    use_fonts()
    width = int(ImageFont.load_default(FONT_SIZE).getlength("boot")) + 1
    (strip,) = draw_captions(["boot"], width)
    assert strip == draw_with_pillow("boot").crop((0, 0, width, LINE))


def test_labels_of_a_picture(tmp_path: Path, use_fonts: Callable[..., None]) -> None:
    use_fonts(DEJAVU, build(tmp_path / "cjk.ttf", SHOE))
    flat = np.zeros((28, 28), np.float32)
    image = np.zeros((28, 28, 3), np.uint8)
    one, other = (render([Explanation(label, flat, image, 0.5)]) for label in (SHOE, "x"))
    box = ImageChops.difference(one, other).getbbox()
    assert box is not None
    assert box[3] - box[1] < LINE  # only the caption differs
