"""WebDataset shards."""

from __future__ import annotations

import pickle
import sys
import tarfile
from pathlib import Path

import pytest

from tests.support.data.data_sets import Classes, picture, write_lines, write_shard, write_tar
from tests.support.data.loaded_sets import contents, load_error
from tests.support.paths import VECTORS
from train.data import dataset
from train.errors import DataError


@pytest.fixture
def shards(tmp_path: Path) -> dict[str, Classes]:
    """Write test-08.tar to test-11.tar and train-00.tar; return the contents of each."""
    names = ["cat", "big dog"]
    write_lines(tmp_path / "classes.txt", names)
    kinds = {"test-08": "png", "test-09": "JPG", "test-10": "jpeg", "test-11": "webp"}
    written: dict[str, Classes] = {}
    for shard, kind in (kinds | {"train-00": "png"}).items():
        samples = {f"some.folder/{i:03d}": (picture(), i % 2) for i in range(3)}
        write_shard(tmp_path / f"{shard}.tar", samples, kind)
        written[shard] = {image.tobytes(): names[label] for image, label in samples.values()}
    return written


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("test-{08..11}.tar", ["test-08", "test-09", "test-10", "test-11"]),
        ("test-{0..1}{8..9}.tar", None),
        ("{test,train}-00.tar", None),
        ("test-{09..08}.tar", None),
        ("test-{09..12}.tar", None),
        ("none-*.tar", None),
        ("test-1*.tar", ["test-10", "test-11"]),
        ("train-00.tar", ["train-00"]),
    ],
)
def test_patterns(
    pattern: str, names: list[str] | None, tmp_path: Path, shards: dict[str, Classes]
) -> None:
    spec = f"webdataset:{tmp_path / pattern}"
    if names is None:
        assert pattern.partition("{")[0].partition("*")[0] in load_error(spec)
        return
    expected = {key: name for shard in names for key, name in shards[shard].items()}
    images = dataset.load(spec, train=True)
    assert contents(images) == expected
    assert contents(pickle.loads(pickle.dumps(images))) == expected
    assert images.classes == ("cat", "big dog")
    assert images.templates == ("This is a photo of a {}",)


def test_messages_about_patterns(tmp_path: Path, shards: dict[str, Classes]) -> None:
    folder = f"webdataset:{tmp_path}"
    assert "the range {09..08} is empty" in load_error(f"{folder}/test-{{09..08}}.tar")
    assert "must hold a range" in load_error(f"{folder}/{{test,train}}-00.tar")
    assert "must hold a range" in load_error(f"{folder}/test-{{08..11.tar")
    assert f"no shard {tmp_path}/test-12.tar" in load_error(f"{folder}/test-{{09..12}}.tar")
    assert "no shard https:" in load_error("webdataset:https://example.org/0.tar")


def test_folder_with_both_splits(tmp_path: Path, shards: dict[str, Classes]) -> None:
    spec = f"webdataset:{tmp_path}"
    assert contents(dataset.load(spec, train=True)) == shards["train-00"]
    assert len(dataset.load(spec, train=False)) == 12
    (tmp_path / "train-00.tar").unlink()
    assert "no training shards in" in load_error(spec, train=True)


def test_folder_of_clip_benchmark(tmp_path: Path, shards: dict[str, Classes]) -> None:
    root = tmp_path / "wds [v1]"  # brackets are no pattern in a folder's name
    for split, shard in (("train", "train-00"), ("test", "test-08")):
        (root / split).mkdir(parents=True)
        (tmp_path / f"{shard}.tar").rename(root / split / "0.tar")
        write_lines(root / split / "nshards.txt", ["1"])
    (tmp_path / "classes.txt").rename(root / "classnames.txt")
    write_lines(
        root / "zeroshot_classification_templates.txt", ["a photo of a {c}.", 'a "{c}".', ""]
    )
    train, test = (dataset.load(f"webdataset:{root}", train=train) for train in (True, False))
    assert contents(train) == shards["train-00"]
    assert contents(test) == shards["test-08"]
    assert test.classes == ("cat", "big dog")
    assert test.templates == ("a photo of a {}.", 'a "{}".')
    templates = root / "zeroshot_classification_templates.txt"
    templates.write_bytes("\ufeffa {c}.\ra\u2028{c}".encode())
    assert dataset.load(f"webdataset:{root}", train=False).templates == ("a {}.", "a\u2028{}")
    templates.write_bytes(b"\xe9 {c}")
    assert "templates.txt: not UTF-8 text" in load_error(f"webdataset:{root}")


def test_folder_of_shards_alone(tmp_path: Path) -> None:
    write_lines(tmp_path / "classes.txt", ["cat"])
    assert "no shards in" in load_error(f"webdataset:{tmp_path}")
    write_shard(tmp_path / "0.tar", {"a": (picture(), 0)})
    for train in (False, True):
        assert len(dataset.load(f"webdataset:{tmp_path}", train=train)) == 1


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b"", "b.png": b"", "b.cls": b"0"}, "sample a has no .cls"),
        ({"x/b.cls": b"0"}, "sample x/b has no image (jpg, png, ...)"),
        ({"a.png": b"", "a.cls": b"cat"}, "a.cls holds b'cat', not a class index"),
        ({"a.png": b"", "a.cls": b"-1"}, "a.cls holds -1"),
        ({"a.png": b"", "a.cls": b"2"}, "names 2 classes, and the shards have label 2"),
        ({"a.png": b"", "a.jpg": b"", "a.cls": b"0"}, "the sample a has two images"),
        ({"a.txt": b"words"}, "no images in"),
        ({}, "no images in"),
    ],
)
def test_malformed_shards(members: dict[str, bytes], message: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", members)
    assert "no class names in" in load_error(f"webdataset:{tmp_path}/0.tar")
    write_lines(tmp_path / "classes.txt", ["cat", "dog"])
    assert message in load_error(f"webdataset:{tmp_path}/0.tar")


def test_damaged_and_compressed_shards(tmp_path: Path) -> None:
    write_lines(tmp_path / "classes.txt", ["cat", "dog"])
    shard = tmp_path / "0.tar"
    write_shard(shard, {f"{i}": (picture(40, 40), 0) for i in range(3)})
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        second = tar.getmembers()[3].offset  # start of the second sample
    ends = (0, 100, 512 + 300, 512 * 4 + 100, len(whole) // 3, second, second + 100)
    damaged = whole[:second] + b"?" * 512 + whole[second + 512 :]
    for raw in (b"no tar file" * 100, damaged, *(whole[:end] for end in ends)):
        shard.write_bytes(raw)
        message = load_error(f"webdataset:{shard}")
        assert message.startswith(f"{shard}")
    with tarfile.open(shard, "w:gz"):
        pass
    assert "no intact, uncompressed tar file" in load_error(f"webdataset:{shard}")


@pytest.mark.parametrize("kind", ["jfif", "mpo", "tif", "GIF", "bmp", "heic"])
def test_every_suffix_is_an_image(kind: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "classes.txt", ["cat", "dog"])
    samples = {"a": (picture(), 1)}
    write_shard(tmp_path / "0.tar", samples, kind)
    images = dataset.load(f"webdataset:{tmp_path}", train=False)
    assert contents(images) == {samples["a"][0].tobytes(): "dog"}


def test_an_image_without_its_decoder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    heic = (VECTORS / "red_over_blue.heic").read_bytes()
    write_lines(tmp_path / "classes.txt", ["cat"])
    write_tar(tmp_path / "0.tar", {"a.heic": heic, "a.cls": b"0"})
    images = dataset.load(f"webdataset:{tmp_path}", train=False)
    with pytest.raises(DataError, match=r"pip install 'edgeclip\[formats\]'"):
        images[0]


def test_broken_images_are_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "classes.txt", ["cat"])
    shard = tmp_path / "0.tar"
    write_tar(shard, {"a.jpg": b"no image", "a.cls": b"0"})
    images = dataset.load(f"webdataset:{shard}", train=False)
    with pytest.raises(DataError, match=r"image 0 of webdataset cannot be read: .*0\.tar, byte"):
        images[0]
    shard.unlink()
    with pytest.raises(DataError, match="No such file"):
        images[0]
