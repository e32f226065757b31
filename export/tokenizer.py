"""Conversion of open_clip's tokenizers to a tokenizer.json for the tokenizers library.

The file does not contain open_clip's text cleaning (ftfy, HTML entities, case):
edgeclip.text.tokenizer cleans as `TextSpec.clean` says.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import regex
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, get_clean_fn
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.processors import TemplateProcessing

from edgeclip.text.tokenizer import CLEANERS
from export import ExportError

END_OF_WORD = "</w>"
LONG_S = "\u017f"  # already lower case, but matches "s" when case is ignored
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


def convert(tokenizer: Any) -> Tokenizer:
    """Return a backend that gives open_clip's ids for any cleaned text, with start and end marks.

    Truncation and padding are not set, because the runtime does both. Raises ExportError for a
    tokenizer with features that the tokenizers library lacks.
    """
    if isinstance(tokenizer, SimpleTokenizer):
        return _from_simple(tokenizer)
    if isinstance(tokenizer, HFTokenizer):
        return _from_transformers(tokenizer)
    raise ExportError(f"tokenizer {type(tokenizer).__name__} is not supported by this version")


def clean_kind(tokenizer: Any) -> str:
    """Return the tokenizer's cleaning, by its name in edgeclip.text.tokenizer.CLEANERS."""
    for name in CLEANERS:
        if tokenizer.clean_fn is get_clean_fn(name):
            return name
    raise ExportError("the tokenizer has its own text cleaning, which edgeclip does not support")


def pad_id(tokenizer: Any) -> int:
    """Return the id that pads a prompt."""
    if isinstance(tokenizer, SimpleTokenizer):
        return 0
    pad_token_id = tokenizer.tokenizer.pad_token_id
    if pad_token_id is None:
        raise ExportError("the tokenizer has no padding token, which open_clip needs")
    return int(pad_token_id)


def _from_simple(tokenizer: SimpleTokenizer) -> Tokenizer:
    if tokenizer.reduction_fn is not None:
        raise ExportError("a tokenizer with reduction_mask drops words at random: remove it")
    if len(tokenizer.all_special_ids) != 2:
        raise ExportError("a tokenizer with additional_special_tokens is not supported")
    merges = [merge for merge in tokenizer.bpe_ranks if len(merge) == 2]
    vocab = {token: index for token, index in tokenizer.encoder.items() if token}
    marks = {tokenizer.decoder[index]: index for index in tokenizer.all_special_ids}
    if clean_kind(tokenizer) == "lower":
        _merge_marks(vocab, merges, marks)
    backend = _bpe(vocab, merges, list(marks))
    start, end = marks
    backend.post_processor = TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=list(marks.items())
    )
    return backend


def _bpe(vocab: dict[str, int], merges: list[tuple[str, str]], marks: list[str]) -> Tokenizer:
    backend = Tokenizer(BPE(vocab, merges, end_of_word_suffix=END_OF_WORD, fuse_unk=False))
    backend.pre_tokenizer = Sequence(
        [
            Split(Regex(_pattern(marks)), "removed", invert=True),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return backend


def _merge_marks(
    vocab: dict[str, int], merges: list[tuple[str, str]], marks: dict[str, int]
) -> None:
    """Add merges that give start and end marks in a prompt their own ids.

    open_clip does so only for a mark that its pattern matches as a word, whereas an added token
    would be matched anywhere. The merges that build the mark come after all others. Their
    intermediate ids follow the vocabulary and never occur in the output, because in lower-case text
    a word of such pieces is the whole mark. (With any other cleaning, for which no open_clip model
    uses this tokenizer, a mark in a prompt stays ordinary text.)
    """
    plain = _bpe(vocab, merges, list(marks))
    for mark, index in marks.items():
        del vocab[mark]
        pieces = plain.encode(mark, add_special_tokens=False).tokens
        merged = pieces[0]
        for piece in pieces[1:]:
            merges.append((merged, piece))
            merged += piece
            vocab[merged] = index if merged == mark + END_OF_WORD else max(vocab.values()) + 1


def _pattern(marks: list[str]) -> str:
    """Return open_clip's pattern, with its character sets spelled out.

    The sets are those of the regex module, which open_clip uses. The tokenizers library has an
    older Unicode and would split 17,000 characters differently; which ones depends on its version.
    """
    words = [_any_case(word) for word in (*marks, *CONTRACTIONS)]
    letters, digits = _character_set(r"[\p{L}]"), _character_set(r"[\p{N}]")
    # Not the other sets' complement: when case is ignored, regex drops U+0345 from all of them.
    others = _character_set(r"[^\s\p{L}\p{N}]")
    return "|".join([*words, f"[{letters}]+", f"[{digits}]", f"[{others}]+"])


def _any_case(word: str) -> str:
    r"""Return a pattern of regex.IGNORECASE's matches; (?i) elsewhere also matches ligatures."""
    return "".join(
        f"[{c}{c.upper()}{LONG_S if c == 's' else ''}]" if c.isalpha() else c for c in word
    )


@cache
def _character_set(pattern: str) -> str:
    """Return the characters that match `pattern` in open_clip, as ranges of a character class."""
    characters = "".join(map(chr, range(sys.maxunicode + 1)))
    runs = regex.finditer(f"{pattern}+", characters, regex.IGNORECASE)
    return "".join(rf"\x{{{run.start():x}}}-\x{{{run.end() - 1:x}}}" for run in runs)


def _from_transformers(tokenizer: HFTokenizer) -> Tokenizer:
    inner = tokenizer.tokenizer
    if tokenizer.tokenizer_mode:
        raise ExportError(f"tokenizer_mode {tokenizer.tokenizer_mode!r} is not supported")
    if tokenizer.strip_sep_token:
        raise ExportError("a tokenizer with strip_sep_token is not supported")
    if not getattr(inner, "is_fast", False):
        raise ExportError("the tokenizer has no tokenizer.json: only fast tokenizers are supported")
    if inner.padding_side != "right" or inner.truncation_side != "right":
        raise ExportError("a tokenizer that pads or cuts on the left is not supported")
    backend = Tokenizer.from_str(inner.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend
