"""Tiny CLIPs of Hugging Face transformers, written as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file

from tests.support.models.export_models import MERGES, VOCABULARY, write_bpe
from train.progress import quiet

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
    "bos_token_id": VOCABULARY - 2,
    "eos_token_id": VOCABULARY - 1,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}


def write_tokenizer(folder: Path) -> None:
    """Write the tests' byte-pair encoding as files of transformers' CLIPTokenizer."""
    write_bpe(folder / "bpe.txt.gz", MERGES)
    simple = SimpleTokenizer(bpe_path=str(folder / "bpe.txt.gz"))
    (folder / "bpe.txt.gz").unlink()
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocab = {token: index for token, index in simple.encoder.items() if token}
    for mark, index in zip((start, end), simple.all_special_ids, strict=True):
        del vocab[simple.decoder[index]]
        vocab[mark] = index
    (folder / "vocab.json").write_text(json.dumps(vocab))
    merges = [" ".join(merge) for merge in simple.bpe_ranks if len(merge) == 2]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    config = {"tokenizer_class": "CLIPTokenizer", "bos_token": start, "eos_token": end}
    config |= {"unk_token": end, "pad_token": end, "model_max_length": 24}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_model(
    act: str = "quick_gelu", vision: dict[str, Any] | None = None, **text: Any
) -> transformers.CLIPModel:
    torch.manual_seed(1)
    with quiet():
        config = transformers.CLIPConfig(
            text_config=TEXT | {"hidden_act": act} | text,
            vision_config=VISION | {"hidden_act": act} | (vision or {}),
            projection_dim=48,
        )
        model = transformers.CLIPModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim:
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def write_model(folder: Path, model: transformers.PreTrainedModel) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(model.config.to_json_string())
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    return folder


def write_preprocessing(folder: Path, name: str = "preprocessor_config.json", **other: Any) -> None:
    settings = {
        "crop_size": {"height": 32, "width": 32},
        "size": {"shortest_edge": 32},
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.25, 0.3],
        "resample": 3,
        "do_center_crop": True,
    } | other
    whole = {"image_processor": settings} if name.startswith("processor") else settings
    (folder / name).write_text(json.dumps(whole))
