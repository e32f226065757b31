"""A CLIP as training and evaluation see it: images in [0, 1] in, logits for named classes out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg
from torch import nn
from torch.utils.data import DataLoader, Dataset

from edgeclip import _core
from export.checkpoints import Source
from export.towers import PooledImageEncoder, image_encoder
from train.data import DataError, DataSet

TEXT_BATCH = 256  # prompts encoded at a time
Attack = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # images, labels, seeds


class Output(NamedTuple):
    """What a classifier gives for B images."""

    logits: torch.Tensor  # (B, K)
    embedding: torch.Tensor  # (B, D), as the encoder gives it, of any norm
    tokens: torch.Tensor | None  # (B, prefix + P, D); None where the encoder has no patch tokens


class Classifier(nn.Module):
    """An image encoder and one text embedding for each class.

    Takes float images (B, 3, H, W) in [0, 1] at the encoder's input size: what an attack may
    change. The normalisation is inside.
    """

    mean: torch.Tensor
    std: torch.Tensor
    logit_scale: torch.Tensor

    def __init__(
        self,
        source: Source,
        classes: torch.Tensor,
        *,
        train_classes: bool = False,
        bfloat16: bool = False,
        tokens: bool = True,
    ) -> None:
        """classes: unit text embeddings (K, D); with train_classes they are a weight like others.

        bfloat16: the encoder's products in that precision; its outputs are the classes' either way.
        tokens: whether patch tokens are computed, where the encoder has them.
        """
        super().__init__()
        self.bfloat16 = bfloat16
        self.encoder, self.token_spec = (
            image_encoder(source.model) if tokens else (PooledImageEncoder(source.model), None)
        )
        preprocess = PreprocessCfg(**source.model.visual.preprocess_cfg)
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std).view(3, 1, 1), persistent=False)
        scale = source.model.logit_scale.detach().exp()
        self.register_buffer("logit_scale", scale, persistent=False)
        if train_classes:
            self.classes = nn.Parameter(classes.clone())
        else:
            self.register_buffer("classes", classes.clone(), persistent=False)

    def forward(self, images: torch.Tensor) -> Output:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bfloat16):
            embedding, *rest = self.encoder((images - self.mean) / self.std)
        dtype = self.classes.dtype
        embedding, tokens = embedding.to(dtype), rest[0].to(dtype) if rest else None
        return Output(self.scores(embedding), embedding, tokens)

    def scores(self, embedding: torch.Tensor) -> torch.Tensor:
        """Logits (B, K) of embeddings (B, D) of any norm."""
        cosines = F.normalize(embedding, dim=-1) @ F.normalize(self.classes, dim=-1).T
        return self.logit_scale * cosines


@torch.no_grad()
def class_embeddings(
    source: Source, names: Sequence[str], templates: Sequence[str]
) -> torch.Tensor:
    """Return unit text embeddings (K, D): the normalised mean over the templates, as in a bundle.

    Raises DataError for two classes whose prompts are the same tokens.
    """
    prompts = [template.replace("{}", name) for name in names for template in templates]
    ids = source.tokenizer(prompts)
    _check_tokens(names, ids.view(len(names), -1))
    rows = [
        source.model.encode_text(chunk, normalize=True).float() for chunk in ids.split(TEXT_BATCH)
    ]
    per_class = torch.cat(rows).view(len(names), len(templates), -1)
    return F.normalize(per_class.mean(1), dim=-1)


def _check_tokens(names: Sequence[str], ids: torch.Tensor) -> None:
    """Raise DataError where two rows of token ids, one a class, are equal."""
    first: dict[bytes, int] = {}
    for i, row in enumerate(ids):
        j = first.setdefault(row.numpy().tobytes(), i)
        if j != i:
            raise DataError(
                f"classes {names[j]!r} and {names[i]!r} cannot be told apart: the model reads both "
                "as the same tokens; rename one of them, or put them together"
            )


class Pictures(Dataset):
    """A data set's images as the encoder sees them, float32 (3, H, W) in [0, 1].

    Resized by the very code that runs on the device, so that training, evaluation and device see
    the same pixels. A key is an index and a seed, from which all of the image's randomness comes:
    it then does not depend on the batch, on the number of processes or on what was drawn before.
    """

    def __init__(self, data: DataSet, visual: Any, augment: Any = None) -> None:
        cfg = PreprocessCfg(**visual.preprocess_cfg)
        size = (cfg.size, cfg.size) if isinstance(cfg.size, int) else cfg.size
        self.data, self.augment, self.size = data, augment, tuple(size)
        self.resize = {
            "resize": cfg.resize_mode,
            "interpolation": cfg.interpolation,
            "fill": int(cfg.fill_color),
        }

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int, int]:
        """The image, its class, and its seed."""
        index, seed = key
        image, label = self.data[index]
        out = np.empty((3, *self.size), np.float32)
        _core.preprocess(image, out, mean=(0, 0, 0), std=(1, 1, 1), threads=1, **self.resize)
        pixels = torch.from_numpy(out)
        if self.augment is not None:
            pixels = self.augment(pixels, torch.Generator().manual_seed(seed))
        return pixels, label, seed


def batches(pictures: Pictures, keys: list[list[tuple[int, int]]], workers: int) -> DataLoader:
    """Batches (images (B, 3, H, W), labels (B,), seeds (B,)) of the keys given, in their order."""
    return DataLoader(pictures, batch_sampler=keys, num_workers=workers)


def seed_of(*parts: int) -> int:
    """A seed below 2^63 from whole numbers, unlike those of any other numbers."""
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generators(seeds: torch.Tensor, device: torch.device) -> list[torch.Generator]:
    """One generator for each image of a batch, for its noise in an attack."""
    return [torch.Generator(device).manual_seed(seed_of(seed, 1)) for seed in seeds.tolist()]


def draw(count: int, samples: int, seed: int) -> list[tuple[int, int]]:
    """`samples` of `count` images, or all of them, in random order: the index and seed of each."""
    rng = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(count, generator=rng)[:samples].tolist()
    return [(index, seed_of(seed, index)) for index in chosen]


def split(keys: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """The keys in batches of `size`, the last of which may be smaller."""
    return [keys[start : start + size] for start in range(0, len(keys), size)]


def count_right(
    model: Classifier, loader: Iterable[Sequence[torch.Tensor]], attack: Attack
) -> tuple[int, int]:
    """How many images the model names rightly as they are, and how many after the attack."""
    counts = [0, 0]
    for batch in loader:
        images, labels, seeds = (x.to(model.mean.device) for x in batch)
        found = attack(images, labels, seeds)
        with torch.no_grad():
            for i, shown in enumerate((images, found)):
                counts[i] += int((model(shown).logits.argmax(1) == labels).sum())
    return counts[0], counts[1]
