"""Data sets of class folders."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.data.data_sets import put
from tests.support.data.loaded_sets import contents, load_error
from train.data import dataset
from train.errors import DataError


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
    images = dataset.load(f"folder:{tmp_path}", train=False)
    assert contents(images) == expected
    assert images.classes == ("ankle boot", "t-shirt")
    assert images.templates == ("This is a photo of a {}",)
    if layout == "{name}":
        assert contents(dataset.load(f"folder:{tmp_path}", train=True)) == expected
    else:
        assert f"expected {tmp_path}/train/<class>/" in load_error(f"folder:{tmp_path}", train=True)


def test_folder_keeps_indices_where_a_split_lacks_a_class(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        put(tmp_path / "train" / name / "1.png")
    for name in ("a", "c"):
        put(tmp_path / "test" / name / "1.png")
    images = dataset.load(f"folder:{tmp_path}", train=False)
    assert images.classes == ("a", "b", "c")
    assert [label for _, label in (images[0], images[1])] == [0, 2]


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
    assert "names 1 classes in its text file and has 2 folders" in load_error(f"folder:{tmp_path}")
    for text in ("Käse\n\nice cream", "\nKäse\nice cream", ""):
        (tmp_path / "classes.txt").write_text(text)
        assert "has an empty line" in load_error(f"folder:{tmp_path}")
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe")
    assert "classes.txt: not UTF-8 text; save it as UTF-8" in load_error(f"folder:{tmp_path}")


@pytest.mark.parametrize("splits", [("train", "val"), ("train",), ("test",), ("test", "val")])
def test_folder_with_other_folders_beside_its_splits(
    splits: tuple[str, ...], tmp_path: Path
) -> None:
    for name in (*(f"{split}/cat" for split in splits), "extra/dog", ".cache/cat", "@eaDir/cat"):
        put(tmp_path / name / "1.png")
    for train in (True, False):
        message = load_error(f"folder:{tmp_path}", train=train)
        assert f"{tmp_path} has extra beside the split {' and '.join(splits)}" in message
    for i in range(5):
        put(tmp_path / f"more{i}" / "1.png")
    assert "has extra, more0, more1, ... beside" in load_error(f"folder:{tmp_path}")
    for name in ("extra", *(f"more{i}" for i in range(5))):
        shutil.rmtree(tmp_path / name)
    images = dataset.load(f"folder:{tmp_path}", train="train" in splits)
    assert images.classes == ("cat",)
    assert len(images) == 1


def test_folder_of_classes_of_one_name(tmp_path: Path) -> None:
    for name in ("a_b", "a b", "c"):
        put(tmp_path / name / "1.png")
    message = load_error(f"folder:{tmp_path}")
    assert "the folders a b and a_b are one class by name, 'a b'" in message
    (tmp_path / "classes.txt").write_text("cat\ndog\ncat\n")
    message = load_error(f"folder:{tmp_path}")
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
    message = load_error(f"folder:{tmp_path}")
    assert "the folders 1 and 2 are one class by name" in message
    assert "(differences of case, white space and Unicode form do not count)" in message
    (tmp_path / "classes.txt").unlink()
    for old, new in (("1", first), ("2", second)):
        (tmp_path / old).rename(tmp_path / new)
    assert "are one class by name" in load_error(f"folder:{tmp_path}")


def test_files_left_out_of_a_folder_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    expected = {put(tmp_path / name): name[0] for name in ("a/1.jfif", "a/deep/2.jpe", "b/3.tif")}
    images = dataset.load(f"folder:{tmp_path}", train=True)
    assert contents(images) == expected
    (tmp_path / "classes.txt").write_text("a\nb\n")  # the file of class names is not left out
    dataset.load(f"folder:{tmp_path}", train=True)
    assert not caplog.records
    for name in ("a/._1.jpg", "b/.thumbnails/3.png", "b/@eaDir/4.png", "5.png", ".c/6.png"):
        put(tmp_path / name)
    for name in (".DS_Store", "8.heic", "README.md", "a/7.heic"):
        (tmp_path / name).touch()
    (tmp_path / "b" / "notes.txt").touch()
    images = dataset.load(f"folder:{tmp_path}", train=True)
    assert contents(images) == expected
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{tmp_path}: left out 10: 5 hidden or system, 2 .heic (pip install 'edgeclip[formats]'), "
        "1 outside the class folders, 2 not a picture (.md, .txt)"
    )
    (tmp_path / "b" / "3.tif").unlink()
    message = load_error(f"folder:{tmp_path}")
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
    images = dataset.load(f"folder:{tmp_path / 'set'}", train=True)
    assert contents(images) == expected
    assert len(images) == 2
    (tmp_path / "set" / "dog" / "gone.png").symlink_to("nowhere")
    images = dataset.load(f"folder:{tmp_path / 'set'}", train=True)
    with pytest.raises(DataError, match=r"image 2 of folder cannot be read: .*gone\.png: no such"):
        images[2]
    for name in ("README.md", "notes.txt", ".lock"):
        (tmp_path / "set" / name).symlink_to("nowhere")
    assert len(dataset.load(f"folder:{tmp_path / 'set'}", train=True)) == 3
    for name in ("bird", "bird.jpg"):
        (tmp_path / "set" / name).symlink_to("nowhere")
        message = load_error(f"folder:{tmp_path / 'set'}")
        assert f"{tmp_path}/set/{name} is a link that leads nowhere" in message
        (tmp_path / "set" / name).unlink()


def test_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "cat" / "1.png")
    put(tmp_path / "cat" / "secret" / "2.png")
    scan = os.scandir

    def refuse(path: str) -> object:  # root may read every folder
        if os.path.basename(path) == "secret":
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    message = load_error(f"folder:{tmp_path}")
    assert f"the folder {tmp_path}/cat/secret cannot be read" in message


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    assert "no folder" in load_error(f"folder:{tmp_path / 'none'}")
    assert "no class folders in" in load_error(f"folder:{tmp_path}")
    put(tmp_path / "photo.png")
    assert "no class folders in" in load_error(f"folder:{tmp_path}")
    (tmp_path / "cat").mkdir()
    assert f"no images in {tmp_path}/cat" in load_error(f"folder:{tmp_path}")
