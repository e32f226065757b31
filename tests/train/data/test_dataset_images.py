"""Images of data sets: decoded upright, named when broken, and loaded by workers."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader

from tests.support.data import data_sets
from tests.support.data.data_sets import WRITERS, put, write_shard
from tests.support.data.image_files import chunk, encoded, exif, turned, with_chunks
from tests.support.data.loaded_sets import accept_any_checksum
from train.data import dataset
from train.errors import DataError


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    accept_any_checksum(monkeypatch)


FILES = {  # one image of each data set that consists of files
    "food101": "food-101/images/apple_pie/test0.jpg",
    "pets": "oxford-iiit-pet/images/Abyssinian_test.jpg",
    "flowers102": "flowers-102/jpg/image_00005.jpg",
    "dtd": "dtd/dtd/images/texture0/texture0_test.jpg",
    "fgvc-aircraft": "fgvc-aircraft-2013b/data/images/test0.jpg",
    "cars": "stanford_cars/cars_test/00001.jpg",
    "eurosat": "eurosat/2750/AnnualCrop/AnnualCrop_1.jpg",
    "caltech101": "caltech101/101_ObjectCategories/Faces/image_0001.jpg",
    "tiny-imagenet": "tiny-imagenet-200/val/images/val_0.JPEG",
    "imagenet": "imagenet/val/n01440764/n01440764_1.JPEG",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.usefixtures("unchecked")
def test_images_of_public_sets_are_decoded_by_edgeclip(name: str, tmp_path: Path) -> None:
    """Check that orientation, transparency and damaged metadata are handled as in edgeclip."""
    WRITERS[name](tmp_path)
    image = Image.fromarray(data_sets.picture(8, 16)).convert("RGBA")
    image.putpixel((0, 0), (9, 9, 9, 0))
    sideways = chunk(b"eXIf", exif(turned(6)))
    broken = chunk(b"tEXt", b"a\0b", damage=1)
    (tmp_path / FILES[name]).write_bytes(with_chunks(encoded(image, "PNG"), broken, sideways))
    images = dataset.load(f"{name}:{tmp_path}", train=False)
    shapes = [images[i][0].shape for i in range(len(images))]
    assert shapes.count((16, 8, 3)) == 1
    pixels = images[shapes.index((16, 8, 3))][0]
    upright = np.rot90(np.asarray(image.convert("RGB")), -1).copy()
    upright[0, -1] = 255
    np.testing.assert_array_equal(pixels, upright)


def test_broken_images_are_named(tmp_path: Path) -> None:
    put(tmp_path / "pets" / "cat" / "1.png")
    broken = tmp_path / "pets" / "cat" / "2.png"
    broken.write_bytes(b"no image")
    images = dataset.load(f"folder:{tmp_path / 'pets'}", train=False)
    images[0]
    with pytest.raises(DataError, match=f"image 1 of folder cannot be read: {broken}: not an im"):
        images[1]
    with pytest.raises(DataError, match="image 1 of folder"):
        images[-1]
    with pytest.raises(IndexError):
        images[2]

    data_sets.dtd(tmp_path)
    (tmp_path / "dtd" / "dtd" / "images" / "texture5" / "texture5_test.jpg").write_bytes(b"no")
    with pytest.raises(DataError, match=r"image 5 of dtd cannot be read: .*texture5_test\.jpg"):
        dataset.load(f"dtd:{tmp_path}", train=False)[5]


def test_images_are_upright_rgb(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    sideways = Image.fromarray(data_sets.picture(8, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways.save(tmp_path / "cat" / "1.jpg", exif=exif)
    sideways.convert("L").save(tmp_path / "cat" / "2.png")
    images = dataset.load(f"folder:{tmp_path}", train=False)
    assert images[0][0].shape == (16, 8, 3)
    assert images[1][0].shape == (8, 16, 3)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # from Python 3.12 on
@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.usefixtures("unchecked")
def test_data_loader_workers(start: str, tmp_path: Path) -> None:
    expected = data_sets.cifar10(tmp_path)[False] | data_sets.eurosat(tmp_path)[False]
    samples = {f"{i}": (data_sets.picture(), i % 2) for i in range(5)}
    write_shard(tmp_path / "0.tar", samples)
    data_sets.write_lines(tmp_path / "classes.txt", ["cat", "dog"])
    expected |= {image.tobytes(): ("cat", "dog")[label] for image, label in samples.values()}
    specs = (f"cifar10:{tmp_path}", f"eurosat:{tmp_path}", f"webdataset:{tmp_path / '*.tar'}")
    sets = [dataset.load(spec, train=False) for spec in specs]
    loader = DataLoader(
        ConcatDataset(sets),
        batch_size=None,
        num_workers=2 if start == "fork" else 1,  # a new process needs seconds to import torch
        multiprocessing_context=start,
    )
    classes = [images.classes for images in sets for _ in range(len(images))]
    loaded = {}
    for names, (image, label) in zip(classes, loader, strict=True):
        assert image.dtype == torch.uint8
        loaded[image.numpy().tobytes()] = names[label]
    assert loaded == expected


def test_picture_helper_is_lossless() -> None:
    image = data_sets.picture()
    np.testing.assert_array_equal(Image.open(io.BytesIO(data_sets.png(image))), image)
