"""Atomic writes, modes and owners, links and the cache folder."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeclip import EdgeclipError, storage
from tests.support.data.folders import mode, names

NEW = b"new contents"


@pytest.fixture
def umask() -> Iterator[int]:
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_a_new_file_has_the_mode_of_the_umask(tmp_path: Path, umask: int) -> None:
    storage.write(tmp_path / "new", NEW)
    assert (tmp_path / "new").read_bytes() == NEW
    assert mode(tmp_path / "new") == 0o666 & ~umask
    assert names(tmp_path) == {"new"}


def test_text_is_utf_8(tmp_path: Path) -> None:
    storage.write(tmp_path / "text", "café 😀")
    assert (tmp_path / "text").read_bytes() == b"caf\xc3\xa9 \xf0\x9f\x98\x80"


@pytest.mark.parametrize("before", [0o600, 0o640, 0o755, 0o666])
@pytest.mark.parametrize("by_path", [False, True])
def test_an_existing_file_keeps_its_mode(tmp_path: Path, before: int, by_path: bool) -> None:
    path = tmp_path / "old"
    path.write_bytes(b"old and longer than the new contents")
    path.chmod(before)
    if by_path:
        with storage.draft(path) as part:
            assert part != path
            part.unlink()  # a library may delete the file and create it again
            part.write_bytes(NEW)
    else:
        storage.write(path, NEW)
    assert path.read_bytes() == NEW
    assert mode(path) == before
    assert names(tmp_path) == {"old"}


def test_the_new_version_of_a_private_file_is_private_from_the_start(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.touch(0o600)
    with storage.writing(path) as file:
        file.write(NEW)
        (part,) = names(tmp_path) - {"secret"}
        assert mode(tmp_path / part) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_an_existing_file_keeps_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.touch()
    os.chown(path, 1234, 4321)
    storage.write(path, NEW)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 4321)


@pytest.mark.parametrize("before", [None, 0o600, 0o640])
def test_a_file_system_that_has_no_modes_and_owners(
    tmp_path: Path, before: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    path = tmp_path / "file"
    if before is not None:
        path.touch()
        path.chmod(before)
    for name in ("chmod", "fchmod", "chown", "fchown", "lchown"):
        monkeypatch.setattr(os, name, refuse)
    storage.write(path, NEW)
    assert path.read_bytes() == NEW
    with storage.draft(path) as part:
        part.write_bytes(NEW * 2)
    assert path.read_bytes() == NEW * 2
    assert names(tmp_path) == {"file"}


def test_a_draft_that_is_swapped_for_a_link_changes_no_other_file(tmp_path: Path) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    folder.mkdir()
    other.touch(0o600)
    for before in (None, 0o644):
        if before is not None:
            (folder / "out").touch()
            (folder / "out").chmod(before)

        def swap() -> None:
            with storage.draft(folder / "out") as part:
                part.unlink()
                part.symlink_to(other)

        with pytest.raises(EdgeclipError, match=f"cannot write {folder}/out"):
            swap()
        assert mode(other) == 0o600
    assert names(folder) == {"out"}


@pytest.mark.parametrize("old", [b"", b"old", b"old and longer than the new contents"])
def test_a_mount_point_is_written_in_place_after_success(
    tmp_path: Path, old: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # docker run --volume "$PWD/out:/out"

    def busy(*args: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    path = tmp_path / "out"
    path.write_bytes(old)
    path.chmod(0o640)
    inode = path.stat().st_ino
    monkeypatch.setattr(os, "replace", busy)

    def fail() -> None:
        with storage.writing(path) as file:
            file.write(NEW)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == old
    storage.write(path, NEW)
    assert path.read_bytes() == NEW
    (tmp_path / "finished").write_bytes(NEW[:3])
    storage.replace(path, tmp_path / "finished")
    assert path.read_bytes() == NEW[:3]
    assert (path.stat().st_ino, mode(path)) == (inode, 0o640)
    assert names(tmp_path) == {"out"}
    with pytest.raises(EdgeclipError, match="busy"):
        storage.write(tmp_path / "new", NEW)
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_failure_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, error: type[BaseException]
) -> None:
    (tmp_path / "old").write_bytes(b"old")

    def fail(name: str) -> None:
        with storage.writing(tmp_path / name) as file:
            file.write(NEW)
            assert len(names(tmp_path)) == 2
            raise error

    for name in ("old", "new"):
        with pytest.raises((error, EdgeclipError)):
            fail(name)
        assert (tmp_path / "old").read_bytes() == b"old"
        assert names(tmp_path) == {"old"}


def test_files_of_the_user_beside_it_are_not_touched(tmp_path: Path) -> None:
    others = {f"out{suffix}" for suffix in (".part", ".tmp", ".old", "~", ".bak")}
    for name in others:
        (tmp_path / name).write_text("mine")
    storage.write(tmp_path / "out", NEW)
    assert names(tmp_path) == others | {"out"}
    assert all((tmp_path / name).read_text() == "mine" for name in others)


def test_two_writers_at_once_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with storage.writing(path) as first, storage.writing(path) as second:
        for letter in (b"a", b"b"):
            first.write(letter)
            second.write(letter.upper())
    assert path.read_bytes() in (b"ab", b"AB")
    assert names(tmp_path) == {"out"}


def test_links_stay_and_their_target_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "target").write_bytes(b"old")
    (folder / "target").chmod(0o640)
    (tmp_path / "second").symlink_to("folder/target")
    (tmp_path / "first").symlink_to(tmp_path / "second")
    storage.write(tmp_path / "first", NEW)
    assert os.readlink(tmp_path / "first") == str(tmp_path / "second")
    assert os.readlink(tmp_path / "second") == "folder/target"
    assert (folder / "target").read_bytes() == NEW
    assert mode(folder / "target") == 0o640
    assert names(folder) == {"target"}


def test_the_target_of_a_dangling_link_is_made(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/target")
    storage.write(tmp_path / "link", NEW)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "target").read_bytes() == NEW


def test_errors_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("pool")
    (tmp_path / "pool").symlink_to("loop")
    (tmp_path / "file").touch()
    (tmp_path / "link to folder").symlink_to(tmp_path)
    for path, reason in (
        (tmp_path / "loop", "symbolic links"),
        (tmp_path / "loop" / "file", "symbolic links|Not a directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "link to folder", "Is a directory"),
        (f"{tmp_path}/new/", "Is a directory"),
        ("", "Is a directory"),
        (tmp_path / "no folder" / "file", "No such file or directory"),
        (tmp_path / "file" / "file", "Not a directory"),
        (tmp_path / ("x" * 300), "too long"),
        ("/proc/self/fd/9999", "Bad file descriptor"),
        ("/proc/no process/fd/1", "No such file or directory"),
    ):
        with pytest.raises(EdgeclipError, match=reason) as caught, storage.writing(path):
            pytest.fail(f"{path} was opened")
        assert str(caught.value).startswith(f"cannot write {path}: ")
        assert "\n" not in str(caught.value)
    assert names(tmp_path) == {"loop", "pool", "file", "link to folder"}


@pytest.fixture
def as_somebody() -> Iterator[Path]:
    """Yield a folder of an unprivileged user: root may write read-only files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        if os.geteuid() == 0:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
            yield folder
            os.seteuid(0)
        else:
            yield folder
        folder.chmod(0o777)


@pytest.mark.parametrize("target", ["folder", "file"])
def test_read_only_files_are_not_replaced(as_somebody: Path, target: str) -> None:
    path = as_somebody / "file"
    path.write_text("old")
    (path if target == "file" else as_somebody).chmod(0o555)
    with pytest.raises(EdgeclipError) as caught:
        storage.write(path, NEW)
    assert str(caught.value) == f"cannot write {path}: Permission denied"
    assert path.read_text() == "old"
    assert names(as_somebody) == {"file"}


def test_writable_files_of_another_user_are_replaced(as_somebody: Path) -> None:
    # The mode can be preserved, the owner cannot.
    path = as_somebody / "file"
    path.touch()
    path.chmod(0o666)
    if os.getuid() == 0:
        os.seteuid(0)
        os.chown(path, 1234, 4321)
        os.seteuid(65534)
    storage.write(path, NEW)
    assert path.read_bytes() == NEW
    assert mode(path) == 0o666


def test_a_finished_file_takes_its_place(tmp_path: Path, devices: dict[str, Path]) -> None:
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "target").chmod(0o600)
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "finished").write_bytes(NEW)
    storage.replace(tmp_path / "link", tmp_path / "finished")
    assert names(tmp_path) == {"target", "link"}
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == NEW
    assert mode(tmp_path / "target") == 0o600
    for path in (devices["null"], "/dev/fd/1", tmp_path):
        with pytest.raises(EdgeclipError, match="cannot write"):
            storage.replace(path, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == NEW
    assert stat.S_ISCHR(devices["null"].stat().st_mode)


def test_an_input_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "source"
    source.touch()
    (tmp_path / "link").symlink_to("source")
    (tmp_path / "hard link").hardlink_to(source)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inner").touch()
    (tmp_path / "to inner").symlink_to("folder/inner")
    (tmp_path / "to folder").symlink_to("folder")
    for output, inputs in (
        ("source", ["source"]),
        ("./source", ["no file", source]),
        ("link", ["source"]),
        ("source", ["link"]),
        ("hard link", ["folder/inner", "link"]),
        ("folder", ["folder/inner"]),
        ("to folder", ["to inner"]),
        (tmp_path, ["folder/inner"]),
        ("folder", ["folder"]),
    ):
        with pytest.raises(EdgeclipError, match=r"destroy the input .*name another output"):
            storage.check_output(output, inputs)
    with open(source, "rb") as file, pytest.raises(EdgeclipError, match="the input standard input"):
        storage.check_output("source", [file.fileno()])
    for output, inputs in (
        ("new", ["source", "no file", "new"]),
        ("folder/inner", ["source", "folder", 0]),
        ("source", []),
        ("folder", ["source"]),
        ("/dev/null", ["/dev/null"]),  # nothing is destroyed
        (0, [0]),
    ):
        storage.check_output(output, inputs)


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGECLIP_CACHE", str(tmp_path))
    assert storage.default_folder() == tmp_path
    monkeypatch.delenv("EDGECLIP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert storage.default_folder() == tmp_path / "xdg" / "edgeclip"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.default_folder() == tmp_path / ".cache" / "edgeclip"
