"""Contents and errors of data sets that train.data.dataset loads."""

from __future__ import annotations

import os

import numpy as np
import pytest

from tests.support.data import data_sets
from train.data import dataset
from train.errors import DataError


def accept_any_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision read files with other checksums than the real data sets."""
    for module in ("cifar", "stl10", "flowers102"):
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.check_integrity", lambda path, md5: os.path.isfile(path)
        )


def contents(images: dataset.DataSet) -> data_sets.Classes:
    """Return the class of every image, by its pixels."""
    pairs = [images[i] for i in range(len(images))]
    assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image, _ in pairs)
    return {image.tobytes(): images.classes[label] for image, label in pairs}


def load_error(spec: str, *, train: bool = False, download: bool = False) -> str:
    """Return the message of the DataError that a data set raises."""
    with pytest.raises(DataError) as caught:
        dataset.load(spec, train=train, download=download)
    message = str(caught.value)
    assert "\n" not in message
    return message
