"""Tiny text towers of Hugging Face transformers, with tokenizers of a few words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = ["a", "photo", "of", "small", "dog", "and", "two", "red", "cats", "the", "quick", "café"]
LETTERS = "abcdefghijklmnopqrstuvwxyzé0123456789,.:!—“”日本[]<>"
SIZE = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "vocab_size": 400}
SIZE |= {"intermediate_size": 48, "max_position_embeddings": 40}


def write_bert(folder: Path, **settings: Any) -> None:
    """Write a BERT's configuration and a WordPiece tokenizer of lower-case text."""
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*marks, *LETTERS, *(f"##{letter}" for letter in LETTERS), *WORDS]
    backend = Tokenizer(models.WordPiece(_numbered(tokens), unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    _write(folder, backend, tokenizer | dict(zip(names, marks, strict=True)))
    transformers.BertConfig(**SIZE | settings).save_pretrained(folder)


def write_roberta(folder: Path, **settings: Any) -> None:
    """Write a RoBERTa's configuration, whose padding is 1, and a byte-level BPE tokenizer."""
    marks = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokens = [*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = []
    for word in filter(str.isascii, WORDS):
        merged = "Ġ"  # a space in byte-level BPE
        for letter in word:
            if merged + letter not in tokens:
                merges.append((merged, letter))
                tokens.append(merged + letter)
            merged += letter
    backend = Tokenizer(models.BPE(_numbered(tokens), merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), add_prefix_space=False
    )
    names = ("cls_token", "pad_token", "sep_token", "unk_token", "mask_token")
    tokenizer = {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": False}
    tokenizer |= {"bos_token": "<s>", "eos_token": "</s>"}
    _write(folder, backend, tokenizer | dict(zip(names, marks, strict=True)))
    transformers.RobertaConfig(**SIZE | settings).save_pretrained(folder)


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def _write(folder: Path, backend: Tokenizer, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
