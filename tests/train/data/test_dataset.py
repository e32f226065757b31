"""Data sets in their published formats."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import sys
import types
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader

from tests.support import data_sets
from tests.support.data_sets import WRITERS, put, write_shard
from tests.support.image_files import chunk, encoded, exif, turned, with_chunks
from train.data import __main__, class_names, dataset
from train.data.catalog import SOURCES
from train.errors import DataError

TEST_ONLY = {"sun397", "eurosat", "imagenet-r", "imagenet-sketch", "caltech101", "caltech256"}
BY_HAND = {"tiny-imagenet", "imagenet", "imagenet-r", "imagenet-sketch", "cars"}


@pytest.fixture(autouse=True)
def requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Record the requests to the network, which fail; the default folder has no data set."""
    urls: list[str] = []

    def urlopen(request: object, *args: object, **kwargs: object) -> None:
        urls.append(str(request))
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setenv("EDGECLIP_DATA", str(tmp_path / "default"))
    return urls


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
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


def one_line(spec: str, *, train: bool = False, download: bool = False) -> str:
    """Return the message of the DataError that a data set raises."""
    with pytest.raises(DataError) as caught:
        dataset.load(spec, train=train, download=download)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.usefixtures("unchecked")
def test_public_data_sets(name: str, tmp_path: Path, requests: list[str]) -> None:
    if name == "pcam":
        pytest.importorskip("h5py")
    written = WRITERS[name](tmp_path)
    assert set(written) == ({False} if name in TEST_ONLY else {False, True})
    for train, expected in written.items():
        found = dataset.load(f"{name}:{tmp_path}", train=train)
        assert found.name == name
        assert len(found.classes) == SOURCES[name].count == len(set(found.classes))
        assert all("_" not in word and word.strip() == word for word in found.classes)
        assert all(template.count("{}") == 1 for template in found.templates)
        assert contents(found).items() >= expected.items()
        assert len(found) >= len(expected)
        again = pickle.loads(pickle.dumps(found))
        assert contents(again) == contents(found)
    assert not requests


@pytest.mark.parametrize("name", SOURCES)
def test_missing_data_sets(
    name: str, tmp_path: Path, requests: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "h5py", types.ModuleType("h5py"))
    monkeypatch.setattr("train.data.fashion_mnist.DEBIAN_FASHION_MNIST", tmp_path / "none")
    for spec, root in ((f"{name}:{tmp_path}", tmp_path), (name, tmp_path / "default")):
        message = one_line(spec)
        assert message.startswith(f"no {SOURCES[name].title} in {root}")
        assert ("--download" in message) == (name not in BY_HAND)
        assert ("get it from http" in message) == (name in BY_HAND)
        assert f"{name}:FOLDER" in message
    if name in TEST_ONLY:
        assert "no official training split" in one_line(f"{name}:{tmp_path}", train=True)
    assert not requests
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SOURCES)
def test_download_only_when_asked(
    name: str, tmp_path: Path, requests: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "h5py", types.ModuleType("h5py"))
    monkeypatch.setattr("train.data.fashion_mnist.DEBIAN_FASHION_MNIST", tmp_path / "none")
    message = one_line(f"{name}:{tmp_path}", download=True)
    if name in BY_HAND:
        assert "get it from http" in message
        assert not requests
    elif name == "pcam":  # gdown, which it needs, is not installed
        assert "cannot be downloaded" in message
    else:
        assert "no network here" in message
        assert requests


@pytest.mark.usefixtures("unchecked")
def test_path_may_name_the_folder_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = data_sets.cifar10(tmp_path)[False]
    found = dataset.load(f"CIFAR-10:{tmp_path / 'cifar-10-batches-py'}", train=False)
    assert contents(found) == expected
    monkeypatch.chdir(tmp_path)
    assert contents(dataset.load("cifar10:cifar-10-batches-py", train=False)) == expected
    data_sets.imagenet_r(tmp_path)
    assert len(dataset.load(f"imagenet-r:{tmp_path / 'imagenet-r'}", train=False)) == 200
    (tmp_path / "imagenet-r").rename(tmp_path / "renditions")
    assert len(dataset.load(f"ImageNet-R:{tmp_path / 'renditions'}", train=False)) == 200


@pytest.mark.usefixtures("unchecked")
def test_default_folder(tmp_path: Path) -> None:
    (tmp_path / "default").mkdir()
    expected = data_sets.stl10(tmp_path / "default")
    assert contents(dataset.load("stl10", train=True)) == expected[True]


def test_damaged_data_sets(tmp_path: Path) -> None:
    data_sets.cifar10(tmp_path)  # its checksums are wrong
    message = one_line(f"cifar10:{tmp_path}")
    assert "Dataset not found or corrupted" in message
    assert "download=True" not in message
    data_sets.food101(tmp_path)
    (tmp_path / "food-101" / "meta" / "test.json").write_text("{")
    assert "Food-101 in" in one_line(f"food101:{tmp_path}")
    data_sets.dtd(tmp_path)
    (tmp_path / "dtd" / "dtd" / "labels" / "test1.txt").unlink()
    assert "test1.txt" in one_line(f"dtd:{tmp_path}")
    data_sets.eurosat(tmp_path)
    (tmp_path / "eurosat" / "2750" / "River").rename(tmp_path / "elsewhere")
    assert "EuroSAT has 10 classes, but 9 are in" in one_line(f"eurosat:{tmp_path}")
    (tmp_path / "eurosat" / "2750" / "River").mkdir()
    assert "no images in" in one_line(f"eurosat:{tmp_path}")


def test_pcam_needs_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert one_line(f"pcam:{tmp_path}") == "PCAM needs h5py: pip install h5py"


@pytest.mark.usefixtures("unchecked")
def test_flowers102_needs_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_sets.flowers102(tmp_path)
    monkeypatch.delattr("torchvision.datasets.Flowers102.classes")
    assert "need a newer torchvision" in one_line(f"flowers102:{tmp_path}")


def test_fashion_mnist(fashion_folder: Path, fashion: tuple[np.ndarray, np.ndarray]) -> None:
    found = dataset.load(f"fashion-mnist:{fashion_folder}", train=False)
    assert len(found) == 50
    image, label = found[3]
    np.testing.assert_array_equal(image, fashion[0][3])
    assert label == fashion[1][3]
    image[:] = 0  # a copy
    np.testing.assert_array_equal(found[3][0], fashion[0][3])


@pytest.mark.parametrize(
    ("spec", "name", "path"),
    [
        ("CIFAR-10", "cifar10", None),
        ("Tiny_ImageNet", "tiny-imagenet", None),
        ("FashionMNIST:/data", "fashion-mnist", "/data"),
        ("oxford-iiit-pet", "pets", None),
        ("ImageNet-1k:a:b", "imagenet", "a:b"),
        ("folder:photos", "folder", "photos"),
        ("webdataset:a-{0..3}.tar", "webdataset", "a-{0..3}.tar"),
    ],
)
def test_parse(spec: str, name: str, path: str | None) -> None:
    assert dataset.parse(spec) == (name, None if path is None else Path(path))


def test_unknown_names() -> None:
    message = one_line("cifar-11:somewhere")
    assert "unknown data set 'cifar-11', did you mean cifar10? known are tiny-imagenet," in message
    assert message.endswith("folder:PATH, webdataset:PATTERN")
    assert "unknown data set 'zzz': known are" in one_line("zzz")
    assert one_line("folder") == "folder needs a path: write folder:PATH"
    assert one_line("webdataset:") == "webdataset needs a path: write webdataset:PATTERN"


def test_class_names_are_words() -> None:
    scenes = {
        "abbey": "abbey",
        "bakery/shop": "bakery shop",
        "cubicle/office": "office cubicle",
        "kindergarden_classroom": "kindergarten classroom",
        "lake/natural": "natural lake",
        "temple/east_asia": "east asia temple",
        "underwater/coral_reef": "underwater coral reef",
        "wine_cellar/barrel_storage": "wine cellar barrel storage",
    }
    assert {name: class_names.sun397(name) for name in scenes} == scenes
    objects = {
        "Faces_easy": "centered face",
        "windsor_chair": "windsor chair",
        "water_lilly": "water lily",
        "015.bonsai-101": "bonsai",
        "182.self-propelled-lawn-mower": "self propelled lawn mower",
        "249.yo-yo": "yo-yo",
    }
    assert {name: class_names.caltech(name) for name in objects} == objects


def test_names_are_listed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    __main__.main([])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == len(SOURCES) + 2
    assert rows[1].split()[:2] == ["cifar10", "10"]
    assert rows[1].endswith(str(tmp_path / "default" / "cifar-10-batches-py"))


@pytest.mark.parametrize("layout", ["{name}", "test/{name}", "val/{name}/deeper"])
def test_folder(layout: str, tmp_path: Path) -> None:
    names = {"ankle_boot": "ankle boot", "t-shirt": "t-shirt"}
    expected = {
        put(tmp_path / layout.format(name=key) / f"{i}.{kind}"): name
        for key, name in names.items()
        for i, kind in enumerate(("png", "JPG", "webp"))
    }
    (tmp_path / layout.format(name="t-shirt") / "notes.txt").write_text("no image")
    put(tmp_path / layout.format(name="t-shirt") / "._0.png")  # macOS writes such files
    found = dataset.load(f"folder:{tmp_path}", train=False)
    assert contents(found) == expected
    assert found.classes == ("ankle boot", "t-shirt")
    assert found.templates == ("This is a photo of a {}",)
    if layout == "{name}":
        assert contents(dataset.load(f"folder:{tmp_path}", train=True)) == expected
    else:
        assert f"expected {tmp_path}/train/<class>/" in one_line(f"folder:{tmp_path}", train=True)


def test_folder_keeps_indices_where_a_split_lacks_a_class(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        put(tmp_path / "train" / name / "1.png")
    for name in ("a", "c"):
        put(tmp_path / "test" / name / "1.png")
    found = dataset.load(f"folder:{tmp_path}", train=False)
    assert found.classes == ("a", "b", "c")
    assert [label for _, label in (found[0], found[1])] == [0, 2]


def test_folder_of_a_class_named_train(tmp_path: Path) -> None:
    for name in ("bus", "train"):
        put(tmp_path / name / "1.png")
    assert dataset.load(f"folder:{tmp_path}", train=False).classes == ("bus", "train")


def test_folder_with_names_in_a_file(tmp_path: Path) -> None:
    for name in ("n2", "n1"):
        put(tmp_path / name / "1.png")
    (tmp_path / "classes.txt").write_text("Käse\nice cream\n")
    assert dataset.load(f"folder:{tmp_path}", train=False).classes == ("Käse", "ice cream")
    for text in ("\ufeffKäse\r\nice\u2028cream", "Käse\rice\u2028cream\r\r"):
        (tmp_path / "classes.txt").write_bytes(text.encode())
        assert dataset.load(f"folder:{tmp_path}", train=False).classes == ("Käse", "ice\u2028cream")
    (tmp_path / "classes.txt").write_text("# a | b\n\\# c\n")  # every line is a name
    assert dataset.load(f"folder:{tmp_path}", train=False).classes == ("# a | b", "\\# c")
    (tmp_path / "classes.txt").write_text("Käse\n")
    assert "names 1 classes in its text file and has 2 folders" in one_line(f"folder:{tmp_path}")
    for text in ("Käse\n\nice cream", "\nKäse\nice cream", ""):
        (tmp_path / "classes.txt").write_text(text)
        assert "has an empty line" in one_line(f"folder:{tmp_path}")
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe")
    assert "classes.txt: not UTF-8 text; save it as UTF-8" in one_line(f"folder:{tmp_path}")


@pytest.mark.parametrize("splits", [("train", "val"), ("train",), ("test",), ("test", "val")])
def test_folder_with_others_beside_its_splits(splits: tuple[str, ...], tmp_path: Path) -> None:
    for name in (*(f"{split}/cat" for split in splits), "extra/dog", ".cache/cat", "@eaDir/cat"):
        put(tmp_path / name / "1.png")
    for train in (True, False):
        message = one_line(f"folder:{tmp_path}", train=train)
        assert f"{tmp_path} has extra beside the split {' and '.join(splits)}" in message
    for i in range(5):
        put(tmp_path / f"more{i}" / "1.png")
    assert "has extra, more0, more1, ... beside" in one_line(f"folder:{tmp_path}")
    for name in ("extra", *(f"more{i}" for i in range(5))):
        shutil.rmtree(tmp_path / name)
    found = dataset.load(f"folder:{tmp_path}", train="train" in splits)
    assert found.classes == ("cat",)
    assert len(found) == 1


def test_folder_of_classes_of_one_name(tmp_path: Path) -> None:
    for name in ("a_b", "a b", "c"):
        put(tmp_path / name / "1.png")
    message = one_line(f"folder:{tmp_path}")
    assert "the folders a b and a_b are one class by name, 'a b'" in message
    (tmp_path / "classes.txt").write_text("cat\ndog\ncat\n")
    message = one_line(f"folder:{tmp_path}")
    assert "the folders a b and c are one class by name, 'cat'" in message
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird\n")
    assert dataset.load(f"folder:{tmp_path}", train=True).classes == ("cat", "dog", "bird")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Trousers", "trousers"),
        ("K\u00e4se", "Ka\u0308se"),
        ("ankle boot", "ankle  \u3000boot"),
        ("STRASSE", "Stra\u00dfe"),
    ],
)
def test_folder_of_classes_that_a_model_reads_alike(
    first: str, second: str, tmp_path: Path
) -> None:
    for name in ("1", "2"):
        put(tmp_path / name / "1.png")
    (tmp_path / "classes.txt").write_text(f"{first}\n{second}\n")
    message = one_line(f"folder:{tmp_path}")
    assert "the folders 1 and 2 are one class by name" in message
    assert "(differences of case, white space and Unicode form do not count)" in message
    (tmp_path / "classes.txt").unlink()
    for old, new in (("1", first), ("2", second)):
        (tmp_path / old).rename(tmp_path / new)
    assert "are one class by name" in one_line(f"folder:{tmp_path}")


def test_files_left_out_of_a_folder_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    expected = {put(tmp_path / name): name[0] for name in ("a/1.jfif", "a/deep/2.jpe", "b/3.tif")}
    found = dataset.load(f"folder:{tmp_path}", train=True)
    assert contents(found) == expected
    (tmp_path / "classes.txt").write_text("a\nb\n")  # the file of class names is not left out
    dataset.load(f"folder:{tmp_path}", train=True)
    assert not caplog.records
    for name in ("a/._1.jpg", "b/.thumbnails/3.png", "b/@eaDir/4.png", "5.png", ".c/6.png"):
        put(tmp_path / name)
    for name in (".DS_Store", "8.heic", "README.md", "a/7.heic"):
        (tmp_path / name).touch()
    (tmp_path / "b" / "notes.txt").touch()
    found = dataset.load(f"folder:{tmp_path}", train=True)
    assert contents(found) == expected
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{tmp_path}: left out 10: 5 hidden or system, 2 .heic (pip install 'edgeclip[formats]'), "
        "1 outside the class folders, 2 not a picture (.md, .txt)"
    )
    (tmp_path / "b" / "3.tif").unlink()
    message = one_line(f"folder:{tmp_path}")
    assert f"no images in {tmp_path}/b" in message
    assert "2 not a picture (.md, .txt)" in message


def test_files_left_out_beside_splits_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train/a/1.png", "test/a/1.png", "test/b/1.png"):
        put(tmp_path / name)
    for name in ("test/.a/2.png", "test/3.png", ".4.png", "5.png"):
        put(tmp_path / name)
    dataset.load(f"folder:{tmp_path}", train=False)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/test: left out 4: 2 hidden or system, 2 outside the class folders"
    ]


def test_folder_with_links(tmp_path: Path) -> None:
    expected = {
        put(tmp_path / "elsewhere" / "1.png"): "cat",
        put(tmp_path / "set" / "dog" / "2.png"): "dog",
    }
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(".")
    (tmp_path / "set" / "dog" / "up").symlink_to(".")
    found = dataset.load(f"folder:{tmp_path / 'set'}", train=True)
    assert contents(found) == expected
    assert len(found) == 2
    (tmp_path / "set" / "dog" / "gone.png").symlink_to("nowhere")
    found = dataset.load(f"folder:{tmp_path / 'set'}", train=True)
    with pytest.raises(DataError, match=r"image 2 of folder cannot be read: .*gone\.png: no such"):
        found[2]
    for name in ("README.md", "notes.txt", ".lock"):
        (tmp_path / "set" / name).symlink_to("nowhere")
    assert len(dataset.load(f"folder:{tmp_path / 'set'}", train=True)) == 3
    for name in ("bird", "bird.jpg"):
        (tmp_path / "set" / name).symlink_to("nowhere")
        message = one_line(f"folder:{tmp_path / 'set'}")
        assert f"{tmp_path}/set/{name} is a link that leads nowhere" in message
        (tmp_path / "set" / name).unlink()


def test_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "cat" / "1.png")
    put(tmp_path / "cat" / "secret" / "2.png")
    scan = os.scandir

    def refuse(path: str) -> object:  # the system refuses all but root
        if os.path.basename(path) == "secret":
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    message = one_line(f"folder:{tmp_path}")
    assert f"the folder {tmp_path}/cat/secret cannot be read" in message


FILES = {  # an image of each public set of files
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
    """Check that orientation, transparency and damaged metadata are handled as everywhere."""
    WRITERS[name](tmp_path)
    image = Image.fromarray(data_sets.picture(8, 16)).convert("RGBA")
    image.putpixel((0, 0), (9, 9, 9, 0))
    sideways = chunk(b"eXIf", exif(turned(6)))
    broken = chunk(b"tEXt", b"a\0b", damage=1)
    (tmp_path / FILES[name]).write_bytes(with_chunks(encoded(image, "PNG"), broken, sideways))
    found = dataset.load(f"{name}:{tmp_path}", train=False)
    shapes = [found[i][0].shape for i in range(len(found))]
    assert shapes.count((16, 8, 3)) == 1
    pixels = found[shapes.index((16, 8, 3))][0]
    upright = np.rot90(np.asarray(image.convert("RGB")), -1).copy()
    upright[0, -1] = 255
    np.testing.assert_array_equal(pixels, upright)


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    assert "no folder" in one_line(f"folder:{tmp_path / 'none'}")
    assert "no class folders in" in one_line(f"folder:{tmp_path}")
    put(tmp_path / "photo.png")
    assert "no class folders in" in one_line(f"folder:{tmp_path}")
    (tmp_path / "cat").mkdir()
    assert f"no images in {tmp_path}/cat" in one_line(f"folder:{tmp_path}")


def test_broken_images_are_named(tmp_path: Path) -> None:
    put(tmp_path / "pets" / "cat" / "1.png")
    broken = tmp_path / "pets" / "cat" / "2.png"
    broken.write_bytes(b"no image")
    found = dataset.load(f"folder:{tmp_path / 'pets'}", train=False)
    found[0]
    with pytest.raises(DataError, match=f"image 1 of folder cannot be read: {broken}: not an im"):
        found[1]
    with pytest.raises(DataError, match="image 1 of folder"):
        found[-1]
    with pytest.raises(IndexError):
        found[2]

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
    found = dataset.load(f"folder:{tmp_path}", train=False)
    assert found[0][0].shape == (16, 8, 3)
    assert found[1][0].shape == (8, 16, 3)


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
    classes = [found.classes for found in sets for _ in range(len(found))]
    found = {}
    for names, (image, label) in zip(classes, loader, strict=True):
        assert image.dtype == torch.uint8
        found[image.numpy().tobytes()] = names[label]
    assert found == expected


def test_picture_helper_is_lossless() -> None:
    image = data_sets.picture()
    np.testing.assert_array_equal(Image.open(io.BytesIO(data_sets.png(image))), image)
