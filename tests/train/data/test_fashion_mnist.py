"""Files of Fashion-MNIST, and pictures drawn from its garments."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.data.data_sets import write_idx
from train.data import augment, fashion_mnist
from train.errors import DataError


def test_load_reads_idx_files(fashion_folder: Path, fashion: tuple[np.ndarray, np.ndarray]) -> None:
    split = fashion_mnist.load_split(f"fashion-mnist:{fashion_folder}", train=True)
    np.testing.assert_array_equal(split.images, fashion[0][:150, :, :, 0])
    np.testing.assert_array_equal(split.labels, fashion[1][:150])
    assert (
        len(fashion_mnist.load_split(f"fashion-mnist:{fashion_folder}", train=False).labels) == 50
    )
    assert split.classes[9] == "ankle boot"


def test_load_reads_torchvisions_files(
    tmp_path: Path, fashion: tuple[np.ndarray, np.ndarray]
) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, array in (
        ("train-images-idx3-ubyte", fashion[0][..., 0]),
        ("train-labels-idx1-ubyte", fashion[1].astype(np.uint8)),
        ("t10k-images-idx3-ubyte", fashion[0][..., 0]),
        ("t10k-labels-idx1-ubyte", fashion[1].astype(np.uint8)),
    ):
        write_idx(raw / f"{name}.gz", array)
        (raw / name).write_bytes(gzip.decompress((raw / f"{name}.gz").read_bytes()))
    split = fashion_mnist.load_split(f"fashion-mnist:{tmp_path}", train=True)
    np.testing.assert_array_equal(split.images, fashion[0][..., 0])


def test_missing_and_unknown_data_sets(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="add --download"):
        fashion_mnist.load_split(f"fashion-mnist:{tmp_path}", train=True)
    with pytest.raises(DataError, match="only fashion-mnist"):
        fashion_mnist.load_split("cifar", train=True)


# The ids are fixed because compressed bytes hold the time: each process must collect the same tests.
@pytest.mark.parametrize(
    "raw",
    [b"no gzip", gzip.compress(b""), gzip.compress(b"1234" * 9)],
    ids=["no gzip", "empty", "no array"],
)
def test_damaged_data_set(raw: bytes, fashion_folder: Path) -> None:
    (fashion_folder / "train-images-idx3-ubyte.gz").write_bytes(raw)
    with pytest.raises(DataError, match="is damaged"):
        fashion_mnist.load_split(f"fashion-mnist:{fashion_folder}", train=True)


def test_images_without_labels_are_damaged(fashion_folder: Path) -> None:
    labels = fashion_folder / "train-labels-idx1-ubyte.gz"
    labels.write_bytes((fashion_folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    with pytest.raises(DataError, match="is damaged: it has 150 images and 50 labels"):
        fashion_mnist.load_split(f"fashion-mnist:{fashion_folder}", train=True)


def test_recolour_paints_ground_and_garment(fashion: tuple[np.ndarray, np.ndarray]) -> None:
    grey = torch.from_numpy(fashion[0][:33, :, :, 0].copy())
    images = augment.recolour(grey, torch.Generator().manual_seed(0))
    assert images.shape == (33, 3, 28, 28)
    background = (grey == 0).unsqueeze(1).expand_as(images)
    assert images[background].min() >= 0.75
    assert images[~background].max() <= 1
    # One colour per picture: every channel of the background is constant.
    for picture, mask in zip(images, grey == 0, strict=True):
        assert picture[:, mask].std(dim=1).max() < 1e-6
    again = augment.recolour(grey, torch.Generator().manual_seed(0))
    torch.testing.assert_close(images, again, rtol=0, atol=0)


def test_augment_is_seeded_varied_and_in_range(fashion: tuple[np.ndarray, np.ndarray]) -> None:
    grey = torch.from_numpy(fashion[0][:1, :, :, 0].copy()).repeat(200, 1, 1)
    images = augment.augment(grey, torch.Generator().manual_seed(0))
    assert images.shape == (200, 3, 28, 28)
    assert images.min() >= 0
    assert images.max() <= 1
    assert len({picture.sum().item() for picture in images}) > 150
    # Both dark and light backgrounds appear.
    corner = images[:, :, 0, 0].mean(1)
    assert (corner < 0.2).float().mean() > 0.2
    assert (corner > 0.7).float().mean() > 0.2
    again = augment.augment(grey, torch.Generator().manual_seed(0))
    torch.testing.assert_close(images, again, rtol=0, atol=0)
