"""Batches of a data set, and their random numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from open_clip.transform import PreprocessCfg
from torch.utils.data import DataLoader, Dataset

from edgeclip import _core
from train.data.dataset import DataSet


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
