"""Mixtures of data sets: shares, classes by name, and errors."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from edgeclip.errors import ImageError
from train.data.dataset import DataSet
from train.data.mixture import mix
from train.data.samples import GreyArrays
from train.errors import DataError, SettingsError
from train.run.loop import epoch_keys
from train.tgazsr_settings import Settings


def data_set(name: str, classes: tuple[str, ...], count: int) -> DataSet:
    """Return `count` images of the grey levels 0, 1, 2, ..., labelled in turn."""
    images = np.arange(count, dtype=np.uint8)[:, None, None].repeat(2, 1).repeat(2, 2)
    labels = np.arange(count) % len(classes)
    return DataSet(name, classes, (f"a {name} of a {{}}",), GreyArrays(images, labels))


PETS = data_set("pets", ("cat", "dog"), 30)
BIRDS = data_set("birds", ("robin", "DOG ", "wren"), 9)


def test_one_set_stays_as_it_is() -> None:
    assert mix([PETS]) is PETS


def test_each_epoch_has_equal_parts() -> None:
    mixed = mix([PETS, BIRDS])
    assert len(mixed) == 60
    levels = [[], []]
    for index in range(60):
        image, _ = mixed[index]
        levels[index % 2].append(int(image[0, 0, 0]))
    assert sorted(levels[0]) == list(range(30))
    assert set(Counter(levels[1]).values()) == {3, 4}
    assert len(Counter(levels[1])) == 9


def test_repeated_images_have_other_seeds_and_batches_both_sets() -> None:
    mixed = mix([PETS, BIRDS])
    settings = Settings(data=("a", "b"), out=Path(), batch_size=20)
    keys = [epoch_keys(len(mixed), epoch, settings, 0, 1) for epoch in range(50)]
    seeds = [seed for epoch in keys for batch in epoch for _, seed in batch]
    assert len(set(seeds)) == len(seeds) == 50 * 60
    shares = [sum(index % 2 for index, _ in batch) for epoch in keys for batch in epoch]
    assert abs(np.mean(shares) - 10) < 0.01  # each epoch has 30 of each
    assert 0 < min(shares) < 10 < max(shares) < 20


def test_classes_are_joined_by_name() -> None:
    mixed = mix([PETS, BIRDS])
    assert mixed.classes == ("cat", "dog", "robin", "wren")
    assert mixed.templates == PETS.templates
    labels = {0: [], 1: []}
    for index in range(18):
        labels[index % 2].append(mixed[index][1])
    assert labels[0] == [0, 1] * 4 + [0]
    assert labels[1] == [2, 1, 3] * 3


def test_classes_of_a_file() -> None:
    names = ["wren", "cat", "Robin", "dog", "cow"]
    mixed = mix([PETS, BIRDS], names)
    assert mixed.classes == tuple(names)
    assert [mixed[index][1] for index in range(6)] == [1, 2, 3, 3, 1, 0]
    alone = mix([PETS], names)
    assert len(alone) == 30
    assert [alone[index][1] for index in range(3)] == [1, 3, 1]


def test_classes_that_a_file_lacks() -> None:
    mixed = mix([PETS, BIRDS], ["dog", "cow"], labelled=False)
    assert [mixed[index][1] for index in range(4)] == [-1, -1, 0, 0]
    with pytest.raises(SettingsError, match=r"--classes lacks 'cat' and 2 others: add every class"):
        mix([PETS, BIRDS], ["dog", "cow"])
    with pytest.raises(SettingsError, match="--classes lacks 'wren': add"):
        mix([PETS, BIRDS], ["dog", "cat", "robin"])


@dataclass(frozen=True)
class Broken:
    """Two images that cannot be read."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        raise ImageError(f"broken{index}.jpg is no image")


def test_broken_image_is_named_with_its_set() -> None:
    mixed = mix([PETS, replace(BIRDS, samples=Broken())])
    with pytest.raises(DataError, match=r"^image 1 of birds cannot be read: broken1\.jpg"):
        mixed[7]
