"""Loader of a data set: preprocessed images in batches, and the seeds of their random numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import torch
from open_clip.transform import PreprocessCfg
from torch.utils.data import DataLoader, Dataset

from edgeclip import _core
from train.data.augment import Augmentation
from train.data.dataset import DataSet

Key: TypeAlias = "tuple[int, int]"  # index and seed of an image
T = TypeVar("T")


class Pictures(Dataset[tuple[torch.Tensor, int, int]]):
    """Images of a data set at the encoder's input size, or `size` pixels square.

    Each is float32 (3, H, W) in [0, 1]. The core that runs on the device resizes them, so that
    training, evaluation and device see the same pixels. All random numbers of an image come from the
    seed in its key: they do not depend on the batch, on the number of processes or on earlier draws.
    """

    def __init__(
        self,
        data: DataSet,
        visual: Any,
        augment: Augmentation | None = None,
        size: int | None = None,
    ) -> None:
        cfg = PreprocessCfg(**visual.preprocess_cfg)
        sides = size or cfg.size
        self.data, self.augment = data, augment
        self.size = (sides, sides) if isinstance(sides, int) else tuple(sides)
        self.resize = {
            "resize": cfg.resize_mode,
            "interpolation": cfg.interpolation,
            "fill": int(cfg.fill_color),
        }

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, int, int]:
        """Return the image, its class, and its seed."""
        index, seed = key
        image, label = self.data[index]
        rng = torch.Generator().manual_seed(seed)
        resize = self.resize
        if self.augment is not None and self.augment.window is not None:
            height, width = image.shape[:2]
            rows, columns = self.augment.window(height, width, rng)
            image = image[rows, columns]
            resize = resize | {"resize": "squash"}  # the part has no more to cut off
        out = np.empty((3, *self.size), np.float32)
        _core.preprocess(image, out, mean=(0, 0, 0), std=(1, 1, 1), threads=1, **resize)
        pixels = torch.from_numpy(out)
        if self.augment is not None:
            pixels = self.augment.pixels(pixels, rng)
        return pixels, label, seed


def batches(
    pictures: Pictures, keys: Sequence[Sequence[Key]], workers: int
) -> Iterable[list[torch.Tensor]]:
    """Return a loader of batches, each [images (B, 3, H, W), labels (B,), seeds (B,)].

    keys: the images of each batch, in order. workers: processes that read images.
    """
    sampler = cast("Sequence[list[int]]", keys)  # a key stands for an index
    return DataLoader(pictures, batch_sampler=sampler, num_workers=workers)


def seed_of(*parts: int) -> int:
    """Hash integers to a seed below 2^63."""
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generators(seeds: torch.Tensor, device: torch.device) -> list[torch.Generator]:
    """Return a generator for each image of a batch, for its noise in an attack."""
    return [torch.Generator(device).manual_seed(seed_of(seed, 1)) for seed in seeds.tolist()]


def draw(count: int, samples: int, seed: int) -> list[Key]:
    """Draw `samples` of `count` images, at most all of them, in random order; return their keys."""
    rng = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(count, generator=rng)[:samples].tolist()
    return [(index, seed_of(seed, index)) for index in chosen]


def split(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Split items into batches of `size`, the last of which may be smaller."""
    return [items[start : start + size] for start in range(0, len(items), size)]
