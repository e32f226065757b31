"""Converted tokenizers, which give open_clip's ids for any text."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from open_clip.tokenizer import HFTokenizer, SigLipTokenizer, SimpleTokenizer

from edgeclip.text.tokenizer import CLEANERS
from export import ExportError
from export.tokenizer import clean_kind, convert, pad_id
from tests.support.models.export_models import write_bpe, write_sentencepiece_like
from tests.support.models.text_towers import write_bert, write_roberta
from tests.support.texts import AWKWARD, random_text, runtime


def texts() -> list[str]:
    rng = random.Random(0)
    return AWKWARD + [random_text(rng) for _ in range(2000)]


def differing(tokenizer: object, folder: Path, prompts: list[str] | None = None) -> list[str]:
    """Return the texts whose padded ids are not open_clip's."""
    prompts = prompts or texts()
    pad, length = pad_id(tokenizer), tokenizer.context_length
    converted = runtime(tokenizer, folder)(prompts)
    original = tokenizer(prompts).tolist()
    return [
        prompt
        for prompt, actual, expected in zip(prompts, converted, original, strict=True)
        if actual + [pad] * (length - len(actual)) != expected
    ]


def test_clip_tokenizer_gives_open_clips_ids(tmp_path: Path) -> None:
    assert differing(SimpleTokenizer(), tmp_path) == []


@pytest.mark.parametrize(("merges", "length"), [(0, 16), (300, 77)])
def test_reduced_vocabularies_give_open_clips_ids(tmp_path: Path, merges: int, length: int) -> None:
    write_bpe(tmp_path / "bpe.txt.gz", merges)
    tokenizer = SimpleTokenizer(str(tmp_path / "bpe.txt.gz"), context_length=length)
    assert differing(tokenizer, tmp_path) == []
    used = {i for row in runtime(tokenizer, tmp_path)(texts()) for i in row}
    assert max(used) < tokenizer.vocab_size


def test_a_trailing_newline_in_the_merges_is_harmless(tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "bpe.txt.gz"
    write_bpe(path)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b"\n"))
    assert differing(SimpleTokenizer(str(path)), tmp_path) == []


def test_canonicalized_text_gives_open_clips_ids(tmp_path: Path) -> None:
    assert differing(SimpleTokenizer(clean="canonicalize"), tmp_path) == []


def test_case_is_kept_where_open_clip_keeps_it(tmp_path: Path) -> None:
    tokenizer = SimpleTokenizer(clean="whitespace")
    with_marks = [text for text in texts() if "_of_text>" in text.lower()]
    assert set(differing(tokenizer, tmp_path)) <= set(with_marks)
    used = {i for row in runtime(tokenizer, tmp_path)(texts()) for i in row}
    assert max(used) < tokenizer.vocab_size


@pytest.mark.parametrize("clean", sorted(CLEANERS))
def test_transformers_tokenizer_gives_open_clips_ids(tmp_path: Path, clean: str) -> None:
    write_sentencepiece_like(tmp_path)
    tokenizer = HFTokenizer(str(tmp_path), context_length=16, clean=clean)
    assert pad_id(tokenizer) == 1
    assert differing(tokenizer, tmp_path) == []


MARKS = [f"{mark}{tail}" for mark in ("[PAD]", "[MASK]", "<pad>", "<mask>") for tail in ("", "x")]


@pytest.mark.parametrize("write", [write_bert, write_roberta])
def test_tokenizers_of_text_towers_give_open_clips_ids(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    write(tmp_path)
    tokenizer = HFTokenizer(str(tmp_path), context_length=16)
    marked = [f"a {first} b{second}" for first in MARKS for second in MARKS]
    marked += [f"[pad] < pad > {mark.lower()}{mark}" for mark in MARKS]
    assert pad_id(tokenizer) == (0 if write is write_bert else 1)
    assert differing(tokenizer, tmp_path, texts() + marked) == []
    ids = runtime(tokenizer, tmp_path)(["[PAD] <pad>"])[0]
    assert ids.count(pad_id(tokenizer)) == 1  # padding that a prompt names is padding to both


def test_the_start_mark_is_not_looked_for_inside_punctuation(tmp_path: Path) -> None:
    tokenizer = SimpleTokenizer()
    start = tokenizer.sot_token_id
    actual = runtime(tokenizer, tmp_path)(["a <start_of_text> b", "a !<start_of_text> b"])
    assert [row.count(start) for row in actual] == [2, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduction_mask": "simple"}, "reduction_mask"),
        ({"additional_special_tokens": ["<x>"]}, "additional_special_tokens"),
    ],
)
def test_simple_tokenizers_that_cannot_be_repeated(settings: dict, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        convert(SimpleTokenizer(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer_mode": "clips"}, "tokenizer_mode 'clips'"),
        ({"strip_sep_token": True}, "strip_sep_token"),
        ({"padding_side": "left"}, "on the left"),
        ({"truncation_side": "left"}, "on the left"),
    ],
)
def test_transformers_tokenizers_that_cannot_be_repeated(
    tmp_path: Path, settings: dict, message: str
) -> None:
    write_sentencepiece_like(tmp_path)
    with pytest.raises(ExportError, match=message):
        convert(HFTokenizer(str(tmp_path), context_length=16, **settings))


def test_other_tokenizers_are_refused() -> None:
    with pytest.raises(ExportError, match="SigLipTokenizer is not supported"):
        convert(object.__new__(SigLipTokenizer))
    tokenizer = SimpleTokenizer()
    tokenizer.clean_fn = str.upper
    with pytest.raises(ExportError, match="has its own text cleaning"):
        clean_kind(tokenizer)
