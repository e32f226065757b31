"""Data sets in their published formats."""

from __future__ import annotations

import pickle
import sys
import types
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from tests.support.data import data_sets
from tests.support.data.data_sets import WRITERS
from tests.support.data.loaded_sets import accept_any_checksum, contents, load_error
from train.data import __main__, class_names, dataset
from train.data.catalog import SOURCES


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    accept_any_checksum(monkeypatch)


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


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.usefixtures("unchecked")
def test_public_data_sets(name: str, tmp_path: Path, requests: list[str]) -> None:
    if name == "pcam":
        pytest.importorskip("h5py")
    written = WRITERS[name](tmp_path)
    assert set(written) == ({False} if name in TEST_ONLY else {False, True})
    for train, expected in written.items():
        images = dataset.load(f"{name}:{tmp_path}", train=train)
        assert images.name == name
        assert len(images.classes) == SOURCES[name].count == len(set(images.classes))
        assert all("_" not in word and word.strip() == word for word in images.classes)
        assert all(template.count("{}") == 1 for template in images.templates)
        assert contents(images).items() >= expected.items()
        assert len(images) >= len(expected)
        again = pickle.loads(pickle.dumps(images))
        assert contents(again) == contents(images)
    assert not requests


@pytest.mark.parametrize("name", SOURCES)
def test_missing_data_sets(
    name: str, tmp_path: Path, requests: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "h5py", types.ModuleType("h5py"))
    monkeypatch.setattr("train.data.fashion_mnist.DEBIAN_FASHION_MNIST", tmp_path / "none")
    for spec, root in ((f"{name}:{tmp_path}", tmp_path), (name, tmp_path / "default")):
        message = load_error(spec)
        assert message.startswith(f"no {SOURCES[name].title} in {root}")
        assert ("--download" in message) == (name not in BY_HAND)
        assert ("get it from http" in message) == (name in BY_HAND)
        assert f"{name}:FOLDER" in message
    if name in TEST_ONLY:
        assert "no official training split" in load_error(f"{name}:{tmp_path}", train=True)
    assert not requests
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SOURCES)
def test_download_only_when_asked(
    name: str, tmp_path: Path, requests: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "h5py", types.ModuleType("h5py"))
    monkeypatch.setattr("train.data.fashion_mnist.DEBIAN_FASHION_MNIST", tmp_path / "none")
    message = load_error(f"{name}:{tmp_path}", download=True)
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
    images = dataset.load(f"CIFAR-10:{tmp_path / 'cifar-10-batches-py'}", train=False)
    assert contents(images) == expected
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
    message = load_error(f"cifar10:{tmp_path}")
    assert "Dataset not found or corrupted" in message
    assert "download=True" not in message
    data_sets.food101(tmp_path)
    (tmp_path / "food-101" / "meta" / "test.json").write_text("{")
    assert "Food-101 in" in load_error(f"food101:{tmp_path}")
    data_sets.dtd(tmp_path)
    (tmp_path / "dtd" / "dtd" / "labels" / "test1.txt").unlink()
    assert "test1.txt" in load_error(f"dtd:{tmp_path}")
    data_sets.eurosat(tmp_path)
    (tmp_path / "eurosat" / "2750" / "River").rename(tmp_path / "elsewhere")
    assert "EuroSAT has 10 classes, but 9 are in" in load_error(f"eurosat:{tmp_path}")
    (tmp_path / "eurosat" / "2750" / "River").mkdir()
    assert "no images in" in load_error(f"eurosat:{tmp_path}")


def test_pcam_needs_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert load_error(f"pcam:{tmp_path}") == "PCAM needs h5py: pip install h5py"


@pytest.mark.usefixtures("unchecked")
def test_flowers102_needs_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_sets.flowers102(tmp_path)
    monkeypatch.delattr("torchvision.datasets.Flowers102.classes")
    assert "need a newer torchvision" in load_error(f"flowers102:{tmp_path}")


def test_fashion_mnist(fashion_folder: Path, fashion: tuple[np.ndarray, np.ndarray]) -> None:
    images = dataset.load(f"fashion-mnist:{fashion_folder}", train=False)
    assert len(images) == 50
    image, label = images[3]
    np.testing.assert_array_equal(image, fashion[0][3])
    assert label == fashion[1][3]
    image[:] = 0  # a copy
    np.testing.assert_array_equal(images[3][0], fashion[0][3])


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
    message = load_error("cifar-11:somewhere")
    assert "unknown data set 'cifar-11', did you mean cifar10? known are tiny-imagenet," in message
    assert message.endswith("folder:PATH, webdataset:PATTERN")
    assert "unknown data set 'zzz': known are" in load_error("zzz")
    assert load_error("folder") == "folder needs a path: write folder:PATH"
    assert load_error("webdataset:") == "webdataset needs a path: write webdataset:PATTERN"


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
