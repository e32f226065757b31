"""Texts on which tokenizers differ."""

# ruff: noqa: RUF001 - characters that look like others are the point

from __future__ import annotations

import random
from pathlib import Path

from edgeclip.text.tokenizer import Tokenizer
from export.tokenizer import clean_kind, convert

AWKWARD = [
    "",
    " ",
    "   \t \n ",
    "a photo of a café",
    "cafe\u0301 e\u0301\u0323 z\u0310\u030f",
    "\u00c5ngstr\u00f6m \u212b \u0130stanbul \u212a \u017f \u0345 \u1e9e",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 ❤️ 🇩🇪",
    "&amp;lt; &lt;b&gt; &EACUTE; &eacute; &nbsp; &#x27; &#0; &#1; &amp;amp;amp; &notanentity; &",
    "schÃ¶n â€œquotedâ€\x9d l’humanitÃ©",
    "ﬁne ﬂow oﬃce ﬆ ﬅ Ĳ",
    "“curly” ‘quotes’ «guillemets» — – … ‹›",
    "ＦＵＬＬ　ｗｉｄｔｈ １２３",
    "日本語のテキスト 中文 한국어 ภาษาไทย हिन्दी",
    "العربية עברית \u200fright-to-left\u200e",
    "0123 4567 ½ Ⅷ ² ٣ 一 1,000.50 3e-4",
    "it's don't we'll I'm you've they're he'd 'S 'LL 'Re rock'n'roll 's' ''s",
    "'\u017f <\u017ftart_of_text> <\ufb06art_of_text> <&#xfb06;art_of_text>",
    "<start_of_text> a dog <end_of_text> behind",
    "<START_OF_TEXT> <End_Of_Text>",
    "!<start_of_text> x<end_of_text>y !<end_of_text><start_of_text> <<end_of_text>>",
    "snake_case __init__ _a_ a_1",
    "\x00\x01\x02 \x1b[31mred\x1b[0m \x7f \x85 \ufeff \ufffd \ufff9",
    "tab\tnew\nline\r\nform\x0cfeed\x0bvertical\x1cfile",
    "no\u00a0break em\u2003space zero\u200bwidth soft\u00adhyphen",
    "\u0558 \u058b \u088f \u0c5c \u1c89 \U00010d4a \U0002ebf1 \U00011de0 \U0003134f",
    "\ue000 \U000f0000 \U0010ffff",
    "word " * 200,
    "x" * 1000,
    "!" * 1000,
    "éé" * 500,
    "C++ / C# & R&D @home #tag $5 100% ^_^ ~/.config \\ | {} []",
]


def random_text(rng: random.Random) -> str:
    """Return up to forty characters of all planes and fragments that tokenizers treat specially."""
    fragments = ["<start_of_text>", "<end_of_text>", "<START_of_text>", "'s", "'LL", " ", "&amp;"]
    ranges = [(32, 127), (0, 0x250), (0x250, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]

    def piece() -> str:
        low, high = rng.choice(ranges)
        return chr(rng.randrange(low, high)) if rng.random() < 0.85 else rng.choice(fragments)

    return "".join(piece() for _ in range(rng.randrange(40)))


def runtime(tokenizer: object, folder: Path) -> Tokenizer:
    """Return the converted tokenizer as a device loads it."""
    path = folder / "converted.json"
    convert(tokenizer).save(str(path))
    return Tokenizer(path, context_length=tokenizer.context_length, clean=clean_kind(tokenizer))
