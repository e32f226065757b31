"""Folders: listed recursively; one line counts the files that are left out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgeclip import ImageError
from edgeclip.images import folders, formats
from edgeclip.images.decoding import decode
from edgeclip.images.folders import Listing, expand
from tests.support.commands import BUNDLE
from tests.support.paths import EXAMPLES


@pytest.fixture(autouse=True)
def _no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the decoders of HEIC and JPEG XL, which may be installed."""
    for extra in (formats.HEIF, formats.JPEG_XL):
        monkeypatch.setitem(sys.modules, extra.decoder, None)


def make_files(folder: Path, *names: str) -> str:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return str(folder)


def names_in(folder: str | Path) -> list[str]:
    return [os.path.relpath(path, folder) for path in expand([str(folder)])]


def logged_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [record.getMessage() for record in caplog.records]
    caplog.clear()
    assert not any("\n" in line for line in lines)
    return lines


def test_expand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_files(tmp_path, "b.png", "a.JPG", "deep/c.webp")
    assert expand([folder]) == [f"{folder}/a.JPG", f"{folder}/b.png", f"{folder}/deep/c.webp"]
    assert expand([f"{folder}/*.png", "-"]) == [f"{folder}/b.png", "-"]
    assert expand([f"{folder}/**/*.webp"]) == [f"{folder}/deep/c.webp"]
    assert expand([f"{folder}/none*.png"]) == [f"{folder}/none*.png"]
    assert expand([]) == []
    assert logged_lines(caplog) == []


def test_patterns_expand_as_in_a_shell(tmp_path: Path) -> None:
    folder = make_files(tmp_path, "a/1.png", "b/2.png", "b/notes.txt", "3.png", ".c/4.png")
    assert expand([f"{folder}/[ab]"]) == [f"{folder}/a/1.png", f"{folder}/b/2.png"]
    assert expand([f"{folder}/*"]) == [f"{folder}/{n}" for n in ("3.png", "a/1.png", "b/2.png")]
    (tmp_path / "empty").mkdir()
    assert expand([f"{folder}/empt[y]"]) == [f"{folder}/empty"]
    (tmp_path / "gone.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    assert expand([f"{folder}/*.png"]) == [f"{folder}/3.png", f"{folder}/gone.png"]


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("**", "0.png a/1.png a/2.jpg a/b/3.png a/b/c/4.jpg b/5.png"),
        ("**/", "0.png a/1.png a/2.jpg a/b/3.png a/b/c/4.jpg b/5.png"),
        ("**/*", "0.png a/1.png a/2.jpg a/b/3.png a/b/c/4.jpg b/5.png"),
        ("**/*.png", "0.png a/1.png a/b/3.png b/5.png"),
        ("**/[0-2].*", "0.png a/1.png a/2.jpg"),
        ("**/b/*.png", "a/b/3.png b/5.png"),
        ("**/b/**/*.jpg", "a/b/c/4.jpg"),
        ("**/*/**/*.jpg", "a/2.jpg a/b/c/4.jpg"),
        ("**/c", "a/b/c/4.jpg"),  # a folder is listed recursively
        ("a/**/*.png", "a/1.png a/b/3.png"),
        ("?/**/*.png", "a/1.png a/b/3.png b/5.png"),
        ("a/*/**/*.jpg", "a/b/c/4.jpg"),
        ("a**/*.png", "a/1.png"),  # ** is not a whole name here
        ("**/*.PNG", None),
        ("**/a*.png", None),
        ("none/**/*.png", None),
    ],
)
def test_two_stars_match_any_depth(
    pattern: str, matches: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("0.png", "a/1.png", "a/2.jpg", "a/b/3.png", "a/b/c/4.jpg", "b/5.png", "b/notes.txt")
    folder = make_files(tmp_path, *names)
    whole = f"{folder}/{pattern}"
    expected = [pattern] if matches is None else matches.split()
    assert expand([whole]) == [f"{folder}/{name}" for name in expected]
    monkeypatch.chdir(tmp_path)
    assert expand([pattern]) == expected
    assert expand([f"./{pattern}"]) == [f"./{name}" for name in expected]


def test_two_stars_do_not_follow_links_upward(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("1.png", "a/2.png", ".hidden/3.png", "@eaDir/1.png", "a/._2.png", "b.heic", "c.txt")
    folder = make_files(tmp_path / "photos", *names)
    for name, target in (("up", ".."), ("again", "."), ("a/up", ".."), ("once more", "a")):
        (tmp_path / "photos" / name).symlink_to(target)
    assert expand([f"{folder}/**/*.png"]) == [f"{folder}/1.png", f"{folder}/a/2.png"]
    assert logged_lines(caplog) == [f"{folder}/: left out 3: 3 hidden or system"]
    expand([f"{folder}/**"])
    (line,) = logged_lines(caplog)
    assert line.startswith(f"{folder}/: left out 5: 3 hidden or system, 1 .heic (pip install ")
    assert line.endswith(", 1 not a picture (.txt)")
    assert expand([f"{folder}/**/*.heic"]) == [f"{folder}/**/*.heic"]
    assert "1 .heic (pip install" in logged_lines(caplog)[0]
    assert expand([f"{folder}/@ea*/**"]) == [f"{folder}/@eaDir/1.png"]  # named by the caller


def test_two_stars_below_a_folder_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    folder = make_files(tmp_path, "shoe[1]/a/1.png", "shoe1/2.png")
    assert expand([f"{folder}/shoe[1]/**/*.png"]) == [f"{folder}/shoe[1]/a/1.png"]
    assert expand([""]) == [""]


def test_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    path = tmp_path / "shoe[1].png"
    path.touch()
    assert expand([str(path)]) == [str(path)]


def test_all_suffixes_are_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    jpegs = [".jpg", ".jpeg", ".jfif", ".jpe", ".mpo", ".JPG"]
    known = [*jpegs, ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".Tiff"]
    folder = make_files(tmp_path, *(f"{i}{suffix}" for i, suffix in enumerate(known)))
    assert len(expand([folder])) == len(known)
    assert logged_lines(caplog) == []
    assert {suffix.lower() for suffix in known} == formats.SUFFIXES


@pytest.mark.parametrize("installed", [False, True])
def test_formats_that_need_a_decoder(
    installed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    make_files(tmp_path, "a.heic", "b.HEIF", "c.hif", "d.jxl", "e.avif", "f.avifs", "g.png")
    monkeypatch.setattr(formats.Extra, "installed", installed)
    listed = names_in(tmp_path)
    if installed:
        assert len(listed) == 7
        assert logged_lines(caplog) == []
        return
    assert listed == ["g.png"]
    (line,) = logged_lines(caplog)
    assert line.startswith(f"{tmp_path}: left out 6: ")
    assert "1 .heic (pip install 'edgeclip[formats]')" in line
    assert "1 .jxl (pip install 'edgeclip[formats]')" in line
    assert "1 .avif (pip install --upgrade pillow)" in line


def test_hidden_and_system_files_are_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_files(
        tmp_path, "a.jpg", "._a.jpg", ".hidden.png", ".thumbnails/a.jpg", ".Trash/deep/b.png"
    )
    systems = (
        "@eaDir", ".@__thumb", "#recycle", "$RECYCLE.BIN", "System Volume Information",
        "__MACOSX", "lost+found",
    )  # fmt: skip
    make_files(tmp_path, *(f"album/{name}/a.jpg" for name in systems))
    assert names_in(tmp_path) == ["a.jpg"]
    assert logged_lines(caplog) == [f"{tmp_path}: left out 11: 11 hidden or system"]
    assert names_in(tmp_path / ".thumbnails") == ["a.jpg"]  # named by the caller
    assert names_in(tmp_path / "album" / "@eaDir") == ["a.jpg"]
    assert logged_lines(caplog) == []


def test_other_files_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_files(tmp_path, "a.png", "notes.txt", "more.txt", "README", ".b.png", "deep/c.heic")
    assert names_in(tmp_path) == ["a.png"]
    heic = "1 .heic (pip install 'edgeclip[formats]')"
    line = f"left out 5: 1 hidden or system, {heic}, 3 not a picture (.txt, no suffix)"
    assert logged_lines(caplog) == [f"{tmp_path}: {line}"]


def test_the_line_stays_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_files(
        tmp_path, *(f"a.k{i}" for i in range(200)), "b.very long suffix", "c.with\nnewline", "d.k1"
    )
    expand([str(tmp_path)])
    (line,) = logged_lines(caplog)
    assert line.startswith(f"{tmp_path}: left out 203: 203 not a picture (.k1, ")
    assert line.endswith(", ...)")
    assert len(line) < len(str(tmp_path)) + 100


def test_several_folders_have_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "b"):
        make_files(tmp_path / name, "1.png", "notes.txt", ".2.png")
    expand([str(tmp_path / "a"), str(tmp_path / "b"), "photo.png"])
    assert logged_lines(caplog) == [
        "2 folders: left out 4: 2 hidden or system, 2 not a picture (.txt)"
    ]


def test_a_folder_without_readable_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_files(tmp_path, "a.heic")
    assert expand([folder]) == [folder]
    with pytest.raises(ImageError, match="no images in this directory"):
        decode(folder)
    assert "pip install 'edgeclip[formats]'" in logged_lines(caplog)[0]


def test_links_are_followed_and_each_folder_is_read_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos = tmp_path / "photos"
    make_files(photos, "1.png", "a/2.png", "a/deep/3.png")
    make_files(tmp_path / "elsewhere", "4.png", "5.jpg")
    (photos / "album").symlink_to(tmp_path / "elsewhere")
    (photos / "0-again").symlink_to(
        photos / "a"
    )  # sorts before the folder, whose own name is listed
    (photos / "loop").symlink_to(".")
    (photos / "a" / "deep" / "up").symlink_to("../..")
    (photos / "6.png").symlink_to("1.png")
    assert names_in(photos) == [
        "1.png", "6.png", "a/2.png", "a/deep/3.png", "album/4.png", "album/5.jpg"
    ]  # fmt: skip
    (tmp_path / "entry").symlink_to(photos)
    assert len(names_in(tmp_path / "entry")) == 6
    # A link two levels up leads to further folders, each listed once.
    (photos / "a" / "top").symlink_to("../..")
    assert sorted(map(os.path.basename, names_in(photos))) == sorted(
        ["1.png", "6.png", "2.png", "3.png", "4.png", "5.jpg"]
    )
    assert logged_lines(caplog) == []


def test_dangling_links_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_files(tmp_path, "a.png")
    for name in ("gone.jpg", "album", ".#lock.png", "notes.txt"):
        (tmp_path / name).symlink_to("nowhere")
    listed = names_in(tmp_path)
    assert listed == ["a.png", "album", "gone.jpg"]
    for name in listed[1:]:
        with pytest.raises(ImageError, match=f"{name}: no such file"):
            decode(tmp_path / name)
    assert logged_lines(caplog) == [
        f"{tmp_path}: left out 2: 1 hidden or system, 1 not a picture (.txt)"
    ]


def test_pipes_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    make_files(tmp_path, "a.png")
    assert names_in(tmp_path) == ["a.png"]
    assert logged_lines(caplog) == [f"{tmp_path}: left out 2: 2 not a picture (.png)"]


def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_files(tmp_path, "a.png", "secret/b.png")
    scan = os.scandir

    def refuse(path: str) -> object:  # as the system does, except for root
        if os.path.basename(path) == "secret":
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(folders.os, "scandir", refuse)
    assert expand([folder]) == [f"{folder}/a.png", f"{folder}/secret"]


def test_one_level(tmp_path: Path) -> None:
    make_files(tmp_path, "a.png", "deep/b.png", ".hidden/c.png")
    listing = Listing()
    assert listing.read(str(tmp_path), recursive=False) == [f"{tmp_path}/a.png"]
    assert listing.summary() == "left out 2: 1 hidden or system, 1 below a class folder"


def test_the_command_line_prints_the_line_on_stderr(tmp_path: Path) -> None:
    for name in ("1.png", "._1.png", "notes.txt"):
        (tmp_path / name).write_bytes((EXAMPLES / "bag.png").read_bytes())
    command = [sys.executable, "-m", "edgeclip", "classify", str(tmp_path), "--label", "a bag"]
    command += BUNDLE
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(process.stdout.splitlines()) == 1
    line = f"{tmp_path}: left out 2: 1 hidden or system, 1 not a picture (.txt)"
    assert process.stderr.splitlines().count(line) == 1
