"""open_clip's tokenizers as one tokenizer.json for the tokenizers library.

What open_clip does to a text before it is split (ftfy, HTML entities, case) stays outside the
file: edgeclip.text.tokenizer does it, told by `TextSpec.clean`.
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
LONG_S = "\u017f"  # lower case as it stands, and yet an "s" to a pattern that ignores case
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


def convert(tokenizer: Any) -> Tokenizer:
    """The backend that gives open_clip's ids on any cleaned text, start and end marks included.

    Truncation and padding are not set: the runtime does both. Raises ExportError for a tokenizer
    that does more than the tokenizers library can.
    """
    if isinstance(tokenizer, SimpleTokenizer):
        return _from_simple(tokenizer)
    if isinstance(tokenizer, HFTokenizer):
        return _from_transformers(tokenizer)
    raise ExportError(f"tokenizer {type(tokenizer).__name__} is not supported by this version")


def clean_kind(tokenizer: Any) -> str:
    """The name, in edgeclip.text.tokenizer.CLEANERS, of the cleaning that `tokenizer` does."""
    for name in CLEANERS:
        if tokenizer.clean_fn is get_clean_fn(name):
            return name
    raise ExportError("the tokenizer cleans text in a way of its own, which edgeclip cannot repeat")


def pad_id(tokenizer: Any) -> int:
    """The id after a prompt's end."""
    if isinstance(tokenizer, SimpleTokenizer):
        return 0
    found = tokenizer.tokenizer.pad_token_id
    if found is None:
        raise ExportError("the tokenizer has no padding token, which open_clip needs as well")
    return int(found)


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
    """Let the start and end marks, where a prompt spells them out, become their own ids.

    open_clip does this to a mark that its pattern finds as a word of its own, so an added token,
    found anywhere, would differ. Instead the pieces of the mark are merged after all other merges.
    The ids of the unfinished merges lie behind the vocabulary; they never come out, since a word
    of such pieces is the whole mark: text is in lower case by then. (With any other cleaning, for
    which no model of open_clip uses this tokenizer, a mark in a prompt stays ordinary text.)
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
    """open_clip's pattern, with its sets of characters spelled out.

    They are those of the regex module, which open_clip uses. The tokenizers library knows an older
    Unicode and would cut 17,000 characters differently, and which ones depends on its version.
    """
    words = [_any_case(word) for word in (*marks, *CONTRACTIONS)]
    letters, digits = _character_set(r"[\p{L}]"), _character_set(r"[\p{N}]")
    # The complement is not letters, digits and spaces: ignoring case, regex drops U+0345 from all.
    others = _character_set(r"[^\s\p{L}\p{N}]")
    return "|".join([*words, f"[{letters}]+", f"[{digits}]", f"[{others}]+"])


def _any_case(word: str) -> str:
    r"""What regex.IGNORECASE matches, without the ligatures that (?i) adds in other libraries."""
    return "".join(
        f"[{c}{c.upper()}{LONG_S if c == 's' else ''}]" if c.isalpha() else c for c in word
    )


@cache
def _character_set(pattern: str) -> str:
    """The characters that match `pattern` in open_clip, as the ranges of a character class."""
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    runs = regex.finditer(f"{pattern}+", everything, regex.IGNORECASE)
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
