"""Tokenizer: prompts to token ids, equal to open_clip's for any text.

The vocabulary is the bundle's tokenizer.json. Cleaning of texts, which open_clip does before its
tokenizer, is written in Python: no normalizer of the tokenizers library is equal to it.
"""

from __future__ import annotations

import html
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeclip.errors import BundleError
from edgeclip.manifest import CLEANINGS

if TYPE_CHECKING:
    from tokenizers import Encoding


def _repair(text: str) -> str:
    """Repair wrong encodings and HTML entities, as CLIP's tokenizers do."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return text.strip()  # nothing to repair: ftfy need not be loaded
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def _whitespace(text: str) -> str:
    """Repair a text and collapse its white space."""
    return " ".join(_repair(text).split())


def _lower(text: str) -> str:
    """Repair a text, collapse its white space and lower its case."""
    return _whitespace(text).lower()


_DROP_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


def _canonicalize(text: str) -> str:
    """Clean a text as SigLIP does: no punctuation, lower case, single spaces."""
    return " ".join(_repair(text).translate(_DROP_PUNCTUATION).lower().split())


CLEANERS: dict[str, Callable[[str], str]] = dict(
    zip(CLEANINGS, (_whitespace, _lower, _canonicalize), strict=True)
)


class Tokenizer:
    """Encoder of texts as lists of ids, with start and end marks, cut at the context length."""

    def __init__(self, path: Path, *, context_length: int, clean: str) -> None:
        from tokenizers import Tokenizer as Backend

        if clean not in CLEANERS:
            raise BundleError(f"unknown text cleaning {clean!r}: known are {', '.join(CLEANERS)}")
        try:
            self._backend = Backend.from_file(str(path))
        except Exception as err:  # the library raises nothing more precise
            raise BundleError(f"{path} cannot be read: {err}") from err
        self._backend.enable_truncation(context_length)
        self._backend.no_padding()
        self._clean = CLEANERS[clean]
        self.context_length = context_length

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return [encoding.ids for encoding in self.encode(texts)]

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Return for each text its `ids` and `overflowing`, which is empty unless the text was cut."""
        return self._backend.encode_batch([self._clean(text) for text in texts])
