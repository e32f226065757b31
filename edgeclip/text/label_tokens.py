"""Labels as the model reads them: labels it cannot tell apart, and prompts it cuts."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

from edgeclip.errors import LabelError
from edgeclip.labels import Label
from edgeclip.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

DIGEST_SIZE = 16  # bytes
NAMED = 3  # labels in a warning
SHOWN = 60  # characters of a label in a message


class Cut(IntEnum):
    """Worst effect of the context length on a label's prompts."""

    NOTHING = 0
    PROMPT = 1  # the end of a prompt was cut off
    NAME = 2  # all of the label's name was cut off


class LabelTokens(NamedTuple):
    """Digest of the token ids of a label's prompts, and how they were cut."""

    digest: bytes  # two labels with one digest have one embedding
    cut: Cut


def read_tokens(tokenizer: Tokenizer, label: Label, templates: Sequence[str]) -> LabelTokens:
    """Tokenize a label's prompts."""
    encodings = tokenizer.encode(label.worded(templates))
    sources = zip(label.prompts or templates, encodings, strict=True)
    cut = [template for template, encoding in sources if encoding.overflowing]
    kind = Cut.PROMPT if cut else Cut.NOTHING
    if any(_cuts_name(tokenizer, template) for template in cut):
        kind = Cut.NAME
    return LabelTokens(_digest(encoding.ids for encoding in encodings), kind)


def _cuts_name(tokenizer: Tokenizer, template: str) -> bool:
    """Return whether a template's text before the name takes up the whole context."""
    before, name, _ = template.partition("{}")
    return bool(name) and len(tokenizer([before])[0]) == tokenizer.context_length


def _digest(ids: Iterable[Sequence[int]]) -> bytes:
    """Hash the ids of prompts, independent of their order and of repeating all of them."""
    counts = Counter(map(tuple, ids))
    repeats = math.gcd(*counts.values())
    text = repr(sorted((prompt, count // repeats) for prompt, count in counts.items()))
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_SIZE).digest()


def check_tokens(
    labels: Sequence[Label], tokens: Sequence[LabelTokens], templates: Sequence[str], length: int
) -> None:
    """Raise LabelError for two labels with equal tokens; warn of prompts that are cut.

    length: the context length, in tokens.
    """
    first: dict[bytes, int] = {}
    for i, label_tokens in enumerate(tokens):
        j = first.setdefault(label_tokens.digest, i)
        if j != i:
            cut = max(label_tokens.cut, tokens[j].cut)
            why = _difference(labels[j].worded(templates), labels[i].worded(templates), cut, length)
            raise LabelError(
                f"labels {_shown(labels[j].name)} and {_shown(labels[i].name)} cannot be told apart: the "
                f"model reads both as the same tokens{why}; reword or remove one of them"
            )
    for kind, what in (
        (Cut.PROMPT, "its end is cut off"),
        (Cut.NAME, "the label itself is cut off: shorten the template"),
    ):
        if cut_labels := [x for x, y in zip(labels, tokens, strict=True) if y.cut == kind]:
            logger.warning(
                "%s: a prompt is longer than the %d tokens that the model reads, and %s",
                _list(cut_labels),
                length,
                what,
            )


def check_texts(texts: Sequence[str], tokenizer: Tokenizer) -> None:
    """Log texts that are cut at the context length."""
    pairs = zip(texts, tokenizer.encode(texts), strict=True)
    if cut := [text for text, encoding in pairs if encoding.overflowing]:
        logger.warning(
            "%d of %d texts are longer than the %d tokens that the model reads, and cut there: %s",
            len(cut),
            len(texts),
            tokenizer.context_length,
            _names(cut),
        )


def _difference(a: Sequence[str], b: Sequence[str], cut: Cut, length: int) -> str:
    """Return the difference between the prompts of two labels, if one cause explains it."""
    if sorted(a) == sorted(b):
        return ", since their prompts are the same"
    for what, plain in DIFFERENCES:
        if sorted(map(plain, a)) == sorted(map(plain, b)):
            return f", since they differ only in {what}"
    return f", since it reads {length} tokens, and they differ only after these" if cut else ""


def _unicode_form(text: str) -> str:
    import unicodedata

    return unicodedata.normalize("NFKC", text)


DIFFERENCES: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("upper and lower case", str.lower),
    ("Unicode form", _unicode_form),
    ("white space", lambda text: " ".join(text.split())),
    ("punctuation", lambda text: "".join(filter(str.isalnum, text))),
)


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")


def _list(labels: Sequence[Label]) -> str:
    return f"label{'s' if len(labels) > 1 else ''} {_names([label.name for label in labels])}"


def _names(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - NAMED} more" if len(texts) > NAMED else ""
    return ", ".join(map(_shown, texts[:NAMED])) + more
